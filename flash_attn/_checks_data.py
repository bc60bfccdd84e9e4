"""Checks of what tensors hold: lengths, pages, entries of a cache; in the manner of ``_checks``.

These alone read tensors of more than one element.  The operators call them on the CPU; on CUDA, where
they wait for the device, the public functions do if the environment has
FLASH_ATTN_CHECK_DEVICE_DATA=1.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from flash_attn._checks_decode import raise_beyond_capacity

if TYPE_CHECKING:  # ``_ops`` imports this file
    from flash_attn._ops import Cache, Lengths, Options


def check_lengths_on_demand(q: Tensor, k: Tensor, lengths: Lengths) -> None:
    """``check_lengths`` for CUDA tensors, where the environment asks for it."""
    if device_data_is_checked(q):
        check_lengths(q, k, lengths)


def device_data_is_checked(q: Tensor) -> bool:
    """Whether q is on CUDA and the environment asks for checks that wait for the device."""
    if torch.compiler.is_compiling() or not q.is_cuda:
        return False
    if os.environ.get("FLASH_ATTN_CHECK_DEVICE_DATA", "0") in ("", "0"):
        return False
    from torch._subclasses.fake_tensor import FakeTensor

    return not isinstance(q, FakeTensor)  # which holds no data


def check_lengths(q: Tensor, k: Tensor, lengths: Lengths) -> None:
    """What the tensors of lengths hold: sequences within q and k, pages that exist, maxima."""
    check_cu_seqlens("cu_seqlens_q", lengths.cu_seqlens_q, "q", q.shape[0])
    table, rows_k = lengths.block_table, None if lengths.block_table is not None else k.shape[0]
    check_cu_seqlens("cu_seqlens_k", lengths.cu_seqlens_k, "k", rows_k)
    check_maximum("max_seqlen_q", lengths.max_seqlen_q, lengths.cu_seqlens_q.diff())

    used = lengths.cu_seqlens_k.diff()
    if table is not None:
        capacity = torch.full_like(used, table.shape[1] * k.shape[1])
        if lengths.seqused_k is None:
            _check_each("cu_seqlens_k: length of sequence", used, 0, capacity, "block_table holds")
    else:
        capacity = used
    if lengths.seqused_k is not None:
        used = lengths.seqused_k
        _check_each("seqused_k", used, 0, capacity, "the sequence has")
    if lengths.leftpad_k is not None:
        _check_each("leftpad_k", lengths.leftpad_k, 0, used, "the sequence has")
    check_maximum("max_seqlen_k", lengths.max_seqlen_k, lengths.seqlens_k)
    if table is not None:
        check_pages("k", table, k, lengths.leftpad_k, used)


def check_pages(name: str, table: Tensor, k: Tensor, begin: Tensor | None, end: Tensor) -> None:
    """The pages of the rows begin to end of each sequence exist; begin: None for 0."""
    num_blocks, page_size = k.shape[:2]
    first_rows = torch.arange(table.shape[1], device=table.device) * page_size
    is_used = first_rows < end[:, None]
    if begin is not None:
        is_used &= (first_rows + page_size > begin[:, None]) & (begin < end)[:, None]
    wrong = is_used & ((table < 0) | (table >= num_blocks))
    if wrong.any():
        sequence, column = wrong.nonzero()[0].tolist()
        raise RuntimeError(
            f"block_table[{sequence}, {column}] must be a block of {name}, 0 to {num_blocks - 1}; got"
            f" {table[sequence, column].item()}"
        )


def check_cu_seqlens(name: str, cu_seqlens: Tensor, of: str, rows: int | None) -> None:
    if cu_seqlens[0] != 0:
        raise RuntimeError(f"{name} must start at 0; got {name}[0] = {cu_seqlens[0].item()}")
    lengths = cu_seqlens.diff()
    if (lengths < 0).any():
        index = int((lengths < 0).nonzero()[0])
        before, after = cu_seqlens[index : index + 2].tolist()
        raise RuntimeError(
            f"{name} must not decrease; got {name}[{index}] = {before}, then {after}"
        )
    if rows is not None and cu_seqlens[-1] > rows:
        raise RuntimeError(
            f"{name} must end within {of}, which has {rows} rows; got {name}[-1] ="
            f" {cu_seqlens[-1].item()}"
        )


def check_maximum(name: str, maximum: int, lengths: Tensor) -> None:
    longest = int(lengths.max())
    if maximum < longest:
        raise RuntimeError(
            f"{name} must be at least the longest sequence, {longest}; got {maximum}"
        )


def _check_each(name: str, x: Tensor, least: int, most: Tensor, limit: str) -> None:
    wrong = (x < least) | (x > most)
    if wrong.any():
        index = int(wrong.nonzero()[0])
        raise RuntimeError(
            f"{name}[{index}] must be from {least} to {most[index].item()}, the keys that {limit};"
            f" got {x[index].item()}"
        )


def check_cache_contents(
    q: Tensor,
    k_cache: Tensor,
    k: Tensor | None,
    rotary_cos: Tensor | None,
    cache: Cache,
    options: Options,
) -> None:
    """What the tensors of cache hold: lengths within the capacity, entries and pages that exist."""
    table, is_new = cache.block_table, k is not None
    if cache.cu_seqlens_q is None:
        seqlens_q = torch.full((q.shape[0],), q.shape[1], device=q.device)
        seqlens_new = torch.full_like(seqlens_q, 0 if k is None else k.shape[1])
    else:
        check_cu_seqlens("cu_seqlens_q", cache.cu_seqlens_q, "q", q.shape[0])
        seqlens_q = cache.cu_seqlens_q.diff()
        check_maximum("max_seqlen_q", cache.max_seqlen_q, seqlens_q)
        seqlens_new = seqlens_q if is_new else torch.zeros_like(seqlens_q)
    seqlens = cache.cache_seqlens
    if seqlens is None:
        seqlens = torch.full_like(seqlens_q, cache.cache_seqlen)

    capacity = k_cache.shape[1] * (1 if table is None else table.shape[1])
    for index, pair in enumerate(zip(seqlens.tolist(), seqlens_new.tolist())):
        if pair[0] < 0 or sum(pair) > capacity:
            raise_beyond_capacity(f"cache_seqlens[{index}]", *pair, capacity, table is not None)
    end = seqlens + seqlens_new

    if cache.cache_batch_idx is not None:
        entries = cache.cache_batch_idx
        last = torch.full_like(entries, k_cache.shape[0] - 1)
        _check_range("cache_batch_idx", entries, last, "the last entry of k_cache")
        if is_new and len(entries.unique()) < len(entries):
            raise RuntimeError(
                "cache_batch_idx must not name an entry twice where k and v are appended; got"
                f" {entries.tolist()}"
            )
    begin = cache.cache_leftpad
    if begin is not None:
        _check_range("cache_leftpad", begin, end, "the sequence's length")
    if table is not None:
        if begin is not None and is_new:
            begin = torch.minimum(begin, seqlens)  # what is appended is written even if skipped
        check_pages("k_cache", table, k_cache, begin, end)
        if is_new:
            _check_written_once(table, k_cache.shape[1], seqlens, seqlens_new)
    if rotary_cos is not None:
        moves = options.causal or options.window_left >= 0 or options.window_right >= 0
        behind = seqlens + (seqlens_q if moves else seqlens_q.clamp(max=1))
        most = torch.full_like(behind, rotary_cos.shape[0])
        _check_range("rotary_cos: rows for the queries of sequence", behind, most, "seqlen_rotary")


def _check_written_once(
    table: Tensor, page_size: int, seqlens: Tensor, seqlens_new: Tensor
) -> None:
    """No two of the rows that are appended are one row of one page."""
    sequence = torch.arange(len(seqlens), device=table.device).repeat_interleave(seqlens_new)
    index = torch.arange(len(sequence), device=table.device)
    row = seqlens[sequence] + index - (seqlens_new.cumsum(0) - seqlens_new)[sequence]
    page = table[sequence, row // page_size].long()
    place, order = (page * page_size + row % page_size).sort(stable=True)
    is_again = place[1:] == place[:-1]
    if is_again.any():
        at = int(is_again.nonzero()[0])
        pair = sequence[order[at : at + 2]].tolist()
        raise RuntimeError(
            "block_table must not name a block twice where k and v are appended; got block"
            f" {place[at].item() // page_size} for new rows of sequences {pair[0]} and {pair[1]}"
        )


def _check_range(name: str, x: Tensor, most: Tensor, limit: str) -> None:
    wrong = (x < 0) | (x > most)
    if wrong.any():
        index = int(wrong.nonzero()[0])
        raise RuntimeError(
            f"{name}[{index}] must be from 0 to {most[index].item()}, {limit}; got"
            f" {x[index].item()}"
        )
