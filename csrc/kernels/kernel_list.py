"""The only list of attention kernels: setup.py, the registry, the reports and the tests read it.

A unit is one translation unit: an (isa, pass, head dimension, dtype) with all its variants inside.
Units of VALUE_HEAD_DIMS have a head dimension of v besides.
An isa is the least instruction set that a kernel needs; a pass is fwd, bwd or decode.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

# Other head dimensions up to the largest run in the next larger kernel, by predicates.
# csrc/kernels/head_dims.h and flash_attn/_head_dims.py are written from this line (generate.py).
HEAD_DIMS: tuple[int, ...] = (32, 64, 96, 128, 192, 256)
DTYPES: tuple[str, ...] = ("fp16", "bf16")
# The passes of each isa, the newest isa first: the first kernel that serves a call is taken.
PASSES: dict[str, tuple[str, ...]] = {"sm90": ("fwd",), "sm80": ("fwd", "bwd", "decode")}
# Head dimensions of isas that do not have all: the others stay with the next isa.
ONLY_HEAD_DIMS: dict[str, tuple[int, ...]] = {"sm90": (64, 96, 128, 192, 256)}
# Pairs of a head dimension of q and k and one of v for which an isa has forward kernels where the two
# differ.  A call runs in a pair whose first is the next of HEAD_DIMS that holds q's, and whose second
# is not smaller than v's.
VALUE_HEAD_DIMS: dict[str, tuple[tuple[int, int], ...]] = {"sm90": ((192, 128),)}
# Architectures for which an isa's kernels are compiled.  Those of isas that are not here are
# compiled for every architecture of a build.
ONLY_FOR: dict[str, tuple[int, ...]] = {"sm90": (90,)}

_SLOWEST_PASS_FIRST = ("bwd", "decode", "fwd")


@dataclass(frozen=True)
class Unit:
    """One generated translation unit."""

    isa: str  # "sm80": also the folder of the kernel's headers
    pass_name: str  # "fwd", "bwd", "decode"
    head_dim: int
    dtype: str  # "fp16", "bf16"
    is_test: bool = False
    own_head_dim_v: int | None = None  # None: v has head_dim too

    @property
    def head_dim_v(self) -> int:
        return self.head_dim if self.own_head_dim_v is None else self.own_head_dim_v

    @property
    def _head_dims(self) -> str:
        own = "" if self.own_head_dim_v is None else f"v{self.own_head_dim_v}"
        return f"hd{self.head_dim}{own}"

    @property
    def symbol(self) -> str:
        """Name of the registry's entry, for example fwd_hd128_bf16 or fwd_hd192v128_bf16."""
        test = "test_" if self.is_test else ""
        return f"{test}{self.pass_name}_{self._head_dims}_{self.dtype}"

    @property
    def name(self) -> str:
        """Name of the generated file without its suffix, for example fwd_sm80_hd128_bf16."""
        test = "test_" if self.is_test else ""
        return f"{test}{self.pass_name}_{self.isa}_{self._head_dims}_{self.dtype}"

    @property
    def functions(self) -> str:
        """The header's struct with the unit's functions, for example Fwd."""
        return ("Test" if self.is_test else "") + self.pass_name.capitalize()

    @property
    def header(self) -> str:
        """The header with the kernels and their launch."""
        return f"{self.isa}/{'test' if self.is_test else self.pass_name}/launch.cuh"

    @property
    def isa_rank(self) -> int:
        """0 for the newest isa."""
        return list(PASSES).index(self.isa)

    def archs(self, requested: Iterable[int]) -> tuple[int, ...]:
        """Those of a build's architectures for which this unit is compiled."""
        only = ONLY_FOR.get(self.isa)
        return tuple(arch for arch in requested if only is None or arch in only)


# In builds with FLASH_ATTN_TEST_UNITS=1.  It proves that an isa's units are compiled for the isa's
# own architectures, listed, and passed over when they do not serve.
TEST_UNIT = Unit("sm90", "fwd", 64, "bf16", is_test=True)


def units(
    archs: Iterable[int],
    head_dims: Iterable[int] | None = None,
    dtypes: Iterable[str] | None = None,
    *,
    test_units: bool = False,
) -> list[Unit]:
    """Units of a build for archs, the ones that compile longest first.

    head_dims and dtypes select a part of HEAD_DIMS and DTYPES; None selects all.
    """
    archs = tuple(archs)
    head_dims = HEAD_DIMS if head_dims is None else tuple(head_dims)
    dtypes = DTYPES if dtypes is None else tuple(dtypes)
    found = [
        Unit(isa, pass_name, head_dim, dtype)
        for isa, passes in PASSES.items()
        for pass_name in passes
        for head_dim in ONLY_HEAD_DIMS.get(isa, HEAD_DIMS)
        for dtype in DTYPES
    ]
    found += [
        Unit(isa, "fwd", head_dim, dtype, own_head_dim_v=head_dim_v)
        for isa, pairs in VALUE_HEAD_DIMS.items()
        for head_dim, head_dim_v in pairs
        for dtype in DTYPES
    ]
    found += [TEST_UNIT] if test_units else []
    found = [u for u in found if u.head_dim in head_dims and u.dtype in dtypes and u.archs(archs)]
    return sorted(found, key=lambda u: (_SLOWEST_PASS_FIRST.index(u.pass_name), -u.head_dim))


# Sizes of shared memory that there are tiles for, in KB per thread block, falling; the same as in
# csrc/kernels/pieces/smem_size.h.
SMEM_KB: tuple[int, ...] = (227, 163, 99)
# What a thread block gets on GPUs of each compute capability, by NVIDIA's tables.
SMEM_KB_OF_ARCH: dict[int, int] = {
    **dict.fromkeys((90, 100, 103, 110), 227),
    **dict.fromkeys((80, 87), 163),
    **dict.fromkeys((86, 89, 120, 121), 99),
}
# Code of these runs on newer GPUs with less shared memory too: that of 8.0 on 8.6 and 8.9.
ALSO_ON_KB: dict[int, int] = {80: 99}


def smem_kb(archs: Iterable[int]) -> tuple[int, ...]:
    """Sizes that a build for archs needs, falling; the smallest for an architecture not known here."""
    archs = tuple(archs)
    needed = {SMEM_KB_OF_ARCH.get(arch, min(SMEM_KB)) for arch in archs}
    needed |= {ALSO_ON_KB[arch] for arch in archs if arch in ALSO_ON_KB}
    return tuple(size for size in SMEM_KB if size in needed)
