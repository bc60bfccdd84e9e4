"""Tables of a result, as text and as the blocks of docs/parallelism.md. Needs neither torch nor a GPU.

A result is {"build": ..., "sections": {name: {"environment", "command", "seconds", ...}}}.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import report as base_report
from update_readme import NOT_MEASURED, fill, markdown_table

from . import ROOT
from .variants import HEAD_DIMS, MAPPINGS, BackwardVariant, factors, ladder

DOCS = ROOT / "docs" / "parallelism.md"
RESULTS = ROOT / "studies" / "parallelism" / "results"
RESULT_FILE = "studies/parallelism/results/parallelism.json"
PLOT_NAME = "{}.png"
SHOWN_SEQLENS = (512, 2048, 8192, 65536)
SHOWN_PAIRS = (1, 4, 16, 64, 256)
APART = 1.05  # a difference beyond noise
GIGA = 1e9

Section = dict[str, Any]
Result = dict[str, Any]


@dataclass(frozen=True)
class Table:
    """Rows of text under a title; the first column is text, the others numbers."""

    title: str
    header: list[str]
    rows: list[list[str]]

    def markdown(self) -> str:
        """For docs."""
        return f"{self.title}\n\n{markdown_table(self.header, self.rows)}"

    def text(self) -> str:
        """Aligned, for a terminal."""
        lines = [self.header, *self.rows]
        widths = [max(len(line[i]) for line in lines) for i in range(len(self.header))]
        body = [
            "  ".join(
                cell.ljust(width) if i == 0 else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(line, widths, strict=True))
            )
            for line in lines
        ]
        return "\n".join([self.title, *body])


def mask_of(cell: Section) -> str:
    """causal or full."""
    return base_report.mask_name(cell["causal"])


def mean(values: list[float]) -> float:
    """Geometric."""
    return base_report.geometric_mean(values)


# --- Forward --------------------------------------------------------------------------------------


def mapping_tables(section: Section) -> list[Table]:
    """Speed with waves and idle multiprocessors; then where the mappings part ways."""
    header = ["batch x heads, seqlen", *MAPPINGS.values()]
    tables = []
    for causal in (True, False):
        rows = []
        for cell in section["cells"]:
            shown = cell["seqlen"] in SHOWN_SEQLENS and cell["pairs"] in SHOWN_PAIRS
            if not shown or cell["head_dim"] != 128 or cell["causal"] != causal:
                continue
            parts = [_mapping_cell(cell["mappings"].get(name)) for name in MAPPINGS]
            rows.append([f"{cell['pairs']}, {cell['seqlen']}", *parts])
        title = (
            f"d 128, {base_report.mask_name(causal)}: TFLOP/s (waves, SMs without a thread block "
            "in the last wave)"
        )
        tables.append(Table(title, header, rows))
    return tables


def _mapping_cell(mapping: Section | None) -> str:
    if mapping is None:
        return "-"
    return f"{mapping['tflops']:.0f} ({mapping['waves']:.2f}, {mapping['idle_sms']})"


def ratios(cells: list[Section], over: str, under: str) -> Iterator[tuple[float, Section]]:
    """Speed of one mapping over another's, cell by cell."""
    for cell in cells:
        found = cell["mappings"]
        if over in found and under in found:
            yield found[under]["ms"] / found[over]["ms"], cell


def parting_tables(section: Section) -> list[Table]:
    """Version 2's grid over version 1's, ours over version 2's, persistent over ours."""
    header = ["faster over slower", "cells", "mean", "least", "at", "most", "at"]
    header += ["first faster", "second faster"]
    rows = []
    for over, under in (
        ("row_splits", "per_head"),
        ("tile_grid", "row_splits"),
        ("ordered", "tile_grid"),
        ("persistent", "ordered"),
    ):
        for head_dim in HEAD_DIMS:
            for causal in (True, False):
                chosen = [
                    c
                    for c in section["cells"]
                    if c["head_dim"] == head_dim and c["causal"] == causal
                ]
                found = list(ratios(chosen, over, under))
                if found:
                    rows.append(_parting_row(over, under, head_dim, causal, found))
    title = (
        "Speed of one mapping over another's in all cells; 'first faster' and 'second faster' "
        f"count the cells that differ by more than {APART - 1:.0%}"
    )
    return [Table(title, header, rows)]


