"""The compiled variants as Python calls on torch tensors: raw pointers and the current stream through ctypes."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .variants import FORWARD_BLOCK_M, BackwardVariant, Mapping

PREPARE, MAIN, FINISH = 1, 2, 4  # kernels/calls.h, Part
ALL_PARTS = PREPARE | MAIN | FINISH
LARGEST_TILE = 128  # rows to which workspaces are padded


class ForwardCall(ctypes.Structure):
    """kernels/calls.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("q", "k", "v", "out")),
        *((name, ctypes.c_void_p) for name in ("lse", "o_partial", "row_partial")),
        *((name, ctypes.c_int) for name in ("batch", "seqlen", "heads", "causal", "splits")),
        ("scale", ctypes.c_float),
    ]


class BackwardCall(ctypes.Structure):
    """kernels/calls.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("dout", "q", "k", "v", "out", "dq", "dk", "dv")),
        *((name, ctypes.c_void_p) for name in ("lse", "dq_accum", "rows")),
        *((name, ctypes.c_int) for name in ("batch", "seqlen", "heads", "causal")),
        *((name, ctypes.c_int) for name in ("key_parallel", "parts")),
        ("scale", ctypes.c_float),
    ]


class KernelFacts(ctypes.Structure):
    """kernels/calls.h."""

    _fields_ = [
        (name, ctypes.c_int)
        for name in ("registers", "local_bytes", "smem_bytes", "threads", "blocks_per_sm")
    ]

    def as_dict(self) -> dict[str, int]:
        """Field values by name."""
        return {name: getattr(self, name) for name, _ in self._fields_}


class LaunchError(RuntimeError):
    """A unit returned a CUDA error."""


@dataclass(frozen=True)
class Problem:
    """Self-attention of `batch` sequences."""

    batch: int
    seqlen: int
    heads: int
    head_dim: int
    causal: bool

    @property
    def pairs(self) -> int:
        """batch x heads."""
        return self.batch * self.heads

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Of q, k, v and out."""
        return self.batch, self.seqlen, self.heads, self.head_dim

    @property
    def padded_rows(self) -> int:
        """Rows of a workspace that holds whole tiles."""
        return -(-self.seqlen // LARGEST_TILE) * LARGEST_TILE

    def __str__(self) -> str:
        mask = "causal" if self.causal else "full"
        return f"b{self.batch} s{self.seqlen} h{self.heads} d{self.head_dim} {mask}"


class Library:
    """The shared library that build.py links."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._library = ctypes.CDLL(str(path))
        self._library.error_text.restype = ctypes.c_char_p

    def run(self, unit: str, variant: int, call: ForwardCall | BackwardCall) -> None:
        """Launches on the current stream; raises LaunchError."""
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        self._check(
            unit, getattr(self._library, f"{unit}_run")(variant, ctypes.byref(call), stream)
        )

    def facts(self, unit: str, variant: int, causal: bool) -> dict[str, int]:
        """Registers, local memory, shared memory, threads and thread blocks per multiprocessor."""
        facts = KernelFacts()
        function = getattr(self._library, f"{unit}_facts")
        self._check(unit, function(variant, int(causal), ctypes.byref(facts)))
        return facts.as_dict()

    def _check(self, unit: str, code: int) -> None:
        if code:
            text = self._library.error_text(code).decode()
            raise LaunchError(f"{unit}: {text}")


@dataclass
class Forward:
    """Tensors of a forward pass, and the mappings on them."""

    library: Library
    problem: Problem
    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor
    lse: Tensor
    o_partial: Tensor | None = None
    row_partial: Tensor | None = None

    def call(self, splits: int) -> ForwardCall:
        """The arguments; they point into this object's tensors."""
        p = self.problem
        return ForwardCall(
            *(_pointer(t) for t in (self.q, self.k, self.v, self.out, self.lse)),
            *(_pointer(t) for t in (self.o_partial, self.row_partial)),
            p.batch,
            p.seqlen,
            p.heads,
            int(p.causal),
            splits,
            p.head_dim**-0.5,
        )

    def run(self, name: str, splits: int) -> None:
        """One pass by a mapping of variants.MAPPINGS, or "keys_outside"."""
        unit, variant = forward_unit(name, self.problem.head_dim)
        self.library.run(unit, variant, self.call(1 if name == "per_head" else splits))


def forward_unit(name: str, head_dim: int) -> tuple[str, int]:
    """Translation unit and variant of a forward kernel."""
    if name == "ordered":
        return f"shipped_forward_hd{head_dim}", 0
    if name == "keys_outside":
        return f"keys_outside_hd{head_dim}", 0
    variants = {
        "per_head": Mapping.ROW_SPLITS,
        "row_splits": Mapping.ROW_SPLITS,
        "tile_grid": Mapping.TILE_GRID,
        "persistent": Mapping.PERSISTENT,
    }
    return f"mapping_hd{head_dim}", int(variants[name])


@dataclass
class Backward:
    """Tensors of a backward pass, and the variants on them."""

    library: Library
    problem: Problem
    dout: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor
    dq: Tensor
    dk: Tensor
    dv: Tensor
    lse: Tensor
    dq_accum: Tensor
    rows: Tensor

    def run(self, variant: BackwardVariant | None, parts: int = ALL_PARTS) -> None:
        """One pass, or parts of it; None is the extension's own kernel."""
        p = self.problem
        tensors = (self.dout, self.q, self.k, self.v, self.out, self.dq, self.dk, self.dv)
        call = BackwardCall(
            *(_pointer(t) for t in (*tensors, self.lse, self.dq_accum, self.rows)),
            p.batch,
            p.seqlen,
            p.heads,
            int(p.causal),
            int(variant is None or variant.key_parallel),
            parts,
            p.head_dim**-0.5,
        )
        unit = variant.unit if variant else f"shipped_backward_hd{p.head_dim}"
        self.library.run(unit, 0, call)


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def normal(shape: tuple[int, ...], seed: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Standard normal values on the GPU."""
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(shape, generator=generator, device="cuda", dtype=dtype)


def make_forward(library: Library, problem: Problem, partial: bool = False) -> Forward:
    """Fresh tensors; results hold NaN until they are written."""
    q, k, v = (normal(problem.shape, seed) for seed in range(3))
    lse = torch.full((problem.batch, problem.heads, problem.seqlen), torch.nan, device="cuda")
    forward = Forward(library, problem, q, k, v, torch.full_like(q, torch.nan), lse)
    if partial:
        rows = problem.pairs * problem.padded_rows
        forward.o_partial = torch.full((rows * problem.head_dim,), torch.nan, device="cuda")
        forward.row_partial = torch.full((rows * 2,), torch.nan, device="cuda")
    return forward


def make_backward(library: Library, problem: Problem, forward: bool = True) -> Backward:
    """Fresh tensors, with out and lse of the extension's own forward kernel; without it they are zero."""
    start = make_forward(library, problem)
    if forward:
        start.run("ordered", 1)
    else:
        start.out.zero_(), start.lse.zero_()
    rows = problem.pairs * problem.padded_rows
    return Backward(
        library,
        problem,
        normal(problem.shape, 3),
        start.q,
        start.k,
        start.v,
        start.out,
        *(torch.full_like(start.q, torch.nan) for _ in range(3)),
        start.lse,
        torch.full((rows * problem.head_dim,), torch.nan, device="cuda"),
        torch.full((rows * 2,), torch.nan, device="cuda"),
    )


def reference(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, dout: Tensor | None = None
) -> dict[str, Tensor]:
    """out and lse, and with dout the gradients, computed in float32 from the same inputs."""
    q, k, v = (x.detach().float().requires_grad_(dout is not None) for x in (q, k, v))
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * q.shape[-1] ** -0.5
    if causal:
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(hidden, -torch.inf)
    out = torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), v)
    results = {"out": out.detach(), "lse": scores.detach().logsumexp(-1)}
    if dout is not None:
        gradients = torch.autograd.grad(out, (q, k, v), dout.float())
        results |= dict(zip(("dq", "dk", "dv"), gradients, strict=True))
    return results


def query_blocks(seqlen: int) -> int:
    """Of the forward kernels."""
    return -(-seqlen // FORWARD_BLOCK_M)
