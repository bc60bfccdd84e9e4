"""qkvpacked and kvpacked: the same bits as unpacked, gradients in one packed tensor."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from cases import (
    Alibi,
    AttnCase,
    Mask,
    VarlenCase,
    everywhere,
    make_dlse,
    make_inputs,
    make_varlen_inputs,
    on_devices,
)
from harness import assert_bitwise, assert_nearly, assert_same_result, features_of, poison
from oracle import Result
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from flash_attn import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
)

DENSE = [
    AttnCase(130, 130, (2, 2), 64, Mask.causal, batch=2),
    AttnCase(130, 130, (3, 3), 128, Mask.none, "fp16", 2),
    AttnCase(97, 97, (4, 4), 96, Mask.causal, "bf16", 2, (30, 0)),
    AttnCase(97, 97, (2, 2), 256, Mask.none, "fp16", 1, (30, 20), 5.0),
    AttnCase(113, 113, (2, 2), 33, Mask.causal, "bf16", 2, alibi=Alibi.per_batch),
    AttnCase(113, 113, (2, 2), 192, Mask.causal, "bf16", 2, alibi=Alibi.per_head),
    AttnCase(113, 113, (3, 3), 40, Mask.causal, "fp16", 2, dropout=0.2),
    AttnCase(64, 64, (2, 2), 32, Mask.none, "bf16", 3, (9, 40), 3.0, Alibi.per_head, 0.1),
    AttnCase(1, 1, (2, 2), 64, Mask.causal),
    AttnCase(0, 0, (2, 2), 64, Mask.causal),
]
LENGTHS = (40, 0, 130, 5)
VARLEN = [
    VarlenCase(LENGTHS, LENGTHS, (2, 2), 64, Mask.causal, unused=(9, 9)),
    VarlenCase(LENGTHS, LENGTHS, (3, 3), 128, Mask.none, "fp16"),
    VarlenCase(LENGTHS, LENGTHS, (2, 2), 96, Mask.causal, "bf16", (9, 9), (30, 0), 5.0),
    VarlenCase(LENGTHS, LENGTHS, (2, 2), 33, Mask.causal, alibi=Alibi.per_batch, dropout=0.2),
    VarlenCase(LENGTHS, LENGTHS, (2, 2), 256, Mask.none, "fp16", (3, 3), (20, 40), dropout=0.1),
]
# (k, v) alone: other lengths and grouped heads.
DENSE_KV = [case.but(heads=(2 * case.heads[0], case.heads[1])) for case in DENSE]
DENSE_KV += [case.but(seqlen_k=case.seqlen_k + 70) for case in DENSE]
OTHER_LENGTHS = (100, 30, 0, 7)
VARLEN_KV = [case.but(heads=(2 * case.heads[0], case.heads[1])) for case in VARLEN]
VARLEN_KV += [case.but(lengths_k=OTHER_LENGTHS) for case in VARLEN]

Forward = Callable[..., tuple[Tensor, Tensor, Tensor]]


def options_of(case: AttnCase | VarlenCase, device: str) -> dict[str, Any]:
    options = features_of(case, device) | dict(causal=case.causal, softmax_scale=0.2)
    return options | dict(deterministic=True, return_attn_probs=True)


def run(forward: Forward, inputs: list[Tensor], dout: Tensor, dlse: Tensor) -> list[Tensor]:
    """out, lse, S_dmask, and the gradients of the inputs."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    torch.manual_seed(1)
    poison(dout.device)
    out, lse, probs = forward(*inputs)
    poison(dout.device)
    grads = torch.autograd.grad((out, lse), inputs, (dout, dlse))
    return [out.detach(), lse.detach(), probs, *grads]


