"""Names below the public functions that other libraries import from ``flash_attn_interface``.

``_flash_attn_forward`` and its three siblings are what context-parallel training is built of: one
pass each, as custom operators ``torch.ops.flash_attn._flash_attn_forward`` and so on, without
gradients of their own.  They do what the operators of ``_ops`` do, with other argument lists.

Shapes are those of ``flash_attn_func`` and ``flash_attn_varlen_func``; window sizes below 0 are
unlimited; head_dim must be a multiple of 8 on CUDA.
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from flash_attn import _checks, _ops
from flash_attn._arguments import Lengths
from flash_attn._autograd import RANDOM_NUMBERS_PER_HEAD, maybe_contiguous
from flash_attn.cpu.scores import compute_dtype

USE_TRITON_ROCM = False

# softmax_d, that callers get but hardly use, has room for whole blocks of queries.
SOFTMAX_D_ROUND = 128


def round_multiple(x: int, m: int) -> int:
    """x rounded up to a multiple of m."""
    return (x + m - 1) // m * m


def _get_block_size_n(
    device: torch.device, head_dim: int, is_dropout: bool, is_causal: bool
) -> int:
    """How many keys share a maximum in S_dmask: all, as it is relative to each row's maximum."""
    return 2**30


def function_class(name: str, function: Callable[..., Any]) -> type:
    """A class whose ``apply`` is a public function: upstream's autograd Functions, for its callers.

    apply takes the function's arguments by position and then, if given, is_grad_enabled.
    """
    count = len(inspect.signature(function).parameters)

    def apply(*arguments: Any) -> Any:
        is_grad_enabled = arguments[count] if len(arguments) > count else torch.is_grad_enabled()
        with torch.set_grad_enabled(bool(is_grad_enabled)):
            return function(*arguments[:count])

    doc = f"``apply``: {function.__name__}, then is_grad_enabled, all by position."
    return type(name, (), {"__doc__": doc, "apply": staticmethod(apply)})


def _register_shapes(op: torch.library.CustomOpDef) -> Callable:
    """Registers what op returns on fake tensors; the function names only the arguments it needs."""
    signature = inspect.signature(op._init_fn)

    def register(shapes: Callable) -> Callable:
        def fake(*args: Any, **kwargs: Any) -> Any:
            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()
            return shapes(**bound.arguments)

        op.register_fake(fake)
        return shapes

    return register


def _draw_rng_state(q: Tensor, batch: int, dropout_p: float) -> Tensor:
    """A new (seed, offset), or zeros where dropout needs none."""
    if dropout_p == 0:
        return q.new_zeros(2, dtype=torch.int64)
    return _ops.draw_rng_state(q, batch * q.shape[-2] * RANDOM_NUMBERS_PER_HEAD)


def _check_rng_state(rng_state: Tensor | None, dropout_p: float) -> None:
    if dropout_p > 0 and rng_state is None:
        raise RuntimeError(
            f"rng_state: the backward pass with dropout_p = {dropout_p} needs the seed and offset"
            " that the forward pass returned; got None"
        )


def _gradient_buffers(given: tuple[Tensor | None, ...], inputs: tuple[Tensor, ...]) -> list[Tensor]:
    """dq, dk and dv to write to; of those that are None the gradient is lost, as in upstream."""
    for name, gradient, x in zip(("dq", "dk", "dv"), given, inputs):
        if gradient is not None:
            _checks.check_gradient(name, gradient, x)
    return [x.new_empty(x.shape) if g is None else g for g, x in zip(given, inputs)]


