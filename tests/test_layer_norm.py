"""Layer norm and RMS norm against torch in fp64: torch operations on the CPU, Triton on CUDA."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import DTYPES
from harness import capture
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck

import flash_attn
from flash_attn.ops.triton import _layer_norm_kernels as kernels
from flash_attn.ops.triton import _layer_norm_ops as ops
from flash_attn.ops.triton.layer_norm import (
    RMSNorm,
    layer_norm_fn,
    layer_norm_linear_fn,
    rms_norm_fn,
)

EPS = 1e-5
DIFFERENTIABLE = ("x", "weight", "bias", "residual", "x1", "weight1", "bias1")


@dataclass(frozen=True)
class NormCase:
    """there: which optional tensors; dtypes: of x, of weights, of residual."""

    rows: tuple[int, ...] = (3, 5)
    hidden: int = 96
    there: str = ""
    rms: bool = False
    dropout: float = 0.0
    dtypes: tuple[str, str, str] = ("fp32", "fp32", "fp32")
    zero_centered: bool = False
    in_fp32: bool = False

    def __str__(self) -> str:
        marks = "-zero" * self.zero_centered + "-fp32" * self.in_fp32 + "-rms" * self.rms
        there = self.there.replace(" ", ".") or "plain"
        return f"{self.rows}-{self.hidden}-{there}-p{self.dropout}-{'.'.join(self.dtypes)}{marks}"

    def but(self, **changes: Any) -> NormCase:
        return replace(self, **changes)

    @property
    def options(self) -> dict[str, Any]:
        return dict(
            eps=EPS,
            dropout_p=self.dropout,
            prenorm=True,
            residual_in_fp32=self.in_fp32,
            zero_centered_weight=self.zero_centered,
            is_rms_norm=self.rms,
            return_dropout_mask=True,
        )


EVERYTHING = "bias residual x1 weight1 bias1"
MIXED = ("bf16", "fp32", "fp32")
LAYER = [
    NormCase(),
    NormCase(there="bias"),
    NormCase(there="bias residual"),
    NormCase(there="bias x1", dropout=0.2),
    NormCase(there="bias rowscale", dropout=0.5),
    NormCase(there="residual rowscale"),
    NormCase(there=EVERYTHING),
    NormCase(there=EVERYTHING, dropout=0.3),
    NormCase(there="weight1", zero_centered=True),
    NormCase(there="bias", dropout=1.0),
    NormCase(there="bias residual", dtypes=MIXED, dropout=0.1),
    NormCase(there="bias", dtypes=("bf16", "fp32", "bf16"), in_fp32=True),
    NormCase(there=EVERYTHING, dtypes=("fp16", "fp16", "fp16"), dropout=0.1),
    NormCase(there=EVERYTHING, dtypes=("bf16", "bf16", "bf16")),
    NormCase(there=EVERYTHING, dtypes=("fp64", "fp64", "fp64"), dropout=0.1),
    *(NormCase(hidden=n, there="bias residual") for n in (1, 3, 127, 1024, 4099)),
    NormCase(rows=(), there="bias"),
    NormCase(rows=(0, 4), there=EVERYTHING, dropout=0.1),
    NormCase(rows=(1000,), hidden=64, there="bias"),
]
CASES = [case.but(rms=rms) for rms in (False, True) for case in LAYER]
every_case = pytest.mark.parametrize("case", CASES, ids=str)


def make(case: NormCase, device: str) -> dict[str, Tensor]:
    """The tensors that are there, as leaves."""
    gen = torch.Generator().manual_seed(case.hidden + len(case.there))
    x, weights, residual = (DTYPES[name] for name in case.dtypes)
    full, row = (*case.rows, case.hidden), (case.hidden,)
    shapes = dict(x=full, weight=row, bias=row, residual=full, x1=full, weight1=row, bias1=row)
    dtypes = dict(x=x, x1=x, residual=residual, rowscale=torch.float32)
    shapes["rowscale"] = case.rows
    tensors = {}
    for name, shape in shapes.items():
        t = torch.randn(shape, generator=gen, dtype=torch.float64) + 0.3
        if name in (*case.there.split(), "x", "weight"):
            tensors[name] = t.to(dtypes.get(name, weights)).to(device)
    return {n: t.requires_grad_(n in DIFFERENTIABLE) for n, t in tensors.items()} | {
        "bias": tensors.get("bias")
    }


def oracle(case: NormCase, given: dict[str, Tensor], masks: list[Tensor | None]) -> list[Tensor]:
    """y, y1 if there is a weight1, and total: torch's norms in fp64."""
    total = given["x"].double()
    if "rowscale" in given:
        total = total * given["rowscale"].double()[..., None]
    keep = 1 / (1 - case.dropout) if case.dropout < 1 else 0.0
    total = total if masks[0] is None else total * masks[0] * keep
    if "x1" in given:
        x1 = given["x1"].double()
        total = total + (x1 if masks[1] is None else x1 * masks[1] * keep)
    if "residual" in given:
        total = total + given["residual"].double()
    results = []
    for weight, bias in (("weight", "bias"), ("weight1", "bias1")):
        if weight not in given:
            continue
        w, b = given[weight].double() + case.zero_centered, given.get(bias)
        b = None if b is None else b.double()
        if case.rms:
            y = F.rms_norm(total, w.shape, w, EPS) + (0 if b is None else b)
        else:
            y = F.layer_norm(total, w.shape, w, b, EPS)
        results.append(y)
    return [*results, total]


