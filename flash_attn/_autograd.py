"""Attention as one differentiable function of (batch, seqlen, heads, head_dim) tensors.

Used by ``flash_attn_interface``, which has checked its arguments.  Packed inputs arrive as views:
torch puts their gradients together.  Grouped heads are the operators' business; everything the
operators ask of a layout is arranged here.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from flash_attn import _ops

# The CUDA kernels copy whole 16-byte vectors: 8 elements of a 2-byte type.
CUDA_HEAD_DIM_MULTIPLE = 8


class FlashAttn(torch.autograd.Function):
    """Calls ``flash_attn::fwd`` and, for the gradients of q, k and v, ``flash_attn::bwd``."""

    @staticmethod
    def forward(ctx, q, k, v, softmax_scale, causal, deterministic, return_lse):
        out, softmax_lse = _ops.fwd(q, k, v, softmax_scale, causal)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(q, k, v, out, softmax_lse)
        ctx.options = softmax_scale, causal, deterministic
        return (out, softmax_lse) if return_lse else out

    @staticmethod
    def backward(ctx, dout, dlse=None):
        if torch.is_grad_enabled():
            raise RuntimeError(
                "flash_attn can be differentiated once, not twice: its gradients have no gradients"
                " of their own, as create_graph=True demands"
            )
        q, k, v, out, softmax_lse = ctx.saved_tensors
        if dout is None:
            dout = torch.zeros_like(out)
        if dlse is not None:
            dlse = dlse.contiguous()
        grads = _ops.bwd(maybe_contiguous(dout), q, k, v, out, softmax_lse, dlse, *ctx.options)
        return *grads, None, None, None, None


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    softmax_scale: float | None,
    causal: bool,
    deterministic: bool,
    return_lse: bool,
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(softmax_scale * q k^T) v, and with ``return_lse`` the log-sum-exp of its rows."""
    head_dim = q.shape[-1]
    if softmax_scale is None:
        softmax_scale = head_dim**-0.5

    # Zeros in the padding change neither q k^T nor the gradients of the real columns.
    padding = -head_dim % CUDA_HEAD_DIM_MULTIPLE if q.is_cuda else 0
    if padding:
        q, k, v = F.pad(q, (0, padding)), F.pad(k, (0, padding)), F.pad(v, (0, padding))
    q, k, v = maybe_contiguous(q), maybe_contiguous(k), maybe_contiguous(v)

    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        # torch.compile refuses a Function that gets one tensor twice.
        if v is k or v is q:
            v = v.view_as(v)
        if k is q:
            k = k.view_as(k)
        result = FlashAttn.apply(q, k, v, softmax_scale, causal, deterministic, return_lse)
    else:
        result = _ops.fwd(q, k, v, softmax_scale, causal)
        if not return_lse:
            result = result[0]

    if not padding:
        return result
    if return_lse:
        out, softmax_lse = result
        return out[..., :head_dim].contiguous(), softmax_lse
    return result[..., :head_dim].contiguous()


def maybe_contiguous(x: Tensor | None) -> Tensor | None:
    """x with a contiguous last dimension: x itself where it has one, else a copy."""
    return x.contiguous() if x is not None and x.stride(-1) != 1 else x
