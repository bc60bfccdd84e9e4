"""Checks of the operators' tensors on the CPU: name, what was given, what is allowed.

Used by ``register``.  The public functions have checked their callers' arguments already; these checks
stand guard for callers of torch.ops.  They and their texts are those of csrc/torch on CUDA, but for what
the CPU takes besides: fp32 and fp64, and any head_dim.  What integer tensors hold is checked elsewhere.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from flash_attn._checks import CPU_DTYPES, MAX_HEAD_DIM, PAGE_SIZE_MULTIPLE
from flash_attn._checks_decode import MAX_SPLITS, ROTARY_DIM_MULTIPLE
from flash_attn._ops import Cache, Lengths, Options
from flash_attn.cpu import philox
from flash_attn.cpu.scores import compute_dtype

# Names of dtypes in C++.
NAMES = {
    torch.float32: "Float",
    torch.float64: "Double",
    torch.float16: "Half",
    torch.bfloat16: "BFloat16",
    torch.int8: "Char",
    torch.int16: "Short",
    torch.int32: "Int",
    torch.int64: "Long",
    torch.uint8: "Byte",
    torch.bool: "Bool",
}


def _dtype(x: Tensor) -> str:
    return NAMES.get(x.dtype, str(x.dtype))


def _sizes(sizes: Sequence[int]) -> str:
    return str(list(sizes))


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise RuntimeError(message)


def check_device(x: Tensor, name: str, q: Tensor) -> None:
    if x.device != q.device:
        raise RuntimeError(
            f"{name}: must be on the device of q; got {x.device}, q is on {q.device}"
        )


def check_like(x: Tensor, name: str, q: Tensor, shape: Sequence[int]) -> None:
    """x of that shape, with the device and the dtype of q."""
    check_device(x, name, q)
    if x.dtype != q.dtype:
        raise RuntimeError(f"{name}: must have the dtype of q; got {_dtype(x)}, q has {_dtype(q)}")
    if x.shape != torch.Size(shape):
        raise RuntimeError(f"{name}: must have shape {_sizes(shape)}; got {_sizes(x.shape)}")


def check_rows(x: Tensor, name: str, q: Tensor) -> None:
    """softmax_lse or its gradient."""
    check_device(x, name, q)
    dtype = compute_dtype(q)
    if x.dtype != dtype:
        raise RuntimeError(f"{name}: must have dtype {str(dtype)[6:]}; got {_dtype(x)}")
    shape: tuple[int, ...] = (q.shape[-2], q.shape[-3])
    meaning = "(heads, total_q)"
    if q.dim() == 4:
        meaning, shape = "(batch, heads, seqlen_q)", (q.shape[0], *shape)
    if x.shape != shape:
        raise RuntimeError(f"{name}: must have shape {meaning} = {shape}; got {_sizes(x.shape)}")


def check_integers(x: Tensor, name: str, q: Tensor, count: int) -> None:
    check_device(x, name, q)
    _check(x.dtype == torch.int32, f"{name} must have dtype int32; got {_dtype(x)}")
    _check(x.is_contiguous(), f"{name} must be contiguous; got strides {_sizes(x.stride())}")
    if x.dim() != 1 or x.shape[0] != count:
        raise RuntimeError(f"{name}: must have shape ({count}); got {_sizes(x.shape)}")


def _check_q(q: Tensor, name: str = "q") -> None:
    if q.dtype not in CPU_DTYPES:
        raise RuntimeError(
            f"{name}: FlashAttention only support fp16 and bf16 data type, and on the CPU fp32 and"
            f" fp64; got {_dtype(q)}"
        )


def _check_heads(q: Tensor, heads_k: int, name_k: str) -> None:
    heads_q, head_dim = q.shape[-2:]
    if not 0 < head_dim <= MAX_HEAD_DIM:
        raise RuntimeError(f"q: head_dim must be from 1 to {MAX_HEAD_DIM}; got {head_dim}")
    if heads_k <= 0 or heads_q % heads_k != 0:
        raise RuntimeError(
            f"{name_k}: Number of heads in key/value must divide number of heads in query; got"
            f" {heads_k} and {heads_q}"
        )


def check_qkv(q: Tensor, k: Tensor, v: Tensor, dims: int) -> None:
    """dims: 4 for (batch, seqlen, heads, head_dim), 3 for (total, heads, head_dim).

    v may have a head_dim of its own.
    """
    _check_q(q)
    if q.dim() != dims or k.dim() != dims:
        layout = "(batch, seqlen, heads, head_dim)" if dims == 4 else "(total, heads, head_dim)"
        raise RuntimeError(
            f"q and k must have shape {layout}; got {_sizes(q.shape)} and {_sizes(k.shape)}"
        )
    if dims == 4 and q.shape[0] == 0:
        raise RuntimeError(f"q: batch size must be positive; got {_sizes(q.shape)}")
    _check_heads(q, k.shape[-2], "k")
    shape = (*q.shape[:-3], *k.shape[-3:-1], q.shape[-1])
    check_like(k, "k", q, shape)
    head_dim_v = v.shape[-1] if v.dim() == dims else q.shape[-1]
    if not 0 < head_dim_v <= MAX_HEAD_DIM:
        raise RuntimeError(f"v: head_dim must be from 1 to {MAX_HEAD_DIM}; got {head_dim_v}")
    check_like(v, "v", q, (*shape[:-1], head_dim_v))


def check_options(q: Tensor, batch: int, options: Options) -> None:
    _check(options.softcap >= 0, f"softcap must be 0 (off) or positive; got {options.softcap:g}")
    if options.alibi_slopes is not None:
        _check_alibi(options.alibi_slopes, q, batch)
    p, state = options.dropout_p, options.rng_state
    _check(0 <= p < 1, f"dropout_p must be in [0, 1): Expected p_dropout < 1; got {p:g}")
    if philox.kept_values(p) == philox.ALL_KEPT:
        return
    if state is None:
        raise RuntimeError(
            f"rng_state: dropout_p = {p:g} needs the seed and offset that the forward pass used; got"
            " None"
        )
    check_device(state, "rng_state", q)
    if state.dtype != torch.int64 or state.shape != (2,) or not state.is_contiguous():
        raise RuntimeError(
            f"rng_state: must be int64 of shape (2), contiguous; got {_dtype(state)} of shape"
            f" {_sizes(state.shape)}"
        )


def _check_alibi(slopes: Tensor, q: Tensor, batch: int) -> None:
    heads = q.shape[-2]
    check_device(slopes, "alibi_slopes", q)
    _check(
        slopes.dtype == torch.float32,
        f"ALiBi slopes must have dtype fp32; got {_dtype(slopes)}",
    )
    if slopes.shape not in ((heads,), (batch, heads)):
        raise RuntimeError(
            f"alibi_slopes: must have shape (heads) = ({heads}) or (batch, heads) = ({batch},"
            f" {heads}); got {_sizes(slopes.shape)}"
        )
    if not _has_contiguous_rows(slopes):
        raise RuntimeError(
            "ALiBi slopes tensor must have contiguous last dimension; got strides"
            f" {_sizes(slopes.stride())}"
        )


def _has_contiguous_rows(x: Tensor) -> bool:
    return x.shape[-1] <= 1 or x.stride(-1) == 1


def check_number(x: Tensor | None, name: str) -> None:
    """softmax_scale_tensor or softcap_tensor."""
    if x is not None and (x.numel() != 1 or x.is_complex() or x.dtype == torch.bool):
        raise RuntimeError(
            f"{name}: must have one real number; got {_dtype(x)} of shape {_sizes(x.shape)}"
        )


def check_forward(
    q: Tensor, k: Tensor, v: Tensor, lengths: Lengths | None, options: Options, num_splits: int
) -> None:
    """options: with the rng_state that is used."""
    if lengths is None:
        check_qkv(q, k, v, 4)
        check_options(q, q.shape[0], options)
    elif lengths.block_table is None:
        check_qkv(q, k, v, 3)
        _check_lengths(q, lengths, options)
    else:
        pages = lengths.seqused_k, 0, None, lengths.leftpad_k, lengths.block_table
        cache = Cache(lengths.cu_seqlens_q, lengths.max_seqlen_q, *pages)
        batch = check_cache(q, k, v, cache, options, num_splits)
        check_integers(lengths.cu_seqlens_k, "cu_seqlens_k", q, batch + 1)
        if options.dropout_p != 0:
            raise RuntimeError(f"dropout_p: must be 0 with a cache; got {options.dropout_p:g}")


def _check_lengths(q: Tensor, lengths: Lengths, options: Options) -> None:
    batch = lengths.cu_seqlens_q.numel() - 1
    check_options(q, batch, options)
    check_integers(lengths.cu_seqlens_q, "cu_seqlens_q", q, batch + 1)
    check_integers(lengths.cu_seqlens_k, "cu_seqlens_k", q, batch + 1)
    _check_batch(batch, "cu_seqlens_q", lengths.cu_seqlens_q)
    for name in ("seqused_k", "leftpad_k"):
        if getattr(lengths, name) is not None:
            check_integers(getattr(lengths, name), name, q, batch)


def _check_batch(batch: int, name: str, x: Tensor) -> None:
    _check(batch > 0, f"{name}: batch size must be positive; got {_sizes(x.shape)}")


def check_backward(
    tensors: tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None],
    lengths: Lengths | None,
    options: Options,
) -> None:
    """tensors: dout, q, k, v, out, softmax_lse, dlse."""
    dout, q, k, v, out, softmax_lse, dlse = tensors
    check_qkv(q, k, v, 4 if lengths is None else 3)
    shape = *q.shape[:-1], v.shape[-1]
    check_like(dout, "dout", q, shape)
    check_like(out, "out", q, shape)
    check_rows(softmax_lse, "softmax_lse", q)
    if dlse is not None:
        check_rows(dlse, "dlse", q)
    if lengths is None:
        check_options(q, q.shape[0], options)
    else:
        _check_lengths(q, lengths, options)


def check_given(gradients: Sequence[Tensor | None], inputs: Sequence[Tensor]) -> None:
    """dq, dk and dv, as far as they are given, for q, k and v."""
    for name, gradient, x in zip(("dq", "dk", "dv"), gradients, inputs):
        if gradient is not None:
            check_like(gradient, name, inputs[0], x.shape)


def check_cache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache: Cache,
    options: Options,
    num_splits: int,
) -> int:
    """The number of sequences."""
    _check_q(q)
    dims = 4 if cache.cu_seqlens_q is None else 3
    if q.dim() != dims or k_cache.dim() != 4:
        raise RuntimeError(
            f"q must have {dims} dimensions and k_cache 4; got {_sizes(q.shape)} and"
            f" {_sizes(k_cache.shape)}"
        )
    _check_heads(q, k_cache.shape[2], "k_cache")
    shape = (*k_cache.shape[:3], q.shape[-1])
    for x, name in ((k_cache, "k_cache"), (v_cache, "v_cache")):
        check_like(x, name, q, shape)
        if not _has_contiguous_rows(x):
            raise RuntimeError(
                f"{name}: must have a contiguous last dimension; got strides {_sizes(x.stride())}"
            )
    cu_seqlens_q = cache.cu_seqlens_q
    batch = q.shape[0] if cu_seqlens_q is None else cu_seqlens_q.numel() - 1
    name, counted = ("q", q) if cu_seqlens_q is None else ("cu_seqlens_q", cu_seqlens_q)
    _check_batch(batch, name, counted)
    _check_sequences(q, k_cache, batch, cache)
    if not 0 <= num_splits <= MAX_SPLITS:
        raise RuntimeError(
            f"num_splits > {MAX_SPLITS} not supported, nor negative ones; got {num_splits}"
        )
    check_options(q, batch, options)
    return batch


def _check_sequences(q: Tensor, k_cache: Tensor, batch: int, cache: Cache) -> None:
    if cache.cu_seqlens_q is not None:
        check_integers(cache.cu_seqlens_q, "cu_seqlens_q", q, batch + 1)
    for name in ("cache_seqlens", "cache_batch_idx", "cache_leftpad"):
        if getattr(cache, name) is not None:
            check_integers(getattr(cache, name), name, q, batch)
    table = cache.block_table
    if table is None:
        if cache.cache_batch_idx is None and k_cache.shape[0] < batch:
            raise RuntimeError(
                f"k_cache: must have an entry for each of {batch} sequences; got"
                f" {_sizes(k_cache.shape)}"
            )
        return
    check_device(table, "block_table", q)
    _check(cache.cache_batch_idx is None, "Paged KVcache does not support cache_batch_idx")
    is_matrix = table.dtype == torch.int32 and table.dim() == 2 and table.shape[0] == batch
    if not is_matrix or not _has_contiguous_rows(table):
        raise RuntimeError(
            "block_table: must have dtype int32, shape (batch, max_blocks) with batch ="
            f" {batch} and a contiguous last dimension; got {_dtype(table)}, {_sizes(table.shape)}"
        )
    if k_cache.shape[1] == 0 or k_cache.shape[1] % PAGE_SIZE_MULTIPLE != 0:
        raise RuntimeError(
            f"k_cache: Paged KV cache block size must be divisible by {PAGE_SIZE_MULTIPLE}; got"
            f" {_sizes(k_cache.shape)}"
        )


def check_new_rows(
    q: Tensor,
    k_cache: Tensor,
    k: Tensor,
    v: Tensor,
    rotary_cos: Tensor | None,
    rotary_sin: Tensor | None,
) -> None:
    """k, v (batch, seqlen_new, heads_k, head_dim), or (total_q, heads_k, head_dim), and tables."""
    rows: tuple[int, ...] = q.shape[:-2]
    if q.dim() == 4:
        rows = (q.shape[0], k.shape[1] if k.dim() > 1 else 0)
    shape = (*rows, k_cache.shape[2], q.shape[-1])
    check_like(k, "k", q, shape)
    check_like(v, "v", q, shape)
    if rotary_cos is None:
        return
    if rotary_sin is None:
        raise RuntimeError("rotary_sin: must be given with rotary_cos")
    if rotary_cos.dim() != 2 or rotary_cos.shape[0] == 0:
        raise RuntimeError(
            "rotary_cos: must have shape (positions, rotary_dim / 2); got"
            f" {_sizes(rotary_cos.shape)}"
        )
    check_like(rotary_cos, "rotary_cos", q, rotary_cos.shape)
    check_like(rotary_sin, "rotary_sin", q, rotary_cos.shape)
    _check(
        _has_contiguous_rows(rotary_cos) and _has_contiguous_rows(rotary_sin),
        "rotary_cos and rotary_sin must have a contiguous last dimension",
    )
    rotary_dim = 2 * rotary_cos.shape[1]
    _check(rotary_dim <= q.shape[-1], f"rotary_dim must be <= headdim; got {rotary_dim}")
    if rotary_dim % ROTARY_DIM_MULTIPLE != 0:
        raise RuntimeError(
            f"Only rotary dimensions divisible by {ROTARY_DIM_MULTIPLE} are supported; got"
            f" {rotary_dim}"
        )


def check_states(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> None:
    """out (batch, seqlen, heads, head_dim) or (total, heads, head_dim), with its lse."""
    if out_a.dim() not in (3, 4):
        raise RuntimeError(
            "out_a: must be (batch, seqlen, heads, head_dim) or (total, heads, head_dim); got"
            f" {_sizes(out_a.shape)}"
        )
    _check_q(out_a, "out_a")
    check_like(out_b, "out_b", out_a, out_a.shape)
    check_rows(lse_a, "lse_a", out_a)
    check_rows(lse_b, "lse_b", out_a)