def assert_rounded(name: str, ours: Tensor, want: Tensor, inner: float = 1e-5) -> None:
    """Equal but for one rounding and fp32 arithmetic, in relation to the largest value."""
    assert ours.shape == want.shape, name
    if ours.numel() == 0:
        return
    eps = torch.finfo(ours.dtype).eps
    inner = 1e-12 if ours.dtype == torch.float64 else inner
    atol = inner * (1 + want.abs().max().item())
    torch.testing.assert_close(
        ours.double(), want, rtol=0.51 * eps, atol=atol, msg=lambda m: name + m
    )


@every_case
def test_values_and_gradients_are_torchs(case: NormCase, device: str) -> None:
    given = make(case, device)
    *results, mask, mask1 = layer_norm_fn(**given, **case.options)
    assert (mask is not None) == (case.dropout > 0)
    assert (mask1 is not None) == (case.dropout > 0 and "x1" in given)
    exact = {
        n: None if t is None else t.detach().double().clone().requires_grad_(t.requires_grad)
        for n, t in given.items()
    }
    want = oracle(case, exact, [mask, mask1])
    names = ["y", "y1", "total"] if "weight1" in given else ["y", "total"]
    for name, a, b in zip(names, results, want, strict=True):
        assert_rounded(name, a, b)
    of_residual = given["residual"].dtype if "residual" in given else given["x"].dtype
    total_dtype = torch.float32 if case.in_fp32 else of_residual
    assert results[-1].dtype == total_dtype and results[0].dtype == given["x"].dtype

    gen = torch.Generator().manual_seed(5)
    douts = [torch.randn(r.shape, generator=gen, dtype=torch.float64).to(r) for r in results]
    leaves = [n for n in DIFFERENTIABLE if given.get(n) is not None]
    ours = torch.autograd.grad(results, [given[n] for n in leaves], douts)
    theirs = torch.autograd.grad(want, [exact[n] for n in leaves], [d.double() for d in douts])
    # What is saved is total in its dtype: its rounding, where rows are short, is amplified.
    rounding = 0.0 if total_dtype in (torch.float32, torch.float64) else 4.0
    inner = 2e-5 + rounding * torch.finfo(total_dtype).eps
    for name, a, b in zip(leaves, ours, theirs):
        assert a.dtype == given[name].dtype
        assert_rounded(f"d{name}: ", a, b, inner)


