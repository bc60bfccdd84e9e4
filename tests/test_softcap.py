"""softcap: the scores are softcap * tanh(scores / softcap)."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import cycle, product

import pytest
import torch
from cases import (
    UNLIMITED,
    Alibi,
    AttnCase,
    Inputs,
    Mask,
    everywhere,
    make_dlse,
    make_inputs,
    on_devices,
)
from harness import assert_bitwise, check_case, run_flash

from flash_attn._head_dims import HEAD_DIMS as DIMS

HALF = ("fp16", "bf16")
LENGTHS = (
    *((97, 97), (113, 203), (203, 113), (1, 300), (300, 2), (257, 257), (65, 512)),
    *((129, 64), (33, 31), (128, 128), (511, 96)),
)
GROUPS = ((2, 1), (4, 2), (3, 3), (6, 1), (1, 1))
WINDOWS = (UNLIMITED, UNLIMITED, (40, 0), (-1, 30), UNLIMITED)
CAPS = (50.0, 30.0, 5.0, 0.5)
FACTORS = (1, 5, 50)  # of q: scores around 1, 5 and 50


def scaled(case: AttnCase, device: str, factor: float) -> Inputs:
    x = make_inputs(case, device)
    x.q = x.q * factor
    return x


def softcap_cases() -> Iterator[tuple[AttnCase, int]]:
    lengths, heads, dtype, window = (cycle(x) for x in (LENGTHS, GROUPS, HALF, WINDOWS))
    for head_dim, mask, cap, factor in product(DIMS, Mask, CAPS, FACTORS):
        shape = (*next(lengths), next(heads), head_dim, mask, next(dtype))
        yield AttnCase(*shape, window=next(window), softcap=cap), factor
    for head_dim, mask in product((1, 33, 40, 72, 111, 160, 200), Mask):
        yield AttnCase(113, 150, (4, 2), head_dim, mask, next(dtype), 2, softcap=10.0), 5


def cpu_softcap_cases() -> Iterator[tuple[AttnCase, int]]:
    dtype = cycle(("fp32", "bf16", "fp32", "fp64", "fp16"))
    for index, (case, factor) in enumerate(softcap_cases()):
        if index % 5 == 2:
            yield case.but(dtype=next(dtype)), factor


# The factor travels beside the case: q * factor is what the large logits come from.
BY_FACTOR = {
    factor: on_devices(
        cpu=[c for c, f in cpu_softcap_cases() if f == factor],
        cuda=[c for c, f in softcap_cases() if f == factor],
    )
    for factor in FACTORS
}


@BY_FACTOR[1]
def test_softcap_matches_oracle(device: str, case: AttnCase) -> None:
    check_case(case, make_inputs(case, device))


@BY_FACTOR[5]
def test_softcap_of_larger_logits(device: str, case: AttnCase) -> None:
    check_case(case, scaled(case, device, 5))


@BY_FACTOR[50]
def test_softcap_of_large_logits(device: str, case: AttnCase) -> None:
    check_case(case, scaled(case, device, 50))


FEW = [
    AttnCase(130, 193, (4, 2), 64, Mask.causal, batch=2, softcap=20.0),
    AttnCase(193, 130, (2, 1), 128, Mask.none, "fp16", softcap=1.0),
    AttnCase(113, 113, (2, 2), 96, Mask.causal, "bf16", 1, (40, 0), 8.0),
    AttnCase(100, 160, (2, 1), 33, Mask.none, "fp16", 2, (-1, 20), 3.0, Alibi.per_batch),
]


@everywhere(*FEW)
@pytest.mark.parametrize("p", [0.0, 0.17], ids=["", "dropout"])
@pytest.mark.parametrize("deterministic", [False, True], ids=["default", "deterministic"])
def test_softcap_with_dropout_and_gradient_of_lse(
    device: str, case: AttnCase, p: float, deterministic: bool
) -> None:
    """Upstream refuses softcap together with dropout."""
    case = case.but(dropout=p)
    x = scaled(case, device, 5)
    check_case(case, x, dlse=make_dlse(case, device), deterministic=deterministic)


@everywhere(*FEW)
@pytest.mark.parametrize("scale", [0.0, -0.3, 1.0], ids=str)
def test_softcap_with_softmax_scale(device: str, case: AttnCase, scale: float) -> None:
    """The scale is applied before the cap, and a negative one turns no mask round."""
    check_case(case, make_inputs(case, device), scale=scale)


@everywhere(*FEW)
def test_softcap_0_is_off(device: str, case: AttnCase) -> None:
    x = make_inputs(case, device)
    options = dict(causal=case.causal, window_size=case.window)
    want = run_flash(x.q, x.k, x.v, **options)
    for off in (0.0, 0):
        ours = run_flash(x.q, x.k, x.v, softcap=off, **options)
        assert_bitwise("out", ours.out, want.out, case)
        assert_bitwise("lse", ours.lse, want.lse, case)
    capped = run_flash(x.q, x.k, x.v, softcap=case.softcap, **options)
    assert not torch.equal(capped.lse, want.lse), case


@everywhere(*FEW)
def test_a_cap_far_above_the_scores_changes_little(device: str, case: AttnCase) -> None:
    """tanh of small numbers must keep most of its relative precision."""
    for cap in (200.0, *((1e4,) if device == "cpu" else ())):
        capped = case.but(softcap=cap)
        check_case(capped, make_inputs(capped, device))


@everywhere(*(case.but(mask=Mask.none, window=UNLIMITED, alibi=Alibi.none) for case in FEW))
def test_saturated_scores_are_equal_and_get_no_gradient(device: str, case: AttnCase) -> None:
    """All scores far above the cap: every key weighs the same; q and k get no gradient."""
    x = make_inputs(case, device)
    q, k = x.q.abs() * 30 + 30, x.k.abs() * 30 + 30
    ours = run_flash(q, k, x.v, x.dout, causal=False, softcap=case.softcap)
    # The kernels get tanh back from P and LSE: 1 - tanh^2 is a few roundings of fp32 instead of 0.
    limit = 0.0 if device == "cpu" else 1e-4 * (x.dout.abs().max() * k.abs().max()).item()
    assert ours.dq.abs().max() <= limit and ours.dk.abs().max() <= limit, case
    mean = x.v.double().mean(1, keepdim=True).repeat_interleave(case.heads[0] // case.heads[1], 2)
    eps = torch.finfo(ours.out.dtype).eps
    torch.testing.assert_close(ours.out.double(), mean.expand_as(ours.out), rtol=0, atol=2 * eps)
