"""Softcap, ALiBi, dropout and combinations in the sm90 forward kernels, pinned to them.

With windows, grouped heads, lengths that differ, sequences of different lengths, rows beyond the last
of these, and v with a head dimension of its own.  The weights that dropout takes away are the ones
that it takes away everywhere.
"""

from __future__ import annotations

from itertools import count

import pytest
import torch
from cases import (
    FEATURE_SETS,
    Alibi,
    AttnCase,
    Mask,
    VarlenCase,
    make_inputs,
    make_varlen_inputs,
)
from harness import assert_same_result, features_of, run_flash, run_varlen, varlen_keep
from hopper import GENERAL_TILES, HEAD_DIMS, check, check_varlen, on_hopper
from oracle import visible
from philox import keep_mask
from torch import Tensor

# One of each level (csrc/kernels/pieces/level.h), some with windows, and all at once.
LEVELS = [features for features in FEATURE_SETS if not features.keys() <= {"window"}]
SHAPES = [
    (130, 203, (4, 2), Mask.causal),
    (203, 113, (2, 2), Mask.none),
    (65, 300, (6, 2), Mask.none),
    (1, 129, (2, 1), Mask.causal),
    (257, 257, (3, 1), Mask.causal),
    (193, 400, (4, 1), Mask.none),
    (300, 64, (2, 1), Mask.causal),
]
DTYPES = ("bf16", "fp16")

