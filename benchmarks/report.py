"""Numbers and tables of the forward/backward benchmark, from its JSON alone. Needs no torch.

A result is {"environment": ..., "command": ..., "dtype": ..., "cells": [...], "host_us": ...}; a
cell is {"direction", "head_dim", "causal", "seqlen", "batch", "heads", "providers"}, and
providers maps a name to {"median_ms", "min_ms", "repeats", "tflops"}.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

OURS = "flash_attn"
LABELS = {
    OURS: "flash_attn",
    "fa2": "torch FLASH_ATTENTION (FlashAttention-2)",
    "cudnn": "torch CUDNN_ATTENTION",
    "efficient": "torch EFFICIENT_ATTENTION",
    "math": "torch MATH",
}
DIRECTIONS = {"fwd": "forward", "bwd": "backward", "fwd_bwd": "forward + backward"}
# A forward has two matrix products, a backward five.
FORWARDS_OF_WORK = {"fwd": 1.0, "bwd": 2.5, "fwd_bwd": 3.5}


def write_json(result: dict[str, Any], path: Path) -> None:
    """A benchmark's result to its file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")


def finish(result: dict[str, Any], path: Path) -> int:
    """Write the result and name what was wrong in it; returns the exit code."""
    write_json(result, path)
    for line in result["wrong"]:
        print("WRONG, not timed:", line, file=sys.stderr)
    return 1 if result["wrong"] else 0


Cell = dict[str, Any]
Result = dict[str, Any]


def attention_flops(
    direction: str, batch: int, heads: int, seqlen: int, head_dim: int, causal: bool
) -> float:
    """The papers' count: 4 s^2 d per head forward, halved when causal; backward 2.5 times that."""
    forward = 4.0 * batch * heads * seqlen**2 * head_dim * (0.5 if causal else 1.0)
    return forward * FORWARDS_OF_WORK[direction]


def mask_name(causal: bool) -> str:
    """causal or full."""
    return "causal" if causal else "full"


def cell_line(cell: Cell) -> str:
    """One aligned line for one shape."""
    shape = (
        f"{cell['direction']:7s} b{cell['batch']:<3d} h{cell['heads']:<3d} s{cell['seqlen']:<6d} "
        f"d{cell['head_dim']:<4d} {mask_name(cell['causal']):6s}"
    )
    parts = [
        f"{name} {t['median_ms']:8.3f} ms (min {t['min_ms']:8.3f}) {t['tflops']:6.1f} TFLOP/s"
        for name, t in cell["providers"].items()
    ]
    return f"{shape}  " + " | ".join(parts)


def speedup(cell: Cell, base: str) -> float | None:
    """How many times faster than `base` ours is; None where one of them was not measured."""
    providers = cell["providers"]
    if OURS not in providers or base not in providers:
        return None
    return providers[base]["median_ms"] / providers[OURS]["median_ms"]


def geometric_mean(values: Iterable[float]) -> float:
    """Geometric mean; raises ValueError without values."""
    logs = [math.log(value) for value in values]
    if not logs:
        raise ValueError("geometric_mean: no values")
    return math.exp(sum(logs) / len(logs))


def provider_names(cells: list[Cell]) -> list[str]:
    """All providers in the cells, ours first."""
    return list(dict.fromkeys(name for cell in cells for name in cell["providers"]))


def comparison(cells: list[Cell], direction: str, base: str) -> str | None:
    """Geometric mean and smallest of ours over `base`; None without common cells."""
    chosen = [cell for cell in cells if cell["direction"] == direction]
    ratios = [(ratio, cell) for cell in chosen if (ratio := speedup(cell, base)) is not None]
    if not ratios:
        return None
    least, cell = min(ratios, key=lambda pair: pair[0])
    mean = geometric_mean(ratio for ratio, _ in ratios)
    shape = f"d{cell['head_dim']} {mask_name(cell['causal'])} s{cell['seqlen']}"
    return f"geometric mean {mean:.3f}, minimum {least:.3f} ({shape}), {len(ratios)} cells"


def row_lines(cells: list[Cell], seqlens: list[int]) -> list[str]:
    """Lines of one (direction, head_dim, causal): TFLOP/s by provider, then ours over each."""
    by_seqlen = {cell["seqlen"]: cell for cell in cells}
    first = cells[0]
    title = f"{first['direction']} d{first['head_dim']} {mask_name(first['causal'])}"
    lines = []

    def add(label: str, values: list[str]) -> None:
        lines.append(f"{title:20s} {label:18s}" + "".join(f"{value:>9s}" for value in values))

    names = provider_names(cells)
    for name in names:
        found = (by_seqlen.get(s, {"providers": {}})["providers"].get(name) for s in seqlens)
        add(f"{name} TFLOP/s", ["-" if t is None else f"{t['tflops']:.0f}" for t in found])
    for base in names:
        ratios = [speedup(by_seqlen[s], base) if s in by_seqlen else None for s in seqlens]
        if base != OURS and any(ratios):
            add(f"ours / {base}", ["-" if r is None else f"{r:.2f}" for r in ratios])
    return lines


def summary(result: Result) -> str:
    """The final table: a block per (direction, head_dim, mask), then means and minima."""
    cells = result["cells"]
    seqlens = sorted({cell["seqlen"] for cell in cells})
    lines = [f"{'':39s}" + "".join(f"{f's{s}':>9s}" for s in seqlens)]
    rows: dict[tuple[str, int, bool], list[Cell]] = {}
    for cell in cells:
        key = (cell["direction"], cell["head_dim"], cell["causal"])
        rows.setdefault(key, []).append(cell)
    for row in rows.values():
        lines += row_lines(row, seqlens)
    lines.append("")
    for direction, title in DIRECTIONS.items():
        for base in provider_names(cells):
            text = None if base == OURS else comparison(cells, direction, base)
            if text:
                lines.append(f"{title}: ours / {base}: {text}")
    for name, times in result.get("host_us", {}).items():
        text = ", ".join(f"{kind} {value:.1f} us" for kind, value in times.items())
        lines.append(f"host time per call, {name}: {text}")
    return "\n".join(lines)
