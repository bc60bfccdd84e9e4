"""The oracle is the definition: loops over scalars, and finite differences for its gradients."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from cases import Alibi, AttnCase, Mask, generator, make_alibi, make_dlse, make_inputs, randn
from oracle import attention_oracle, attention_peer, check_result, per_sequence
from torch import Tensor

SCALE = 0.7
CASES = [
    AttnCase(5, 7, (4, 2), 3, Mask.causal, "fp64", 2, (3, 0)),
    AttnCase(7, 4, (3, 1), 2, Mask.none, "fp64", 1, (2, 1)),
    AttnCase(4, 6, (2, 2), 5, Mask.none, "fp64", softcap=1.5),
    AttnCase(6, 4, (2, 1), 3, Mask.causal, "fp64", 2, alibi=Alibi.per_head),
    AttnCase(4, 6, (2, 1), 3, Mask.none, "fp64", 2, alibi=Alibi.per_batch),
    AttnCase(5, 6, (2, 1), 4, Mask.none, "fp64", 2, dropout=0.4),
    AttnCase(6, 5, (4, 2), 4, Mask.causal, "fp64", 2, (2, -1), 0.8, Alibi.per_batch, 0.3),
]


def features(case: AttnCase) -> dict[str, Any]:
    gen = generator(case, "cpu", salt=5)
    shape = (case.batch, case.heads[0], case.seqlen_q, case.seqlen_k)
    keep = torch.rand(shape, generator=gen) >= case.dropout if case.dropout else None
    return dict(
        scale=SCALE,
        causal=case.causal,
        window_size=case.window,
        softcap=case.softcap,
        alibi_slopes=make_alibi(case, "cpu"),
        dropout_p=case.dropout,
        keep=keep,
    )


def score(case: AttnCase, q: Tensor, k: Tensor, after: int, slope: float) -> float:
    """Of one query and key, the key `after` positions to the right of the query's own."""
    value = SCALE * float(q @ k)
    if case.softcap:
        value = case.softcap * math.tanh(value / case.softcap)
    return value - slope * abs(after)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_are_the_definition(case: AttnCase) -> None:
    x, options = make_inputs(case, "cpu"), features(case)
    want = attention_oracle(x.q, x.k, x.v, **options)
    slopes, keep = options["alibi_slopes"], options["keep"]
    left, right = (side if side >= 0 else math.inf for side in case.window)
    right = 0 if case.causal else right
    for b, h, i in itertools.product(range(case.batch), range(case.heads[0]), range(case.seqlen_q)):
        head_kv = h // (case.heads[0] // case.heads[1])
        slope = 0.0
        if slopes is not None:
            slope = float(slopes[h] if slopes.dim() == 1 else slopes[b, h])
        total, out = 0.0, torch.zeros(case.head_dim, dtype=torch.float64)
        for j in range(case.seqlen_k):
            after = j - (i + case.seqlen_k - case.seqlen_q)
            if not -left <= after <= right:
                continue
            weight = math.exp(score(case, x.q[b, i, h], x.k[b, j, head_kv], after, slope))
            total += weight
            if keep is None or keep[b, h, i, j]:
                out += weight / (1 - case.dropout) * x.v[b, j, head_kv]
        lse = math.log(total) if total else math.inf
        assert math.isclose(float(want.lse[b, h, i]), lse), (b, h, i)
        torch.testing.assert_close(want.out[b, i, h], out / total if total else out)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradients_are_finite_differences(case: AttnCase) -> None:
    x, options, dlse = make_inputs(case, "cpu"), features(case), make_dlse(case, "cpu")
    want = attention_oracle(x.q, x.k, x.v, x.dout, dlse=dlse, **options)

    def loss(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        result = attention_oracle(q, k, v, **options)
        lse = torch.where(result.lse.isinf(), 0.0, result.lse)
        return (result.out * x.dout).sum() + (lse * dlse).sum()

    step = 1e-6
    for index, name in enumerate(("dq", "dk", "dv")):
        inputs = [x.q, x.k, x.v]
        direction = randn(inputs[index].shape, torch.float64, generator(case, "cpu", 1))
        ahead, behind = list(inputs), list(inputs)
        ahead[index] = inputs[index] + step * direction
        behind[index] = inputs[index] - step * direction
        slope = float(loss(*ahead) - loss(*behind)) / (2 * step)
        expected = float((getattr(want, name) * direction).sum())
        assert math.isclose(slope, expected, rel_tol=1e-6, abs_tol=1e-7), name


@pytest.mark.parametrize("case", CASES, ids=str)
def test_peer_agrees_in_fp64(case: AttnCase) -> None:
    x, options, dlse = make_inputs(case, "cpu"), features(case), make_dlse(case, "cpu")
    want = attention_oracle(x.q, x.k, x.v, x.dout, dlse=dlse, **options)
    peer = attention_peer(x.q, x.k, x.v, x.dout, dlse=dlse, **options)
    for name in ("out", "lse", "dq", "dk", "dv"):
        torch.testing.assert_close(getattr(peer, name), getattr(want, name))


def test_sequences_are_taken_apart() -> None:
    """Two sequences, one without keys, and a row of none."""
    case = AttnCase(7, 6, (2, 1), 3, Mask.causal, "fp64", alibi=Alibi.per_head)
    x, slopes = make_inputs(case, "cpu"), torch.tensor([[0.5, 0.1], [0.2, 0.3], [0.9, 0.4]])
    packed = [t[0] for t in (x.q, x.k, x.v, x.dout)]
    ours = per_sequence(
        *(attention_oracle, *packed),
        cu_seqlens_q=[0, 2, 4, 6],
        cu_seqlens_k=[0, 5, 5, 6],
        scale=SCALE,
        causal=True,
        alibi_slopes=slopes,
    )
    for n, rows, cols in ((0, slice(0, 2), slice(0, 5)), (2, slice(4, 6), slice(5, 6))):
        inputs = (x.q[:, rows], x.k[:, cols], x.v[:, cols], x.dout[:, rows])
        want = attention_oracle(*inputs, scale=SCALE, causal=True, alibi_slopes=slopes[n])
        torch.testing.assert_close(ours.out[rows], want.out[0])
        torch.testing.assert_close(ours.lse[:, rows], want.lse[0])
        torch.testing.assert_close(ours.dq[rows], want.dq[0])
        torch.testing.assert_close(ours.dk[cols], want.dk[0])
        torch.testing.assert_close(ours.dv[cols], want.dv[0])
    for rows in (slice(2, 4), slice(6, 7)):
        assert not ours.out[rows].any() and not ours.dq[rows].any()
        assert (ours.lse[:, rows] == torch.inf).all()


def test_slack_of_dv_excuses_rounding_alone() -> None:
    """With one key dv is a sum of dout: weights that are off by the rounding of a score pass, others do not."""
    case = AttnCase(40, 1, (2, 1), 192, Mask.none, "fp32")
    x = make_inputs(case, "cpu")
    options = dict(scale=case.scale, causal=case.causal)
    want, peer = (
        attend(x.q, x.k, x.v, x.dout, **options) for attend in (attention_oracle, attention_peer)
    )
    slack = float((want.dv_slack / want.dv.abs().clamp(min=1e-3)).median())
    assert 0 < slack < 1e-4

    def check(error: float) -> None:
        ours = replace(peer, dv=peer.dv * (1 + error))
        check_result(ours, peer, want, case=case)

    check(0.0), check(1e-6)
    with pytest.raises(AssertionError, match="dv"):
        check(1e-4)
    want = replace(want, dv_slack=torch.full_like(want.dv_slack, torch.inf))
    with pytest.raises(AssertionError, match="dv"):
        check(1e-4)
