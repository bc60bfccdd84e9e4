"""Attention as differentiable functions of q, k, v, or of tensors that pack two or three of them.

Used by ``flash_attn_interface``, which has checked its arguments.  Grouped heads are the operators'
business; everything the operators ask of a layout is arranged here.

Throughout, ``x, y, z`` are q, k, v; or q, kv, None; or qkv, None, None, with kv (..., 2, heads_k,
head_dim) and qkv (..., 3, heads, head_dim).  The gradient of a packed tensor is one tensor too: the
operators write into its parts.  ``score`` is (softmax_scale, causal, window_left, window_right,
softcap), as the operators take it.

``FlashAttention`` serves plain autograd, torch.compile and the transforms of torch.func.  For the usual
calls on CUDA the compiled extension records the same in less time (csrc/torch/fast_path); it knows of
``gradients``, and this module does not know of it.
"""

from collections.abc import Callable
from typing import Any, overload

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._C import _functorch

from flash_attn import _checks, _ops, _transforms, _vmap
from flash_attn._ops import Lengths
from flash_attn._vmap import Statics, maybe_contiguous

# The CUDA kernels copy whole 16-byte vectors: 8 elements of a 2-byte type.
CUDA_HEAD_DIM_MULTIPLE = 8

ONCE = (
    "flash_attn can be differentiated once, not twice: its gradients have no gradients of their own,"
    " as create_graph=True demands"
)


class FlashAttention(torch.autograd.Function):
    """(out, softmax_lse, S_dmask, rng_state), with gradients of the first two.

    scale, softcap: tensors of one element that take the place of score's numbers, or None.  Only
    scale gets a gradient.  The lengths are None for tensors with a batch dimension.  rng_state: None
    to draw a new one.  statics: a tuple, ``Statics``, since torch.compile takes no other here.
    """

    @staticmethod
    def forward(
        x, y, z, scale, softcap, alibi_slopes, rng_state, cu_seqlens_q, cu_seqlens_k, block_table,
        statics,
    ):  # fmt: skip
        return call_forward(
            *(x, y, z, scale, softcap, alibi_slopes, rng_state),
            *(cu_seqlens_q, cu_seqlens_k, block_table, statics),
        )

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, y, z, scale, softcap, alibi_slopes, _, cu_seqlens_q, cu_seqlens_k, table, statics = (
            inputs
        )
        out, softmax_lse, probabilities, rng_state = output
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(probabilities, rng_state)
        state = rng_state if Statics(*statics).dropout_p > 0 else None
        ctx.save_for_backward(
            *(x, y, z, out, softmax_lse, scale, softcap, alibi_slopes),
            *(state, cu_seqlens_q, cu_seqlens_k),
        )
        ctx.is_paged = table is not None
        ctx.statics = statics

    @staticmethod
    def backward(ctx, dout, dlse, _dprobabilities, _drng_state):
        return backward_of(ctx, dout, dlse, gradients)

    @staticmethod
    def vmap(info, in_dims, *arguments):
        return _vmap.forward_rule(TransformedFlashAttention.apply, info, in_dims, arguments)


def backward_of(
    ctx: Any, dout: Tensor | None, dlse: Tensor | None, gradients: Callable[..., tuple[Tensor, ...]]
) -> tuple[Tensor | None, ...]:
    """The gradients of ``FlashAttention``'s arguments; gradients: the function below, or one like it."""
    if ctx.is_paged:
        raise RuntimeError(
            "block_table: attention to paged k and v has no gradients; call it under"
            " torch.no_grad(), or with k and v that are not paged"
        )
    x, y, z, out, *others = ctx.saved_tensors
    dout = torch.zeros_like(out) if dout is None else maybe_contiguous(dout)
    dlse = None if dlse is None else dlse.contiguous()
    grads = gradients(dout, dlse, x, y, z, out, *others, ctx.statics)
    scale, dscale = others[1], None
    if scale is not None and ctx.needs_input_grad[3]:
        dscale = gradient_of_scale(x, y, z, grads, scale)
    return *grads, *(None,) * (3 - len(grads)), dscale, *(None,) * 7


