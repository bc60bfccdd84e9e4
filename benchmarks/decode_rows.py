"""What the decoding benchmark times: its rows, their targets, and the caches they read.

Used by bench_decode.py. All caches of a row are views of one pool of random numbers, so that a
row costs no memory of its own and next to no time to prepare.
"""

from __future__ import annotations

import fnmatch
import math
import random
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

HEAD_DIM = 128
ELEMENT_BYTES = 2  # bf16
SHORTEST, LONGEST = 64, 16384  # of the ragged row's lengths, drawn uniformly
RAGGED_SEED = 1  # 2.1 GB of K and V, as much as the other rows of this batch
# Caches are rotated until the calls between two reads of the same byte have read this many times
# the L2 cache: with three times, an L2 that does not evict strictly by age would still hit.
ROTATED_L2 = 8
ONE_IS_ENOUGH = 4 * 10**9  # bytes read per call beyond which one cache is enough
RANDOM_ELEMENTS = 2**26 + 1  # repeated in the pool; odd, so that rows never begin at one place
CURVE_BATCH, CURVE_HEADS = 16, (32, 8)
CURVE_LENGTHS = tuple(2**i for i in range(8, 18))
APPEND_BATCHES, APPEND_LENGTH = (1, 16, 64), 2048


@dataclass(frozen=True)
class Row:
    """One query token for each of `batch` sequences.

    A target is a share of the copy bandwidth or a time; fa3_share and fa3_us are what
    FlashAttention-3 reached on the same GPU, reference figures and not of this run.
    """

    batch: int
    seqlen: int
    heads_q: int
    heads_k: int
    page_size: int | None = None
    ragged: bool = False
    target_share: float | None = None
    target_us: float | None = None
    fa3_share: float | None = None
    fa3_us: float | None = None

    @property
    def name(self) -> str:
        """As --rows selects it, such as 64x8k-32/8-page16."""
        tokens = f"{SHORTEST}..{tokens_name(self.seqlen)}" if self.ragged else None
        shape = f"{self.batch}x{tokens or tokens_name(self.seqlen)}-{self.heads_q}/{self.heads_k}"
        return shape + (f"-page{self.page_size}" if self.page_size else "")

    @property
    def lengths(self) -> list[int]:
        """Keys of every sequence."""
        if not self.ragged:
            return [self.seqlen] * self.batch
        rng = random.Random(RAGGED_SEED)
        return [rng.randint(min(SHORTEST, self.seqlen), self.seqlen) for _ in range(self.batch)]

    @property
    def cache_elements(self) -> int:
        """Elements of one K cache; V's has as many."""
        return self.batch * self.seqlen * self.heads_k * HEAD_DIM

    @property
    def read_bytes(self) -> int:
        """Bytes of K and V that one call has to read."""
        return 2 * sum(self.lengths) * self.heads_k * HEAD_DIM * ELEMENT_BYTES

    def caches(self, l2_bytes: int) -> int:
        """How many caches the calls take in turns."""
        if self.read_bytes >= ONE_IS_ENOUGH:
            return 1
        return max(2, math.ceil(ROTATED_L2 * l2_bytes / self.read_bytes))

    def pool_elements(self, l2_bytes: int) -> int:
        """Elements of all its caches, K and V."""
        return 2 * self.caches(l2_bytes) * self.cache_elements


ROWS = (
    Row(16, 8192, 8, 8, target_share=0.96, fa3_share=0.86, fa3_us=149),
    Row(16, 8192, 32, 8, target_share=0.96, fa3_share=0.95, fa3_us=134),
    Row(16, 8192, 32, 32, target_share=1.04, fa3_share=1.05, fa3_us=489),
    Row(64, 8192, 32, 8, target_share=1.00, fa3_share=0.92, fa3_us=557),
    Row(64, 8192, 64, 8, target_share=1.00, fa3_share=1.04, fa3_us=491),
    Row(128, 8192, 32, 32, target_share=1.04, fa3_share=1.05, fa3_us=3884),
    Row(64, 8192, 32, 8, page_size=16, target_share=0.99, fa3_share=0.99),
    Row(64, 8192, 32, 8, page_size=64, target_share=0.99, fa3_share=1.00),
    Row(64, 8192, 32, 8, page_size=256, target_share=0.99, fa3_share=1.02),
    Row(64, LONGEST, 32, 8, ragged=True, target_share=1.03, fa3_share=1.05, fa3_us=479),
    Row(8, 2048, 32, 8, target_us=27.9, fa3_share=0.57, fa3_us=27.9),  # the target is FA3's figure
    Row(1, 1024, 32, 8, target_us=8, fa3_us=12.9),
    Row(1, 1024, 16, 1, target_us=8, fa3_us=11.6),
    Row(1, 8192, 32, 8, target_us=15, fa3_us=20.4),
    Row(1, 8192, 16, 1, target_us=12, fa3_us=16.1),
    Row(1, 131072, 32, 8, target_us=132, fa3_share=0.92, fa3_us=139),
    Row(1, 131072, 16, 1, target_us=25, fa3_share=0.46, fa3_us=34.9),
)


