"""Rotary embedding against complex numbers in fp64: torch on the CPU, the Triton kernel on CUDA."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import DTYPES
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

import flash_attn.ops.triton.rotary as kernel
from flash_attn.layers import rotary
from flash_attn.layers.rotary import (
    RotaryEmbedding,
    apply_rotary_emb,
    apply_rotary_emb_kv_,
    apply_rotary_emb_qkv_,
    apply_rotary_emb_torch,
    rotate_half,
)
from flash_attn.ops.triton.rotary import apply_rotary

TABLE = 90


@dataclass(frozen=True)
class RotaryCase:
    """lengths: a ragged tensor's sequences, and rows beyond them; offsets: one, or one for each."""

    batch: int = 2
    seqlen: int = 37
    heads: int = 5
    head_dim: int = 64
    rotary_dim: int = 64
    offsets: int | tuple[int, ...] = 0
    lengths: tuple[int, ...] | None = None
    extra: int = 0
    interleaved: bool = False
    conjugate: bool = False
    dtype: str = "fp32"
    tables: str | None = None

    def __str__(self) -> str:
        rows = f"b{self.batch}-s{self.seqlen}" if self.lengths is None else f"r{self.lengths}"
        marks = "-interleaved" * self.interleaved + "-conjugate" * self.conjugate
        dims = f"h{self.heads}-d{self.head_dim}-r{self.rotary_dim}"
        dtype = self.dtype if self.tables is None else f"{self.dtype}-{self.tables}"
        return f"{rows}-{dims}-o{self.offsets}{marks}-{dtype}".replace(" ", "")

    def but(self, **changes: Any) -> RotaryCase:
        return replace(self, **changes)

    @property
    def shape(self) -> tuple[int, ...]:
        if self.lengths is None:
            return self.batch, self.seqlen, self.heads, self.head_dim
        return sum(self.lengths) + self.extra, self.heads, self.head_dim

    def positions(self) -> Tensor:
        """Of every row: (batch, seqlen) or (total,); -1 where a row is no token."""
        if self.lengths is None:
            starts = (
                self.offsets if isinstance(self.offsets, tuple) else (self.offsets,) * self.batch
            )
            return torch.tensor([[o + i for i in range(self.seqlen)] for o in starts]).long()
        starts = self.offsets
        if isinstance(starts, int):
            starts = (starts,) * len(self.lengths)
        tokens = [o + i for o, n in zip(starts, self.lengths) for i in range(n)]
        return torch.tensor(tokens + [-1] * self.extra).long()


@dataclass
class Inputs:
    x: Tensor
    cos: Tensor
    sin: Tensor
    options: dict[str, Any]


