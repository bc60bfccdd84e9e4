"""Exact attention in torch operations, with memory linear in the sequence length, for the CPU.

Used by ``register``, which makes operators of these functions, and by ``varlen``; it knows nothing of
autograd or of the public arguments.

For every query i, with scores S = softmax_scale * Q K^T (capped, biased: ``scores``), P = softmax(S)
along the keys that i sees, and dropout weights D_ij = 1 / (1 - p) where kept, else 0,

    out_i = sum_j D_ij P_ij v_j          lse_i = log sum_j exp(S_ij)

S and P are never held as a whole: both passes walk over tiles of queries by keys that see each
other.  The forward pass carries the running maximum and sum of each row; the backward pass gets P
back from lse.  16-bit inputs are computed in fp32.  Where torch's own CPU flash attention means the
same, it does the work (``torch_kernel``).

Tensors: q, out and their gradients (batch, seqlen_q, heads_q, head_dim); k, v and theirs (batch,
seqlen_k, heads_k, head_dim), heads_q a multiple of heads_k; lse (batch, heads_q, seqlen_q), a natural
logarithm.  v, out and their gradients may have a head_dim of their own.  A row that sees no key has
out 0 and lse +inf, and passes no gradient.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from flash_attn._ops import Options
from flash_attn.cpu import torch_kernel
from flash_attn.cpu.scores import BLOCK_M, BLOCK_N, Scores, arange, blocks, compute_dtype, own

# Tiles of several heads are worked on together, up to so many scores.
PART_SCORES = 4 * BLOCK_M * BLOCK_N


def attention_forward(
    q: Tensor, k: Tensor, v: Tensor, options: Options, sequences: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """out and lse.

    sequences: (batch,), the numbers of the batch entries among all sequences, for slopes and
    dropout; None: 0, 1, ...
    """
    heads_k, is_causal = k.shape[2], torch_kernel.mask_of(q, k, v, options)
    if is_causal is None:
        scores = Scores.of(q, k, options, sequences)
        outs, lses = _forward(scores, *(_by_key_head(x, heads_k) for x in (q, k, v)))
        return _like(outs, q), own(lses.view(q.shape[0], q.shape[2], q.shape[1]))
    out, lse, wrong = torch_kernel.forward(q, k, v, is_causal, options.softmax_scale)
    if wrong is not None:
        parts = (_by_key_head(x, heads_k)[wrong] for x in (q, k, v))
        outs, lses = _forward(Scores.of(q, k, options, sequences).part(wrong), *parts)
        _replace(out, heads_k, wrong, outs)
        _replace(lse.mT.unsqueeze(-1), heads_k, wrong, lses.unsqueeze(-1))
    return out, lse


def _forward(scores: Scores, qs: Tensor, ks: Tensor, vs: Tensor) -> tuple[Tensor, Tensor]:
    """outs (n, group, seqlen_q, head_dim) and lses (n, group, seqlen_q)."""
    outs, lses = qs.new_empty(*qs.shape[:-1], vs.shape[-1]), qs.new_empty(qs.shape[:-1])
    for part in _parts(qs, ks):
        _forward_part(scores.part(part), *(x[part] for x in (qs, ks, vs, outs, lses)))
    return outs, lses


def _forward_part(
    scores: Scores, qs: Tensor, ks: Tensor, vs: Tensor, outs: Tensor, lses: Tensor
) -> None:
    """Fills outs (n, group, seqlen_q, head_dim) and lses (n, group, seqlen_q)."""
    for rows in _query_blocks(qs):
        q_tile = _tile(qs, rows) * scores.softmax_scale  # (n, group * rows, head_dim)
        out_tile = q_tile.new_zeros(*q_tile.shape[:-1], vs.shape[-1])
        row_max = q_tile.new_full((*q_tile.shape[:-1], 1), -math.inf)
        row_sum = torch.zeros_like(row_max)

        for cols in blocks(scores.see.keys(rows), BLOCK_N):
            s, hidden, _ = scores.tile(q_tile, _tile(ks, cols), rows, cols)

            # The sums so far are relative to the old maximum: rescale brings them to the new one.
            new_max = torch.maximum(row_max, s.amax(-1, keepdim=True))
            new_max_or_0 = new_max.masked_fill(new_max == -math.inf, 0)  # -inf: no key seen yet
            rescale = (row_max - new_max_or_0).exp_()
            row_max = new_max

            p = s.sub_(new_max_or_0).exp_()
            row_sum.mul_(rescale).add_(p.sum(-1, keepdim=True))
            keep = scores.keep(rows, cols)
            if keep is not None:
                p.mul_(keep)
            out_tile.mul_(rescale).add_(_matmul(p, _tile(vs, cols), hidden))

        sees_none = row_sum == 0
        out_tile *= scores.dropout_scale / row_sum.masked_fill(sees_none, 1)
        lse_tile = (row_max + row_sum.log()).masked_fill_(sees_none, math.inf)
        outs[:, :, rows] = out_tile.view_as(outs[:, :, rows])
        lses[:, :, rows] = lse_tile.view_as(lses[:, :, rows])


def attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    dlse: Tensor | None,
    options: Options,
    sequences: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk and dv, given the gradients dout of out and dlse of lse (None where it is not used).

    With dP = D * dO V^T, the gradient of S is dS = P * (dP - delta), where
    delta = rowsum(dO * O) - dlse, and dV = (D * P)^T dO.  Every sum has a fixed order.
    """
    heads_k, is_causal = k.shape[2], torch_kernel.mask_of(q, k, v, options)
    tensors = dout, q, k, v, out, lse.mT.unsqueeze(-1)  # lse (batch, seqlen_q, heads_q, 1)
    if dlse is not None or is_causal is None:
        scores = Scores.of(q, k, options, sequences)
        dlses = None if dlse is None else _by_key_head(dlse.mT.unsqueeze(-1), heads_k)
        parts = (_by_key_head(x, heads_k) for x in tensors)
        dqs, dks, dvs = _backward(scores, dlses, *parts)
        return _like(dqs, q), _like(dks, k), _like(dvs, v)
    grads, wrong = torch_kernel.backward(dout, q, k, v, out, lse, is_causal, options.softmax_scale)
    if wrong is not None:
        parts = (_by_key_head(x, heads_k)[wrong] for x in tensors)
        scores = Scores.of(q, k, options, sequences).part(wrong)
        for grad, values in zip(grads, _backward(scores, None, *parts)):
            _replace(grad, heads_k, wrong, values)
    return grads


