"""Running the package under test: one call, its gradients, and poisoned memory around them."""

from __future__ import annotations

import torch
from cases import AttnCase, Inputs
from oracle import Result, assert_same_specials, attention_oracle, attention_peer, check_result
from torch import Tensor

from flash_attn import flash_attn_func

LARGE_POISON_BYTES = 64 << 20  # one block of the caching allocator's large pool
SMALL_POISON_BYTES = 512 << 10  # blocks up to 1 MiB come from the small pool
SMALL_POISON_BLOCKS = 16


def poison(device: str | torch.device, large_bytes: int = LARGE_POISON_BYTES) -> None:
    """Fill memory that the next allocations will get with NaN; does nothing on the CPU."""
    if torch.device(device).type != "cuda":
        return
    blocks = [torch.full((large_bytes // 4,), torch.nan, device=device)]
    for _ in range(SMALL_POISON_BLOCKS):
        blocks.append(torch.full((SMALL_POISON_BYTES // 4,), torch.nan, device=device))
    del blocks


def leaves(*tensors: Tensor) -> list[Tensor]:
    """The same tensors (same strides and storage) as leaves that want gradients."""
    return [x.detach().requires_grad_() for x in tensors]


def run_flash(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dout: Tensor | None = None,
    *,
    causal: bool,
    softmax_scale: float | None = None,
    dlse: Tensor | None = None,
    deterministic: bool = False,
) -> Result:
    """flash_attn_func and, with dout or dlse, its gradients; LSE in any case."""
    options = dict(softmax_scale=softmax_scale, causal=causal, deterministic=deterministic)
    poison(q.device)
    if dout is None and dlse is None:
        with torch.no_grad():
            out, lse, _ = flash_attn_func(q, k, v, return_attn_probs=True, **options)
        return Result(out, lse)
    inputs = leaves(q, k, v)
    out, lse, _ = flash_attn_func(*inputs, return_attn_probs=True, **options)
    pairs = [(out, dout), (lse, dlse)]
    outputs = [x for x, grad in pairs if grad is not None]
    grads = [grad for _, grad in pairs if grad is not None]
    poison(q.device)
    dq, dk, dv = torch.autograd.grad(outputs, inputs, grads)
    return Result(out.detach(), lse.detach(), dq, dk, dv)


def check_case(case: AttnCase, x: Inputs, *, scale: float | None = None, **options: bool) -> Result:
    """Forward and backward of `x` against the oracle; returns our result."""
    ours = run_flash(x.q, x.k, x.v, x.dout, causal=case.causal, softmax_scale=scale, **options)
    exact = dict(scale=case.scale if scale is None else scale, causal=case.causal)
    want = attention_oracle(x.q, x.k, x.v, x.dout, **exact)
    peer = attention_peer(x.q, x.k, x.v, x.dout, **exact)
    # delta = rowsum(dout * out) comes from the rounded out, which the peer's softmax gradient does not
    # use.  With one or two keys P is not small, and that rounding is most of the gradients' error.
    slack = 0.0
    if case.seqlen_k <= 2 and case.seqlen_q > 0 and case.seqlen_k > 0:
        delta = (x.dout.double() * want.out.double()).abs().sum(-1).max()
        operand = max(x.q.abs().max().item(), x.k.abs().max().item())
        slack = torch.finfo(x.q.dtype).eps / 2 * delta.item() * abs(exact["scale"]) * operand
    check_result(ours, peer, want, case=case, gradient_slack=slack)
    return ours


def assert_bitwise(name: str, ours: Tensor, want: Tensor, case: object) -> None:
    """Same shape, dtype and bits (NaN equals NaN)."""
    assert ours.shape == want.shape, f"{name}: shape {ours.shape}, want {want.shape}; case {case}"
    assert ours.dtype == want.dtype, f"{name}: dtype {ours.dtype}, want {want.dtype}; case {case}"
    if torch.equal(ours, want):
        return
    differs = (ours != want) & ~(ours.isnan() & want.isnan())
    if not differs.any():
        return
    at = tuple(int(i) for i in differs.nonzero()[0])
    raise AssertionError(
        f"{name}: {int(differs.sum())} of {ours.numel()} values differ; first at {at}: "
        f"{ours[at].item()!r} and {want[at].item()!r}; case {case}"
    )


def assert_same_result(ours: Result, want: Result, case: object, *, dq_bitwise: bool) -> None:
    """Bitwise equal; dq, whose default accumulation order varies, only close if so told."""
    for name in ("out", "lse", "dk", "dv"):
        if getattr(want, name) is not None:
            assert_bitwise(name, getattr(ours, name), getattr(want, name), case)
    if want.dq is None:
        return
    if dq_bitwise:
        assert_bitwise("dq", ours.dq, want.dq, case)
    else:
        assert_nearly("dq", ours.dq, want.dq, case)


def assert_nearly(
    name: str, ours: Tensor, want: Tensor, case: object, *, eps: float | None = None
) -> None:
    """Equal but for the order of fp32 sums: two eps (default: of the dtype) of the largest value."""
    assert ours.shape == want.shape and ours.dtype == want.dtype, f"{name}; case {case}"
    if want.numel() == 0:
        return
    assert_same_specials(name, ours, want, case)
    finite = want.isfinite()
    ours, want = torch.where(finite, ours, 0), torch.where(finite, want, 0)
    eps = torch.finfo(want.dtype).eps if eps is None else eps
    limit = 2 * eps * want.abs().max().item() + 1e-6
    error = (ours.double() - want.double()).abs()
    if error.max().item() > limit:
        at = tuple(int(i) for i in (error == error.max()).nonzero()[0])
        raise AssertionError(
            f"{name}: worst at {at}: {ours[at].item():.6g} and {want[at].item():.6g} differ by "
            f"{error[at].item():.3g} (limit {limit:.3g}); case {case}"
        )
