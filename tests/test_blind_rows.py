"""Queries that see no key, and keys that no query sees, pass on nothing that they hold.

Queries that see one key give it the weight 1, exactly.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import (
    FEATURE_SETS,
    UNLIMITED,
    Alibi,
    AttnCase,
    Mask,
    VarlenCase,
    Window,
    everywhere,
    make_dlse,
    make_inputs,
    make_varlen_inputs,
    on_devices,
)
from harness import assert_same_result, check_varlen, features_of, run_flash, run_varlen
from torch import Tensor

from flash_attn._head_dims import HEAD_DIMS

SHAPES: tuple[tuple[int, int, Mask, Window], ...] = (
    (200, 90, Mask.causal, UNLIMITED),  # queries 0 to 109 are blind
    (300, 129, Mask.causal, UNLIMITED),  # a whole tile of them
    (129, 128, Mask.causal, UNLIMITED),
    (130, 2, Mask.none, (-1, 9)),
    (203, 70, Mask.none, (20, 7)),
    (270, 150, Mask.none, (40, 40)),
    (90, 200, Mask.causal, (25, 0)),  # keys 0 to 84 are unseen
    (65, 300, Mask.none, (30, 7)),
    (1, 190, Mask.causal, (50, 0)),
    (150, 193, Mask.none, (42, 0)),
    (140, 170, Mask.causal, (0, 0)),
)


def visible(case: AttnCase) -> Tensor:
    """(sq, sk): whether the query sees the key."""
    position = torch.arange(case.seqlen_q)[:, None] + case.seqlen_k - case.seqlen_q
    distance = torch.arange(case.seqlen_k) - position
    left, right = case.window
    seen = torch.ones(case.seqlen_q, case.seqlen_k, dtype=torch.bool)
    if left >= 0:
        seen &= distance >= -left
    if right >= 0:
        seen &= distance <= right
    return seen & (distance <= 0) if case.causal else seen


def without_influence(case: AttnCase, device: str) -> tuple[Tensor, Tensor]:
    """Rows: queries that see no key, keys that no query sees."""
    seen = visible(case)
    blind, unseen = (~seen.any(dim) for dim in (1, 0))
    return blind.nonzero()[:, 0].to(device), unseen.nonzero()[:, 0].to(device)


def check_without_influence(device: str, case: AttnCase, value: float, deterministic: bool) -> None:
    x, dlse = make_inputs(case, device), make_dlse(case, device)
    blind, unseen = without_influence(case, device)
    assert len(blind) + len(unseen) > 0, f"{case} has no such row"
    options = features_of(case, device) | dict(causal=case.causal, deterministic=deterministic)
    want = run_flash(x.q, x.k, x.v, x.dout, dlse=dlse, **options)
    bad, bad_dlse = x.map(torch.clone), dlse.clone()
    bad.q[:, blind] = bad.dout[:, blind] = bad_dlse[..., blind] = value
    bad.k[:, unseen] = bad.v[:, unseen] = value
    ours = run_flash(bad.q, bad.k, bad.v, bad.dout, dlse=bad_dlse, **options)
    assert_same_result(ours, want, case, dq_bitwise=deterministic)
    assert (ours.out[:, blind] == 0).all() and (ours.dq[:, blind] == 0).all(), case
    assert (ours.lse[..., blind] == torch.inf).all(), case
    assert (ours.dk[:, unseen] == 0).all() and (ours.dv[:, unseen] == 0).all(), case


MASKED = [
    AttnCase(sq, sk, heads, d, mask, dtype, 2, window)
    for d in HEAD_DIMS
    for (sq, sk, mask, window), (heads, dtype) in zip(
        SHAPES, (((2, 2), "bf16"), ((4, 2), "fp16"), ((3, 1), "bf16")) * 4
    )
]


@on_devices(cpu=[c.but(dtype="fp32") for c in MASKED[::7]], cuda=MASKED)
@pytest.mark.parametrize("value", [torch.nan, torch.inf], ids=str)
@pytest.mark.parametrize("deterministic", [False, True], ids=["default", "deterministic"])
def test_rows_without_influence_pass_nothing_on(
    device: str, case: AttnCase, value: float, deterministic: bool
) -> None:
    check_without_influence(device, case, value, deterministic)


FEATURED = [
    AttnCase(sq, sk, (4, 2), d, Mask.causal, "bf16", 2, **({"window": (30, 5)} | features))
    for d in HEAD_DIMS
    for features in FEATURE_SETS
    for sq, sk in ((200, 90), (90, 200))
    if sq > sk or features.get("window", (30, 5))[0] >= 0
]


@on_devices(cpu=[c.but(dtype="fp32") for c in FEATURED[::11]], cuda=FEATURED)
def test_rows_without_influence_pass_nothing_on_in_features(device: str, case: AttnCase) -> None:
    check_without_influence(device, case, torch.nan, True)


LENGTHS = ((200, 33, 300, 0, 129), (90, 190, 129, 50, 128))
VARLEN = [
    VarlenCase(*LENGTHS, (4, 2), d, mask, "bf16", (20, 130), window, **features)
    for d in HEAD_DIMS
    for mask, window, features in (
        (Mask.causal, UNLIMITED, {}),
        (Mask.none, (25, 7), {}),
        (Mask.causal, (40, 0), dict(softcap=5.0, alibi=Alibi.per_head, dropout=0.2)),
    )
]


@on_devices(cpu=[c.but(dtype="fp32") for c in VARLEN[:3]], cuda=VARLEN)
@pytest.mark.parametrize("deterministic", [False, True], ids=["default", "deterministic"])
def test_rows_without_influence_pass_nothing_on_in_sequences(
    device: str, case: VarlenCase, deterministic: bool
) -> None:
    x = make_varlen_inputs(case, device)
    options = features_of(case, device) | dict(causal=case.causal, deterministic=deterministic)
    want = run_varlen(x, **options)
    bad = x.map(torch.clone)
    for n in range(case.batch):
        blind, unseen = without_influence(case.sequence(n), device)
        for t, rows in ((bad.q, blind), (bad.dout, blind), (bad.k, unseen), (bad.v, unseen)):
            t[rows + (x.cu_seqlens_q if rows is blind else x.cu_seqlens_k)[n]] = torch.nan
    assert bad.q[: x.cu_seqlens_q[-1]].isnan().any()
    assert_same_result(run_varlen(bad, **options), want, case, dq_bitwise=deterministic)


# Kernels by what they carry.  With p = 0.5 the factor 1 / (1 - p) is exact; with others O is rounded,
# and delta with it.
LEVELS: tuple[dict[str, Any], ...] = (
    {},
    dict(softcap=5.0),
    dict(softcap=30.0),
    dict(softcap=100.0),
    dict(alibi=Alibi.per_head),
    dict(dropout=0.5),
    dict(softcap=30.0, alibi=Alibi.per_batch, dropout=0.5),
)
ONE_KEY = [
    AttnCase(sq, sk, (4, 2), d, mask, dtype, 2, window, **features)
    for d in (*HEAD_DIMS, 59)
    for dtype in ("fp16", "bf16")
    for features in LEVELS
    for sq, sk, mask, window in (
        (255, 1, Mask.none, UNLIMITED),
        (200, 200, Mask.causal, UNLIMITED),
        (339, 65, Mask.none, (0, 0)),
    )
]


def check_one_key(case: AttnCase, dq: Tensor, dk: Tensor) -> None:
    """The weight of a row's only key is 1 whatever the scores: dq and its part of dk are 0."""
    seen = visible(case)
    alone = seen.sum(1) == 1
    assert alone.any(), f"{case} has no such row"
    of_these_only = alone[:, None].logical_or(~seen).all(0)
    for name, gradient, rows in (("dq", dq, alone), ("dk", dk, of_these_only)):
        largest = gradient[:, rows.to(gradient.device)].abs().amax() if rows.any() else 0.0
        assert largest < 1e-4, f"{name}: {float(largest)}, want 0; case {case}"


