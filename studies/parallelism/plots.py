"""Plots of a result. Needs matplotlib, no torch and no GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import report as base_report

from .report import PLOT_NAME, Result, Section, mask_of, speed_cells
from .variants import HEAD_DIMS, MAPPINGS, factors

COLORS = ("#8a8a8a", "#3b6fb6", "#4d9a5b", "#c23b22", "#9467bd")
PANELS = (512, 2048, 8192, 65536)  # sequence lengths
RATIO_RANGE = (0.5, 2.0)


def plot_mapping(section: Section, path: Path) -> None:
    """TFLOP/s over batch x heads, d 128: a row per mask, a column per sequence length."""
    seqlens = [s for s in PANELS if any(c["seqlen"] == s for c in section["cells"])]
    figure, grid = plt.subplots(
        2, len(seqlens), figsize=(3 * len(seqlens), 6), squeeze=False, layout="constrained"
    )
    for axes_row, causal in zip(grid, (True, False), strict=True):
        for axes, seqlen in zip(axes_row, seqlens, strict=True):
            cells = [
                c
                for c in section["cells"]
                if (c["head_dim"], c["causal"], c["seqlen"]) == (128, causal, seqlen)
            ]
            for color, (name, label) in zip(COLORS, MAPPINGS.items(), strict=True):
                points = [
                    (c["pairs"], c["mappings"][name]["tflops"])
                    for c in cells
                    if name in c["mappings"]
                ]
                if points:
                    axes.plot(*zip(*points, strict=True), "o-", ms=3, color=color, label=label)
            axes.axvline(section["sms"], color="#bbbbbb", linestyle="--", linewidth=0.8)
            axes.set_xscale("log", base=2)
            axes.set_ylim(bottom=0)
            axes.set_title(f"{base_report.mask_name(causal)}, seqlen {seqlen}", fontsize=9)
            axes.grid(alpha=0.3)
    for axes in grid[-1]:
        axes.set_xlabel("batch x heads (dashed: SMs)")
    for axes in grid[:, 0]:
        axes.set_ylabel("TFLOP/s, d 128")
    _finish(figure, grid[0][0], section, path)


def plot_loop_order(section: Section, path: Path) -> None:
    """Bytes and speed of both orders, problem by problem."""
    names = {"row_splits": "queries outside", "keys_outside": "keys outside"}
    cells = section["cells"]
    figure, grid = plt.subplots(1, 2, figsize=(11, 4), squeeze=False, layout="constrained")
    places = range(len(cells))
    for offset, (color, (name, label)) in enumerate(zip(COLORS[1:], names.items(), strict=False)):
        orders = [c["orders"].get(name) for c in cells]
        x = [i + 0.4 * offset for i in places]
        asked = [(o["read"] + o["written"]) / 1e9 if o else 0 for o in orders]
        counted = [_counted_gigabytes(o) for o in orders]
        grid[0][0].bar(x, asked, 0.35, color=color, alpha=0.4, label=f"{label}, asked for")
        grid[0][0].bar(x, counted, 0.35, color=color, label=f"{label}, device memory")
        speeds = [o["tflops"] if o else 0 for o in orders]
        grid[0][1].bar(x, speeds, 0.35, color=color, label=label)
    labels = [f"{c['pairs']} x {c['seqlen']}\nd{c['head_dim']} {mask_of(c)}" for c in cells]
    for axes, title in zip(grid[0], ("GB", "TFLOP/s"), strict=True):
        axes.set_xticks([i + 0.2 for i in places], labels, fontsize=6)
        axes.set_ylabel(title)
        axes.grid(alpha=0.3, axis="y")
    grid[0][0].set_yscale("log")
    _finish(figure, grid[0][0], section, path)


def _counted_gigabytes(order: Section | None) -> float:
    counters = (order or {}).get("counters") or {}
    return sum(counters.get(name, 0.0) for name in ("dram_read", "dram_written")) / 1e9


def plot_backward(section: Section, path: Path) -> None:
    """Speed of each changed factor over the base."""
    figure, grid = plt.subplots(1, 2, figsize=(12, 4.5), squeeze=False, layout="constrained")
    for axes, head_dim in zip(grid[0], HEAD_DIMS, strict=True):
        cells = [c for c in section["cells"] if c["head_dim"] == head_dim]
        named = {k: v for k, v in factors(head_dim).items() if v.why_not() is None}
        keys = [v.unit + ("" if v.key_parallel else "_per_head") for v in named.values()]
        start = speed_cells(cells, keys[0])
        for index, cell in enumerate(cells):
            heights = [
                (speed_cells([cell], key)[0] or 0.0) / (start[index] or 1.0) for key in keys[1:]
            ]
            x = [i + 0.2 * index for i in range(len(heights))]
            label = f"{cell['batch']} x {cell['seqlen']} {mask_of(cell)}"
            axes.bar(x, heights, 0.18, color=COLORS[index % len(COLORS)], label=label)
        axes.axhline(1, color="#555555", linewidth=0.8)
        labels = [name.replace(" ", "\n", 2) for name in list(named)[1:]]
        axes.set_xticks([i + 0.3 for i in range(len(labels))], labels, fontsize=7)
        axes.set_title(f"d {head_dim}", fontsize=9)
        axes.set_ylabel("speed over the base")
        axes.grid(alpha=0.3, axis="y")
    _finish(figure, grid[0][0], section, path)


def plot_tables(section: Section, path: Path) -> None:
    """TFLOP/s over sequence length: a row per direction, a column per head_dim and mask."""
    cells = section["cells"]
    rows = list(dict.fromkeys(c["direction"] for c in cells))
    columns = list(dict.fromkeys((c["head_dim"], c["causal"]) for c in cells))
    size = (3 * len(columns), 2.6 * len(rows) + 0.8)
    figure, grid = plt.subplots(
        len(rows), len(columns), figsize=size, squeeze=False, layout="constrained"
    )
    for axes_row, direction in zip(grid, rows, strict=True):
        for axes, (head_dim, causal) in zip(axes_row, columns, strict=True):
            key = (direction, head_dim, causal)
            chosen = [c for c in cells if (c["direction"], c["head_dim"], c["causal"]) == key]
            for color, name in zip(COLORS[::-1], base_report.provider_names(cells), strict=False):
                points = [
                    (c["seqlen"], c["providers"][name]["tflops"])
                    for c in chosen
                    if name in c["providers"]
                ]
                if points:
                    axes.plot(*zip(*points, strict=True), "o-", ms=3, color=color, label=name)
            axes.set_xscale("log", base=2)
            axes.set_ylim(bottom=0)
            axes.set_title(f"d {head_dim}, {base_report.mask_name(causal)}", fontsize=9)
            axes.grid(alpha=0.3)
        axes_row[0].set_ylabel(f"{base_report.DIRECTIONS[direction]}\nTFLOP/s")
    _finish(figure, grid[0][0], section, path)


def plot_memory(section: Section, path: Path) -> None:
    """Peak bytes over sequence length."""
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for color, name in zip(COLORS[::-1], section["cells"][0]["bytes"], strict=False):
        points = [
            (c["seqlen"], c["bytes"][name] / 2**30)
            for c in section["cells"]
            if c["bytes"][name] is not None
        ]
        if points:
            axes.plot(*zip(*points, strict=True), "o-", ms=3, color=color, label=name)
    axes.axhline(section["total_bytes"] / 2**30, color="#555555", linestyle="--", linewidth=0.8)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.set(xlabel="sequence length", ylabel="GiB (dashed: the GPU's memory)")
    axes.grid(alpha=0.3)
    _finish(figure, axes, section, path)


def _finish(figure: Any, labelled: Any, section: Section, path: Path) -> None:
    handles, labels = labelled.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=min(5, len(labels) or 1))
    facts = section["environment"]
    figure.supxlabel(f"{facts['device']}, torch {facts['torch']}", fontsize=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)


PLOTS = {
    "mapping": plot_mapping,
    "loop_order": plot_loop_order,
    "backward": plot_backward,
    "tables": plot_tables,
    "memory": plot_memory,
}


def draw(result: Result, folder: Path) -> list[Path]:
    """One PNG per section that has a plot; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, plot in PLOTS.items():
        if name in result["sections"]:
            path = folder / PLOT_NAME.format(name)
            plot(result["sections"][name], path)
            written.append(path)
    return written
