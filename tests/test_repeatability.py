"""Bitwise repeatability, and results that do not depend on what else runs in the same call."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
from cases import (
    FEATURE_SETS,
    AttnCase,
    Mask,
    VarlenCase,
    everywhere,
    make_alibi,
    make_inputs,
    make_varlen_inputs,
    on_devices,
)
from harness import (
    assert_bitwise,
    assert_nearly,
    assert_same_result,
    features_of,
    run_flash,
    run_varlen,
)

from flash_attn._head_dims import HEAD_DIMS as DIMS

REPEATED = [
    AttnCase(300, 300, (8, 8), d, mask, dtype, batch=4)
    for (d, dtype), mask in product(zip(DIMS, ("bf16", "fp16") * 3), Mask)
]
GROUPED = [AttnCase(257, 513, (12, 3), d, Mask.causal, batch=3) for d in (*DIMS, 40, 72)]
LONG = [AttnCase(2048, 2048, (4, 4), d, mask, batch=2) for d in (64, 128, 256) for mask in Mask]


@on_devices(
    cpu=[AttnCase(130, 193, (4, 2), 64, Mask.causal, "fp32")], cuda=[*REPEATED, *GROUPED, *LONG]
)
def test_deterministic_mode_repeats_bitwise(device: str, case: AttnCase) -> None:
    x = make_inputs(case, device)
    first = run_flash(x.q, x.k, x.v, x.dout, causal=case.causal, deterministic=True)
    for _ in range(50 if device == "cuda" else 5):
        again = run_flash(x.q, x.k, x.v, x.dout, causal=case.causal, deterministic=True)
        assert_same_result(again, first, case, dq_bitwise=True)


@on_devices(
    cpu=[AttnCase(130, 193, (4, 2), 64, Mask.causal, "bf16")], cuda=[*REPEATED, *GROUPED, *LONG]
)
def test_default_mode_repeats_bitwise_except_dq(device: str, case: AttnCase) -> None:
    """Also the race test: 100 runs, so that a rare wrong order shows."""
    x = make_inputs(case, device)
    first = run_flash(x.q, x.k, x.v, x.dout, causal=case.causal)
    for _ in range(100 if device == "cuda" else 3):
        again = run_flash(x.q, x.k, x.v, x.dout, causal=case.causal)
        assert_same_result(again, first, case, dq_bitwise=False)


@pytest.mark.slow
@pytest.mark.cuda
@pytest.mark.parametrize("head_dim", DIMS)
@pytest.mark.parametrize("mask", list(Mask), ids=lambda m: m.value)
def test_no_race_in_a_large_batch(device: str, head_dim: int, mask: Mask) -> None:
    case = AttnCase(239, 1024, (6, 6), head_dim, mask, batch=40)
    x = make_inputs(case, device)
    first = run_flash(x.q, x.k, x.v, x.dout, causal=case.causal)
    for _ in range(250):
        again = run_flash(x.q, x.k, x.v, x.dout, causal=case.causal)
        assert_same_result(again, first, case, dq_bitwise=False)


@on_devices(
    cpu=[AttnCase(65, 97, (4, 2), 64, mask, "fp32", batch=3) for mask in Mask],
    cuda=[
        AttnCase(sq, sk, (6, 2), d, mask, batch=3)
        for (sq, sk), d, mask in product(((150, 150), (65, 257)), DIMS, Mask)
    ],
)
def test_a_batch_gives_what_its_elements_give(device: str, case: AttnCase) -> None:
    """Batch and head invariance: each (batch, head group) alone; the same bits on CUDA."""
    x = make_inputs(case, device)
    options = dict(causal=case.causal, deterministic=True)
    whole = run_flash(x.q, x.k, x.v, x.dout, **options)
    group = case.heads[0] // case.heads[1]
    for batch, head in ((0, 0), (2, 1)):
        heads = slice(head * group, (head + 1) * group)
        part = run_flash(
            x.q[batch : batch + 1, :, heads],
            x.k[batch : batch + 1, :, head : head + 1],
            x.v[batch : batch + 1, :, head : head + 1],
            x.dout[batch : batch + 1, :, heads],
            **options,
        )
        same = assert_bitwise if device == "cuda" else assert_nearly
        for name, index in (("out", heads), ("dq", heads), ("dk", head), ("dv", head)):
            mine, alone = getattr(whole, name)[batch, :, index], getattr(part, name)[0]
            same(name, mine, alone.view_as(mine), f"{case}, batch {batch}, head {head}")


@everywhere(AttnCase(130, 130, (4, 2), 64, Mask.causal), AttnCase(130, 130, (4, 2), 128))
def test_deterministic_changes_only_the_order_of_sums(device: str, case: AttnCase) -> None:
    x = make_inputs(case, device)
    default = run_flash(x.q, x.k, x.v, x.dout, causal=case.causal)
    fixed = run_flash(x.q, x.k, x.v, x.dout, causal=case.causal, deterministic=True)
    assert_same_result(fixed, default, case, dq_bitwise=False)


# Features, on all kernels; dropout is seeded alike before each run.
FEATURED = [
    AttnCase(257, 300, (6, 2), d, mask, dtype, 3, **features)
    for (d, dtype), mask, features in product(
        zip((*DIMS, 40), ("bf16", "fp16") * 4), Mask, FEATURE_SETS
    )
]
SEQUENCES = (130, 0, 257, 64, 1, 300, 33)
VARLEN = [
    VarlenCase(SEQUENCES, SEQUENCES[::-1], (6, 2), d, mask, dtype, (9, 30), **features)
    for (d, dtype), (mask, features) in product(
        zip(DIMS, ("bf16", "fp16") * 3),
        (*product(Mask, FEATURE_SETS[1::3]), (Mask.causal, {}), (Mask.none, {})),
    )
]


def repeats(device: str, deterministic: bool) -> int:
    return 2 if device == "cpu" else 50 if deterministic else 25


@on_devices(cpu=[c.but(dtype="fp32") for c in FEATURED[::17]], cuda=FEATURED)
@pytest.mark.parametrize("deterministic", [False, True], ids=["default", "deterministic"])
def test_features_repeat_bitwise(device: str, case: AttnCase, deterministic: bool) -> None:
    """dq in the default mode but for the order of sums."""
    x = make_inputs(case, device)
    options = features_of(case, device) | dict(causal=case.causal, deterministic=deterministic)
    first = run_flash(x.q, x.k, x.v, x.dout, **options)
    for _ in range(repeats(device, deterministic)):
        again = run_flash(x.q, x.k, x.v, x.dout, **options)
        assert_same_result(again, first, case, dq_bitwise=deterministic)


@on_devices(cpu=[c.but(dtype="fp32") for c in VARLEN[::13]], cuda=VARLEN)
@pytest.mark.parametrize("deterministic", [False, True], ids=["default", "deterministic"])
def test_varlen_repeats_bitwise(device: str, case: VarlenCase, deterministic: bool) -> None:
    x = make_varlen_inputs(case, device)
    options = features_of(case, device) | dict(causal=case.causal, deterministic=deterministic)
    first = run_varlen(x, **options)
    for _ in range(repeats(device, deterministic)):
        assert_same_result(run_varlen(x, **options), first, case, dq_bitwise=deterministic)


@pytest.mark.slow
@pytest.mark.cuda
@pytest.mark.parametrize("head_dim", DIMS)
@pytest.mark.parametrize("features", FEATURE_SETS, ids=lambda f: "-".join(f))
def test_no_race_in_a_large_batch_with_features(
    device: str, head_dim: int, features: dict[str, Any]
) -> None:
    case = AttnCase(239, 1024, (6, 6), head_dim, Mask.causal, batch=40, **features)
    x = make_inputs(case, device)
    options = features_of(case, device) | dict(causal=True)
    first = run_flash(x.q, x.k, x.v, x.dout, **options)
    for _ in range(250):
        again = run_flash(x.q, x.k, x.v, x.dout, **options)
        assert_same_result(again, first, case, dq_bitwise=False)


@on_devices(
    cpu=[c.but(dtype="fp32", seqlen_q=65, seqlen_k=97) for c in FEATURED[:7] if not c.dropout],
    cuda=[c for c in FEATURED if not c.dropout],
)
def test_a_batch_with_features_gives_what_its_elements_give(device: str, case: AttnCase) -> None:
    """Each (batch, head group) alone; dropout apart, whose mask goes by their numbers."""
    x, slopes = make_inputs(case, device), make_alibi(case, device)
    options = features_of(case, device) | dict(causal=case.causal, deterministic=True)
    whole = run_flash(x.q, x.k, x.v, x.dout, **options)
    group = case.heads[0] // case.heads[1]
    for batch, head in ((0, 0), (2, 1)):
        heads = slice(head * group, (head + 1) * group)
        if slopes is not None:
            options["alibi_slopes"] = (slopes if slopes.dim() == 1 else slopes[batch])[heads]
        part = run_flash(
            x.q[batch : batch + 1, :, heads],
            x.k[batch : batch + 1, :, head : head + 1],
            x.v[batch : batch + 1, :, head : head + 1],
            x.dout[batch : batch + 1, :, heads],
            **options,
        )
        same = assert_bitwise if device == "cuda" else assert_nearly
        for name, index in (("out", heads), ("dq", heads), ("dk", head), ("dv", head)):
            mine, alone = getattr(whole, name)[batch, :, index], getattr(part, name)[0]
            same(name, mine, alone.view_as(mine), f"{case}, batch {batch}, head {head}")
