"""Wrong arguments: refused before any launch, by argument, what was given and what is allowed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from flash_attn import flash_attn_func

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
    Bad("v_of_another_head_dim", reshaped("v", 2, 7, 2, 128), ("v", "(2, 7, 2, 128)")),
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
    Bad("window_of_3", lambda x: {"window_size": (1, 2, 3)}, ("window_size", "(1, 2, 3)")),
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


@pytest.mark.parametrize("bad", [*SHAPES, *HEADS, *LIMITS, *DTYPES, *VALUES, *DEVICES], ids=str)
def test_wrong_call_is_refused(device: str, bad: Bad) -> None:
    x = right_call(device)
    flash_attn_func(**x)
    with pytest.raises((RuntimeError, ValueError, TypeError)) as caught:
        flash_attn_func(**(x | bad.change(x)))
    message = str(caught.value)
    missing = [word for word in bad.words if word not in message]
    assert not missing, f"{missing} not in: {message}"


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
def test_a_refused_call_leaves_the_device_usable(device: str) -> None:
    x = right_call(device)
    for bad in (*SHAPES, *HEADS, *LIMITS):
        with pytest.raises((RuntimeError, ValueError, TypeError)):
            flash_attn_func(**(x | bad.change(x)))
    torch.cuda.synchronize()
    assert not flash_attn_func(**x).any()


OPERATOR_ERRORS = [
    Bad("k_of_another_length_than_v", reshaped("k", 2, 9, 2, 64), ("v",)),
    Bad("3_kv_heads_for_4_heads", kv_heads(3), ("heads",)),
    Bad("head_dim_264", head_dim(264), ("264", "256")),
    Bad("k_of_another_dtype", cast(torch.float64, "k"), ("k",)),
    Bad("batch_0", lambda x: {n: t[:0] for n, t in x.items()}, ("batch",)),
    Bad("k_of_another_head_dim", reshaped("k", 2, 7, 2, 32), ("k",)),
]


@pytest.mark.cuda
@pytest.mark.parametrize("bad", OPERATOR_ERRORS, ids=str)
def test_operator_checks_for_itself(device: str, bad: Bad) -> None:
    """Callers of torch.ops.flash_attn get errors as well, not wrong memory."""
    x = right_call(device)
    x |= bad.change(x)
    with pytest.raises((RuntimeError, ValueError, TypeError)) as caught:
        torch.ops.flash_attn.fwd(x["q"], x["k"], x["v"], 0.125, False)
    assert all(word in str(caught.value) for word in bad.words), caught.value


@pytest.mark.cuda
def test_operator_refuses_a_head_dim_that_needs_padding(device: str) -> None:
    q = torch.zeros(1, 4, 2, 60, device=device, dtype=torch.float16)
    with pytest.raises(RuntimeError, match="multiple of 8"):
        torch.ops.flash_attn.fwd(q, q, q, 0.125, False)


@pytest.mark.cuda
@pytest.mark.parametrize("which", ["dout", "out", "softmax_lse", "dlse"])
def test_backward_operator_checks_its_inputs(device: str, which: str) -> None:
    x = right_call(device)
    out, lse = torch.ops.flash_attn.fwd(x["q"], x["k"], x["v"], 0.125, False)
    given = {"dout": out, "out": out, "softmax_lse": lse, "dlse": torch.zeros_like(lse)}

    def call() -> None:
        torch.ops.flash_attn.bwd(
            given["dout"],
            *(x["q"], x["k"], x["v"], given["out"], given["softmax_lse"], given["dlse"]),
            *(0.125, False, False),
        )

    call()
    given[which] = given[which][:, :-1]
    with pytest.raises((RuntimeError, ValueError)) as caught:
        call()
    assert which in str(caught.value)
