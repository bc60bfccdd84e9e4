"""Every combination of the features on every kernel, dense and of variable length."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import cycle, product

import pytest
import torch
from cases import (
    FEATURE_SETS,
    UNLIMITED,
    Alibi,
    AttnCase,
    Mask,
    VarlenCase,
    everywhere,
    make_dlse,
    make_inputs,
    make_varlen_inputs,
    on_devices,
    pairwise,
)
from harness import check_case, check_varlen, features_of, leaves, run_flash

from flash_attn import flash_attn_func
from flash_attn._head_dims import HEAD_DIMS as DIMS

HALF = ("fp16", "bf16")
WINDOWS = (UNLIMITED, (37, 0), (20, 50))
CAPS = (0.0, 4.0)
RATES = (0.0, 0.15)
LENGTHS = (
    *((97, 97), (113, 203), (203, 113), (65, 300), (1, 129), (130, 130), (33, 64), (257, 96)),
    *((64, 257), (128, 128), (31, 17)),
)
GROUPS = ((2, 1), (4, 2), (3, 3), (6, 1), (4, 4))
SEQUENCES = (
    ((33, 0, 130), (33, 5, 130)),
    ((100, 1, 64), (65, 200, 0)),
    ((16, 97, 128, 3), (31, 96, 129, 300)),
    ((150, 40), (40, 150)),
    ((7, 12, 0, 64, 9, 1, 100), (9, 0, 3, 70, 9, 30, 100)),
)
UNUSED = ((0, 0), (17, 5), (0, 40))


def features() -> Iterator[dict]:
    for window, cap, alibi, p in product(WINDOWS, CAPS, Alibi, RATES):
        yield dict(window=window, softcap=cap, alibi=alibi, dropout=p)


def dense_cases() -> Iterator[AttnCase]:
    lengths, heads, dtype = (cycle(x) for x in (LENGTHS, GROUPS, HALF))
    for head_dim, mask, options in product(DIMS, Mask, features()):
        if options["window"] == (20, 50) and mask is Mask.causal:
            options = options | dict(window=(-1, 9))
        shape = (*next(lengths), next(heads), head_dim, mask, next(dtype), 2)
        yield AttnCase(*shape, **options)


def varlen_cases() -> Iterator[VarlenCase]:
    dims, sequences, heads, dtype, unused = (
        cycle(x) for x in (DIMS, SEQUENCES, GROUPS, HALF, UNUSED)
    )
    for mask, options, _ in product(Mask, features(), range(2)):
        shape = (*next(sequences), next(heads), next(dims), mask, next(dtype), next(unused))
        yield VarlenCase(*shape, **options)
        next(dims)


def pair_cases() -> Iterator[AttnCase]:
    """Every pair of values of all choices, with more values than above."""
    for row in pairwise(
        lengths=(*LENGTHS, (16, 512), (512, 16), (95, 161), (1, 1), (2, 3), (400, 399)),
        head_dim=(*DIMS, 40, 72, 111, 200),
        heads=GROUPS,
        mask=tuple(Mask),
        dtype=HALF,
        batch=(1, 2, 3),
        window=(*WINDOWS, (0, 0), (128, 0), (-1, 3), (5, -1), (1000, 1000)),
        softcap=(0.0, 0.5, 30.0),
        alibi=tuple(Alibi),
        dropout=(0.0, 0.02, 0.5, 0.9),
    ):
        yield AttnCase(*row.pop("lengths"), **row)


def sparse(cases: Iterator, every: int) -> Iterator:
    """One in `every`, in the dtypes of the CPU."""
    dtype = cycle(("fp32", "bf16", "fp32", "fp64", "fp32", "fp16"))
    for index, case in enumerate(cases):
        if index % every == every // 2:
            yield case.but(dtype=next(dtype))


@on_devices(cpu=sparse(dense_cases(), 7), cuda=dense_cases())
def test_features_together(device: str, case: AttnCase) -> None:
    """With the gradient of LSE too."""
    check_case(case, make_inputs(case, device), dlse=make_dlse(case, device))


@on_devices(cpu=sparse(varlen_cases(), 5), cuda=varlen_cases())
def test_features_together_varlen(device: str, case: VarlenCase) -> None:
    check_varlen(case, make_varlen_inputs(case, device), dlse=make_dlse(case, device))


@on_devices(cpu=sparse(pair_cases(), 3), cuda=pair_cases())
def test_pairs_of_choices(device: str, case: AttnCase) -> None:
    check_case(case, make_inputs(case, device), deterministic=case.batch == 1)


EMPTY = [
    AttnCase(sq, sk, (4, 2), d, mask, batch=2, **options)
    for ((sq, sk), d, mask), options in zip(
        product(((0, 5), (5, 0), (0, 0), (0, 200), (200, 0)), (64, 33, 128), Mask),
        cycle(FEATURE_SETS),
    )
]


@everywhere(*EMPTY)
@pytest.mark.parametrize("deterministic", [False, True], ids=["default", "deterministic"])
def test_no_queries_or_no_keys(device: str, case: AttnCase, deterministic: bool) -> None:
    x = make_inputs(case, device)
    options = features_of(case, device) | dict(causal=case.causal, deterministic=deterministic)
    dlse = make_dlse(case, device)
    ours = run_flash(x.q, x.k, x.v, x.dout, dlse=dlse, **options)
    assert ours.out.shape == case.q_shape and not ours.out.any()
    assert ours.lse.shape == dlse.shape and (ours.lse == torch.inf).all()
    for grad, like in ((ours.dq, x.q), (ours.dk, x.k), (ours.dv, x.v)):
        assert grad.shape == like.shape and not grad.any(), case
    _, _, probs = flash_attn_func(x.q, x.k, x.v, return_attn_probs=True, **options)
    if case.dropout:
        rounded = tuple(-(-n // 128) * 128 for n in (case.seqlen_q, case.seqlen_k))
        assert probs.shape == (case.batch, case.heads[0], *rounded)
    assert not probs.any()


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
@everywhere(*(AttnCase(65, 97, (4, 2), 64, Mask.causal, **f) for f in FEATURE_SETS))
def test_anomaly_detection_runs_clean(device: str, case: AttnCase) -> None:
    """With rows that see nothing, too."""
    for shape in (case, case.but(seqlen_q=150)):
        x = make_inputs(shape, device)
        options = features_of(case, device) | dict(causal=case.causal)
        with torch.autograd.detect_anomaly(check_nan=True):
            flash_attn_func(*leaves(x.q, x.k, x.v), **options).backward(x.dout)