def _parting_row(
    over: str, under: str, head_dim: int, causal: bool, found: list[tuple[float, Section]]
) -> list[str]:
    least, most = (pick(found, key=lambda pair: pair[0]) for pick in (min, max))
    places = [f"{c['pairs']}, {c['seqlen']}" for _, c in (least, most)]
    name = f"{MAPPINGS[over]} / {MAPPINGS[under]}, d {head_dim} {base_report.mask_name(causal)}"
    return [
        name,
        str(len(found)),
        f"{mean([ratio for ratio, _ in found]):.2f}",
        f"{least[0]:.2f}",
        places[0],
        f"{most[0]:.2f}",
        places[1],
        str(sum(ratio > APART for ratio, _ in found)),
        str(sum(ratio < 1 / APART for ratio, _ in found)),
    ]


def loop_order_tables(section: Section) -> list[Table]:
    """Bytes by formula and counted, and speed, of both loop orders."""
    header = ["problem", "splits", "each tensor once"]
    names = {
        "row_splits": "queries outside",
        "keys_outside": "keys outside",
        "tile_grid": "version 2: tile grid",
    }
    for label in names.values():
        header += [f"{label}: asked for", "L2", "device memory", "TFLOP/s"]
    rows = []
    for cell in section["cells"]:
        least = cell["least_read"] + cell["least_written"]
        where = f"{cell['pairs']} x {cell['seqlen']}, d {cell['head_dim']} {mask_of(cell)}"
        row = [where, str(cell["splits"]), _gigabytes(least)]
        for name in names:
            row += _order_cells(cell["orders"].get(name))
        rows.append(row)
    title = (
        "GB that the kernel asks for by formula, that the second-level cache and the device "
        "memory moved by the profiler's count, and speed"
    )
    return [Table(title, header, rows)]


def _order_cells(order: Section | None) -> list[str]:
    if order is None:
        return ["-"] * 4
    counters = order["counters"] or {}
    moved = [counters.get(name) for name in ("dram_read", "dram_written")]
    total = None if None in moved else sum(moved)
    asked = order["read"] + order["written"]
    return [
        _gigabytes(asked),
        _gigabytes(counters.get("l2")),
        _gigabytes(total),
        f"{order['tflops']:.0f}",
    ]


def _gigabytes(count: float | None) -> str:
    return "-" if count is None else f"{count / GIGA:.3g}"


# --- Backward -------------------------------------------------------------------------------------


def _backward_cells(section: Section, head_dim: int) -> list[Section]:
    return [cell for cell in section["cells"] if cell["head_dim"] == head_dim]


def _key(variant: BackwardVariant) -> str:
    return variant.unit + ("" if variant.key_parallel else "_per_head")


def speed_cells(cells: list[Section], key: str) -> list[float | None]:
    """TFLOP/s of a variant in every problem."""
    return [cell["variants"].get(key, {}).get("tflops") for cell in cells]


def _over(values: list[float | None], others: list[float | None]) -> str:
    pairs = [(a, b) for a, b in zip(values, others, strict=True) if a and b]
    return f"{mean([a / b for a, b in pairs]):.2f}" if pairs else "-"


def _shapes(cells: list[Section]) -> list[str]:
    return [f"{c['batch']} x {c['seqlen']} {mask_of(c)}" for c in cells]


