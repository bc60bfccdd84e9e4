"""Large and special values, extreme scales, and errors that must not be biased."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from cases import AttnCase, Inputs, Mask, everywhere, generator, make_inputs, on_devices
from harness import assert_nearly, check_case, run_flash
from oracle import attention_oracle, attention_peer

from flash_attn._head_dims import HEAD_DIMS

HALF = ("fp16", "bf16")
SHAPE = AttnCase(130, 193, (2, 1), 64, Mask.causal)
DIMS = [SHAPE.but(head_dim=d) for d in HEAD_DIMS]
on_all_head_dims = on_devices(
    cpu=[SHAPE.but(dtype=dtype) for dtype in ("fp32", "bf16")],
    cuda=[case.but(dtype=dtype) for case in DIMS for dtype in HALF],
)


@on_all_head_dims
@pytest.mark.parametrize("factors", [(5, 3, 3), (50, 1, 1), (1, 50, 3), (20, 20, 1)], ids=str)
def test_large_logits(device: str, case: AttnCase, factors: tuple[int, int, int]) -> None:
    """Softmax close to one-hot; the largest scores are some thousands."""
    x = make_inputs(case, device)
    x.q, x.k, x.v = (t * f for t, f in zip((x.q, x.k, x.v), factors))
    check_case(case, x)


@on_all_head_dims
@pytest.mark.parametrize("scale", [0.0, -0.125, -1.0, 1e-6, 1e-30, 1.0, 10.0], ids=str)
def test_softmax_scale(device: str, case: AttnCase, scale: float) -> None:
    check_case(case, make_inputs(case, device), scale=scale)


@on_all_head_dims
@pytest.mark.parametrize("mask", list(Mask), ids=lambda m: m.value)
def test_negative_scale_with_hidden_and_ragged_keys(
    device: str, case: AttnCase, mask: Mask
) -> None:
    """Hidden keys are -inf after scaling, not before: a negative scale must not turn them round."""
    for seqlen_q, seqlen_k in ((1, 1), (65, 33), (300, 100), (17, 129)):
        shape = case.but(seqlen_q=seqlen_q, seqlen_k=seqlen_k, mask=mask)
        check_case(shape, make_inputs(shape, device), scale=-0.3)


@on_all_head_dims
def test_scale_given_as_the_default_changes_nothing(device: str, case: AttnCase) -> None:
    x = make_inputs(case, device)
    default = run_flash(x.q, x.k, x.v, causal=True)
    given = run_flash(x.q, x.k, x.v, causal=True, softmax_scale=case.scale)
    assert torch.equal(default.out, given.out) and torch.equal(default.lse, given.lse)


@on_all_head_dims
@pytest.mark.parametrize("magnitude", [2.0**7, 2.0**10, 2.0**15], ids=str)
def test_huge_inputs_stay_finite(device: str, case: AttnCase, magnitude: float) -> None:
    """Scores up to 1e11, exact in fp32: the weights are one-hot but for ties, nothing overflows."""
    x = make_inputs(case, device)
    signs = [torch.where(t > 0, magnitude, -magnitude).to(t.dtype) for t in (x.q, x.k)]
    ours = run_flash(*signs, x.v, causal=True, softmax_scale=0.125)
    want = attention_oracle(*signs, x.v, scale=0.125, causal=True)
    assert ours.out.isfinite().all() and ours.lse.isfinite().all(), case
    assert_nearly("out", ours.out.double(), want.out, case, eps=torch.finfo(ours.out.dtype).eps)
    relative = ((ours.lse.double() - want.lse) / want.lse).abs().max().item()
    assert relative < 1e-5, f"lse is off by {relative:.3g} of its value; case {case}"


@on_all_head_dims
def test_large_values_do_not_overflow_the_sum(device: str, case: AttnCase) -> None:
    """Values near fp16's maximum, all of one sign: their average is in range, their sum is not."""
    x = make_inputs(case, device)
    x.v = (x.v.abs() * 1000 + 5e4).clamp(max=6e4)
    ours = run_flash(x.q, x.k, x.v, causal=True)
    assert ours.out.isfinite().all(), case
    assert ours.out.min() >= 4.9e4 and ours.out.max() <= 6.1e4, case


@on_all_head_dims
def test_ascending_scores_rescale_correctly(device: str, case: AttnCase) -> None:
    """Each key beats the ones before it (or, flipped, those after): the running maximum moves."""
    x = make_inputs(case.but(seqlen_q=257, seqlen_k=513, mask=Mask.none), device)
    steps = torch.linspace(-8, 8, 513, device=device).to(x.k.dtype)
    shape = case.but(seqlen_q=257, seqlen_k=513, mask=Mask.none)
    for order in (steps, steps.flip(0), torch.where(steps.abs() < 1, steps + 12, steps)):
        k = x.k * 0.1 + order[None, :, None, None]
        check_case(shape, Inputs(x.q.abs(), k, x.v, x.dout))