@on_devices(cpu=[*ONE_KEY[::5], *(c.but(dtype="fp32") for c in ONE_KEY[1::9])], cuda=ONE_KEY)
def test_the_only_key_of_a_row_has_weight_1(device: str, case: AttnCase) -> None:
    x = make_inputs(case, device)
    ours = run_flash(x.q, x.k, x.v, x.dout, causal=case.causal, **features_of(case, device))
    check_one_key(case, ours.dq, ours.dk)


@everywhere(
    AttnCase(255, 1, (2, 2), 32, softcap=30.0),
    AttnCase(339, 65, (2, 2), 64, window=(0, 0), softcap=30.0),
    *(VarlenCase((53, 281), (14, 1), (2, 2), 64, mask, softcap=5.0) for mask in Mask),
)
def test_the_only_key_of_a_row_has_weight_1_with_softcap(
    device: str, case: AttnCase | VarlenCase
) -> None:
    """Inputs that gave up to 0.04 instead of 0, when scores were exponentiated as they are."""
    if isinstance(case, AttnCase):
        x = make_inputs(case, device)
        ours = run_flash(x.q * 3, x.k, x.v, x.dout, causal=case.causal, **features_of(case, device))
        check_one_key(case, ours.dq, ours.dk)
        return
    y = make_varlen_inputs(case, device)
    ours = check_varlen(case, y)
    check_one_key(case.sequence(1), ours.dq[None, 53:], ours.dk[None, 14:])
