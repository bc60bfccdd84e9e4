"""Warpgroups of the sm90 forward that see fewer key blocks than their tile, or that have no rows.

Each of a tile's warpgroups has 64 rows, and passes over the blocks that only the others' rows see:
on the right (causal), on the left (windows), on both sides, or all of them.
"""

from __future__ import annotations

import pytest
import torch
from cases import Alibi, AttnCase, Inputs, Mask, VarlenCase, make_inputs, make_varlen_inputs
from harness import assert_same_result, features_of, run_flash
from hopper import GENERAL_TILES, HEAD_DIMS, TILES, Tile, check, check_varlen, on_hopper
from oracle import Result, visible

GROUP_ROWS = 64
Blocks = tuple[int, int]  # first, end


def tile_of(case: AttnCase) -> Tile:
    is_plain = not (case.softcap or case.dropout or case.alibi is not Alibi.none)
    return (TILES if is_plain else GENERAL_TILES)[case.head_dim]


def blocks_seen(case: AttnCase, row0: int, rows: int) -> Blocks:
    """The key blocks that some of these rows see, by the definition of the mask."""
    see = visible(case.seqlen_q, case.seqlen_k, case.causal, torch.device("cpu"), case.window)
    keys = see[row0 : row0 + rows].any(0).nonzero().flatten().tolist()
    block_n = tile_of(case).block_n
    return (keys[0] // block_n, keys[-1] // block_n + 1) if keys else (0, 0)


def ways_of_passing(case: AttnCase) -> set[str]:
    """How groups pass over blocks of their tiles."""
    rows, found = tile_of(case).rows, set()
    for tile0 in range(0, case.seqlen_q, rows):
        first, end = blocks_seen(case, tile0, rows)
        for row0 in range(tile0, tile0 + rows, GROUP_ROWS):
            own_first, own_end = blocks_seen(case, row0, GROUP_ROWS)
            if first == end:
                continue
            if row0 >= case.seqlen_q:
                found.add("no rows")
            elif own_first == own_end:
                found.add("no keys")
            else:
                sides = {(1, 1): "both", (1, 0): "right", (0, 1): "left", (0, 0): "none"}
                found.add(sides[own_end < end, own_first > first])
    return found - {"none"}


# Around the heights of tiles (64, 128, 192), with fewer keys, as many, and more.
HEIGHTS = (1, 63, 64, 65, 127, 128, 129, 191, 192, 193)
CAUSAL = [
    AttnCase(sq, max(sk, 1), (2, 1), d, Mask.causal, dtype, head_dim_v=dv)
    for i, (d, dv) in enumerate(HEAD_DIMS)
    for j, sq in enumerate(HEIGHTS)
    for sk, dtype in (
        ((sq - 70, "bf16"), (sq + 64, "fp16"))
        if (i + j) % 2
        else ((sq, "fp16"), (sq + 333, "bf16"))
    )
]
CAUSAL += [
    AttnCase(sq, sk, (2, 1), d, Mask.causal, batch=2, head_dim_v=dv)
    for d, dv in HEAD_DIMS
    for sq, sk in ((300, 420), (193, 64), (300, 100))
]
# Narrower than a block: a tile's rows see neighbouring blocks, and each group of them its own.
WINDOWS = [
    AttnCase(sq, sk, (2, 1), d, mask, dtype, window=window, head_dim_v=dv)
    for d, dv in HEAD_DIMS
    for sq, sk, mask, dtype, window in (
        (192, 292, Mask.none, "bf16", (10, 7)),
        (193, 193, Mask.causal, "fp16", (0, 0)),
        (200, 500, Mask.none, "bf16", (0, 20)),
        (129, 400, Mask.causal, "fp16", (40, 0)),
        (300, 200, Mask.none, "bf16", (5, 30)),
        (400, 450, Mask.none, "fp16", (-1, 3)),
    )
]
FEATURED = [
    AttnCase(sq, sk, (4, 2), d, mask, window=window, head_dim_v=dv, **features)
    for d, dv in HEAD_DIMS
    for sq, sk, mask, window, features in (
        (129, 300, Mask.causal, (-1, -1), dict(dropout=0.2)),
        (193, 100, Mask.causal, (-1, -1), dict(softcap=4.0)),
        (200, 500, Mask.none, (3, 20), dict(alibi=Alibi.per_head)),
        (193, 193, Mask.causal, (9, 0), dict(softcap=6.0, alibi=Alibi.per_head, dropout=0.1)),
    )
]


@pytest.mark.parametrize("head_dim", TILES)
def test_the_cases_have_every_way_of_passing(head_dim: int) -> None:
    """Both sides at once need a group between two others."""
    cases = [c for c in CAUSAL + WINDOWS if c.head_dim == head_dim and not c.head_dim_v]
    found = set().union(*map(ways_of_passing, cases))
    want = {"right", "left", "no rows", "no keys"}
    assert found == (want | {"both"} if TILES[head_dim].rows > 2 * GROUP_ROWS else want)
    cases = [c for c in FEATURED if c.head_dim == head_dim and not c.head_dim_v]
    assert set().union(*map(ways_of_passing, cases)) == want


@on_hopper(*CAUSAL)
def test_causal_rows_around_the_heights_of_tiles(
    device: str, case: AttnCase, pinned_to_sm90: None
) -> None:
    check(case, make_inputs(case, device))


@on_hopper(*WINDOWS)
def test_windows_narrower_than_a_block(device: str, case: AttnCase, pinned_to_sm90: None) -> None:
    check(case, make_inputs(case, device))


@on_hopper(*FEATURED)
def test_groups_with_features(device: str, case: AttnCase, pinned_to_sm90: None) -> None:
    check(case, make_inputs(case, device))


FULL = [
    AttnCase(sq, 300, (2, 1), d, Mask.none, batch=2, head_dim_v=dv)
    for d, dv in HEAD_DIMS
    for sq in (1, 64, 65, 129, 193, 257)
]


@on_hopper(*FULL)
def test_groups_without_rows(device: str, case: AttnCase, pinned_to_sm90: None) -> None:
    check(case, make_inputs(case, device))


LENGTHS = [
    VarlenCase(lengths_q, lengths_k, (2, 1), d, mask, "bf16", unused, window, head_dim_v=dv)
    for d, dv in HEAD_DIMS
    for lengths_q, lengths_k, mask, unused, window in (
        ((1, 64, 65, 130, 193), (300, 5, 200, 64, 193), Mask.causal, (0, 0), (-1, -1)),
        ((193, 1, 129, 192), (400, 300, 129, 292), Mask.none, (70, 9), (10, 7)),
    )
]


@on_hopper(*LENGTHS)
def test_groups_of_sequences(device: str, case: VarlenCase, pinned_to_sm90: None) -> None:
    """Rows of a group that lie beyond their sequence are another's, or hold NaN."""
    check_varlen(case, make_varlen_inputs(case, device))


# A causal tile whose upper rows see fewer blocks; windows on the diagonal.  More blocks than stages.
POISONED = [
    AttnCase(sq, sk, (2, 1), d, mask, window=window, head_dim_v=dv, **features)
    for d, dv in HEAD_DIMS
    for sq, sk, mask, window, features in (
        (450, 514, Mask.causal, (-1, -1), {}),
        (384, 420, Mask.none, (10, 7), {}),
        (384, 420, Mask.causal, (10, 0), dict(softcap=5.0)),
    )
]


@pytest.mark.parametrize("case", POISONED, ids=str)
def test_groups_of_these_cases_pass_over_blocks_of_their_tiles(case: AttnCase) -> None:
    assert ways_of_passing(case) & {"right", "left", "both"}


@on_hopper(*POISONED)
def test_nan_in_a_block_changes_nothing_for_groups_that_do_not_see_it(
    device: str, case: AttnCase, pinned_to_sm90: None
) -> None:
    """Also where the tile's other groups do.  A hidden V would reach them as 0 * NaN."""
    x, block_n = make_inputs(case, device), tile_of(case).block_n
    want = run(case, x)
    for block in range(-(-case.seqlen_k // block_n)):
        keys = slice(block * block_n, (block + 1) * block_n)
        poisoned = Inputs(x.q, x.k.clone(), x.v.clone(), x.dout)
        poisoned.k[:, keys], poisoned.v[:, keys] = torch.nan, torch.nan
        ours = run(case, poisoned)
        for row0 in range(0, case.seqlen_q, GROUP_ROWS):
            first, end = blocks_seen(case, row0, GROUP_ROWS)
            if not first <= block < end:
                rows = slice(row0, row0 + GROUP_ROWS)
                assert_same_result(
                    of_rows(ours, rows), of_rows(want, rows), (case, block, row0), dq_bitwise=True
                )


def run(case: AttnCase, x: Inputs) -> Result:
    return run_flash(x.q, x.k, x.v, causal=case.causal, **features_of(case, x.q.device))


def of_rows(result: Result, rows: slice) -> Result:
    return Result(result.out[:, rows], result.lse[:, :, rows])


BLIND = [
    AttnCase(300, sk, (2, 1), d, Mask.causal, batch=2, head_dim_v=dv)
    for d, dv in HEAD_DIMS
    for sk in (40, 130)
]


@on_hopper(*BLIND)
def test_rows_without_keys_may_hold_nan(device: str, case: AttnCase, pinned_to_sm90: None) -> None:
    """Alone in their group, or with rows that see keys."""
    x, blind = make_inputs(case, device), case.seqlen_q - case.seqlen_k
    want = run(case, x)
    x.q[:, :blind] = torch.nan
    ours = run(case, x)
    assert_same_result(ours, want, case, dq_bitwise=True)
    assert not ours.out[:, :blind].any() and (ours.lse[:, :, :blind] == torch.inf).all(), case