def compare(
    case: AttnCase | VarlenCase,
    x: Any,
    dlse: Tensor,
    unpacked: Forward,
    packed: Forward,
    pack_dim: int,
    with_q: bool,
) -> None:
    parts = [x.q, x.k, x.v]
    count = 3 if with_q else 2
    wide = torch.stack(parts[3 - count :], dim=pack_dim)
    out, lse, probs, dq, dk, dv = run(unpacked, parts, x.dout, dlse)
    inputs = [wide] if with_q else [x.q, wide]
    out_packed, lse_packed, probs_packed, *grads = run(packed, inputs, x.dout, dlse)
    dwide = grads[-1]
    assert dwide.shape == wide.shape and dwide.is_contiguous(), case
    assert_bitwise("S_dmask", probs_packed, probs, case)
    want = Result(out, lse, dq, dk, dv)
    dq_packed = dwide.select(pack_dim, 0) if with_q else grads[0]
    dk_packed, dv_packed = (dwide.select(pack_dim, i) for i in (count - 2, count - 1))
    ours = Result(out_packed, lse_packed, dq_packed, dk_packed, dv_packed)
    if x.q.is_cuda:
        assert_same_result(ours, want, case, dq_bitwise=True)
        return
    for name in ("out", "lse", "dq", "dk", "dv"):  # matrix products of other strides
        assert_nearly(name, getattr(ours, name), getattr(want, name), case)


@everywhere(*DENSE)
def test_qkvpacked_is_unpacked(device: str, case: AttnCase) -> None:
    x, options = make_inputs(case, device), options_of(case, device)
    unpacked = partial(flash_attn_func, **options)
    packed = partial(flash_attn_qkvpacked_func, **options)
    compare(case, x, make_dlse(case, device), unpacked, packed, 2, with_q=True)


@everywhere(*DENSE_KV)
def test_kvpacked_is_unpacked(device: str, case: AttnCase) -> None:
    x, options = make_inputs(case, device), options_of(case, device)
    unpacked = partial(flash_attn_func, **options)
    packed = partial(flash_attn_kvpacked_func, **options)
    compare(case, x, make_dlse(case, device), unpacked, packed, 2, with_q=False)