class TransformedFlashAttention(FlashAttention):
    """The same for torch.func, which asks it for a tangent; torch.compile refuses such a function."""

    @staticmethod
    def jvp(ctx, *tangents):
        _transforms.raise_no_forward_mode("flash_attn")


class FlashAttentionGradients(torch.autograd.Function):
    """The gradients of x, y and z, those of None left out: a function that vmap can follow.

    It has no gradient: whoever asks for one is told so.
    """

    @staticmethod
    def forward(
        dout, dlse, x, y, z, out, softmax_lse, scale, softcap, alibi_slopes, rng_state,
        cu_seqlens_q, cu_seqlens_k, statics,
    ):  # fmt: skip
        return call_backward(
            *(dout, dlse, x, y, z, out, softmax_lse, scale, softcap, alibi_slopes, rng_state),
            *(cu_seqlens_q, cu_seqlens_k, statics),
        )

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, *grads):
        raise RuntimeError(ONCE)

    @staticmethod
    def jvp(ctx, *tangents):
        _transforms.raise_no_forward_mode("flash_attn's gradient")

    @staticmethod
    def vmap(info, in_dims, *arguments):
        return _vmap.backward_rule(FlashAttentionGradients.apply, info, in_dims, arguments)


def gradients(dout: Tensor, dlse: Tensor | None, *saved: Any) -> tuple[Tensor, ...]:
    """The gradients of x, y and z, those of None left out.

    dout, dlse: the gradients of out and softmax_lse, in layouts that the operators take.  saved: the
    arguments of ``FlashAttentionGradients`` after them.

    Raises:
        RuntimeError: create_graph=True, as the gradients have none; for torch.func, which always
            asks for a graph, only where the graph is used.
    """
    if not torch.compiler.is_compiling() and _transforms.are_active_or_wrap(saved[0]):
        return FlashAttentionGradients.apply(dout, dlse, *saved)
    if torch.is_grad_enabled():
        raise RuntimeError(ONCE)
    return call_backward(dout, dlse, *saved)


