"""Test cases: what is run, on which device, with which inputs."""

from __future__ import annotations

import enum
import itertools
import os
import random
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import pytest
import torch

from flash_attn._head_dims import HEAD_DIMS as NATIVE_HEAD_DIMS

DTYPES = {
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "fp32": torch.float32,
    "fp64": torch.float64,
}
SEED = int(os.environ.get("FLASH_ATTN_TEST_SEED", "0"))
# KB of shared memory that a thread block gets in this run; 0: what the GPU allows.
SMEM_LIMIT_KB = int(os.environ.get("FLASH_ATTN_TEST_SMEM_KB") or 0)


class Mask(enum.Enum):
    """Which keys a query sees."""

    none = "full"
    causal = "causal"


class Alibi(enum.Enum):
    """Which slopes there are."""

    none = ""
    per_head = "alibi"
    per_batch = "alibi_of_batch"


Window = tuple[int, int]
UNLIMITED: Window = (-1, -1)


class CaseBase:
    """What dense and variable-length cases have in common."""

    head_dim_v = 0  # of v and out; 0: head_dim

    @property
    def causal(self) -> bool:
        return self.mask is Mask.causal

    @property
    def scale(self) -> float:
        return self.head_dim**-0.5

    @property
    def v_shape(self) -> tuple[int, ...]:
        return *self.kv_shape[:-1], self.head_dim_v or self.head_dim

    @property
    def out_shape(self) -> tuple[int, ...]:
        return *self.q_shape[:-1], self.head_dim_v or self.head_dim

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    def but(self, **changes: Any) -> Any:
        """This case with some fields changed."""
        return replace(self, **changes)

    def tail(self) -> str:
        """The end of the id: heads and so on; the features that are used."""
        heads = f"h{self.heads[0]}over{self.heads[1]}"
        parts = [heads, f"d{self.head_dim}", self.mask.value, self.dtype]
        if self.head_dim_v:
            parts[1] += f"v{self.head_dim_v}"
        if self.window != UNLIMITED:
            parts.append(f"w{self.window[0]}.{self.window[1]}")
        if self.softcap:
            parts.append(f"cap{self.softcap:g}")
        if self.alibi is not Alibi.none:
            parts.append(self.alibi.value)
        if self.dropout:
            parts.append(f"p{self.dropout:g}")
        return "-".join(parts)


@dataclass(frozen=True)
class AttnCase(CaseBase):
    """One problem. `heads` is (query heads, key/value heads); `dtype` a key of DTYPES.

    head_dim_v: of v and out; 0: head_dim.
    """

    seqlen_q: int = 128
    seqlen_k: int = 128
    heads: tuple[int, int] = (2, 1)
    head_dim: int = 64
    mask: Mask = Mask.none
    dtype: str = "bf16"
    batch: int = 1
    window: Window = UNLIMITED
    softcap: float = 0.0
    alibi: Alibi = Alibi.none
    dropout: float = 0.0
    head_dim_v: int = 0

    def __str__(self) -> str:
        return f"b{self.batch}-q{self.seqlen_q}-k{self.seqlen_k}-{self.tail()}"

    @property
    def q_shape(self) -> tuple[int, int, int, int]:
        return self.batch, self.seqlen_q, self.heads[0], self.head_dim

    @property
    def kv_shape(self) -> tuple[int, int, int, int]:
        return self.batch, self.seqlen_k, self.heads[1], self.head_dim


