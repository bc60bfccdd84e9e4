"""Registers the CPU backend as the operators' implementation on the CPU.

Used by ``_ops``, which documents the operators.  Arguments come in the order of the schemas; from here
on they are grouped: ``Options``, ``Lengths``, ``Cache``.  Dense and variable length are one
implementation: ``lengths`` is None where tensors have a batch dimension.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from flash_attn import _ops
from flash_attn._checks import check_number
from flash_attn._checks_data import check_cache_contents, check_lengths
from flash_attn._ops import Cache, Lengths, Options
from flash_attn._overlap import check_written
from flash_attn.cpu import attention, checks, decode, varlen
from flash_attn.cpu.isolation import isolated
from flash_attn.cpu.scores import compute_dtype


def draw_rng_state() -> Tensor:
    """Two numbers of torch's generator: the seed and the offset of a call's dropout."""
    return torch.empty(2, dtype=torch.int64, device="cpu").random_()


def _options(
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_left: int,
    window_right: int,
    softcap: float,
    alibi_slopes: Tensor | None,
    rng_state: Tensor | None,
    softmax_scale_tensor: Tensor | None,
    softcap_tensor: Tensor | None,
) -> Options:
    checks.check_number(softmax_scale_tensor, "softmax_scale_tensor")
    checks.check_number(softcap_tensor, "softcap_tensor")
    if softmax_scale_tensor is not None:
        check_number("softmax_scale_tensor", softmax_scale_tensor)
        softmax_scale = float(softmax_scale_tensor)
    if softcap_tensor is not None:
        check_number("softcap_tensor", softcap_tensor)
        softcap = float(softcap_tensor)
    score = softmax_scale, causal, window_left, window_right, softcap
    return Options(*score, alibi_slopes, dropout_p, rng_state)


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Lengths | None,
    options: Options,
    return_softmax: bool,
    num_splits: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """out, softmax_lse, S_dmask, rng_state."""
    has_dropout = options.dropout_p > 0
    if not has_dropout:
        state = torch.empty(0, dtype=torch.int64, device="cpu")
    elif options.rng_state is None:
        state = draw_rng_state()
    else:
        state = options.rng_state.clone()
    options = options._replace(rng_state=state if has_dropout else None)
    if return_softmax and has_dropout and lengths is not None:
        _check_probabilities(lengths)
    checks.check_forward(q, k, v, lengths, options, num_splits)
    if lengths is not None:
        check_lengths(q, k, lengths)
    if lengths is None:
        out, softmax_lse = attention.attention_forward(q, k, v, options)
    else:
        out, softmax_lse = varlen.varlen_forward(q, k, v, lengths, options)
    return out, softmax_lse, _probabilities(q, k, lengths, options, return_softmax), state


def _probabilities(
    q: Tensor, k: Tensor, lengths: Lengths | None, options: Options, return_softmax: bool
) -> Tensor:
    """S_dmask."""
    if not return_softmax or options.dropout_p == 0:
        return q.new_empty(0)
    if lengths is None:
        shape = _ops.probabilities_shape(q, q.shape[0], q.shape[1], k.shape[1])
        probabilities = q.new_zeros(shape)
        attention.write_probabilities(q, k, options, probabilities)
        return probabilities
    batch = len(lengths.cu_seqlens_q) - 1
    shape = _ops.probabilities_shape(q, batch, lengths.max_seqlen_q, lengths.max_seqlen_k)
    probabilities = q.new_zeros(shape)
    varlen.varlen_probabilities(q, k, lengths, options, probabilities)
    return probabilities


def _check_probabilities(lengths: Lengths) -> None:
    names = "seqused_k", "leftpad_k", "block_table"
    if any(getattr(lengths, name) is not None for name in names):
        raise RuntimeError(
            "return_softmax: S_dmask is not available with seqused_k, leftpad_k or block_table"
        )


def _forward_dense(
    q, k, v, dropout_p, softmax_scale, causal, left, right, softcap, alibi_slopes, return_softmax,
    rng_state=None, softmax_scale_tensor=None, softcap_tensor=None, deterministic=False,
):  # fmt: skip
    options = _options(
        *(dropout_p, softmax_scale, causal, left, right, softcap, alibi_slopes),
        *(rng_state, softmax_scale_tensor, softcap_tensor),
    )
    return _forward(q, k, v, None, options, return_softmax, 0)


def _forward_varlen(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale,
    causal, left=-1, right=-1, softcap=0.0, alibi_slopes=None, return_softmax=False,
    block_table=None, leftpad_k=None, seqused_k=None, zero_tensors=False, num_splits=0,
    rng_state=None, softmax_scale_tensor=None, softcap_tensor=None, deterministic=False,
):  # fmt: skip
    options = _options(
        *(dropout_p, softmax_scale, causal, left, right, softcap, alibi_slopes),
        *(rng_state, softmax_scale_tensor, softcap_tensor),
    )
    lengths = Lengths(
        *(cu_seqlens_q, cu_seqlens_k, seqused_k, leftpad_k, block_table),
        *(max_seqlen_q, max_seqlen_k),
    )
    return _forward(q, k, v, lengths, options, return_softmax, num_splits)


Gradients = tuple[Tensor, Tensor, Tensor]
Given = tuple[Tensor | None, Tensor | None, Tensor | None]


def _gradients(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    dlse: Tensor | None,
    lengths: Lengths | None,
    options: Options,
    given: Given,
) -> Gradients:
    """dq, dk, dv, written to what is given as well."""
    tensors = dout, q, k, v, out, softmax_lse, dlse
    checks.check_backward(tensors, lengths, options)
    checks.check_given(given, (q, k, v))
    written = {name: x for name, x in zip(("dq", "dk", "dv"), given) if x is not None}
    check_written(written, dict(dout=dout, q=q, k=k, v=v, out=out))
    if lengths is None:
        values = attention.attention_backward(*tensors, options)
    else:
        check_lengths(q, k, lengths)
        values = varlen.varlen_backward(*tensors, lengths, options)
    for gradient, value in zip(given, values):
        if gradient is not None:
            gradient.copy_(value)
    return values


def _softmax_d(dout: Tensor, out: Tensor, batch: int | None, is_wanted: bool) -> Tensor:
    """rowsum(dout * out), padded; batch: None for tensors with a batch dimension."""
    if not is_wanted:
        return out.new_empty(0, dtype=compute_dtype(out))
    delta = (dout.to(compute_dtype(out)) * out).sum(-1).transpose(-1, -2)
    shape = _ops.softmax_d_shape(out, batch)
    return F.pad(delta, (0, shape[-1] - delta.shape[-1])).contiguous()


def _backward_functional(
    dout, q, k, v, out, softmax_lse, dropout_p, softmax_scale, causal, left, right, softcap,
    alibi_slopes, deterministic, rng_state=None,
    dlse=None, softmax_scale_tensor=None, softcap_tensor=None, given=(None, None, None),
):  # fmt: skip
    options = _options(
        *(dropout_p, softmax_scale, causal, left, right, softcap, alibi_slopes),
        *(rng_state, softmax_scale_tensor, softcap_tensor),
    )
    return _gradients(dout, q, k, v, out, softmax_lse, dlse, None, options, given)


def _backward(
    dout, q, k, v, out, softmax_lse, dq, dk, dv, *options, dlse=None, return_softmax_d=True, **numbers
):  # fmt: skip
    numbers |= dict(dlse=dlse, given=(dq, dk, dv))
    _backward_functional(dout, q, k, v, out, softmax_lse, *options, **numbers)
    return _softmax_d(dout, out, None, return_softmax_d)


def _varlen_backward_functional(
    dout, q, k, v, out, softmax_lse, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
    dropout_p, softmax_scale, causal, left, right, softcap, alibi_slopes, deterministic,
    rng_state=None, dlse=None, softmax_scale_tensor=None, softcap_tensor=None,
    given=(None, None, None),
):  # fmt: skip
    options = _options(
        *(dropout_p, softmax_scale, causal, left, right, softcap, alibi_slopes),
        *(rng_state, softmax_scale_tensor, softcap_tensor),
    )
    lengths = Lengths(cu_seqlens_q, cu_seqlens_k, None, None, None, max_seqlen_q, max_seqlen_k)
    return _gradients(dout, q, k, v, out, softmax_lse, dlse, lengths, options, given)


def _varlen_backward(
    dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q,
    max_seqlen_k, dropout_p, softmax_scale, causal, left, right, softcap, alibi_slopes,
    deterministic, rng_state=None, zero_tensors=False, dlse=None, return_softmax_d=True, **numbers
):  # fmt: skip
    _varlen_backward_functional(
        *(dout, q, k, v, out, softmax_lse, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k),
        *(dropout_p, softmax_scale, causal, left, right, softcap, alibi_slopes),
        *(deterministic, rng_state),
        dlse=dlse,
        given=(dq, dk, dv),
        **numbers,
    )
    return _softmax_d(dout, out, len(cu_seqlens_q) - 1, return_softmax_d)


def _cache_options(
    arguments: tuple, softmax_scale_tensor: Tensor | None, softcap_tensor: Tensor | None
) -> tuple[Cache, Options]:
    """From the arguments after the tensors, and the numbers that are tensors."""
    softmax_scale, causal, left, right, softcap, alibi_slopes = arguments[7:13]
    options = _options(
        *(0.0, softmax_scale, causal, left, right, softcap, alibi_slopes),
        *(None, softmax_scale_tensor, softcap_tensor),
    )
    return Cache(*arguments[:7]), options


def _kvcache(q, k_cache, v_cache, *arguments, softmax_scale_tensor=None, softcap_tensor=None):
    cache, options = _cache_options(arguments, softmax_scale_tensor, softcap_tensor)
    checks.check_cache(q, k_cache, v_cache, cache, options, arguments[13])
    check_cache_contents(q, k_cache, None, None, cache, options)
    return decode.decode_forward(q, k_cache, v_cache, cache, options)


def _kvcache_append(
    q, k_cache, v_cache, k, v, rotary_cos, rotary_sin, rotary_interleaved, *arguments,
    softmax_scale_tensor=None, softcap_tensor=None,
):  # fmt: skip
    cache, options = _cache_options(arguments, softmax_scale_tensor, softcap_tensor)
    checks.check_cache(q, k_cache, v_cache, cache, options, arguments[13])
    checks.check_new_rows(q, k_cache, k, v, rotary_cos, rotary_sin)
    check_written({"k_cache": k_cache, "v_cache": v_cache})
    check_cache_contents(q, k_cache, k, rotary_cos, cache, options)
    rotary = None if rotary_cos is None else (rotary_cos, rotary_sin, rotary_interleaved)
    return decode.decode_append_forward(q, k_cache, v_cache, k, v, rotary, cache, options)


def _merge_states(out_a, lse_a, out_b, lse_b):
    checks.check_states(out_a, lse_a, out_b, lse_b)
    return decode.merge_states(out_a, lse_a, out_b, lse_b)


_IMPLEMENTATIONS: dict[str, Callable[..., object]] = {
    "_flash_attn_forward": _forward_dense,
    "_flash_attn_varlen_forward": _forward_varlen,
    "_flash_attn_backward": _backward,
    "_flash_attn_backward.functional": _backward_functional,
    "_flash_attn_varlen_backward": _varlen_backward,
    "_flash_attn_varlen_backward.functional": _varlen_backward_functional,
    "_flash_attn_kvcache": _kvcache,
    "_flash_attn_kvcache.append": _kvcache_append,
    "merge_states": _merge_states,
}
for _name, _function in _IMPLEMENTATIONS.items():
    torch.library.impl(f"flash_attn::{_name}", "CPU", isolated(_function))
