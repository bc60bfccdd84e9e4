"""SwiGLU against torch in fp64: torch operations on the CPU, Triton kernels on CUDA."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from cases import DTYPES
from harness import capture
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from flash_attn.ops import activations
from flash_attn.ops.activations import swiglu

SHAPES = [(3, 5, 64), (1000, 37), (1,), (), (0, 4), (2, 4096)]


def make(shape: tuple[int, ...], dtype: str, device: str) -> list[Tensor]:
    """x, y and a gradient."""
    gen = torch.Generator().manual_seed(len(shape))
    tensors = [3 * torch.randn(shape, generator=gen, dtype=torch.float64) for _ in range(3)]
    return [t.to(DTYPES[dtype]).to(device) for t in tensors]


def run(x: Tensor, y: Tensor, dout: Tensor) -> list[Tensor]:
    x, y = x.detach().requires_grad_(), y.detach().requires_grad_()
    out = swiglu(x, y)
    return [out.detach(), *torch.autograd.grad(out, (x, y), dout)]


def oracle(x: Tensor, y: Tensor, dout: Tensor) -> list[Tensor]:
    x, y = x.double().detach().requires_grad_(), y.double().detach().requires_grad_()
    out = F.silu(x) * y
    return [out.detach(), *torch.autograd.grad(out, (x, y), dout.double())]


def assert_one_rounding(ours: list[Tensor], want: list[Tensor], dtype: str) -> None:
    inner = 1e-14 if dtype == "fp64" else 2e-6
    for a, b in zip(ours, want):
        assert a.dtype == DTYPES[dtype] and a.is_contiguous()
        rtol = 0.51 * torch.finfo(a.dtype).eps + inner
        torch.testing.assert_close(a.double(), b, rtol=rtol, atol=inner * 10)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients_are_torchs(shape: tuple, dtype: str, device: str) -> None:
    inputs = make(shape, dtype, device)
    assert_one_rounding(run(*inputs), oracle(*inputs), dtype)


def test_any_strides(device: str) -> None:
    x, y, dout = make((8, 64), "bf16", device)
    want = run(x, y, dout)
    both = torch.cat((x, y), -1)
    for ours in (run(*both.chunk(2, -1), dout), run(x, y.t().contiguous().t(), dout)):
        for a, b in zip(ours, want):
            assert torch.equal(a, b)
    ours, flat = run(x, y, dout[:1, :1].expand(8, 64)), dout[0, 0].repeat(8, 64)
    assert all(torch.equal(a, b) for a, b in zip(ours, run(x, y, flat)))


def test_large_arguments_neither_overflow_nor_vanish(device: str) -> None:
    x = torch.tensor([-1e4, -100.0, -1e-20, 0.0, 1e-20, 100.0, 1e4], device=device)
    inputs = x, torch.full_like(x, 2.0), torch.ones_like(x)
    for a, b in zip(run(*inputs), oracle(*inputs)):
        torch.testing.assert_close(a.double(), b, rtol=2e-6, atol=1e-37)


def test_derivatives_of_every_kind(device: str) -> None:
    inputs = [t.requires_grad_() for t in make((2, 3), "fp64", "cpu")[:2]]
    assert gradcheck(swiglu, inputs, check_batched_grad=True) and gradgradcheck(swiglu, inputs)
    x, y, _ = make((4, 3, 5), "fp32", device)
    gradient = torch.func.grad(lambda x, y: swiglu(x, y).sum(), argnums=(0, 1))
    want = [torch.stack(g) for g in zip(*(gradient(a, y[0]) for a in x))]
    torch.testing.assert_close(list(torch.func.vmap(gradient, (0, None))(x, y[0])), want)
    compiled = torch.compile(gradient, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x[0], y[0]), gradient(x[0], y[0]))
    with pytest.raises(NotImplementedError, match="jvp"):
        torch.func.jvp(swiglu, (x, y), (x, y))
    with pytest.raises(RuntimeError, match="swiglu_fwd has no derivative of its own"):
        activations._forward(x.requires_grad_(), y).sum().backward()


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compiled(dynamic: bool, device: str) -> None:
    compiled = torch.compile(
        lambda x: swiglu(2 * x, x), backend="aot_eager", fullgraph=True, dynamic=dynamic
    )
    for rows in (3, 5):
        x = torch.randn(rows, 8, device=device, requires_grad=True)
        results = []
        for function in (compiled, lambda x: swiglu(2 * x, x)):
            out = function(x)
            results.append((out, torch.autograd.grad(out.sum(), x)[0]))
        torch.testing.assert_close(*results)
    x = torch.randn(3, 8, device=device, requires_grad=True)
    same = torch.compile(lambda x: swiglu(x, x), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(same(x), swiglu(x, x))


def test_operators_keep_torchs_rules(device: str) -> None:
    x, y, dout = make((4, 6), "fp32", device)
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(activations._forward, (x, y), test_utils=tests)
    torch.library.opcheck(activations._backward, (dout, x, y), test_utils=tests)


def test_autocast_changes_nothing(device: str) -> None:
    x, y, dout = make((4, 64), "fp32", device)
    want = run(x, y, dout)
    with torch.autocast(device, dtype=torch.bfloat16):
        assert all(torch.equal(a, b) for a, b in zip(run(x, y, dout), want))


def test_wrong_argument_is_named() -> None:
    x = torch.zeros(2, 3)
    for wrong in (torch.zeros(2, 1), x.half(), x.to("meta")):
        with pytest.raises(RuntimeError, match="y must have x's shape, dtype and device"):
            swiglu(x, wrong)
    with pytest.raises(RuntimeError, match="x must have a floating dtype; got torch.int64"):
        swiglu(x.long(), x.long())


@pytest.mark.cuda
def test_cuda_graph(device: str) -> None:
    x, y, dout = make((64, 512), "bf16", device)
    x.requires_grad_()

    def step() -> tuple[Tensor, Tensor]:
        out = swiglu(x, y)
        return out, torch.autograd.grad(out, x, dout)[0]

    graph, recorded = capture(step)
    with torch.no_grad():
        x.copy_(torch.randn_like(x))
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(recorded, step()))


@pytest.mark.cuda
def test_offsets_beyond_32_bits(device: str) -> None:
    if torch.cuda.mem_get_info()[0] < 40 << 30:
        pytest.skip("needs 40 GiB of GPU memory")
    x = torch.zeros((1 << 31) + 5000, device=device, dtype=torch.bfloat16)
    x[-4000:] = torch.randn(4000, device=device)
    last = x[-4000:].clone()
    out, dx, dy = run(x, x, x)
    for ours, want in zip((out, dx, dy), run(last, last, last)):
        assert torch.equal(ours[-4000:], want) and not ours[-6000:-4000].any()
