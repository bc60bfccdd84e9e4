"""The public functions: names, arguments, defaults and documentation; ``_autograd`` does the work.

Tensors are (batch, seqlen, heads, head_dim).  Packed inputs are taken apart into views here.
"""

from typing import Any, NoReturn

import torch
from torch import Tensor

from flash_attn import _checks, _ops
from flash_attn._autograd import attention
from flash_attn._autograd import maybe_contiguous as maybe_contiguous

# The compiled extension under the name that other libraries import; None where it is not built.
flash_attn_gpu = _ops.extension


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """Attention: softmax(softmax_scale * q k^T) v for every batch entry and query head.

    Grouped heads: heads_q is a multiple of heads_k, and query head h attends with key head
    h // (heads_q // heads_k).  One key head is multi-query attention.

    With ``causal=True`` the mask is aligned to the bottom right corner: query i sees key j if
    j <= i + seqlen_k - seqlen_q.  Seen (1) and hidden (0), for 2 queries and 5 keys and for 5
    queries and 2 keys::

        1 1 1 1 0         0 0
        1 1 1 1 1         0 0
                          0 0
                          1 0
                          1 1

    A query that sees no key has out 0 and log-sum-exp +inf, and passes no gradient.

    Args:
        q: (batch, seqlen_q, heads_q, head_dim), head_dim at most 256.  fp16 or bf16 on CUDA; on the
            CPU fp32 and fp64 besides.  Any strides.  k and v have q's dtype and device.
        k: (batch, seqlen_k, heads_k, head_dim).
        v: (batch, seqlen_k, heads_k, head_dim).
        dropout_p: probability of dropping an attention weight, in [0, 1).  Only 0 so far.
        softmax_scale: factor of q k^T.  Default: head_dim ** -0.5.
        causal: hide the keys that lie after a query.
        window_size: (left, right) of a sliding window: query i sees the keys from
            i + seqlen_k - seqlen_q - left to i + seqlen_k - seqlen_q + right, inclusive; a negative
            number means no limit.  Only windows equal to no window or to ``causal`` so far.
        softcap: above 0, the scores are softcap * tanh(scores / softcap).  Only 0 so far.
        alibi_slopes: (heads_q,) or (batch, heads_q), fp32: adds
            -slope * |i + seqlen_k - seqlen_q - j| to the scores.  Only None so far.
        deterministic: make dq bitwise repeatable, at some cost in time.  The other gradients and
            out always are.
        return_attn_probs: return softmax_lse and S_dmask too.

    Returns:
        out (batch, seqlen_q, heads_q, head_dim), contiguous, in q's dtype; with
        ``return_attn_probs`` the tuple (out, softmax_lse, S_dmask): softmax_lse (batch, heads_q,
        seqlen_q) is the natural logarithm of each row's sum of exp(scores), fp32 (fp64 for fp64
        inputs), and its gradient is used; S_dmask is empty, (0,) in q's dtype, without dropout.

    Raises:
        RuntimeError: an argument has a wrong shape, dtype, device or value, or the CUDA extension
            is not built.  In the backward pass: create_graph=True, as its gradients have none.
        NotImplementedError: an option that a later release brings.
    """
    _checks.check_qkv(q, k, v)
    causal = _checks.resolve_options(
        dropout_p, causal, window_size, softcap, alibi_slopes, q.shape[1], k.shape[1]
    )
    result = attention(q, k, v, softmax_scale, causal, deterministic, return_attn_probs)
    return (*result, q.new_empty(0)) if return_attn_probs else result


def flash_attn_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """``flash_attn_func`` with keys and values in one tensor, and their gradients in one too.

    Args:
        q: (batch, seqlen_q, heads_q, head_dim).
        kv: (batch, seqlen_k, 2, heads_k, head_dim): keys, then values.

    The other arguments, the results and the errors are those of ``flash_attn_func``.
    """
    _checks.check_packed("kv", kv, 2, "(batch, seqlen_k, 2, heads_k, head_dim)")
    k, v = kv.unbind(dim=2)
    return flash_attn_func(
        q,
        k,
        v,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        return_attn_probs,
    )