@pytest.mark.parametrize("rms", [False, True], ids=["layer", "rms"])
def test_results_are_those_asked_for(rms: bool, device: str) -> None:
    given = make(NormCase(there=EVERYTHING), device)
    x, weight, bias = given["x"], given["weight"], given["bias"]
    if rms:
        y = rms_norm_fn(x, weight, bias)
        assert torch.equal(y, layer_norm_fn(x, weight, bias, is_rms_norm=True))
    else:
        y = layer_norm_fn(x, weight, bias)
    function = rms_norm_fn if rms else layer_norm_fn
    same = partial(torch.testing.assert_close, rtol=1e-6, atol=1e-6)
    y_again, total = function(x, weight, bias, prenorm=True)
    same(y, y_again)
    assert total is x
    y, y1 = function(x, weight, bias, weight1=given["weight1"])
    same(y, y_again)
    assert y1.shape == y.shape
    y, mask, mask1 = function(x, weight, bias, return_dropout_mask=True)
    same(y, y_again)
    assert mask is None and mask1 is None
    assert function(x, weight, bias, out_dtype=torch.float64).dtype == torch.float64
    with torch.no_grad():
        both = function(x, weight, bias, given["residual"], prenorm=True)
        assert torch.equal(both[1], x + given["residual"])
        same(function(x, weight, bias, given["residual"]), both[0])


def test_results_go_where_told(device: str) -> None:
    given = make(NormCase(there="bias residual"), device)
    want = layer_norm_fn(**given, prenorm=True)
    out, residual_out = (torch.full_like(w, torch.nan) for w in want)
    y, total = layer_norm_fn(**given, prenorm=True, out=out, residual_out=residual_out)
    assert y is out and total is residual_out
    assert torch.equal(out, want[0]) and torch.equal(residual_out, want[1])
    grads = [torch.autograd.grad(sum(r.sum() for r in rs), given["x"]) for rs in (want, (y, total))]
    torch.testing.assert_close(*grads)


def test_any_strides(device: str) -> None:
    given = make(NormCase(rows=(4, 6), hidden=64, there="bias residual x1", rms=True), device)
    want = layer_norm_fn(**given)
    dout = torch.randn(4, 1, 64, device=device).expand(4, 6, 64)
    inputs = [t for t in given.values() if t is not None]
    grads = torch.autograd.grad(want, inputs, dout.contiguous(), retain_graph=True)
    assert torch.equal(torch.autograd.grad(want, inputs, dout)[0], grads[0])
    for change in (
        lambda t: t.transpose(0, -1).contiguous().transpose(0, -1),
        lambda t: torch.cat((t, t), -1)[..., : t.shape[-1]],
        lambda t: torch.stack((t, t), -1)[..., 0],
    ):
        strided = {
            n: t if t is None else change(t.detach()).requires_grad_() for n, t in given.items()
        }
        out = layer_norm_fn(**strided)
        torch.testing.assert_close(out, want, rtol=1e-6, atol=1e-6)
        ours = torch.autograd.grad(out, [t for t in strided.values() if t is not None], dout)
        torch.testing.assert_close(ours, grads, rtol=1e-5, atol=1e-5)


def test_dropout_follows_torchs_generator(device: str) -> None:
    x, weight = torch.ones(64, 500, device=device), torch.ones(500, device=device)
    masks = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        options = dict(dropout_p=0.3, prenorm=True, return_dropout_mask=True, x1=x)
        _, total, mask, mask1 = layer_norm_fn(x, weight, None, **options)
        assert torch.equal(total != 0, mask | mask1)
        masks.append(mask)
    assert torch.equal(masks[0], masks[1]) and not torch.equal(masks[0], masks[2])
    assert not torch.equal(mask, mask1) and not torch.equal(mask[0], mask[1])
    for kept in (mask, mask1):
        rate = kept.float().mean().item()
        assert abs(rate - 0.7) < 5 * (0.3 * 0.7 / kept.numel()) ** 0.5


