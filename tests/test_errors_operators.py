"""Direct calls of torch.ops.flash_attn with wrong tensors: both devices refuse them in the same words."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch

OPS = torch.ops.flash_attn
Arguments = dict[str, Any]


def options(**others: Any) -> Arguments:
    score = dict(softmax_scale=0.125, causal=False, window_size_left=-1, window_size_right=-1)
    return dict(dropout_p=0.0, **score, softcap=0.0, alibi_slopes=None) | others


class Maker:
    """Zeros of a device: 16-bit, fp32 or int32."""

    def __init__(self, device: str) -> None:
        self.device = device

    def zeros(self, *shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype, device=self.device)

    def rows(self, *shape: int) -> torch.Tensor:
        return self.zeros(*shape, dtype=torch.float32)

    def ints(self, *values: int) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device=self.device)


# Right calls.  Dense: q (2, 5, 4, 64), k and v (2, 7, 2, 64); varlen: two sequences of 4 and 6 queries
# on 8 and 6 keys; cache: two sequences of 3 queries, 32 rows.


def forward(make: Maker) -> Arguments:
    q, k = make.zeros(2, 5, 4, 64), make.zeros(2, 7, 2, 64)
    return dict(q=q, k=k, v=k.clone(), **options(return_softmax=False))


def backward(make: Maker) -> Arguments:
    x = forward(make)
    del x["return_softmax"]
    gradients = dict(dq=x["q"].clone(), dk=x["k"].clone(), dv=x["k"].clone())
    lse = make.rows(2, 4, 5)
    read = dict(dout=x["q"].clone(), out=x["q"].clone(), softmax_lse=lse, dlse=lse.clone())
    return x | read | gradients | dict(deterministic=False)


def functional(make: Maker) -> Arguments:
    return {name: x for name, x in backward(make).items() if name not in ("dq", "dk", "dv")}


def _lengths(make: Maker) -> Arguments:
    cu_seqlens = dict(cu_seqlens_q=make.ints(0, 4, 10), cu_seqlens_k=make.ints(0, 8, 14))
    return cu_seqlens | dict(max_seqlen_q=6, max_seqlen_k=8)


def varlen_forward(make: Maker) -> Arguments:
    q, k = make.zeros(10, 4, 64), make.zeros(14, 2, 64)
    used, left = make.ints(8, 5), make.ints(0, 1)
    ours = dict(seqused_k=used, leftpad_k=left, return_softmax=False)
    return dict(q=q, k=k, v=k.clone(), **_lengths(make), **options(**ours))


def varlen_backward(make: Maker) -> Arguments:
    q, k, lse = make.zeros(10, 4, 64), make.zeros(14, 2, 64), make.rows(4, 10)
    read = dict(dout=q.clone(), out=q.clone(), softmax_lse=lse, dlse=lse.clone())
    gradients = dict(dq=q.clone(), dk=k.clone(), dv=k.clone())
    others = _lengths(make) | options(deterministic=False)
    return dict(q=q, k=k, v=k.clone()) | read | gradients | others


def varlen_functional(make: Maker) -> Arguments:
    return {name: x for name, x in varlen_backward(make).items() if name not in ("dq", "dk", "dv")}


def pages(make: Maker) -> Arguments:
    k = make.zeros(6, 16, 2, 64)
    table = make.ints(0, 1, 2, 3).view(2, 2)
    return varlen_forward(make) | dict(k=k, v=k.clone(), block_table=table, num_splits=0)


def kvcache(make: Maker) -> Arguments:
    cache = make.zeros(2, 32, 2, 64)
    score = options(num_splits=0)
    del score["dropout_p"]
    lengths = dict(cu_seqlens_q=None, max_seqlen_q=3, cache_seqlens=make.ints(4, 9), cache_seqlen=0)
    entries = dict(cache_batch_idx=make.ints(1, 0), cache_leftpad=make.ints(0, 2), block_table=None)
    q = make.zeros(2, 3, 4, 64)
    return dict(q=q, k_cache=cache, v_cache=cache.clone()) | lengths | entries | score


def append(make: Maker) -> Arguments:
    k, table = make.zeros(2, 3, 2, 64), make.zeros(32, 16)
    rotary = dict(rotary_cos=table, rotary_sin=table.clone(), rotary_interleaved=False)
    return kvcache(make) | dict(k=k, v=k.clone()) | rotary


def states(make: Maker) -> Arguments:
    out, lse = make.zeros(2, 5, 4, 64), make.rows(2, 4, 5)
    return dict(out_a=out, lse_a=lse, out_b=out.clone(), lse_b=lse.clone())


OPERATORS = {
    forward: OPS._flash_attn_forward.default,
    backward: OPS._flash_attn_backward.default,
    functional: OPS._flash_attn_backward.functional,
    varlen_forward: OPS._flash_attn_varlen_forward.default,
    varlen_backward: OPS._flash_attn_varlen_backward.default,
    varlen_functional: OPS._flash_attn_varlen_backward.functional,
    pages: OPS._flash_attn_varlen_forward.default,
    kvcache: OPS._flash_attn_kvcache.default,
    append: OPS._flash_attn_kvcache.append,
    states: OPS.merge_states.default,
}
DENSE, DENSE_BACKWARD = (forward, backward, functional), (backward, functional)
VARLEN, VARLEN_BACKWARD = (
    (varlen_forward, varlen_backward, varlen_functional),
    (varlen_backward, varlen_functional),
)
CACHE = (kvcache, append)


@dataclass(frozen=True)
class Bad:
    """A wrong call of each of some operators, and the beginning of what it is told."""

    calls: tuple[Callable[[Maker], Arguments], ...]
    change: Callable[[Maker, Arguments], Arguments]
    message: str


def zeros(name: str, *shape: int) -> Callable:
    return lambda make, x: {name: make.zeros(*shape)}


def rows(name: str, *shape: int) -> Callable:
    return lambda make, x: {name: make.rows(*shape)}


def ints(name: str, *values: int) -> Callable:
    return lambda make, x: {name: make.ints(*values)}


def cast(name: str, dtype: torch.dtype) -> Callable:
    return lambda make, x: {name: x[name].to(dtype)}


def strided(name: str) -> Callable:
    """The same values with gaps between the elements of the last dimension."""
    return lambda make, x: {name: torch.stack((x[name], x[name]), -1)[..., 0]}


def value(name: str, given: Any) -> Callable:
    return lambda make, x: {name: given}


def all_of(*changes: Callable) -> Callable:
    def change(make: Maker, x: Arguments) -> Arguments:
        merged: Arguments = {}
        for each in changes:
            merged |= each(make, x)
        return merged

    return change


def batch_0(make: Maker, x: Arguments) -> Arguments:
    return {name: x[name][:0] for name in ("q", "k", "v")}


SEQLEN = "must have shape (batch, heads, seqlen_q) = (2, 4, 5); got "
TOTAL = "must have shape (heads, total_q) = (4, 10); got "
BAD = {
    # q, k and v
    "q_int": Bad(
        (forward, varlen_forward), cast("q", torch.int32), "q: FlashAttention only support"
    ),
    "q_of_3_dims": Bad(
        DENSE, zeros("q", 5, 4, 64), "q and k must have shape (batch, seqlen, heads"
    ),
    "k_of_3_dims": Bad(
        DENSE, zeros("k", 7, 2, 64), "q and k must have shape (batch, seqlen, heads"
    ),
    "q_of_4_dims": Bad(VARLEN, zeros("q", 1, 9, 4, 64), "q and k must have shape (total, heads"),
    "batch_0": Bad(DENSE, batch_0, "q: batch size must be positive; got [0, 5, 4, 64]"),
    "head_dim_264": Bad(DENSE, zeros("q", 2, 5, 4, 264), "q: head_dim must be "),
    "heads_3": Bad(DENSE, zeros("k", 2, 7, 3, 64), "k: Number of heads in key/value must divide"),
    "k_batch": Bad(
        DENSE, zeros("k", 3, 7, 2, 64), "k: must have shape [2, 7, 2, 64]; got [3, 7, 2, 64]"
    ),
    "v_rows": Bad(
        DENSE, zeros("v", 2, 8, 2, 64), "v: must have shape [2, 7, 2, 64]; got [2, 8, 2, 64]"
    ),
    "v_total": Bad(VARLEN, zeros("v", 9, 2, 64), "v: must have shape [14, 2, 64]; got [9, 2, 64]"),
    "v_head_dim_264": Bad(DENSE, zeros("v", 2, 7, 2, 264), "v: head_dim must be "),
    "v_head_dim_0": Bad(VARLEN, zeros("v", 14, 2, 0), "v: head_dim must be "),
    "out_head_dim": Bad(
        DENSE_BACKWARD, zeros("out", 2, 5, 4, 32), "out: must have shape [2, 5, 4, 64]; got [2, 5"
    ),
    "k_head_dim": Bad(
        VARLEN, zeros("k", 14, 2, 32), "k: must have shape [14, 2, 64]; got [14, 2, 32]"
    ),
    "k_fp16": Bad(
        (*DENSE, *VARLEN),
        cast("k", torch.float16),
        "k: must have the dtype of q; got Half, q has BFloat16",
    ),
    # what the forward pass has returned, and gradients
    "dout_rows": Bad(
        DENSE_BACKWARD, zeros("dout", 2, 4, 4, 64), "dout: must have shape [2, 5, 4, 64]; got [2, 4"
    ),
    "dout_fp32": Bad(
        (*DENSE_BACKWARD, *VARLEN_BACKWARD),
        cast("dout", torch.float32),
        "dout: must have the dtype of q; got Float, q has BFloat16",
    ),
    "out_heads": Bad(
        VARLEN_BACKWARD,
        zeros("out", 10, 2, 64),
        "out: must have shape [10, 4, 64]; got [10, 2, 64]",
    ),
    "lse_transposed": Bad(
        DENSE_BACKWARD, rows("softmax_lse", 2, 5, 4), f"softmax_lse: {SEQLEN}[2, 5, 4]"
    ),
    "lse_padded": Bad(
        DENSE_BACKWARD, rows("softmax_lse", 2, 4, 128), f"softmax_lse: {SEQLEN}[2, 4, 128]"
    ),
    "lse_bf16": Bad(
        (*DENSE_BACKWARD, *VARLEN_BACKWARD),
        cast("softmax_lse", torch.bfloat16),
        "softmax_lse: must have dtype float32; got BFloat16",
    ),
    "lse_total": Bad(VARLEN_BACKWARD, rows("softmax_lse", 10, 4), f"softmax_lse: {TOTAL}[10, 4]"),
    "dlse_transposed": Bad(DENSE_BACKWARD, rows("dlse", 2, 5, 4), f"dlse: {SEQLEN}[2, 5, 4]"),
    "dlse_total": Bad(VARLEN_BACKWARD, rows("dlse", 4, 9), f"dlse: {TOTAL}[4, 9]"),
    "dq_shape": Bad(
        (backward,),
        zeros("dq", 1, 5, 4, 64),
        "dq: must have shape [2, 5, 4, 64]; got [1, 5, 4, 64]",
    ),
    "dk_expanded_heads": Bad(
        (backward,),
        zeros("dk", 2, 7, 4, 64),
        "dk: must have shape [2, 7, 2, 64]; got [2, 7, 4, 64]",
    ),
    "dv_fp32": Bad(
        (backward, varlen_backward),
        cast("dv", torch.float32),
        "dv: must have the dtype of q; got Float, q has BFloat16",
    ),
    # options
    "softcap": Bad(
        (*DENSE, *VARLEN, pages, *CACHE),
        value("softcap", -1.0),
        "softcap must be 0 (off) or positive",
    ),
    "dropout": Bad(
        DENSE_BACKWARD,
        value("dropout_p", 1.0),
        "dropout_p must be in [0, 1): Expected p_dropout < 1",
    ),
    "no_rng_state": Bad(
        (*DENSE_BACKWARD, *VARLEN_BACKWARD),
        value("dropout_p", 0.5),
        "rng_state: dropout_p = 0.5 needs",
    ),
    "rng_state_int32": Bad(
        (*DENSE, *VARLEN),
        all_of(value("dropout_p", 0.5), ints("rng_state", 1, 2)),
        "rng_state: must be int64 of shape (2), contiguous; got Int of shape [2]",
    ),
    "rng_state_of_3": Bad(
        (*DENSE, *VARLEN),
        lambda make, x: dict(dropout_p=0.5, rng_state=make.zeros(3, dtype=torch.int64)),
        "rng_state: must be int64 of shape (2), contiguous; got Long of shape [3]",
    ),
    "slopes_bf16": Bad(
        (*DENSE, *VARLEN, *CACHE), zeros("alibi_slopes", 4), "ALiBi slopes must have dtype fp32"
    ),
    "slopes_of_3_heads": Bad(
        (*DENSE, *VARLEN, *CACHE),
        rows("alibi_slopes", 3),
        "alibi_slopes: must have shape (heads) = (4) or (batch, heads) = (2, 4); got [3]",
    ),
    "slopes_strided": Bad(
        (*DENSE, *VARLEN, *CACHE),
        lambda make, x: dict(alibi_slopes=make.rows(2, 8)[:, ::2]),
        "ALiBi slopes tensor must have contiguous last dimension; got strides [8, 2]",
    ),
    "scale_of_2": Bad(
        (*DENSE, *VARLEN),
        rows("softmax_scale_tensor", 2),
        "softmax_scale_tensor: must have one real number; got Float of shape [2]",
    ),
    "softcap_bool": Bad(
        (*DENSE, *VARLEN),
        lambda make, x: dict(softcap_tensor=make.zeros(1, dtype=torch.bool)),
        "softcap_tensor: must have one real number; got Bool of shape [1]",
    ),
    # lengths
    "cu_q_int64": Bad(
        (*VARLEN, pages),
        cast("cu_seqlens_q", torch.int64),
        "cu_seqlens_q must have dtype int32; got Long",
    ),
    "cu_k_of_2": Bad(
        VARLEN, ints("cu_seqlens_k", 0, 14), "cu_seqlens_k: must have shape (3); got [2]"
    ),
    "cu_q_strided": Bad(
        VARLEN, strided("cu_seqlens_q"), "cu_seqlens_q must be contiguous; got strides [2]"
    ),
    "no_sequences": Bad(
        (*VARLEN, pages),
        all_of(ints("cu_seqlens_q", 0), ints("cu_seqlens_k", 0)),
        "cu_seqlens_q: batch size must be positive; got [1]",
    ),
    "seqused_of_3": Bad(
        (varlen_forward,), ints("seqused_k", 1, 2, 3), "seqused_k: must have shape (2); got [3]"
    ),
    "leftpad_int64": Bad(
        (varlen_forward,),
        cast("leftpad_k", torch.int64),
        "leftpad_k must have dtype int32; got Long",
    ),
    "S_dmask_of_a_part": Bad(
        (varlen_forward,),
        lambda make, x: dict(return_softmax=True, dropout_p=0.5),
        "return_softmax: S_dmask is not available with seqused_k, leftpad_k or block_table",
    ),
    # caches
    "q_packed": Bad(
        CACHE, zeros("q", 6, 4, 64), "q must have 4 dimensions and k_cache 4; got [6, 4"
    ),
    "k_cache_of_3_dims": Bad(
        CACHE,
        zeros("k_cache", 32, 2, 64),
        "q must have 4 dimensions and k_cache 4; got [2, 3, 4, 64]",
    ),
    "cache_heads": Bad(
        CACHE, zeros("k_cache", 2, 32, 3, 64), "k_cache: Number of heads in key/value must divide"
    ),
    "v_cache_rows": Bad(
        CACHE,
        zeros("v_cache", 2, 31, 2, 64),
        "v_cache: must have shape [2, 32, 2, 64]; got [2, 31, 2, 64]",
    ),
    "v_cache_fp16": Bad(
        CACHE, cast("v_cache", torch.float16), "v_cache: must have the dtype of q; got Half, q has"
    ),
    "k_cache_strided": Bad(
        CACHE, strided("k_cache"), "k_cache: must have a contiguous last dimension"
    ),
    "few_entries": Bad(
        CACHE,
        lambda make, x: {n: x[n][:1] for n in ("k_cache", "v_cache")} | dict(cache_batch_idx=None),
        "k_cache: must have an entry for each of 2 sequences; got [1, 32, 2, 64]",
    ),
    "cache_seqlens_of_3": Bad(
        CACHE, ints("cache_seqlens", 1, 2, 3), "cache_seqlens: must have shape (2); got [3]"
    ),
    "batch_idx_int64": Bad(
        CACHE,
        cast("cache_batch_idx", torch.int64),
        "cache_batch_idx must have dtype int32; got Long",
    ),
    "leftpad_of_1": Bad(
        CACHE, ints("cache_leftpad", 1), "cache_leftpad: must have shape (2); got [1]"
    ),
    "pages_and_entries": Bad(
        CACHE,
        lambda make, x: dict(block_table=make.ints(0, 1).view(2, 1)),
        "Paged KVcache does not support cache_batch_idx",
    ),
    "table_of_1_dim": Bad(
        (pages,),
        ints("block_table", 0, 1),
        "block_table: must have dtype int32, shape (batch, max_blocks) with batch = 2 and a contiguous",
    ),
    "page_size_8": Bad(
        (pages,),
        all_of(zeros("k", 6, 8, 2, 64), zeros("v", 6, 8, 2, 64)),
        "k_cache: Paged KV cache block size must be divisible by 16; got [6, 8, 2, 64]",
    ),
    "num_splits": Bad(
        (pages, *CACHE),
        value("num_splits", 129),
        "num_splits > 128 not supported, nor negative ones; got 129",
    ),
    "pages_with_dropout": Bad(
        (pages,), value("dropout_p", 0.5), "dropout_p: must be 0 with a cache; got 0.5"
    ),
    "new_k_heads": Bad(
        (append,), zeros("k", 2, 3, 4, 64), "k: must have shape [2, 3, 2, 64]; got [2, 3, 4, 64]"
    ),
    "new_v_rows": Bad(
        (append,), zeros("v", 2, 4, 2, 64), "v: must have shape [2, 3, 2, 64]; got [2, 4, 2, 64]"
    ),
    "cos_alone": Bad(
        (append,), value("rotary_sin", None), "rotary_sin: must be given with rotary_cos"
    ),
    "sin_shape": Bad(
        (append,), zeros("rotary_sin", 32, 8), "rotary_sin: must have shape [32, 16]; got [32, 8]"
    ),
    "cos_fp32": Bad(
        (append,),
        cast("rotary_cos", torch.float32),
        "rotary_cos: must have the dtype of q; got Float",
    ),
    "rotary_dim_8": Bad(
        (append,),
        all_of(zeros("rotary_cos", 32, 4), zeros("rotary_sin", 32, 4)),
        "Only rotary dimensions divisible by 16 are supported; got 8",
    ),
    "rotary_dim_128": Bad(
        (append,),
        all_of(zeros("rotary_cos", 32, 64), zeros("rotary_sin", 32, 64)),
        "rotary_dim must be <= headdim; got 128",
    ),
    # merging
    "out_a_int": Bad((states,), cast("out_a", torch.int32), "out_a: FlashAttention only support"),
    "out_b_rows": Bad(
        (states,),
        zeros("out_b", 2, 4, 4, 64),
        "out_b: must have shape [2, 5, 4, 64]; got [2, 4, 4, 64]",
    ),
    "lse_a_transposed": Bad((states,), rows("lse_a", 2, 5, 4), f"lse_a: {SEQLEN}[2, 5, 4]"),
    "lse_b_bf16": Bad(
        (states,), cast("lse_b", torch.bfloat16), "lse_b: must have dtype float32; got BFloat16"
    ),
}


@pytest.mark.parametrize("call", OPERATORS, ids=lambda call: call.__name__)
def test_right_call_is_taken(device: str, call: Callable[[Maker], Arguments]) -> None:
    """What the wrong calls differ from in one thing."""
    OPERATORS[call](**call(Maker(device)))


@pytest.mark.parametrize(
    ("call", "name"),
    [pytest.param(c, n, id=f"{c.__name__}-{n}") for n, bad in BAD.items() for c in bad.calls],
)
def test_operator_refuses(device: str, call: Callable[[Maker], Arguments], name: str) -> None:
    make = Maker(device)
    arguments = call(make)
    arguments |= BAD[name].change(make, arguments)
    with pytest.raises(RuntimeError, match="^" + re.escape(BAD[name].message)):
        OPERATORS[call](**arguments)
