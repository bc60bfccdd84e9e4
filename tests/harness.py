"""Running the package under test: one call, its gradients, and poisoned memory around them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from cases import UNLIMITED, Alibi, AttnCase, Case, Inputs, VarlenCase, VarlenInputs, make_alibi
from oracle import (
    Result,
    assert_same_specials,
    attention_oracle,
    attention_peer,
    check_result,
    per_sequence,
)
from philox import keep_mask
from torch import Tensor

from flash_attn import flash_attn_func, flash_attn_varlen_func

T = TypeVar("T")

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


def capture(step: Callable[[], T]) -> tuple[torch.cuda.CUDAGraph, T]:
    """A CUDA graph of `step`, which has run once before on a stream of its own, and its results."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        recorded = step()
    # The capture's stream sets the generator's seed and offset, and nothing orders that before a
    # replay on another stream: on a busy GPU it overwrote a replay's, torch.rand's too.
    torch.cuda.synchronize()
    return graph, recorded


def peek_rng_state(like: Tensor, sequences: int, heads: int) -> Tensor:
    """(seed, offset) that the next call with dropout draws; the generators stay as they are."""
    with torch.random.fork_rng([like.device] if like.is_cuda else []):
        dtype = torch.float16 if like.is_cuda else torch.float32
        head_dim = 64  # that every isa's kernels have
        q = torch.zeros(sequences, 1, heads, head_dim, dtype=dtype, device=like.device)
        options = (0.5, 1.0, False, -1, -1, 0.0, None, False)
        return torch.ops.flash_attn._flash_attn_forward(q, q, q, *options)[3].cpu()


