"""The kernels that are compared, and the translation units that hold them. Needs neither torch nor a GPU."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import IntEnum

HEAD_DIMS = (64, 128)
FORWARD_BLOCK_M, FORWARD_BLOCK_N = 128, 64  # of both head dimensions, extension/sm80/tile_config.h
MAX_SMEM_BYTES = 227 * 1024  # of a thread block on sm_90
MAX_REGISTERS = 255


class Mapping(IntEnum):
    """kernels/calls.h, Mapping."""

    ROW_SPLITS = 0
    TILE_GRID = 1
    PERSISTENT = 2


# The forward mappings by name, with how each is called in tables.
MAPPINGS = {
    "per_head": "block per head",
    "row_splits": "version 1: row splits",
    "tile_grid": "version 2: tile grid",
    "ordered": "ours: ordered tiles",
    "persistent": "persistent",
}


@dataclass(frozen=True)
class BackwardVariant:
    """One instance of kernels/backward.cuh, and how its key blocks are dealt to thread blocks."""

    head_dim: int
    block_m: int = 64
    block_n: int = 128
    split_k: bool = False
    async_copies: bool = True
    key_parallel: bool = True

    @property
    def warps(self) -> int:
        """Four warps of 32 keys at d 64, eight of 16 at d 128; the larger tiles take eight."""
        large = self.block_n > 128 or self.block_m > 64
        return 8 if large or self.head_dim > 64 else 4

    @property
    def dq_warps(self) -> int:
        """Warps along the queries in dQ."""
        return 2 if self.block_m >= 32 else 1

    @property
    def sub_m(self) -> int:
        """Queries whose scores are in registers at a time."""
        return min(32, self.block_m)

    @property
    def dq_rows(self) -> int:
        """Queries of dQ that are summed at a time."""
        return 16 if self.split_k else min(64, self.block_m)

    @property
    def tile(self) -> str:
        """Queries x keys."""
        return f"{self.block_m} x {self.block_n}"

    @property
    def unit(self) -> str:
        """The translation unit; the mapping of key blocks is chosen at launch."""
        split = "split" if self.split_k else "shared"
        copies = "async" if self.async_copies else "sync"
        return f"backward_hd{self.head_dim}_{self.block_m}x{self.block_n}_{split}_{copies}"

    @property
    def traits(self) -> str:
        """The C++ type."""
        numbers = (self.head_dim, self.block_m, self.block_n, self.warps, self.dq_warps)
        flags = (str(flag).lower() for flag in (self.split_k, self.async_copies))
        return f"BackwardTraits<{', '.join([*map(str, numbers), *flags])}>"

    @property
    def smem_bytes(self) -> int:
        """Shared memory of a thread block: K, V, stages of Q and dO, dS, partial dQ, LSE and delta."""
        stages = 2 if self.async_copies else 1
        tiles = 2 * self.block_n + 2 * stages * self.block_m
        scores = self.block_n * max(32, self.block_m)
        partial = self.warps * self.dq_rows * self.head_dim if self.split_k else 0
        rows = stages * 2 * self.block_m
        return 2 * (tiles * self.head_dim + scores) + 4 * (partial + rows)

    @property
    def accumulator_registers(self) -> int:
        """Registers of a thread for dK and dV."""
        return 2 * self.block_n * self.head_dim // (32 * self.warps)

    def why_not(self) -> str | None:
        """Why this variant cannot be built, None when it can."""
        if self.accumulator_registers + self.head_dim // 4 > MAX_REGISTERS:
            return (
                f"dK and dV alone take {self.accumulator_registers} of a thread's "
                f"{MAX_REGISTERS} registers"
            )
        if self.smem_bytes > MAX_SMEM_BYTES:
            return f"needs {self.smem_bytes} bytes of shared memory, there are {MAX_SMEM_BYTES}"
        return None


def base(head_dim: int) -> BackwardVariant:
    """The variant from which one factor at a time is changed."""
    return BackwardVariant(head_dim)


def factors(head_dim: int) -> dict[str, BackwardVariant]:
    """The base, and what differs from it in one factor; also what cannot be built."""
    start = base(head_dim)
    return {
        "base: 64 x 128, no split, cp.async, over key blocks": start,
        "keys of dQ split between warps": replace(start, split_k=True),
        "synchronous copies": replace(start, async_copies=False),
        "a thread block per (batch, head)": replace(start, key_parallel=False),
        "tile 16 x 128": replace(start, block_m=16),
        "tile 16 x 256": replace(start, block_m=16, block_n=256),
        "tile 128 x 128": replace(start, block_m=128),
    }


def ladder(head_dim: int) -> dict[str, BackwardVariant]:
    """From version 1's choices to the base, one factor after the other."""
    first = BackwardVariant(
        head_dim, block_m=16, split_k=True, async_copies=False, key_parallel=False
    )
    second = replace(first, key_parallel=True)
    third = replace(second, async_copies=True)
    fourth = replace(third, split_k=False)
    return {
        "16 x 128, split, synchronous, per (batch, head)": first,
        "+ over key blocks": second,
        "+ cp.async": third,
        "+ no split between warps": fourth,
        "+ tile 64 x 128": base(head_dim),
    }


