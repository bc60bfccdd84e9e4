"""The public functions: names, arguments, defaults and documentation; ``_autograd`` does the work,
or for the usual call of ``flash_attn_func`` the extension does.

``flash_attn_func`` documents what attention is here; the other functions say only what differs.
Those for decoding come from ``_decode``.
"""

from typing import Any

import torch
from torch import Tensor

from flash_attn import _checks, _checks_data, _op_gradients, _ops, _upstream  # noqa: F401
from flash_attn._autograd import (
    attention,
    maybe_contiguous,  # noqa: F401
)
from flash_attn._decode import flash_attn_with_kvcache  # noqa: F401
from flash_attn._merge import merge_states  # noqa: F401
from flash_attn._ops import Lengths

# Names that other libraries import from here.
from flash_attn._upstream import (  # noqa: F401
    USE_TRITON_ROCM,
    _flash_attn_backward,
    _flash_attn_forward,
    _flash_attn_varlen_backward,
    _flash_attn_varlen_forward,
    _get_block_size_n,
    _wrapped_flash_attn_backward,
    _wrapped_flash_attn_forward,
    _wrapped_flash_attn_varlen_backward,
    _wrapped_flash_attn_varlen_forward,
    round_multiple,
)

# The compiled extension under the name that other libraries import; None where it is not built.
flash_attn_gpu = _ops.extension