def flash_attn_qkvpacked_func(
    qkv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """``flash_attn_func`` with queries, keys and values in one tensor, and their gradients too.

    Args:
        qkv: (batch, seqlen, 3, heads, head_dim): queries, keys, values.  For grouped heads use
            ``flash_attn_func`` or ``flash_attn_kvpacked_func``.

    The other arguments, the results and the errors are those of ``flash_attn_func``.
    """
    _checks.check_packed("qkv", qkv, 3, "(batch, seqlen, 3, heads, head_dim)")
    q, k, v = qkv.unbind(dim=2)
    return flash_attn_func(
        q,
        k,
        v,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        return_attn_probs,
    )


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> Any:
    """Attention over sequences of different lengths in one tensor.  Not in this release.

    Args:
        q: (total_q, heads_q, head_dim), total_q the sum of the query lengths.
        k: (total_k, heads_k, head_dim), or paged: (num_blocks, page_size, heads_k, head_dim).
        v: the same shape as k.
        cu_seqlens_q: (batch + 1,), int32: sequence b is the rows cu_seqlens_q[b] to
            cu_seqlens_q[b + 1], exclusive, of q.
        cu_seqlens_k: (batch + 1,), int32: the same for k and v.
        max_seqlen_q: at least the longest query sequence.
        max_seqlen_k: at least the longest key sequence.
        block_table: (batch, max_blocks), int32: the pages of each sequence, for paged k and v.

    The other arguments are those of ``flash_attn_func``.

    Returns:
        out (total_q, heads_q, head_dim), or (out, softmax_lse, S_dmask) with softmax_lse (heads_q,
        total_q), fp32.

    Raises:
        NotImplementedError: always; planned for the complete training API.
    """
    _raise_planned("flash_attn_varlen_func", "the complete training API")


def flash_attn_varlen_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """``flash_attn_varlen_func`` with keys and values in one tensor.  Not in this release.

    Args:
        q: (total_q, heads_q, head_dim).
        kv: (total_k, 2, heads_k, head_dim): keys, then values.

    The other arguments and the results are those of ``flash_attn_varlen_func``.

    Raises:
        NotImplementedError: always; planned for the complete training API.
    """
    _raise_planned("flash_attn_varlen_kvpacked_func", "the complete training API")


def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """``flash_attn_varlen_func`` with queries, keys and values in one tensor.  Not in this release.

    Args:
        qkv: (total, 3, heads, head_dim): queries, keys, values.
        cu_seqlens: (batch + 1,), int32: sequence b is the rows cu_seqlens[b] to cu_seqlens[b + 1],
            exclusive, of qkv.
        max_seqlen: at least the longest sequence.

    The other arguments and the results are those of ``flash_attn_varlen_func``.

    Raises:
        NotImplementedError: always; planned for the complete training API.
    """
    _raise_planned("flash_attn_varlen_qkvpacked_func", "the complete training API")


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
) -> Any:
    """Attention to a cache of keys and values, updated in place.  Not in this release.

    Args:
        q: (batch, seqlen_q, heads_q, head_dim).
        k_cache: (batch_cache, seqlen_cache, heads_k, head_dim), or paged: (num_blocks, page_size,
            heads_k, head_dim).
        v_cache: the same shape as k_cache.
        k: (batch, seqlen_new, heads_k, head_dim), appended at cache_seqlens.
        v: the same shape as k.
        rotary_cos: (seqlen_rotary, rotary_dim / 2), applied to k and q by their position.
        rotary_sin: the same shape as rotary_cos.
        cache_seqlens: int or (batch,), int32: the length of each cached sequence before the call.
        cache_batch_idx: (batch,), int32: the cache entry of each batch entry.
        cache_leftpad: (batch,), int32: where each cached sequence begins.
        block_table: (batch, max_blocks), int32: the pages of each sequence, for a paged cache.
        rotary_interleaved: rotate dimensions 0 and 1, 2 and 3, ... rather than 0 and
            rotary_dim / 2, ...
        num_splits: how many parts the keys are divided into for parallel work; 0 lets a heuristic
            choose.
        return_softmax_lse: return softmax_lse too.

    The other arguments are those of ``flash_attn_func``.

    Returns:
        out (batch, seqlen_q, heads_q, head_dim), or (out, softmax_lse) with softmax_lse (batch,
        heads_q, seqlen_q).

    Raises:
        NotImplementedError: always; planned for the decoding API.
    """
    _raise_planned("flash_attn_with_kvcache", "the decoding API")


def round_multiple(x: int, m: int) -> int:
    """x rounded up to a multiple of m."""
    return (x + m - 1) // m * m


def _get_block_size_n(
    device: torch.device, head_dim: int, is_dropout: bool, is_causal: bool
) -> int:
    """How many keys share a maximum in S_dmask: all, as it is relative to each row's maximum."""
    return 2**30


def _raise_planned(function: str, release: str) -> NoReturn:
    raise NotImplementedError(f"{function} is planned for a later release ({release})")