def backward_variants(head_dim: int) -> list[BackwardVariant]:
    """All that are measured."""
    named = [*factors(head_dim).values(), *ladder(head_dim).values()]
    return list(dict.fromkeys(v for v in named if v.why_not() is None))


def _unit(header: str, name: str, run: str, facts: str) -> str:
    return (
        f'#include "{header}"\n'
        "using namespace parallelism;\n"
        f"PARALLELISM_EXPORT int {name}_run(int variant, void const* call, void* stream) {{\n"
        "  auto const queue = static_cast<cudaStream_t>(stream);\n"
        "  (void)variant;\n"
        f"  return {run};\n"
        "}\n"
        f"PARALLELISM_EXPORT int {name}_facts(int variant, int causal, KernelFacts* facts) {{\n"
        "  (void)variant, (void)causal;\n"
        f"  return {facts};\n"
        "}\n"
    )


FORWARD = "*static_cast<ForwardCall const*>(call), queue"
BACKWARD = "*static_cast<BackwardCall const*>(call), queue"
SUPPORT = (
    '#include "calls.h"\n'
    "PARALLELISM_EXPORT char const* error_text(int code) {\n"
    "  return cudaGetErrorString(cudaError_t(code));\n"
    "}\n"
)


def units() -> dict[str, str]:
    """Source text of every unit by name, the slow ones first."""
    found = {}
    for d in reversed(HEAD_DIMS):
        found[f"shipped_backward_hd{d}"] = _unit(
            "shipped.cuh",
            f"shipped_backward_hd{d}",
            f"run_shipped_backward<{d}>({BACKWARD})",
            f"shipped_backward_facts<{d}>(causal != 0, facts)",
        )
    for d in reversed(HEAD_DIMS):
        found[f"mapping_hd{d}"] = _unit(
            "forward_mapping.cuh",
            f"mapping_hd{d}",
            f"run_mapping<{d}>(Mapping(variant), {FORWARD})",
            f"mapping_facts<{d}>(Mapping(variant), causal != 0, facts)",
        )
        found[f"shipped_forward_hd{d}"] = _unit(
            "shipped.cuh",
            f"shipped_forward_hd{d}",
            f"run_shipped_forward<{d}>({FORWARD})",
            f"shipped_forward_facts<{d}>(causal != 0, facts)",
        )
        found[f"keys_outside_hd{d}"] = _unit(
            "keys_outside.cuh",
            f"keys_outside_hd{d}",
            f"run_keys_outside<{d}>({FORWARD})",
            f"keys_outside_facts<{d}>(causal != 0, facts)",
        )
        for variant in backward_variants(d):
            found[variant.unit] = _unit(
                "backward_launch.cuh",
                variant.unit,
                f"run_backward<{variant.traits}>({BACKWARD})",
                f"backward_facts<{variant.traits}>(facts)",
            )
    found["support"] = SUPPORT
    return found
