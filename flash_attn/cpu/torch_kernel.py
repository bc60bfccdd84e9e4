"""torch's own CPU flash attention, where it means what ``attention`` means.

Used by ``attention``.  torch's kernel takes (batch, heads, seqlen, head_dim), aligns a causal mask at
the top left, and returns an lse that has no gradient.  It handles what a mask hides in two ways:
hidden scores, -inf, are multiplied by the scale, which must be positive; and hidden values and
gradients are multiplied by 0, so that an inf or NaN among them shows as NaN in the result.

Heads with such inputs are computed again by the exact path; the others keep their results, bit by bit.
They are found by sums of the results, which cost little beside them:

- Under a mask an inf or NaN that is hidden leaves NaN in out, and in a gradient: 0 times it.
- A row whose every score is -inf, or NaN among fewer keys than a vector register has room for, is taken
  for one without keys: finite, and wrong.  Its lse is exactly 0.

What else is not finite and not hidden is as it should be: out, lse and the gradients are NaN there.
"""

import functools
import math

import torch
from torch import Tensor

from flash_attn._ops import Options
from flash_attn.cpu.scores import Visibility, are_plain, compute_dtype, own

# In bf16 the kernel's exponential is off by up to 6e-5, which is then the error of an lse of few keys;
# with so many keys the lse is large enough for its bound, 1e-5 * (1 + the largest).
BF16_LEAST_KEYS = 256

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


def mask_of(q: Tensor, k: Tensor, v: Tensor, options: Options) -> bool | None:
    """The kernel's ``is_causal``, with which it means the same for finite inputs; None: it does not."""
    if q.numel() == 0 or k.numel() == 0 or not are_plain(options) or v.shape[-1] != q.shape[-1]:
        return None
    see = Visibility.of(q.shape[1], k.shape[1], options)
    if see.is_full:
        return False
    return True if see.is_square_causal and options.softmax_scale > 0 else None


def forward(
    q: Tensor, k: Tensor, v: Tensor, is_causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor | None]:
    """out and lse; which key heads, batch * heads_k + head_k, are to be replaced; None: none."""
    heads_k, dtype = k.shape[2], _forward_dtype(q, k)
    inputs = [_heads_first(x, dtype) for x in (q, k, v)]
    out, lse = _forward(*inputs, 0.0, is_causal, scale=scale)
    out, lse = own(out.transpose(1, 2).to(q.dtype).contiguous()), own(lse.contiguous())
    broken = [_broken(out, heads_k)] if is_causal else []
    if not lse.all():
        broken += [_broken(x, heads_k) for x in (q, k)]
    return out, lse, _numbers(broken)


def backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    is_causal: bool,
    scale: float,
) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor | None]:
    """(dq, dk, dv), and which key heads are to be replaced, as ``forward`` says it.

    16-bit inputs are computed in fp32.  In 16 bits the kernel adds up dk and dv in 16 bits, one block
    of queries after the other, which misses the error bound of gradients: dv by 1.3 times it, causal,
    767 and 4096 tokens.  For bf16 it would be faster, by up to 1.3 times with AMX.
    """
    inputs = [_heads_first(x, compute_dtype(q)) for x in (dout, q, k, v, out)]
    grads = _backward(*inputs, lse.contiguous(), 0.0, is_causal, scale=scale)
    dq, dk, dv = (own(grad.transpose(1, 2).to(q.dtype).contiguous()) for grad in grads)
    broken = [_broken(grad, k.shape[2]) for grad in (dq, dk, dv)] if is_causal else []
    return (dq, dk, dv), _numbers(broken)


def _broken(x: Tensor, heads_k: int) -> Tensor | None:
    """Which key heads of x (batch, seqlen, heads, head_dim) have an inf or NaN; None, where one look tells:
    no one has.

    A sum is much faster than ``isfinite``; without gaps in memory in one go, else along the sequence.
    It is finite only if all of x is; a sum that overflows takes the second look.
    """
    total = x.sum() if x.is_contiguous() else x.sum(1).sum()
    if math.isfinite(total.item()):
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
