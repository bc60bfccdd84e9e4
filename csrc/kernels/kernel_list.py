"""The only list of attention kernels: setup.py, the registry, the reports and the tests read it.

A unit is one translation unit: a (minimum instruction set, family, head dimension, dtype) with all
its variants inside.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

# Other head dimensions up to the largest run in the next larger kernel, by predicates.
HEAD_DIMS: tuple[int, ...] = (32, 64, 96, 128, 192, 256)
DTYPES: tuple[str, ...] = ("fp16", "bf16")
# Minimum instruction set -> its families.  sm80 kernels serve every newer GPU too.
FAMILIES: dict[str, tuple[str, ...]] = {"sm80": ("fwd", "bwd", "decode")}

_SLOWEST_FAMILY_FIRST = ("bwd", "decode", "fwd")


@dataclass(frozen=True)
class Unit:
    """One generated translation unit."""

    isa: str  # "sm80": the minimum instruction set, and the folder of the kernel's headers
    family: str  # "fwd", "bwd", "decode"
    head_dim: int
    dtype: str  # "fp16", "bf16"

    @property
    def symbol(self) -> str:
        """Name of the launch function, for example fwd_hd128_bf16."""
        return f"{self.family}_hd{self.head_dim}_{self.dtype}"

    @property
    def name(self) -> str:
        """Name of the generated file without its suffix, for example fwd_sm80_hd128_bf16."""
        return f"{self.family}_{self.isa}_hd{self.head_dim}_{self.dtype}"


def units(
    head_dims: Iterable[int] | None = None, dtypes: Iterable[str] | None = None
) -> list[Unit]:
    """Units of a build, the ones that compile longest first.

    head_dims and dtypes select a part of HEAD_DIMS and DTYPES; None selects all.
    """
    head_dims = HEAD_DIMS if head_dims is None else tuple(head_dims)
    dtypes = DTYPES if dtypes is None else tuple(dtypes)
    found = [
        Unit(isa, family, head_dim, dtype)
        for isa, families in FAMILIES.items()
        for family in families
        for head_dim in HEAD_DIMS
        if head_dim in head_dims
        for dtype in DTYPES
        if dtype in dtypes
    ]
    return sorted(found, key=lambda u: (_SLOWEST_FAMILY_FIRST.index(u.family), -u.head_dim))


# Thread blocks of these get 227 KB of shared memory; sm_80 has 163 KB.
LARGE_SMEM_ARCHS = (90, 100, 103)


def needs_small_tiles(archs: Iterable[int]) -> bool:
    """Whether a build for archs needs tiles for less than 227 KB of shared memory."""
    return any(arch not in LARGE_SMEM_ARCHS for arch in archs)