def factor_tables(section: Section) -> list[Table]:
    """One factor changed at a time, with what the kernel takes and moves in shared memory."""
    tables = []
    for head_dim in HEAD_DIMS:
        cells = _backward_cells(section, head_dim)
        records = section["variants"][str(head_dim)]
        named: dict[str, BackwardVariant | None] = dict(factors(head_dim))
        start = speed_cells(cells, _key(factors(head_dim)[next(iter(named))]))
        header = ["changed", *_shapes(cells), "over base", "registers", "smem KB", "blocks per SM"]
        header += ["shared GB read: formula", "counted", "written: formula", "counted"]
        header += ["in whole wavefronts"]
        rows = []
        named["the extension's own kernel"] = None
        for label, variant in named.items():
            why = variant.why_not() if variant else None
            if why:
                rows.append([f"{label}: {why}"] + ["-"] * (len(header) - 1))
                continue
            key = _key(variant) if variant else "shipped"
            speeds = speed_cells(cells, key)
            row = [label, *(_number(v) for v in speeds), _over(speeds, start)]
            rows.append(row + _record_cells(records.get(key)))
        title = f"d {head_dim}: TFLOP/s of the main kernel by batch x seqlen, hidden size 2048"
        tables.append(Table(title, header, rows))
    return tables


def _record_cells(record: Section | None) -> list[str]:
    if record is None:
        return ["-"] * 8
    facts, counters = record["facts"], record["counters"] or {}
    spills = f" + {facts['local_bytes']} B spilled" if facts["local_bytes"] else ""
    return [
        f"{facts['registers']}{spills}",
        f"{facts['smem_bytes'] / 1024:.0f}",
        str(facts["blocks_per_sm"]),
        _gigabytes(record.get("shared_read")),
        _gigabytes(counters.get("shared_read")),
        _gigabytes(record.get("shared_written")),
        _gigabytes(counters.get("shared_written")),
        _gigabytes(counters.get("shared_wavefronts")),
    ]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f}" if value >= 10 else f"{value:.1f}"


def ladder_tables(section: Section) -> list[Table]:
    """From version 1's choices to version 2's; each row keeps the ones above."""
    tables = []
    for head_dim in HEAD_DIMS:
        cells = _backward_cells(section, head_dim)
        header = ["step", *_shapes(cells), "over the row above", "over the first"]
        rows = []
        first = above = None
        steps = {label: _key(variant) for label, variant in ladder(head_dim).items()}
        for label, key in (steps | {"the extension's own kernel": "shipped"}).items():
            speeds = speed_cells(cells, key)
            first = first or speeds
            gains = [_over(speeds, other) if other else "-" for other in (above, first)]
            rows.append([label, *(_number(v) for v in speeds), *gains])
            above = speeds
        tables.append(Table(f"d {head_dim}: TFLOP/s of the main kernel", header, rows))
    return tables


# --- The papers' tables ---------------------------------------------------------------------------


def paper_tables(section: Section) -> list[Table]:
    """TFLOP/s over sequence length, a table per direction."""
    tables = []
    for direction, name in base_report.DIRECTIONS.items():
        cells = [c for c in section["cells"] if c["direction"] == direction]
        seqlens = sorted({c["seqlen"] for c in cells})
        providers = base_report.provider_names(cells)
        keys = dict.fromkeys((c["head_dim"], c["causal"]) for c in cells)
        rows = []
        for head_dim, causal in keys:
            found = {
                c["seqlen"]: c["providers"]
                for c in cells
                if (c["head_dim"], c["causal"]) == (head_dim, causal)
            }
            for provider in providers:
                times = [found.get(s, {}).get(provider) for s in seqlens]
                values = [_number(t and t["tflops"]) for t in times]
                label = f"d {head_dim} {base_report.mask_name(causal)}, {provider}"
                rows.append([label, *values])
        if rows:
            tables.append(Table(f"{name}, TFLOP/s", ["", *map(str, seqlens)], rows))
    return tables