@torch.library.custom_op(
    "flash_attn::_flash_attn_forward",
    mutates_args=(),
    tags=(torch.Tag.nondeterministic_seeded,),
)
def _flash_attn_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: Tensor | None,
    return_softmax: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(out, softmax_lse, S_dmask, rng_state) of attention.

    S_dmask is empty, (0,), unless ``return_softmax`` and dropout_p > 0.  rng_state, int64 (2,), is the
    seed and offset of dropout, for the backward pass; zeros without dropout.
    """
    _checks.check_qkv(q, k, v)
    score = _checks.check_options(
        *(q, q.shape[0], dropout_p, softmax_scale, causal),
        *((window_size_left, window_size_right), softcap, alibi_slopes),
    )
    q, k, v = maybe_contiguous(q), maybe_contiguous(k), maybe_contiguous(v)
    rng_state = _draw_rng_state(q, q.shape[0], dropout_p)
    options = (*score, alibi_slopes, dropout_p, rng_state)
    out, softmax_lse = _ops.fwd(q, k, v, *options)
    probabilities = q.new_empty(0)
    if return_softmax and dropout_p > 0:
        probabilities = _ops.attn_probs(q, k, None, None, q.shape[1], k.shape[1], *options)
    return out, softmax_lse, probabilities, rng_state


@_register_shapes(_flash_attn_forward)
def _forward_shapes(q, k, v, dropout_p, return_softmax, **_) -> tuple[Tensor, ...]:
    out, softmax_lse = _ops.fwd_shapes(q, k, v)
    probabilities = q.new_empty(0)
    if return_softmax and dropout_p > 0:
        probabilities = _ops.attn_probs_shapes(q, k, None, None, q.shape[1], k.shape[1])
    return out, softmax_lse, probabilities, _ops.draw_rng_state_shapes(q, 0)


@torch.library.custom_op(
    "flash_attn::_flash_attn_varlen_forward",
    mutates_args=(),
    tags=(torch.Tag.nondeterministic_seeded,),
)
def _flash_attn_varlen_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int = -1,
    window_size_right: int = -1,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    return_softmax: bool = False,
    block_table: Tensor | None = None,
    leftpad_k: Tensor | None = None,
    seqused_k: Tensor | None = None,
    zero_tensors: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(out, softmax_lse, S_dmask, rng_state) of sequences of different lengths.

    seqused_k: (batch,), int32: only so many of each sequence's keys count.  leftpad_k: (batch,),
    int32: so many of these are skipped, and the sequence begins after them.  zero_tensors changes
    nothing: rows of no sequence have out 0 and softmax_lse +inf in any case.
    """
    lengths = Lengths(
        *(cu_seqlens_q, cu_seqlens_k, seqused_k, leftpad_k, block_table),
        *(max_seqlen_q, max_seqlen_k),
    )
    _checks.check_varlen(q, k, v, lengths)
    batch = cu_seqlens_q.shape[0] - 1
    score = _checks.check_options(
        *(q, batch, dropout_p, softmax_scale, causal),
        *((window_size_left, window_size_right), softcap, alibi_slopes),
    )
    _checks.check_no_dropout_of_pages(block_table, dropout_p)
    has_probabilities = return_softmax and dropout_p > 0
    if has_probabilities and any(x is not None for x in (leftpad_k, seqused_k)):
        raise RuntimeError("return_softmax: S_dmask is not available with leftpad_k or seqused_k")
    _checks.check_lengths_on_demand(q, k, lengths)
    q, k, v = maybe_contiguous(q), maybe_contiguous(k), maybe_contiguous(v)
    rng_state = _draw_rng_state(q, batch, dropout_p)
    options = (*score, alibi_slopes, dropout_p, rng_state)
    out, softmax_lse = _ops.varlen_fwd(q, k, v, *lengths, *options)
    probabilities = q.new_empty(0)
    if has_probabilities:
        sequences = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
        probabilities = _ops.attn_probs(q, k, *sequences, *options)
    return out, softmax_lse, probabilities, rng_state


@_register_shapes(_flash_attn_varlen_forward)
def _varlen_forward_shapes(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, return_softmax, **_
) -> tuple[Tensor, ...]:
    out, softmax_lse = _ops.varlen_fwd_shapes(q, k, v)
    probabilities = q.new_empty(0)
    if return_softmax and dropout_p > 0:
        sequences = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
        probabilities = _ops.attn_probs_shapes(q, k, *sequences)
    return out, softmax_lse, probabilities, _ops.draw_rng_state_shapes(q, 0)


