"""Exact attention in torch operations, with memory linear in the sequence length, for the CPU.

Used by ``_ops``, which registers both functions as operators; it knows nothing of autograd or of
the public arguments.

For every query i, with S = softmax_scale * Q K^T and P = softmax(S) along the keys that i sees,

    out_i = sum_j P_ij v_j          lse_i = log sum_j exp(S_ij)

S and P are never held as a whole: both passes walk over tiles of BLOCK_M queries by BLOCK_N keys.
The forward pass carries the running maximum and sum of each row; the backward pass gets P back from
lse.  16-bit inputs are computed in fp32.  Where torch's own CPU flash attention means the same, it
does the work.
"""

import math

import torch
from torch import Tensor

# Large enough that a tile's matrix products outweigh the cost of calling torch, small enough that a
# tile of a few heads stays in the cache.
BLOCK_M = 256
BLOCK_N = 512


@torch.no_grad()
def attention_forward(
    q: Tensor, k: Tensor, v: Tensor, softmax_scale: float, causal: bool
) -> tuple[Tensor, Tensor]:
    """out (batch, seqlen_q, heads_q, head_dim) and lse (batch, heads_q, seqlen_q).

    q (batch, seqlen_q, heads_q, head_dim), k and v (batch, seqlen_k, heads_k, head_dim), heads_q a
    multiple of heads_k.
    Causal: query i sees key j if j <= i + seqlen_k - seqlen_q.
    lse is a natural logarithm.  A row that sees no key has out 0 and lse +inf.
    """
    causal = causal and q.shape[1] != 1  # a single query sees every key
    if _torch_kernel_agrees(causal, q, k, v):
        return _torch_forward(q, k, v, softmax_scale, causal)
    seqlen_q, seqlen_k, heads_k = q.shape[1], k.shape[1], k.shape[2]
    diagonal = seqlen_k - seqlen_q if causal else None
    qs, ks, vs = (_by_key_head(x, heads_k) for x in (q, k, v))
    outs = qs.new_empty(qs.shape)  # (batch * heads_k, group, seqlen_q, head_dim)
    lses = qs.new_empty(qs.shape[:-1])

    for m in range(0, seqlen_q, BLOCK_M):
        rows = slice(m, min(m + BLOCK_M, seqlen_q))
        q_tile = _tile(qs, rows) * softmax_scale  # (batch * heads_k, group * rows, head_dim)
        out_tile = torch.zeros_like(q_tile)
        row_max = q_tile.new_full((*q_tile.shape[:-1], 1), -math.inf)
        row_sum = torch.zeros_like(row_max)

        for n in range(0, _key_end(rows, diagonal, seqlen_k), BLOCK_N):
            cols = slice(n, min(n + BLOCK_N, seqlen_k))
            hidden = _hidden(rows, cols, diagonal, qs)
            s = q_tile @ _tile(ks, cols).mT
            if hidden is not None:
                s.masked_fill_(hidden, -math.inf)

            # The sums so far are relative to the old maximum: rescale brings them to the new one.
            new_max = torch.maximum(row_max, s.amax(-1, keepdim=True))
            new_max_or_0 = new_max.masked_fill(new_max == -math.inf, 0)  # -inf: no key seen yet
            rescale = (row_max - new_max_or_0).exp_()
            row_max = new_max

            p = s.sub_(new_max_or_0).exp_()
            row_sum.mul_(rescale).add_(p.sum(-1, keepdim=True))
            out_tile.mul_(rescale).add_(_matmul(p, _tile(vs, cols), hidden))

        sees_none = row_sum == 0
        out_tile /= row_sum.masked_fill(sees_none, 1)
        lse_tile = (row_max + row_sum.log()).masked_fill_(sees_none, math.inf)
        outs[:, :, rows] = out_tile.view_as(outs[:, :, rows])
        lses[:, :, rows] = lse_tile.view_as(lses[:, :, rows])

    return _like(outs, q), _own(lses.view(q.shape[0], q.shape[2], seqlen_q))


