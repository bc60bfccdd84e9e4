"""Strides, alignment and overlap of the inputs never change a result."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import product

import pytest
import torch
from cases import (
    FEATURE_SETS,
    AttnCase,
    Inputs,
    Mask,
    VarlenCase,
    VarlenInputs,
    make_inputs,
    make_varlen_inputs,
    on_devices,
)
from harness import assert_nearly, assert_same_result, features_of, run_flash, run_varlen
from oracle import Result
from torch import Tensor

from flash_attn import flash_attn_func

Layout = Callable[[Tensor], Tensor]


def buffer_like(x: Tensor, *shape: int) -> Tensor:
    """NaN everywhere: what lies between the elements of a view must not be read."""
    return torch.full(shape, torch.nan, dtype=x.dtype, device=x.device)


def heads_first(x: Tensor) -> Tensor:
    """(b, h, s, d) storage."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def sequence_first(x: Tensor) -> Tensor:
    """(s, b, h, d) storage."""
    return x.transpose(0, 1).contiguous().transpose(0, 1)


def head_dim_first(x: Tensor) -> Tensor:
    """(b, s, d, h) storage: the last dimension is not contiguous."""
    return x.transpose(2, 3).contiguous().transpose(2, 3)


def misaligned_base(x: Tensor) -> Tensor:
    """Base pointer one element past a 16-byte border."""
    flat = buffer_like(x, x.numel() + 2)[1:-1]
    return flat.view(x.shape).copy_(x)


def misaligned_base_by_8_bytes(x: Tensor) -> Tensor:
    flat = buffer_like(x, x.numel() + 8)[4:-4]
    return flat.view(x.shape).copy_(x)


def odd_head_stride(x: Tensor) -> Tensor:
    return buffer_like(x, *x.shape[:3], x.shape[3] + 1)[..., :-1].copy_(x)


def odd_row_stride(x: Tensor) -> Tensor:
    b, s, h, d = x.shape
    rows = buffer_like(x, b, s, h * d + 3)
    return rows[..., : h * d].unflatten(-1, (h, d)).copy_(x)


def odd_batch_stride(x: Tensor) -> Tensor:
    b, s, h, d = x.shape
    batches = buffer_like(x, b, s * h * d + 5)
    return batches[:, : s * h * d].unflatten(-1, (s, h, d)).copy_(x)


def padded_heads(x: Tensor) -> Tensor:
    """16 elements of NaN after each head's row."""
    return buffer_like(x, *x.shape[:3], x.shape[3] + 16)[..., :-16].copy_(x)


def every_second_row(x: Tensor) -> Tensor:
    b, s, h, d = x.shape
    return buffer_like(x, b, 2 * s, h, d)[:, ::2].copy_(x)


def every_second_head(x: Tensor) -> Tensor:
    b, s, h, d = x.shape
    return buffer_like(x, b, s, 2 * h, d)[:, :, 1::2].copy_(x)


def middle_of_a_longer_sequence(x: Tensor) -> Tensor:
    b, s, h, d = x.shape
    return buffer_like(x, b, s + 200, h, d)[:, 100 : 100 + s].copy_(x)


LAYOUTS = [
    heads_first,
    sequence_first,
    head_dim_first,
    misaligned_base,
    misaligned_base_by_8_bytes,
    odd_head_stride,
    odd_row_stride,
    odd_batch_stride,
    padded_heads,
    every_second_row,
    every_second_head,
    middle_of_a_longer_sequence,
]
SHAPES = [
    AttnCase(97, 130, (4, 2), 64, Mask.causal, batch=2),
    AttnCase(97, 130, (4, 2), 128, Mask.none, "fp16", batch=2),
    AttnCase(130, 97, (2, 2), 40, Mask.causal, "fp16", batch=2),
    AttnCase(65, 65, (2, 1), 33, Mask.causal, batch=3),
    AttnCase(129, 64, (2, 1), 256, Mask.causal, batch=2),
    AttnCase(64, 129, (2, 2), 96, Mask.none, batch=2),
    AttnCase(160, 160, (2, 1), 192, Mask.causal, batch=2),
    AttnCase(50, 70, (4, 1), 32, Mask.none, "fp16", batch=2),
]
shapes = on_devices(cpu=[case.but(dtype="fp32") for case in SHAPES[:4]], cuda=SHAPES)


