"""Wrong arguments: refused before any launch, by argument, what was given and what is allowed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from flash_attn import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
)
from flash_attn.flash_attn_interface import (
    _flash_attn_backward,
    _flash_attn_forward,
    _flash_attn_varlen_backward,
    _flash_attn_varlen_forward,
)

Change = Callable[[dict[str, Tensor]], dict]


@dataclass(frozen=True)
class Bad:
    """One wrong call: how it differs from a right one, and words that the message must hold."""

    name: str
    change: Change
    words: tuple[str, ...]

    def __str__(self) -> str:
        return self.name


def reshaped(argument: str, *shape: int) -> Change:
    return lambda x: {argument: torch.zeros(shape, dtype=x["q"].dtype, device=x["q"].device)}


def cast(dtype: torch.dtype, *arguments: str) -> Change:
    return lambda x: {name: x[name].to(dtype) for name in arguments}


# A right call: q (2, 5, 4, 64), k and v (2, 7, 2, 64).
SHAPES = [
    Bad("q_with_3_dimensions", reshaped("q", 5, 4, 64), ("q", "(5, 4, 64)")),
    Bad("q_with_5_dimensions", reshaped("q", 1, 2, 5, 4, 64), ("q", "(1, 2, 5, 4, 64)")),
    Bad("k_with_3_dimensions", reshaped("k", 7, 2, 64), ("k", "(7, 2, 64)")),
    Bad("v_with_2_dimensions", reshaped("v", 7, 64), ("v", "(7, 64)")),
    Bad("k_of_another_batch", reshaped("k", 3, 7, 2, 64), ("k", "(3, 7, 2, 64)")),
    Bad("v_of_another_batch", reshaped("v", 1, 7, 2, 64), ("v", "(1, 7, 2, 64)")),
    Bad("v_of_another_length", reshaped("v", 2, 8, 2, 64), ("v", "(2, 8, 2, 64)")),
    Bad("v_of_other_heads", reshaped("v", 2, 7, 1, 64), ("v", "(2, 7, 1, 64)")),
    Bad("k_of_another_head_dim", reshaped("k", 2, 7, 2, 32), ("k", "(2, 7, 2, 32)")),
    Bad("v_of_head_dim_264", reshaped("v", 2, 7, 2, 264), ("v: ", "at most 256", "264")),
    Bad("v_of_head_dim_0", reshaped("v", 2, 7, 2, 0), ("v: ", "at least 1", "(2, 7, 2, 0)")),
]


def kv_heads(heads: int) -> Change:
    return lambda x: {name: x[name][:, :, :1].repeat(1, 1, heads, 1) for name in ("k", "v")}


def no_heads(x: dict[str, Tensor]) -> dict:
    return {name: t[:, :, :0] for name, t in x.items()}


HEADS = [
    Bad("3_kv_heads_for_4_heads", kv_heads(3), ("heads", "4", "3", "divi")),
    Bad("8_kv_heads_for_4_heads", kv_heads(8), ("heads", "4", "8", "divi")),
    Bad("no_heads", no_heads, ("heads", "0")),
    Bad("no_kv_heads", kv_heads(0), ("heads", "0")),
]


def head_dim(size: int) -> Change:
    return lambda x: {
        n: torch.zeros(*t.shape[:3], size, dtype=t.dtype, device=t.device) for n, t in x.items()
    }


LIMITS = [
    Bad("head_dim_257", head_dim(257), ("head", "257", "256")),
    Bad("head_dim_512", head_dim(512), ("head", "512", "256")),
    Bad("head_dim_0", head_dim(0), ("head", "0")),
    Bad("batch_0", lambda x: {n: t[:0] for n, t in x.items()}, ("batch", "0")),
]
DTYPES = [
    Bad("k_of_another_dtype", cast(torch.float64, "k"), ("k", "float64", "dtype")),
    Bad("v_of_another_dtype", cast(torch.float64, "v"), ("v", "float64", "dtype")),
    Bad("all_int32", cast(torch.int32, *"qkv"), ("q", "int32")),
    Bad("all_bool", cast(torch.bool, *"qkv"), ("q", "bool")),
    Bad("all_complex64", cast(torch.complex64, *"qkv"), ("q", "complex64")),
    Bad("all_fp8", cast(torch.float8_e4m3fn, *"qkv"), ("q", "float8_e4m3fn")),
]
VALUES = [
    Bad("dropout_1", lambda x: {"dropout_p": 1.0}, ("dropout_p", "1.0")),
    Bad("dropout_above_1", lambda x: {"dropout_p": 1.5}, ("dropout_p", "1.5")),
    Bad("dropout_negative", lambda x: {"dropout_p": -0.5}, ("dropout_p", "-0.5")),
    Bad("dropout_nan", lambda x: {"dropout_p": float("nan")}, ("dropout_p", "nan")),
    Bad("softcap_negative", lambda x: {"softcap": -1.0}, ("softcap", "-1.0")),
    Bad("softcap_nan", lambda x: {"softcap": float("nan")}, ("softcap", "nan")),
    Bad("softcap_infinite", lambda x: {"softcap": float("inf")}, ("softcap", "inf")),
    Bad("window_of_3", lambda x: {"window_size": (1, 2, 3)}, ("window_size", "(1, 2, 3)")),
]


def slopes(*shape: int, dtype: torch.dtype = torch.float32) -> Change:
    return lambda x: {"alibi_slopes": torch.ones(shape, dtype=dtype, device=x["q"].device)}


ALIBI = [
    Bad("slopes_in_fp16", slopes(4, dtype=torch.float16), ("alibi_slopes", "fp32", "float16")),
    Bad("slopes_in_fp64", slopes(4, dtype=torch.float64), ("ALiBi slopes must have dtype fp32",)),
    Bad("slopes_of_key_heads", slopes(2), ("alibi_slopes", "(2,)", "(4,)", "(2, 4)")),
    Bad("slopes_of_another_batch", slopes(3, 4), ("alibi_slopes", "(3, 4)", "(2, 4)")),
    Bad("slopes_with_3_dimensions", slopes(2, 4, 1), ("alibi_slopes", "(2, 4, 1)")),
    Bad("slope_alone", slopes(), ("alibi_slopes", "()")),
    Bad(
        "slopes_with_gaps",
        lambda x: {"alibi_slopes": torch.ones(8, device=x["q"].device)[::2]},
        ("alibi_slopes", "contiguous last dimension"),
    ),
    Bad(
        "slopes_on_meta",
        lambda x: {"alibi_slopes": torch.ones(4, device="meta")},
        ("alibi_slopes", "meta", "device"),
    ),
]
DEVICES = [
    Bad("k_on_meta", lambda x: {"k": x["k"].to("meta")}, ("k", "meta", "device")),
    Bad("v_on_meta", lambda x: {"v": x["v"].to("meta")}, ("v", "meta", "device")),
]


def right_call(device: str) -> dict[str, Tensor]:
    dtype = torch.float32 if device == "cpu" else torch.float16
    q = torch.zeros(2, 5, 4, 64, dtype=dtype, device=device)
    k = torch.zeros(2, 7, 2, 64, dtype=dtype, device=device)
    return {"q": q, "k": k, "v": k.clone()}


@pytest.mark.parametrize(
    "bad", [*SHAPES, *HEADS, *LIMITS, *DTYPES, *VALUES, *ALIBI, *DEVICES], ids=str
)
def test_wrong_call_is_refused(device: str, bad: Bad) -> None:
    x = right_call(device)
    flash_attn_func(**x)
    with pytest.raises((RuntimeError, ValueError, TypeError)) as caught:
        flash_attn_func(**(x | bad.change(x)))
    message = str(caught.value)
    missing = [word for word in bad.words if word not in message]
    assert not missing, f"{missing} not in: {message}"


def packed(*shape: int) -> Change:
    return lambda x: {"qkv": torch.zeros(shape, dtype=x["q"].dtype, device=x["q"].device)}


PACKED = [
    Bad("qkv_of_2", packed(2, 5, 2, 4, 64), ("qkv", "(batch, seqlen, 3", "(2, 5, 2, 4, 64)")),
    Bad("qkv_with_4_dimensions", packed(5, 3, 4, 64), ("qkv", "(5, 3, 4, 64)")),
    Bad("qkv_with_head_dim_300", packed(2, 5, 3, 4, 300), ("300", "256")),
    Bad("qkv_of_batch_0", packed(0, 5, 3, 4, 64), ("batch", "positive")),
]


@pytest.mark.parametrize("bad", PACKED, ids=str)
def test_wrong_packed_call_is_refused(device: str, bad: Bad) -> None:
    x = right_call(device)
    with pytest.raises(RuntimeError) as caught:
        flash_attn_qkvpacked_func(**bad.change(x))
    assert all(word in str(caught.value) for word in bad.words), caught.value
    kv = torch.zeros(2, 7, 3, 2, 64, dtype=x["q"].dtype, device=device)
    with pytest.raises(RuntimeError, match=r"kv must have shape.*\(2, 7, 3, 2, 64\)"):
        flash_attn_kvpacked_func(x["q"], kv)


def integers(argument: str, *values: int, dtype: torch.dtype = torch.int32) -> Change:
    return lambda x: {argument: torch.tensor(values, dtype=dtype, device=x["q"].device)}


def strided(argument: str) -> Change:
    return lambda x: {argument: x[argument].repeat_interleave(2, -1)[..., ::2]}


def pages(size: int) -> Change:
    return lambda x: {name: x[name].new_zeros(4, size, 2, 64) for name in ("k", "v")}


def with_pages(change: Change) -> Change:
    """A right call with pages, changed."""

    def changed(x: dict[str, Tensor]) -> dict:
        table = torch.tensor([[0, 1], [2, 3]], dtype=torch.int32, device=x["q"].device)
        paged = pages(16)(x) | {"block_table": table}
        return paged | change(x | paged)

    return changed


# A right call: q (9, 4, 64), k and v (14, 2, 64), two sequences of 4 and 5 queries, 7 and 7 keys.
VARLEN = [
    Bad("q_with_4_dimensions", reshaped("q", 1, 9, 4, 64), ("q", "(1, 9, 4, 64)", "total_q")),
    Bad("k_with_4_dimensions", reshaped("k", 1, 14, 2, 64), ("k", "(1, 14, 2, 64)", "block_table")),
    Bad("v_of_another_length", reshaped("v", 13, 2, 64), ("v", "(13, 2, 64)")),
    Bad("k_of_another_head_dim", reshaped("k", 14, 2, 32), ("(14, 2, 32)",)),
    Bad("v_of_head_dim_264", reshaped("v", 14, 2, 264), ("v: ", "at most 256", "264")),
    Bad("head_dim_264", lambda x: {n: x[n].repeat(1, 1, 5)[..., :264] for n in "qkv"}, ("264",)),
    Bad("k_of_3_heads", lambda x: {n: x[n].repeat(1, 2, 1)[:, :3] for n in "kv"}, ("heads", "3")),
    Bad("k_of_another_dtype", cast(torch.float64, "k"), ("k", "float64", "dtype")),
    Bad(
        "cu_seqlens_q_in_int64",
        integers("cu_seqlens_q", 0, 4, 9, dtype=torch.int64),
        ("cu_seqlens_q must have dtype int32", "int64"),
    ),
    Bad(
        "cu_seqlens_k_too_short", integers("cu_seqlens_k", 0, 14), ("cu_seqlens_k", "(2,)", "(3,)")
    ),
    Bad(
        "cu_seqlens_q_of_nothing", integers("cu_seqlens_q", 0), ("cu_seqlens_q", "(1,)", "positive")
    ),
    Bad("cu_seqlens_k_strided", strided("cu_seqlens_k"), ("cu_seqlens_k must be contiguous",)),
    Bad(
        "cu_seqlens_q_on_meta",
        lambda x: {"cu_seqlens_q": x["cu_seqlens_q"].to("meta")},
        ("cu_seqlens_q", "meta", "device"),
    ),
    Bad("cu_seqlens_q_2d", lambda x: {"cu_seqlens_q": x["cu_seqlens_q"][None]}, ("cu_seqlens_q",)),
    Bad("max_seqlen_of_2", integers("max_seqlen_q", 5, 5), ("max_seqlen_q", "integer")),
    Bad("max_seqlen_half", lambda x: {"max_seqlen_k": 7.5}, ("max_seqlen_k", "integer", "7.5")),
    Bad("slopes_of_3", slopes(3, 4), ("alibi_slopes", "(3, 4)", "(2, 4)")),
    Bad("dropout_1", lambda x: {"dropout_p": 1.0}, ("dropout_p", "1.0")),
    Bad("k_paged_without_table", pages(16), ("k", "block_table")),
    Bad("pages_of_24", with_pages(pages(24)), ("divisible by 16", "24")),
    Bad("pages_of_0", with_pages(pages(0)), ("divisible by 16", "0")),
    Bad(
        "v_pages_of_another_head_dim",
        with_pages(lambda x: {"v": x["v"][..., :32]}),
        ("v must have the head_dim of k with a block_table", "16, 2, 32)", "16, 2, 64)"),
    ),
    Bad(
        "table_in_int64",
        with_pages(lambda x: {"block_table": x["block_table"].long()}),
        ("block_table must have dtype int32", "int64"),
    ),
    Bad(
        "table_of_1_sequence",
        with_pages(lambda x: {"block_table": x["block_table"][:1]}),
        ("block_table", "(1, 2)", "(2, 2)"),
    ),
    Bad("table_flat", with_pages(integers("block_table", 0, 1)), ("block_table", "(2,)", "(2, 1)")),
    Bad("table_strided", with_pages(strided("block_table")), ("block_table", "contiguous")),
    Bad(
        "dropout_of_pages",
        with_pages(lambda x: {"dropout_p": 0.5}),
        ("dropout_p", "block_table", "0.5"),
    ),
    Bad(
        "s_dmask_of_pages",
        with_pages(lambda x: {"dropout_p": 0.5, "return_attn_probs": True}),
        ("dropout_p", "block_table", "0.5"),
    ),
]
# What only the tensors' contents tell.
CONTENTS = [
    Bad(
        "cu_seqlens_q_from_1",
        integers("cu_seqlens_q", 1, 4, 9),
        ("cu_seqlens_q", "start at 0", "1"),
    ),
    Bad(
        "cu_seqlens_k_falls",
        integers("cu_seqlens_k", 0, 8, 7),
        ("cu_seqlens_k", "decrease", "8", "7"),
    ),
    Bad(
        "cu_seqlens_q_too_far", integers("cu_seqlens_q", 0, 4, 10), ("cu_seqlens_q", "9 rows", "10")
    ),
    Bad(
        "cu_seqlens_k_too_far",
        integers("cu_seqlens_k", 0, 7, 15),
        ("cu_seqlens_k", "14 rows", "15"),
    ),
    Bad("max_seqlen_q_4", lambda x: {"max_seqlen_q": 4}, ("max_seqlen_q", "5", "4")),
    Bad("max_seqlen_k_0", lambda x: {"max_seqlen_k": 0}, ("max_seqlen_k", "7", "0")),
    Bad(
        "page_that_is_not_there",
        with_pages(lambda x: {"block_table": x["block_table"] + 2}),
        ("block_table[1, 0]", "0 to 3", "4"),
    ),
    Bad(
        "negative_page",
        with_pages(lambda x: {"block_table": x["block_table"] - 1}),
        ("block_table[0, 0]", "-1"),
    ),
    Bad(
        "more_keys_than_pages",
        with_pages(lambda x: integers("cu_seqlens_k", 0, 7, 40)(x) | {"max_seqlen_k": 64}),
        ("cu_seqlens_k", "33", "32", "block_table"),
    ),
]


def right_varlen_call(device: str) -> dict:
    x = {name: t.flatten(0, 1) for name, t in right_call(device).items()}
    cu_seqlens_q = torch.tensor([0, 4, 9], dtype=torch.int32, device=device)
    cu_seqlens_k = torch.tensor([0, 7, 14], dtype=torch.int32, device=device)
    x |= {"q": x["q"][:9], "cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k}
    return x | {"max_seqlen_q": 5, "max_seqlen_k": 7}


@pytest.mark.parametrize("bad", [*VARLEN, *CONTENTS], ids=str)
def test_wrong_varlen_call_is_refused(
    device: str, bad: Bad, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLASH_ATTN_CHECK_DEVICE_DATA", "1")
    x = right_varlen_call(device)
    flash_attn_varlen_func(**x)
    flash_attn_varlen_func(**(x | with_pages(lambda x: {})(x)))
    with pytest.raises(RuntimeError) as caught:
        flash_attn_varlen_func(**(x | bad.change(x)))
    missing = [word for word in bad.words if word not in str(caught.value)]
    assert not missing, f"{missing} not in: {caught.value}"


USED = [
    Bad("seqused_above_length", integers("seqused_k", 7, 8), ("seqused_k[1]", "7", "8")),
    Bad("seqused_negative", integers("seqused_k", -1, 7), ("seqused_k[0]", "-1")),
    Bad("seqused_of_3", integers("seqused_k", 1, 1, 1), ("seqused_k", "(3,)", "(2,)")),
    Bad("leftpad_above_length", integers("leftpad_k", 8, 0), ("leftpad_k[0]", "7", "8")),
    Bad("leftpad_negative", integers("leftpad_k", 0, -2), ("leftpad_k[1]", "-2")),
    Bad(
        "leftpad_in_int64",
        integers("leftpad_k", 0, 0, dtype=torch.int64),
        ("leftpad_k must have dtype int32", "int64"),
    ),
    Bad(
        "leftpad_above_seqused",
        lambda x: integers("seqused_k", 5, 5)(x) | integers("leftpad_k", 0, 6)(x),
        ("leftpad_k[1]", "5", "6"),
    ),
]


@pytest.mark.parametrize("bad", USED, ids=str)
def test_wrong_used_keys_are_refused(
    device: str, bad: Bad, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLASH_ATTN_CHECK_DEVICE_DATA", "1")
    x = right_varlen_call(device) | {"dropout_p": 0.0, "softmax_scale": 0.125, "causal": False}
    _flash_attn_varlen_forward(**x)
    with pytest.raises(RuntimeError) as caught:
        _flash_attn_varlen_forward(**(x | bad.change(x)))
    missing = [word for word in bad.words if word not in str(caught.value)]
    assert not missing, f"{missing} not in: {caught.value}"


@pytest.mark.parametrize("which", ["dq", "dk", "dv"])
def test_internal_backward_checks_where_it_writes(device: str, which: str) -> None:
    x = right_call(device)
    out, lse, _, _ = _flash_attn_forward(
        *(x["q"], x["k"], x["v"], 0.0, 0.125, False, -1, -1, 0.0, None, False)
    )
    for wrong in (
        lambda t: t[:, :-1],
        lambda t: t.double(),
        lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
    ):
        grads = {f"d{name}": torch.empty_like(t) for name, t in x.items()}
        grads[which] = wrong(grads[which])
        with pytest.raises(RuntimeError, match=f"^{which} must have"):
            _flash_attn_backward(
                *(out, x["q"], x["k"], x["v"], out, lse, *grads.values()),
                *(0.0, 0.125, False, -1, -1, 0.0, None, False),
            )


def one_row(t: Tensor) -> Tensor:
    return torch.empty_like(t[:, :1]).expand_as(t)


def rows_that_overlap(t: Tensor) -> Tensor:
    strides = t.stride(0), t.shape[-1], t.shape[-1], 1
    return torch.empty_like(t).as_strided(t.shape, strides)


OVERLAPS = {
    "dq_of_one_row": (lambda x: {"dq": one_row(x["q"])}, "dq .* overlap itself"),
    "dv_of_overlapping_rows": (lambda x: {"dv": rows_that_overlap(x["v"])}, "dv .* overlap itself"),
    "dv_that_is_dk": (lambda x: {"dv": x["dk"]}, "dv .* overlap dk"),
    "dk_that_is_k": (lambda x: {"dk": x["k"]}, "dk .* overlap k "),
    "dq_that_is_dout": (lambda x: {"dq": x["dout"]}, "dq .* overlap dout"),
}


@pytest.mark.parametrize("name", OVERLAPS)
@pytest.mark.parametrize("varlen", [False, True], ids=["dense", "varlen"])
def test_gradients_that_overlap_are_refused(device: str, name: str, varlen: bool) -> None:
    """Of what is written at once, no part may be another's, and none may be read meanwhile."""
    x = right_call(device)
    out, lse, _, _ = _flash_attn_forward(
        *(x["q"], x["k"], x["v"], 0.0, 0.125, False, -1, -1, 0.0, None, False)
    )
    x |= {"dout": torch.ones_like(out), "out": out}
    x |= {f"d{n}": torch.empty_like(x[n]) for n in "qkv"}
    change, words = OVERLAPS[name]
    x |= change(x)
    lengths = ()
    if varlen:  # the first sequence alone
        x, lse = {n: t[0] for n, t in x.items()}, lse[0]
        cu = [torch.tensor([0, n], dtype=torch.int32, device=device) for n in (5, 7)]
        lengths = (*cu, 5, 7)
    given = [x[n] for n in ("dout", "q", "k", "v", "out")]
    call = _flash_attn_varlen_backward if varlen else _flash_attn_backward
    with pytest.raises(RuntimeError, match=words):
        call(
            *(*given, lse, x["dq"], x["dk"], x["dv"], *lengths),
            *(0.0, 0.125, False, -1, -1, 0.0, None, False),
        )


