"""The dropout mask as a function of (seed, offset, head, query, key): Philox4x32-7 in torch.

Used by ``scores`` for the CPU, and by tests to replay what the CUDA kernels drop: both give the
same mask.  It depends on no tile size, so forward and backward may walk over different tiles.

A call of Philox gives four 32-bit words and the tie word, which is word 2 after five rounds: it
serves 16 weights of a block of 32 queries by 16 keys, whose 512 weights take 32 calls,
``lane`` 0 to 31.  With (row, col) = (query, key) in the sequence,

    key     = (lo32(seed), hi32(seed) ^ hi32(offset))
    counter = ((col // 16) * 32 + lane, row // 32, head, lo32(offset))
    lane    = (row % 8) * 4 + (col % 8) // 2
    word    = (row % 16) // 8 + 2 * ((col % 16) // 8)
    byte    = (row % 32) // 16 + 2 * (col % 2)
    bits    = that byte of that word, and below it the tie word's byte of the word's number

where head counts the query heads of all sequences: sequence * heads_q + head_q.

Of the 65536 values of these bits, as many keep the weight as (1 - p) * 2**16 rounds to.  The kernels
compare them as fp16 numbers: kept are the first values in the order NaN, -inf ... -0 = 0 ... inf, or
the last ones, where that would divide the NaNs or the zeros.
"""

import torch
from torch import Tensor

ROWS, COLS = 32, 16  # of a block
LANES = 32
ROUNDS, TIE_ROUNDS = 7, 5
MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
KEY_INCREMENTS = 0x9E3779B9, 0xBB67AE85
MASK_32 = 0xFFFFFFFF
BYTES = 0xFF00FF00 - (1 << 32)  # of an int32: the high bytes of its halves
HALVES = 0x10001
NANS, NEGATIVES, NUMBERS = 2046, 0x7C00, 63490  # fp16: patterns; zero has two
ALL_KEPT = 1 << 16


def kept_values(dropout_p: float) -> int:
    """How many of the values of a weight's 16 bits keep it: ALL_KEPT keeps every weight."""
    return round((1.0 - dropout_p) * ALL_KEPT)


def keep_rule(kept: int) -> tuple[int, bool]:
    """The fp16 pattern of a number, and whether kept values are the numbers from it on.

    If not, they are the smaller ones and NaN.  kept: their number, less than ALL_KEPT.
    """
    inverted = kept < NANS or kept == NANS + NEGATIVES + 1
    smaller = NUMBERS - kept if inverted else kept - NANS  # numbers below the threshold
    if smaller < NEGATIVES:
        return 0xFC00 - smaller, inverted
    return max(smaller - NEGATIVES - 1, 0), inverted


def keep_mask(
    rng_state: Tensor, dropout_p: float, heads: Tensor, rows: slice, cols: slice
) -> Tensor:
    """Which weights of a tile are kept: bool (len(heads), rows, cols), on the device of heads.

    rng_state: int64 (2,), seed and offset; heads: int64 (n,), sequence * heads_q + head_q.
    """
    kept = kept_values(dropout_p)
    bits = random_bits(rng_state, heads, rows, cols)
    if kept == ALL_KEPT:
        return torch.ones_like(bits, dtype=torch.bool)
    pattern, inverted = keep_rule(kept)
    threshold = torch.tensor(pattern - (pattern >> 15 << 16), dtype=torch.int16, device="cpu")
    from_threshold = bits.view(torch.float16) >= threshold.view(torch.float16).item()
    return from_threshold if inverted else from_threshold.logical_not_()


def random_bits(rng_state: Tensor, heads: Tensor, rows: slice, cols: slice) -> Tensor:
    """The 16 bits of each weight of a tile: int16 (len(heads), rows, cols)."""
    row0, col0 = rows.start // ROWS, cols.start // COLS
    row_blocks = torch.arange(row0, -(-rows.stop // ROWS), device=heads.device)
    col_blocks = torch.arange(col0, -(-cols.stop // COLS), device=heads.device)
    lanes = torch.arange(LANES, device=heads.device).view(8, 4)  # (row % 8, pair of columns)
    seed, offset = rng_state.to(heads.device).unbind()

    # Counters keep their own axes of (head, row block, row % 8, col block, pair): the first rounds,
    # before these mix, cost almost nothing.
    words, tie = _philox(
        ((col_blocks * LANES)[:, None] + lanes[:, None])[None, None],
        row_blocks[None, :, None, None, None],
        (heads & MASK_32)[:, None, None, None, None],
        offset & MASK_32,
        seed & MASK_32,
        (seed >> 32 ^ offset >> 32) & MASK_32,
    )

    # (head, row block, block half, row half, row % 8, col block, col half, pair)
    shape = len(heads), len(row_blocks), 2, 2, 8, len(col_blocks), 2, 4
    pairs = torch.empty(shape, dtype=torch.int32, device=heads.device)
    for index, word in enumerate(words):
        low = ((tie >> 8 * index) & 0xFF) * HALVES
        for half in range(2):
            high = (word << 8 * (1 - half)) & BYTES
            target = pairs[:, :, half, index % 2, :, :, index // 2]
            torch.bitwise_or(high, low, out=target)
    # The low half of a pair comes first in memory: the even column.
    bits = pairs.view(torch.int16)
    bits = bits.view(len(heads), ROWS * len(row_blocks), COLS * len(col_blocks))
    row0, col0 = row0 * ROWS, col0 * COLS
    return bits[:, rows.start - row0 : rows.stop - row0, cols.start - col0 : cols.stop - col0]


def _philox(
    c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor, k0: Tensor, k1: Tensor
) -> tuple[list[Tensor], Tensor]:
    """The words of Philox4x32-7 of broadcastable counters, and the tie word: int32 tensors.

    int64 products wrap modulo 2**64: all their 64 bits are right.  c0 and c2, the factors, are kept
    to 32 bits; in c1 and c3, products of which only the low half counts, the high half is left.
    """
    for n in range(ROUNDS):
        if n == TIE_ROUNDS:
            tie = c2
        product0, product1 = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c0 = ((product1 >> 32) ^ (c1 ^ k0)) & MASK_32
        c2 = ((product0 >> 32) ^ (c3 ^ k1)) & MASK_32
        c1, c3 = product1, product0
        k0, k1 = (k0 + KEY_INCREMENTS[0]) & MASK_32, (k1 + KEY_INCREMENTS[1]) & MASK_32
    return [c.to(torch.int32) for c in (c0, c1, c2, c3)], tie.to(torch.int32)
