"""Memory and rows that nobody may see: past the ends, hidden keys, rows without keys."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product

import pytest
import torch
from cases import (
    FEATURE_SETS,
    AttnCase,
    Inputs,
    Mask,
    VarlenCase,
    everywhere,
    make_inputs,
    make_varlen_inputs,
    on_devices,
)
from harness import (
    assert_bitwise,
    assert_same_result,
    check_case,
    features_of,
    run_flash,
    run_varlen,
)

from flash_attn._head_dims import HEAD_DIMS as DIMS

RAGGED = [
    AttnCase(sq, sk, (2, 1), d, mask, batch=2)
    for (sq, sk), d, mask in product(((100, 75), (33, 190), (129, 129), (1, 65)), DIMS, Mask)
]


def inside(x: torch.Tensor, fill: float, rows: int = 256) -> torch.Tensor:
    """x as the middle of a sequence whose other rows hold `fill`, in every batch."""
    b, s, h, d = x.shape
    buffer = torch.full((b, s + 2 * rows, h, d), fill, dtype=x.dtype, device=x.device)
    return buffer[:, rows : rows + s].copy_(x)


@on_devices(cpu=[c.but(dtype="fp32") for c in RAGGED[::5]], cuda=RAGGED)
@pytest.mark.parametrize("fill", [torch.nan, torch.inf], ids=str)
def test_rows_past_the_ends_are_not_used(device: str, case: AttnCase, fill: float) -> None:
    x = make_inputs(case, device)
    ours = check_case(case, x.map(lambda t: inside(t, fill)), deterministic=True)
    if device == "cuda":
        want = run_flash(x.q, x.k, x.v, x.dout, causal=case.causal, deterministic=True)
        assert_same_result(ours, want, case, dq_bitwise=True)


PADDED = [
    AttnCase(65, 97, (2, 1), d, mask, dtype)
    for d, mask, dtype in product((8, 40, 72, 104, 112, 160, 224, 248), Mask, ("fp16", "bf16"))
]


@on_devices(cpu=[c.but(dtype="fp32") for c in PADDED[::9]], cuda=PADDED)
def test_columns_past_the_head_dimension_are_not_used(device: str, case: AttnCase) -> None:
    """Between one head's columns and the next lie NaN columns that a padded tile would cover."""
    x = make_inputs(case, device)

    def spread(t: torch.Tensor) -> torch.Tensor:
        wide = torch.full((*t.shape[:3], 256 + 64), torch.nan, dtype=t.dtype, device=t.device)
        return wide[..., : case.head_dim].copy_(t)

    check_case(case, x.map(spread))


WITH_EMPTY_ROWS = [
    AttnCase(sq, sk, heads, d, Mask.causal, dtype)
    for (sq, sk), d, (heads, dtype) in product(
        ((100, 1), (130, 2), (200, 64), (300, 129), (129, 128)),
        DIMS,
        (((2, 2), "bf16"), ((4, 1), "fp16")),
    )
]


@on_devices(cpu=[c.but(dtype="fp32") for c in WITH_EMPTY_ROWS[::7]], cuda=WITH_EMPTY_ROWS)
def test_rows_without_keys(device: str, case: AttnCase) -> None:
    """Causal with sq > sk: the first sq - sk rows give 0, LSE +inf, and no gradient."""
    x = make_inputs(case, device)
    empty = case.seqlen_q - case.seqlen_k
    ours = check_case(case, x)
    assert not ours.out[:, :empty].any() and not ours.dq[:, :empty].any(), case
    assert (ours.lse[:, :, :empty] == torch.inf).all(), case


@on_devices(cpu=[c.but(dtype="fp32") for c in WITH_EMPTY_ROWS[::7]], cuda=WITH_EMPTY_ROWS)
@pytest.mark.parametrize("value", [torch.inf, torch.nan], ids=str)
@pytest.mark.parametrize("where", ["k", "v"])
def test_rows_without_keys_ignore_what_keys_hold(
    device: str, case: AttnCase, value: float, where: str
) -> None:
    x = make_inputs(case, device)
    empty = case.seqlen_q - case.seqlen_k
    getattr(x, where)[:, -1] = value
    ours = run_flash(x.q, x.k, x.v, x.dout, causal=True)
    assert (ours.out[:, :empty] == 0).all(), f"out; case {case}"
    assert (ours.lse[:, :, :empty] == torch.inf).all(), f"lse; case {case}"
    assert (ours.dq[:, :empty] == 0).all(), f"dq; case {case}"