@dataclass(frozen=True)
class VarlenCase(CaseBase):
    """Sequences of different lengths in one tensor; `unused`: rows after the last (of q, of k)."""

    lengths_q: tuple[int, ...] = (128,)
    lengths_k: tuple[int, ...] = (128,)
    heads: tuple[int, int] = (2, 1)
    head_dim: int = 64
    mask: Mask = Mask.none
    dtype: str = "bf16"
    unused: tuple[int, int] = (0, 0)
    window: Window = UNLIMITED
    softcap: float = 0.0
    alibi: Alibi = Alibi.none
    dropout: float = 0.0
    head_dim_v: int = 0

    def __str__(self) -> str:
        unused = f"-unused{self.unused[0]}.{self.unused[1]}" if any(self.unused) else ""
        lengths = f"q{_short(self.lengths_q)}-k{_short(self.lengths_k)}"
        return f"{lengths}{unused}-{self.tail()}"

    @property
    def batch(self) -> int:
        return len(self.lengths_q)

    @property
    def q_shape(self) -> tuple[int, int, int]:
        return sum(self.lengths_q) + self.unused[0], self.heads[0], self.head_dim

    @property
    def kv_shape(self) -> tuple[int, int, int]:
        return sum(self.lengths_k) + self.unused[1], self.heads[1], self.head_dim

    def sequence(self, n: int) -> AttnCase:
        """Sequence n as a problem of its own."""
        names = ("heads", "head_dim", "mask", "dtype", "window", "softcap", "alibi", "dropout")
        names += ("head_dim_v",)
        same = {name: getattr(self, name) for name in names}
        return AttnCase(self.lengths_q[n], self.lengths_k[n], **same)


def _short(lengths: tuple[int, ...]) -> str:
    """Lengths for an id: all of them if they are few."""
    if len(lengths) <= 8:
        return ".".join(map(str, lengths))
    return f"{len(lengths)}x{zlib.crc32(str(lengths).encode()) % 10000:04d}"


Case = AttnCase | VarlenCase

# One of each feature, and all together: what a test that is about something else tries.
FEATURE_SETS: tuple[dict[str, Any], ...] = (
    dict(window=(40, 0)),
    dict(window=(20, 33)),
    dict(softcap=4.0),
    dict(alibi=Alibi.per_head),
    dict(alibi=Alibi.per_batch, window=(-1, 9)),
    dict(dropout=0.2),
    dict(window=(33, -1), softcap=6.0, alibi=Alibi.per_head),
    dict(window=(70, 5), softcap=8.0, alibi=Alibi.per_batch, dropout=0.1),
)


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


def is_built(case: Case) -> bool:
    """Whether this build has the kernel for `case` (FLASH_ATTN_HEAD_DIMS, FLASH_ATTN_DTYPES)."""
    build = cuda_build()
    return (
        build is not None
        and native_head_dim(case.head_dim) in build["head_dims"]
        and case.dtype in build["dtypes"]
    )


def built_isas(pass_name: str) -> list[str]:
    """Isas whose kernels of a pass this build has for this GPU, the newest first; none without CUDA."""
    build = cuda_build()
    if build is None:
        return []
    from csrc.kernels import kernel_list

    listed = dict.fromkeys(isa for isa, name, _, _ in build["kernels"] if name == pass_name)
    # An isa may be listed for its test unit alone.
    found = [isa for isa in listed if pass_name in kernel_list.PASSES[isa]]
    # An isa of few architectures serves on GPUs of these alone, with all of their shared memory.
    major, minor = torch.cuda.get_device_capability()
    is_lowered = 0 < SMEM_LIMIT_KB < device_smem_kb()
    archs = () if is_lowered else (10 * major + minor,)
    only_for = kernel_list.ONLY_FOR
    return [isa for isa in found if isa not in only_for or set(archs) & set(only_for[isa])]


def device_smem_kb() -> int:
    """KB of shared memory that the GPU allows a thread block; 0 where CUDA cannot be tested."""
    if cuda_build() is None:
        return 0
    import flash_attn_2_cuda

    return flash_attn_2_cuda.smem_kb(0)


def built_smem_kb() -> list[int]:
    """Sizes of shared memory below the GPU's with tiles in this build; none without CUDA."""
    build = cuda_build()
    return [] if build is None else [kb for kb in build["smem_kb"] if kb < device_smem_kb()]


def devices() -> list[str]:
    """Devices that tests run on."""
    return ["cpu", "cuda"] if cuda_build() is not None else ["cpu"]


def on_devices(*, cpu: Iterable[Case] = (), cuda: Iterable[Case] = ()) -> Callable:
    """Parametrize `device` and `case`; CUDA cases vanish where there is no GPU or no kernel."""
    pairs = [("cpu", case) for case in dict.fromkeys(cpu)]
    if cuda_build() is not None:
        pairs += [("cuda", case) for case in dict.fromkeys(cuda) if is_built(case)]
    return pytest.mark.parametrize(
        ("device", "case"), pairs, ids=[f"{device}-{case}" for device, case in pairs]
    )


