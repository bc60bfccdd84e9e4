"""What can be counted without a GPU: grids and waves, version 1's splits, bytes moved, operations."""

from __future__ import annotations

from dataclasses import dataclass

from .variants import FORWARD_BLOCK_M, FORWARD_BLOCK_N, BackwardVariant

MAX_ROW_SPLITS = 30
ENOUGH_EFFICIENCY = 0.95  # of the best
HALF, SINGLE = 2, 4  # bytes of bf16 and fp32
PEAK_TFLOPS = 989.0  # dense bf16 of an H100 or H200 by the vendor's datasheet
VOCABULARY = 256


def ceil_div(a: int, b: int) -> int:
    """a / b rounded up."""
    return -(-a // b)


# --- Grids ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Waves:
    """How a grid of `blocks` fills a GPU of `sms` multiprocessors with `per_sm` thread blocks each."""

    blocks: int
    sms: int
    per_sm: int

    @property
    def at_once(self) -> int:
        """Thread blocks that run at once."""
        return self.sms * self.per_sm

    @property
    def waves(self) -> float:
        """Grid over the thread blocks that run at once."""
        return self.blocks / self.at_once

    @property
    def efficiency(self) -> float:
        """Share of these places that are in use, averaged over whole waves."""
        return self.waves / ceil_div(self.blocks, self.at_once)

    @property
    def idle_sms(self) -> int:
        """Multiprocessors without a thread block in the last wave, which for a small grid is the only one."""
        last = self.blocks - (ceil_div(self.blocks, self.at_once) - 1) * self.at_once
        return max(0, self.sms - last)


def row_splits(pairs: int, sms: int, per_sm: int, query_blocks: int) -> int:
    """Version 1's kind of rule: the smallest number of splits that fills the GPU nearly as well as the best.

    It sees batch x heads (`pairs`) and the GPU, and not how long the rows of a split are.
    """
    counts = range(1, min(MAX_ROW_SPLITS, query_blocks) + 1)
    filled = {count: Waves(pairs * count, sms, per_sm).efficiency for count in counts}
    enough = ENOUGH_EFFICIENCY * max(filled.values())
    return next(count for count in counts if filled[count] >= enough)


def grid_blocks(
    mapping: str, pairs: int, query_blocks: int, splits: int, sms: int, per_sm: int
) -> int:
    """Thread blocks of a forward mapping."""
    return {
        "per_head": pairs,
        "row_splits": pairs * splits,
        "tile_grid": pairs * query_blocks,
        "ordered": pairs * query_blocks,
        "persistent": min(pairs * query_blocks, sms * per_sm),
    }[mapping]


# --- Bytes ----------------------------------------------------------------------------------------


def visits(seqlen: int, block_m: int, block_n: int, causal: bool) -> int:
    """Pairs of query block and key block in which some query sees some key."""
    rows, columns = ceil_div(seqlen, block_m), ceil_div(seqlen, block_n)
    if not causal:
        return rows * columns
    return sum(ceil_div(min(seqlen, (i + 1) * block_m), block_n) for i in range(rows))


def least_bytes(pairs: int, seqlen: int, head_dim: int) -> tuple[int, int]:
    """(read, written) by a forward pass that touches every tensor once."""
    matrix = pairs * seqlen * head_dim * HALF
    return 3 * matrix, matrix + pairs * seqlen * SINGLE


def queries_outside_bytes(pairs: int, seqlen: int, head_dim: int, causal: bool) -> tuple[int, int]:
    """(read, written) by thread blocks that keep a query block and visit its key blocks."""
    count = visits(seqlen, FORWARD_BLOCK_M, FORWARD_BLOCK_N, causal)
    _, written = least_bytes(pairs, seqlen, head_dim)
    keys_and_values = 2 * count * FORWARD_BLOCK_N * head_dim * HALF
    return pairs * (seqlen * head_dim * HALF + keys_and_values), written


def keys_outside_bytes(
    pairs: int, seqlen: int, head_dim: int, causal: bool, splits: int
) -> tuple[int, int]:
    """(read, written) when key blocks are outside: O, maxima and sums travel once per visit."""
    count = visits(seqlen, FORWARD_BLOCK_M, FORWARD_BLOCK_N, causal)
    query_blocks = ceil_div(seqlen, FORWARD_BLOCK_M)
    _, written = least_bytes(pairs, seqlen, head_dim)
    partial = (count - query_blocks) * FORWARD_BLOCK_M * (head_dim + 2) * SINGLE
    queries = count * FORWARD_BLOCK_M * head_dim * HALF
    keys = 0
    for split in range(splits):  # up to the last query block of each split
        last = query_blocks - 1 - (query_blocks - 1 - split) % splits
        end = min(seqlen, (last + 1) * FORWARD_BLOCK_M) if causal else seqlen
        keys += 2 * ceil_div(end, FORWARD_BLOCK_N) * FORWARD_BLOCK_N * head_dim * HALF
    return pairs * (queries + keys + partial), written + pairs * partial


def shared_step_bytes(variant: BackwardVariant) -> tuple[int, int]:
    """(read, written) in shared memory when one key block meets one query block, by the tile shapes.

    A fragment is read by every warp that multiplies with it. Without a split the warps share the
    rows and columns of dQ and read dS and K^T once per row or column of warps; with it each warp
    reads its own keys, but the partial sums of all are written and read in fp32.
    """
    m, n, d, warps = variant.block_m, variant.block_n, variant.head_dim, variant.warps
    slices = m // variant.dq_rows
    keys_values = 2 * (m // variant.sub_m) * n * d * HALF  # A operands of S^T and dP^T
    queries = 4 * warps * m * d * HALF  # B operands of S^T, dP^T, dV, dK
    rows = warps * 32 * (m // 4) * 2 * SINGLE  # LSE and delta, by every thread for its columns
    written = 2 * m * d * HALF + 2 * m * SINGLE + n * m * HALF
    if variant.split_k:
        partial = warps * m * d * SINGLE
        dq = m * n * HALF + slices * n * d * HALF + partial
        return keys_values + queries + rows + dq, written + partial
    columns = warps // variant.dq_warps
    dq = columns * m * n * HALF + variant.dq_warps * slices * n * d * HALF
    return keys_values + queries + rows + dq, written


def shared_bytes(
    variant: BackwardVariant, pairs: int, seqlen: int, causal: bool
) -> tuple[int, int]:
    """(read, written) in shared memory by a whole backward pass."""
    read, written = shared_step_bytes(variant)
    steps = visits(seqlen, variant.block_m, variant.block_n, causal)
    key_tile = 2 * variant.block_n * variant.head_dim * HALF  # K and V, then dK and dV
    key_blocks = ceil_div(seqlen, variant.block_n)
    return (
        pairs * (steps * read + key_blocks * key_tile),
        pairs * (steps * written + 2 * key_blocks * key_tile),
    )


# --- Operations -----------------------------------------------------------------------------------


def forward_flops(pairs: int, seqlen: int, head_dim: int, causal: bool) -> float:
    """The papers' count: two matrix products, halved when causal."""
    return 4.0 * pairs * seqlen**2 * head_dim * (0.5 if causal else 1.0)


def backward_flops(pairs: int, seqlen: int, head_dim: int, causal: bool) -> float:
    """Five products instead of two."""
    return 2.5 * forward_flops(pairs, seqlen, head_dim, causal)


def model_parameters(layers: int, width: int) -> int:
    """Weights of the matrices that every token is multiplied with."""
    return 12 * layers * width**2 + VOCABULARY * width


def model_flops_per_token(layers: int, width: int, context: int) -> float:
    """The papers' count for training: 6 per parameter, and attention without halving for causal."""
    return 6.0 * model_parameters(layers, width) + 12.0 * layers * width * context


def utilisation(layers: int, width: int, context: int, tokens_per_second: float) -> float:
    """Model FLOP/s over the peak."""
    flops = model_flops_per_token(layers, width, context) * tokens_per_second
    return flops / (PEAK_TFLOPS * 1e12)
