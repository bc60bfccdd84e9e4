"""What a caller has set (autocast, defaults, modes, precision) changes no result, bit by bit."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest
import torch
from cases import DTYPES
from torch import Tensor
from torch.overrides import TorchFunctionMode

from flash_attn import (
    flash_attn_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_with_kvcache,
    merge_states,
)
from flash_attn.cpu.isolation import _ExactProducts

Call = Callable[[bool], list[Tensor]]  # whether gradients are wanted -> results


class Maker:
    """Random tensors of a device and a dtype."""

    def __init__(self, device: str, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype
        self.generator = torch.Generator(device).manual_seed(7)

    def randn(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        wide = torch.randn(shape, generator=self.generator, device=self.device)
        return wide.to(dtype or self.dtype)

    def int32(self, *values: int) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=self.device)

    def qkv(self, q_shape: tuple[int, ...], k_shape: tuple[int, ...]) -> tuple[Tensor, ...]:
        return self.randn(*q_shape), self.randn(*k_shape), self.randn(*k_shape)


def differentiated(function: Callable[..., Any], *inputs: Tensor) -> Call:
    """Results of function, and the gradients of the sum of its first two where they are wanted."""

    def call(with_gradients: bool) -> list[Tensor]:
        torch.manual_seed(3)
        leaves = [x.detach().requires_grad_(with_gradients) for x in inputs]
        results = list(function(*leaves))
        if not with_gradients:
            return results
        weights = [x.detach().clamp(-3, 3) / 7 for x in results[:2]]
        return results + list(torch.autograd.grad(results[:2], leaves, weights))

    return call


def with_probabilities(function: Callable[..., Any], *others: Any, **options: Any) -> Callable:
    options |= dict(return_attn_probs=True, deterministic=True)
    return lambda *tensors: function(*tensors, *others, **options)


def window(make: Maker) -> Call:
    inputs = make.qkv((2, 70, 4, 32), (2, 90, 2, 32))
    return differentiated(with_probabilities(flash_attn_func, window_size=(5, 3)), *inputs)


def causal(make: Maker) -> Call:
    inputs = make.qkv((1, 300, 4, 64), (1, 300, 2, 64))
    return differentiated(with_probabilities(flash_attn_func, causal=True), *inputs)


def full_without_lse(make: Maker) -> Call:
    """What torch's kernel does in both passes on the CPU."""
    inputs = make.qkv((1, 90, 2, 32), (1, 130, 2, 32))
    return differentiated(lambda *qkv: [flash_attn_func(*qkv, deterministic=True)], *inputs)


def every_option(make: Maker) -> Call:
    slopes = make.randn(4, dtype=torch.float32).abs()
    options = dict(softcap=3.0, alibi_slopes=slopes, dropout_p=0.2, window_size=(40, 9))
    function = with_probabilities(flash_attn_qkvpacked_func, **options)
    return differentiated(function, make.randn(1, 80, 3, 4, 32))


def varlen(make: Maker) -> Call:
    lengths = make.int32(0, 30, 30, 65), make.int32(0, 20, 33, 90), 35, 57
    inputs = make.qkv((70, 4, 32), (95, 2, 32))
    options = dict(causal=True, dropout_p=0.1)
    return differentiated(with_probabilities(flash_attn_varlen_func, *lengths, **options), *inputs)


def pages(make: Maker) -> Call:
    q, (k, v) = make.randn(20, 4, 32), make.randn(2, 6, 16, 2, 32)
    lengths = make.int32(0, 5, 20), make.int32(0, 40, 70), 15, 40
    table = make.int32(5, 1, 3, 0, 2, 0).view(2, 3)
    function = with_probabilities(flash_attn_varlen_func, *lengths, causal=True, block_table=table)
    return lambda _: list(function(q, k, v))


def append(make: Maker) -> Call:
    """New keys with rotary embedding, and one length for all sequences."""
    q, k, v = make.qkv((2, 3, 4, 32), (2, 3, 2, 32))
    caches, (cos, sin) = make.randn(2, 2, 40, 2, 32), make.randn(2, 40, 16)
    leftpad = make.int32(2, 9)

    def call(_: bool) -> list[Tensor]:
        k_cache, v_cache = caches.clone()
        out, lse = flash_attn_with_kvcache(
            *(q, k_cache, v_cache, k, v, cos, sin, 30),
            cache_leftpad=leftpad,
            causal=True,
            return_softmax_lse=True,
        )
        return [out, lse, k_cache, v_cache]

    return call


def merged(make: Maker) -> Call:
    outs, lses = make.randn(2, 2, 30, 4, 32), make.randn(2, 2, 4, 30, dtype=torch.float32)
    return differentiated(merge_states, outs[0], lses[0], outs[1], lses[1])


CALLS = (window, causal, full_without_lse, every_option, varlen, pages, append, merged)
WITHOUT_GRADIENTS = ("inference_mode", "no_grad")


@contextmanager
def setting(put: Callable[[Any], Any], value: Any, before: Any) -> Iterator[None]:
    put(value)
    try:
        yield
    finally:
        put(before)


def fp32_precision(module: Any, value: str) -> AbstractContextManager[None]:
    def put(precision: str) -> None:
        module.fp32_precision = precision

    return setting(put, value, "none")


def matmul_precision(value: str) -> AbstractContextManager[None]:
    return setting(torch.set_float32_matmul_precision, value, "highest")