# The usual calls in C++, for the host's time (csrc/torch/fast_path): from all arguments of
# flash_attn_func or flash_attn_varlen_func to out, or to None for a call that is not a usual one.
_fast_attend = getattr(_ops.extension, "fast_attend", None)
_fast_varlen_attend = getattr(_ops.extension, "fast_varlen_attend", None)


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | Tensor | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float | Tensor = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """Attention: dropout(softmax(scores)) v for every batch entry and query head.

    Scores of query i and key j, in this order::

        score = softmax_scale * (q_i . k_j)
        score = softcap * tanh(score / softcap)                         if softcap > 0
        score = score - slope * |i + seqlen_k - seqlen_q - j|           if alibi_slopes is given

    Grouped heads: heads_q is a multiple of heads_k, and query head h attends with key head
    h // (heads_q // heads_k).  One key head is multi-query attention.

    Masks are aligned to the bottom right corner: with ``causal=True`` query i sees key j if
    j <= i + seqlen_k - seqlen_q.  Seen (1) and hidden (0), for 2 queries and 5 keys and for 5 queries
    and 2 keys::

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
        v: (batch, seqlen_k, heads_k, head_dim), or with a head_dim of its own, head_dim_v, as the
            prefill of multi-head latent attention has it (192 and 128).  The CPU takes any from 1 to
            256, with gradients.  On CUDA it takes a GPU of compute capability 9.0, a head_dim from
            129 to 192 and a head_dim_v up to 128, and there are no gradients: where one of the
            arguments requires a gradient the call is an error, as the backward pass is missing.
        dropout_p: probability of dropping an attention weight, in [0, 1), in steps of 1 / 65536; the
            others are multiplied by 1 / (1 - dropout_p).  Seed and offset come from torch's default
            generator of q's device, so torch.manual_seed repeats a mask.
        softmax_scale: factor of q k^T, a number or a tensor of one element, which gets its gradient
            (NaN where the scale is 0).  Default: head_dim ** -0.5.
        causal: hide the keys that lie after a query.
        window_size: (left, right), integers or 0-dim tensors: query i sees the keys from
            i + seqlen_k - seqlen_q - left to i + seqlen_k - seqlen_q + right, inclusive; a negative
            number means no limit.  With ``causal`` right is 0.  Only blocks of keys with a visible
            key are read: time is linear in the window.  A tensor on CUDA makes the call wait for it.
        softcap: above 0, limits scores smoothly to (-softcap, softcap).  0: off.  A number, or a
            tensor of one element that requires no gradient.
        alibi_slopes: (heads_q,) or (batch, heads_q), fp32, on q's device.  It gets no gradient.
        deterministic: make dq bitwise repeatable, at some cost in time.  The other gradients and
            out always are.
        return_attn_probs: return softmax_lse and S_dmask too.

    Under ``torch.func`` (grad, vjp, vmap, jacrev and their compositions) it has the gradients of a loop
    over the examples; with dropout vmap's ``randomness`` says whether these share a mask.  It has no
    forward-mode derivative, and its gradients have no gradient.  A tensor on CUDA that stands for a
    number makes the call wait for the device.

    Returns:
        out (batch, seqlen_q, heads_q, head_dim of v), contiguous, in q's dtype; with
        ``return_attn_probs`` the tuple (out, softmax_lse, S_dmask).

        softmax_lse (batch, heads_q, seqlen_q) is the natural logarithm of each row's sum of
        exp(score), without dropout; fp32 (fp64 for fp64 inputs); its gradient is used.

        S_dmask is for tests of dropout: (batch, heads_q, seqlen_q rounded up to 128, seqlen_k rounded
        up to 128), in q's dtype, of exp(score - largest score of its row), with the sign bit set
        where the weight is dropped, and 0 for hidden keys and in the padding.  Without dropout it is
        empty, (0,).  It has no gradient, and it takes memory for every score.

    Raises:
        RuntimeError: an argument has a wrong shape, dtype, device or value, softcap requires a
            gradient, no CUDA kernel serves the call, or the CUDA extension is not built.  Under vmap:
            dropout with randomness="error".  In the backward pass: create_graph=True, as its
            gradients have none.
        NotImplementedError: forward-mode differentiation.
    """
    # torch.compile traces what follows instead.
    if not torch.compiler.is_compiling() and _fast_attend is not None:
        out = _fast_attend(
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
        if out is not None:
            return out
    _checks.check_qkv(q, k, v)
    score = _checks.check_options(
        q, q.shape[0], dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes
    )
    return attention(
        "flash_attn_func",
        *(q, k, v, None, score),
        *(alibi_slopes, dropout_p, deterministic, return_attn_probs),
    )


def flash_attn_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | Tensor | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float | Tensor = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """``flash_attn_func`` with keys and values in one tensor.

    The gradients of both are written into one tensor, too: no copies put them together.

    Args:
        q: (batch, seqlen_q, heads_q, head_dim).
        kv: (batch, seqlen_k, 2, heads_k, head_dim): keys, then values.

    The other arguments, the results and the errors are those of ``flash_attn_func``.
    """
    _checks.check_packed("kv", kv, 2, "(batch, seqlen_k, 2, heads_k, head_dim)")
    _checks.check_qkv(q, *kv.unbind(2))
    score = _checks.check_options(
        q, q.shape[0], dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes
    )
    return attention(
        "flash_attn_kvpacked_func",
        *(q, kv, None, None, score),
        *(alibi_slopes, dropout_p, deterministic, return_attn_probs),
    )


def flash_attn_qkvpacked_func(
    qkv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | Tensor | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float | Tensor = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """``flash_attn_func`` with queries, keys and values in one tensor.

    The gradients of all three are written into one tensor, too: no copies put them together.

    Args:
        qkv: (batch, seqlen, 3, heads, head_dim): queries, keys, values.  For grouped heads use
            ``flash_attn_func`` or ``flash_attn_kvpacked_func``.

    The other arguments, the results and the errors are those of ``flash_attn_func``.
    """
    _checks.check_packed("qkv", qkv, 3, "(batch, seqlen, 3, heads, head_dim)")
    _checks.check_qkv(*qkv.unbind(2))
    score = _checks.check_options(
        qkv, qkv.shape[0], dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes
    )
    return attention(
        "flash_attn_qkvpacked_func",
        *(qkv, None, None, None, score),
        *(alibi_slopes, dropout_p, deterministic, return_attn_probs),
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
    softmax_scale: float | Tensor | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float | Tensor = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> Any:
    """``flash_attn_func`` for sequences of different lengths, one after the other in one tensor.

    Every sequence attends to itself only, and masks and ALiBi go by its own seqlen_q and seqlen_k.
    Either may be 0.  Rows of q beyond the last sequence have out 0 and log-sum-exp +inf; like those
    of k and v, they get the gradient 0.

    Args:
        q: (total_q, heads_q, head_dim), total_q at least the sum of the query lengths.
        k: (total_k, heads_k, head_dim); or, with a block_table, (num_blocks, page_size, heads_k,
            head_dim), page_size a multiple of 16.
        v: the same shape as k; without a block_table it may have a head_dim of its own, as of
            ``flash_attn_func``.
        cu_seqlens_q: (batch + 1,), int32, on q's device, contiguous: sequence b is the rows
            cu_seqlens_q[b] to cu_seqlens_q[b + 1], exclusive, of q.  It starts at 0 and does not
            decrease.
        cu_seqlens_k: (batch + 1,), int32: the same for k and v.
        max_seqlen_q: at least the longest query sequence; an integer or a 0-dim tensor.
        max_seqlen_k: at least the longest key sequence.
        alibi_slopes: (heads_q,) or (batch, heads_q), batch the number of sequences.
        block_table: (batch, max_blocks), int32: the pages of each sequence, for paged k and v: key j
            of sequence b is k[block_table[b, j // page_size], j % page_size].  Entries beyond a
            sequence's length are not read.  Paged k and v are for inference: they have no gradients,
            and dropout_p must be 0.  Where head_dim is no multiple of 8, every call on CUDA copies
            the pages of the sequences.

    The other arguments are those of ``flash_attn_func``.

    Returns:
        out (total_q, heads_q, head_dim of v); with ``return_attn_probs`` the tuple (out, softmax_lse,
        S_dmask), with softmax_lse (heads_q, total_q) and S_dmask (batch, heads_q, max_seqlen_q
        rounded up to 128, max_seqlen_k rounded up to 128), (0,) without dropout.

    Raises:
        RuntimeError: as ``flash_attn_func``; also dropout and the backward pass with a block_table.
            What cu_seqlens, max_seqlen and block_table hold is checked on the CPU; on CUDA, where
            this waits for the device, only if the environment has FLASH_ATTN_CHECK_DEVICE_DATA=1.
            Unchecked, wrong contents are undefined behaviour.
    """
    # torch.compile traces what follows instead.
    if not torch.compiler.is_compiling() and _fast_varlen_attend is not None:
        out = _fast_varlen_attend(
            q,
            k,
            v,
            cu_seqlens_q,
            cu_seqlens_k,
            max_seqlen_q,
            max_seqlen_k,
            dropout_p,
            softmax_scale,
            causal,
            window_size,
            softcap,
            alibi_slopes,
            deterministic,
            return_attn_probs,
            block_table,
        )
        if out is not None:
            return out
    lengths = _lengths(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, block_table)
    _checks.check_varlen(q, k, v, lengths)
    _checks.check_no_dropout_of_pages(block_table, dropout_p)
    batch = cu_seqlens_q.shape[0] - 1
    score = _checks.check_options(
        q, batch, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes
    )
    _checks_data.check_lengths_on_demand(q, k, lengths)
    return attention(
        "flash_attn_varlen_func",
        *(q, k, v, lengths, score),
        *(alibi_slopes, dropout_p, deterministic, return_attn_probs),
    )


def flash_attn_varlen_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | Tensor | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float | Tensor = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """``flash_attn_varlen_func`` with keys and values in one tensor, and their gradients in one too.

    Args:
        q: (total_q, heads_q, head_dim).
        kv: (total_k, 2, heads_k, head_dim): keys, then values.

    The other arguments, the results and the errors are those of ``flash_attn_varlen_func``.
    """
    _checks.check_packed("kv", kv, 2, "(total_k, 2, heads_k, head_dim)")
    lengths = _lengths(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    k, v = kv.unbind(1)
    _checks.check_varlen(q, k, v, lengths)
    batch = cu_seqlens_q.shape[0] - 1
    score = _checks.check_options(
        q, batch, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes
    )
    _checks_data.check_lengths_on_demand(q, kv, lengths)
    return attention(
        "flash_attn_varlen_kvpacked_func",
        *(q, kv, None, lengths, score),
        *(alibi_slopes, dropout_p, deterministic, return_attn_probs),
    )


def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    dropout_p: float = 0.0,
    softmax_scale: float | Tensor | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float | Tensor = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """``flash_attn_varlen_func`` with queries, keys and values in one tensor, as their gradients.

    Args:
        qkv: (total, 3, heads, head_dim): queries, keys, values.
        cu_seqlens: (batch + 1,), int32: sequence b is the rows cu_seqlens[b] to cu_seqlens[b + 1],
            exclusive, of qkv.
        max_seqlen: at least the longest sequence; an integer or a 0-dim tensor.

    The other arguments, the results and the errors are those of ``flash_attn_varlen_func``.
    """
    _checks.check_packed("qkv", qkv, 3, "(total, 3, heads, head_dim)")
    lengths = _lengths(cu_seqlens, cu_seqlens, max_seqlen, max_seqlen)
    q, k, v = qkv.unbind(1)
    _checks.check_varlen(q, k, v, lengths)
    batch = cu_seqlens.shape[0] - 1
    score = _checks.check_options(
        qkv, batch, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes
    )
    _checks_data.check_lengths_on_demand(qkv, qkv, lengths)
    return attention(
        "flash_attn_varlen_qkvpacked_func",
        *(qkv, None, None, lengths, score),
        *(alibi_slopes, dropout_p, deterministic, return_attn_probs),
    )


def _lengths(
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    block_table: Tensor | None = None,
) -> Lengths:
    return Lengths(
        *(cu_seqlens_q, cu_seqlens_k, None, None, block_table),
        _checks.resolve_integer("max_seqlen_q", max_seqlen_q),
        _checks.resolve_integer("max_seqlen_k", max_seqlen_k),
    )


# Upstream's autograd Functions, for code that calls their apply.
FlashAttnFunc = _upstream.function_class("FlashAttnFunc", flash_attn_func)
FlashAttnKVPackedFunc = _upstream.function_class("FlashAttnKVPackedFunc", flash_attn_kvpacked_func)
FlashAttnQKVPackedFunc = _upstream.function_class(
    "FlashAttnQKVPackedFunc", flash_attn_qkvpacked_func
)
FlashAttnVarlenFunc = _upstream.function_class("FlashAttnVarlenFunc", flash_attn_varlen_func)
FlashAttnVarlenKVPackedFunc = _upstream.function_class(
    "FlashAttnVarlenKVPackedFunc", flash_attn_varlen_kvpacked_func
)
FlashAttnVarlenQKVPackedFunc = _upstream.function_class(
    "FlashAttnVarlenQKVPackedFunc", flash_attn_varlen_qkvpacked_func
)
