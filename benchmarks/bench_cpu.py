"""The CPU backend against torch's own CPU kernel, on what both compute: forward and backward.

Times flash_attn_func and scaled_dot_product_attention with the backend FLASH_ATTENTION, on the same
tensors (batch, seqlen, heads, head_dim), in turns, on one thread.  Prints a table and writes JSON.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from bench import command_line, environment
from report import mask_name, write_json
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from flash_attn import flash_attn_func

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
OURS, THEIRS = "flash_attn", "torch"
TARGET = 1.1  # ours takes at most so many times torch's time

Row = dict[str, Any]
Attention = Callable[[Tensor, Tensor, Tensor, bool], Tensor]


def torch_attention(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """torch's kernel, on tensors with the heads behind the sequence; no copies."""
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        heads_first = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(*heads_first, is_causal=causal).transpose(1, 2)


def our_attention(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """The package's function."""
    return flash_attn_func(q, k, v, causal=causal)


PROVIDERS: dict[str, Attention] = {OURS: our_attention, THEIRS: torch_attention}


def calls(
    direction: str, inputs: list[Tensor], dout: Tensor, causal: bool
) -> dict[str, Callable[[], Any]]:
    """What is timed, by provider."""
    if direction == "fwd":
        detached = [x.detach() for x in inputs]
        return {n: lambda f=f: f(*detached, causal) for n, f in PROVIDERS.items()}
    outs = {name: function(*inputs, causal) for name, function in PROVIDERS.items()}

    def backward(out: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(out, inputs, dout, retain_graph=True)

    return {name: lambda out=out: backward(out) for name, out in outs.items()}


def cpu_times(by_name: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of CPU time, what other processes do left out; each round starts with another."""
    times: dict[str, list[float]] = {name: [] for name in by_name}
    for index in range(-1, rounds):
        names = list(by_name) if index % 2 else list(by_name)[::-1]
        for name in names:
            begin = time.process_time()
            by_name[name]()
            if index >= 0:  # the first round warms up
                times[name].append((time.process_time() - begin) * 1e3)
    return times


def measure(args: argparse.Namespace) -> list[Row]:
    """One row for each dtype, length, mask and direction."""
    rows = []
    for dtype, seqlen, causal in product(args.dtypes, args.seqlens, (True, False)):
        shape = args.batch, seqlen, args.heads, args.head_dim
        gen = torch.Generator().manual_seed(seqlen)
        tensors = [torch.randn(shape, generator=gen).to(DTYPES[dtype]) for _ in range(4)]
        inputs = [x.requires_grad_() for x in tensors[:3]]
        for direction in ("fwd", "bwd"):
            times = cpu_times(calls(direction, inputs, tensors[3], causal), args.rounds)
            ratios = [ours / theirs for ours, theirs in zip(times[OURS], times[THEIRS])]
            row = dict(dtype=dtype, seqlen=seqlen, causal=causal, direction=direction)
            row |= {f"{n}_ms": round(statistics.median(t), 3) for n, t in times.items()}
            row |= {f"{n}_min_ms": round(min(t), 3) for n, t in times.items()}
            rows.append(row | dict(ratio=round(statistics.median(ratios), 3)))
            print(row_line(rows[-1]), flush=True)
    return rows


def row_line(row: Row) -> str:
    """One aligned line."""
    shape = (
        f"{row['direction']}  {row['dtype']}  s{row['seqlen']:<5d} {mask_name(row['causal']):6s}"
    )
    times = f"{OURS} {row[f'{OURS}_ms']:8.2f} ms   {THEIRS} {row[f'{THEIRS}_ms']:8.2f} ms"
    return f"{shape}  {times}   ours / torch {row['ratio']:.2f}"


def table(result: dict[str, Any]) -> str:
    """For benchmarks/README.md: ours / torch, one row for each dtype and direction."""
    rows = result["rows"]
    columns = list(dict.fromkeys((row["seqlen"], row["causal"]) for row in rows))
    names = [f"{seqlen} {mask_name(causal)}" for seqlen, causal in columns]
    lines = [f"| ours / torch | {' | '.join(names)} |", "|---|" + "---:|" * len(columns)]
    for direction, dtype in product(("fwd", "bwd"), dict.fromkeys(row["dtype"] for row in rows)):
        found = {(row["seqlen"], row["causal"]): row["ratio"] for row in rows
                 if (row["direction"], row["dtype"]) == (direction, dtype)}  # fmt: skip
        cells = " | ".join(f"{found[column]:.2f}" for column in columns)
        lines.append(f"| {direction} {dtype} | {cells} |")
    return "\n".join(lines)


def parse_args(argv: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--dtypes", nargs="+", choices=tuple(DTYPES), default=list(DTYPES))
    add("--seqlens", type=int, nargs="+", default=[512, 2048])
    add("--batch", type=int, default=2)
    add("--heads", type=int, default=8)
    add("--head-dim", type=int, default=64)
    add("--rounds", type=int, default=15, help="calls of each that are timed")
    add("--json", type=Path, default=Path("build/cpu.json"), help="file to write")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Measure and write; returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    args = parse_args(argv)
    torch.set_num_threads(1)
    facts = environment(torch.device("cpu"))
    facts["instructions"] = torch.backends.cpu.get_cpu_capability()
    facts["amx"] = torch.cpu._is_amx_tile_supported()
    print(f"{facts['device']}, torch {facts['torch']}, one thread, CPU time, median")
    shape = dict(batch=args.batch, heads=args.heads, head_dim=args.head_dim)
    result = dict(environment=facts, command=command_line("bench_cpu.py", argv), **shape)
    result["rows"] = measure(args)
    write_json(result, args.json)
    slow = [row_line(row) for row in result["rows"] if row["ratio"] > TARGET]
    print(table(result))
    print(f"{len(slow)} of {len(result['rows'])} above {TARGET} times torch's time")
    return 0


if __name__ == "__main__":
    sys.exit(main())
