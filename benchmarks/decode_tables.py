"""Text of a decoding result: a line per row, the summary, and the table of the README.

Used by bench_decode.py and update_readme.py; needs neither torch nor a GPU. Figures of
FlashAttention-3 are constants of decode_rows.py, marked wherever they appear.
"""

from __future__ import annotations

from typing import Any

from report import OURS

ONE_SPLIT, TORCH = "one_split", "fa2"
REFERENCE = "FA3: reference figure, same GPU, not measured in this run"
COLUMNS = (
    "row",
    "MB",
    "us",
    "min",
    "of copy",
    "target",
    "auto/one",
    "torch us",
    "torch",
    "FA3 reference",
)
LINE = "{:24} {:>8} {:>8} {:>8} {:>7} {:>8} {:>8} {:>8} {:>7} {:>14}  {}"
ROW_HEADER = LINE.format(*COLUMNS, "").rstrip()

Row = dict[str, Any]


def percent(share: float | None, digits: int = 0) -> str:
    """0.96 as 96 %; measured shares have a digit more than targets."""
    return "-" if share is None else f"{100 * share:.{digits}f} %"


def microseconds(value: float | None) -> str:
    """Three significant digits or more."""
    if value is None:
        return "-"
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def target_text(row: Row) -> str:
    """A share of the copy bandwidth, or a time."""
    if row["target_share"] is not None:
        return percent(row["target_share"])
    return "-" if row["target_us"] is None else f"{row['target_us']:g} us"


def fa3_text(row: Row) -> str:
    """FlashAttention-3's reference figures."""
    share = None if row["fa3_share"] is None else percent(row["fa3_share"])
    time = None if row["fa3_us"] is None else f"{row['fa3_us']:g} us"
    return " ".join(part for part in (share, time) if part) or "-"


def missed(row: Row) -> list[str]:
    """What the row should reach and does not."""
    names = {"met": "MISSED", "splits_met": "SLOWER THAN ONE SPLIT"}
    return [text for key, text in names.items() if row[key] is False]


def ratio_text(row: Row) -> str:
    """Our time over the time with one split."""
    return "-" if row["splits_ratio"] is None else f"{row['splits_ratio']:.2f}"


def row_line(row: Row) -> str:
    """One line of the table."""
    ours, torch = row["providers"][OURS], row["providers"].get(TORCH, {})
    return LINE.format(
        *(row["name"], f"{row['bytes'] / 1e6:.1f}"),
        *(microseconds(ours["median_us"]), microseconds(ours["min_us"])),
        *(percent(ours["share"], 1), target_text(row), ratio_text(row)),
        *(microseconds(torch.get("median_us")), percent(torch.get("share"), 1)),
        *(fa3_text(row), ", ".join(missed(row))),
    ).rstrip()


def append_line(row: Row) -> str:
    """What appending and rotary embedding add."""
    times = row["providers"]
    text = (
        f"{row['name']:24} append and rotary add {row['added_us']:.2f} us "
        f"({times['plain']['median_us']:.2f} -> {times['append']['median_us']:.2f}), "
        f"target {row['target_us']:g} us"
    )
    return text if row["met"] else text + "  MISSED"


def curve_line(row: Row) -> str:
    """A point of bandwidth against cache length."""
    parts = [
        f"{name} {t['median_us']:.1f} us, {percent(t['share'], 1)}"
        for name, t in row["providers"].items()
    ]
    return f"{row['name']:24} {row['bytes'] / 1e6:.1f} MB: " + "; ".join(parts)


def beats_fa3(row: Row) -> bool | None:
    """Whether ours reaches FlashAttention-3's figure: its share, where there is one."""
    ours = row["providers"][OURS]
    if row["fa3_share"] is not None:
        return ours["share"] >= row["fa3_share"]
    return None if row["fa3_us"] is None else ours["median_us"] <= row["fa3_us"]


def met_count(values: list[bool | None]) -> str:
    """How many of those that were compared."""
    return f"{sum(v is True for v in values)} of {sum(v is not None for v in values)}"


def verdicts(result: dict[str, Any]) -> list[str]:
    """How many targets are met, in a line for each kind."""
    rows, lines = result["rows"], []
    if rows:
        lines.append(f"targets met: {met_count([row['met'] for row in rows])}")
        lines.append(
            f"at least as fast as FA3's figure: {met_count([beats_fa3(row) for row in rows])}"
        )
        count = met_count([row["splits_met"] for row in rows])
        lines.append(f"not slower than one split: {count}")
    if result["append"]:
        added = ", ".join(f"{r['name']} {r['added_us']:.2f} us" for r in result["append"])
        count = met_count([row["met"] for row in result["append"]])
        lines.append(
            f"append and rotary, at most {result['append'][0]['target_us']:g} us: {count} ({added})"
        )
    if result["left_out"]:
        lines.append("left out, for memory or time: " + ", ".join(result["left_out"]))
    return lines


def copy_text(result: dict[str, Any]) -> str:
    """The copy bandwidth before and after the rows."""
    before, after = (
        result[key] / 1e12 for key in ("copy_bytes_per_second", "copy_bytes_per_second_after")
    )
    return f"copy, read plus written: {before:.3f} TB/s before, {after:.3f} TB/s after the rows"


def summary(result: dict[str, Any]) -> str:
    """What follows the table."""
    return "\n".join([REFERENCE, copy_text(result), *verdicts(result)])


def readme_rows(result: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the README's table."""
    header = ["batch x tokens - heads q/kv", "MB of K and V", "us", "of copy", "target", "met"]
    header += ["auto / one split", "torch us", "FA3 (reference figure, same GPU)"]
    met = {True: "yes", False: "no", None: "-"}
    rows = [
        [
            *(row["name"], f"{row['bytes'] / 1e6:.1f}"),
            microseconds(row["providers"][OURS]["median_us"]),
            percent(row["providers"][OURS]["share"], 1),
            *(target_text(row), met[row["met"]], ratio_text(row)),
            microseconds(row["providers"].get(TORCH, {}).get("median_us")),
            fa3_text(row),
        ]
        for row in result["rows"]
    ]
    return header, rows