@everywhere(*VARLEN)
def test_varlen_qkvpacked_is_unpacked(device: str, case: VarlenCase) -> None:
    x, options = make_varlen_inputs(case, device), options_of(case, device)
    cu, longest = x.cu_seqlens_q, x.max_seqlen_q

    def unpacked(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return flash_attn_varlen_func(q, k, v, cu, cu, longest, longest, **options)

    def packed(qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return flash_attn_varlen_qkvpacked_func(qkv, cu, longest, **options)

    compare(case, x, make_dlse(case, device), unpacked, packed, 1, with_q=True)


@everywhere(*VARLEN_KV)
def test_varlen_kvpacked_is_unpacked(device: str, case: VarlenCase) -> None:
    x, options = make_varlen_inputs(case, device), options_of(case, device)
    lengths = x.cu_seqlens_q, x.cu_seqlens_k, x.max_seqlen_q, x.max_seqlen_k

    def unpacked(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return flash_attn_varlen_func(q, k, v, *lengths, **options)

    def packed(q: Tensor, kv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return flash_attn_varlen_kvpacked_func(q, kv, *lengths, **options)

    compare(case, x, make_dlse(case, device), unpacked, packed, 1, with_q=False)


class Recorder(TorchDispatchMode):
    """Names of the operators that run, and their argument `deterministic`."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.deterministic: dict[str, bool] = {}

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        self.names.append(str(function))
        for argument, value in zip(function._schema.arguments, args, strict=False):
            if argument.name == "deterministic":
                self.deterministic[str(function)] = value
        return function(*args, **(kwargs or {}))


PUT_TOGETHER = ("stack", "cat", "copy_", "clone", "select_backward", "slice_backward", "add")


def assert_written_in_place(
    backward: Callable[[], object], operator: str, case: AttnCase | VarlenCase
) -> None:
    """The gradients are one operator's, and nothing puts them together afterwards."""
    with Recorder() as recorder:
        backward()
    names = [name.removeprefix("aten.").split(".")[0] for name in recorder.names]
    assert sum(operator in name for name in recorder.names) == 1, recorder.names
    assert not set(names) & set(PUT_TOGETHER), f"{recorder.names}; case {case}"


@on_devices(cpu=[c.but(dtype="fp32") for c in (DENSE[0], DENSE[7])])
def test_packed_gradients_are_written_in_place(device: str, case: AttnCase) -> None:
    x, options = make_inputs(case, device), options_of(case, device)
    qkv = torch.stack([x.q, x.k, x.v], dim=2).requires_grad_()
    out, _, _ = flash_attn_qkvpacked_func(qkv, **options)
    assert_written_in_place(
        lambda: torch.autograd.grad(out, qkv, x.dout),
        "flash_attn._flash_attn_backward.default",
        case,
    )
    q, kv = x.q.requires_grad_(), torch.stack([x.k, x.v], dim=2).requires_grad_()
    out_kv, _, _ = flash_attn_kvpacked_func(q, kv, **options)
    assert_written_in_place(
        lambda: torch.autograd.grad(out_kv, (q, kv), x.dout),
        "flash_attn._flash_attn_backward.default",
        case,
    )


@on_devices(cpu=[c.but(dtype="fp32") for c in (VARLEN[0], VARLEN[4])])
def test_packed_varlen_gradients_are_written_in_place(device: str, case: VarlenCase) -> None:
    x, options = make_varlen_inputs(case, device), options_of(case, device)
    cu, longest = x.cu_seqlens_q, x.max_seqlen_q
    qkv = torch.stack([x.q, x.k, x.v], dim=1).requires_grad_()
    out, _, _ = flash_attn_varlen_qkvpacked_func(qkv, cu, longest, **options)
    operator = "flash_attn._flash_attn_varlen_backward.default"
    assert_written_in_place(lambda: torch.autograd.grad(out, qkv, x.dout), operator, case)
    q, kv = x.q.requires_grad_(), torch.stack([x.k, x.v], dim=1).requires_grad_()
    out_kv, _, _ = flash_attn_varlen_kvpacked_func(q, kv, cu, cu, longest, longest, **options)
    assert_written_in_place(lambda: torch.autograd.grad(out_kv, (q, kv), x.dout), operator, case)


@pytest.mark.cuda
@on_devices(cuda=[AttnCase(8192, 8192, (8, 8), d, Mask.causal) for d in (64, 128)])
def test_packed_gradients_take_no_second_copy(device: str, case: AttnCase) -> None:
    """Backward: dqkv, an fp32 dQ, a few values per row; a copy of dqkv would not fit."""
    x = make_inputs(case, device)
    qkv = torch.stack([x.q, x.k, x.v], dim=2).requires_grad_()
    out = flash_attn_qkvpacked_func(qkv, causal=True)
    torch.cuda.reset_peak_memory_stats()
    base = torch.cuda.memory_allocated()
    torch.autograd.grad(out, qkv, x.dout)
    used = torch.cuda.max_memory_allocated() - base
    one = x.q.numel() * x.q.element_size()
    limit = 3 * one + 2 * one + 32 * case.seqlen_q * case.heads[0] + (4 << 20)
    assert used <= limit, f"backward uses {used >> 20} MiB, limit {limit >> 20}"


@pytest.mark.parametrize("deterministic", [False, True], ids=["default", "deterministic"])
def test_deterministic_reaches_the_operators(deterministic: bool) -> None:
    """The CPU backend repeats bitwise in either mode: there it would not show."""
    x = torch.randn(2, 5, 3, 4, 16)  # (batch, seqlen, qkv, heads, d)
    flat, cu = x.flatten(0, 1), torch.tensor([0, 5, 10], dtype=torch.int32)
    dense, rows = [t.contiguous() for t in x.unbind(2)], [t.contiguous() for t in flat.unbind(1)]
    calls: list[tuple[Callable[..., Tensor], list[Any], tuple]] = [
        (flash_attn_func, dense, ()),
        (flash_attn_kvpacked_func, [dense[0], x[:, :, 1:]], ()),
        (flash_attn_qkvpacked_func, [x], ()),
        (flash_attn_varlen_func, rows, (cu, cu, 5, 5)),
        (flash_attn_varlen_kvpacked_func, [rows[0], flat[:, 1:]], (cu, cu, 5, 5)),
        (flash_attn_varlen_qkvpacked_func, [flat], (cu, 5)),
    ]
    for function, inputs, lengths in calls:
        inputs = [t.detach().requires_grad_() for t in inputs]
        out = function(*inputs, *lengths, deterministic=deterministic)
        with Recorder() as recorder:
            out.sum().backward()
        values = list(recorder.deterministic.values())
        assert values == [deterministic], f"{function.__name__}: {recorder.deterministic}"