def everywhere(*cases: Case) -> Callable:
    """Parametrize over the same half-precision cases on CUDA and, in fp32, on the CPU."""
    return on_devices(cpu=[case.but(dtype="fp32") for case in cases], cuda=cases)


def generator(case: Case, device: str, salt: int = 0) -> torch.Generator:
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
    v = randn(case.v_shape, case.torch_dtype, gen)
    dout = randn(case.out_shape, case.torch_dtype, gen)
    return Inputs(q, k, v, dout)


def make_alibi(case: Case, device: str) -> torch.Tensor | None:
    """Slopes between 1/256 and 1, as models have them; (h,) or (b, h) fp32."""
    if case.alibi is Alibi.none:
        return None
    shape = (case.heads[0],) if case.alibi is Alibi.per_head else (case.batch, case.heads[0])
    gen = generator(case, device, salt=101)
    return 2.0 ** (-8 * torch.rand(shape, generator=gen, device=device, dtype=torch.float32))


def make_dlse(case: Case, device: str) -> torch.Tensor:
    """A gradient of softmax_lse: (b, h, sq), or (h, total_q)."""
    if isinstance(case, AttnCase):
        shape = (case.batch, case.heads[0], case.seqlen_q)
    else:
        shape = (case.heads[0], case.q_shape[0])
    dtype = torch.float64 if case.dtype == "fp64" else torch.float32
    return randn(shape, dtype, generator(case, device, salt=102))


@dataclass
class VarlenInputs(Inputs):
    """q, dout (total_q, h, d), k, v (total_k, hk, d), NaN in the rows of no sequence."""

    cu_seqlens_q: torch.Tensor
    cu_seqlens_k: torch.Tensor
    max_seqlen_q: int
    max_seqlen_k: int

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> VarlenInputs:
        changed = {name: function(getattr(self, name)) for name in ("q", "k", "v", "dout")}
        return replace(self, **changed)


def cumulative(lengths: Iterable[int], device: str | torch.device = "cpu") -> torch.Tensor:
    """cu_seqlens: (len(lengths) + 1,) int32."""
    ends = itertools.accumulate(lengths, initial=0)
    return torch.tensor(list(ends), dtype=torch.int32, device=device)


def make_varlen_inputs(case: VarlenCase, device: str, salt: int = 0) -> VarlenInputs:
    """Normally distributed inputs of `case`."""
    gen = generator(case, device, salt)
    q = randn(case.q_shape, case.torch_dtype, gen)
    k = randn(case.kv_shape, case.torch_dtype, gen)
    v = randn(case.v_shape, case.torch_dtype, gen)
    dout = randn(case.out_shape, case.torch_dtype, gen)
    for x, used in ((q, case.lengths_q), (k, case.lengths_k), (v, case.lengths_k)):
        x[sum(used) :] = torch.nan
    dout[sum(case.lengths_q) :] = torch.nan
    return VarlenInputs(
        *(q, k, v, dout),
        cumulative(case.lengths_q, device),
        cumulative(case.lengths_k, device),
        max(case.lengths_q, default=0),
        max(case.lengths_k, default=0),
    )


def pairwise(**choices: Sequence[Any]) -> Iterator[dict[str, Any]]:
    """Few combinations in which every two values of different names meet; always the same ones."""
    draw = random.Random(0)
    names = list(choices)
    missing = {
        ((a, i), (b, j))
        for a, b in itertools.combinations(names, 2)
        for i, j in itertools.product(range(len(choices[a])), range(len(choices[b])))
    }

    def pairs(row: dict[str, int]) -> set:
        return set(itertools.combinations(row.items(), 2))

    while missing:
        (a, i), (b, j) = min(missing)
        rows = [
            {n: draw.randrange(len(choices[n])) for n in names} | {a: i, b: j} for _ in range(8)
        ]
        best = max(rows, key=lambda row: len(pairs(row) & missing))
        missing -= pairs(best)
        yield {name: choices[name][index] for name, index in best.items()}