@pytest.mark.parametrize("argument", ["q", "k", "v"])
def test_argument_that_is_no_tensor(device: str, argument: str) -> None:
    x = right_call(device)
    with pytest.raises((TypeError, RuntimeError, AttributeError)):
        flash_attn_func(**(x | {argument: [[1.0]]}))


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_cuda_takes_only_half_precision(device: str, dtype: torch.dtype) -> None:
    x = {name: t.to(dtype) for name, t in right_call(device).items()}
    with pytest.raises((RuntimeError, TypeError), match="fp16.*bf16|float16.*bfloat16") as caught:
        flash_attn_func(**x)
    assert str(dtype).removeprefix("torch.") in str(caught.value)


@pytest.mark.cuda
@pytest.mark.parametrize("argument", ["q", "k", "v"])
def test_one_tensor_on_the_cpu(device: str, argument: str) -> None:
    x = right_call(device)
    with pytest.raises(RuntimeError, match="device|cpu|CUDA"):
        flash_attn_func(**(x | {argument: x[argument].cpu()}))


@pytest.mark.cuda
@pytest.mark.parametrize("argument", ["cu_seqlens_q", "cu_seqlens_k", "alibi_slopes"])
def test_one_small_tensor_on_the_cpu(device: str, argument: str) -> None:
    x = right_varlen_call(device) | {"alibi_slopes": torch.ones(4, device=device)}
    flash_attn_varlen_func(**x)
    with pytest.raises(RuntimeError, match=f"{argument}.*cpu"):
        flash_attn_varlen_func(**(x | {argument: x[argument].cpu()}))


@pytest.mark.cuda
def test_a_refused_call_leaves_the_device_usable(device: str) -> None:
    x = right_call(device)
    for bad in (*SHAPES, *HEADS, *LIMITS):
        with pytest.raises((RuntimeError, ValueError, TypeError)):
            flash_attn_func(**(x | bad.change(x)))
    torch.cuda.synchronize()
    assert not flash_attn_func(**x).any()
