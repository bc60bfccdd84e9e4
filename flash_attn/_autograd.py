"""Attention as differentiable functions of q, k, v, or of tensors that pack two or three of them.

Used by ``flash_attn_interface``, which has checked its arguments.  Grouped heads are the operators'
business; everything the operators ask of a layout is arranged here.

Throughout, ``x, y, z`` are q, k, v; or q, kv, None; or qkv, None, None, with kv (..., 2, heads_k,
head_dim) and qkv (..., 3, heads, head_dim).  The gradient of a packed tensor is one tensor too: the
operators write into its parts.  ``score`` is (softmax_scale, causal, window_left, window_right,
softcap), as the operators take it; ``scalars`` (score, dropout_p, deterministic).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from flash_attn import _ops
from flash_attn._arguments import Lengths

# The CUDA kernels copy whole 16-byte vectors: 8 elements of a 2-byte type.
CUDA_HEAD_DIM_MULTIPLE = 8

# How far torch's generator advances for each query head of each sequence.
RANDOM_NUMBERS_PER_HEAD = 32


class FlashAttn(torch.autograd.Function):
    """Calls ``flash_attn::fwd`` and, for the gradients, ``bwd`` or ``bwd_into``."""

    @staticmethod
    def forward(ctx, x, y, z, alibi_slopes, rng_state, scalars, return_lse):
        q, k, v = _unpack(x, y, z)
        score, dropout_p, _ = scalars
        out, softmax_lse = _ops.fwd(q, k, v, *score, alibi_slopes, dropout_p, rng_state)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, y, z, out, softmax_lse, alibi_slopes, rng_state)
        ctx.scalars = scalars
        return (out, softmax_lse) if return_lse else out

    @staticmethod
    def backward(ctx, dout, dlse=None):
        x, y, z, out, softmax_lse, alibi_slopes, rng_state = ctx.saved_tensors
        score, dropout_p, deterministic = ctx.scalars
        dout, dlse = _gradients_of_results(dout, dlse, out)
        inputs = (dout, *_unpack(x, y, z), out, softmax_lse, dlse)
        options = (*score, alibi_slopes, dropout_p, rng_state, deterministic)
        if z is not None:
            grads = _ops.bwd(*inputs, *options)
        else:
            grads = _new_gradients(x, y)
            _ops.bwd_into(*inputs, *options, *_unpack(*grads))
        return *grads, None, None, None, None


class FlashAttnVarlen(torch.autograd.Function):
    """Calls ``flash_attn::varlen_fwd`` and, for the gradients, ``varlen_bwd`` or its ``_into``."""

    @staticmethod
    def forward(
        ctx,
        x,
        y,
        z,
        alibi_slopes,
        rng_state,
        scalars,
        return_lse,
        cu_seqlens_q,
        cu_seqlens_k,
        block_table,
        max_seqlen_q,
        max_seqlen_k,
    ):
        q, k, v = _unpack(x, y, z)
        score, dropout_p, _ = scalars
        lengths = (
            *(cu_seqlens_q, cu_seqlens_k, None, None, block_table),
            *(max_seqlen_q, max_seqlen_k),
        )
        options = (*score, alibi_slopes, dropout_p, rng_state)
        out, softmax_lse = _ops.varlen_fwd(q, k, v, *lengths, *options)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(
            x, y, z, out, softmax_lse, cu_seqlens_q, cu_seqlens_k, alibi_slopes, rng_state
        )
        ctx.scalars = scalars
        ctx.max_seqlens = max_seqlen_q, max_seqlen_k
        ctx.is_paged = block_table is not None
        return (out, softmax_lse) if return_lse else out

    @staticmethod
    def backward(ctx, dout, dlse=None):
        if ctx.is_paged:
            raise RuntimeError(
                "block_table: attention to paged k and v has no gradients; call it under"
                " torch.no_grad(), or with k and v that are not paged"
            )
        x, y, z, out, softmax_lse, *cu_seqlens, alibi_slopes, rng_state = ctx.saved_tensors
        score, dropout_p, deterministic = ctx.scalars
        dout, dlse = _gradients_of_results(dout, dlse, out)
        inputs = (dout, *_unpack(x, y, z), out, softmax_lse, dlse, *cu_seqlens, *ctx.max_seqlens)
        options = (*score, alibi_slopes, dropout_p, rng_state, deterministic)
        if z is not None:
            grads = _ops.varlen_bwd(*inputs, *options)
        else:
            grads = _new_gradients(x, y)
            _ops.varlen_bwd_into(*inputs, *options, *_unpack(*grads))
        return *grads, *(None,) * 9


def attention(
    x: Tensor,
    y: Tensor | None,
    z: Tensor | None,
    lengths: Lengths | None,
    score: tuple[float, bool, int, int, float],
    alibi_slopes: Tensor | None,
    dropout_p: float,
    deterministic: bool,
    return_attn_probs: bool,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """out, or (out, softmax_lse, S_dmask); lengths: None for tensors with a batch dimension."""
    padding = 0
    if x.is_cuda:
        # Zeros in the padding change neither q k^T nor the gradients of the real columns.
        head_dim = x.shape[-1]
        padding = -head_dim % CUDA_HEAD_DIM_MULTIPLE
        if padding:
            x, y, z = (None if t is None else F.pad(t, (0, padding)) for t in (x, y, z))
    x, y, z = maybe_contiguous(x), maybe_contiguous(y), maybe_contiguous(z)

    if alibi_slopes is not None:
        alibi_slopes = alibi_slopes.detach()  # no gradient, not even a missing one
    rng_state = None
    if dropout_p > 0:
        batch = x.shape[0] if lengths is None else lengths.cu_seqlens_q.shape[0] - 1
        rng_state = _ops.draw_rng_state(x, batch * x.shape[-2] * RANDOM_NUMBERS_PER_HEAD)
    options = (*score, alibi_slopes, dropout_p, rng_state)

    if torch.is_grad_enabled() and (
        x.requires_grad
        or (y is not None and y.requires_grad)
        or (z is not None and z.requires_grad)
    ):
        if _has_native_gradients(x, z, lengths):
            result = _attend_natively(x, y, z, lengths, options, deterministic)
            if not return_attn_probs:
                result = result[0]
        else:
            scalars = score, dropout_p, deterministic
            result = _apply(x, y, z, lengths, alibi_slopes, rng_state, scalars, return_attn_probs)
    else:
        q, k, v = _unpack(x, y, z)
        if lengths is None:
            result = _ops.fwd(q, k, v, *options)
        else:
            result = _ops.varlen_fwd(q, k, v, *lengths, *options)
        if not return_attn_probs:
            result = result[0]

    if not return_attn_probs:
        return result[..., :head_dim].contiguous() if padding else result
    out, softmax_lse = result
    if padding:
        out = out[..., :head_dim].contiguous()
    if dropout_p == 0:
        return out, softmax_lse, out.new_empty(0)
    return out, softmax_lse, _attention_probabilities(x, y, z, lengths, options)


def _has_native_gradients(x: Tensor, z: Tensor | None, lengths: Lengths | None) -> bool:
    """Whether the compiled extension's autograd function serves: it does what FlashAttn and
    FlashAttnVarlen do for q, k, v in less time on the host; torch.compile cannot trace it."""
    return (
        x.is_cuda
        and z is not None
        and _ops.extension is not None
        and (lengths is None or lengths.block_table is None)
        and not torch.compiler.is_compiling()
    )


def _attend_natively(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Lengths | None,
    options: tuple,
    deterministic: bool,
) -> tuple[Tensor, Tensor]:
    """out and softmax_lse with gradients; options as the operators take them."""
    if lengths is None:
        return _ops.extension.attend(q, k, v, *options, deterministic)
    cu_seqlens_q, cu_seqlens_k, _, _, _, *max_seqlens = lengths
    return _ops.extension.varlen_attend(
        q, k, v, cu_seqlens_q, cu_seqlens_k, *max_seqlens, *options, deterministic
    )


def _apply(
    x: Tensor,
    y: Tensor | None,
    z: Tensor | None,
    lengths: Lengths | None,
    alibi_slopes: Tensor | None,
    rng_state: Tensor | None,
    scalars: tuple,
    return_lse: bool,
) -> Tensor | tuple[Tensor, Tensor]:
    """out, or with return_lse (out, softmax_lse), with gradients."""
    # torch.compile refuses a Function that gets one tensor twice.
    if z is not None and (y is x or z is y or z is x):
        y, z = y.view_as(y), z.view_as(z)
    inputs = x, y, z, alibi_slopes, rng_state, scalars, return_lse
    if lengths is None:
        return FlashAttn.apply(*inputs)
    cu_seqlens_q, cu_seqlens_k, _, _, block_table, max_seqlen_q, max_seqlen_k = lengths
    if cu_seqlens_k is cu_seqlens_q:
        cu_seqlens_k = cu_seqlens_k.view(-1)
    return FlashAttnVarlen.apply(
        *inputs, cu_seqlens_q, cu_seqlens_k, block_table, max_seqlen_q, max_seqlen_k
    )


def maybe_contiguous(x: Tensor | None) -> Tensor | None:
    """x with a contiguous last dimension: x itself where it has one, else a copy."""
    return x.contiguous() if x is not None and x.stride(-1) != 1 else x


def _attention_probabilities(
    x: Tensor, y: Tensor | None, z: Tensor | None, lengths: Lengths | None, options: tuple
) -> Tensor:
    """S_dmask; options as the operators take them."""
    q, k, _ = _unpack(x.detach(), None if y is None else y.detach(), z)
    if lengths is None:
        return _ops.attn_probs(q, k, None, None, q.shape[1], k.shape[1], *options)
    return _ops.attn_probs(
        *(q, k, lengths.cu_seqlens_q, lengths.cu_seqlens_k),
        *(lengths.max_seqlen_q, lengths.max_seqlen_k, *options),
    )


def _unpack(x: Tensor, y: Tensor | None, z: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v: views."""
    if z is not None:
        return x, y, z
    if y is not None:
        return x, *y.unbind(-3)
    return x.unbind(-3)


def _new_gradients(x: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor | None, None]:
    """Contiguous tensors for the gradients of packed inputs."""
    return x.new_empty(x.shape), None if y is None else y.new_empty(y.shape), None


def _gradients_of_results(
    dout: Tensor | None, dlse: Tensor | None, out: Tensor
) -> tuple[Tensor, Tensor | None]:
    """dout and dlse in layouts that the operators take; None: the result was not used."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            "flash_attn can be differentiated once, not twice: its gradients have no gradients"
            " of their own, as create_graph=True demands"
        )
    dout = torch.zeros_like(out) if dout is None else maybe_contiguous(dout)
    return dout, None if dlse is None else dlse.contiguous()