def make(case: RotaryCase, device: str) -> Inputs:
    gen = torch.Generator().manual_seed(len(str(case)))
    x = torch.randn(case.shape, generator=gen, dtype=torch.float64)
    angles = 7 * torch.rand(TABLE, case.rotary_dim // 2, generator=gen, dtype=torch.float64)
    dtype = DTYPES[case.tables or case.dtype]
    options: dict[str, Any] = dict(interleaved=case.interleaved)
    if isinstance(case.offsets, tuple):
        options["seqlen_offsets"] = torch.tensor(case.offsets, device=device)
    else:
        options["seqlen_offsets"] = case.offsets
    if case.lengths is not None:
        begins = torch.tensor([0, *case.lengths]).cumsum(0)
        options["cu_seqlens"] = begins.int().to(device)
        options["max_seqlen"] = max(case.lengths, default=0)
    cos, sin = (t.to(dtype).to(device) for t in (angles.cos(), angles.sin()))
    return Inputs(x.to(DTYPES[case.dtype]).to(device), cos, sin, options)


def oracle(case: RotaryCase, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Pairs of dimensions are complex numbers, in fp64; each is multiplied by cos + i sin."""
    positions = case.positions()
    unit = torch.complex(cos.cpu().double(), sin.cpu().double())
    if case.conjugate:
        unit = unit.conj()
    turn = torch.where((positions >= 0)[..., None], unit[positions], 1.0)[..., None, :]
    wide = x.cpu().double()
    rotated, rest = wide[..., : case.rotary_dim], wide[..., case.rotary_dim :]
    if case.interleaved:
        pairs = torch.view_as_complex(rotated.unflatten(-1, (-1, 2)).contiguous())
        out = torch.view_as_real(pairs * turn).flatten(-2)
    else:
        a, b = rotated.chunk(2, -1)
        out = torch.complex(a.contiguous(), b.contiguous()) * turn
        out = torch.cat((out.real, out.imag), -1)
    return torch.cat((out, rest), -1)


def assert_one_rounding(ours: Tensor, want: Tensor, dtype: torch.dtype) -> None:
    """Equal up to one rounding to dtype, after arithmetic in fp32 (fp64 for fp64)."""
    assert ours.dtype == dtype and ours.shape == want.shape
    inner = 4e-15 if dtype == torch.float64 else 2e-6
    torch.testing.assert_close(
        ours.cpu().double(), want, rtol=0.51 * torch.finfo(dtype).eps, atol=inner
    )


BASE = RotaryCase()
RAGGED = RotaryCase(lengths=(13, 0, 1, 40), extra=6)
SHAPES = [
    BASE,
    BASE.but(head_dim=40, rotary_dim=24),
    BASE.but(head_dim=33, rotary_dim=2, heads=1),
    BASE.but(head_dim=128, rotary_dim=96, heads=9, seqlen=1),
    BASE.but(head_dim=256, rotary_dim=256, heads=3, seqlen=20),
    BASE.but(offsets=11),
    BASE.but(offsets=(0, 53), conjugate=True),
    RAGGED,
    RAGGED.but(offsets=5, extra=0, rotary_dim=32, conjugate=True),
    RAGGED.but(offsets=(7, 0, 89, 50), heads=1, extra=150),
    RAGGED.but(lengths=(0, 0), extra=3),
    BASE.but(seqlen=0),
    BASE.but(heads=0),
    BASE.but(rotary_dim=0),
]
CASES = [shape.but(interleaved=i) for shape, i in product(SHAPES, (False, True))]
CASES += [BASE.but(dtype=d, interleaved=i) for d in ("bf16", "fp16", "fp64") for i in (False, True)]
CASES += [BASE.but(dtype="bf16", tables="fp32"), BASE.but(dtype="fp32", tables="bf16")]
CASES += [RAGGED.but(dtype="bf16"), RAGGED.but(dtype="fp64", interleaved=True)]
every_case = pytest.mark.parametrize("case", CASES, ids=str)


@every_case
@pytest.mark.parametrize("inplace", [False, True], ids=["", "inplace"])
def test_rotates_as_complex_numbers_do(case: RotaryCase, inplace: bool, device: str) -> None:
    given = make(case, device)
    before = given.x.clone()
    want = oracle(case, given.x, given.cos, given.sin)
    out = apply_rotary(
        given.x, given.cos, given.sin, **given.options, inplace=inplace, conjugate=case.conjugate
    )
    assert_one_rounding(out, want, DTYPES[case.dtype])
    assert (out is given.x) == inplace
    assert inplace or torch.equal(given.x, before)
    rest = slice(case.rotary_dim, None)
    assert torch.equal(out[..., rest], before[..., rest])


@pytest.mark.parametrize("case", [BASE, RAGGED.but(interleaved=True)], ids=str)
@pytest.mark.parametrize("inplace", [False, True], ids=["", "inplace"])
def test_any_strides(case: RotaryCase, inplace: bool, device: str) -> None:
    given = make(case, device)
    want = apply_rotary(given.x, given.cos, given.sin, **given.options)
    cos = torch.stack((given.cos, given.cos), -1)[..., 0]
    wide = torch.empty((*case.shape[:-1], 2 * case.head_dim + 3), device=device)
    layouts = [
        lambda x: x.transpose(-1, -2).contiguous().transpose(-1, -2),
        lambda x: x.transpose(0, -2).contiguous().transpose(0, -2),
        lambda x: wide[..., 1 : case.head_dim + 1].copy_(x),
        lambda x: wide[..., 1 : 2 * case.head_dim + 1 : 2].copy_(x),
    ]
    for layout in layouts:
        x = layout(given.x)
        out = apply_rotary(x, cos, given.sin, **given.options, inplace=inplace)
        torch.testing.assert_close(out, want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("case", [BASE, RAGGED], ids=str)
def test_memory_around_stays(case: RotaryCase, device: str) -> None:
    """In place, nothing but the rotated dimensions of the tokens changes."""
    case = case.but(rotary_dim=32)
    given = make(case, device)
    around = torch.full((*case.shape[:-1], 3 * case.head_dim), torch.nan, device=device)
    x = around[..., case.head_dim : 2 * case.head_dim].copy_(given.x)
    apply_rotary(x, given.cos, given.sin, **given.options, inplace=True)
    assert_one_rounding(x, oracle(case, given.x, given.cos, given.sin), torch.float32)
    around[..., case.head_dim : 2 * case.head_dim] = torch.nan
    assert around.isnan().all()


@pytest.mark.parametrize("max_seqlen", [None, 1, 3, 1000], ids=str)
@pytest.mark.parametrize("inplace", [False, True], ids=["", "inplace"])
def test_max_seqlen_only_divides_the_work(max_seqlen: int, inplace: bool, device: str) -> None:
    case = RAGGED.but(lengths=(3, 80, 0, 33), extra=70)
    given = make(case, device)
    given.options["max_seqlen"] = max_seqlen
    want = oracle(case, given.x, given.cos, given.sin)
    out = apply_rotary(given.x, given.cos, given.sin, **given.options, inplace=inplace)
    assert_one_rounding(out, want, torch.float32)


@pytest.mark.parametrize(
    "case",
    [
        RotaryCase(2, 3, 2, 6, 4),
        RotaryCase(2, 3, 2, 6, 4, offsets=(4, 1), interleaved=True),
        RotaryCase(1, 2, 2, 4, 4, offsets=2, interleaved=True),
        RotaryCase(heads=2, head_dim=6, rotary_dim=4, lengths=(2, 0, 3), extra=1),
    ],
    ids=str,
)
@pytest.mark.parametrize("inplace", [False, True], ids=["", "inplace"])
def test_gradient(case: RotaryCase, inplace: bool) -> None:
    given = make(case.but(dtype="fp64"), "cpu")

    def rotate(x: Tensor) -> Tensor:
        return apply_rotary_emb(x.clone(), given.cos, given.sin, inplace=inplace, **given.options)

    x = given.x.requires_grad_()
    assert gradcheck(rotate, x)
    assert gradgradcheck(rotate, x)


@every_case
def test_gradient_is_the_rotation_back(case: RotaryCase, device: str) -> None:
    given = make(case, device)
    dout = torch.randn_like(given.x)
    x = given.x.requires_grad_()
    out = apply_rotary_emb(x, given.cos, given.sin, **given.options)
    kept = dout.clone()
    out.backward(dout)
    assert torch.equal(dout, kept), "the gradient that arrives is not ours to change"
    back = case.but(conjugate=True)
    assert_one_rounding(x.grad, oracle(back, dout, given.cos, given.sin), x.dtype)


def test_only_x_gets_a_gradient_and_no_grad_records_nothing(device: str) -> None:
    given = make(BASE, device)
    x = given.x.requires_grad_()
    with torch.no_grad():
        assert not apply_rotary_emb(x, given.cos, given.sin).requires_grad
    assert not apply_rotary(x, given.cos, given.sin).requires_grad
    assert apply_rotary_emb(x, given.cos, given.sin).requires_grad


def test_inplace_in_a_graph(device: str) -> None:
    """In place on a view of a result: the rest of the tensor keeps its own gradient."""
    given = make(BASE.but(heads=6), device)
    x = given.x.requires_grad_()
    y = 2 * x
    rotated = apply_rotary_emb(y[:, :, :4], given.cos, given.sin, inplace=True)
    y.square().sum().backward()
    assert rotated.shape[2] == 4
    torch.testing.assert_close(x.grad, 8 * x.detach(), rtol=1e-5, atol=1e-5)  # lengths stay


def test_aliases_and_functions_agree() -> None:
    assert rotary.apply_rotary_emb_func is apply_rotary_emb
    given = make(BASE.but(dtype="fp64", rotary_dim=24), "cpu")
    for interleaved in (False, True):
        want = apply_rotary_emb(given.x, given.cos, given.sin, interleaved)
        cos, sin = given.cos[: BASE.seqlen], given.sin[: BASE.seqlen]
        ours = apply_rotary_emb_torch(given.x, cos, sin, interleaved)
        torch.testing.assert_close(ours, want, rtol=1e-14, atol=1e-14)
        ours = apply_rotary_emb_torch(given.x, cos.expand(2, -1, -1), sin, interleaved)
        torch.testing.assert_close(ours, want, rtol=1e-14, atol=1e-14)
        direct = rotary.ApplyRotaryEmb.apply(
            given.x, given.cos, given.sin, interleaved, False, 0, None, None
        )
        assert torch.equal(direct, want)
    assert rotate_half(torch.arange(4)).tolist() == [-2, -3, 0, 1]
    assert rotate_half(torch.arange(4), True).tolist() == [-1, 0, -3, 2]


def test_tables_may_have_gradients_in_the_torch_form() -> None:
    x = torch.randn(1, 3, 1, 4, dtype=torch.float64, requires_grad=True)
    cos = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    sin = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    for interleaved in (False, True):
        assert gradcheck(lambda *t, i=interleaved: apply_rotary_emb_torch(*t, i), (x, cos, sin))


# How twelve heads lie in qkv, and how many of them are queries, keys, values.
QKV = {
    "packed": (lambda t: t.unflatten(-2, (3, 4)), (4, 4, 4)),
    "strided": (
        lambda t: t.unflatten(-2, (3, 4)).transpose(-3, -2).contiguous().transpose(-3, -2),
        (4, 4, 4),
    ),
    "grouped": (lambda t: t, (6, 3, 3)),
}


@pytest.mark.parametrize("layout", QKV)
@pytest.mark.parametrize("own_k", [False, True], ids=["", "xpos"])
@pytest.mark.parametrize("ragged", [False, True], ids=["dense", "ragged"])
def test_qkv(layout: str, own_k: bool, ragged: bool, device: str) -> None:
    case = RAGGED.but(heads=12) if ragged else BASE.but(heads=12, offsets=(3, 9))
    pack, groups = QKV[layout]
    given = make(case, device)
    tables = given.cos, given.sin
    tables_k = tuple(torch.randn(2, *given.cos.shape, device=device)) if own_k else tables
    base = given.x.requires_grad_()
    qkv = pack(base) * 1
    options = given.options | dict(num_heads_q=groups[0] if layout == "grouped" else None)
    out = apply_rotary_emb_qkv_(qkv, *tables, *(tables_k if own_k else ()), **options)
    assert out.data_ptr() == qkv.data_ptr()

    def want(heads: Tensor, case: RotaryCase) -> Tensor:
        q, k, v = heads.split(groups, -2)
        return torch.cat(
            (oracle(case, q, *tables), oracle(case, k, *tables_k), v.cpu().double()), -2
        )

    ours = out.detach().reshape(case.shape)
    torch.testing.assert_close(ours.cpu().double(), want(base.detach(), case), rtol=1e-5, atol=1e-5)
    dout = torch.randn_like(ours)
    out.backward(dout.view(out.shape))
    back = want(dout, case.but(conjugate=True))
    torch.testing.assert_close(base.grad.cpu().double(), back, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", [BASE.but(offsets=2), RAGGED.but(interleaved=True)], ids=str)
def test_kv(case: RotaryCase, device: str) -> None:
    given = make(case, device)
    base = torch.randn(*case.shape[:-2], 2, *case.shape[-2:], device=device, requires_grad=True)
    kv = base * 1
    out = apply_rotary_emb_kv_(kv, given.cos, given.sin, **given.options)
    assert out.data_ptr() == kv.data_ptr()
    k, v = out.detach().unbind(-3)
    assert_one_rounding(k, oracle(case, base.detach()[..., 0, :, :], given.cos, given.sin), k.dtype)
    assert torch.equal(v, base.detach()[..., 1, :, :])
    dout = torch.randn_like(out)
    out.backward(dout)
    dk, dv = base.grad.unbind(-3)
    back = case.but(conjugate=True)
    assert_one_rounding(dk, oracle(back, dout[..., 0, :, :], given.cos, given.sin), dk.dtype)
    assert torch.equal(dv, dout[..., 1, :, :])


def test_packed_gradients_have_gradients() -> None:
    tables = torch.randn(4, 9, 2, dtype=torch.float64)
    qkv = torch.randn(2, 3, 3, 2, 6, dtype=torch.float64, requires_grad=True)
    kv = torch.randn(2, 3, 2, 2, 6, dtype=torch.float64, requires_grad=True)
    offsets = torch.tensor([1, 5])
    for function, x in (
        (lambda t: apply_rotary_emb_qkv_(t.clone(), *tables, False, offsets), qkv),
        (lambda t: apply_rotary_emb_qkv_(t.clone(), *tables[:2]), qkv),
        (lambda t: apply_rotary_emb_qkv_(t.flatten(2, 3).clone(), *tables, num_heads_q=4), qkv),
        (lambda t: apply_rotary_emb_kv_(t.clone(), *tables[:2], True), kv),
    ):
        assert gradcheck(function, x)
        assert gradgradcheck(function, x)


ERRORS = {
    "x dim": (dict(x=torch.zeros(3, 2, 8)), "x must have shape"),
    "x ragged dim": (dict(cu_seqlens=torch.tensor([0, 3]).int()), "x must have shape"),
    "cos dim": (dict(cos=torch.zeros(1, 9, 4), sin=torch.zeros(1, 9, 4)), "one shape"),
    "cos sin": (dict(cos=torch.zeros(9, 3)), "one shape"),
    "too many": (dict(cos=torch.zeros(9, 5), sin=torch.zeros(9, 5)), "at most x's head_dim"),
    "head_dim": (dict(x=torch.zeros(1, 3, 2, 264)), "head_dim must be at most 256"),
    "integers": (dict(x=torch.zeros(1, 3, 2, 8).int()), "floating"),
    "short": (dict(x=torch.zeros(1, 10, 2, 8)), "too short"),
    "offset": (dict(seqlen_offsets=7), "seqlen_offsets"),
    "negative": (dict(seqlen_offsets=-1), "negative"),
    "offsets": (dict(seqlen_offsets=torch.tensor([7])), "outside cos and sin"),
    "offsets negative": (dict(seqlen_offsets=torch.tensor([-1])), "outside cos and sin"),
    "offsets shape": (dict(seqlen_offsets=torch.tensor([1, 2])), r"\(batch,\)"),
    "offsets dtype": (dict(seqlen_offsets=torch.tensor([1.0])), "int32 or int64"),
    "offsets kind": (dict(seqlen_offsets=1.5), "integer"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_bad_input_raises(name: str) -> None:
    changes, message = ERRORS[name]
    given = dict(x=torch.zeros(1, 3, 2, 8), cos=torch.zeros(9, 4), sin=torch.zeros(9, 4))
    with pytest.raises(RuntimeError, match=message):
        apply_rotary_emb(**(given | changes))


@pytest.mark.parametrize(
    ("cu_seqlens", "message"),
    [
        ([0, 3, 2, 6], "never decrease"),
        ([1, 3, 6], "begin with 0"),
        ([0, 3, 7], "end within x"),
        ([0, 6], "outside cos and sin"),
    ],
    ids=str,
)
def test_bad_cu_seqlens_raise(
    cu_seqlens: list[int], message: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLASH_ATTN_CHECK_DEVICE_DATA", "1")
    x = torch.zeros(6, 2, 8, device=device)
    table = torch.zeros(5, 4, device=device)
    lengths = torch.tensor(cu_seqlens, device=device).int()
    with pytest.raises(RuntimeError, match=message):
        apply_rotary_emb(x, table, table, cu_seqlens=lengths, max_seqlen=6)
    for wrong in (lengths.long(), lengths[:0]):
        with pytest.raises(RuntimeError, match="cu_seqlens must have"):
            apply_rotary_emb(x, table, table, cu_seqlens=wrong, max_seqlen=6)


def test_bad_packed_shapes_raise() -> None:
    table = torch.zeros(9, 4)
    for shape, n, message in (
        ((1, 3, 2, 2, 8), None, "qkv must have shape"),
        ((3, 2, 8), None, "qkv must have shape"),
        ((1, 3, 6, 8), None, "num_heads_q must be given"),
        ((1, 3, 6, 8), 3, "2 \\* num_heads_k"),
        ((1, 3, 6, 8), 6, "2 \\* num_heads_k"),
    ):
        with pytest.raises(RuntimeError, match=message):
            apply_rotary_emb_qkv_(torch.zeros(shape), table, table, num_heads_q=n)
    with pytest.raises(RuntimeError, match="kv must have shape"):
        apply_rotary_emb_kv_(torch.zeros(1, 3, 3, 2, 8), table, table)


def formula(dim: int, seqlen: int, base: float = 10000.0) -> tuple[Tensor, Tensor]:
    """cos and sin of p * base ** (-2 i / dim) in fp64."""
    angles = torch.arange(seqlen).double()[:, None] * base ** (
        -torch.arange(0, dim, 2).double() / dim
    )
    return angles.cos(), angles.sin()


@pytest.mark.parametrize("interleaved", [False, True], ids=["", "interleaved"])
@pytest.mark.parametrize("grouped", [False, True], ids=["", "grouped"])
@pytest.mark.parametrize("offsets", [0, 6, (3, 40)], ids=str)
def test_module(interleaved: bool, grouped: bool, offsets: Any, device: str) -> None:
    module = RotaryEmbedding(32, base=500.0, interleaved=interleaved, device=device)
    assert not module.state_dict() and not list(module.parameters())
    case = BASE.but(heads=4, rotary_dim=32, interleaved=interleaved, offsets=offsets)
    cos, sin = formula(32, TABLE, 500.0)
    x = torch.randn(2, 37, 3, 4, 64, device=device)
    want = [oracle(case, t, cos, sin) for t in x.unbind(2)[:2]] + [x[:, :, 2].cpu().double()]
    offset = torch.tensor(offsets, device=device) if isinstance(offsets, tuple) else offsets
    if grouped:
        out = module(x.flatten(2, 3).clone(), seqlen_offset=offset, num_heads_q=4).unflatten(
            2, (3, 4)
        )
    else:
        out = module(x.clone(), seqlen_offset=offset)
    torch.testing.assert_close(out.cpu().double(), torch.stack(want, 2), rtol=1e-4, atol=2e-4)
    q, kv = module(x[:, :30, 0].clone(), x[:, :, 1:].clone(), offset, max_seqlen=TABLE)
    torch.testing.assert_close(q, out[:, :30, 0])
    torch.testing.assert_close(kv, out[:, :, 1:])
    ragged = torch.tensor([0, 37], device=device).int()
    want = module(x[:1].clone())[0]
    ours = module(x[0].clone(), max_seqlen=37, cu_seqlens=ragged)
    torch.testing.assert_close(ours, want)
    both = module(
        x[0, :, 0].clone(),
        x[0, :30, 1:].clone(),
        0,
        37,
        cu_seqlens=ragged,
        cu_seqlens_k=ragged - 7 * (ragged > 0).int(),
    )
    torch.testing.assert_close(both[0], want[:, 0])
    torch.testing.assert_close(both[1], want[:30, 1:])


def test_module_tables_grow_and_follow_dtype(device: str) -> None:
    module = RotaryEmbedding(16)
    for seqlen, dtype in ((5, torch.float32), (3, torch.float32), (70, torch.bfloat16)):
        x = torch.ones(1, seqlen, 3, 1, 16, device=device, dtype=dtype)
        first = module(x.clone())
        assert module._cos_cached.dtype == dtype and module._cos_cached.shape[0] >= seqlen
        assert torch.equal(module(x.clone()), first)
    assert module._cos_cached.shape == (70, 8)


@pytest.mark.parametrize("scale_base", [None, 512.0], ids=["", "xpos"])
def test_scores_depend_on_the_distance_only(scale_base: float | None, device: str) -> None:
    module = RotaryEmbedding(64, scale_base=scale_base, device=device)
    q, k = torch.randn(2, 1, 1, 1, 64, device=device, dtype=torch.float32)
    qkv = torch.stack((q, k, k), 2).expand(1, 200, 3, 1, 64).clone()
    out = module(qkv)
    scores = (out[0, :, 0, 0] @ out[0, :, 1, 0].T).cpu()
    for distance in (-150, -3, 0, 1, 70):
        line = scores.diagonal(distance)
        torch.testing.assert_close(line, line[:1].expand_as(line), rtol=1e-3, atol=1e-3)
    if scale_base is not None:
        plain = RotaryEmbedding(64, device=device)(qkv.clone() * 0 + torch.stack((q, k, k), 2))
        plain = (plain[0, :, 0, 0] @ plain[0, :, 1, 0].T).cpu()
        assert not torch.allclose(plain, scores, rtol=1e-2)


def test_xpos_scales_pairs_by_powers_of_their_own() -> None:
    """Query and key of pair i at distance n: the plain score times ((2 i + 0.4 d) / 1.4 d) ** (n / base)."""
    module = RotaryEmbedding(4, scale_base=8.0)
    out = module(torch.ones(1, 20, 3, 1, 4))[0, :, :, 0].double()
    plain = RotaryEmbedding(4)(torch.ones(1, 20, 3, 1, 4))[0, :, :, 0].double()
    for pair, scale in ((0, 1.6 / 5.6), (1, 3.6 / 5.6)):
        dims = [pair, pair + 2]
        ours, usual = ((t[15, 0, dims] * t[4, 1, dims]).sum() for t in (out, plain))
        assert abs(ours - usual * scale ** (11 / 8)) < 1e-5


@pytest.mark.parametrize("scale_base", [None, 512.0], ids=["", "xpos"])
def test_angles_of_a_16_bit_module_are_computed_in_fp32(scale_base: float | None) -> None:
    options = dict(scale_base=scale_base)
    exact = RotaryEmbedding(16, **options).bfloat16()
    rounded = RotaryEmbedding(16, **options, pos_idx_in_fp32=False).bfloat16()
    x = torch.randn(1, 3000, 3, 1, 16).bfloat16()
    want = RotaryEmbedding(16, **options)(x.clone())
    assert torch.equal(exact(x.clone()), want)
    assert not torch.equal(rounded(x.clone()), want)


def test_training_after_inference_mode() -> None:
    module = RotaryEmbedding(8)
    with torch.inference_mode():
        module(torch.randn(1, 6, 3, 1, 8))
    x = torch.randn(1, 6, 3, 1, 8, requires_grad=True)
    module(x * 1).sum().backward()
    assert x.grad is not None


def test_bad_dim_raises() -> None:
    for dim in (0, 7, -2):
        with pytest.raises(ValueError, match="dim"):
            RotaryEmbedding(dim)
    with pytest.raises(RuntimeError, match="max_seqlen"):
        RotaryEmbedding(8)(
            torch.zeros(4, 3, 1, 8), cu_seqlens=torch.tensor([0, 4], dtype=torch.int32)
        )


@pytest.mark.parametrize("interleaved", [False, True], ids=["", "interleaved"])
def test_compiles(interleaved: bool, device: str) -> None:
    torch._dynamo.reset()
    given = make(BASE, device)

    def block(x: Tensor) -> Tensor:
        return apply_rotary_emb(x * 2, given.cos, given.sin, interleaved).cos()

    results = []
    for function in (torch.compile(block, backend="aot_eager", fullgraph=True), block):
        x = given.x.clone().requires_grad_()
        out = function(x)
        out.backward(torch.ones_like(out))
        results.append((out.detach(), x.grad))
    for ours, want in zip(*results):
        torch.testing.assert_close(ours, want)


def overlapping(x: Tensor) -> dict[str, Tensor]:
    """Tensors of x's shape in which some elements share their memory."""
    strides = [*x.stride()]
    strides[-3] = x.shape[-1]  # the heads of a row are those of the next but the first
    views = {f"expanded{n}": x.narrow(n, 0, 1).expand_as(x) for n in range(x.dim())}
    return views | {"strided": x.as_strided(x.shape, strides)}


@pytest.mark.parametrize("which", ["expanded0", "expanded1", "expanded2", "expanded3", "strided"])
def test_in_place_on_a_tensor_that_overlaps_itself(which: str, device: str) -> None:
    """An error on every device, and nothing is rotated; not in place it is the rotation of a copy."""
    table = torch.rand(7, 16, device=device)
    x = overlapping(torch.randn(2, 7, 4, 32, device=device))[which]
    before = x.clone()
    for call in (apply_rotary, apply_rotary_emb):
        with pytest.raises(RuntimeError, match="^x is written to and must not overlap itself"):
            call(x, table, table, inplace=True)
        assert torch.equal(x, before)
        assert torch.equal(call(x, table, table), call(before, table, table))
    with pytest.raises(RuntimeError, match="^x is written to"):
        cu_seqlens = torch.tensor([0, 7], dtype=torch.int32, device=device)
        ragged = overlapping(torch.randn(7, 4, 32, device=device))
        which = "expanded0" if which == "expanded3" else which
        apply_rotary_emb(
            *(ragged[which], table, table), inplace=True, cu_seqlens=cu_seqlens, max_seqlen=7
        )


@pytest.mark.parametrize("which", [*(f"expanded{n}" for n in range(5)), "strided"])
def test_packed_tensor_that_overlaps_itself(which: str, device: str) -> None:
    """Also where queries, keys and values share their memory: one would be rotated twice."""
    table = torch.rand(7, 16, device=device)
    qkv, kv = (overlapping(torch.randn(2, 7, n, 4, 32, device=device))[which] for n in (3, 2))
    before = qkv.clone(), kv.clone()
    with pytest.raises(RuntimeError, match="^qkv is written to and must not overlap itself"):
        apply_rotary_emb_qkv_(qkv, table, table)
    with pytest.raises(RuntimeError, match="^kv is written to and must not overlap itself"):
        apply_rotary_emb_kv_(kv, table, table)
    assert torch.equal(qkv, before[0]) and torch.equal(kv, before[1])
    heads = overlapping(torch.randn(2, 7, 4, 32, device=device))["expanded2"]
    with pytest.raises(RuntimeError, match="^qkv is written to"):
        apply_rotary_emb_qkv_(heads, table, table, num_heads_q=2)


def test_views_that_take_turns_do_not_overlap(device: str) -> None:
    """Rotated in place as parts of one tensor; in a compiled function too."""
    table = torch.rand(7, 16, device=device)
    packed = torch.randn(2, 9, 4, 3, 40, device=device)
    for view in (packed[:, 1:8, :, 1, :32], packed[:, 1:8].transpose(2, 3)[:, :, 2, 1::2, 4:36]):
        want = apply_rotary(view, table, table)
        for dynamic in (None, True):
            torch._dynamo.reset()
            compiled = torch.compile(
                apply_rotary, backend="aot_eager", fullgraph=True, dynamic=dynamic
            )
            x = view.clone(memory_format=torch.preserve_format)
            assert torch.equal(compiled(x, table, table, inplace=True), want)
        apply_rotary(view, table, table, inplace=True)
        assert torch.equal(view, want)


def test_import_needs_neither_triton_nor_a_gpu() -> None:
    code = """
import sys
sys.modules["triton"] = None
import torch
from flash_attn.layers.rotary import apply_rotary_emb
from flash_attn.ops.triton.rotary import apply_rotary
x = torch.ones(1, 2, 1, 4)
assert apply_rotary(x, torch.ones(2, 2), torch.zeros(2, 2)).equal(x)
assert not torch.cuda.is_initialized()
"""
    root = str(Path(rotary.__file__).resolve().parents[2])
    env = os.environ | {"PYTHONPATH": root, "CUDA_VISIBLE_DEVICES": ""}
    ran = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-2000:]


needs_triton = pytest.mark.skipif(kernel.triton is None, reason="needs triton")


@pytest.mark.cuda
@needs_triton
@every_case
def test_kernel_agrees_with_torch(
    case: RotaryCase, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = make(case, device)
    options = given.options | dict(conjugate=case.conjugate)
    ours = apply_rotary(given.x, given.cos, given.sin, **options)
    monkeypatch.setattr(kernel, "triton", None)
    want = apply_rotary(given.x, given.cos, given.sin, **options)
    eps = torch.finfo(given.x.dtype).eps
    # Where x cos and x sin cancel, a fused multiply-add rounds once less than torch.
    torch.testing.assert_close(ours, want, rtol=eps, atol=4 * eps)


@pytest.mark.cuda
def test_more_sequences_and_heads_than_a_grid_axis_holds(device: str) -> None:
    table = torch.randn(8, 16, device=device)
    for shape, lengths in (
        ((70000, 2, 1, 32), None),
        ((1, 2, 70000, 32), None),
        ((140000, 1, 32), torch.arange(0, 140001, 2, device=device).int()),
    ):
        x = torch.randn(shape, device=device, dtype=torch.bfloat16)
        out = apply_rotary_emb(x, table, table, cu_seqlens=lengths, max_seqlen=2)
        small = x.view(70000, 2, 1, 32) if lengths is not None else x
        want = apply_rotary_emb_torch(small.float(), table[:2], table[:2])
        torch.testing.assert_close(out.float(), want.view(shape), rtol=1e-2, atol=1e-2)


@pytest.mark.cuda
def test_offsets_beyond_32_bits(device: str) -> None:
    if torch.cuda.mem_get_info()[0] < 12 << 30:
        pytest.skip("needs 12 GiB of GPU memory")
    stride = (1 << 32) // 64 * 64 + 64
    storage = torch.zeros(stride + 4096, device=device, dtype=torch.bfloat16)
    table = torch.randn(8, 16, device=device)
    for size, strides in (
        ((2, 3, 2, 32), (stride, 64, 32, 1)),
        ((3, 2, 1, 32), (64, stride, 32, 1)),
    ):
        x = storage.as_strided(size, strides)
        dense = torch.randn(size, device=device, dtype=torch.bfloat16)
        x.copy_(dense)
        apply_rotary(x, table, table, inplace=True)
        assert torch.equal(x, apply_rotary(dense, table, table))


@pytest.mark.cuda
def test_positions_beyond_the_tables_stay(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unchecked, such a token is not rotated, and nothing outside the tables is read."""
    monkeypatch.delenv("FLASH_ATTN_CHECK_DEVICE_DATA", raising=False)
    table = torch.full((4, 16), torch.nan, device=device)
    table[1:3] = 0.5
    x = torch.randn(2, 3, 2, 32, device=device)
    out = apply_rotary(x, table[1:3], table[1:3], torch.tensor([1, -2], device=device))
    assert torch.equal(out[0, 1:], x[0, 1:]) and torch.equal(out[1, :2], x[1, :2])
    assert out.isfinite().all() and not torch.equal(out[0, 0], x[0, 0])


@pytest.mark.cuda
@pytest.mark.gpus(2)
def test_tensor_on_another_device_than_the_current(device: str) -> None:
    given = make(BASE, "cuda:1")
    with torch.cuda.device(0):
        out = apply_rotary(given.x, given.cos, given.sin)
    assert_one_rounding(out, oracle(BASE, given.x, given.cos, given.sin), torch.float32)
