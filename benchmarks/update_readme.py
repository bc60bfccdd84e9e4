"""Fill the result sections of README.md and benchmarks/README.md from benchmarks/results.

Without a JSON file a section says that nothing was measured. --check changes nothing and exits
with 1 when a README does not say what the files say.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from decode_tables import REFERENCE, copy_text, readme_rows, verdicts
from report import DIRECTIONS, LABELS, OURS, Cell, Result, comparison, mask_name

HERE = Path(__file__).resolve().parent
NOT_MEASURED = "not measured yet"
# (head_dim, causal, seqlen) of the rows shown; all cells are in the JSON file.
SHOWN = (
    (64, True, 2048),
    (64, False, 16384),
    (128, True, 4096),
    (128, False, 16384),
    (256, True, 8192),
)


def markdown_table(header: list[str], rows: list[list[str]]) -> str:
    """A table whose first column is text and whose others are numbers."""
    rule = ["---"] + ["---:"] * (len(header) - 1)
    return "\n".join("| " + " | ".join(row) + " |" for row in (header, rule, *rows))


def source_line(result: dict[str, Any], file: str) -> str:
    """Where the numbers come from."""
    facts = result["environment"]
    versions = f"torch {facts['torch']}" + (f", CUDA {facts['cuda']}" if facts.get("cuda") else "")
    return (
        f"{facts['device']}, {versions}, {facts['date']}; `{result['command']}`, [{file}]({file})"
    )


def speed_section(result: Result | None, file: str) -> str:
    """The forward/backward table: five shapes, then the ratios over all cells."""
    if result is None:
        return f"Forward and backward against torch's backends: {NOT_MEASURED}."
    cells = {(c["direction"], c["head_dim"], c["causal"], c["seqlen"]): c for c in result["cells"]}
    names = [name for name in LABELS if any(name in c["providers"] for c in result["cells"])]
    directions = [d for d in DIRECTIONS if any(key[0] == d for key in cells)]
    rows = []
    for head_dim, causal, seqlen in SHOWN:
        row = [f"head_dim {head_dim}, {mask_name(causal)}, {seqlen}"]
        for direction in directions:
            cell = cells.get((direction, head_dim, causal, seqlen))
            row += [_tflops(cell, name) for name in names]
        rows.append(row)
    header = ["TFLOP/s"] + [f"{d}: {name}" for d in directions for name in names]
    lines = [
        f"- {DIRECTIONS[direction]}, flash_attn / {LABELS[base]}: {text}"
        for direction in directions
        for base in names
        if base != OURS and (text := comparison(result["cells"], direction, base))
    ]
    host = result.get("host_us", {}).get(OURS)
    if host:
        nothing = result["host_us"].get("nothing")
        floor = "" if nothing is None else f" (torch's autograd alone {nothing['fwd_bwd']:.0f} us)"
        lines.append(
            f"- host time per call: forward {host['fwd']:.0f} us, "
            f"forward and backward {host['fwd_bwd']:.0f} us{floor}"
        )
    source = source_line(result, file)
    table = markdown_table(header, rows)
    return f"{table}\n\n{result['dtype']}, {source}\n\n" + "\n".join(lines)


def _tflops(cell: Cell | None, name: str) -> str:
    if cell is None or name not in cell["providers"]:
        return "-"
    return f"{cell['providers'][name]['tflops']:.0f}"


def training_section(result: dict[str, Any] | None, file: str) -> str:
    """Tokens per second and memory of training steps."""
    if result is None:
        return f"Training steps end to end: {NOT_MEASURED}."
    names = list(dict.fromkeys(s["attention"] for s in result["speeds"]))
    by_context: dict[int, dict[str, Any]] = {}
    for speed in result["speeds"]:
        by_context.setdefault(speed["context"], {})[speed["attention"]] = speed
    header = ["context"]
    header += [f"{n}: tokens/s" for n in names] + [f"{n}: GiB per step" for n in names]
    rows = []
    for context, found in by_context.items():
        row = [f"{context}, batch {next(iter(found.values()))['batch']}"]
        row += [f"{found[n]['tokens_per_second']:,.0f}" for n in names]
        row += [f"{found[n]['step_bytes'] / 2**30:.2f}" for n in names]
        rows.append(row)
    model = result["model"]
    width = f"{model['layers']} layers, width {model['width']}, {model['heads']} heads"
    source = source_line(result, file)
    return f"{markdown_table(header, rows)}\n\n{width}, {result['dtype']}, {source}"


def decode_section(result: dict[str, Any] | None, file: str) -> str:
    """The decoding rows with their targets, what was met, and the curve's picture."""
    if result is None:
        return f"Decoding: {NOT_MEASURED}."
    table = markdown_table(*readme_rows(result))
    source = f"{result['dtype']}, head_dim {result['head_dim']}, {source_line(result, file)}"
    lines = [f"- {line}" for line in (REFERENCE, copy_text(result), *verdicts(result))]
    parts = [table, source, "\n".join(lines)]
    if result["curve"]:
        parts.append(f"![bandwidth by cache length]({file.removesuffix('.json')}.png)")
    return "\n\n".join(parts)


