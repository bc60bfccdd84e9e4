"""ALiBi: -slope * |i + seqlen_k - seqlen_q - j| is added to the scores."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import cycle, product

import pytest
import torch
from cases import (
    UNLIMITED,
    Alibi,
    AttnCase,
    Mask,
    everywhere,
    make_alibi,
    make_dlse,
    make_inputs,
    on_devices,
)
from harness import (
    assert_bitwise,
    assert_same_result,
    check_case,
    run_flash,
)
from oracle import attention_oracle, attention_peer, check_result
from torch import Tensor

from flash_attn._head_dims import HEAD_DIMS as DIMS

HALF = ("fp16", "bf16")
LENGTHS = (
    *((97, 97), (113, 203), (203, 113), (1, 300), (300, 1), (257, 257), (64, 512), (129, 65)),
    *((512, 128), (31, 33), (160, 160)),
)
GROUPS = ((2, 1), (4, 2), (3, 3), (6, 1), (12, 4))
SLOPES = (Alibi.per_head, Alibi.per_batch)
WINDOWS = (UNLIMITED, UNLIMITED, (40, 0), (64, 30), (-1, 10))


def alibi_cases() -> Iterator[AttnCase]:
    lengths, heads, dtype, window = (cycle(x) for x in (LENGTHS, GROUPS, HALF, WINDOWS))
    for head_dim, mask, alibi, _ in product(DIMS, Mask, SLOPES, range(8)):
        shape = (*next(lengths), next(heads), head_dim, mask, next(dtype), 2)
        yield AttnCase(*shape, window=next(window), alibi=alibi)
    for head_dim, mask in product((1, 33, 40, 72, 111, 160, 200), Mask):
        yield AttnCase(113, 150, (4, 2), head_dim, mask, next(dtype), 2, alibi=Alibi.per_batch)


def cpu_alibi_cases() -> Iterator[AttnCase]:
    dtype = cycle(("fp32", "bf16", "fp32", "fp64", "fp16"))
    for index, case in enumerate(alibi_cases()):
        if index % 5 == 1:
            yield case.but(dtype=next(dtype))


@on_devices(cpu=cpu_alibi_cases(), cuda=alibi_cases())
def test_alibi_matches_oracle(device: str, case: AttnCase) -> None:
    check_case(case, make_inputs(case, device))


FEW = [
    AttnCase(130, 193, (4, 2), 64, Mask.causal, batch=2, alibi=Alibi.per_head),
    AttnCase(130, 193, (4, 2), 128, Mask.causal, "fp16", 2, (50, 0), alibi=Alibi.per_batch),
    AttnCase(193, 130, (6, 2), 96, Mask.causal, "bf16", 2, (40, 40), alibi=Alibi.per_head),
    AttnCase(193, 130, (4, 2), 40, Mask.none, "fp16", 2, alibi=Alibi.per_batch),
]


@everywhere(*FEW)
@pytest.mark.parametrize("deterministic", [False, True], ids=["default", "deterministic"])
def test_lse_is_of_the_documented_bias(device: str, case: AttnCase, deterministic: bool) -> None:
    """Not shifted by slope * position, as the causal LSE of flash-attn 2.8 is; its gradient is used too."""
    x, slopes = make_inputs(case, device), make_alibi(case, device)
    ours = check_case(case, x, dlse=make_dlse(case, device), deterministic=deterministic)
    for row, head in ((case.seqlen_q - 1, 0), (case.seqlen_q - 40, 3)):
        key_head = head // (case.heads[0] // case.heads[1])
        position = row + case.seqlen_k - case.seqlen_q
        left = case.window[0] if case.window[0] >= 0 else position
        right = 0 if case.causal else case.seqlen_k
        keys = torch.arange(case.seqlen_k, device=device)
        keys = keys[(keys >= position - left) & (keys <= position + right)]
        slope = (slopes if slopes.dim() == 1 else slopes[1])[head].double()
        scores = x.k[1, keys, key_head].double() @ x.q[1, row, head].double() * case.scale
        want = (scores - slope * (position - keys).abs()).logsumexp(0)
        torch.testing.assert_close(ours.lse[1, head, row].double(), want, rtol=1e-5, atol=1e-5)


@everywhere(*FEW)
def test_equal_slopes_of_all_batches_are_slopes_per_head(device: str, case: AttnCase) -> None:
    x = make_inputs(case, device)
    slopes = make_alibi(case.but(alibi=Alibi.per_head), device)
    options = dict(causal=case.causal, window_size=case.window, deterministic=True)
    want = run_flash(x.q, x.k, x.v, x.dout, alibi_slopes=slopes, **options)
    wide = torch.full((case.batch, 2 * case.heads[0]), torch.nan, device=device)
    strided = wide[:, : case.heads[0]].copy_(slopes)
    for name, same in (
        ("repeated", slopes.repeat(case.batch, 1)),
        ("expanded", slopes.expand(case.batch, -1)),
        ("strided", strided),
    ):
        ours = run_flash(x.q, x.k, x.v, x.dout, alibi_slopes=same, **options)
        assert_same_result(ours, want, f"{case}, {name}", dq_bitwise=True)


@everywhere(
    AttnCase(65, 97, (1, 1), 64, Mask.causal, batch=2, alibi=Alibi.per_head),
    AttnCase(97, 65, (1, 1), 128, Mask.none, "fp16", 1, alibi=Alibi.per_head),
)
def test_slopes_of_one_head_have_any_stride(device: str, case: AttnCase) -> None:
    """Contiguous as torch sees it: the stride of a dimension of size 1 means nothing."""
    x, slope = make_inputs(case, device), make_alibi(case, device)
    want = run_flash(
        x.q, x.k, x.v, x.dout, causal=case.causal, alibi_slopes=slope, deterministic=True
    )
    spread = torch.full((16,), torch.nan, device=device)
    spread[: 5 * case.batch : 5] = slope
    for shape, stride in (((1,), (7,)), ((1,), (0,)), ((case.batch, 1), (5, 3))):
        same = spread.as_strided(shape, stride)
        ours = run_flash(
            x.q, x.k, x.v, x.dout, causal=case.causal, alibi_slopes=same, deterministic=True
        )
        assert_same_result(ours, want, f"{case}, strides {stride}", dq_bitwise=True)


@everywhere(*FEW)
def test_each_head_and_batch_has_its_slope(device: str, case: AttnCase) -> None:
    """Another slope of one (batch, head) changes its own results alone."""
    x = make_inputs(case, device)
    slopes = make_alibi(case.but(alibi=Alibi.per_batch), device)
    options = dict(causal=case.causal, window_size=case.window)
    want = run_flash(x.q, x.k, x.v, alibi_slopes=slopes, **options).lse
    other = slopes.clone()
    other[1, 2] += 0.5
    lse = run_flash(x.q, x.k, x.v, alibi_slopes=other, **options).lse
    assert not torch.equal(lse[1, 2], want[1, 2]), case
    lse[1, 2] = want[1, 2]
    assert_bitwise("lse", lse, want, case)


@everywhere(*(case.but(alibi=Alibi.none) for case in FEW))
def test_slopes_of_zero_change_nothing(device: str, case: AttnCase) -> None:
    x = make_inputs(case, device)
    options = dict(causal=case.causal, window_size=case.window)
    plain = run_flash(x.q, x.k, x.v, **options)
    zero = torch.zeros(case.heads[0], device=device)
    ours = run_flash(x.q, x.k, x.v, alibi_slopes=zero, **options)
    want = attention_oracle(x.q, x.k, x.v, scale=case.scale, **options)
    for name in ("out", "lse"):
        error = (getattr(plain, name).double() - getattr(want, name)).nan_to_num().abs().max()
        other = (getattr(ours, name).double() - getattr(want, name)).nan_to_num().abs().max()
        assert other <= 2 * error + 1e-5, f"{name}: {other:.3g}, without slopes {error:.3g}; {case}"


def check_slope(case: AttnCase, device: str, slope: float) -> None:
    x = make_inputs(case, device)
    slopes = torch.full((case.heads[0],), slope, device=device)
    options = dict(causal=case.causal, window_size=case.window, alibi_slopes=slopes)
    ours = run_flash(x.q, x.k, x.v, x.dout, **options)
    want = attention_oracle(x.q, x.k, x.v, x.dout, scale=case.scale, **options)
    peer = attention_peer(x.q, x.k, x.v, x.dout, scale=case.scale, **options)
    check_result(ours, peer, want, case=case)


@everywhere(*FEW)
def test_a_negative_slope_prefers_distant_keys(device: str, case: AttnCase) -> None:
    check_slope(case, device, -0.05)


@everywhere(*(case for case in FEW if case.seqlen_q <= case.seqlen_k))
@pytest.mark.parametrize("slope", [8.0, 300.0], ids=str)
def test_a_steep_slope_leaves_the_nearest_key(device: str, case: AttnCase, slope: float) -> None:
    check_slope(case, device, slope)


@everywhere(
    AttnCase(16, 100_000, (2, 2), 64, Mask.causal, "bf16"),
    AttnCase(16, 100_000, (2, 2), 64, Mask.none, "fp16"),
    AttnCase(33, 70_001, (2, 1), 128, Mask.causal, "bf16"),
)
@pytest.mark.parametrize("slope", [1.0, 2.0**-8, 1e-4], ids=str)
def test_distances_of_100_000_are_exact(device: str, case: AttnCase, slope: float) -> None:
    """slope * column alone loses bits in fp32: out and LSE against fp64."""
    x = make_inputs(case, device)
    check_far(case, x.q, x.k, x.v, slope)


@everywhere(
    AttnCase(16, 100_000, (2, 2), 64, Mask.none), AttnCase(16, 100_000, (2, 2), 64, Mask.causal)
)
def test_a_far_key_that_prevails(device: str, case: AttnCase) -> None:
    """A large score far away against a bias of -1000: their difference is what counts."""
    x = make_inputs(case, device)
    q = torch.full_like(x.q, 4.0)
    k = x.k * 0.25
    k[:, 7] = 31.0  # scores of 4 * 31 * 64 / 8 = 992
    check_far(case, q, k, x.v, 0.01)


def check_far(case: AttnCase, q: Tensor, k: Tensor, v: Tensor, slope: float) -> None:
    slopes = torch.full((case.heads[0],), slope, device=q.device)
    ours = run_flash(q, k, v, causal=case.causal, alibi_slopes=slopes)
    exact = dict(scale=case.scale, causal=case.causal, alibi_slopes=slopes)
    want = attention_oracle(q, k, v, **exact)
    error = (ours.lse.double() - want.lse).abs().max().item()
    # 100,000 fp32 terms, 25,000 of them added one after the other.
    limit = 2e-6 * (1 + want.lse.abs().max().item()) + 1e-4
    assert error < limit, f"lse is off by {error:.3g} (limit {limit:.3g}); case {case}"
    eps = torch.finfo(ours.out.dtype).eps
    worst = (ours.out.double() - want.out).abs().max().item()
    limit = 2 * eps * want.out.abs().max().item() + 1e-4
    assert worst < limit, f"out is off by {worst:.3g} (limit {limit:.3g}); case {case}"
