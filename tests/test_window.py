"""Sliding windows: query i sees the keys from i + shift - left to i + shift + right."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import cycle, product

import numpy as np
import pytest
import torch
from cases import UNLIMITED, AttnCase, Inputs, Mask, Window, everywhere, make_inputs, on_devices
from harness import assert_bitwise, assert_nearly, assert_same_result, check_case, run_flash
from oracle import visible

from flash_attn import flash_attn_func
from flash_attn._head_dims import HEAD_DIMS as DIMS

ODD_DIMS = (1, 8, 33, 40, 59, 72, 104, 111, 160, 200, 248)
HALF = ("fp16", "bf16")
WINDOWS: tuple[Window, ...] = (
    *((0, 0), (1, 0), (0, 1), (3, 5), (16, 0), (31, 33), (64, 0), (63, 64), (100, -1), (-1, 17)),
    *((127, 128), (200, 3), (500, 500), (-1, 0), (0, -1), (32, 96), (129, 1), (2, 250)),
)
LENGTHS = (
    *((97, 97), (130, 193), (193, 130), (65, 300), (300, 65), (1, 129), (129, 1), (257, 257)),
    *((128, 512), (64, 64), (95, 97), (160, 255), (513, 129)),
)
GROUPS = ((2, 1), (2, 2), (4, 1), (3, 1), (6, 2), (1, 1), (5, 5))


def window_cases() -> Iterator[AttnCase]:
    """Every window on every kernel and with every mask; lengths, heads and dtypes take turns."""
    lengths, heads, dtype, batch = (cycle(x) for x in (LENGTHS, GROUPS, HALF, (1, 1, 2)))
    for window, head_dim, mask in product(WINDOWS, DIMS, Mask):
        shape = (*next(lengths), next(heads), head_dim, mask, next(dtype), next(batch))
        yield AttnCase(*shape, window=window)
    for head_dim, window in product(ODD_DIMS, ((40, 20), (70, 0), (-1, 3))):
        yield AttnCase(113, 160, next(heads), head_dim, Mask.none, next(dtype), window=window)


def cpu_window_cases() -> Iterator[AttnCase]:
    dtype = cycle(("fp32", "bf16", "fp32", "fp64", "fp32", "fp16"))
    for index, case in enumerate(window_cases()):
        if index % 5 == 2:
            yield case.but(dtype=next(dtype))


@on_devices(cpu=cpu_window_cases(), cuda=window_cases())
def test_window_matches_oracle(device: str, case: AttnCase) -> None:
    check_case(case, make_inputs(case, device))


@everywhere(
    *(AttnCase(1000, 1000, (2, 1), d, Mask.causal, window=(200, 0)) for d in (64, 128)),
    AttnCase(700, 1500, (2, 1), 64, window=(100, 300)),
    AttnCase(1500, 700, (2, 2), 96, window=(300, 100)),
)
def test_window_in_long_sequences(device: str, case: AttnCase) -> None:
    check_case(case, make_inputs(case, device))


# Rows without keys: sq > sk + right.  flash-attn 2.8 takes right >= sk for unlimited.
EMPTY_ROWS = [
    AttnCase(sq, sk, heads, d, mask, dtype, window=window)
    for ((sq, sk), window, mask), (d, heads, dtype) in product(
        (
            ((300, 100), (5, 120), Mask.none),
            ((300, 100), (5, 0), Mask.none),
            ((300, 100), (0, 70), Mask.none),
            ((300, 100), (-1, 99), Mask.none),
            ((300, 100), (20, 150), Mask.causal),
            ((200, 1), (3, 1), Mask.none),
            ((129, 64), (1, 0), Mask.none),
        ),
        zip(DIMS, ((2, 1), (4, 2), (2, 2)) * 2, HALF * 3),
    )
]


@on_devices(cpu=[c.but(dtype="fp32") for c in EMPTY_ROWS[::5]], cuda=EMPTY_ROWS)
def test_rows_that_see_nothing(device: str, case: AttnCase) -> None:
    """They give 0, LSE +inf, and no gradient, whatever the hidden keys hold."""
    x = make_inputs(case, device)
    deterministic = case.heads[0] == 4
    right = 0 if case.causal else case.window[1]
    empty = case.seqlen_q - case.seqlen_k - right
    assert empty > 0
    ours = check_case(case, x, deterministic=deterministic)
    assert not ours.out[:, :empty].any() and not ours.dq[:, :empty].any(), case
    assert (ours.lse[..., :empty] == torch.inf).all(), case
    assert ours.lse[..., empty:].isfinite().all(), case
    for fill in (torch.nan, torch.inf):
        bad = Inputs(x.q, torch.full_like(x.k, fill), torch.full_like(x.v, fill), x.dout)
        options = dict(causal=case.causal, window_size=case.window)
        ours = run_flash(bad.q, bad.k, bad.v, bad.dout, **options, deterministic=deterministic)
        assert not ours.out[:, :empty].any() and not ours.dq[:, :empty].any(), f"{fill}; {case}"
        assert (ours.lse[..., :empty] == torch.inf).all(), f"{fill}; {case}"


ONE_HOT = [
    AttnCase(sq, sk, (2, 1), 256, mask, window=window)
    for (sq, sk), mask, window in product(
        ((200, 200), (150, 250), (250, 150), (1, 200)),
        Mask,
        ((0, 0), (63, 0), (5, 64), (-1, 130), (129, -1), (1, 1), (300, 300), (-5, -5), (10, -3)),
    )
]


@on_devices(
    cpu=[
        case.but(seqlen_q=case.seqlen_q // 10 + 1, seqlen_k=case.seqlen_k // 10, dtype="fp32")
        for case in ONE_HOT
    ],
    cuda=ONE_HOT,
)
def test_one_hot_values_show_the_window(device: str, case: AttnCase) -> None:
    """With V = identity, out holds the probabilities: hidden ones must be exactly 0."""
    x = make_inputs(case, device)
    v = torch.eye(case.seqlen_k, case.head_dim, device=device, dtype=case.torch_dtype)
    v = v[None, :, None].expand(case.kv_shape)
    out = run_flash(x.q * 0, x.k, v, causal=case.causal, window_size=case.window).out
    see = visible(case.seqlen_q, case.seqlen_k, case.causal, device, case.window)
    seen = out[0].transpose(0, 1)[..., : case.seqlen_k] != 0
    assert torch.equal(seen, see.expand_as(seen)), case


@everywhere(*(AttnCase(150, 150, (2, 1), d, Mask.causal) for d in (64, 128)))
@pytest.mark.parametrize("tokens", [1, 2, 17, 64, 128])
def test_a_model_that_sees_the_last_tokens(device: str, case: AttnCase, tokens: int) -> None:
    """Clients ask for the last n tokens, the query's own included, with (n - 1, n - 1), causal."""
    x = make_inputs(case, device)
    out = run_flash(x.q, x.k, x.v, causal=True, window_size=(tokens - 1, tokens - 1)).out
    for row in (0, 1, 63, 64, 149):
        begin = max(row + 1 - tokens, 0)
        keys = slice(begin, row + 1)
        alone = run_flash(x.q[:, row : row + 1], x.k[:, keys], x.v[:, keys], causal=False).out
        # Another division into tiles rounds P otherwise.
        eps = torch.finfo(out.dtype).eps
        assert_nearly("out", out[:, row : row + 1], alone, f"{case}, row {row}", eps=2 * eps)