def test_mask_is_philox_as_documented() -> None:
    """By Python's integers: seven rounds, the upper 24 bits of the word of the column."""

    def word(seed: int, col: int) -> int:
        c, k = [col // 4, 0, 0, 0], [seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF]
        for _ in range(7):
            low, high = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
            c = [high >> 32 ^ c[1] ^ k[0], high, low >> 32 ^ c[3] ^ k[1], low]
            c = [value & 0xFFFFFFFF for value in c]
            k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
        return c[col % 4]

    seeds = [0, 1, -1, 2**63 - 1, -(2**63), 123456789123456789]
    want = [[word(seed, col) >> 8 >= round(0.4 * 2**24) for col in range(11)] for seed in seeds]
    assert ops.keep_mask(torch.tensor(seeds), 11, 0.4).tolist() == want


def test_autocast_changes_nothing_but_the_linear_layer(device: str) -> None:
    given = make(NormCase(there="bias residual"), device)
    linear = torch.randn(7, 96, device=device)
    want = layer_norm_fn(**given)
    with torch.autocast(device, dtype=torch.bfloat16):
        ours = layer_norm_fn(**given)
        projected, total = layer_norm_linear_fn(
            *(given["x"], given["weight"], given["bias"], linear, None, given["residual"]),
            prenorm=True,
        )
        assert torch.equal(projected, F.linear(want.bfloat16(), linear.bfloat16()))
    assert torch.equal(ours, want) and total.dtype == torch.float32
    assert projected.dtype == torch.bfloat16


@pytest.mark.parametrize("rms", [False, True], ids=["layer", "rms"])
def test_linear_layer_after_the_norm(rms: bool, device: str) -> None:
    given = make(NormCase(there="bias", rms=rms), device)
    linear = nn.Linear(96, 7, device=device)
    ours = layer_norm_linear_fn(**given_names(given), **linear_names(linear), is_rms_norm=rms)
    want = linear(layer_norm_fn(**given, is_rms_norm=rms))
    assert torch.equal(ours, want)
    parameters = [*linear.parameters(), given["x"], given["weight"]]
    for a, b in zip(*(torch.autograd.grad(y.sum(), parameters) for y in (ours, want))):
        torch.testing.assert_close(a, b)


def given_names(given: dict[str, Tensor]) -> dict[str, Tensor]:
    return dict(x=given["x"], norm_weight=given["weight"], norm_bias=given["bias"])


def linear_names(linear: nn.Linear) -> dict[str, Tensor]:
    return dict(linear_weight=linear.weight, linear_bias=linear.bias)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compiled(dynamic: bool, device: str) -> None:
    def block(x: Tensor, weight: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        y, total = rms_norm_fn(2 * x, weight, None, residual, dropout_p=0.0, prenorm=True)
        return layer_norm_fn(y, weight, weight), total

    compiled = torch.compile(block, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for rows in (4, 7):
        given = make(NormCase(rows=(rows, 3), there="residual"), device)
        inputs = [given["x"], given["weight"], given["residual"]]
        results = []
        for function in (compiled, block):
            y, total = function(*inputs)
            results.append((y, total, *torch.autograd.grad((y * total).sum(), inputs)))
        torch.testing.assert_close(*results)


def test_compiled_with_dropout(device: str) -> None:
    weight = torch.ones(256, device=device)

    def block(x: Tensor) -> Tensor:
        return rms_norm_fn(x, weight, None, dropout_p=0.5, prenorm=True)[1]

    x = torch.ones(64, 256, device=device, requires_grad=True)
    total = torch.compile(block, backend="aot_eager", fullgraph=True)(x)
    total.sum().backward()
    assert torch.equal(x.grad, total) and set(total.unique().tolist()) == {0.0, 2.0}


@pytest.mark.parametrize("case", [LAYER[1], LAYER[7], LAYER[10].but(rms=True)], ids=str)
def test_operators_keep_torchs_rules(case: NormCase, device: str) -> None:
    given = {n: t if t is None else t.detach() for n, t in make(case, device).items()}
    x = given["x"].flatten(0, -2)
    residual, x1 = (given.get(n) for n in ("residual", "x1"))
    residual, x1 = (t if t is None else t.flatten(0, -2) for t in (residual, x1))
    weights = [given.get(n) for n in ("weight", "bias", "weight1", "bias1")]
    seeds = torch.randint(9, (len(x), 2), device=device) if case.dropout else None
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    options = (EPS, case.dropout, case.rms, False, True, x.dtype, torch.float32)
    inputs = (x, *weights[:2], residual, x1, *weights[2:], None, seeds, *options)
    torch.library.opcheck(ops.forward, inputs, test_utils=tests)
    y, y1, total, mean, rstd = ops.forward(*inputs)
    wants = [
        True,
        True,
        x1 is not None,
        True,
        weights[1] is not None,
        *[weights[2] is not None] * 2,
    ]
    dy1 = None if weights[2] is None else y1
    inputs = (y, dy1, total, total, weights[0], weights[2], mean, rstd, None, seeds)
    inputs += (case.dropout, case.rms, False, wants, x.dtype, x.dtype)
    torch.library.opcheck(ops.backward, inputs, test_utils=tests)


@pytest.mark.parametrize("rms", [False, True], ids=["layer", "rms"])
@pytest.mark.parametrize("there", ["", EVERYTHING, "bias rowscale"])
def test_first_and_second_derivatives(there: str, rms: bool) -> None:
    case = NormCase((2, 2), 5, there, dtypes=("fp64",) * 3, dropout=0.3 if there else 0.0, rms=rms)
    given = make(case, "cpu")
    names = [n for n in DIFFERENTIABLE if given.get(n) is not None]
    options = case.options | dict(return_dropout_mask=False)

    def function(*tensors: Tensor) -> tuple[Tensor, ...]:
        torch.manual_seed(0)
        return layer_norm_fn(**(given | dict(zip(names, tensors))), **options)

    inputs = [given[n] for n in names]
    assert gradcheck(function, inputs, check_batched_grad=True)
    assert gradgradcheck(function, inputs)


def test_transforms_of_torch_func(device: str) -> None:
    """Of rows, of weights, of both: the gradients of a loop."""
    x, weights = torch.randn(4, 3, 8, device=device), torch.randn(4, 8, device=device)

    def loss(x: Tensor, weight: Tensor) -> Tensor:
        return rms_norm_fn(x, weight, weight, residual=2 * x, prenorm=True)[0].pow(3).sum()

    for in_dims in ((0, None), (None, 0), (0, 0)):
        inputs = [t if d == 0 else t[0] for t, d in zip((x, weights), in_dims)]
        gradient = torch.func.grad(loss, argnums=(0, 1))
        compiled = torch.compile(gradient, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(x[0], weights[0]), gradient(x[0], weights[0]))
        ours = torch.func.vmap(gradient, in_dims)(*inputs)
        entries = [[t[i] if d == 0 else t for t, d in zip(inputs, in_dims)] for i in range(4)]
        want = [torch.stack(g) for g in zip(*(gradient(*entry) for entry in entries))]
        torch.testing.assert_close(list(ours), want)
        leaves = [t.clone().requires_grad_() for t in inputs]
        torch.func.vmap(loss, in_dims)(*leaves).sum().backward()
        for leaf, grad, dim in zip(leaves, want, in_dims):
            torch.testing.assert_close(leaf.grad, grad if dim == 0 else grad.sum(0))


@pytest.mark.parametrize("randomness", ["error", "same", "different"])
def test_dropout_under_vmap(randomness: str, device: str) -> None:
    x, weight = torch.ones(3, 8, 64, device=device), torch.ones(64, device=device)

    def kept(x: Tensor) -> Tensor:
        return layer_norm_fn(x, weight, None, dropout_p=0.5, prenorm=True)[1]

    mapped = torch.func.vmap(kept, randomness=randomness)
    if randomness == "error":
        with pytest.raises(RuntimeError, match="random"):
            mapped(x)
        return
    assert torch.equal(*mapped(x)[:2]) == (randomness == "same")


def test_derivative_that_does_not_exist_is_an_error(device: str) -> None:
    given = make(NormCase(), device)
    x, weight = given["x"].detach(), given["weight"].detach()

    def loss(x: Tensor) -> Tensor:
        return rms_norm_fn(x, weight, None).sum()

    with pytest.raises(RuntimeError, match="layer_norm_fwd has no derivative of its own"):
        options = (EPS, 0.0, True, False, False, torch.float32, torch.float32)
        leaf = x[0].clone().requires_grad_()
        ops.forward(leaf, weight, *[None] * 7, *options)[0].sum().backward()
    with pytest.raises(NotImplementedError, match="jvp"):
        torch.func.jvp(loss, (x,), (x,))

    def of_rowscale(scale: Tensor) -> Tensor:
        return layer_norm_fn(x, weight, None, rowscale=scale).sum()

    scale = torch.ones(3, 5, device=device)
    with pytest.raises(RuntimeError, match="rowscale gets no gradient"):
        of_rowscale(scale.clone().requires_grad_())
    with pytest.raises(RuntimeError, match="rowscale gets no gradient"):
        torch.func.grad(of_rowscale)(scale)


def test_module(device: str) -> None:
    module = RMSNorm(96, eps=EPS, device=device)
    x = torch.randn(5, 96, device=device)
    torch.testing.assert_close(module(x), F.rms_norm(x, (96,), None, EPS))
    y, total = module(x.bfloat16(), residual=x, prenorm=True)
    assert y.dtype == torch.bfloat16 and total.dtype == torch.float32
    assert module(x.bfloat16(), prenorm=True, residual_in_fp32=True)[1].dtype == torch.float32
    assert list(module.state_dict()) == ["weight"] and module.bias is None
    dropping = RMSNorm(96, EPS, dropout_p=0.5, zero_centered_weight=True, device=device)
    assert (dropping.weight == 0).all() and (dropping(x) == 0).any()
    torch.testing.assert_close(dropping.eval()(x), module(x))


X = torch.zeros(2, 3, 4)
WEIGHT = torch.ones(4)
WRONG: list[tuple[dict[str, Any], str]] = [
    (dict(x=torch.zeros(())), r"x must have shape \(..., hidden\)"),
    (dict(x=X.int()), "x must have a floating dtype; got torch.int32"),
    (dict(weight=None), "weight must be given"),
    (dict(weight=torch.ones(5)), r"weight must have \(hidden,\), \(4,\); got \(5,\)"),
    (dict(bias=torch.ones(1, 4)), r"bias must have \(hidden,\), \(4,\); got \(1, 4\)"),
    (dict(residual=X[0]), r"residual must have x's shape, \(2, 3, 4\); got \(3, 4\)"),
    (dict(x1=X.to("meta")), "x1 must be on x's device cpu; got meta"),
    (dict(bias1=WEIGHT), "bias1 is for weight1, which is None"),
    (dict(rowscale=torch.ones(2)), r"rowscale must have x's shape without hidden, \(2, 3\)"),
    (dict(rowscale=torch.ones(2, 3), x1=X), "rowscale and x1 exclude each other"),
    (dict(out=X[0]), "out must have x's shape"),
    (dict(dropout_p=1.5), r"dropout_p must be in \[0, 1\]; got 1.5"),
]


@pytest.mark.parametrize("wrong, message", WRONG, ids=[m for _, m in WRONG])
def test_wrong_argument_is_named(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        layer_norm_fn(**(dict(x=X, weight=WEIGHT, bias=None) | wrong))


def test_import_needs_neither_triton_nor_a_gpu() -> None:
    code = """
import sys
sys.modules["triton"] = None
import torch
from flash_attn.ops.triton.layer_norm import RMSNorm, layer_norm_fn, rms_norm_fn
assert RMSNorm(4, eps=0.0)(torch.full((2, 4), 3.0)).allclose(torch.ones(2, 4))
assert not torch.cuda.is_initialized()
"""
    root = str(Path(flash_attn.__file__).resolve().parents[1])
    env = os.environ | {"PYTHONPATH": root, "CUDA_VISIBLE_DEVICES": ""}
    ran = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-2000:]


needs_triton = pytest.mark.skipif(kernels.triton is None, reason="needs triton")


@pytest.mark.cuda
@needs_triton
@pytest.mark.parametrize("hidden", [4096, 8192, 16384, 32768, 40000])
def test_large_hidden_sizes(hidden: int, device: str) -> None:
    case = NormCase((700,), hidden, "bias residual", dtypes=("bf16",) * 3)
    test_values_and_gradients_are_torchs(case, device)
    test_values_and_gradients_are_torchs(case.but(there=EVERYTHING, dropout=0.1), device)


@pytest.mark.cuda
@needs_triton
def test_mask_of_the_kernel_is_that_of_the_cpu(device: str) -> None:
    x, weight = torch.ones(50, 333, device=device), torch.ones(333, device=device)
    torch.manual_seed(3)
    _, total, mask, _ = layer_norm_fn(
        x, weight, None, dropout_p=0.4, prenorm=True, return_dropout_mask=True
    )
    assert torch.equal(total != 0, mask)
    torch.manual_seed(3)
    limits = torch.iinfo(torch.int64)
    seeds = torch.randint(limits.min, limits.max, (50, 2), device=device).cpu()
    assert torch.equal(ops.keep_mask(seeds[:, 0], 333, 0.4), mask.cpu())


@pytest.mark.cuda
def test_gradients_repeat_bitwise(device: str) -> None:
    given = make(NormCase((4096,), 1024, EVERYTHING, dtypes=("bf16",) * 3), device)
    inputs = [t for t in given.values() if t is not None]
    y, y1 = layer_norm_fn(**given)
    douts = [torch.randn_like(y), torch.randn_like(y1)]
    runs = [torch.autograd.grad((y, y1), inputs, douts, retain_graph=True) for _ in range(3)]
    for run in runs[1:]:
        for a, b in zip(run, runs[0]):
            assert torch.equal(a, b)


@pytest.mark.cuda
def test_cuda_graph_draws_anew(device: str) -> None:
    weight = torch.ones(512, device=device)
    x = torch.randn(64, 512, device=device, requires_grad=True)

    def step() -> tuple[Tensor, Tensor]:
        _, total = rms_norm_fn(x, weight, None, dropout_p=0.5, prenorm=True)
        return total, torch.autograd.grad(total.sum(), x)[0]

    graph, (total, grad) = capture(step)
    masks = []
    for _ in range(2):
        graph.replay()
        assert torch.equal(total, x * grad) and set(grad.unique().tolist()) == {0.0, 2.0}
        masks.append(grad.clone())
    assert not torch.equal(*masks)


@pytest.mark.cuda
def test_offsets_beyond_32_bits(device: str) -> None:
    if torch.cuda.mem_get_info()[0] < 40 << 30:
        pytest.skip("needs 40 GiB of GPU memory")
    x = torch.zeros(530000, 4096, device=device, dtype=torch.bfloat16)  # 2.2e9 elements
    x[-300:] = torch.randn(300, 4096, device=device)
    weight = torch.randn(4096, device=device, dtype=torch.bfloat16)
    want = rms_norm_fn(x[-300:].contiguous(), weight, None)
    x.requires_grad_()
    y = rms_norm_fn(x, weight, None)
    assert torch.equal(y[-300:], want)
    (grad,) = torch.autograd.grad(y, x, torch.ones_like(y[:1]).expand_as(y))
    last = x[-300:].detach().requires_grad_()
    out = rms_norm_fn(last, weight, None)
    assert torch.equal(grad[-300:], torch.autograd.grad(out, last, torch.ones_like(out))[0])


@pytest.mark.cuda
@pytest.mark.gpus(2)
def test_tensor_on_another_device_than_the_current(device: str) -> None:
    with torch.cuda.device(0):
        test_values_and_gradients_are_torchs(NormCase(there=EVERYTHING, dropout=0.1), "cuda:1")