@on_devices(cpu=[c.but(dtype="fp32") for c in WITH_EMPTY_ROWS[::9]], cuda=WITH_EMPTY_ROWS)
def test_rows_without_keys_have_no_influence(device: str, case: AttnCase) -> None:
    """Large q and dout in them change no bit of anything else."""
    x = make_inputs(case, device)
    empty = case.seqlen_q - case.seqlen_k
    want = run_flash(x.q, x.k, x.v, x.dout, causal=True, deterministic=True)
    x.q[:, :empty] *= 3000
    x.dout[:, :empty] *= 3000
    ours = run_flash(x.q, x.k, x.v, x.dout, causal=True, deterministic=True)
    assert_same_result(ours, want, case, dq_bitwise=True)


@everywhere(*(AttnCase(130, 193, (4, 2), d, Mask.none, batch=2) for d in DIMS))
def test_keys_without_influence_get_no_gradient(device: str, case: AttnCase) -> None:
    """dout is 0 for all queries that see the last 50 keys: dk and dv of these are exactly 0."""
    case = case.but(mask=Mask.causal)
    x = make_inputs(case, device)
    x.dout[:, -50:] = 0
    ours = check_case(case, x)
    assert not ours.dk[:, -50:].any() and not ours.dv[:, -50:].any(), case
    assert ours.dv[:, :-50].any(-1).all(), case


@everywhere(*(AttnCase(150, 150, (2, 1), d, Mask.causal, batch=2) for d in DIMS))
def test_future_keys_do_not_matter(device: str, case: AttnCase) -> None:
    """Large finite values in hidden keys change no bit of the rows that do not see them."""
    x = make_inputs(case, device)
    want = run_flash(x.q, x.k, x.v, causal=True)
    for start in (1, 63, 64, 100, 149):
        k, v = x.k.clone(), x.v.clone()
        k[:, start:] *= 1000
        v[:, start:] = 30000
        ours = run_flash(x.q, k, v, causal=True)
        assert_bitwise("out", ours.out[:, :start], want.out[:, :start], f"{case}, from {start}")
        assert_bitwise("lse", ours.lse[..., :start], want.lse[..., :start], f"{case}, from {start}")