@torch.library.custom_op("flash_attn::_flash_attn_backward", mutates_args=("dq", "dk", "dv"))
def _flash_attn_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: Tensor | None,
    deterministic: bool,
    rng_state: Tensor | None = None,
) -> Tensor:
    """Writes the gradients to dq, dk and dv; returns softmax_d.

    rng_state: what the forward pass returned; needed if dropout_p > 0.
    softmax_d: (batch, heads_q, seqlen_q rounded up to 128), fp32: rowsum(dout * out), 0 in the padding.
    """
    _checks.check_qkv(q, k, v)
    score = _checks.check_options(
        *(q, q.shape[0], dropout_p, softmax_scale, causal),
        *((window_size_left, window_size_right), softcap, alibi_slopes),
    )
    _check_rng_state(rng_state, dropout_p)
    options = (*score, alibi_slopes, dropout_p, rng_state if dropout_p > 0 else None)
    dout, q, k, v, out = map(maybe_contiguous, (dout, q, k, v, out))
    gradients = _gradient_buffers((dq, dk, dv), (q, k, v))
    _ops.bwd_into(
        *(dout, q, k, v, out, softmax_lse.contiguous(), None, *options, deterministic),
        *gradients,
    )
    delta = (dout.to(compute_dtype(q)) * out).sum(-1).transpose(1, 2)  # (batch, heads_q, seqlen_q)
    return F.pad(delta, (0, -q.shape[1] % SOFTMAX_D_ROUND)).contiguous()


@_register_shapes(_flash_attn_backward)
def _backward_shapes(q, **_) -> Tensor:
    batch, seqlen_q, heads_q, _head_dim = q.shape
    shape = batch, heads_q, round_multiple(seqlen_q, SOFTMAX_D_ROUND)
    return q.new_empty(shape, dtype=compute_dtype(q))


@torch.library.custom_op("flash_attn::_flash_attn_varlen_backward", mutates_args=("dq", "dk", "dv"))
def _flash_attn_varlen_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: Tensor | None,
    deterministic: bool,
    rng_state: Tensor | None = None,
    zero_tensors: bool = False,
) -> Tensor:
    """Writes the gradients to dq, dk and dv; returns softmax_d.

    rng_state: what the forward pass returned; needed if dropout_p > 0.
    softmax_d: (heads_q, total_q + 128 * batch), fp32: rowsum(dout * out), 0 in the padding, all of
    which comes last.
    """
    lengths = Lengths(cu_seqlens_q, cu_seqlens_k, None, None, None, max_seqlen_q, max_seqlen_k)
    _checks.check_varlen(q, k, v, lengths)
    batch = cu_seqlens_q.shape[0] - 1
    score = _checks.check_options(
        *(q, batch, dropout_p, softmax_scale, causal),
        *((window_size_left, window_size_right), softcap, alibi_slopes),
    )
    _check_rng_state(rng_state, dropout_p)
    options = (*score, alibi_slopes, dropout_p, rng_state if dropout_p > 0 else None)
    _checks.check_lengths_on_demand(q, k, lengths)
    dout, q, k, v, out = map(maybe_contiguous, (dout, q, k, v, out))
    gradients = _gradient_buffers((dq, dk, dv), (q, k, v))
    _ops.varlen_bwd_into(
        *(dout, q, k, v, out, softmax_lse.contiguous(), None),
        *(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k),
        *(*options, deterministic, *gradients),
    )
    delta = (dout.to(compute_dtype(q)) * out).sum(-1).transpose(0, 1)  # (heads_q, total_q)
    return F.pad(delta, (0, SOFTMAX_D_ROUND * batch)).contiguous()


@_register_shapes(_flash_attn_varlen_backward)
def _varlen_backward_shapes(q, cu_seqlens_q, **_) -> Tensor:
    total_q, heads_q, _head_dim = q.shape
    batch = cu_seqlens_q.shape[0] - 1
    return q.new_empty((heads_q, total_q + SOFTMAX_D_ROUND * batch), dtype=compute_dtype(q))


_wrapped_flash_attn_forward = torch.ops.flash_attn._flash_attn_forward
_wrapped_flash_attn_varlen_forward = torch.ops.flash_attn._flash_attn_varlen_forward
_wrapped_flash_attn_backward = torch.ops.flash_attn._flash_attn_backward
_wrapped_flash_attn_varlen_backward = torch.ops.flash_attn._flash_attn_varlen_backward
