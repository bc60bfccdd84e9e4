"""Which attention weights dropout keeps, by its definition, in integers.

Shares nothing with the package.  `keeps` is the definition for one weight; `keep_mask` the same for
whole matrices, four generator words at a time.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
WEYL = 0x9E3779B9, 0xBB67AE85
ROUNDS = 7
LOW = 0xFFFFFFFF
BLOCK = 16  # rows and columns that 32 counters serve
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


def threshold(dropout_p: float) -> int:
    """How many of the 65536 values of a weight's 16 bits keep it."""
    return round((1 - dropout_p) * 65536)


def keeps(seed: int, offset: int, head: int, row: int, col: int, dropout_p: float) -> bool:
    """Whether weight (row, col) stays; head: batch entry * query heads + query head."""
    lane = (row % 8) * 4 + (col % 8) // 2
    counter = (col // 16) * 32 + lane, row // 16, head, offset & LOW
    words = philox4x32(counter, philox_key(seed, offset), ROUNDS)
    word = int(words[(row % 16) // 8 + 2 * ((col % 16) // 8)])
    return (word >> 16 if col % 2 else word & 0xFFFF) < threshold(dropout_p)


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
    blocks_q, blocks_k = -(-seqlen_q // BLOCK), -(-seqlen_k // BLOCK)
    words = philox4x32(
        (
            np.arange(blocks_k * LANES),
            np.arange(blocks_q)[:, None],
            head[:, None, None],
            offset & LOW,
        ),
        philox_key(seed, offset),
        ROUNDS,
    )
    # (head, row block, column block, row % 8, pair of columns, column half, row half, parity)
    words = np.stack(words, -1).reshape(len(head), blocks_q, blocks_k, 8, 4, 2, 2)
    bits = np.stack([words & np.uint64(0xFFFF), words >> np.uint64(16)], -1)
    kept = (bits < threshold(dropout_p)).transpose(0, 1, 6, 3, 2, 5, 4, 7)
    kept = kept.reshape(len(batches), heads, blocks_q * BLOCK, blocks_k * BLOCK)
    return torch.from_numpy(kept[:, :, :seqlen_q, :seqlen_k].copy()).to(device)
