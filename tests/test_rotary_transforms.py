"""Derivatives of rotary embedding under torch.func, vmap and forward-mode AD: right, or an error."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from flash_attn.layers.rotary import (
    ApplyRotaryEmb,
    RotaryEmbedding,
    apply_rotary_emb,
    apply_rotary_emb_kv_,
    apply_rotary_emb_qkv_,
)

SEQLEN, HALF, HEADS = 5, 3, 2
SAMPLES = 3


def new(*shape: int, device: str) -> Tensor:
    return torch.randn(shape, device=device, dtype=torch.float64)


@dataclass(frozen=True)
class Form:
    """A function of one tensor; tables, positions and lengths are fixed where it is made."""

    name: str
    shape: tuple[int, ...]
    make: Callable[[str], Callable[[Tensor], Tensor]]

    def __str__(self) -> str:
        return self.name

    def samples(self, device: str) -> Tensor:
        return new(SAMPLES, *self.shape, device=device)


def rotation(
    function: Callable, tables: int = 2, copied: bool = False, ragged: bool = False, **options
) -> Callable[[str], Callable[[Tensor], Tensor]]:
    """copied: the function changes its argument, so that it gets a copy."""

    def make(device: str) -> Callable[[Tensor], Tensor]:
        cos_and_sin = new(tables, SEQLEN + 4, HALF, device=device).unbind()
        given = dict(options)
        if isinstance(given.get("seqlen_offsets"), tuple):
            given["seqlen_offsets"] = torch.tensor(given["seqlen_offsets"], device=device)
        if ragged:
            given["cu_seqlens"] = torch.tensor([0, 2, 2, 5], device=device).int()
            given["max_seqlen"] = 3
        return lambda x: function(x.clone() if copied else x, *cos_and_sin, **given)

    return make


DENSE = (2, SEQLEN, HEADS, 2 * HALF + 1)
RAGGED = (SEQLEN + 1, HEADS, 2 * HALF + 1)
QKV = (2, SEQLEN, 3, HEADS, 2 * HALF + 1)
PACKED = dict(copied=True)
FORMS = [
    Form("dense", DENSE, rotation(apply_rotary_emb, interleaved=True)),
    Form("offsets", DENSE, rotation(apply_rotary_emb, seqlen_offsets=(3, 1))),
    Form("ragged", RAGGED, rotation(apply_rotary_emb, ragged=True)),
    Form("inplace", DENSE, rotation(apply_rotary_emb, inplace=True, copied=True)),
    Form("ragged_inplace", RAGGED, rotation(apply_rotary_emb, ragged=True, inplace=True, **PACKED)),
    Form("qkv", QKV, rotation(apply_rotary_emb_qkv_, seqlen_offsets=2, **PACKED)),
    Form("qkv_xpos", QKV, rotation(apply_rotary_emb_qkv_, 4, seqlen_offsets=(4, 0), **PACKED)),
    Form("qkv_heads", (2, SEQLEN, 8, 6), rotation(apply_rotary_emb_qkv_, num_heads_q=4, **PACKED)),
    Form("qkv_ragged", (SEQLEN, *QKV[2:]), rotation(apply_rotary_emb_qkv_, ragged=True, **PACKED)),
    Form("kv", (2, SEQLEN, 2, 1, 6), rotation(apply_rotary_emb_kv_, interleaved=True, **PACKED)),
]
every_form = pytest.mark.parametrize("form", FORMS, ids=str)


def energy(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """A number whose gradient goes through the rotation and around it."""
    return ((x + function(x)) ** 3).sum()


def gradient(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """By autograd, without transforms."""
    x = x.detach().requires_grad_()
    (grad,) = torch.autograd.grad(energy(function, x), x)
    return grad


def jacobian(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Of a linear function: column by column."""
    columns = [function(e.view_as(x)) for e in torch.eye(x.numel(), device=x.device).to(x.dtype)]
    return torch.stack(columns, -1).view(*function(x).shape, *x.shape)


close = partial(torch.testing.assert_close, rtol=1e-12, atol=1e-12)


