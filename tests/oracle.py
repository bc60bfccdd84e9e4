"""What attention is: a dense fp64 oracle with explicit gradients, and the rule for judging others.

Shares nothing with the package.  The peer is the same mathematics in the inputs' own precision with
ordinary torch operations; an implementation may be at most a small factor worse than its peer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass
class Result:
    """out, dq (b, sq, h, d); lse (b, h, sq); dk, dv (b, sk, hk, d). Gradients may be absent.

    out and dv have v's own d where it has one.

    Variable length: out, dq (total_q, h, d); lse (h, total_q); dk, dv (total_k, hk, d).
    rng_state: the (seed, offset) of an implementation's dropout.
    out_slack, dq_slack, ...: what of an error an oracle does not count; see _delta_rounding and
    _weight_rounding.
    """

    out: Tensor
    lse: Tensor | None
    dq: Tensor | None = None
    dk: Tensor | None = None
    dv: Tensor | None = None
    rng_state: Tensor | None = None
    out_slack: Tensor | None = None
    dq_slack: Tensor | None = None
    dk_slack: Tensor | None = None
    dv_slack: Tensor | None = None


def offsets(seqlen_q: int, seqlen_k: int, device: torch.device) -> Tensor:
    """(sq, sk): how many keys after the query's own position a key lies; last aligned with last."""
    i = torch.arange(seqlen_q, device=device)[:, None]
    j = torch.arange(seqlen_k, device=device)[None, :]
    return j - i - (seqlen_k - seqlen_q)


def visible(
    seqlen_q: int,
    seqlen_k: int,
    causal: bool,
    device: torch.device,
    window_size: tuple[int, int] = (-1, -1),
) -> Tensor:
    """(sq, sk) bool: query i sees key j. A negative side of the window is unlimited."""
    after = offsets(seqlen_q, seqlen_k, device)
    left, right = window_size
    see = torch.ones_like(after, dtype=torch.bool)
    if left >= 0:
        see &= after >= -left
    if right >= 0:
        see &= after <= right
    return see & (after <= 0) if causal else see


def alibi_bias(slopes: Tensor, seqlen_q: int, seqlen_k: int, dtype: torch.dtype) -> Tensor:
    """(1 or b, h, sq, sk): -slope * distance, for slopes (h,) or (b, h)."""
    distance = offsets(seqlen_q, seqlen_k, slopes.device).abs().to(dtype)
    return -slopes.to(dtype).reshape(-1, slopes.shape[-1], 1, 1) * distance


def _per_query_head(x: Tensor, heads: int) -> Tensor:
    """(b, s, hk, d) -> (b, h, s, d): query head i reads key/value head i // (h / hk)."""
    index = torch.arange(heads, device=x.device) // (heads // x.shape[2])
    return x.index_select(2, index).transpose(1, 2)