def smem_section(result: dict[str, Any] | None, file: str) -> str:
    """Times of the tiles for less shared memory, as multiples of the device's own."""
    if result is None:
        return f"Tiles for less shared memory: {NOT_MEASURED}."
    rows = result["rows"]
    sizes = list(dict.fromkeys(kb for row in rows for kb in row["ratios"]))
    header = [f"times the {result['device_kb']} KB tile", "ms", *(f"{kb} KB" for kb in sizes)]
    table = [[row["name"], f"{row['ms']:.3f}", *(_ratio(row, kb) for kb in sizes)] for row in rows]
    missed = [row["name"] for row in rows if not row["met"]]
    verdict = f"missed by {'; '.join(missed)}" if missed else "all"
    source = f"{result['dtype']}, {source_line(result, file)}"
    return f"{markdown_table(header, table)}\n\n{source}\n\n- at most {result['target']}: {verdict}"


def _ratio(row: dict[str, Any], kb: str) -> str:
    return f"{row['ratios'][kb]:.2f}" if kb in row["ratios"] else "-"


SECTIONS = {
    "speed": (speed_section, "results/fwd_bwd.json"),
    "training": (training_section, "results/train_speed.json"),
    "decode": (decode_section, "results/decode.json"),
    "smem": (smem_section, "results/smem.json"),
}
# The sections of each README, and what a link from it to benchmarks/ begins with.
READMES = {
    "README.md": (("speed", "training"), "benchmarks/"),
    "benchmarks/README.md": (("decode", "smem"), ""),
}


def fill(text: str, name: str, content: str) -> str:
    """`text` with what stands between the section's two marks replaced by `content`."""
    begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(f"README: needs '{begin}' and, after it, '{end}', once each")
    head, rest = text.split(begin)
    return f"{head}{begin}\n{content}\n{end}{rest.split(end)[1]}"


def updated(text: str, folder: Path, readme: str = "README.md") -> str:
    """A README's text with its sections filled from the files in `folder` (benchmarks/)."""
    names, prefix = READMES[readme]
    for name in names:
        section, file = SECTIONS[name]
        path = folder / file
        result = json.loads(path.read_text()) if path.exists() else None
        text = fill(text, name, section(result, prefix + file))
    return text


def main(argv: list[str] | None = None) -> int:
    """Update or check; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--check", action="store_true", help="only compare; 1 when it differs")
    args = parser.parse_args(argv)
    differs = False
    for readme in READMES:
        path = HERE.parent / readme
        text = path.read_text(encoding="utf-8")
        new = updated(text, HERE, readme)
        differs |= new != text
        if not args.check:
            path.write_text(new, encoding="utf-8")
    return int(args.check and differs)


if __name__ == "__main__":
    sys.exit(main())
