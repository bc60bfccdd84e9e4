"""Which attention weights dropout keeps, by its definition, in integers.

Shares nothing with the package.  `keeps` is the definition for one weight; `keep_mask` the same for
whole matrices, all words of the generator at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np
import torch

MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
WEYL = 0x9E3779B9, 0xBB67AE85
ROUNDS, TIE_ROUNDS = 7, 5
LOW = 0xFFFFFFFF
ROWS, COLS = 32, 16  # that 32 counters serve
LANES = 32

Words = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


def philox4x32(counter: Sequence, key: tuple[int, int], rounds: int) -> Words:
    """Four 32-bit words for each counter; the counter's parts broadcast against each other."""
    low, shift = np.uint64(LOW), np.uint64(32)
    c0, c1, c2, c3 = np.broadcast_arrays(*(np.asarray(c, dtype=np.uint64) for c in counter))
    for n in range(rounds):
        k0, k1 = (np.uint64((k + n * w) & LOW) for k, w in zip(key, WEYL))
        product0, product1 = np.uint64(MULTIPLIERS[0]) * c0, np.uint64(MULTIPLIERS[1]) * c2
        c0, c1, c2, c3 = (
            (product1 >> shift) ^ c1 ^ k0,
            product1 & low,
            (product0 >> shift) ^ c3 ^ k1,
            product0 & low,
        )
    return c0, c1, c2, c3


def philox_key(seed: int, offset: int) -> tuple[int, int]:
    """The key; the low half of the offset is the counter's last part."""
    return seed & LOW, ((seed >> 32) & LOW) ^ ((offset >> 32) & LOW)


def words_and_tie(counter: Sequence, key: tuple[int, int]) -> tuple[Words, np.ndarray]:
    """The words, and what decides between weights whose byte of them is the threshold's."""
    return philox4x32(counter, key, ROUNDS), philox4x32(counter, key, TIE_ROUNDS)[2]


@cache
def keeping_values(dropout_p: float) -> np.ndarray:
    """(65536,) bool: which values of a weight's 16 bits keep it.

    In the order of fp16 numbers, NaN first and -0 equal to 0, these are the first of all, or the
    last if the first ones would be some NaNs only or one of the zeros.
    """
    values = np.arange(65536, dtype=np.uint16)
    numbers = values.view(np.float16).astype(np.float64)
    nans = np.isnan(numbers)
    order = np.argsort(np.where(nans, -np.inf, numbers), kind="stable")
    order = np.concatenate([values[nans], order[~nans[order]]])
    kept = round((1 - dropout_p) * 65536)
    between_zeros = 0 < kept < 65536 and set(order[kept - 1 : kept + 1]) == {0, 0x8000}
    last = kept < nans.sum() or between_zeros
    result = np.zeros(65536, dtype=bool)
    result[order[65536 - kept :] if last else order[:kept]] = True
    return result


def keeps(seed: int, offset: int, head: int, row: int, col: int, dropout_p: float) -> bool:
    """Whether weight (row, col) stays; head: batch entry * query heads + query head."""
    lane = (row % 8) * 4 + (col % 8) // 2
    counter = (col // 16) * 32 + lane, row // 32, head, offset & LOW
    words, tie = words_and_tie(counter, philox_key(seed, offset))
    index, byte = (row % 16) // 8 + 2 * ((col % 16) // 8), (row % 32) // 16 + 2 * (col % 2)
    high, low = int(words[index]) >> 8 * byte & 0xFF, int(tie) >> 8 * index & 0xFF
    return bool(keeping_values(dropout_p)[256 * high + low])


def keep_mask(
    rng_state: torch.Tensor | Sequence[int],
    batches: Sequence[int],
    heads: int,
    seqlen_q: int,
    seqlen_k: int,
    dropout_p: float,
    device: str | torch.device = "cpu",
) -> torch.Tensor:
    """(len(batches), heads, sq, sk) bool; batches: numbers of the batch entries or sequences."""
    seed, offset = (int(x) for x in rng_state)
    head = (np.asarray(batches, dtype=np.int64)[:, None] * heads + np.arange(heads)).ravel()
    blocks_q, blocks_k = -(-seqlen_q // ROWS), -(-seqlen_k // COLS)
    words, tie = words_and_tie(
        (
            np.arange(blocks_k * LANES),
            np.arange(blocks_q)[:, None],
            head[:, None, None],
            offset & LOW,
        ),
        philox_key(seed, offset),
    )
    # Bytes, the lowest first: (head, row block, column block, row % 8, pair of columns, column half,
    # row half, parity, block half)
    words = np.stack(words, -1).astype("<u4").view(np.uint8)
    words = words.reshape(len(head), blocks_q, blocks_k, 8, 4, 2, 2, 2, 2)
    tie = tie.astype("<u4").view(np.uint8).reshape(*words.shape[:7], 1, 1)
    kept = keeping_values(dropout_p)[256 * words.astype(np.int64) + tie]
    kept = kept.transpose(0, 1, 8, 6, 3, 2, 5, 4, 7)
    kept = kept.reshape(len(batches), heads, blocks_q * ROWS, blocks_k * COLS)
    return torch.from_numpy(kept[:, :, :seqlen_q, :seqlen_k].copy()).to(device)