def _per_kv_head(x: Tensor, heads_kv: int) -> Tensor:
    """(b, h, s, d) -> (b, s, hk, d), summed over each group of query heads."""
    batch, heads, seqlen, dim = x.shape
    return x.view(batch, heads_kv, heads // heads_kv, seqlen, dim).sum(2).transpose(1, 2)


def attention_oracle(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dout: Tensor | None = None,
    *,
    scale: float,
    causal: bool,
    dlse: Tensor | None = None,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    dropout_p: float = 0.0,
    keep: Tensor | None = None,
) -> Result:
    """fp64 attention by its definition; gradients of sum(out * dout) + sum(lse * dlse).

    keep (b, h, sq, sk) bool: the weights that dropout leaves.
    """
    heads, heads_kv = q.shape[2], k.shape[2]
    see = visible(q.shape[1], k.shape[1], causal, q.device, window_size)
    query = q.detach().double().transpose(1, 2)
    key = _per_query_head(k.detach().double(), heads)
    value = _per_query_head(v.detach().double(), heads)

    scores = scale * (query @ key.transpose(2, 3))
    slope: Tensor | float = 1.0  # of the capped scores by the scores
    if softcap:
        bent = torch.tanh(scores / softcap)
        scores, slope = softcap * bent, 1 - bent * bent
    if alibi_slopes is not None:
        scores = scores + alibi_bias(alibi_slopes, q.shape[1], k.shape[1], torch.float64)
    weights = torch.where(see, scores, -torch.inf)
    if k.shape[1]:
        top = weights.amax(-1, keepdim=True)
        top = torch.where(top == -torch.inf, torch.zeros_like(top), top)
    else:
        top = weights.new_zeros(*weights.shape[:-1], 1)
    weights = torch.where(see, torch.exp(scores - top), 0.0)
    total = weights.sum(-1, keepdim=True)
    empty = total == 0
    lse = torch.where(empty, torch.inf, total.log() + top).squeeze(-1)
    weights = torch.where(empty, 0.0, weights / total)
    kept = 1.0 if keep is None else keep / (1 - dropout_p)
    out = (weights * kept) @ value
    out_slack = (_exp_rounding(q.dtype) * ((weights * kept) @ value.abs())).transpose(1, 2)
    if dout is None and dlse is None:
        return Result(out.transpose(1, 2), lse, out_slack=out_slack)

    grad = torch.zeros_like(query) if dout is None else dout.detach().double().transpose(1, 2)
    grad_weights = kept * (grad @ value.transpose(2, 3))
    mean = (grad_weights * weights).sum(-1, keepdim=True)
    if dlse is not None:
        mean = mean - dlse.detach().double().unsqueeze(-1)
    grad_scores = weights * (grad_weights - mean) * slope
    result = Result(
        out.transpose(1, 2),
        lse,
        (scale * (grad_scores @ key)).transpose(1, 2),
        _per_kv_head(scale * (grad_scores.transpose(2, 3) @ query), heads_kv),
        _per_kv_head((weights * kept).transpose(2, 3) @ grad, heads_kv),
        out_slack=out_slack,
    )
    by_delta = scale * weights * slope * _delta_rounding(out * grad, q.dtype)
    by_weight = abs(scale) * grad_scores.abs() * _weight_rounding(scale, query, key, q.dtype)
    result.dq_slack = ((by_delta @ key).abs() + by_weight @ key.abs()).transpose(1, 2)
    most = _per_kv_head(by_delta.abs().transpose(2, 3) @ query.abs(), heads_kv)
    square = _per_kv_head(by_delta.square().transpose(2, 3) @ query.square(), heads_kv)
    result.dk_slack = torch.minimum(most, 1.5 * square.sqrt())
    result.dk_slack += _per_kv_head(by_weight.transpose(2, 3) @ query.abs(), heads_kv)
    by_weight = weights * kept * _weight_rounding(scale, query, key, q.dtype)
    result.dv_slack = _per_kv_head(by_weight.transpose(2, 3) @ grad.abs(), heads_kv)
    return result


def _weight_rounding(scale: float, query: Tensor, key: Tensor, dtype: torch.dtype) -> Tensor:
    """The relative error of a weight that is recomputed as exp(score - lse).

    It has the roundings of the products query @ key^T, added up in whatever order, of both passes,
    which differ where these multiply tiles of different shapes; and that of lse's exponentials.  The
    peer divides by a sum of the same numbers: where one key has all the weight, it is 1 exactly.
    """
    eps = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    return 2 * eps * abs(scale) * (query.abs() @ key.abs().mT) + _exp_rounding(dtype)


def _exp_rounding(dtype: torch.dtype) -> float:
    """The relative error of an exponential: 20 units in the last place in torch's kernel for the CPU."""
    return 20 * torch.finfo(torch.promote_types(dtype, torch.float32)).eps


def _delta_rounding(parts: Tensor, dtype: torch.dtype) -> Tensor:
    """How far off delta = rowsum(dout * out) is when out has been rounded; parts: dout * out.

    Implementations that recompute the weights use that delta; the peer's softmax gradient does not.
    A wrong delta shifts a row's gradient of scores in proportion to its weights, which is most of
    the error of dq and dk where few keys have all the weight.
    """
    most, likely = parts.abs().sum(-1, True), 2.5 * parts.square().sum(-1, True).sqrt()
    if dtype in (torch.float32, torch.float64):  # summed up in the same precision
        return 2 * torch.finfo(dtype).eps * most
    return torch.finfo(dtype).eps / 2 * torch.minimum(most, likely)


def attention_peer(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dout: Tensor | None = None,
    *,
    scale: float,
    causal: bool,
    dlse: Tensor | None = None,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    dropout_p: float = 0.0,
    keep: Tensor | None = None,
) -> Result:
    """Unfused attention in the inputs' dtype; gradients by autograd."""
    grads = dout is not None or dlse is not None
    leaves = [x.detach().clone().requires_grad_(grads) for x in (q, k, v)]
    see = visible(q.shape[1], k.shape[1], causal, q.device, window_size)
    empty = ~see.any(-1, keepdim=True)
    wide = torch.promote_types(q.dtype, torch.float32)
    with torch.set_grad_enabled(grads):
        query = leaves[0].transpose(1, 2)
        key, value = (_per_query_head(x, q.shape[2]) for x in leaves[1:])
        scores = query @ (key * scale).transpose(2, 3)
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        if alibi_slopes is not None:
            scores = scores + alibi_bias(alibi_slopes, q.shape[1], k.shape[1], wide)
        scores = scores.masked_fill(~(see | empty), -torch.inf)
        weights = scores.softmax(-1).to(q.dtype).masked_fill(empty, 0.0)
        if keep is not None:
            weights = weights.masked_fill(~keep, 0.0) * (1 / (1 - dropout_p))
        out = (weights @ value).transpose(1, 2)
        lse = scores.to(wide).logsumexp(-1).masked_fill(empty[:, 0], torch.inf)
        if not grads:
            return Result(out, lse)
        loss = 0.0 if dout is None else (out * dout).sum()
        if dlse is not None:
            loss = loss + (lse.masked_fill(empty[:, 0], 0.0) * dlse).sum()
        grads_qkv = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
    return Result(out.detach(), lse.detach(), *grads_qkv)


def per_sequence(
    attend: Callable[..., Result],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dout: Tensor | None = None,
    *,
    cu_seqlens_q: Sequence[int],
    cu_seqlens_k: Sequence[int],
    dlse: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    keep: Sequence[Tensor] | None = None,
    **options: Any,
) -> Result:
    """`attend` (oracle or peer) on each sequence; rows of no sequence: 0, LSE +inf.

    q, dout (total_q, h, d); k, v (total_k, hk, d); dlse (h, total_q); keep: (1, h, sq, sk) each.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    dtypes = (q.dtype, wide) if attend is attention_peer else (torch.float64, torch.float64)
    lse_shape = (q.shape[1], q.shape[0])
    whole = Result(
        torch.zeros((*q.shape[:-1], v.shape[-1]), dtype=dtypes[0], device=q.device),
        torch.full(lse_shape, torch.inf, dtype=dtypes[1], device=q.device),
    )
    whole.out_slack = torch.zeros_like(whole.out)
    if dout is not None or dlse is not None:
        grads = (torch.zeros(x.shape, dtype=dtypes[0], device=q.device) for x in (q, k, v))
        whole.dq, whole.dk, whole.dv = grads
        slacks = (torch.zeros_like(grad) for grad in (whole.dq, whole.dk, whole.dv))
        whole.dq_slack, whole.dk_slack, whole.dv_slack = slacks
    for n in range(len(cu_seqlens_q) - 1):
        rows = slice(cu_seqlens_q[n], cu_seqlens_q[n + 1])
        cols = slice(cu_seqlens_k[n], cu_seqlens_k[n + 1])
        part = attend(
            q[None, rows],
            k[None, cols],
            v[None, cols],
            None if dout is None else dout[None, rows],
            dlse=None if dlse is None else dlse[None, :, rows],
            alibi_slopes=_of_sequence(alibi_slopes, n),
            keep=None if keep is None else keep[n],
            **options,
        )
        whole.out[rows], whole.lse[:, rows] = part.out[0], part.lse[0]
        if part.out_slack is not None:
            whole.out_slack[rows] = part.out_slack[0]
        if whole.dq is not None:
            whole.dq[rows], whole.dk[cols], whole.dv[cols] = part.dq[0], part.dk[0], part.dv[0]
        if part.dq_slack is not None:
            whole.dq_slack[rows] = part.dq_slack[0]
            whole.dk_slack[cols], whole.dv_slack[cols] = part.dk_slack[0], part.dv_slack[0]
    return whole


def _of_sequence(slopes: Tensor | None, n: int) -> Tensor | None:
    return slopes[n : n + 1] if slopes is not None and slopes.dim() == 2 else slopes


def _where(index: int, shape: torch.Size) -> tuple[int, ...]:
    return tuple(int(i) for i in torch.unravel_index(torch.tensor(index), shape))


def assert_same_specials(name: str, ours: Tensor, want: Tensor, case: object) -> None:
    """NaN, +inf and -inf stand at the same places."""
    for kind, test in (("NaN", torch.isnan), ("+inf", torch.isposinf), ("-inf", torch.isneginf)):
        wrong = test(ours) != test(want)
        if wrong.any():
            at = _where(int(wrong.reshape(-1).int().argmax()), ours.shape)
            raise AssertionError(
                f"{name}: {kind} differs at {int(wrong.sum())} of {ours.numel()} places; "
                f"first at {at}: ours {ours[at].item()}, want {want[at].item()}; case {case}"
            )


def assert_close_rule(
    name: str,
    ours: Tensor,
    peer: Tensor,
    want: Tensor,
    *,
    factor: float,
    case: object,
    tiny: float = 0.0,
    slack: Tensor | None = None,
) -> None:
    """max|ours - want| <= factor * max|peer - want| + one rounding of the largest value + tiny.

    The same in the root mean square, so that a few wrong rows do not hide under one bad peer value.
    want is fp64; ours and peer have the dtype under test.  slack: taken from each error before.
    """
    assert ours.shape == want.shape, f"{name}: shape {ours.shape}, want {want.shape}; case {case}"
    assert ours.dtype == peer.dtype, f"{name}: dtype {ours.dtype}, want {peer.dtype}; case {case}"
    if want.numel() == 0:
        return
    want = want.double()
    assert_same_specials(name, ours, want.to(ours.dtype), case)
    finite = torch.isfinite(want) & torch.isfinite(ours)
    reference = torch.where(finite, want, 0.0)
    error = torch.where(finite, ours.detach().double() - want, 0.0).abs()
    if slack is not None:
        error = (error - torch.where(torch.isfinite(slack), slack, 0.0)).clamp(min=0)
    peer_error = torch.where(finite, peer.double() - want, 0.0).abs()
    peer_error = torch.where(torch.isfinite(peer_error), peer_error, 0.0)
    half_ulp = torch.finfo(ours.dtype).eps / 2

    def rms(x: Tensor) -> Tensor:
        return x.square().mean().sqrt()

    numbers = torch.stack(
        [
            error.max(),
            peer_error.max(),
            reference.abs().max(),
            rms(error),
            rms(peer_error),
            rms(reference),
        ]
    ).tolist()
    worst, peer_worst, largest, error_rms, peer_rms, want_rms = numbers
    limit = factor * peer_worst + half_ulp * largest + tiny
    limit_rms = factor * peer_rms + half_ulp * want_rms + tiny
    if worst > limit or error_rms > limit_rms:
        at = _where(int(error.argmax()), ours.shape)
        raise AssertionError(
            f"{name}: worst at {at}: ours {ours[at].item():.6g}, want {want[at].item():.6g}, "
            f"peer {peer[at].item():.6g}; error {worst:.3g} (limit {limit:.3g}, peer {peer_worst:.3g}), "
            f"rms {error_rms:.3g} (limit {limit_rms:.3g}, peer {peer_rms:.3g}); case {case}"
        )


HALVES = ("fp16", "bf16")


def assert_lse_close(ours: Tensor, want: Tensor, *, case: object) -> None:
    """LSE is single precision (double for double inputs), +inf exactly where no key is seen.

    With softcap the CUDA kernels' scores have the error of tanh.approx: 2^-11 of a score at most (PTX
    ISA), of which a tenth is allowed here, for it is seldom more.
    """
    assert ours.shape == want.shape, f"lse: shape {ours.shape}, want {want.shape}; case {case}"
    if want.numel() == 0:
        return
    assert_same_specials("lse", ours, want, case)
    finite = torch.isfinite(want)
    error = torch.where(finite, ours.detach().double() - want, 0.0).abs()
    largest = float(torch.where(finite, want, 0.0).abs().max())
    approximates = getattr(case, "softcap", 0.0) > 0 and getattr(case, "dtype", "") in HALVES
    relative = 1e-12 if ours.dtype == torch.float64 else 5e-5 if approximates else 1e-5
    limit = relative * (1.0 + largest)
    if float(error.max()) > limit:
        at = _where(int(error.argmax()), ours.shape)
        raise AssertionError(
            f"lse: worst at {at}: ours {ours[at].item():.8g}, want {want[at].item():.8g}; "
            f"error {float(error.max()):.3g} (limit {limit:.3g}); case {case}"
        )


FLOOR = {torch.float16: 2e-5, torch.bfloat16: 2e-5, torch.float32: 2e-6, torch.float64: 1e-13}


def check_result(ours: Result, peer: Result, want: Result, *, case: object) -> None:
    """Outputs within 2x the peer's error, gradients within 3x; LSE to single precision."""
    tiny = FLOOR[ours.out.dtype]
    outs = ours.out, peer.out, want.out
    assert_close_rule("out", *outs, factor=2.0, tiny=tiny, slack=want.out_slack, case=case)
    if ours.lse is not None and want.lse is not None:
        assert_lse_close(ours.lse, want.lse, case=case)
    for name in ("dq", "dk", "dv"):
        grad = getattr(ours, name)
        if grad is not None:
            assert_close_rule(
                *(name, grad, getattr(peer, name), getattr(want, name)),
                factor=3.0,
                tiny=4 * tiny,
                slack=getattr(want, f"{name}_slack"),
                case=case,
            )