SAME = [AttnCase(sq, sk, (4, 2), d) for (sq, sk), d in product(((150, 150), (65, 200)), DIMS)]
SAME += [AttnCase(200, 65, (2, 1), 64), AttnCase(113, 113, (2, 2), 33)]


def compare_windows(
    case: AttnCase, device: str, one: tuple[bool, Window], other: tuple[bool, Window]
) -> None:
    """Two (causal, window) that say the same give the same bits."""
    x = make_inputs(case, device)
    results = [
        run_flash(*(x.q, x.k, x.v, x.dout), causal=causal, window_size=window, deterministic=True)
        for causal, window in (one, other)
    ]
    assert_same_result(*results, case, dq_bitwise=True)


@everywhere(*SAME)
def test_a_window_without_keys_to_come_is_causal_bitwise(device: str, case: AttnCase) -> None:
    longest = max(case.seqlen_q, case.seqlen_k)
    compare_windows(case, device, (False, (-1, 0)), (True, UNLIMITED))
    compare_windows(case, device, (True, (longest, longest)), (True, UNLIMITED))
    compare_windows(case, device, (False, (longest, 0)), (True, UNLIMITED))


@everywhere(*SAME)
def test_a_window_wider_than_the_sequences_is_none_bitwise(device: str, case: AttnCase) -> None:
    longest = max(case.seqlen_q, case.seqlen_k)
    for window in ((longest, longest), (-1, longest), (longest, -1), (-5, -5), (-1, -7)):
        compare_windows(case, device, (False, window), (False, UNLIMITED))


@everywhere(*SAME)
def test_causal_is_right_0_bitwise(device: str, case: AttnCase) -> None:
    compare_windows(case, device, (True, (20, 9)), (False, (20, 0)))
    compare_windows(case, device, (True, (20, -1)), (False, (20, 0)))
    compare_windows(case, device, (True, (-3, 40)), (False, (-1, 0)))


@everywhere(*(case.but(window=(33, 7)) for case in SAME))
def test_left_and_right_are_not_swapped(device: str, case: AttnCase) -> None:
    x = make_inputs(case, device)
    ours = run_flash(x.q, x.k, x.v, causal=False, window_size=(33, 7))
    for window in ((7, 33), (33, 33), (7, 7), UNLIMITED):
        other = run_flash(x.q, x.k, x.v, causal=False, window_size=window)
        assert not torch.equal(ours.lse, other.lse), f"{window}; case {case}"


