"""Merging of partial results: attention to all keys from attention to parts of them.

A public function of ``flash_attn_interface``, with its documentation and its gradient.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from flash_attn import _checks_decode, _ops, _transforms, _vmap
from flash_attn._autograd import CUDA_HEAD_DIM_MULTIPLE, maybe_contiguous


def merge_states(
    out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor
) -> tuple[Tensor, Tensor]:
    """Attention to the keys of two parts together, from the results of each part alone.

    With w_a = exp(lse_a - lse) and w_b = exp(lse_b - lse), which add up to 1::

        lse = log(exp(lse_a) + exp(lse_b))
        out = w_a * out_a + w_b * out_b

    More parts are merged one after another, in any order.  The parts may come from any function
    that returns softmax_lse, and must be of the same queries, scale, softcap and positions.  A part
    whose lse is +inf or -inf saw no key: it has weight 0, whatever its out holds.  Where neither
    part saw one, out is 0 and lse +inf.

    All four arguments get gradients, from those of out and lse::

        dout_a = w_a * dout         dlse_a = w_a * (dlse + dout . (out_a - out))

    and the same with b; a part that saw no key gets 0.

    Args:
        out_a: (batch, seqlen, heads, head_dim), or of varlen sequences (total, heads, head_dim); fp16
            or bf16, on the CPU fp32 and fp64 besides.
        lse_a: (batch, heads, seqlen), or (heads, total); fp32 (fp64 for fp64 out_a).
        out_b: the shape, dtype and device of out_a.
        lse_b: the shape, dtype and device of lse_a.

    Returns:
        (out, lse): contiguous, in the shapes and dtypes of out_a and lse_a; computed in fp32 (fp64).

    Raises:
        RuntimeError: an argument has a wrong shape, dtype or device, or the CUDA extension is not
            built.
    """
    _transforms.refuse_compiled("merge_states")
    _checks_decode.check_states(out_a, lse_a, out_b, lse_b)
    head_dim = out_a.shape[-1]
    padding = -head_dim % CUDA_HEAD_DIM_MULTIPLE if out_a.is_cuda else 0
    if padding:
        out_a, out_b = F.pad(out_a, (0, padding)), F.pad(out_b, (0, padding))
    states = (
        *(maybe_contiguous(out_a), lse_a.contiguous()),
        *(maybe_contiguous(out_b), lse_b.contiguous()),
    )
    _transforms.refuse_tangents("merge_states", *states)
    if not torch.compiler.is_compiling() and _transforms.are_active():
        out, lse = TransformedMergeStates.apply(*states)
    elif torch.is_grad_enabled() and any(x.requires_grad for x in states):
        out, lse = MergeStates.apply(*states)
    else:
        out, lse = _ops.merge_states(*states)
    return (out[..., :head_dim].contiguous() if padding else out), lse


class MergeStates(torch.autograd.Function):
    """Calls ``flash_attn::merge_states``; the backward pass is plain torch operations."""

    @staticmethod
    def forward(out_a, lse_a, out_b, lse_b):
        return _ops.merge_states(out_a, lse_a, out_b, lse_b)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs, *output)

    @staticmethod
    def backward(ctx, dout, dlse):
        out_a, lse_a, out_b, lse_b, out, lse = ctx.saved_tensors
        if dout is None and dlse is None:
            return None, None, None, None
        grads_a = _gradients_of_part(out_a, lse_a, out, lse, dout, dlse)
        return *grads_a, *_gradients_of_part(out_b, lse_b, out, lse, dout, dlse)

    @staticmethod
    def vmap(info, in_dims, *states):
        """The rows of all examples are rows of one batch, or heads of one ragged tensor."""
        size, dims = info.batch_size, _vmap.outer_dims(in_dims)
        is_ragged = states[1].dim() - (dims[1] is not None) == 2  # (heads, total)
        if not is_ragged:
            folded = [_vmap.fold_batch(x, d, size) for x, d in zip(states, dims)]
            out, lse = TransformedMergeStates.apply(*folded)
            return (out.unflatten(0, (size, -1)), lse.unflatten(0, (size, -1))), (0, 0)
        as_heads = (_vmap.fold_heads(x, d, size, -2) for x, d in zip(states, dims))
        out, lse = TransformedMergeStates.apply(*(x.contiguous() for x in as_heads))
        (out, dim), (lse, lse_dim) = (_vmap.unfold_heads(x, size, -2) for x in (out, lse))
        return (out, lse), (dim, lse_dim)


class TransformedMergeStates(MergeStates):
    """The same for torch.func, which asks it for a tangent; torch.compile refuses such a function."""

    @staticmethod
    def jvp(ctx, *tangents):
        _transforms.raise_no_forward_mode("merge_states")


def _gradients_of_part(
    out_part: Tensor,
    lse_part: Tensor,
    out: Tensor,
    lse: Tensor,
    dout: Tensor | None,
    dlse: Tensor | None,
) -> tuple[Tensor | None, Tensor]:
    """The gradients of one part's out and lse, given those of the merged ones."""
    is_empty = lse_part.isinf()
    weight = (lse_part.masked_fill(is_empty, -math.inf) - lse.masked_fill(is_empty, 0)).exp()
    if dout is None:
        assert dlse is not None  # somebody wants a gradient
        return None, (weight * dlse).masked_fill(is_empty, 0)
    by_row = weight.transpose(-1, -2).unsqueeze(-1)  # (..., seqlen, heads, 1)
    dout = dout.to(weight.dtype)
    dlse_part = (dout * (out_part.to(weight.dtype) - out)).sum(-1).transpose(-1, -2)
    if dlse is not None:
        dlse_part = dlse_part + dlse
    dlse_part = (weight * dlse_part).masked_fill(is_empty, 0)
    return (by_row * dout).to(out_part.dtype), dlse_part