def tokens_name(tokens: int) -> str:
    """8192 as 8k."""
    return str(tokens) if tokens % 1024 else f"{tokens // 1024}k"


def curve_rows() -> list[Row]:
    """The rows of bandwidth against cache length."""
    return [Row(CURVE_BATCH, length, *CURVE_HEADS) for length in CURVE_LENGTHS]


def append_rows() -> list[Row]:
    """The rows on which appending and rotary embedding are timed."""
    return [Row(batch, APPEND_LENGTH, 32, 8) for batch in APPEND_BATCHES]


def select_rows(patterns: Iterable[str]) -> list[Row]:
    """The rows whose names match a pattern; raises ValueError for a pattern that matches none."""
    chosen = set()
    for pattern in patterns:
        found = {row for row in ROWS if fnmatch.fnmatchcase(row.name, pattern)}
        if not found:
            raise ValueError(f"no row matches {pattern}; rows: {' '.join(r.name for r in ROWS)}")
        chosen |= found
    return [row for row in ROWS if row in chosen]


def make_pool(elements: int, seed: int, device: str) -> Tensor:
    """A flat bf16 tensor of standard normal numbers, which repeat after RANDOM_ELEMENTS."""
    generator = torch.Generator(device).manual_seed(seed)
    options = {"device": device, "dtype": torch.bfloat16}
    numbers = torch.randn(min(elements, RANDOM_ELEMENTS), generator=generator, **options)
    pool = torch.empty(elements, **options)
    for part in pool.split(RANDOM_ELEMENTS):
        part.copy_(numbers[: len(part)])
    return pool


@dataclass(frozen=True)
class Inputs:
    """A row's tensors. K and V are (caches, batch, seqlen, heads_k, head_dim), or paged: (caches,
    num_blocks, page_size, heads_k, head_dim) with block_table (caches, batch, max_blocks)."""

    q: Tensor  # (batch, 1, heads_q, head_dim)
    k_caches: Tensor
    v_caches: Tensor
    cache_seqlens: Tensor  # (batch,), int32
    block_table: Tensor | None

    def arguments(self, call: int) -> dict[str, Any]:
        """What flash_attn_with_kvcache takes in the call of this number."""
        cache = call % len(self.k_caches)
        tensors = {"q": self.q, "k_cache": self.k_caches[cache], "v_cache": self.v_caches[cache]}
        table = None if self.block_table is None else self.block_table[cache]
        return {**tensors, "cache_seqlens": self.cache_seqlens, "block_table": table}

    def sequence(self, call: int, index: int) -> tuple[Tensor, Tensor]:
        """K and V of one sequence, (length, heads_k, head_dim) each, pages put in order."""
        arguments = self.arguments(call)
        k, v = arguments["k_cache"], arguments["v_cache"]
        length = int(self.cache_seqlens[index])
        if arguments["block_table"] is None:
            return k[index, :length], v[index, :length]
        pages = arguments["block_table"][index].long()
        return k[pages].flatten(0, 1)[:length], v[pages].flatten(0, 1)[:length]


def make_inputs(row: Row, pool: Tensor, l2_bytes: int, seed: int) -> Inputs:
    """Views of the pool, a query, lengths and a random page order."""
    device, count = pool.device, row.caches(l2_bytes)
    shape = (count, row.batch, row.seqlen, row.heads_k, HEAD_DIM)
    table = None
    generator = torch.Generator(device).manual_seed(seed)
    if row.page_size:
        blocks = row.batch * row.seqlen // row.page_size
        shape = (count, blocks, row.page_size, row.heads_k, HEAD_DIM)
        orders = [
            torch.randperm(blocks, generator=generator, device=device).view(row.batch, -1)
            for _ in range(count)
        ]
        table = torch.stack(orders).to(torch.int32)
    k, v = pool[: row.pool_elements(l2_bytes)].view(2, *shape)
    size = (row.batch, 1, row.heads_q, HEAD_DIM)
    q = torch.randn(size, generator=generator, device=device, dtype=pool.dtype)
    lengths = torch.tensor(row.lengths, dtype=torch.int32, device=device)
    return Inputs(q, k, v, lengths, table)


def one_shorter(inputs: Inputs) -> Inputs:
    """The same caches before the last key of each sequence is appended."""
    return replace(inputs, cache_seqlens=inputs.cache_seqlens - 1)
