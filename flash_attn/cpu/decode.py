"""Attention to a cache of keys and values, and merging of partial results, for the CPU.

Used by ``register``, which makes operators of these functions.  A cache that is not paged is treated
as one page for each sequence; with its queries packed, decoding is ``varlen`` with pages.

Tensors: as ``_ops`` describes them.
"""

import math

import torch
from torch import Tensor

from flash_attn._ops import Cache, Lengths, Options
from flash_attn.cpu import varlen
from flash_attn.cpu.scores import arange, compute_dtype, own

Rotary = tuple[Tensor, Tensor, bool]  # cos, sin, interleaved


def decode_forward(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, cache: Cache, options: Options
) -> tuple[Tensor, Tensor]:
    """out and lse."""
    return _attend(q, k_cache, v_cache, _seqlens(q, cache), cache, options)


def decode_append_forward(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor,
    v: Tensor,
    rotary: Rotary | None,
    cache: Cache,
    options: Options,
) -> tuple[Tensor, Tensor]:
    """out and lse; k and v are in the caches afterwards."""
    seqlens = _seqlens(q, cache)
    cu_new = _cu_seqlens(k, cache)
    sequence, index = _places(cu_new)
    row = seqlens[sequence] + index
    k, v = (_packed(x)[: len(row)] for x in (k, v))
    if rotary is not None:
        k, q = _rotated(k, row, rotary), _rotated_queries(q, seqlens, rotary, cache, options)

    page_size = k_cache.shape[1]
    page = _pages(q, cache)[sequence, row // page_size].long()
    k_cache[page, row % page_size] = k
    v_cache[page, row % page_size] = v
    return _attend(q, k_cache, v_cache, seqlens + cu_new.diff(), cache, options)


def _attend(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, seqlens: Tensor, cache: Cache, options: Options
) -> tuple[Tensor, Tensor]:
    """out and lse; seqlens: (batch,), what of each sequence is in the cache now."""
    cu_seqlens_q = _cu_seqlens(q, cache)
    lengths = Lengths(
        *(cu_seqlens_q, torch.zeros_like(cu_seqlens_q), seqlens, cache.cache_leftpad),
        *(_pages(q, cache), cache.max_seqlen_q, k_cache.shape[1]),
    )
    out, lse = varlen.varlen_forward(_packed(q), k_cache, v_cache, lengths, options)
    if cache.cu_seqlens_q is None:
        out, lse = out.view(q.shape), lse.unflatten(1, q.shape[:2]).transpose(0, 1).contiguous()
    return own(out), own(lse)


def _rotated_queries(
    q: Tensor, seqlens: Tensor, rotary: Rotary, cache: Cache, options: Options
) -> Tensor:
    """q, each row at its own position, or all at the first one where no mask tells them apart."""
    sequence, index = _places(_cu_seqlens(q, cache))
    row = seqlens[sequence]
    if options.causal or options.window_left >= 0 or options.window_right >= 0:
        row = row + index
    packed = _packed(q)
    rotated = _rotated(packed[: len(row)], row, rotary)
    return torch.cat((rotated, packed[len(row) :])).view(q.shape)


def _rotated(x: Tensor, row: Tensor, rotary: Rotary) -> Tensor:
    """x (total, heads, head_dim), each row rotated by its own position."""
    from flash_attn.ops.triton.rotary import apply_rotary  # which imports triton

    cos, sin, interleaved = rotary
    return apply_rotary(x.unsqueeze(1), cos, sin, row, interleaved=interleaved).squeeze(1)


def _seqlens(q: Tensor, cache: Cache) -> Tensor:
    """(batch,): how many rows of each sequence are in the cache."""
    if cache.cache_seqlens is not None:
        return cache.cache_seqlens.long()
    batch = q.shape[0] if cache.cu_seqlens_q is None else len(cache.cu_seqlens_q) - 1
    return torch.full((batch,), cache.cache_seqlen, dtype=torch.int64, device="cpu")


def _pages(q: Tensor, cache: Cache) -> Tensor:
    """(batch, max_blocks): the pages of each sequence."""
    if cache.block_table is not None:
        return cache.block_table
    if cache.cache_batch_idx is not None:
        return cache.cache_batch_idx.unsqueeze(1)
    return arange(len(_seqlens(q, cache))).unsqueeze(1)


def _packed(x: Tensor) -> Tensor:
    """(total, heads, head_dim)"""
    return x.flatten(0, 1) if x.dim() == 4 else x


def _cu_seqlens(x: Tensor, cache: Cache) -> Tensor:
    """(batch + 1,): where each sequence begins in packed x (queries, or new keys)."""
    if cache.cu_seqlens_q is not None:
        return cache.cu_seqlens_q.long()
    return arange(x.shape[0] + 1) * x.shape[1]


def _places(cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    """(cu_seqlens[-1],) each: the sequence of a packed row, and its index there."""
    sequence = arange(len(cu_seqlens) - 1).repeat_interleave(cu_seqlens.diff())
    return sequence, arange(len(sequence)) - cu_seqlens[sequence]


def merge_states(
    out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor
) -> tuple[Tensor, Tensor]:
    """out and lse of attention to the keys of a and b together."""
    lse_a, lse_b = (lse.masked_fill(lse.isinf(), -math.inf) for lse in (lse_a, lse_b))
    largest = torch.maximum(lse_a, lse_b)
    largest = largest.masked_fill(largest == -math.inf, 0)
    weight_a, weight_b = (lse_a - largest).exp(), (lse_b - largest).exp()
    total = weight_a + weight_b
    sees_none = total == 0
    lse = (largest + total.log()).masked_fill(sees_none, math.inf)
    total = total.masked_fill(sees_none, 1)

    def weighted(out: Tensor, weight: Tensor) -> Tensor:
        weight = (weight / total).transpose(-1, -2).unsqueeze(-1)  # (..., seqlen, heads, 1)
        return (out.to(compute_dtype(out)) * weight).masked_fill(weight == 0, 0)

    out = weighted(out_a, weight_a) + weighted(out_b, weight_b)
    return out.to(out_a.dtype).contiguous(), lse.contiguous()
