"""Names below the public functions that other libraries import from ``flash_attn_interface``.

``_flash_attn_forward`` and its three siblings are what context-parallel training is built of: one
pass each, without gradients of their own.  They check their arguments and call the operators
``torch.ops.flash_attn._flash_attn_forward`` and so on, which have the same names and arguments.

Shapes are those of ``flash_attn_func`` and ``flash_attn_varlen_func``; window sizes below 0 are
unlimited; head_dim must be a multiple of 8 on CUDA.
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from flash_attn import _checks, _checks_data, _checks_decode, _ops
from flash_attn._ops import Lengths

USE_TRITON_ROCM = False


def round_multiple(x: int, m: int) -> int:
    """x rounded up to a multiple of m."""
    return _ops.round_up(x, m)


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


def _two_numbers(rng_state: Tensor) -> Tensor:
    """(2,): what upstream returns without dropout too."""
    return rng_state if rng_state.numel() else rng_state.new_zeros(2)


def _check_rng_state(rng_state: Tensor | None, dropout_p: float) -> None:
    if dropout_p > 0 and rng_state is None:
        raise RuntimeError(
            f"rng_state: the backward pass with dropout_p = {dropout_p} needs the seed and offset"
            " that the forward pass returned; got None"
        )


def _check_gradients(given: tuple[Tensor | None, ...], inputs: tuple[Tensor, ...]) -> None:
    """dq, dk and dv to write to; of those that are None the gradient is lost, as in upstream."""
    for name, gradient, x in zip(("dq", "dk", "dv"), given, inputs):
        if gradient is not None:
            _checks.check_gradient(name, gradient, x)


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
    *results, rng_state = _ops.forward(q, k, v, dropout_p, *score, alibi_slopes, return_softmax)
    return *results, _two_numbers(rng_state)


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
    num_splits: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(out, softmax_lse, S_dmask, rng_state) of sequences of different lengths.

    seqused_k: (batch,), int32: only so many of each sequence's keys count.  leftpad_k: (batch,),
    int32: so many of these are skipped, and the sequence begins after them.  zero_tensors changes
    nothing: rows of no sequence have out 0 and softmax_lse +inf in any case.  num_splits: with a
    block_table, as of ``flash_attn_with_kvcache``; it changes nothing without.
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
    if return_softmax and dropout_p > 0 and (leftpad_k is not None or seqused_k is not None):
        raise RuntimeError("return_softmax: S_dmask is not available with leftpad_k or seqused_k")
    num_splits = _checks_decode.check_num_splits(num_splits)
    _checks_data.check_lengths_on_demand(q, k, lengths)
    *results, rng_state = _ops.varlen_forward(
        *(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, *score),
        *(alibi_slopes, return_softmax, block_table, leftpad_k, seqused_k),
        *(zero_tensors, num_splits),
    )
    return *results, _two_numbers(rng_state)


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
    _check_gradients((dq, dk, dv), (q, k, v))
    return _ops.backward(
        *(dout, q, k, v, out, softmax_lse, dq, dk, dv, dropout_p, *score, alibi_slopes),
        *(deterministic, rng_state if dropout_p > 0 else None),
    )


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
    score = _checks.check_options(
        *(q, cu_seqlens_q.shape[0] - 1, dropout_p, softmax_scale, causal),
        *((window_size_left, window_size_right), softcap, alibi_slopes),
    )
    _check_rng_state(rng_state, dropout_p)
    _check_gradients((dq, dk, dv), (q, k, v))
    _checks_data.check_lengths_on_demand(q, k, lengths)
    return _ops.varlen_backward(
        *(dout, q, k, v, out, softmax_lse, dq, dk, dv),
        *(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, *score),
        *(alibi_slopes, deterministic, rng_state if dropout_p > 0 else None, zero_tensors),
    )


_wrapped_flash_attn_forward = torch.ops.flash_attn._flash_attn_forward
_wrapped_flash_attn_varlen_forward = torch.ops.flash_attn._flash_attn_varlen_forward
_wrapped_flash_attn_backward = torch.ops.flash_attn._flash_attn_backward
_wrapped_flash_attn_varlen_backward = torch.ops.flash_attn._flash_attn_varlen_backward
