"""torch's own CPU flash attention, where it means what ``attention`` means.

Used by ``attention``.  torch's kernel takes (batch, heads, seqlen, head_dim), aligns a causal mask at
the top left, and returns an lse that has no gradient.  It handles what a mask hides in two ways:
hidden scores, -inf, are multiplied by the scale, which must be positive; and hidden values and
gradients are multiplied by 0, so that an inf or NaN among them shows as NaN in the result.

Heads with such inputs are computed again by the exact path; the others keep their results, bit by bit.
Looking for them costs a sum of each tensor that is looked at:

- Before the forward pass, of q and k.  The kernel takes the maximum of a row with comparisons, which
  a NaN may pass unseen: the row would be finite and wrong.
- After it, of out.  A hidden value that is not finite leaves NaN there: 0 times it.
- After the backward pass, of the gradients.  It has no maximum, and each of dout, q, k, v, out and lse
  is a factor of what is summed up: one that is not finite shows, unless its weight was hidden.

Without a mask nothing is hidden, and what is not finite is as it should be.
"""

import functools
import math

import torch
from torch import Tensor

from flash_attn.cpu.scores import Scores, compute_dtype, own

# In bf16 the kernel's exponential is off by up to 6e-5, which is then the error of an lse of few keys;
# with so many keys the lse is large enough for its bound, 1e-5 * (1 + the largest).
BF16_LEAST_KEYS = 256


def serves(scores: Scores, q: Tensor, k: Tensor) -> bool:
    """Whether the kernel means the same, for finite inputs."""
    if q.numel() == 0 or k.numel() == 0 or not scores.are_plain:
        return False
    return scores.see.is_full or (scores.see.is_square_causal and scores.softmax_scale > 0)


def forward(
    q: Tensor, k: Tensor, v: Tensor, scores: Scores
) -> tuple[Tensor, Tensor, Tensor | None]:
    """out and lse; which key heads, batch * heads_k + head_k, are to be replaced; None: none."""
    heads_k = k.shape[2]
    broken = [_broken(x, heads_k) for x in (q, k)]
    inputs = [_heads_first(x, _forward_dtype(q, k)) for x in (q, k, v)]
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default(
        *inputs, 0.0, not scores.see.is_full, scale=scores.softmax_scale
    )
    out = own(out.transpose(1, 2).to(q.dtype).contiguous())
    if not scores.see.is_full:
        broken.append(_broken(out, heads_k))
    return out, own(lse.contiguous()), _numbers(broken)


def backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scores: Scores
) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor | None]:
    """(dq, dk, dv), and which key heads are to be replaced, as ``forward`` says it.

    In 16 bits the kernel would add up dk and dv in 16 bits, one block of queries after the other.
    That misses the error bound of gradients (dv by 1.3 times it, causal, 767 and 4096 tokens), and
    it is hardly faster than fp32, or slower.
    """
    inputs = [_heads_first(x, compute_dtype(q)) for x in (dout, q, k, v, out)]
    grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default(
        *inputs, lse.contiguous(), 0.0, not scores.see.is_full, scale=scores.softmax_scale
    )
    dq, dk, dv = (own(grad.transpose(1, 2).to(q.dtype).contiguous()) for grad in grads)
    broken = [] if scores.see.is_full else [_broken(grad, k.shape[2]) for grad in (dq, dk, dv)]
    return (dq, dk, dv), _numbers(broken)


def _broken(x: Tensor, heads_k: int) -> Tensor | None:
    """Which key heads of x (batch, seqlen, heads, head_dim) have an inf or NaN; None, where one look tells:
    no one has.

    A sum is much faster than ``isfinite``, and along the sequence as fast in any layout.  It is finite
    only if all of x is; a sum that overflows takes the second look.
    """
    if math.isfinite(x.sum(1).sum().item()):
        return None
    is_finite = x.isfinite().all(-1).all(1)  # (batch, heads)
    return ~is_finite.unflatten(1, (heads_k, -1)).all(-1)


def _numbers(broken: list[Tensor | None]) -> Tensor | None:
    """The numbers of the key heads of which any mask says that they are broken; None: no one is."""
    masks = [mask for mask in broken if mask is not None]
    numbers = torch.stack(masks).any(0).flatten().nonzero().flatten() if masks else None
    return None if numbers is None or len(numbers) == 0 else numbers


def _forward_dtype(q: Tensor, k: Tensor) -> torch.dtype:
    """What the kernel is called in."""
    if q.dtype == torch.bfloat16 and k.shape[1] >= BF16_LEAST_KEYS and _multiplies_bf16():
        return q.dtype
    return compute_dtype(q)


@functools.cache
def _multiplies_bf16() -> bool:
    """Whether the processor has matrix instructions (AMX) for bf16, and torch uses them.

    With them the kernel takes less than half as long as in fp32; without, as long or longer.
    """
    has_amx = getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    return torch.backends.cpu.get_cpu_capability() == "AVX512" and has_amx()


def _heads_first(x: Tensor, dtype: torch.dtype) -> Tensor:
    """(batch, seqlen, heads, head_dim) -> (batch, heads, seqlen, head_dim), rows contiguous."""
    x = x.to(dtype)
    return (x if x.stride(-1) == 1 else x.contiguous()).transpose(1, 2)