def features_of(case: Case, device: str) -> dict[str, Any]:
    """Keyword arguments of the public functions for the features that `case` uses."""
    features: dict[str, Any] = {}
    if case.window != UNLIMITED:
        features["window_size"] = case.window
    if case.softcap:
        features["softcap"] = case.softcap
    if case.alibi is not Alibi.none:
        features["alibi_slopes"] = make_alibi(case, device)
    if case.dropout:
        features["dropout_p"] = case.dropout
    return features


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
    rng_seed: int = 0,
    **features: Any,
) -> Result:
    """flash_attn_func and, with dout or dlse, its gradients; LSE in any case.

    features: window_size, softcap, alibi_slopes, dropout_p; with dropout, torch is seeded before.
    """
    options = dict(softmax_scale=softmax_scale, causal=causal, deterministic=deterministic)
    options |= features

    def call(*qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return flash_attn_func(*qkv, return_attn_probs=True, **options)

    sequences = q.shape[0]
    return _run(call, q, k, v, dout, dlse, sequences, features.get("dropout_p", 0.0), rng_seed)


def run_varlen(
    x: VarlenInputs,
    *,
    causal: bool,
    backward: bool = True,
    softmax_scale: float | None = None,
    dlse: Tensor | None = None,
    deterministic: bool = False,
    rng_seed: int = 0,
    **features: Any,
) -> Result:
    """The same of flash_attn_varlen_func; features: block_table too."""
    options = dict(softmax_scale=softmax_scale, causal=causal, deterministic=deterministic)
    options |= features
    lengths = (x.cu_seqlens_q, x.cu_seqlens_k, x.max_seqlen_q, x.max_seqlen_k)
    dropout_p = features.get("dropout_p", 0.0)

    def call(*qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return flash_attn_varlen_func(*qkv, *lengths, return_attn_probs=True, **options)

    dout = x.dout if backward else None
    sequences = len(x.cu_seqlens_q) - 1
    return _run(call, x.q, x.k, x.v, dout, dlse, sequences, dropout_p, rng_seed)


def _run(
    call: Callable[..., tuple[Tensor, Tensor, Tensor]],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dout: Tensor | None,
    dlse: Tensor | None,
    sequences: int,
    dropout_p: float,
    rng_seed: int,
) -> Result:
    rng_state = None
    if dropout_p:
        torch.manual_seed(rng_seed)
        rng_state = peek_rng_state(q, sequences, q.shape[-2])
    poison(q.device)
    if dout is None and dlse is None:
        with torch.no_grad():
            out, lse, _ = call(q, k, v)
        return Result(out, lse, rng_state=rng_state)
    inputs = leaves(q, k, v)
    out, lse, _ = call(*inputs)
    pairs = [(out, dout), (lse, dlse)]
    outputs = [x for x, grad in pairs if grad is not None]
    grads = [grad for _, grad in pairs if grad is not None]
    poison(q.device)
    dq, dk, dv = torch.autograd.grad(outputs, inputs, grads)
    return Result(out.detach(), lse.detach(), dq, dk, dv, rng_state)


def check_case(
    case: AttnCase,
    x: Inputs,
    *,
    scale: float | None = None,
    dlse: Tensor | None = None,
    **options: bool,
) -> Result:
    """Forward and backward of `x` against the oracle; returns our result."""
    features = features_of(case, x.q.device)
    exact = dict(scale=case.scale if scale is None else scale, causal=case.causal, dlse=dlse)
    ours = run_flash(
        *(x.q, x.k, x.v, x.dout),
        causal=case.causal,
        softmax_scale=scale,
        dlse=dlse,
        **options,
        **features,
    )
    if case.dropout:
        shape = (range(case.batch), case.heads[0], case.seqlen_q, case.seqlen_k)
        features["keep"] = keep_mask(ours.rng_state, *shape, case.dropout, x.q.device)
    want = attention_oracle(x.q, x.k, x.v, x.dout, **exact, **features)
    peer = attention_peer(x.q, x.k, x.v, x.dout, **exact, **features)
    check_result(ours, peer, want, case=case)
    return ours


def check_varlen(
    case: VarlenCase,
    x: VarlenInputs,
    *,
    scale: float | None = None,
    dlse: Tensor | None = None,
    **options: bool,
) -> Result:
    """Forward and backward of all sequences against the oracle; returns our result."""
    features = features_of(case, x.q.device)
    ours = run_varlen(x, causal=case.causal, softmax_scale=scale, dlse=dlse, **options, **features)
    exact = dict(
        scale=case.scale if scale is None else scale,
        causal=case.causal,
        dlse=dlse,
        cu_seqlens_q=x.cu_seqlens_q.tolist(),
        cu_seqlens_k=x.cu_seqlens_k.tolist(),
    )
    if case.dropout:
        features["keep"] = varlen_keep(case, ours.rng_state, x.q.device)
    qkv = (x.q, x.k, x.v, x.dout)
    want = per_sequence(attention_oracle, *qkv, **exact, **features)
    peer = per_sequence(attention_peer, *qkv, **exact, **features)
    check_result(ours, peer, want, case=case)
    return ours


def varlen_keep(case: VarlenCase, rng_state: Tensor, device: torch.device) -> list[Tensor]:
    """The keep mask of each sequence, (1, h, sq, sk)."""
    return [
        keep_mask(rng_state, [n], case.heads[0], sq, sk, case.dropout, device)
        for n, (sq, sk) in enumerate(zip(case.lengths_q, case.lengths_k))
    ]


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
    name: str,
    ours: Tensor,
    want: Tensor,
    case: object,
    *,
    eps: float | None = None,
    slack: float = 1e-6,
) -> None:
    """Equal but for the order of fp32 sums: two eps (default: of the dtype) of the largest value."""
    assert ours.shape == want.shape and ours.dtype == want.dtype, f"{name}; case {case}"
    if want.numel() == 0:
        return
    assert_same_specials(name, ours, want, case)
    finite = want.isfinite()
    ours, want = torch.where(finite, ours, 0), torch.where(finite, want, 0)
    eps = torch.finfo(want.dtype).eps if eps is None else eps
    limit = 2 * eps * want.abs().max().item() + slack
    error = (ours.double() - want.double()).abs()
    if error.max().item() > limit:
        at = tuple(int(i) for i in (error == error.max()).nonzero()[0])
        raise AssertionError(
            f"{name}: worst at {at}: {ours[at].item():.6g} and {want[at].item():.6g} differ by "
            f"{error[at].item():.3g} (limit {limit:.3g}); case {case}"
        )