@everywhere(*(AttnCase(90, 70, (4, 2), d, mask, batch=3) for d in DIMS for mask in Mask))
def test_batches_and_heads_do_not_mix(device: str, case: AttnCase) -> None:
    """NaN in one batch, and in one group of heads, stays there."""
    x = make_inputs(case, device)
    want = run_flash(x.q, x.k, x.v, x.dout, causal=case.causal, deterministic=True)
    bad = x.map(torch.clone)
    for t in (bad.q, bad.k, bad.v, bad.dout):
        t[1] = torch.nan
        t[2, :, t.shape[2] // 2 :] = torch.nan
    ours = run_flash(bad.q, bad.k, bad.v, bad.dout, causal=case.causal, deterministic=True)
    for name in ("out", "dq", "dk", "dv"):
        mine, clean = getattr(ours, name), getattr(want, name)
        half = mine.shape[2] // 2
        assert_bitwise(name, mine[0], clean[0], f"{case}, batch 0")
        assert_bitwise(name, mine[2, :, :half], clean[2, :, :half], f"{case}, batch 2")


@contextmanager
def uninitialised_memory_is_nan() -> Iterator[None]:
    """torch.empty returns NaN, on every device."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = fill
        torch.use_deterministic_algorithms(before)


@pytest.mark.filterwarnings("ignore:.*deterministic.*")
@on_devices(
    cpu=[c.but(dtype=d) for c in RAGGED[::7] for d in ("fp32", "bf16")],
    cuda=[*RAGGED, *PADDED[::2], *WITH_EMPTY_ROWS[::3]],
)
def test_outputs_do_not_depend_on_what_memory_held(device: str, case: AttnCase) -> None:
    x = make_inputs(case, device)
    want = run_flash(x.q, x.k, x.v, x.dout, causal=case.causal, deterministic=True)
    with uninitialised_memory_is_nan():
        ours = run_flash(x.q, x.k, x.v, x.dout, causal=case.causal, deterministic=True)
    assert_same_result(ours, want, case, dq_bitwise=True)


@everywhere(
    *(AttnCase(113, 150, (4, 2), d, mask, batch=2) for d in (33, 40, 64, 128) for mask in Mask)
)
def test_inputs_are_not_changed(device: str, case: AttnCase) -> None:
    x = make_inputs(case, device)
    before: Inputs = x.map(torch.clone)
    run_flash(x.q, x.k, x.v, x.dout, causal=case.causal)
    for name in ("q", "k", "v", "dout"):
        assert_bitwise(name, getattr(x, name), getattr(before, name), case)


FEATURED = [
    AttnCase(sq, sk, (4, 2), d, mask, batch=2, **features)
    for ((sq, sk), mask), d, features in product(
        (((100, 75), Mask.none), ((33, 190), Mask.causal)), DIMS, FEATURE_SETS
    )
]
SEQUENCES = (100, 0, 33, 129, 1)
VARLEN = [
    VarlenCase(SEQUENCES, SEQUENCES[::-1], (4, 2), d, mask, "bf16", (20, 130), **features)
    for d, (mask, features) in product(
        DIMS, ((Mask.causal, {}), (Mask.none, FEATURE_SETS[1]), (Mask.causal, FEATURE_SETS[-1]))
    )
]


@on_devices(cpu=[c.but(dtype="fp32") for c in FEATURED[::11]], cuda=FEATURED)
def test_rows_past_the_ends_are_not_used_by_features(device: str, case: AttnCase) -> None:
    x = make_inputs(case, device)
    ours = check_case(case, x.map(lambda t: inside(t, torch.nan)), deterministic=True)
    if device == "cuda":
        options = features_of(case, device) | dict(causal=case.causal, deterministic=True)
        want = run_flash(x.q, x.k, x.v, x.dout, **options)
        assert_same_result(ours, want, case, dq_bitwise=True)


@pytest.mark.filterwarnings("ignore:.*deterministic.*")
@on_devices(cpu=[c.but(dtype="fp32") for c in FEATURED[::15]], cuda=FEATURED[::2])
def test_features_do_not_depend_on_what_memory_held(device: str, case: AttnCase) -> None:
    x = make_inputs(case, device)
    options = features_of(case, device) | dict(causal=case.causal, deterministic=True)
    want = run_flash(x.q, x.k, x.v, x.dout, **options)
    with uninitialised_memory_is_nan():
        ours = run_flash(x.q, x.k, x.v, x.dout, **options)
    assert_same_result(ours, want, case, dq_bitwise=True)


@pytest.mark.filterwarnings("ignore:.*deterministic.*")
@on_devices(cpu=[c.but(dtype="fp32") for c in VARLEN[:3]], cuda=VARLEN)
@pytest.mark.parametrize("deterministic", [False, True], ids=["default", "deterministic"])
def test_varlen_does_not_depend_on_what_memory_held(
    device: str, case: VarlenCase, deterministic: bool
) -> None:
    """Rows of no sequence too: their results are written, not left."""
    x = make_varlen_inputs(case, device)
    options = features_of(case, device) | dict(causal=case.causal, deterministic=deterministic)
    want = run_varlen(x, **options)
    with uninitialised_memory_is_nan():
        ours = run_varlen(x, **options)
    assert_same_result(ours, want, case, dq_bitwise=deterministic)
    for t in (ours.out, ours.dq, ours.dk, ours.dv):
        assert t.isfinite().all(), case


@everywhere(*FEATURED[:: len(FEATURE_SETS) + 1])
def test_batches_and_heads_do_not_mix_in_features(device: str, case: AttnCase) -> None:
    """NaN in one batch entry, and in one group of heads, stays there."""
    x = make_inputs(case, device)
    options = features_of(case, device) | dict(causal=case.causal, deterministic=True)
    want = run_flash(x.q, x.k, x.v, x.dout, **options)
    bad = x.map(torch.clone)
    for t in (bad.q, bad.k, bad.v, bad.dout):
        t[1, :, t.shape[2] // 2 :] = torch.nan
    ours = run_flash(bad.q, bad.k, bad.v, bad.dout, **options)
    for name in ("out", "dq", "dk", "dv"):
        mine, clean = getattr(ours, name), getattr(want, name)
        half = mine.shape[2] // 2
        assert_bitwise(name, mine[0], clean[0], f"{case}, batch 0")
        assert_bitwise(name, mine[1, :, :half], clean[1, :, :half], f"{case}, batch 1")


@everywhere(*VARLEN[:3])
def test_varlen_inputs_are_not_changed(device: str, case: VarlenCase) -> None:
    x, options = make_varlen_inputs(case, device), features_of(case, device)
    tensors = [x.q, x.k, x.v, x.dout, x.cu_seqlens_q, x.cu_seqlens_k]
    if "alibi_slopes" in options:
        tensors.append(options["alibi_slopes"])
    before = [t.clone() for t in tensors]
    run_varlen(x, causal=case.causal, **options)
    for index, (now, then) in enumerate(zip(tensors, before)):
        assert_bitwise(f"input {index}", now, then, case)
