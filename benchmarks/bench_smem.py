"""Time the tiles for less shared memory against the device's own, in turns on one GPU.

    FLASH_ATTN_SMEM_KB="227,163,99" pip install ...     the build that it needs
    python3 benchmarks/bench_smem.py --json benchmarks/results/smem.json
    python3 benchmarks/update_readme.py                 the table in benchmarks/README.md

bf16, sm80's kernels. What is timed has other tiles at 99 KB than at 227: the backward from head
dimension 128 on, the forward of 192, decoding. A ratio above the target is reported; it does not
change the exit code, results that differ do.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from bench import ClockLog, command_line, device_times, environment
from bench_fwd_bwd import make_inputs
from report import finish, mask_name
from torch import Tensor

from flash_attn import flash_attn_func, flash_attn_with_kvcache
from flash_attn._head_dims import HEAD_DIMS

TARGET_SECONDS = 0.1
TARGET = 1.3  # times the device's own tiles
DROPOUT = 0.1
# Results of two tiles differ by the order of sums and what is rounded; relative to the norm.
TOLERANCE = 1e-2
DEVICE = 0  # of the limits: none but the device's
HEADS, KEY_HEADS, CACHE_BATCH = 32, 8, 16  # decoding

Call = Callable[[], Sequence[Tensor]]


@dataclass(frozen=True)
class Cell:
    """One call; dropout takes the general tiles."""

    direction: str  # "fwd", "bwd", "decode"
    head_dim: int
    causal: bool = True
    dropout: bool = False

    @property
    def name(self) -> str:
        """As the tables have it."""
        what = {"fwd": "forward", "bwd": "backward", "decode": "decoding"}[self.direction]
        if self.direction == "decode":
            return f"{what}, head_dim {self.head_dim}"
        dropout = ", dropout" if self.dropout else ""
        return f"{what}, head_dim {self.head_dim}, {mask_name(self.causal)}{dropout}"


def cells(head_dims: Sequence[int]) -> list[Cell]:
    """What is measured of these head dimensions."""
    found = [Cell("fwd", 192, causal) for causal in (True, False)]
    for head_dim in (128, 192, 256):
        found += [Cell("bwd", head_dim, True), Cell("bwd", head_dim, False)]
        found.append(Cell("bwd", head_dim, True, dropout=True))
    found += [Cell("decode", head_dim) for head_dim in HEAD_DIMS]
    return [cell for cell in found if cell.head_dim in head_dims]


def sizes(built: Sequence[int], device_kb: int) -> list[int]:
    """Built sizes of shared memory smaller than the device's."""
    return [kb for kb in built if kb < device_kb]


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--head-dims", type=int, nargs="+", default=list(HEAD_DIMS))
    add("--tokens", type=int, default=8192, help="one sequence, 2048 / head_dim heads")
    add("--repeats", type=int, help=f"default: what fits into {TARGET_SECONDS} s per measurement")
    add("--seed", type=int, default=0)
    add("--json", type=Path, default=Path("build/smem.json"), help="file to write")
    args = parser.parse_args(argv)
    if args.tokens < 1:
        parser.error(f"--tokens: must be at least 1; got {args.tokens}")
    if args.repeats is not None and args.repeats < 1:
        parser.error(f"--repeats: must be at least 1; got {args.repeats}")
    return args