@torch.no_grad()
def attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    dlse: Tensor | None,
    softmax_scale: float,
    causal: bool,
    deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk and dv, given the gradients dout of out and dlse of lse (None where it is not used).

    With dP = dO V^T, the gradient of S is dS = P * (dP - delta), where
    delta = rowsum(dO * O) - dlse.
    Every sum has a fixed order: the result is the same for either value of ``deterministic``.
    """
    causal = causal and q.shape[1] != 1
    if dlse is None and _torch_kernel_agrees(causal, q, k, v, dout):
        return _torch_backward(dout, q, k, v, out, lse, softmax_scale, causal)
    seqlen_q, seqlen_k, heads_k = q.shape[1], k.shape[1], k.shape[2]
    diagonal = seqlen_k - seqlen_q if causal else None
    qs, ks, vs, outs, douts = (_by_key_head(x, heads_k) for x in (q, k, v, out, dout))
    dqs, dks, dvs = qs.new_zeros(qs.shape), ks.new_empty(ks.shape), vs.new_empty(vs.shape)

    lses = lse.reshape(*qs.shape[:-1], 1)
    deltas = (douts * outs).sum(-1, keepdim=True)
    if dlse is not None:
        deltas -= dlse.reshape(deltas.shape)

    for n in range(0, seqlen_k, BLOCK_N):
        cols = slice(n, min(n + BLOCK_N, seqlen_k))
        k_tile, v_tile = _tile(ks, cols), _tile(vs, cols)  # (batch * heads_k, cols, head_dim)
        dk_tile, dv_tile = torch.zeros_like(k_tile), torch.zeros_like(v_tile)

        for m in range(_query_begin(cols, diagonal), seqlen_q, BLOCK_M):
            rows = slice(m, min(m + BLOCK_M, seqlen_q))
            hidden = _hidden(rows, cols, diagonal, qs)
            q_tile, dout_tile = _tile(qs, rows) * softmax_scale, _tile(douts, rows)

            p = (q_tile @ k_tile.mT).sub_(_tile(lses, rows)).exp_()
            ds = (dout_tile @ v_tile.mT).sub_(_tile(deltas, rows)).mul_(p)
            if hidden is not None:
                p.masked_fill_(hidden, 0)
                ds.masked_fill_(hidden, 0)

            hidden_t = None if hidden is None else hidden.mT
            dv_tile += _matmul(p.mT, dout_tile, hidden_t)
            dk_tile += _matmul(ds.mT, q_tile, hidden_t)
            dq_tile = _matmul(ds, k_tile, hidden).mul_(softmax_scale)
            dqs[:, :, rows] += dq_tile.view_as(dqs[:, :, rows])

        dks[:, 0, cols] = dk_tile
        dvs[:, 0, cols] = dv_tile

    return _like(dqs, q), _like(dks, k), _like(dvs, v)


# Tiles.  Query heads that share a key head are rows of the same tile, so nothing is copied per
# query head.


def _by_key_head(x: Tensor, heads_k: int) -> Tensor:
    """(batch, seqlen, heads, width) -> (batch * heads_k, group, seqlen, width), to compute in."""
    batch, seqlen, heads, head_dim = x.shape
    x = x.to(_compute_dtype(x)).transpose(1, 2)
    return x.reshape(batch * heads_k, heads // heads_k, seqlen, head_dim)


def _like(x: Tensor, original: Tensor) -> Tensor:
    """The inverse of _by_key_head: a contiguous tensor of the original's shape and dtype."""
    batch, seqlen, heads, head_dim = original.shape
    x = x.view(batch, heads, seqlen, head_dim).transpose(1, 2)
    return _own(x.to(original.dtype).contiguous())


def _own(x: Tensor) -> Tensor:
    """Contiguous x, no copy, but no view to autograd: callers may change a result in place."""
    return torch.ops.aten._unsafe_view(x, x.shape)


def _tile(x: Tensor, part: slice) -> Tensor:
    """(batch * heads_k, group, seqlen, width) -> (batch * heads_k, group * part, width)."""
    return x[:, :, part].flatten(1, 2)


def _compute_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


# Visibility.  ``diagonal`` is None without a mask; else query i sees the keys j <= i + diagonal.


def _key_end(rows: slice, diagonal: int | None, seqlen_k: int) -> int:
    """The end of the keys that any of the rows sees."""
    return seqlen_k if diagonal is None else min(rows.stop + diagonal, seqlen_k)


def _query_begin(cols: slice, diagonal: int | None) -> int:
    """The first row of the first query block that sees any of the cols."""
    return 0 if diagonal is None else max(cols.start - diagonal, 0) // BLOCK_M * BLOCK_M


def _hidden(rows: slice, cols: slice, diagonal: int | None, like: Tensor) -> Tensor | None:
    """Which keys of a tile its rows don't see, (group * rows, cols); None if they see them all."""
    if diagonal is None or cols.stop - 1 <= rows.start + diagonal:
        return None
    i = torch.arange(rows.start, rows.stop).unsqueeze(-1)
    j = torch.arange(cols.start, cols.stop)
    return (j > i + diagonal).repeat(like.shape[1], 1)


def _matmul(weights: Tensor, values: Tensor, hidden: Tensor | None) -> Tensor:
    """weights @ values, where a hidden weight (0) hides its value even if that is inf or NaN."""
    if hidden is None:
        return weights @ values
    finite = values.isfinite().all(-1, keepdim=True)
    if finite.all():
        return weights @ values
    result = weights @ values.masked_fill(~finite, 0)
    for j in (~finite).any(0).flatten().nonzero().flatten().tolist():
        part = values[:, j : j + 1].masked_fill(finite[:, j : j + 1], 0)
        result += (weights[..., j : j + 1] * part).masked_fill(hidden[:, j : j + 1], 0)
    return result


# torch's own CPU flash attention: (batch, heads, seqlen, head_dim), causal aligned top-left, no
# gradient of lse.  It multiplies hidden keys by 0, and sums 16-bit gradients in 16 bits: it gets
# finite inputs, and them in fp32.


def _torch_kernel_agrees(causal: bool, q: Tensor, k: Tensor, *others: Tensor) -> bool:
    if q.numel() == 0 or k.numel() == 0:
        return False
    if not causal:
        return True
    return q.shape[1] == k.shape[1] and all(x.isfinite().all() for x in (q, k, *others))


def _torch_forward(
    q: Tensor, k: Tensor, v: Tensor, softmax_scale: float, causal: bool
) -> tuple[Tensor, Tensor]:
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        *map(_heads_first, (q, k, v)), 0.0, causal, scale=softmax_scale
    )
    return _own(out.transpose(1, 2).to(q.dtype).contiguous()), _own(lse.contiguous())


def _torch_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    softmax_scale: float,
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        *map(_heads_first, (dout, q, k, v, out)), lse, 0.0, causal, scale=softmax_scale
    )
    dq, dk, dv = (_own(grad.transpose(1, 2).to(q.dtype).contiguous()) for grad in grads)
    return dq, dk, dv


def _heads_first(x: Tensor) -> Tensor:
    """(batch, seqlen, heads, head_dim) -> (batch, heads, seqlen, head_dim), rows contiguous."""
    x = x.to(_compute_dtype(x))
    return (x if x.stride(-1) == 1 else x.contiguous()).transpose(1, 2)