@every_form
def test_gradients_under_transforms(form: Form, device: str) -> None:
    function, x = form.make(device), form.samples(device)
    want = torch.stack([gradient(function, sample) for sample in x])
    close(torch.func.grad(partial(energy, function))(x[0]), want[0])
    value, pull = torch.func.vjp(function, x[0])
    dout = torch.randn_like(value)
    sample = x[0].clone().requires_grad_()
    close(pull(dout)[0], torch.autograd.grad(function(sample), sample, dout)[0])
    close(torch.vmap(torch.func.grad(partial(energy, function)))(x), want)

    def total(samples: Tensor) -> Tensor:
        return torch.vmap(partial(energy, function))(samples).sum()

    close(torch.func.grad(total)(x), want)
    leaf = x.clone().requires_grad_()
    close(torch.autograd.grad(total(leaf), leaf)[0], want)


@every_form
@pytest.mark.parametrize("in_dim", [0, 1, -1])
def test_vmap_is_a_loop(form: Form, in_dim: int, device: str) -> None:
    function, x = form.make(device), form.samples(device)
    want = torch.stack([function(sample) for sample in x])
    assert torch.equal(torch.vmap(function, in_dims=in_dim)(x.movedim(0, in_dim)), want)
    twice = torch.vmap(torch.vmap(function), in_dims=1)(torch.stack((x, 2 * x), 1))
    close(twice, torch.stack((want, 2 * want)))


@every_form
def test_jacobians(form: Form, device: str) -> None:
    function, x = form.make(device), form.samples(device)[0]
    want = jacobian(function, x)
    close(torch.func.jacrev(function)(x), want)
    close(torch.func.jacfwd(function)(x), want)
    leaf = x.clone().requires_grad_()
    rows = torch.eye(want[..., 0, 0, 0].numel() * 0 + function(x).numel(), device=device).to(
        x.dtype
    )
    (batched,) = torch.autograd.grad(
        function(leaf), leaf, rows.view(-1, *function(x).shape), is_grads_batched=True
    )
    close(batched, want.view(-1, *x.shape))


@every_form
def test_second_derivatives(form: Form, device: str) -> None:
    function, x = form.make(device), form.samples(device)[0]
    small = x[:, :2] if form.name == "dense" else x
    direction = torch.randn_like(small)
    grad = torch.func.grad(partial(energy, function))
    leaf = small.clone().requires_grad_()
    (first,) = torch.autograd.grad(energy(function, leaf), leaf, create_graph=True)
    (want,) = torch.autograd.grad(first, leaf, direction)
    close(torch.func.vjp(grad, small)[1](direction)[0], want)
    close(torch.func.jvp(grad, (small,), (direction,))[1], want)  # the Hessian is symmetric


@every_form
def test_tangents(form: Form, device: str) -> None:
    function, x = form.make(device), form.samples(device)
    x, dx = x[0], x[1]
    want = function(x), function(dx)
    for ours, expected in zip(torch.func.jvp(function, (x,), (dx,)), want):
        close(ours, expected)
    with forward_ad.dual_level():
        out = forward_ad.unpack_dual(function(forward_ad.make_dual(x, dx)))
        close(out.primal, want[0])
        close(out.tangent, want[1])


def test_inplace_on_a_mapped_tensor_changes_it(device: str) -> None:
    cos, sin = new(2, SEQLEN, HALF, device=device).unbind()
    x = new(SAMPLES, *DENSE, device=device)
    want = apply_rotary_emb(x.flatten(0, 1), cos, sin).view_as(x)
    ours = x.clone()
    out = torch.vmap(lambda t: apply_rotary_emb(t, cos, sin, inplace=True))(ours)
    assert torch.equal(out, want) and torch.equal(ours, want)
    qkv = new(SAMPLES, *QKV, device=device)
    want = apply_rotary_emb_qkv_(qkv.clone().flatten(0, 1), cos, sin).view_as(qkv)
    out = torch.vmap(lambda t: apply_rotary_emb_qkv_(t, cos, sin))(qkv)
    assert torch.equal(out, want) and torch.equal(qkv, want)