def make_call(cell: Cell, tokens: int, seed: int, device: str = "cuda") -> Call:
    """The call of a cell, on inputs that all sizes share."""
    if cell.direction == "decode":
        return _decoding(cell.head_dim, tokens, seed, device)
    shape = (1, tokens, max(1, 2048 // cell.head_dim), cell.head_dim)
    q, k, v, dout = make_inputs(shape, torch.bfloat16, seed, device)
    options: dict[str, Any] = {"causal": cell.causal, "dropout_p": DROPOUT * cell.dropout}
    if cell.direction == "fwd":
        q, k, v = (x.detach() for x in (q, k, v))
        return lambda: [flash_attn_func(q, k, v, **options)]
    out = flash_attn_func(q, k, v, **options)
    return lambda: torch.autograd.grad(out, (q, k, v), dout, retain_graph=True)


def _decoding(head_dim: int, tokens: int, seed: int, device: str) -> Call:
    generator = torch.Generator(device).manual_seed(seed)
    options: dict[str, Any] = {"device": device, "dtype": torch.bfloat16, "generator": generator}
    q = torch.randn(CACHE_BATCH, 1, HEADS, head_dim, **options)
    k, v = (torch.randn(CACHE_BATCH, tokens, KEY_HEADS, head_dim, **options) for _ in range(2))
    lengths = torch.full((CACHE_BATCH,), tokens, dtype=torch.int32, device=device)
    return lambda: [flash_attn_with_kvcache(q, k, v, cache_seqlens=lengths, causal=True)]


def limited(call: Call, kb: int, limit: Callable[[int], None]) -> Call:
    """The call with a limit of so many KB, set anew each time: the sizes take turns."""

    def with_limit() -> Sequence[Tensor]:
        limit(kb)
        try:
            return call()
        finally:
            limit(DEVICE)

    return with_limit


def differences(results: dict[int, Sequence[Tensor]]) -> dict[int, float]:
    """The largest difference of each limit's results from the device's, relative to the norm."""
    want = [x.float() for x in results[DEVICE]]
    return {
        kb: max(
            ((x.float() - y).norm() / y.norm()).item() for x, y in zip(found, want, strict=True)
        )
        for kb, found in results.items()
        if kb != DEVICE
    }


def make_row(cell: Cell, times: dict[int, float]) -> dict[str, Any]:
    """A cell's milliseconds by limit, and ratios to the device's own tiles."""
    ratios = {kb: ms / times[DEVICE] for kb, ms in times.items() if kb != DEVICE}
    met = all(ratio <= TARGET for ratio in ratios.values())
    figures = {"ms": times[DEVICE], "limited_ms": {str(kb): times[kb] for kb in ratios}}
    by_size = {str(kb): ratio for kb, ratio in ratios.items()}
    return {"name": cell.name, **asdict(cell), **figures, "ratios": by_size, "met": met}


def row_line(row: dict[str, Any]) -> str:
    """One line of the table."""
    parts = [
        f"{kb} KB {row['limited_ms'][kb]:8.3f} ms {ratio:6.3f}"
        for kb, ratio in row["ratios"].items()
    ]
    mark = "" if row["met"] else "  MISSED"
    return f"{row['name']:<40} {row['ms']:8.3f} ms  " + "  ".join(parts) + mark


@contextmanager
def sm80_alone(extension: Any) -> Iterator[None]:
    """Newer isas have no tiles for less shared memory."""
    before = extension.build_info()["isa"]
    extension.pin_isa("sm80")
    try:
        yield
    finally:
        extension.pin_isa(before)


def run(extension: Any, limits: list[int], args: argparse.Namespace) -> dict[str, Any]:
    """Measure every cell; rows, and what was wrong."""
    rows, wrong = [], []
    for cell in cells(args.head_dims):
        call = make_call(cell, args.tokens, args.seed)
        calls = {kb: limited(call, kb, extension.limit_smem_kb) for kb in (DEVICE, *limits)}
        worst = differences({kb: one() for kb, one in calls.items()})
        bad = {kb: value for kb, value in worst.items() if not value <= TOLERANCE}
        if bad:
            wrong.append(f"{cell.name}: differs from the device's tiles by {bad}")
            continue
        named = {str(kb): one for kb, one in calls.items()}
        times = device_times(named, TARGET_SECONDS, args.repeats)
        rows.append(make_row(cell, {kb: times[str(kb)].median_ms for kb in calls}))
        print(row_line(rows[-1]), flush=True)
    return {"rows": rows, "wrong": wrong}


def main(argv: list[str] | None = None) -> int:
    """Measure what was asked for and write it; returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    args = parse_args(argv)
    if not torch.cuda.is_available():
        print("bench_smem.py needs a CUDA GPU; torch sees none", file=sys.stderr)
        return 2
    import flash_attn_2_cuda as extension

    index = torch.cuda.current_device()
    device_kb, built = extension.smem_kb(index), extension.build_info()["smem_kb"]
    limits = sizes(built, device_kb)
    if device_kb not in built or not limits:
        print(
            f"bench_smem.py needs tiles for the GPU's {device_kb} KB and for less; built: {built}. "
            "Build with FLASH_ATTN_SMEM_KB='227,163,99'",
            file=sys.stderr,
        )
        return 2
    facts = environment(torch.device("cuda", index))
    print(f"{facts['device']} ({device_kb} KB), torch {facts['torch']}, bf16")
    with ClockLog() as clocks, sm80_alone(extension):
        found = run(extension, limits, args)
    facts["clocks"] = clocks.summary()
    print(f"{sum(row['met'] for row in found['rows'])} of {len(found['rows'])} at most {TARGET}")
    command = command_line("bench_smem.py", argv)
    result = {"environment": facts, "command": command, "dtype": "bf16", "device_kb": device_kb}
    return finish({**result, "tokens": args.tokens, "target": TARGET, **found}, args.json)


if __name__ == "__main__":
    sys.exit(main())
