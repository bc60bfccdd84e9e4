"""Checks of what decoding takes: queries, a cache of keys and values, new ones, rotary tables.

Used by ``_decode`` and ``_upstream`` before anything is launched, alike on every device; in the manner
of ``_checks``.
"""

from collections.abc import Sequence
from typing import NoReturn

import torch
from torch import Tensor

from flash_attn._checks import (
    CPU_DTYPES,
    CUDA_DTYPES,
    MAX_HEAD_DIM,
    check_block_table,
    check_dtype_and_device,
    check_head_sizes,
    check_integers,
    resolve_integer,
    shape_text,
)
from flash_attn.cpu.scores import compute_dtype

# The attention kernels copy vectors of 8 elements; where head_dim is no multiple, a copy is padded.
CACHE_VECTOR = 8
MAX_SPLITS = 128
ROTARY_DIM_MULTIPLE = 16


def check_cache(q: Tensor, k_cache: Tensor, v_cache: Tensor, cu_seqlens_q: Tensor | None) -> int:
    """The number of sequences.

    q (batch, seqlen_q, heads_q, head_dim), or with cu_seqlens_q (total_q, heads_q, head_dim);
    k_cache, v_cache (batch_cache, seqlen_cache or page_size, heads_k, head_dim, as it is or rounded
    up to a multiple of 8).
    """
    q_shape, k_shape = q.shape, k_cache.shape
    if len(q_shape) != (4 if cu_seqlens_q is None else 3):
        layout = "(batch, seqlen_q, ...), or with cu_seqlens_q (total_q, heads_q, head_dim)"
        raise RuntimeError(f"q must have shape {layout}; got {shape_text(q_shape)}")
    if len(k_shape) != 4:
        layout = "(batch_cache, seqlen_cache, heads_k, head_dim), or paged (num_blocks, page_size,"
        raise RuntimeError(
            f"k_cache must have shape {layout} heads_k, head_dim); got {shape_text(k_shape)}"
        )
    if v_cache.shape != k_shape:
        raise RuntimeError(
            "v_cache must have the same shape as k_cache; got v_cache ="
            f" {shape_text(v_cache.shape)}, k_cache = {shape_text(k_shape)}"
        )

    heads_q, head_dim, heads_k = q_shape[-2], q_shape[-1], k_shape[2]
    rounded = -(-head_dim // CACHE_VECTOR) * CACHE_VECTOR
    if k_shape[3] != head_dim and k_shape[3] != rounded:
        raise RuntimeError(
            f"k_cache: head_dim must equal q's, as it is or rounded up to a multiple of"
            f" {CACHE_VECTOR}; got k_cache = {shape_text(k_shape)}, q = {shape_text(q_shape)}"
        )
    check_head_sizes(q_shape, heads_q, heads_k, head_dim, "k_cache")
    check_dtype_and_device(q, k_cache, v_cache, "_cache")
    _check_cache_strides("k_cache", k_cache)
    _check_cache_strides("v_cache", v_cache)

    if cu_seqlens_q is None:
        batch, name, shape = q_shape[0], "q", q_shape
    else:
        batch, name, shape = cu_seqlens_q.numel() - 1, "cu_seqlens_q", cu_seqlens_q.shape
        check_integers(name, cu_seqlens_q, q.device, (batch + 1,), "batch_size + 1")
    if batch < 1:
        raise RuntimeError(f"{name}: batch size must be positive; got {name} = {shape_text(shape)}")
    return batch


def _check_cache_strides(name: str, cache: Tensor) -> None:
    *strides, last = cache.stride()
    if last != 1 and cache.shape[3] > 1:
        raise RuntimeError(
            f"{name} must have contiguous last dimension; got strides {cache.stride()}"
        )
    if not cache.is_cuda or cache.shape[3] % CACHE_VECTOR != 0:  # the latter are copied
        return
    for size, stride in zip(cache.shape, strides):
        if stride % CACHE_VECTOR != 0 and size > 1:
            raise RuntimeError(
                f"{name}: strides must be multiples of {CACHE_VECTOR} elements, as the cache is"
                f" used where it is; got {cache.stride()}"
            )


def check_cache_indices(
    q: Tensor,
    k_cache: Tensor,
    batch: int,
    cache_seqlens: Tensor | None,
    cache_batch_idx: Tensor | None,
    cache_leftpad: Tensor | None,
    block_table: Tensor | None,
) -> int:
    """How many rows a sequence may have: seqlen_cache, or max_blocks * page_size."""
    device = q.device
    if cache_seqlens is not None:
        check_integers("cache_seqlens", cache_seqlens, device, (batch,), "batch_size")
    if cache_leftpad is not None:
        check_integers("cache_leftpad", cache_leftpad, device, (batch,), "batch_size")
    if block_table is not None:
        if cache_batch_idx is not None:
            raise RuntimeError(
                "cache_batch_idx: Paged KVcache does not support cache_batch_idx; got both it and"
                " block_table"
            )
        check_block_table(block_table, device, batch, "k_cache", k_cache)
        return block_table.shape[1] * k_cache.shape[1]
    if cache_batch_idx is not None:
        check_integers("cache_batch_idx", cache_batch_idx, device, (batch,), "batch_size")
    elif k_cache.shape[0] < batch:
        raise RuntimeError(
            f"k_cache must have an entry for each of the {batch} sequences, or cache_batch_idx be"
            f" given; got k_cache = {shape_text(k_cache.shape)}"
        )
    return k_cache.shape[1]


def check_new_keys(
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    heads_k: int,
    has_cache_seqlens: bool,
    is_varlen: bool,
) -> None:
    """k, v (batch, seqlen_new, heads_k, head_dim), or (total_q, heads_k, head_dim) if is_varlen."""
    if k is None or v is None:
        given, missing = ("k", "v") if v is None else ("v", "k")
        raise RuntimeError(
            "If key is supplied, value must also be passed in, and the reverse; got"
            f" {given} without {missing}"
        )
    if not has_cache_seqlens:
        raise RuntimeError(
            "If key is supplied, seqlens_k must also be passed in: cache_seqlens says where k and v"
            " go; got cache_seqlens = None"
        )
    q_shape, shape = q.shape, k.shape
    if is_varlen:
        layout = "(total_q, heads_k, head_dim)"
        want: tuple[int | str, ...] = (q_shape[0], heads_k, q_shape[2])
    else:
        layout = "(batch, seqlen_new, heads_k, head_dim)"
        want = (q_shape[0], shape[1] if len(shape) == 4 else "any", heads_k, q_shape[3])
    if len(shape) != len(want) or shape != want:
        raise RuntimeError(f"k must have shape {layout} = {want}; got {shape_text(shape)}")
    if v.shape != shape:
        raise RuntimeError(
            f"v must have the same shape as k; got v = {shape_text(v.shape)}, k ="
            f" {shape_text(shape)}"
        )
    dtype, device = q.dtype, q.device
    if k.dtype != dtype or v.dtype != dtype or k.device != device or v.device != device:
        check_dtype_and_device(q, k, v)


def check_capacity(cache_seqlen: int, seqlen_new: int, capacity: int, is_paged: bool) -> None:
    """cache_seqlen rows of every sequence, and seqlen_new more, are within the capacity."""
    if cache_seqlen < 0 or cache_seqlen + seqlen_new > capacity:
        if seqlen_new > capacity:
            raise RuntimeError(
                "k: it must have seqlen <= the seqlen of the KV cache; got seqlen_new ="
                f" {seqlen_new}, {_capacity_text(capacity, is_paged)}"
            )
        raise_beyond_capacity("cache_seqlens", cache_seqlen, seqlen_new, capacity, is_paged)


def raise_beyond_capacity(
    name: str, cache_seqlen: int, seqlen_new: int, capacity: int, is_paged: bool
) -> NoReturn:
    new = f" + {seqlen_new} new rows" if seqlen_new else ""
    raise RuntimeError(
        f"{name} must be from 0 to the {_capacity_text(capacity, is_paged)}; got"
        f" {cache_seqlen}{new}"
    )


def _capacity_text(capacity: int, is_paged: bool) -> str:
    if is_paged:
        return f"capacity addressable by block_table, max_blocks * page_size = {capacity}"
    return f"capacity of the KV cache, seqlen_cache = {capacity}"


def check_rotary(
    q: Tensor, rotary_cos: Tensor | None, rotary_sin: Tensor | None, capacity: int, has_new: bool
) -> None:
    """rotary_cos, rotary_sin (seqlen_rotary, rotary_dim / 2), of which one is given at least."""
    if rotary_cos is None or rotary_sin is None:
        given, missing = (
            ("rotary_cos", "rotary_sin") if rotary_sin is None else ("rotary_sin", "rotary_cos")
        )
        raise RuntimeError(f"{given} goes with {missing}; got {missing} = None")
    if not has_new:
        raise RuntimeError(
            "rotary_cos: If rotary cos/sin are provided, new key / value to be appended to KV cache"
            " must also be provided; got k = None"
        )
    shape = rotary_cos.shape
    if len(shape) != 2:
        raise RuntimeError(
            f"rotary_cos must have shape (seqlen_rotary, rotary_dim / 2); got {shape_text(shape)}"
        )
    if rotary_sin.shape != shape:
        raise RuntimeError(
            "rotary_sin must have the same shape as rotary_cos; got rotary_sin ="
            f" {shape_text(rotary_sin.shape)}, rotary_cos = {shape_text(shape)}"
        )
    seqlen_rotary, rotary_dim = shape[0], 2 * shape[1]
    if rotary_dim > q.shape[-1]:
        raise RuntimeError(
            f"rotary_cos: rotary_dim must be <= headdim; got rotary_dim = {rotary_dim}, head_dim ="
            f" {q.shape[-1]}"
        )
    if rotary_dim == 0 or rotary_dim % ROTARY_DIM_MULTIPLE != 0:
        raise RuntimeError(
            f"rotary_cos: Only rotary dimensions divisible by {ROTARY_DIM_MULTIPLE} are currently"
            f" supported; got rotary_dim = {rotary_dim}"
        )
    if seqlen_rotary < capacity:
        raise RuntimeError(
            "rotary_cos: cos/sin seqlen must be at least the seqlen of KV cache; got"
            f" seqlen_rotary = {seqlen_rotary}, the cache holds {capacity} rows"
        )
    dtype, device = q.dtype, q.device
    for name, table in (("rotary_cos", rotary_cos), ("rotary_sin", rotary_sin)):
        if table.dtype != dtype:
            raise RuntimeError(
                f"{name} must have the same dtype as query; got {name} {table.dtype}, q {dtype}"
            )
        if table.device != device:
            raise RuntimeError(
                f"{name} must be on the same device as q; got {name} on {table.device}, q on"
                f" {device}"
            )
        if table.stride()[1] != 1:
            raise RuntimeError(
                f"{name} must have contiguous last dimension; got strides {table.stride()}"
            )


def check_num_splits(num_splits: int) -> int:
    """0 to MAX_SPLITS."""
    if type(num_splits) is not int:
        num_splits = resolve_integer("num_splits", num_splits)
    if num_splits > MAX_SPLITS:
        raise RuntimeError(
            f"num_splits > {MAX_SPLITS} not supported; got num_splits = {num_splits}"
        )
    if num_splits < 0:
        raise RuntimeError(
            f"num_splits must be from 0, the kernel's choice, to {MAX_SPLITS}; got {num_splits}"
        )
    return num_splits


def check_max_seqlen_q(max_seqlen_q: int | Tensor | None) -> int:
    """Of queries with cu_seqlens_q; at least 1: it is an upper bound, and kernels divide by it."""
    if max_seqlen_q is None:
        raise RuntimeError("cu_seqlens_q needs max_seqlen_q, the longest query sequence; got None")
    max_seqlen_q = resolve_integer("max_seqlen_q", max_seqlen_q)
    if max_seqlen_q < 0:
        raise RuntimeError(f"max_seqlen_q must not be negative; got {max_seqlen_q}")
    return max_seqlen_q or 1


def check_states(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> None:
    """out (batch, seqlen, heads, head_dim), lse (batch, heads, seqlen); varlen: without batch."""
    shape, dtype, device = out_a.shape, out_a.dtype, out_a.device
    if len(shape) not in (3, 4):
        raise RuntimeError(
            "out_a must have shape (batch, seqlen, heads, head_dim) or (total, heads, head_dim); got"
            f" {shape_text(shape)}"
        )
    if dtype not in (CUDA_DTYPES if device.type == "cuda" else CPU_DTYPES):
        raise RuntimeError(
            "out_a: FlashAttention only support fp16 and bf16 data type on CUDA, and fp32 and fp64"
            f" besides on the CPU; got {dtype}"
        )
    if shape[-1] > MAX_HEAD_DIM:
        raise RuntimeError(
            f"out_a must have head_dim at most {MAX_HEAD_DIM}; got {shape_text(shape)}"
        )
    _check_state("out_b", out_b, "out_a's", shape, dtype, device)
    lse_shape = *shape[:-3], shape[-2], shape[-3]
    _check_state("lse_a", lse_a, "wanted:", lse_shape, compute_dtype(out_a), device)
    _check_state("lse_b", lse_b, "wanted:", lse_shape, compute_dtype(out_a), device)


def _check_state(
    name: str, x: Tensor, whose: str, shape: Sequence[int], dtype: torch.dtype, device: torch.device
) -> None:
    if x.shape != shape or x.dtype != dtype or x.device != device:
        raise RuntimeError(
            f"{name} must have the shape, dtype and device {whose} {tuple(shape)}, {dtype}, {device};"
            f" got {shape_text(x.shape)}, {x.dtype}, {x.device}"
        )