def training_tables(section: Section) -> list[Table]:
    """Tokens per second and model FLOP utilisation."""
    names = list(dict.fromkeys(s["attention"] for s in section["speeds"]))
    found: dict[tuple[str, int], dict[str, Section]] = {}
    for speed in section["speeds"]:
        found.setdefault((speed["model"], speed["context"]), {})[speed["attention"]] = speed
    header = ["model, context, batch"]
    header += [f"{n}: tokens/s" for n in names] + [f"{n}: utilisation" for n in names]
    rows = []
    for (model, context), by_name in found.items():
        batch = next(iter(by_name.values()))["batch"]
        speeds = [by_name.get(n) for n in names]
        rows.append(
            [f"{model}, {context}, {batch}"]
            + ["-" if s is None else f"{s['tokens_per_second']:,.0f}" for s in speeds]
            + ["-" if s is None else f"{s['utilisation']:.1%}" for s in speeds]
        )
    title = f"Training steps; utilisation is of {section['peak_tflops']:.0f} TFLOP/s"
    return [Table(title, header, rows)]


def memory_tables(section: Section) -> list[Table]:
    """MiB over sequence length; '-' where it does not fit or the backend refuses."""
    names = list(section["cells"][0]["bytes"])
    rows = []
    for cell in section["cells"]:
        sizes = [cell["bytes"][name] for name in names]
        values = ["-" if size is None else f"{size / 2**20:,.0f}" for size in sizes]
        rows.append([str(cell["seqlen"]), *values])
    shape = f"batch 1, {section['heads']} heads, d {section['head_dim']}, causal"
    title = f"Peak of forward + backward in MiB beyond q, k, v and dout; {shape}"
    return [Table(title, ["seqlen", *names], rows)]


# --- Blocks of the page ---------------------------------------------------------------------------

# Block: section, tables, whether a plot of the section's name belongs to it.
BLOCKS: dict[str, tuple[str, Callable[[Section], list[Table]], bool]] = {
    "mapping": ("mapping", mapping_tables, True),
    "parting": ("mapping", parting_tables, False),
    "loop_order": ("loop_order", loop_order_tables, True),
    "factors": ("backward", factor_tables, True),
    "ladder": ("backward", ladder_tables, False),
    "tables": ("tables", paper_tables, True),
    "training": ("training", training_tables, False),
    "memory": ("memory", memory_tables, True),
}
SECTIONS = tuple(dict.fromkeys(section for section, _, _ in BLOCKS.values()))


def source_line(section: Section) -> str:
    """Where a block's numbers come from."""
    facts = section["environment"]
    versions = f"torch {facts['torch']}" + (f", CUDA {facts['cuda']}" if facts.get("cuda") else "")
    place = f"[{RESULT_FILE}](../{RESULT_FILE})"
    return f"{facts['device']}, {versions}, {facts['date']}; `{section['command']}`, {place}"


def remarks(section: Section) -> list[str]:
    """What a reader must know of a block: wrong kernels, missing counters."""
    found = [f"Left out, wrong: {name}: {why}" for name, why in section.get("wrong", {}).items()]
    if section.get("notice"):
        found.append(f"Counters: {section['notice']}")
    return found


def block(name: str, result: Result) -> str:
    """Content of a block."""
    section_name, make_tables, has_plot = BLOCKS[name]
    section = result["sections"].get(section_name)
    if section is None:
        return f"{name}: {NOT_MEASURED}."
    parts = [table.markdown() for table in make_tables(section)]
    if has_plot:
        file = PLOT_NAME.format(section_name)
        parts.append(f"![{section_name}](../studies/parallelism/results/{file})")
    return "\n\n".join([*parts, *remarks(section), source_line(section)])


def filled(text: str, result: Result) -> str:
    """The page with all blocks from the result."""
    for name in BLOCKS:
        text = fill(text, name, block(name, result))
    return text


def text_report(result: Result) -> str:
    """All tables, for a terminal."""
    parts = []
    for section_name, make_tables, _ in BLOCKS.values():
        section = result["sections"].get(section_name)
        if section is not None:
            parts += [table.text() for table in make_tables(section)]
    for section in result["sections"].values():
        parts += remarks(section)
    return "\n\n".join(parts)


def update_docs(result: Result, path: Path = DOCS, check: bool = False) -> bool:
    """Fills the page; returns whether it said the same before. With `check` nothing is written."""
    text = path.read_text(encoding="utf-8")
    new = filled(text, result)
    if not check:
        path.write_text(new, encoding="utf-8")
    return new == text