def _backward(
    scores: Scores,
    dlses: Tensor | None,
    douts: Tensor,
    qs: Tensor,
    ks: Tensor,
    vs: Tensor,
    outs: Tensor,
    lses: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """dqs (n, group, seqlen_q, head_dim); dks and dvs (n, 1, seqlen_k, head_dim)."""
    dqs, dks, dvs = qs.new_zeros(qs.shape), ks.new_empty(ks.shape), vs.new_empty(vs.shape)
    deltas = (douts * outs).sum(-1, keepdim=True)
    if dlses is not None:
        deltas -= dlses
    douts = douts * scores.dropout_scale  # D = keep / (1 - p) comes only with dO
    for part in _parts(qs, ks):
        tensors = (douts, qs, ks, vs, lses, deltas, dqs, dks, dvs)
        _backward_part(scores.part(part), *(x[part] for x in tensors))
    return dqs, dks, dvs


def _backward_part(
    scores: Scores,
    douts: Tensor,
    qs: Tensor,
    ks: Tensor,
    vs: Tensor,
    lses: Tensor,
    deltas: Tensor,
    dqs: Tensor,
    dks: Tensor,
    dvs: Tensor,
) -> None:
    """Adds to dqs (n, group, seqlen_q, head_dim); fills dks and dvs (n, 1, seqlen_k, head_dim)."""
    for cols in blocks(slice(0, ks.shape[2]), BLOCK_N):
        k_tile, v_tile = _tile(ks, cols), _tile(vs, cols)  # (n, cols, head_dim)
        dk_tile, dv_tile = torch.zeros_like(k_tile), torch.zeros_like(v_tile)

        for rows in _query_blocks(qs, scores.see.queries(cols)):
            q_tile, dout_tile = _tile(qs, rows) * scores.softmax_scale, _tile(douts, rows)
            s, hidden, tanh = scores.tile(q_tile, k_tile, rows, cols)
            keep = scores.keep(rows, cols)

            p = s.sub_(_tile(lses, rows)).exp_()
            dp = dout_tile @ v_tile.mT
            if keep is not None:
                dp.mul_(keep)
            ds = dp.sub_(_tile(deltas, rows)).mul_(p)
            if tanh is not None:
                ds.mul_(1 - tanh.square())
            if keep is not None:
                p.mul_(keep)
            if hidden is not None:
                p.masked_fill_(hidden, 0)
                ds.masked_fill_(hidden, 0)

            hidden_t = None if hidden is None else hidden.mT
            dv_tile += _matmul(p.mT, dout_tile, hidden_t)
            dk_tile += _matmul(ds.mT, q_tile, hidden_t)
            dq_tile = _matmul(ds, k_tile, hidden).mul_(scores.softmax_scale)
            dqs[:, :, rows] += dq_tile.view_as(dqs[:, :, rows])

        dks[:, 0, cols] = dk_tile
        dvs[:, 0, cols] = dv_tile


def write_probabilities(
    q: Tensor, k: Tensor, options: Options, probs: Tensor, sequences: Tensor | None = None
) -> None:
    """Writes exp(S - its row's maximum), the sign bit set where dropped, to what queries see.

    probs: (batch, heads_q, at least seqlen_q, at least seqlen_k), q's dtype; the rest stays as it is.
    """
    scores = Scores.of(q, k, options, sequences)
    batch, heads_q = q.shape[0], q.shape[2]
    qs, ks = (_by_key_head(x, k.shape[2]) for x in (q, k))
    heads = arange(batch * heads_q).view(qs.shape[:2])
    for part in _parts(qs, ks):
        part_scores = scores.part(part)
        for rows in _query_blocks(qs):
            cols = scores.see.keys(rows)
            if cols.start == cols.stop:
                continue
            q_tile = _tile(qs[part], rows) * scores.softmax_scale
            s, hidden, _ = part_scores.tile(q_tile, _tile(ks[part], cols), rows, cols)
            row_max = s.amax(-1, keepdim=True)
            p = s.sub_(row_max.masked_fill_(row_max == -math.inf, 0)).exp_()
            keep = part_scores.keep(rows, cols)
            if keep is not None:
                p = torch.where(keep, p, -p)
            if hidden is not None:
                p.masked_fill_(hidden, 0)
            head = heads[part].flatten()
            shape = len(head), rows.stop - rows.start, cols.stop - cols.start
            probs[head // heads_q, head % heads_q, rows, cols] = p.view(shape).to(probs.dtype)


# Tiles.  Query heads that share a key head are rows of the same tile, so nothing is copied per
# query head.


def _by_key_head(x: Tensor, heads_k: int) -> Tensor:
    """(batch, seqlen, heads, width) -> (batch * heads_k, group, seqlen, width), to compute in."""
    batch, seqlen, heads, head_dim = x.shape
    x = x.to(compute_dtype(x)).transpose(1, 2)
    return x.reshape(batch * heads_k, heads // heads_k, seqlen, head_dim)


def _like(x: Tensor, original: Tensor) -> Tensor:
    """The inverse of _by_key_head: contiguous, of the original's heads and dtype."""
    batch, seqlen, heads, _ = original.shape
    x = x.view(batch, heads, seqlen, x.shape[-1]).transpose(1, 2)
    return own(x.to(original.dtype).contiguous())


def _replace(x: Tensor, heads_k: int, which: Tensor, values: Tensor) -> None:
    """Writes values, which look like _by_key_head(x)[which], to x (batch, seqlen, heads, width)."""
    by_key_head = x.transpose(1, 2).unflatten(1, (heads_k, -1))
    by_key_head[which // heads_k, which % heads_k] = values.to(x.dtype)


def _tile(x: Tensor, part: slice) -> Tensor:
    """(n, group, seqlen, width) -> (n, group * part, width)."""
    return x[:, :, part].flatten(1, 2)


def _query_blocks(qs: Tensor, rows: slice | None = None) -> list[slice]:
    """rows, by default all of qs, in blocks: with the group, about BLOCK_M rows of a tile."""
    size = max(16, BLOCK_M // qs.shape[1] // 16 * 16)
    return blocks(slice(0, qs.shape[2]) if rows is None else rows, size)


def _parts(qs: Tensor, ks: Tensor) -> Iterator[slice]:
    """The key heads (of all sequences) in parts whose tiles fit in the cache."""
    rows = min(qs.shape[1] * qs.shape[2], BLOCK_M)
    scores = max(1, rows * min(ks.shape[2], BLOCK_N))
    return iter(blocks(slice(0, len(qs)), max(1, PART_SCORES // scores)))


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