def assert_probs(
    case: Any, q: Tensor, k: Tensor, probs: Tensor, keep: Tensor, alibi_slopes: Tensor | None
) -> None:
    """S_dmask is +-exp(score - maximum of its row); dropped weights have the sign bit.

    q (b, sq, h, d), k (b, sk, hk, d), probs (b, h, at least sq, at least sk), keep (b, h, sq, sk);
    case: scale, causal, window and softcap.
    """
    seqlen_q, seqlen_k = q.shape[1], k.shape[1]
    inside = probs[:, :, :seqlen_q, :seqlen_k]
    outside = probs.clone()
    outside[:, :, :seqlen_q, :seqlen_k] = 0
    assert not outside.any(), f"S_dmask: values outside of the matrix; case {case}"

    see = visible(seqlen_q, seqlen_k, case.causal, q.device, case.window)
    key = _per_query_head(k.double(), q.shape[2])
    scores = case.scale * (q.double().transpose(1, 2) @ key.transpose(2, 3))
    if case.softcap:
        scores = case.softcap * torch.tanh(scores / case.softcap)
    if alibi_slopes is not None:
        scores = scores + alibi_bias(alibi_slopes, seqlen_q, seqlen_k, torch.float64)
    assert not inside.masked_fill(see, 0).any(), f"S_dmask: hidden weights; case {case}"
    if not see.any():
        return

    scores = scores.masked_fill(~see, -torch.inf)
    want = (scores - scores.amax(-1, keepdim=True)).exp().nan_to_num()
    info = torch.finfo(probs.dtype)
    below_normal = info.smallest_normal * 2**-10 + 1e-7
    torch.testing.assert_close(inside.abs().double(), want, rtol=info.eps + 1e-5, atol=below_normal)
    # A weight that underflows may be -0.0 or 0.0.
    dropped = inside.signbit() & (inside != 0)
    assert torch.equal(dropped, ~keep & (inside != 0)), f"S_dmask: signs; case {case}"
    assert (inside.abs().amax(-1) == 1)[..., see.any(-1)].all(), f"S_dmask: no 1; case {case}"

    # Normalised, they are the probabilities.
    total = inside.abs().double().sum(-1, keepdim=True)
    p = (inside.abs().double() / total).nan_to_num()
    limit = dict(rtol=4 * info.eps, atol=info.eps / 4 + 1e-6)
    torch.testing.assert_close(p, scores.softmax(-1).nan_to_num(), **limit)
