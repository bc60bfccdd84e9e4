"""The calls that the decoding benchmark times, and the comparison of their results with float32."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from bench_fwd_bwd import WrongResultError, difference
from decode_rows import HEAD_DIM, Inputs, one_shorter
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from flash_attn import flash_attn_with_kvcache

ROPE_BASE = 10000.0
# Differences that rounding explains, relative to the norm and to the largest element.
NORM_TOLERANCE = 1.5e-2
MAX_TOLERANCE = 4e-2

NumberedCall = Callable[[int], object]  # the number says which of the caches, which take turns


def decode(inputs: Inputs, num_splits: int = 0) -> NumberedCall:
    """Our attention, taking the caches in turns."""
    arguments = [inputs.arguments(i) for i in range(len(inputs.k_caches))]

    def call(number: int) -> Tensor:
        chosen = arguments[number % len(arguments)]
        return flash_attn_with_kvcache(**chosen, causal=True, num_splits=num_splits)

    return call


def rotary_tables(seqlen: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin, (seqlen, head_dim / 2)."""
    exponents = torch.arange(0, HEAD_DIM, 2, device=like.device) / HEAD_DIM
    angles = torch.arange(seqlen, device=like.device)[:, None] * ROPE_BASE**-exponents
    return angles.cos().to(like.dtype), angles.sin().to(like.dtype)


def decode_append(inputs: Inputs, k: Tensor, v: Tensor) -> NumberedCall:
    """The same with k and v (batch, 1, heads_k, head_dim) as the caches' last rows, and rotary."""
    cos, sin = rotary_tables(inputs.k_caches.shape[2], inputs.q)
    shorter = one_shorter(inputs)
    arguments = [shorter.arguments(i) for i in range(len(inputs.k_caches))]
    options = {"k": k, "v": v, "rotary_cos": cos, "rotary_sin": sin, "rotary_interleaved": False}

    def call(number: int) -> Tensor:
        return flash_attn_with_kvcache(**arguments[number % len(arguments)], **options, causal=True)

    return call


def decode_torch(inputs: Inputs) -> NumberedCall:
    """torch's FLASH_ATTENTION backend, on the same caches."""
    q = inputs.q.transpose(1, 2)
    caches = [
        (k.transpose(1, 2), v.transpose(1, 2))
        for k, v in zip(inputs.k_caches, inputs.v_caches, strict=True)
    ]
    grouped = q.shape[1] != caches[0][0].shape[1]

    def call(number: int) -> Tensor:
        k, v = caches[number % len(caches)]
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            out = F.scaled_dot_product_attention(q, k, v, enable_gqa=grouped)
        return out.transpose(1, 2)

    return call


def refusal(call: NumberedCall) -> str | None:
    """Why it cannot run; None when it can."""
    try:
        call(0)
    except RuntimeError as error:
        return str(error).splitlines()[0]
    return None


def rotate(x: Tensor, position: int) -> Tensor:
    """Rotary embedding in float32 of (heads, head_dim) at one position, not interleaved."""
    cos, sin = (t[position].float() for t in rotary_tables(position + 1, x.to(torch.bfloat16)))
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, first * sin + second * cos), dim=-1)


def reference(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention in float32: q (heads_q, head_dim), k and v (length, heads_k, head_dim)."""
    group = q.shape[0] // k.shape[1]
    q, k, v = q.float().unflatten(0, (-1, group)), k.float(), v.float()
    scores = torch.einsum("hgd,nhd->hgn", q, k) * HEAD_DIM**-0.5
    return torch.einsum("hgn,nhd->hgd", scores.softmax(-1), v).flatten(0, 1)


def compare(name: str, out: Tensor, want: Tensor) -> None:
    """Raises WrongResultError when they differ by more than rounding."""
    norm, worst = difference(out, want)
    if not (norm <= NORM_TOLERANCE and worst <= MAX_TOLERANCE):
        raise WrongResultError(
            f"{name} differs from float32 by {norm:.2e} of its norm (allowed {NORM_TOLERANCE}), "
            f"{worst:.2e} of its largest element (allowed {MAX_TOLERANCE})"
        )


def check(calls: Mapping[str, NumberedCall], inputs: Inputs) -> None:
    """Compare every call's result with float32, for three sequences of the last cache."""
    lengths = inputs.cache_seqlens.tolist()
    last = len(inputs.k_caches) - 1
    outputs = {name: call(last) for name, call in calls.items()}
    for index in sorted({0, len(lengths) - 1, lengths.index(min(lengths))}):
        want = reference(inputs.q[index, 0], *inputs.sequence(last, index))
        for name, out in outputs.items():
            compare(f"{name}, sequence {index}", out[index, 0], want)


def check_append(inputs: Inputs, k: Tensor, v: Tensor) -> None:
    """Compare appending and rotary with float32: the result, and the rows that it writes."""
    out = decode_append(inputs, k, v)(0)
    for index in sorted({0, len(out) - 1}):
        keys, values = inputs.sequence(0, index)
        position = len(keys) - 1
        compare("the appended k", keys[-1], rotate(k[index, 0], position))
        compare("the appended v", values[-1], v[index, 0])
        q = rotate(inputs.q[index, 0], position)
        compare(f"appending, sequence {index}", out[index, 0], reference(q, keys, values))