@on_devices(
    cpu=[AttnCase(1024, 1024, (2, 2), 64, mask, "bf16") for mask in Mask],
    cuda=[
        AttnCase(2048, 2048, (4, 4), d, mask, dtype)
        for d, mask, dtype in product((64, 128, 256), Mask, HALF)
    ],
)
@pytest.mark.parametrize("repeated", [1.0, 0.5], ids=["all_equal", "half_at_the_maximum"])
def test_rounding_is_not_biased_where_the_maximum_repeats(
    device: str, case: AttnCase, repeated: float
) -> None:
    """Equal keys: weights are equal, so many unnormalised weights are exactly 1."""
    x = make_inputs(case, device)
    k = x.k[:, :1].expand(case.kv_shape).clone()
    if repeated < 1:
        gen = generator(case, device, 1)
        lower = torch.rand(case.seqlen_k, generator=gen, device=device) >= repeated
        k[:, lower] = x.k[:, lower]
    v = x.v - 1  # one sign prevails, as in the training runs where the bias was found
    ours = run_flash(x.q, k, v, causal=case.causal)
    want = attention_oracle(x.q, k, v, scale=case.scale, causal=case.causal)
    ulp = torch.finfo(ours.out.dtype).eps * 2.0 ** want.out.abs().log2().floor()
    error = ((ours.out.double() - want.out) / ulp)[:, 16:]
    noise = error.std().item() / (case.batch * case.heads[0] * case.head_dim) ** 0.5
    assert abs(error.mean().item()) < 0.01 + 5 * noise, f"bias {error.mean():.4f} ulp; case {case}"


@everywhere(*DIMS, SHAPE.but(dtype="fp16"), SHAPE.but(mask=Mask.none, head_dim=128))
def test_identical_values_give_no_gradient_to_scores(device: str, case: AttnCase) -> None:
    """All V rows equal: out does not depend on the weights, so dq and dk vanish up to rounding."""
    x = make_inputs(case, device)
    v = x.v[:, :1].expand(case.kv_shape).contiguous()
    ours = run_flash(x.q, x.k, v, x.dout, causal=case.causal)
    peer = attention_peer(x.q, x.k, v, x.dout, scale=case.scale, causal=case.causal)
    products = (x.dout.double() * v.double().amax(1, keepdim=True).repeat_interleave(2, 2)).abs()
    one_rounding = torch.finfo(x.q.dtype).eps * case.scale * products.sum(-1).max().item()
    for name, other in (("dq", x.k), ("dk", x.q)):
        limit = 3 * getattr(peer, name).abs().max() + one_rounding * other.abs().max()
        largest = getattr(ours, name).abs().max()
        assert largest <= limit, f"{name}: {largest:.3g} (limit {limit:.3g}); case {case}"


@everywhere(*DIMS)
def test_zero_inputs(device: str, case: AttnCase) -> None:
    x = make_inputs(case, device)
    zero = torch.zeros_like
    for q, k in ((zero(x.q), x.k), (x.q, zero(x.k)), (zero(x.q), zero(x.k))):
        check_case(case, Inputs(q, k, x.v, x.dout))
    ours = run_flash(x.q, x.k, x.v, zero(x.dout), causal=True)
    assert not ours.dq.any() and not ours.dk.any() and not ours.dv.any(), case
    ours = run_flash(x.q, x.k, zero(x.v), x.dout, causal=True)
    assert not ours.out.any() and not ours.dq.any() and not ours.dk.any(), case


@everywhere(*DIMS)
def test_nan_and_inf_in_a_query_stay_in_its_row(device: str, case: AttnCase) -> None:
    """A NaN is not hidden: its own row is NaN, all others are as without it."""
    x = make_inputs(case, device)
    clean = run_flash(x.q, x.k, x.v, causal=True).out
    for value in (torch.nan, torch.inf):
        q = x.q.clone()
        q[0, 70, 1, 3] = value
        out = run_flash(q, x.k, x.v, causal=True).out
        assert out[0, 70, 1].isnan().all(), f"{value}; case {case}"
        out[0, 70, 1] = clean[0, 70, 1]
        assert_nearly("out", out, clean, f"{value} in q; case {case}")


SQUARE = [SHAPE.but(seqlen_q=150, seqlen_k=150, head_dim=d) for d in (64, 128)]


@everywhere(*SQUARE, SQUARE[0].but(dtype="fp16"))
@pytest.mark.parametrize("scale", [0.0, -0.3], ids=str)
def test_scale_0_and_negative_with_as_many_queries_as_keys(
    device: str, case: AttnCase, scale: float
) -> None:
    """The kernel that other libraries use for this shape scales what is hidden: -inf * 0."""
    check_case(case, make_inputs(case, device), scale=scale)


FP32 = [AttnCase(64, 64, (4, 4), 32, mask, "fp32") for mask in Mask]
FP32 += [AttnCase(191, 191, (2, 1), 128, Mask.causal, "fp32"), AttnCase(90, 150, dtype="fp32")]


@on_devices(cpu=FP32)
@pytest.mark.parametrize("factor", [1.0, 2.0, 5.0])
def test_fp32_holds_its_bound_where_few_keys_have_the_weight(
    device: str, case: AttnCase, factor: float
) -> None:
    """Plain attention has a weight of 1 there; ours is recomputed from the rounded score and LSE."""
    for salt in range(3):
        x = make_inputs(case, device, salt)
        check_case(case, Inputs(x.q * factor, x.k * factor, x.v * factor, x.dout))
