"""Operators under torch.library, torch.compile, FakeTensor and torch.export."""

from __future__ import annotations

import shutil

import pytest
import torch
from cases import AttnCase, Mask, everywhere, make_inputs
from harness import assert_nearly, leaves, run_flash
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from flash_attn import flash_attn_func

CASES = [
    AttnCase(33, 47, (4, 2), 64, Mask.causal, batch=2),
    AttnCase(40, 40, (2, 2), 40, Mask.none, "fp16"),
    AttnCase(33, 47, (2, 1), 33, Mask.causal),
]
NATIVE = [case for case in CASES if case.head_dim % 8 == 0]


def test_schemas() -> None:
    assert str(torch.ops.flash_attn.fwd.default._schema) == (
        "flash_attn::fwd(Tensor q, Tensor k, Tensor v, float softmax_scale, bool causal) "
        "-> (Tensor out, Tensor softmax_lse)"
    )
    assert str(torch.ops.flash_attn.bwd.default._schema) == (
        "flash_attn::bwd(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor softmax_lse, "
        "Tensor? dlse, float softmax_scale, bool causal, bool deterministic) "
        "-> (Tensor dq, Tensor dk, Tensor dv)"
    )


def test_operators_are_registered(device: str) -> None:
    key = device.upper()
    for name in ("flash_attn::fwd", "flash_attn::bwd"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(name, key), f"{name} on {key}"
        assert torch._C._dispatch_has_kernel_for_dispatch_key(name, "Meta"), f"{name} on Meta"


@everywhere(*NATIVE)
@pytest.mark.parametrize("with_dlse", [False, True], ids=["", "dlse"])
def test_opcheck(device: str, case: AttnCase, with_dlse: bool) -> None:
    x = make_inputs(case, device)
    forward = (x.q, x.k, x.v, case.scale, case.causal)
    torch.library.opcheck(torch.ops.flash_attn.fwd.default, forward)
    out, lse = torch.ops.flash_attn.fwd(*forward)
    dlse = torch.ones_like(lse) if with_dlse else None
    backward = (x.dout, x.q, x.k, x.v, out, lse, dlse, case.scale, case.causal, True)
    torch.library.opcheck(torch.ops.flash_attn.bwd.default, backward)


@everywhere(*NATIVE)
def test_fake_tensors_have_the_real_shapes_and_strides(device: str, case: AttnCase) -> None:
    x = make_inputs(case, device)

    def run(q: Tensor, k: Tensor, v: Tensor, dout: Tensor) -> list[Tensor]:
        out, lse = torch.ops.flash_attn.fwd(q, k, v, case.scale, case.causal)
        grads = torch.ops.flash_attn.bwd(
            dout, q, k, v, out, lse, None, case.scale, case.causal, False
        )
        return [out, lse, *grads]

    layouts = (lambda t: t, lambda t: t.transpose(1, 2).contiguous().transpose(1, 2))
    for layout in layouts:
        tensors = [layout(t) for t in (x.q, x.k, x.v, x.dout)]
        real = run(*tensors)
        with FakeTensorMode() as mode:
            fake = run(*(mode.from_tensor(t) for t in tensors))
        for a, b in zip(fake, real):
            assert (a.shape, a.dtype, a.device, a.stride()) == (
                b.shape,
                b.dtype,
                b.device,
                b.stride(),
            )
            assert b.is_contiguous()


@everywhere(*CASES)
def test_public_function_runs_on_fake_tensors(device: str, case: AttnCase) -> None:
    x = make_inputs(case, device)
    with FakeTensorMode() as mode:
        q, k, v, dout = (mode.from_tensor(t) for t in (x.q, x.k, x.v, x.dout))
        q, k, v = leaves(q, k, v)
        out, lse, _ = flash_attn_func(q, k, v, causal=case.causal, return_attn_probs=True)
        grads = torch.autograd.grad(out, (q, k, v), dout)
    assert out.shape == q.shape and lse.shape == (case.batch, case.heads[0], case.seqlen_q)
    assert [g.shape for g in grads] == [x.q.shape, x.k.shape, x.v.shape]


def compare_compiled(
    case: AttnCase, device: str, backend: str, dynamic: bool | None = None
) -> None:
    torch._dynamo.reset()

    def block(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        out, lse, _ = flash_attn_func(
            q * 1.5, k, v, causal=case.causal, deterministic=True, return_attn_probs=True
        )
        return out.relu() + out, lse

    compiled = torch.compile(block, backend=backend, fullgraph=True, dynamic=dynamic)
    shapes = [case]
    if dynamic:
        shapes.append(case.but(seqlen_q=case.seqlen_q + 9, seqlen_k=case.seqlen_k + 3))
    for shape in shapes:
        x = make_inputs(shape, device)
        results = []
        for function in (compiled, block):
            inputs = leaves(x.q, x.k, x.v)
            out, lse = function(*inputs)
            grads = torch.autograd.grad((out, lse), inputs, (x.dout, torch.ones_like(lse)))
            results.append((out.detach(), lse.detach(), *grads))
        for name, ours, want in zip(("out", "lse", "dq", "dk", "dv"), *results):
            assert_nearly(name, ours, want, f"{shape}, {backend}")


@everywhere(*CASES)
def test_compiles_as_a_full_graph(device: str, case: AttnCase) -> None:
    compare_compiled(case, device, "aot_eager")


@everywhere(CASES[0])
def test_compiles_with_dynamic_shapes(device: str, case: AttnCase) -> None:
    compare_compiled(case, device, "aot_eager", dynamic=True)


@everywhere(CASES[0])
def test_compiles_with_inductor(device: str, case: AttnCase) -> None:
    if device == "cuda":
        pytest.importorskip("triton")
    if shutil.which("g++") is None:
        pytest.skip("inductor and triton need a compiler")
    compare_compiled(case, device, "inductor")


@everywhere(*CASES)
def test_plain_call_compiles(device: str, case: AttnCase) -> None:
    """The common call, without the tuple, under no_grad and with gradients."""
    torch._dynamo.reset()
    x = make_inputs(case, device)
    compiled = torch.compile(flash_attn_func, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        out = compiled(x.q, x.k, x.v, causal=case.causal)
    want = run_flash(x.q, x.k, x.v, x.dout, causal=case.causal, deterministic=True)
    assert_nearly("out", out, want.out, case)
    q, k, v = leaves(x.q, x.k, x.v)
    compiled(q, k, v, causal=case.causal, deterministic=True).backward(x.dout)
    for name, t in (("dq", q), ("dk", k), ("dv", v)):
        assert_nearly(name, t.grad, getattr(want, name), case)


class Attention(torch.nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return flash_attn_func(q, k, v, causal=True)


@everywhere(CASES[0])
def test_export(device: str, case: AttnCase) -> None:
    x = make_inputs(case, device)
    seqlen_q, seqlen_k = torch.export.Dim("seqlen_q", min=2), torch.export.Dim("seqlen_k", min=2)
    program = torch.export.export(
        Attention(),
        (x.q, x.k, x.v),
        dynamic_shapes=({1: seqlen_q}, {1: seqlen_k}, {1: seqlen_k}),
    )
    assert "flash_attn.fwd" in str(program.graph)
    other = make_inputs(case.but(seqlen_q=50, seqlen_k=60), device)
    for inputs in (x, other):
        want = flash_attn_func(inputs.q, inputs.k, inputs.v, causal=True)
        got = program.module()(inputs.q, inputs.k, inputs.v)
        assert_nearly("out", got, want, case)


@everywhere(CASES[0])
def test_meta_tensors(device: str, case: AttnCase) -> None:
    x = make_inputs(case, device)
    out, lse, _ = flash_attn_func(*(t.to("meta") for t in (x.q, x.k, x.v)), return_attn_probs=True)
    assert out.device.type == "meta" and out.shape == x.q.shape
    assert lse.shape == (case.batch, case.heads[0], case.seqlen_q)