@everywhere(AttnCase(150, 170, (2, 1), 64), AttnCase(150, 170, (2, 1), 128))
def test_numbers_of_a_window_may_be_tensors_or_numpy(device: str, case: AttnCase) -> None:
    x = make_inputs(case, device)
    want = flash_attn_func(x.q, x.k, x.v, window_size=(33, 7))
    for window in (
        torch.tensor([33, 7]),
        tuple(torch.tensor([33, 7])),
        [torch.tensor(33), 7],
        (np.int64(33), np.int32(7)),
        np.array([33, 7]),
        [33, 7],
    ):
        got = flash_attn_func(x.q, x.k, x.v, window_size=window)
        assert_bitwise("out", got, want, f"{window!r}; case {case}")


# Tiles have at most 128 rows or columns: what lies that far before a window is never loaded.
REACH = 128
FAR_KEYS = [
    AttnCase(sq, sk, (2, 1), d, mask, window=window)
    for ((sq, sk), window, mask), d in product(
        (
            ((100, 700), (50, 0), Mask.none),
            ((100, 700), (50, 30), Mask.causal),
            ((64, 512), (0, 0), Mask.none),
            ((1, 400), (100, -1), Mask.none),
            ((130, 390), (3, 200), Mask.none),
        ),
        DIMS,
    )
]


@on_devices(cpu=[c.but(dtype="fp32") for c in FAR_KEYS[::7]], cuda=FAR_KEYS)
def test_keys_before_all_windows_are_not_loaded(device: str, case: AttnCase) -> None:
    """Whatever they hold, nothing changes, and they get no gradient."""
    x = make_inputs(case, device)
    first = case.seqlen_k - case.seqlen_q - case.window[0]
    unread = first - REACH + 1
    assert unread > 0
    options = dict(causal=case.causal, window_size=case.window, deterministic=True)
    want = run_flash(x.q, x.k, x.v, x.dout, **options)
    assert not want.dk[:, :first].any() and not want.dv[:, :first].any(), case
    for fill in (torch.nan, torch.inf):
        x.k[:, :unread] = fill
        x.v[:, :unread] = fill
        ours = run_flash(x.q, x.k, x.v, x.dout, **options)
        assert_same_result(ours, want, f"{case}, {fill}", dq_bitwise=True)


@on_devices(
    cpu=[AttnCase(300, 40, (2, 1), 64, window=(10, 5), dtype="fp32")],
    cuda=[AttnCase(600, 40, (2, 1), d, m, window=(10, 5)) for d, m in product(DIMS, Mask)],
)
def test_queries_that_see_nothing_are_without_influence(device: str, case: AttnCase) -> None:
    """NaN and inf in their q and dout reach neither dk nor dv."""
    x = make_inputs(case, device)
    first = case.seqlen_q - case.seqlen_k - (0 if case.causal else case.window[1])
    unread = first - REACH + 1
    options = dict(causal=case.causal, window_size=case.window, deterministic=True)
    want = run_flash(x.q, x.k, x.v, x.dout, **options)
    for fill in (torch.nan, torch.inf):
        x.q[:, :unread] = fill
        x.dout[:, :unread] = fill
        ours = run_flash(x.q, x.k, x.v, x.dout, **options)
        assert_same_result(ours, want, f"{case}, {fill}", dq_bitwise=True)


NARROW = [AttnCase(768, 768, (2, 1), d, mask, window=(64, 32)) for d, mask in product(DIMS, Mask)]


@on_devices(cpu=[c.but(dtype="fp32") for c in NARROW[1:3]], cuda=NARROW)
def test_rows_apart_do_not_meet(device: str, case: AttnCase) -> None:
    """NaN in the first tile of K and V, then of q and dout, stays within the window's reach."""
    x = make_inputs(case, device)
    options = dict(causal=case.causal, window_size=case.window, deterministic=True)
    want = run_flash(x.q, x.k, x.v, x.dout, **options)
    bad = x.map(torch.clone)
    bad.k[:, :REACH] = torch.nan
    bad.v[:, :REACH] = torch.nan
    ours = run_flash(bad.q, bad.k, bad.v, bad.dout, **options)
    apart = 3 * REACH + case.window[0]  # a tile of keys and one of queries in between
    for name in ("out", "dq"):
        mine, clean = getattr(ours, name), getattr(want, name)
        assert_bitwise(name, mine[:, apart:], clean[:, apart:], case)
    assert_bitwise("lse", ours.lse[..., apart:], want.lse[..., apart:], case)

    bad = x.map(torch.clone)
    bad.q[:, :REACH] = torch.nan
    bad.dout[:, :REACH] = torch.nan
    ours = run_flash(bad.q, bad.k, bad.v, bad.dout, **options)
    apart = 3 * REACH + case.window[1]
    for name in ("dk", "dv"):
        mine, clean = getattr(ours, name), getattr(want, name)
        assert_bitwise(name, mine[:, apart:], clean[:, apart:], case)
