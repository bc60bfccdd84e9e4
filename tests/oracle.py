"""What attention is: a dense fp64 oracle with explicit gradients, and the rule for judging others.

Shares nothing with the package.  The peer is the same mathematics in the inputs' own precision with
ordinary torch operations; an implementation may be at most a small factor worse than its peer.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Result:
    """out, dq (b, sq, h, d); lse (b, h, sq); dk, dv (b, sk, hk, d). Gradients may be absent."""

    out: Tensor
    lse: Tensor | None
    dq: Tensor | None = None
    dk: Tensor | None = None
    dv: Tensor | None = None


def visible(seqlen_q: int, seqlen_k: int, causal: bool, device: torch.device) -> Tensor:
    """(sq, sk) bool: query i sees key j; causal: the last query is aligned with the last key."""
    i = torch.arange(seqlen_q, device=device)[:, None]
    j = torch.arange(seqlen_k, device=device)[None, :]
    return j <= i + (seqlen_k - seqlen_q) if causal else (i >= 0) & (j >= 0)


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
) -> Result:
    """fp64 attention by its definition; gradients of sum(out * dout) + sum(lse * dlse)."""
    heads, heads_kv = q.shape[2], k.shape[2]
    see = visible(q.shape[1], k.shape[1], causal, q.device)
    query = q.detach().double().transpose(1, 2)
    key = _per_query_head(k.detach().double(), heads)
    value = _per_query_head(v.detach().double(), heads)

    scores = scale * (query @ key.transpose(2, 3))
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
    out = weights @ value
    if dout is None and dlse is None:
        return Result(out.transpose(1, 2), lse)

    grad = torch.zeros_like(query) if dout is None else dout.detach().double().transpose(1, 2)
    grad_weights = grad @ value.transpose(2, 3)
    mean = (grad_weights * weights).sum(-1, keepdim=True)
    if dlse is not None:
        mean = mean - dlse.detach().double().unsqueeze(-1)
    grad_scores = weights * (grad_weights - mean)
    return Result(
        out.transpose(1, 2),
        lse,
        (scale * (grad_scores @ key)).transpose(1, 2),
        _per_kv_head(scale * (grad_scores.transpose(2, 3) @ query), heads_kv),
        _per_kv_head(weights.transpose(2, 3) @ grad, heads_kv),
    )


def attention_peer(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dout: Tensor | None = None,
    *,
    scale: float,
    causal: bool,
    dlse: Tensor | None = None,
) -> Result:
    """Unfused attention in the inputs' dtype; gradients by autograd."""
    grads = dout is not None or dlse is not None
    leaves = [x.detach().clone().requires_grad_(grads) for x in (q, k, v)]
    see = visible(q.shape[1], k.shape[1], causal, q.device)
    empty = ~see.any(-1, keepdim=True)
    with torch.set_grad_enabled(grads):
        query = leaves[0].transpose(1, 2)
        key, value = (_per_query_head(x, q.shape[2]) for x in leaves[1:])
        scores = query @ (key * scale).transpose(2, 3)
        scores = scores.masked_fill(~(see | empty), -torch.inf)
        weights = scores.softmax(-1).masked_fill(empty, 0.0)
        out = (weights @ value).transpose(1, 2)
        wide = torch.promote_types(scores.dtype, torch.float32)
        lse = scores.to(wide).logsumexp(-1).masked_fill(empty[:, 0], torch.inf)
        if not grads:
            return Result(out, lse)
        loss = 0.0 if dout is None else (out * dout).sum()
        if dlse is not None:
            loss = loss + (lse.masked_fill(empty[:, 0], 0.0) * dlse).sum()
        grads_qkv = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
    return Result(out.detach(), lse.detach(), *grads_qkv)


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
) -> None:
    """max|ours - want| <= factor * max|peer - want| + one rounding of the largest value + tiny.

    The same in the root mean square, so that a few wrong rows do not hide under one bad peer value.
    want is fp64; ours and peer have the dtype under test.
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


def assert_lse_close(ours: Tensor, want: Tensor, *, case: object) -> None:
    """LSE is single precision (double for double inputs), +inf exactly where no key is seen."""
    assert ours.shape == want.shape, f"lse: shape {ours.shape}, want {want.shape}; case {case}"
    if want.numel() == 0:
        return
    assert_same_specials("lse", ours, want, case)
    finite = torch.isfinite(want)
    error = torch.where(finite, ours.detach().double() - want, 0.0).abs()
    largest = float(torch.where(finite, want, 0.0).abs().max())
    limit = (1e-12 if ours.dtype == torch.float64 else 1e-5) * (1.0 + largest)
    if float(error.max()) > limit:
        at = _where(int(error.argmax()), ours.shape)
        raise AssertionError(
            f"lse: worst at {at}: ours {ours[at].item():.8g}, want {want[at].item():.8g}; "
            f"error {float(error.max()):.3g} (limit {limit:.3g}); case {case}"
        )


FLOOR = {torch.float16: 2e-5, torch.bfloat16: 2e-5, torch.float32: 2e-6, torch.float64: 1e-13}


def check_result(
    ours: Result, peer: Result, want: Result, *, case: object, gradient_slack: float = 0.0
) -> None:
    """Outputs within 2x the peer's error, gradients within 3x; LSE to single precision."""
    tiny = FLOOR[ours.out.dtype]
    assert_close_rule("out", ours.out, peer.out, want.out, factor=2.0, tiny=tiny, case=case)
    if ours.lse is not None and want.lse is not None:
        assert_lse_close(ours.lse, want.lse, case=case)
    for name in ("dq", "dk", "dv"):
        grad = getattr(ours, name)
        if grad is not None:
            assert_close_rule(
                name,
                grad,
                getattr(peer, name),
                getattr(want, name),
                factor=3.0,
                tiny=4 * tiny + (gradient_slack if name != "dv" else 0.0),
                case=case,
            )