number = count()
DENSE = [
    AttnCase(sq, sk, heads, d, mask, DTYPES[n // 7 % 2], 2, head_dim_v=dv, **features)
    for d, dv in HEAD_DIMS
    for features in LEVELS
    for _ in range(3)
    for n in (next(number),)
    for sq, sk, heads, mask in (SHAPES[n % len(SHAPES)],)
]
# Between the head dimensions that are built.
DENSE += [
    AttnCase(130, 203, (4, 2), d, Mask.causal, "fp16", 2, head_dim_v=dv, **features)
    for d, dv in ((40, 0), (104, 0), (200, 0), (136, 72))
    for features in (LEVELS[0], LEVELS[-1])
]
# Around the ring's end, whose stages K and V share.
DENSE += [
    AttnCase(150, (tile.stages + 1) * tile.block_n + more, (2, 1), d, mask, **features)
    for d, tile in GENERAL_TILES.items()
    for more, mask, features in (
        (1, Mask.causal, dict(dropout=0.2)),
        (-1, Mask.none, dict(softcap=4.0, window=(tile.block_n + 3, 5))),
    )
]


@on_hopper(*DENSE)
def test_features_match_the_oracle(device: str, case: AttnCase, pinned_to_sm90: None) -> None:
    check(case, make_inputs(case, device))


LENGTHS = [
    ((150, 0, 65, 1), (203, 40, 65, 300), (0, 0)),
    ((64, 193, 20), (300, 100, 0), (30, 9)),
    ((129, 5, 128), (1, 90, 257), (200, 0)),
]
VARLEN = [
    VarlenCase(*lengths, heads, d, mask, dtype, unused, head_dim_v=dv, **features)
    for i, (d, dv) in enumerate(HEAD_DIMS)
    for j, features in enumerate(LEVELS)
    for *lengths, unused in (LENGTHS[(i + j) % 3],)
    for heads, mask, dtype in (
        ((4, 2), Mask.causal, "bf16") if (i + j) % 2 else ((3, 1), Mask.none, "fp16"),
    )
]


@on_hopper(*VARLEN)
def test_features_of_sequences_match_the_oracle(
    device: str, case: VarlenCase, pinned_to_sm90: None
) -> None:
    """NaN in the rows of no sequence, for which there are no slopes and no random numbers either."""
    check_varlen(case, make_varlen_inputs(case, device))


# --- Which weights are dropped ----------------------------------------------------------------------

# Hundreds of rows: every sixteen of a tile.  Keys close enough for no weight to round to zero.
DROPPING = [
    AttnCase(230, 300, (4, 2), d, mask, "bf16", 2, head_dim_v=dv, dropout=p, **features)
    for d, dv in HEAD_DIMS
    for mask, p, features in (
        (Mask.causal, 0.3, {}),
        (Mask.none, 0.1, dict(window=(40, 9))),
        (Mask.none, 0.5, dict(window=(40, 20), softcap=5.0, alibi=Alibi.per_batch)),
    )
]


def zero_weights(case: AttnCase, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """(b, h, sq, sk) bool: the weights that are 0, by values that are columns of the identity.

    And (seed, offset).
    """
    sk, columns = case.seqlen_k, case.v_shape[-1]
    options = features_of(case, q.device) | dict(causal=case.causal)
    identity, found = torch.eye(sk, sk + columns, device=q.device, dtype=q.dtype), []
    for first in range(0, sk, columns):
        v = identity[:, first : first + columns].contiguous()
        ours = run_flash(q, k, v[None, :, None].expand(case.v_shape), **options)
        found.append(ours.out.transpose(1, 2) == 0)
    return torch.cat(found, -1)[..., :sk], ours.rng_state


@on_hopper(*DROPPING)
def test_the_same_weights_are_dropped_as_by_sm80(device: str, case: AttnCase, pin_isa) -> None:
    """And as by the definition.  sm80 takes v with q's head dimension: it changes no weight."""
    x = make_inputs(case, device)
    pin_isa("sm90")
    ours, rng_state = zero_weights(case, x.q, x.k)
    shape = (range(case.batch), case.heads[0], case.seqlen_q, case.seqlen_k)
    kept = keep_mask(rng_state, *shape, case.dropout, x.q.device)
    see = visible(*shape[2:], case.causal, x.q.device, case.window)
    assert torch.equal(ours, ~(kept & see)), f"definition; case {case}"
    pin_isa("sm80")
    theirs, same_state = zero_weights(case.but(head_dim_v=0), x.q, x.k)
    assert torch.equal(rng_state, same_state)
    assert torch.equal(ours, theirs), f"sm80; case {case}"


DROPPING_LENGTHS = [
    VarlenCase((150, 70, 1), (130, 90, 64), (4, 2), d, mask, "bf16", (9, 9), dropout=0.3)
    for d, mask in ((64, Mask.none), (128, Mask.causal), (256, Mask.none))
]


@on_hopper(*DROPPING_LENGTHS)
@pytest.mark.parametrize("isa", ["sm90", "sm80"])
def test_the_weights_of_sequences_that_are_dropped(
    device: str, case: VarlenCase, isa: str, pin_isa
) -> None:
    """Each sequence has its own random numbers, which begin at its own first row and key."""
    pin_isa(isa)
    x = make_varlen_inputs(case, device)
    x.v.zero_()
    for first, n in zip(x.cu_seqlens_k.tolist(), case.lengths_k):
        identity = torch.eye(n, case.head_dim, device=device, dtype=x.v.dtype)
        x.v[first : first + n] = identity[:, None]
    ours = run_varlen(x, causal=case.causal, backward=False, dropout_p=case.dropout)
    masks, begin = varlen_keep(case, ours.rng_state, x.q.device), 0
    for sq, sk, kept in zip(case.lengths_q, case.lengths_k, masks):
        see, seen = visible(sq, sk, case.causal, x.q.device), min(sk, case.head_dim)
        shown = ours.out[begin : begin + sq].transpose(0, 1)[..., :seen] != 0
        assert torch.equal(shown, (kept[0] & see)[..., :seen]), (sq, sk, case)
        begin += sq


# --- What masks hide ---------------------------------------------------------------------------------

UNSEEN = [
    AttnCase(100, 500, (2, 1), d, Mask.causal, window=(20, 0), head_dim_v=dv, **features)
    for d, dv in HEAD_DIMS
    for features in (dict(softcap=4.0), dict(alibi=Alibi.per_head), dict(dropout=0.2))
]


@on_hopper(*UNSEEN)
def test_what_nobody_sees_may_hold_nan(device: str, case: AttnCase, pinned_to_sm90: None) -> None:
    """Softcap and ALiBi come before the mask: NaN of a hidden key goes through them."""
    x, options = make_inputs(case, device), features_of(case, device) | dict(causal=True)
    want = run_flash(x.q, x.k, x.v, **options)
    first_seen = case.seqlen_k - case.seqlen_q - case.window[0]
    x.k[:, :first_seen], x.v[:, :first_seen] = torch.nan, torch.nan
    assert_same_result(run_flash(x.q, x.k, x.v, **options), want, case, dq_bitwise=True)


BLIND = [
    AttnCase(300, 130, (2, 1), d, Mask.causal, batch=2, head_dim_v=dv, **features)
    for d, dv in HEAD_DIMS
    for features in (LEVELS[0], LEVELS[-1])
]


@on_hopper(*BLIND)
def test_rows_without_keys_may_hold_nan(device: str, case: AttnCase, pinned_to_sm90: None) -> None:
    x, options = make_inputs(case, device), features_of(case, device) | dict(causal=True)
    want = run_flash(x.q, x.k, x.v, **options)
    see = visible(case.seqlen_q, case.seqlen_k, True, x.q.device, case.window)
    x.q[:, ~see.any(1)] = torch.nan
    ours = run_flash(x.q, x.k, x.v, **options)
    assert_same_result(ours, want, case, dq_bitwise=True)
    blind = ~see.any(1)
    assert not ours.out[:, blind].any() and (ours.lse[:, :, blind] == torch.inf).all(), case