def test_mapped_tables_positions_and_lengths(device: str) -> None:
    """Whatever of the arguments is mapped, each entry has its own."""
    x = new(SAMPLES, *DENSE, device=device)
    cos, sin = new(2, SAMPLES, SEQLEN + 4, HALF, device=device).unbind()
    offsets = torch.tensor([[0, 1], [4, 2], [3, 3]], device=device)
    close(
        torch.vmap(apply_rotary_emb)(x, cos, sin),
        torch.stack([apply_rotary_emb(*row) for row in zip(x, cos, sin)]),
    )
    close(
        torch.vmap(apply_rotary_emb, in_dims=(None, 0, 0))(x[0], cos, sin),
        torch.stack([apply_rotary_emb(x[0], *row) for row in zip(cos, sin)]),
    )

    def rotated(x: Tensor, offsets: Tensor) -> Tensor:
        return apply_rotary_emb(x, cos[0], sin[0], seqlen_offsets=offsets)

    # Reading what a mapped tensor holds is for the rule: it sees each entry or all of them.
    want = torch.stack([rotated(*row) for row in zip(x, offsets)])
    close(torch.vmap(rotated)(x, offsets), want)
    close(torch.vmap(rotated, in_dims=(0, 1))(x, offsets.T), want)
    want = torch.stack([rotated(x[0], row) for row in offsets])
    close(torch.vmap(rotated, in_dims=(None, 0))(x[0], offsets), want)
    ragged = new(SAMPLES, *RAGGED, device=device)
    lengths = torch.tensor([[0, 2, 6], [0, 5, 5], [0, 0, 3]], device=device).int()

    def rotated_ragged(x: Tensor, lengths: Tensor) -> Tensor:
        return apply_rotary_emb(x, cos[0], sin[0], cu_seqlens=lengths, max_seqlen=5)

    want = torch.stack([rotated_ragged(*row) for row in zip(ragged, lengths)])
    close(torch.vmap(rotated_ragged)(ragged, lengths), want)


def test_inplace_on_a_tensor_that_is_not_mapped_raises(device: str) -> None:
    x = new(*DENSE, device=device)
    tables = new(2, SAMPLES, SEQLEN, HALF, device=device).unbind()
    with pytest.raises(RuntimeError, match="x: in place, vmap cannot"):
        torch.vmap(lambda cos, sin: apply_rotary_emb(x, cos, sin, inplace=True))(*tables)


TABLE_DERIVATIVES = {
    "grad": lambda f, cos: torch.func.grad(lambda c: f(c).sum())(cos),
    "vjp": lambda f, cos: torch.func.vjp(f, cos)[1](f(cos)),
    "vmap of grad": lambda f, cos: torch.vmap(torch.func.grad(lambda c: f(c).sum()))(cos[None]),
    "grad of vmap": lambda f, cos: torch.func.grad(lambda c: torch.vmap(f)(c).sum())(cos[None]),
    "jvp": lambda f, cos: torch.func.jvp(f, (cos,), (cos,)),
    "autograd": lambda f, cos: f(cos.clone().requires_grad_()),
}


@pytest.mark.parametrize("name", TABLE_DERIVATIVES)
@pytest.mark.parametrize("packed", [False, True], ids=["", "packed"])
def test_derivative_of_tables_raises(name: str, packed: bool, device: str) -> None:
    """Never a missing gradient: the error says how to get one or to do without."""
    x = new(*(QKV if packed else DENSE), device=device)
    cos, sin = new(2, SEQLEN, HALF, device=device).unbind()

    def rotated(cos: Tensor) -> Tensor:
        given = x + 0 * cos.sum()  # mapped where cos is
        if packed:
            return apply_rotary_emb_qkv_(given, cos, sin)
        return apply_rotary_emb(given, cos, sin)

    with pytest.raises(RuntimeError, match=r"apply_rotary_emb.*: cos and sin get no .*detach"):
        TABLE_DERIVATIVES[name](rotated, cos)


def test_tables_that_require_grad_serve_where_none_is_asked_for(device: str) -> None:
    x = new(*DENSE, device=device)
    cos, sin = (torch.nn.Parameter(t) for t in new(2, SEQLEN, HALF, device=device))
    with torch.no_grad():
        want = apply_rotary_emb(x, cos, sin)
    leaf = x.clone().requires_grad_()
    out = ApplyRotaryEmb.apply(leaf, cos.detach(), sin.detach(), False, False, 0, None, None)
    assert torch.equal(out, want) and out.requires_grad
    before = x.clone()
    with pytest.raises(RuntimeError, match="detach"):
        apply_rotary_emb(x, cos, sin, inplace=True)
    assert torch.equal(x, before)


def test_module_under_transforms(device: str) -> None:
    """Per-sample gradients through RotaryEmbedding, whose tables come from the first call."""
    module = RotaryEmbedding(2 * HALF, scale_base=16.0, device=device)
    x = new(SAMPLES, *QKV, device=device)

    def function(qkv: Tensor) -> Tensor:
        return module(qkv.clone())

    ours = torch.vmap(torch.func.grad(partial(energy, function)))(x)
    close(ours, torch.stack([gradient(function, sample) for sample in x]))