def assert_same(ours: Result, want: Result, device: str, case: AttnCase) -> None:
    """Bitwise on CUDA; the CPU's matrix products may sum in another order."""
    if device == "cuda":
        assert_same_result(ours, want, case, dq_bitwise=True)
        return
    for name in ("out", "lse", "dq", "dk", "dv"):
        assert_nearly(name, getattr(ours, name), getattr(want, name), case)


def compare(x: Inputs, dense: Inputs, device: str, case: AttnCase) -> None:
    options = dict(causal=case.causal, deterministic=True)
    want = run_flash(dense.q, dense.k, dense.v, dense.dout, **options)
    assert_same(run_flash(x.q, x.k, x.v, x.dout, **options), want, device, case)


@shapes
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda f: f.__name__)
def test_layout_of_all_inputs(device: str, case: AttnCase, layout: Layout) -> None:
    dense = make_inputs(case, device)
    compare(dense.map(layout), dense, device, case)


@shapes
@pytest.mark.parametrize("which", ["q", "k", "v", "dout"])
def test_layout_of_one_input(device: str, case: AttnCase, which: str) -> None:
    dense = make_inputs(case, device)
    for layout in (heads_first, misaligned_base, odd_row_stride, head_dim_first):
        x = Inputs(dense.q, dense.k, dense.v, dense.dout)
        setattr(x, which, layout(getattr(dense, which)))
        compare(x, dense, device, case)


@shapes
def test_k_and_v_have_different_strides(device: str, case: AttnCase) -> None:
    dense = make_inputs(case, device)
    for k_layout, v_layout in product(
        (heads_first, padded_heads), (odd_head_stride, sequence_first)
    ):
        x = Inputs(dense.q, k_layout(dense.k), v_layout(dense.v), dense.dout)
        compare(x, dense, device, case)


@shapes
def test_batch_expanded_with_stride_0(device: str, case: AttnCase) -> None:
    one = make_inputs(case.but(batch=1), device)
    expanded = one.map(lambda t: t.expand(3, -1, -1, -1))
    compare(expanded, expanded.map(Tensor.contiguous), device, case)


@shapes
def test_heads_expanded_with_stride_0(device: str, case: AttnCase) -> None:
    x = make_inputs(case.but(heads=(4, 1)), device)
    x.k, x.v = x.k.expand(-1, -1, 4, -1), x.v.expand(-1, -1, 4, -1)
    compare(x, x.map(Tensor.contiguous), device, case)


@shapes
def test_sequence_expanded_with_stride_0(
    device: str, case: AttnCase, request: pytest.FixtureRequest
) -> None:
    """On sm80's kernels, to which rows of stride 0 fall: others would differ in the last bits."""
    if device == "cuda":
        request.getfixturevalue("pin_isa")("sm80")
    x = make_inputs(case, device)
    x.k = x.k[:, :1].expand(-1, case.seqlen_k, -1, -1)
    x.dout = x.dout[:, :1].expand(-1, case.seqlen_q, -1, -1)
    compare(x, x.map(Tensor.contiguous), device, case)


@shapes
def test_slices_of_packed_qkv(device: str, case: AttnCase) -> None:
    case = case.but(heads=(case.heads[0],) * 2, seqlen_k=case.seqlen_q)
    dense = make_inputs(case, device)
    qkv = torch.stack([dense.q, dense.k, dense.v], dim=2)
    compare(Inputs(*qkv.unbind(2), dense.dout), dense, device, case)


@shapes
def test_gradient_of_packed_qkv(device: str, case: AttnCase) -> None:
    """The three gradients land in one packed tensor."""
    case = case.but(heads=(case.heads[0],) * 2, seqlen_k=case.seqlen_q)
    dense = make_inputs(case, device)
    qkv = torch.stack([dense.q, dense.k, dense.v], dim=2).requires_grad_()
    options = dict(causal=case.causal, deterministic=True)
    out = flash_attn_func(*qkv.unbind(2), **options)
    (dqkv,) = torch.autograd.grad(out, qkv, dense.dout)
    want = run_flash(dense.q, dense.k, dense.v, dense.dout, **options)
    ours = Result(out.detach(), want.lse, *dqkv.unbind(2))
    assert_same(ours, want, device, case)


@shapes
def test_q_k_v_are_one_tensor(device: str, case: AttnCase) -> None:
    case = case.but(heads=(2, 2), seqlen_k=case.seqlen_q)
    x = make_inputs(case, device)
    compare(
        Inputs(x.q, x.q, x.q, x.dout), Inputs(x.q, x.q.clone(), x.q.clone(), x.dout), device, case
    )