AMBIENT: dict[str, Callable[[str], AbstractContextManager[Any]]] = {
    "autocast_bf16": lambda device: torch.autocast(device, torch.bfloat16),
    "autocast_fp16": lambda device: torch.autocast(device, torch.float16),
    "default_dtype_fp64": lambda _: setting(torch.set_default_dtype, torch.float64, torch.float32),
    "default_dtype_fp16": lambda _: setting(torch.set_default_dtype, torch.float16, torch.float32),
    "default_device": lambda _: setting(torch.set_default_device, "meta", None),
    "device_context": lambda _: torch.device("meta"),
    "deterministic": lambda _: setting(torch.use_deterministic_algorithms, True, False),
    "medium": lambda _: matmul_precision("medium"),
    "high": lambda _: matmul_precision("high"),
    "mkldnn_bf16": lambda _: fp32_precision(torch.backends.mkldnn.matmul, "bf16"),
    "all_mkldnn_tf32": lambda _: fp32_precision(torch.backends.mkldnn, "tf32"),
    "all_backends_bf16": lambda _: fp32_precision(torch.backends, "bf16"),
    "flush_denormal": lambda _: setting(torch.set_flush_denormal, True, False),
    "no_grad": lambda _: torch.no_grad(),
    "inference_mode": lambda _: torch.inference_mode(),
}


@pytest.mark.parametrize("ambient", AMBIENT)
@pytest.mark.parametrize("make_call", CALLS, ids=lambda function: function.__name__)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_ambient_state_changes_no_bit(
    device: str, dtype: str, make_call: Callable[[Maker], Call], ambient: str
) -> None:
    if device == "cuda" and dtype == "fp32":
        dtype = "fp16"
    call = make_call(Maker(device, DTYPES[dtype]))
    with_gradients = ambient not in WITHOUT_GRADIENTS
    want = call(with_gradients)
    with AMBIENT[ambient](device):
        ours = call(with_gradients)
    assert len(ours) == len(want)
    for x, expected in zip(ours, want):
        assert x.dtype == expected.dtype and x.device == expected.device
        assert torch.equal(x, expected) and not expected.isnan().any()


def test_autocast_around_the_backward_pass_alone_changes_no_bit(device: str) -> None:
    make = Maker(device, torch.float32 if device == "cpu" else torch.bfloat16)
    inputs = make.qkv((1, 40, 2, 32), (1, 40, 2, 32))
    results = []
    for enabled in (False, True):
        leaves = [x.detach().requires_grad_() for x in inputs]
        out = flash_attn_func(*leaves, window_size=(5, 3), deterministic=True)
        with torch.autocast(device, torch.bfloat16, enabled=enabled):
            results.append(torch.autograd.grad(out.square().sum(), leaves))
    for ours, want in zip(*results):
        assert torch.equal(ours, want)


def test_settings_are_the_callers_again_after_an_error() -> None:
    """The operator reads the lengths inside of its isolation, and raises."""
    q = torch.randn(10, 2, 32)
    lengths = torch.tensor([0, 99], dtype=torch.int32)
    with (
        matmul_precision("medium"),
        torch.autocast("cpu", torch.bfloat16),
        setting(torch.set_flush_denormal, True, False),
    ):
        with pytest.raises(RuntimeError, match="cu_seqlens_q must end within q"):
            torch.ops.flash_attn._flash_attn_varlen_forward(
                q, q, q, lengths, lengths, 99, 99, 0.0, 1.0, False
            )
        assert torch.is_autocast_enabled("cpu") and torch.is_grad_enabled()
        assert torch.get_float32_matmul_precision() == "medium"
        assert torch.backends.mkldnn.matmul.fp32_precision == "bf16"
        assert float(torch.tensor(1e-39) * 1) == 0
    assert torch.backends.mkldnn.matmul.fp32_precision == "ieee"


def test_denormal_values_survive_a_caller_that_flushes_them() -> None:
    q, v = torch.zeros(1, 16, 2, 8), torch.full((1, 16, 2, 8), 2.0**-130)
    with setting(torch.set_flush_denormal, True, False):
        exact, by_torch = (flash_attn_func(q, q, v, window_size=w) for w in ((3, 3), (-1, -1)))
    assert torch.equal(exact, v) and torch.equal(by_torch, v)


def test_exact_products_last_until_the_last_thread_leaves() -> None:
    matmul, products = torch.backends.mkldnn.matmul, _ExactProducts()
    first_left, entered = threading.Event(), threading.Event()
    seen = []

    def other() -> None:
        with products:
            entered.set()
            first_left.wait(60)
            seen.append(matmul.fp32_precision)

    thread = threading.Thread(target=other)
    with fp32_precision(matmul, "bf16"):
        with products:
            thread.start()
            entered.wait(60)
        first_left.set()
        thread.join(60)
        assert seen == ["ieee"] and matmul.fp32_precision == "bf16"
    with fp32_precision(torch.backends.mkldnn, "bf16"):
        matmul.fp32_precision = "none"  # to follow the module's
        with products:
            assert matmul.fp32_precision == "ieee"
        torch.backends.mkldnn.fp32_precision = "tf32"
        assert matmul.fp32_precision == "tf32"


class Recorder(TorchFunctionMode):
    """The names of the torch functions that it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.seen.append(str(function))
        return function(*args, **(kwargs or {}))


def test_a_function_mode_sees_the_operator_alone(device: str) -> None:
    q = Maker(device, torch.bfloat16).randn(1, 40, 2, 32)
    with Recorder() as recorder:
        torch.ops.flash_attn._flash_attn_forward.default(
            q, q, q, 0.0, 1.0, False, 5, 3, 0.0, None, False
        )
    assert recorder.seen == ["flash_attn._flash_attn_forward.default"]
