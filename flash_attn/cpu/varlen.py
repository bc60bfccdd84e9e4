"""Sequences of different lengths in one tensor, for the CPU: batches of those of equal lengths.

Used by ``register``, which makes operators of these functions.  Each batch is gathered by row index,
which serves paged keys and keys with leading gaps alike, and goes through ``attention``.

Tensors: q, out and their gradients (total_q, heads_q, head_dim); k, v and theirs (total_k, heads_k,
head_dim), or paged k and v (num_blocks, page_size, heads_k, head_dim); lse (heads_q, total_q).  Rows
that belong to no sequence have out 0, lse +inf and gradients 0.  v and out may have a head_dim of their
own, as in ``attention``.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from flash_attn._ops import Lengths, Options
from flash_attn.cpu import attention
from flash_attn.cpu.scores import arange, compute_dtype


def varlen_forward(
    q: Tensor, k: Tensor, v: Tensor, lengths: Lengths, options: Options
) -> tuple[Tensor, Tensor]:
    """out and lse."""
    out = q.new_zeros(*q.shape[:-1], v.shape[-1])
    lse = q.new_full((q.shape[1], q.shape[0]), math.inf, dtype=compute_dtype(q))
    for sequences, rows, rows_k in _equal_lengths(lengths):
        ks, vs = (_gather_keys(x, rows_k, sequences, lengths) for x in (k, v))
        outs, lses = attention.attention_forward(q[rows], ks, vs, options, sequences)
        out[rows] = outs
        lse[:, rows] = lses.transpose(0, 1)
    return out, lse


def varlen_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    dlse: Tensor | None,
    lengths: Lengths,
    options: Options,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk and dv, given the gradients dout of out and dlse of lse (None where it is not used)."""
    dq, dk, dv = (x.new_zeros(x.shape) for x in (q, k, v))
    for sequences, rows, rows_k in _equal_lengths(lengths):
        lses = lse[:, rows].transpose(0, 1)
        dlses = None if dlse is None else dlse[:, rows].transpose(0, 1)
        dq[rows], dk[rows_k], dv[rows_k] = attention.attention_backward(
            dout[rows], q[rows], k[rows_k], v[rows_k], out[rows], lses, dlses, options, sequences
        )
    return dq, dk, dv


def varlen_probabilities(
    q: Tensor, k: Tensor, lengths: Lengths, options: Options, probs: Tensor
) -> None:
    """``attention.write_probabilities`` for each sequence; probs (batch, heads_q, ..., ...)."""
    for sequences, rows, rows_k in _equal_lengths(lengths):
        part = probs.new_zeros(len(sequences), q.shape[1], rows.shape[1], rows_k.shape[1])
        attention.write_probabilities(q[rows], k[rows_k], options, part, sequences)
        probs[sequences, :, : rows.shape[1], : rows_k.shape[1]] = part


def _equal_lengths(lengths: Lengths) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Sequences with as many queries and keys as each other: their numbers, rows of q and of k.

    Rows are (len(numbers), seqlen_q) and (len(numbers), seqlen_k), in the packed tensors; of paged
    keys, in the sequence.  Sequences without queries or keys are left out.
    """
    begin_q, begin_k = lengths.cu_seqlens_q[:-1], lengths.cu_seqlens_k[:-1]
    if lengths.block_table is not None:
        begin_k = torch.zeros_like(begin_k)
    if lengths.leftpad_k is not None:
        begin_k = begin_k + lengths.leftpad_k

    seqlens = torch.stack([lengths.cu_seqlens_q.diff(), lengths.seqlens_k], dim=1)
    kinds, kind, counts = seqlens.unique(dim=0, return_inverse=True, return_counts=True)
    members = kind.argsort(stable=True).split(counts.tolist())
    for (seqlen_q, seqlen_k), sequences in zip(kinds.tolist(), members):
        if seqlen_q > 0 and seqlen_k > 0:
            rows_q = begin_q[sequences, None] + arange(seqlen_q)
            yield sequences, rows_q, begin_k[sequences, None] + arange(seqlen_k)


def _gather_keys(x: Tensor, rows: Tensor, sequences: Tensor, lengths: Lengths) -> Tensor:
    """The rows of x, which may be paged: (len(sequences), seqlen_k, heads_k, head_dim)."""
    if lengths.block_table is None:
        return x[rows]
    page_size = x.shape[1]
    pages = lengths.block_table[sequences].long().gather(1, rows // page_size)
    return x[pages, rows % page_size]
