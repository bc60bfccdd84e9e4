"""Test cases: what is run, on which device, with which inputs."""

from __future__ import annotations

import enum
import os
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import pytest
import torch

NATIVE_HEAD_DIMS = (32, 64, 96, 128, 192, 256)
DTYPES = {
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "fp32": torch.float32,
    "fp64": torch.float64,
}
SEED = int(os.environ.get("FLASH_ATTN_TEST_SEED", "0"))


class Mask(enum.Enum):
    """Which keys a query sees."""

    none = "full"
    causal = "causal"


@dataclass(frozen=True)
class AttnCase:
    """One problem. `heads` is (query heads, key/value heads); `dtype` a key of DTYPES."""

    seqlen_q: int = 128
    seqlen_k: int = 128
    heads: tuple[int, int] = (2, 1)
    head_dim: int = 64
    mask: Mask = Mask.none
    dtype: str = "bf16"
    batch: int = 1

    def __str__(self) -> str:
        heads = f"{self.heads[0]}over{self.heads[1]}"
        shape = f"b{self.batch}-q{self.seqlen_q}-k{self.seqlen_k}-h{heads}-d{self.head_dim}"
        return f"{shape}-{self.mask.value}-{self.dtype}"

    @property
    def causal(self) -> bool:
        return self.mask is Mask.causal

    @property
    def scale(self) -> float:
        return self.head_dim**-0.5

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @property
    def q_shape(self) -> tuple[int, int, int, int]:
        return self.batch, self.seqlen_q, self.heads[0], self.head_dim

    @property
    def kv_shape(self) -> tuple[int, int, int, int]:
        return self.batch, self.seqlen_k, self.heads[1], self.head_dim

    def but(self, **changes: Any) -> AttnCase:
        """This case with some fields changed."""
        return replace(self, **changes)


def native_head_dim(head_dim: int) -> int:
    """Head dimension of the kernel that serves `head_dim` in a full build."""
    return next(d for d in NATIVE_HEAD_DIMS if d >= head_dim)


@cache
def cuda_build() -> dict[str, Any] | None:
    """What the extension holds, or None where CUDA cannot be tested."""
    if not torch.cuda.is_available():
        return None
    try:
        import flash_attn_2_cuda
    except ImportError:
        return None
    return flash_attn_2_cuda.build_info()


def why_no_cuda() -> str | None:
    """Why CUDA tests are not collected here; None where they are."""
    if not torch.cuda.is_available():
        return "torch sees no CUDA device: only the CPU backend is tested"
    if cuda_build() is None:
        return "flash_attn_2_cuda is not importable: only the CPU backend is tested"
    return None


def is_built(case: AttnCase) -> bool:
    """Whether this build has the kernel for `case` (FLASH_ATTN_HEAD_DIMS, FLASH_ATTN_DTYPES)."""
    build = cuda_build()
    return (
        build is not None
        and native_head_dim(case.head_dim) in build["head_dims"]
        and case.dtype in build["dtypes"]
    )


def devices() -> list[str]:
    """Devices that tests run on."""
    return ["cpu", "cuda"] if cuda_build() is not None else ["cpu"]


def on_devices(*, cpu: Iterable[AttnCase] = (), cuda: Iterable[AttnCase] = ()) -> Callable:
    """Parametrize `device` and `case`; CUDA cases vanish where there is no GPU or no kernel."""
    pairs = [("cpu", case) for case in dict.fromkeys(cpu)]
    if cuda_build() is not None:
        pairs += [("cuda", case) for case in dict.fromkeys(cuda) if is_built(case)]
    return pytest.mark.parametrize(
        ("device", "case"), pairs, ids=[f"{device}-{case}" for device, case in pairs]
    )


def everywhere(*cases: AttnCase) -> Callable:
    """Parametrize over the same half-precision cases on CUDA and, in fp32, on the CPU."""
    return on_devices(cpu=[case.but(dtype="fp32") for case in cases], cuda=cases)


def generator(case: AttnCase, device: str, salt: int = 0) -> torch.Generator:
    """Random numbers of one case: repeatable, and different from those of other cases."""
    seed = zlib.crc32(str(case).encode()) + SEED * 1_000_003 + salt * 7_919
    return torch.Generator(device=device).manual_seed(seed)


def randn(shape: tuple[int, ...], dtype: torch.dtype, gen: torch.Generator) -> torch.Tensor:
    """Normal numbers on the generator's device."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return torch.randn(shape, generator=gen, device=gen.device, dtype=wide).to(dtype)


@dataclass
class Inputs:
    """Tensors of one case: q, dout (b, sq, h, d), k, v (b, sk, hk, d)."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    dout: torch.Tensor

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> Inputs:
        return Inputs(*(function(x) for x in (self.q, self.k, self.v, self.dout)))


def make_inputs(case: AttnCase, device: str, salt: int = 0) -> Inputs:
    """Normally distributed inputs of `case`."""
    gen = generator(case, device, salt)
    q = randn(case.q_shape, case.torch_dtype, gen)
    k = randn(case.kv_shape, case.torch_dtype, gen)
    v = randn(case.kv_shape, case.torch_dtype, gen)
    dout = randn(case.q_shape, case.torch_dtype, gen)
    return Inputs(q, k, v, dout)
