"""The plots: loss curves of a training run, TFLOP/s by seqlen, decoding bandwidth by cache length."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from report import DIRECTIONS, LABELS, Cell, Result, mask_name, provider_names

SMOOTHING_SHARE = 0.02
COLORS = {"flash_attn": "#c23b22", "fa2": "#3b6fb6", "cudnn": "#4d9a5b"}


def smoothed(values: list[float], share: float = SMOOTHING_SHARE) -> list[float]:
    """Running mean over a share of the values, without the bias of an average's start."""
    keep = 1 - 1 / max(1.0, share * len(values))
    result, mean, weight = [], 0.0, 0.0
    for value in values:
        mean = keep * mean + (1 - keep) * value
        weight = keep * weight + (1 - keep)
        result.append(mean / weight)
    return result


def plot_losses(
    train: list[float],
    held_out: list[tuple[int, float]],
    unigram: float,
    title: str,
    path: Path,
) -> None:
    """Write the loss curves, in nats per byte, as a PNG."""
    figure, axes = plt.subplots(figsize=(7.5, 4.5), layout="constrained")
    steps = range(1, len(train) + 1)
    axes.plot(steps, train, color="#b9c7da", linewidth=0.6)
    axes.plot(steps, smoothed(train), color="#3b6fb6", label="train (running mean)")
    axes.plot(*zip(*held_out, strict=True), "o-", color="#c23b22", markersize=4, label="held-out")
    axes.axhline(unigram, color="#555555", linestyle="--", label="unigram model, held-out")
    axes.set(xlabel="step", ylabel="loss (nats per byte)", title=title)
    axes.set_ylim(0, max(unigram, held_out[0][1]) * 1.05)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=140)
    plt.close(figure)


def plot_speed(result: Result, path: Path) -> None:
    """Write TFLOP/s over sequence length: a row per direction, a column per head_dim and mask."""
    cells = result["cells"]
    rows = list(dict.fromkeys(cell["direction"] for cell in cells))
    columns = list(dict.fromkeys((cell["head_dim"], cell["causal"]) for cell in cells))
    size = (0.8 + 2.6 * len(columns), 0.8 + 2.6 * len(rows))
    figure, grid = plt.subplots(
        len(rows), len(columns), figsize=size, squeeze=False, sharey="row", layout="constrained"
    )
    for axes_row, direction in zip(grid, rows, strict=True):
        axes_row[0].set_ylabel(f"{DIRECTIONS[direction]} (TFLOP/s)")
        for axes, (head_dim, causal) in zip(axes_row, columns, strict=True):
            chosen = [
                cell
                for cell in cells
                if (cell["direction"], cell["head_dim"], cell["causal"])
                == (direction, head_dim, causal)
            ]
            _plot_cells(axes, chosen)
            axes.set_title(f"head_dim {head_dim}, {mask_name(causal)}", fontsize=9)
        # Once the row is complete: the axes share their limits, and setting one ends their fitting.
        axes_row[0].set_ylim(bottom=0)
    for axes in grid[-1]:
        axes.set_xlabel("sequence length")
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels))
    facts = result["environment"]
    figure.supxlabel(f"{facts['device']}, torch {facts['torch']}, {result['dtype']}", fontsize=8)
    figure.savefig(path, dpi=140)
    plt.close(figure)


def plot_decode(result: Result, path: Path) -> None:
    """Write bandwidth of reading K and V over cache length, with the copy bandwidth as a line."""
    rows = result["curve"]
    figure, axes = plt.subplots(figsize=(7.5, 4.5), layout="constrained")
    for name in provider_names(rows):
        points = [
            (row["seqlen"], row["bytes"] / row["providers"][name]["median_us"] / 1e6)
            for row in rows
            if name in row["providers"]
        ]
        axes.plot(
            *zip(*points, strict=True), "o-", ms=4, color=COLORS.get(name), label=LABELS[name]
        )
    copy = result["copy_bytes_per_second"] / 1e12
    axes.axhline(copy, color="#555555", linestyle="--", label="copy, read plus written")
    title = "Decoding: K and V read over time"
    if rows:
        first = rows[0]
        title += f", batch {first['batch']}, heads {first['heads_q']}/{first['heads_k']}"
    axes.set(xlabel="tokens in the cache, per sequence", ylabel="TB/s", title=title)
    _seqlen_axis(axes, [row["seqlen"] for row in rows])
    axes.set_ylim(bottom=0)
    axes.legend()
    facts = result["environment"]
    figure.supxlabel(f"{facts['device']}, torch {facts['torch']}, {result['dtype']}", fontsize=8)
    figure.savefig(path, dpi=140)
    plt.close(figure)


def _plot_cells(axes: plt.Axes, cells: list[Cell]) -> None:
    """One line per provider."""
    for name in provider_names(cells):
        points = [
            (cell["seqlen"], cell["providers"][name]["tflops"])
            for cell in cells
            if name in cell["providers"]
        ]
        axes.plot(
            *zip(*points, strict=True), "o-", ms=3, color=COLORS.get(name), label=LABELS[name]
        )
    _seqlen_axis(axes, [cell["seqlen"] for cell in cells])


def _seqlen_axis(axes: plt.Axes, values: list[int]) -> None:
    """Sequence lengths, doubling, from left to right."""
    seqlens = sorted(set(values))
    axes.set_xscale("log", base=2)
    axes.set_xticks(seqlens, [f"{s // 1024}k" if s >= 1024 else str(s) for s in seqlens])
    axes.grid(alpha=0.3)