def call_forward(
    x: Tensor,
    y: Tensor | None,
    z: Tensor | None,
    scale: Tensor | None,
    softcap: Tensor | None,
    alibi_slopes: Tensor | None,
    rng_state: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    block_table: Tensor | None,
    statics: tuple,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The operator of a call: (out, softmax_lse, S_dmask, rng_state), without gradients."""
    score, dropout_p, deterministic, return_softmax, max_seqlen_q, max_seqlen_k = statics
    q, k, v = _unpack(x, y, z)
    options = dropout_p, *score, alibi_slopes, return_softmax
    ours = dict(rng_state=rng_state, softmax_scale_tensor=scale, softcap_tensor=softcap)
    ours["deterministic"] = deterministic
    if cu_seqlens_q is None:
        return _ops.forward(q, k, v, *options, **ours)
    lengths = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
    return _ops.varlen_forward(q, k, v, *lengths, *options, block_table, **ours)


def call_backward(
    dout: Tensor,
    dlse: Tensor | None,
    x: Tensor,
    y: Tensor | None,
    z: Tensor | None,
    out: Tensor,
    softmax_lse: Tensor,
    scale: Tensor | None,
    softcap: Tensor | None,
    alibi_slopes: Tensor | None,
    rng_state: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    statics: tuple,
) -> tuple[Tensor, ...]:
    """The operator of a backward pass: the gradients of x, y and z, those of None left out."""
    score, dropout_p, deterministic, _, max_seqlen_q, max_seqlen_k = statics
    inputs = (dout, *_unpack(x, y, z), out, softmax_lse)
    lengths: tuple = ()
    if cu_seqlens_q is not None:
        lengths = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
    options = *lengths, dropout_p, *score, alibi_slopes, deterministic, rng_state
    ours = dict(dlse=dlse, softmax_scale_tensor=scale, softcap_tensor=softcap)
    # The CPU has new tensors to return; those of x, y and z are filled where q, k and v are parts.
    returns_new = x.device.type == "cpu" and z is not None and not torch.compiler.is_compiling()
    if returns_new or _is_batched_by_autograd(dout) or _is_batched_by_autograd(dlse):
        functional = _ops.varlen_backward_functional if lengths else _ops.backward_functional
        return _pack(x, y, z, functional(*inputs, *options, **ours))
    grads = tuple(t.new_empty(t.shape) for t in (x, y, z) if t is not None)
    backward = _ops.varlen_backward if lengths else _ops.backward
    backward(*inputs, *_unpack(*grads), *options, return_softmax_d=False, **ours)
    return grads


def _is_batched_by_autograd(x: Tensor | None) -> bool:
    """Whether torch.autograd.grad(..., is_grads_batched=True) made x; torch.func's vmap did not."""
    if x is None or torch.compiler.is_compiling():
        return False
    return _functorch.is_legacy_batchedtensor(x)


def attention(
    function: str,
    x: Tensor,
    y: Tensor | None,
    z: Tensor | None,
    lengths: Lengths | None,
    score: tuple[float | Tensor, bool, int, int, float | Tensor],
    alibi_slopes: Tensor | None,
    dropout_p: float,
    deterministic: bool,
    return_attn_probs: bool,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """out, or (out, softmax_lse, S_dmask); lengths: None for tensors with a batch dimension.

    function: the public function's name, for messages.
    """
    numbers, scale, softcap = split_score(function, score)
    _transforms.refuse_tangents(function, x, y, z, scale, softcap, alibi_slopes)
    head_dim_v = x.shape[-1] if z is None else z.shape[-1]
    # Zeros in the padding change neither q k^T nor the gradients of the real columns.  Of pages the
    # operator pads those that it uses.
    if x.is_cuda and (lengths is None or lengths.block_table is None):
        x, y, z = _padded(x), _padded(y), _padded(z)
    x, y, z = maybe_contiguous(x), maybe_contiguous(y), maybe_contiguous(z)
    if alibi_slopes is not None:
        alibi_slopes = alibi_slopes.detach()  # no gradient, not even a missing one

    statics = Statics(numbers, dropout_p, deterministic, return_attn_probs, None, None)
    cu_seqlens_q = cu_seqlens_k = block_table = None
    if lengths is not None:
        cu_seqlens_q, cu_seqlens_k, _, _, block_table, max_seqlen_q, max_seqlen_k = lengths
        statics = statics._replace(max_seqlen_q=max_seqlen_q, max_seqlen_k=max_seqlen_k)
    out, softmax_lse, probabilities, _ = _record(
        function,
        *(x, y, z, scale, softcap, alibi_slopes, None),
        *(cu_seqlens_q, cu_seqlens_k, block_table, tuple(statics)),
    )
    if out.shape[-1] != head_dim_v:
        out = out[..., :head_dim_v].contiguous()
    return (out, softmax_lse, probabilities) if return_attn_probs else out


@overload
def _padded(x: Tensor) -> Tensor: ...
@overload
def _padded(x: Tensor | None) -> Tensor | None: ...
def _padded(x: Tensor | None) -> Tensor | None:
    """x, with zeros up to a head_dim that CUDA kernels read."""
    padding = 0 if x is None else -x.shape[-1] % CUDA_HEAD_DIM_MULTIPLE
    return F.pad(x, (0, padding)) if x is not None and padding else x


def refuse_gradient_of_own_head_dim(
    function: str, q: Tensor, k: Tensor | None, v: Tensor | None, scale: Tensor | None
) -> None:
    """Raises on CUDA where somebody wants a gradient and v has a head_dim of its own.

    The backward pass has no kernels for it: better said before the forward pass than after.
    """
    if v is None or not q.is_cuda or v.shape[-1] == q.shape[-1] or not torch.is_grad_enabled():
        return
    if _transforms.asks_for_gradient(q, k, v, scale):
        raise RuntimeError(
            f"{function}: on CUDA there are no gradients where v has a head_dim of its own, as the"
            f" backward kernels for it are missing; got head_dim {v.shape[-1]} of v and"
            f" {q.shape[-1]} of q and k (multiples of 8), and a tensor that requires a gradient. Call"
            " it under torch.no_grad(), or pad the narrower ones with zeros: v, and cut out, or q and"
            " k, with softmax_scale given"
        )


def _record(function: str, x: Tensor, y: Tensor | None, z: Tensor | None, *others: Any) -> tuple:
    """``call_forward``, with gradients where somebody wants them."""
    refuse_gradient_of_own_head_dim(function, x, y, z, others[0])
    if not torch.compiler.is_compiling() and _transforms.are_active():
        if Statics(*others[-1]).dropout_p > 0:
            x = _transforms.with_randomness(function, x)
        return TransformedFlashAttention.apply(x, y, z, *others)
    if z is None or Statics(*others[-1]).dropout_p > 0:
        # Packed gradients are written in place, and only vmap itself knows of unbatched dropout.
        _transforms.refuse_compiled(function)
    if torch.compiler.is_compiling() and z is not None:
        # torch.compile follows transforms through the operator's own derivative, not through ours.
        return call_forward(x, y, z, *others)
    tensors = x, y, z, others[0]
    if not (torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)):
        return call_forward(x, y, z, *others)
    # torch.compile refuses a Function that gets one tensor twice.
    cu_seqlens_q, cu_seqlens_k = others[4:6]
    if cu_seqlens_k is not None and cu_seqlens_k is cu_seqlens_q:
        others = (*others[:5], cu_seqlens_k.view(-1), *others[6:])
    return FlashAttention.apply(x, y, z, *others)


def split_score(
    function: str, score: tuple
) -> tuple[tuple[float, bool, int, int, float], Tensor | None, Tensor | None]:
    """score in numbers, and the tensors that are to be read by the operators.

    A tensor is read here, where it is a constant: the operators would do nothing else.
    """
    softmax_scale, causal, left, right, softcap = score
    tensors: list[Tensor | None] = []
    for x in (softmax_scale, softcap):
        is_read_later = isinstance(x, Tensor) and (
            torch.compiler.is_compiling()
            or _transforms.are_active()
            or torch._C._len_torch_dispatch_stack() > 0
            or _transforms.asks_for_gradient(x)
        )
        tensors.append(x if is_read_later else None)
    if tensors[1] is not None and _transforms.asks_for_gradient(softcap):
        raise RuntimeError(
            f"{function}: softcap has no gradient; got a tensor that requires one. Give"
            " softcap.detach(), or a number"
        )
    scale, cap = tensors
    softmax_scale = 0.0 if scale is not None else _checks.read_number(softmax_scale)
    softcap = 0.0 if cap is not None else _checks.check_softcap(_checks.read_number(softcap))
    return (softmax_scale, causal, left, right, softcap), scale, cap


def gradient_of_scale(
    x: Tensor, y: Tensor | None, z: Tensor | None, grads: tuple[Tensor, ...], scale: Tensor
) -> Tensor:
    """sum(q * dq) / scale: scores are scale * q.k, so that q * dscore/dq = scale * dscore/dscale."""
    q, dq = _unpack(x, y, z)[0], _unpack(*grads)[0]
    dtype = _ops.compute_dtype(q)
    total = (q.detach().to(dtype) * dq.to(dtype)).sum()
    return (total.to(scale.device) / scale.detach()).to(scale.dtype).reshape(scale.shape)


def _unpack(
    x: Tensor, y: Tensor | None = None, z: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v: views."""
    if y is None:
        x, y, z = x.unbind(-3)
    elif z is None:
        y, z = y.unbind(-3)
    return x, y, z


def _pack(
    x: Tensor, y: Tensor | None, z: Tensor | None, grads: tuple[Tensor, Tensor, Tensor]
) -> tuple[Tensor, ...]:
    """The gradients of q, k and v as those of x, y and z."""
    if z is not None:
        return grads
    if y is not None:
        return grads[0], torch.stack(grads[1:], -3)
    return (torch.stack(grads, -3),)
