"""The dropout mask as a function of (seed, offset, head, query, key): Philox4x32-7 in torch.

Used by ``_scores`` for the CPU, and by tests to replay what the CUDA kernels drop: both give the
same mask.  It depends on no tile size, so forward and backward may walk over different tiles.

Every weight has 16 random bits and is kept if they are below round((1 - p) * 2**16).  A call of
Philox gives four 32-bit words: 8 weights of a block of 16 queries by 16 keys, whose 256 weights take
32 calls, ``lane`` 0 to 31.  With (row, col) = (query, key) in the sequence,

    key     = (lo32(seed), hi32(seed) ^ hi32(offset))
    counter = ((col // 16) * 32 + lane, row // 16, head, lo32(offset))
    lane    = (row % 8) * 4 + (col % 8) // 2
    word    = (row % 16) // 8 + 2 * ((col % 16) // 8),  its low half if col is even, else its high

where head counts the query heads of all sequences: sequence * heads_q + head_q.
"""

import torch
from torch import Tensor

BLOCK = 16
LANES = 32
ROUNDS = 7
MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
KEY_INCREMENTS = 0x9E3779B9, 0xBB67AE85
MASK_32 = 0xFFFFFFFF
SIGN_16 = 1 << 15
ALL_KEPT = 1 << 16


def keep_threshold(dropout_p: float) -> int:
    """A weight is kept if its 16 bits are below this number: ALL_KEPT keeps every weight."""
    return round((1.0 - dropout_p) * ALL_KEPT)


def keep_mask(
    rng_state: Tensor, dropout_p: float, heads: Tensor, rows: slice, cols: slice
) -> Tensor:
    """Which weights of a tile are kept: bool (len(heads), rows, cols), on the device of heads.

    rng_state: int64 (2,), seed and offset; heads: int64 (n,), sequence * heads_q + head_q.
    """
    threshold = keep_threshold(dropout_p)
    signed = _signed_bits(rng_state, heads, rows, cols)
    if threshold == ALL_KEPT:
        return torch.ones_like(signed, dtype=torch.bool)
    return signed < threshold - SIGN_16


def random_bits(rng_state: Tensor, heads: Tensor, rows: slice, cols: slice) -> Tensor:
    """The 16 bits of each weight of a tile, 0 to 65535: int32 (len(heads), rows, cols)."""
    return _signed_bits(rng_state, heads, rows, cols).int() + SIGN_16


def _signed_bits(rng_state: Tensor, heads: Tensor, rows: slice, cols: slice) -> Tensor:
    """random_bits - SIGN_16, which fits in int16."""
    row0, col0 = rows.start // BLOCK, cols.start // BLOCK
    row_blocks = torch.arange(row0, -(-rows.stop // BLOCK), device=heads.device)
    col_blocks = torch.arange(col0, -(-cols.stop // BLOCK), device=heads.device)
    lanes = torch.arange(LANES, device=heads.device).view(8, 4)  # (row % 8, pair of columns)
    seed, offset = rng_state.to(heads.device).unbind()

    # Counters keep their own axes of (head, row block, row % 8, col block, pair): the first rounds,
    # before these mix, cost almost nothing.
    words = _philox(
        ((col_blocks * LANES)[:, None] + lanes[:, None])[None, None],
        row_blocks[None, :, None, None, None],
        (heads & MASK_32)[:, None, None, None, None],
        offset & MASK_32,
        seed & MASK_32,
        (seed >> 32 ^ offset >> 32) & MASK_32,
    )

    # (head, row block, row half, row % 8, col block, col half, pair)
    shape = len(heads), len(row_blocks), 2, 8, len(col_blocks), 2, 4
    pairs = torch.empty(shape, dtype=torch.int32, device=heads.device)
    for index, word in enumerate(words):
        pairs[:, :, index % 2, :, :, index // 2] = word
    # The low half of a pair comes first in memory: the even column.
    bits = pairs.view(torch.int16).bitwise_xor_(-SIGN_16)
    bits = bits.view(len(heads), BLOCK * len(row_blocks), BLOCK * len(col_blocks))
    row0, col0 = row0 * BLOCK, col0 * BLOCK
    return bits[:, rows.start - row0 : rows.stop - row0, cols.start - col0 : cols.stop - col0]


def _philox(
    c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor, k0: Tensor, k1: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-7 of broadcastable counters: the low 32 bits of four int64 tensors.

    int64 products wrap modulo 2**64: all their 64 bits are right.  c0 and c2, the factors, are kept
    to 32 bits; in c1 and c3, products of which only the low half counts, the high half is left.
    """
    for _ in range(ROUNDS):
        product0, product1 = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c0 = ((product1 >> 32) ^ (c1 ^ k0)) & MASK_32
        c2 = ((product0 >> 32) ^ (c3 ^ k1)) & MASK_32
        c1, c3 = product1, product0
        k0, k1 = (k0 + KEY_INCREMENTS[0]) & MASK_32, (k1 + KEY_INCREMENTS[1]) & MASK_32
    return c0, c1, c2, c3
