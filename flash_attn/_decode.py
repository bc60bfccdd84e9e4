"""Decoding: attention to a cache of keys and values.

The public function of ``flash_attn_interface`` that is for inference, with its documentation.
"""

import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from flash_attn import _checks, _checks_data, _checks_decode, _ops, _transforms
from flash_attn._autograd import maybe_contiguous, split_score
from flash_attn._ops import Cache, Options


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
    softmax_scale: float | Tensor | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float | Tensor = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
    *,
    cu_seqlens_q: Tensor | None = None,
    max_seqlen_q: int | None = None,
) -> Any:
    """Attention to a cache of keys and values, which takes up new ones in place first.

    One call is one step of decoding: k and v are written behind what the cache holds of their
    sequence, rotated if there are tables, and q attends to all of it.  For inference: the result has
    no gradient, even where an input requires one.

    Every sequence has rows in the cache: cache_seqlens of them before the call, and the new ones.
    Its keys are these rows without the first cache_leftpad; seqlen_k is their number.  Masks and
    ALiBi go by it as in ``flash_attn_func``, aligned to the bottom right: with ``causal=True`` the
    last query sees all keys.  Rows and pages that are no sequence's may hold anything.

    Args:
        q: (batch, seqlen_q, heads_q, head_dim), from one query to a whole prompt; with cu_seqlens_q
            (total_q, heads_q, head_dim).  fp16 or bf16 on CUDA; on the CPU fp32 and fp64 besides.
        k_cache: (batch_cache, seqlen_cache, heads_k, head_dim); or with a block_table paged,
            (num_blocks, page_size, heads_k, head_dim), page_size a multiple of 16.  Of q's dtype and
            device, the last stride being 1, or any where head_dim is 1.  If head_dim is a multiple of
            8, the cache is used where it is, and on CUDA the other strides must be multiples of 8
            too.  Else the cache may have the next multiple, in zeros beyond head_dim.  A cache of
            head_dim itself is written in place too, but every call on CUDA copies what it uses of it
            to attend to: the entries or pages of the sequences, all rows of them unless cache_seqlens
            is an integer.  That is announced once by a warning.
        v_cache: the same shape as k_cache.  If k and v are given, the two must overlap in memory
            neither each other nor themselves, as an expanded tensor does.
        k: (batch, seqlen_new, heads_k, head_dim): new keys, written to the rows cache_seqlens[b] to
            cache_seqlens[b] + seqlen_new, exclusive, of sequence b.  With cu_seqlens_q (total_q,
            heads_k, head_dim): one for every query.  Default: none.
        v: the same shape as k.
        rotary_cos: (seqlen_rotary, rotary_dim / 2), in q's dtype, seqlen_rotary at least the
            capacity and rotary_dim a multiple of 16, at most head_dim.  New key j is rotated by
            position cache_seqlens[b] + j; query i by cache_seqlens[b] + i with ``causal`` or a
            window, by cache_seqlens[b] without.  Needs k and v.
        rotary_sin: the same shape as rotary_cos.
        cache_seqlens: how many rows of each sequence are in the cache before the call, left padding
            included: one integer for all, or (batch,), int32.  Must be given with k and v.
            Default: the capacity.
        cache_batch_idx: (batch,), int32: sequence b is in entry cache_batch_idx[b] of the cache.
            Entries may repeat if nothing is appended.  Default: 0, 1, ...  Not with a block_table.
        cache_leftpad: (batch,), int32: so many of the first rows of each sequence are no keys.
        block_table: (batch, max_blocks), int32: the pages of each sequence: its row r is
            k_cache[block_table[b, r // page_size], r % page_size].  Entries beyond its length are
            not read.
        softmax_scale, causal, window_size, softcap: as of ``flash_attn_func``.
        rotary_interleaved: the pairs that are rotated are dimensions (0, 1), (2, 3), ... rather than
            (0, rotary_dim / 2), (1, rotary_dim / 2 + 1), ...
        alibi_slopes: (heads_q,) or (batch, heads_q), fp32.
        num_splits: into how many parts the keys of a sequence are divided for parallel work, at most
            128.  0 balances the work of the whole batch over the GPU.  With n >= 1 each sequence is
            divided into n equal parts by its own length alone, so that its result is bitwise the
            same in any batch with as many queries (cu_seqlens_q: the same max_seqlen_q).  The CPU
            has no use for it.
        return_softmax_lse: return softmax_lse too.
        cu_seqlens_q: (batch + 1,), int32: the queries of sequence b are the rows cu_seqlens_q[b] to
            cu_seqlens_q[b + 1], exclusive, of q; there may be none.
        max_seqlen_q: with cu_seqlens_q, and only then: at least the longest query sequence.

    The capacity of a sequence is seqlen_cache rows, or max_blocks * page_size.  Appending beyond it
    is an error where that is known without waiting for a device: on the CPU, and for an integer
    cache_seqlens and q with a batch dimension.  Else, on CUDA, what does not fit is not written and
    the sequence ends at the capacity.

    Returns:
        out (batch, seqlen_q, heads_q, head_dim), contiguous, in q's dtype; with
        ``return_softmax_lse`` the tuple (out, softmax_lse), softmax_lse (batch, heads_q, seqlen_q),
        fp32 (fp64 for fp64 inputs).  With cu_seqlens_q out is (total_q, heads_q, head_dim) and
        softmax_lse (heads_q, total_q).  A query that sees no key, and rows of q beyond the last
        sequence, have out 0 and softmax_lse +inf.

    Raises:
        RuntimeError: an argument has a wrong shape, dtype, device, stride or value, or the CUDA
            extension is not built.  What cache_seqlens, cache_batch_idx, cache_leftpad, block_table
            and cu_seqlens_q hold is checked on the CPU; on CUDA, where this waits for the device,
            only if the environment has FLASH_ATTN_CHECK_DEVICE_DATA=1.  Unchecked, wrong contents
            are undefined behaviour, but for appending beyond the capacity.
    """
    batch = _checks_decode.check_cache(q, k_cache, v_cache, cu_seqlens_q)
    seqlens = cache_seqlens if isinstance(cache_seqlens, Tensor) else None
    indices = cache_batch_idx, cache_leftpad, block_table
    capacity = _checks_decode.check_cache_indices(q, k_cache, batch, seqlens, *indices)

    is_new = k is not None or v is not None
    if is_new:
        has_seqlens, is_varlen = cache_seqlens is not None, cu_seqlens_q is not None
        _checks_decode.check_new_keys(q, k, v, k_cache.shape[2], has_seqlens, is_varlen)
    if rotary_cos is not None or rotary_sin is not None:
        _checks_decode.check_rotary(q, rotary_cos, rotary_sin, capacity, is_new)
    if cu_seqlens_q is not None:
        max_seqlen_q = _checks_decode.check_max_seqlen_q(max_seqlen_q)
    elif max_seqlen_q is None:
        max_seqlen_q = q.shape[1]
    else:
        raise RuntimeError(f"max_seqlen_q goes with cu_seqlens_q; got {max_seqlen_q} alone")

    seqlen = capacity
    if seqlens is None and cache_seqlens is not None:
        seqlen = _checks.resolve_integer("cache_seqlens", cache_seqlens)
    # How many keys are new is not known here with cu_seqlens_q.
    seqlen_new = k.shape[1] if k is not None and cu_seqlens_q is None else 0
    if seqlens is None or seqlen_new > capacity:
        at_least = seqlen if seqlens is None else 0
        _checks_decode.check_capacity(at_least, seqlen_new, capacity, block_table is not None)
    num_splits = _checks_decode.check_num_splits(num_splits)
    score = _checks.check_options(
        q, batch, 0.0, softmax_scale, causal, window_size, softcap, alibi_slopes
    )
    cache = (cu_seqlens_q, max_seqlen_q, seqlens, seqlen, *indices)
    numbers, scale, cap = split_score("flash_attn_with_kvcache", score)
    if _checks_data.device_data_is_checked(q):
        checked = Cache(*cache), Options(*numbers, alibi_slopes, 0.0, None)
        _checks_data.check_cache_contents(q, k_cache, k, rotary_cos, *checked)

    head_dim = q.shape[-1]
    padding = k_cache.shape[3] - head_dim
    if k_cache.is_cuda and k_cache.shape[3] % _checks_decode.CACHE_VECTOR != 0:
        _warn_of_copies()
    if padding:
        q = F.pad(q, (0, padding))
        k, v = (None if x is None else F.pad(x, (0, padding)) for x in (k, v))
    q = maybe_contiguous(q)
    options = (*cache, *numbers, alibi_slopes, num_splits)
    ours = dict(softmax_scale_tensor=scale, softcap_tensor=cap)
    if is_new:
        rotary = rotary_cos, rotary_sin, rotary_interleaved
        new = maybe_contiguous(k), maybe_contiguous(v)
        arguments = (q, k_cache, v_cache, *new, *rotary, *options)
        out, softmax_lse = _call(_ops.kvcache_append, *arguments, **ours)
    else:
        out, softmax_lse = _call(_ops.kvcache, q, k_cache, v_cache, *options, **ours)
    if padding:
        out = out[..., :head_dim].contiguous()
    return (out, softmax_lse) if return_softmax_lse else out


_warned_of_copies = False


@torch.compiler.assume_constant_result  # so that a compiled function warns when it is traced
def _warn_of_copies() -> bool:
    """Says once that a cache is copied at every call, and how to avoid it."""
    global _warned_of_copies
    if not _warned_of_copies:
        _warned_of_copies = True
        warnings.warn(
            "flash_attn_with_kvcache: head_dim of k_cache and v_cache is no multiple of 8, so that"
            " every call copies what it uses of them. Allocate them as zeros with head_dim rounded"
            " up to a multiple of 8 to have them used where they are; q, k and v keep theirs",
            stacklevel=3,
        )
    return True


def _call(op: Any, *arguments: Any, **numbers: Tensor | None) -> tuple[Tensor, Tensor]:
    """An operator without a gradient."""
    tensors = [x for x in (*arguments, *numbers.values()) if isinstance(x, Tensor)]
    _transforms.refuse_compiled("flash_attn_with_kvcache")
    _transforms.refuse_gradient("flash_attn_with_kvcache", *tensors)
    _transforms.refuse_tangents("flash_attn_with_kvcache", *tensors)
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        with torch.no_grad():
            return op(*arguments, **numbers)
    return op(*arguments, **numbers)