@shapes
def test_dout_expanded_from_a_sum(device: str, case: AttnCase) -> None:
    """out.sum() sends back a gradient whose strides are all 0, also in the last dimension."""
    x = make_inputs(case, device).map(Tensor.requires_grad_)
    options = dict(causal=case.causal, deterministic=True)
    flash_attn_func(x.q, x.k, x.v, **options).sum().backward()
    want = run_flash(x.q, x.k, x.v, torch.ones_like(x.q), **options)
    ours = Result(want.out, want.lse, x.q.grad, x.k.grad, x.v.grad)
    assert_same(ours, want, device, case)


# Features, and sequences in one tensor: each layout with one configuration of each.
FEATURED = [
    AttnCase(97, 130, (4, 2), d, mask, dtype, 2, **features)
    for d, mask, dtype, features in zip(
        (64, 128, 96, 256, 40, 32, 192, 104),
        (Mask.causal, Mask.none) * 4,
        ("bf16", "fp16") * 4,
        FEATURE_SETS,
    )
]
featured = on_devices(cpu=[c.but(dtype="fp32") for c in FEATURED[::3]], cuda=FEATURED)


@featured
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda f: f.__name__)
def test_layout_of_all_inputs_with_features(device: str, case: AttnCase, layout: Layout) -> None:
    dense = make_inputs(case, device)
    x = dense.map(layout)
    options = features_of(case, device) | dict(causal=case.causal, deterministic=True)
    want = run_flash(dense.q, dense.k, dense.v, dense.dout, **options)
    assert_same(run_flash(x.q, x.k, x.v, x.dout, **options), want, device, case)


def as_batch(layout: Layout) -> Layout:
    """The same layout for (total, h, d)."""

    def apply(x: Tensor) -> Tensor:
        return layout(x[None])[0]

    apply.__name__ = layout.__name__
    return apply


def columns_first(x: Tensor) -> Tensor:
    """(d, h, total) storage."""
    return x.permute(2, 1, 0).contiguous().permute(2, 1, 0)


def one_of_three(x: Tensor) -> Tensor:
    """A part of a packed (total, 3, h, d)."""
    return buffer_like(x, x.shape[0], 3, *x.shape[1:])[:, 1].copy_(x)


VARLEN_LAYOUTS = [as_batch(f) for f in LAYOUTS if f not in (sequence_first, odd_batch_stride)]
VARLEN_LAYOUTS += [columns_first, one_of_three]
LENGTHS = (33, 0, 130, 7)
VARLEN = [
    VarlenCase(LENGTHS, LENGTHS[::-1], (4, 2), 64, Mask.causal),
    VarlenCase(LENGTHS, LENGTHS, (2, 1), 128, Mask.none, "fp16", (9, 20)),
    VarlenCase(LENGTHS, LENGTHS, (2, 2), 40, Mask.causal, "fp16", **FEATURE_SETS[-1]),
    VarlenCase(LENGTHS, LENGTHS, (4, 1), 256, Mask.causal, "bf16", (0, 9), window=(20, 3)),
    VarlenCase(LENGTHS, LENGTHS, (2, 1), 33, Mask.causal),
]


@on_devices(cpu=[c.but(dtype="fp32") for c in VARLEN[::2]], cuda=VARLEN)
@pytest.mark.parametrize("layout", VARLEN_LAYOUTS, ids=lambda f: f.__name__)
def test_layout_of_all_varlen_inputs(device: str, case: VarlenCase, layout: Layout) -> None:
    dense = make_varlen_inputs(case, device)
    x: VarlenInputs = dense.map(layout)
    options = features_of(case, device) | dict(causal=case.causal, deterministic=True)
    assert_same(run_varlen(x, **options), run_varlen(dense, **options), device, case)


@on_devices(cpu=[c.but(dtype="fp32") for c in VARLEN[::2]], cuda=VARLEN)
def test_varlen_dout_expanded_from_a_sum(device: str, case: VarlenCase) -> None:
    x = make_varlen_inputs(case, device)
    options = features_of(case, device) | dict(causal=case.causal, deterministic=True)
    ones = replace(x, dout=torch.ones_like(x.dout))
    expanded = replace(x, dout=torch.ones((), dtype=x.q.dtype, device=device).expand_as(x.q))
    assert_same(run_varlen(expanded, **options), run_varlen(ones, **options), device, case)
