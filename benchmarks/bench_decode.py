"""Time decoding, one query token against a cache of K and V, on one GPU.

Without arguments: bf16, head_dim 128, every row of decode_rows.py (contiguous, paged and ragged
caches, batch 1 to 128) with its target, what one split costs, what appending and rotary embedding
add, and bandwidth against cache length. Calls are replayed from CUDA graphs over caches larger
than L2. Prints tables and writes JSON; --plot draws the curve. A missed target is reported; it
does not change the exit code, a wrong result does.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from bench import ClockLog, command_line, device_times, environment
from bench_fwd_bwd import WrongResultError
from decode_calls import (
    NumberedCall,
    check,
    check_append,
    decode,
    decode_append,
    decode_torch,
    refusal,
)
from decode_rows import (
    HEAD_DIM,
    ROWS,
    Inputs,
    Row,
    append_rows,
    curve_rows,
    make_inputs,
    make_pool,
    select_rows,
)
from decode_tables import (
    ONE_SPLIT,
    ROW_HEADER,
    TORCH,
    append_line,
    curve_line,
    row_line,
    summary,
)
from report import OURS, finish
from torch import Tensor

BUDGET_SECONDS = 60  # beyond it, points of the curve and appends are left out
TARGET_SECONDS = 0.15  # of device time per provider, if that is within bench's repeats
REPLAY_SECONDS = 5e-3  # about, so that a replay's own beginning does not count
MAX_CALLS = 2048  # in one graph
PROBE_CALLS = 4
MAX_ONE_SPLIT_SECONDS = 20e-3  # slower rows are not timed with one split
COPY_BYTES = 2**30
COPIES = 8  # in one graph
MEMORY_SHARE = 0.9  # of the free memory, at most, for the caches
SPLIT_TOLERANCE = 1.02  # two timings of the same call differ by less
APPEND_TARGET_US = 3.0


@dataclass(frozen=True)
class Setting:
    """What all measurements of a run share."""

    pool: Tensor
    l2_bytes: int
    copy_bytes_per_second: float
    repeats: int | None
    peers: bool
    seed: int

    def inputs(self, row: Row) -> Inputs:
        """The row's tensors."""
        return make_inputs(row, self.pool, self.l2_bytes, self.seed)

    def share(self, row: Row, microseconds: float) -> float:
        """Bytes of K and V over time, over the copy bandwidth."""
        return row.read_bytes / (1e-6 * microseconds) / self.copy_bytes_per_second


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--rows", nargs="+", metavar="PATTERN", help="such as '1x*' or '*page*'; without the rest")
    add("--no-peers", action="store_true", help="leave out torch")
    add("--no-append", action="store_true", help="leave out appending and rotary embedding")
    add("--no-curve", action="store_true", help="leave out bandwidth against cache length")
    add("--list", action="store_true", help="print the rows' names")
    add("--repeats", type=int, help=f"default: what fits into {TARGET_SECONDS} s per provider")
    add("--seed", type=int, default=0)
    add("--json", type=Path, default=Path("build/decode.json"), help="file to write")
    add("--plot", type=Path, nargs="?", const=Path("build/decode.png"), help="PNG to draw")
    args = parser.parse_args(argv)
    if args.repeats is not None and args.repeats < 1:
        parser.error(f"--repeats: must be at least 1; got {args.repeats}")
    args.selected = list(ROWS)
    if args.rows:
        args.no_append = args.no_curve = True
        try:
            args.selected = select_rows(args.rows)
        except ValueError as error:
            parser.error(f"--rows: {error}")
    if args.plot and args.no_curve:
        parser.error("--plot: draws the curve, which --rows and --no-curve leave out")
    return args


# Timing


def captured(call: NumberedCall, count: int) -> Callable[[], object]:
    """A replay of call(0), ..., call(count - 1), captured as one CUDA graph."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for number in range(count):
            call(number)
    return graph.replay


def call_seconds(call: NumberedCall) -> float:
    """Roughly: for choosing how many calls a graph gets."""
    call(0)
    replay = captured(call, PROBE_CALLS)
    replay()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    replay()
    end.record()
    torch.cuda.synchronize()
    return 1e-3 * start.elapsed_time(end) / PROBE_CALLS


def calls_per_graph(seconds: float, caches: int) -> int:
    """So many that a replay takes REPLAY_SECONDS, and every cache equally often."""
    wanted = min(MAX_CALLS, math.ceil(REPLAY_SECONDS / max(seconds, 1e-9)))
    return caches * math.ceil(max(wanted, caches) / caches)


def time_calls(
    calls: Mapping[str, NumberedCall], caches: int, repeats: int | None
) -> dict[str, dict[str, Any]]:
    """Microseconds of one call of each, from replays in turns."""
    counts = {name: calls_per_graph(call_seconds(call), caches) for name, call in calls.items()}
    replays = {name: captured(call, counts[name]) for name, call in calls.items()}
    times = device_times(replays, TARGET_SECONDS, repeats, flush=False)
    return {
        name: {
            "median_us": 1e3 * t.median_ms / counts[name],
            "min_us": 1e3 * t.min_ms / counts[name],
            "repeats": t.repeats,
            "calls": counts[name],
        }
        for name, t in times.items()
    }


def copy_rate(pool: Tensor, repeats: int | None) -> float:
    """Bytes read plus bytes written per second by torch's copy_ of a large tensor."""
    source = pool[: COPY_BYTES // pool.element_size()]
    target = torch.empty_like(source)

    def replay() -> None:  # not captured: a graph copies at two thirds of this rate
        for _ in range(COPIES):
            target.copy_(source)

    seconds = (
        1e-3
        * device_times({"copy": replay}, TARGET_SECONDS, repeats, flush=False)["copy"].median_ms
    )
    return COPIES * 2 * source.nbytes / seconds


def measure(row: Row, setting: Setting, one_split: bool = True) -> dict[str, Any]:
    """Check and time a row."""
    inputs = setting.inputs(row)
    calls = {OURS: decode(inputs)}
    if one_split and row.page_size is None:
        slow = decode(inputs, num_splits=1)
        if call_seconds(slow) <= MAX_ONE_SPLIT_SECONDS:
            calls[ONE_SPLIT] = slow
    check(calls, inputs)
    if setting.peers and row.page_size is None and not row.ragged:
        peer = decode_torch(inputs)
        reason = refusal(peer)
        if reason:
            print(f"  torch: {reason}")
        else:
            calls[TORCH] = peer
    caches = len(inputs.k_caches)
    times = time_calls(calls, caches, setting.repeats)
    for t in times.values():
        t["share"] = setting.share(row, t["median_us"])
    return make_row(row, caches, times)


def make_row(row: Row, caches: int, times: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """A row's figures; `met` is None without a target, `splits_met` without one split's time."""
    ours = times[OURS]
    met = splits_ratio = splits_met = None
    if row.target_share is not None:
        met = ours["share"] >= row.target_share
    elif row.target_us is not None:
        met = ours["median_us"] <= row.target_us
    if ONE_SPLIT in times:
        splits_ratio = ours["median_us"] / times[ONE_SPLIT]["median_us"]
        splits_met = splits_ratio <= SPLIT_TOLERANCE
    return {
        **{"name": row.name, **asdict(row), "bytes": row.read_bytes, "caches": caches},
        **{"providers": times, "met": met, "splits_ratio": splits_ratio, "splits_met": splits_met},
    }


def measure_append(row: Row, setting: Setting) -> dict[str, Any]:
    """Time a row with and without appending and rotary embedding."""
    inputs = setting.inputs(row)
    generator = torch.Generator(inputs.q.device).manual_seed(setting.seed + 1)
    size = (row.batch, 1, row.heads_k, HEAD_DIM)
    k, v = (
        torch.randn(size, generator=generator, device=inputs.q.device, dtype=inputs.q.dtype)
        for _ in range(2)
    )
    check_append(inputs, k, v)
    calls = {"plain": decode(inputs), "append": decode_append(inputs, k, v)}
    times = time_calls(calls, len(inputs.k_caches), setting.repeats)
    added = times["append"]["median_us"] - times["plain"]["median_us"]
    result = {
        "name": row.name,
        "providers": times,
        "added_us": added,
        "target_us": APPEND_TARGET_US,
    }
    return {**result, "met": added <= APPEND_TARGET_US}


# The run


def planned(args: argparse.Namespace) -> dict[str, list[Row]]:
    """The rows of each part of the run."""
    return {
        "rows": args.selected,
        "append": [] if args.no_append else append_rows(),
        "curve": [] if args.no_curve else curve_rows(),
    }


def fitting(
    parts: dict[str, list[Row]], elements: int, l2_bytes: int
) -> tuple[dict[str, list[Row]], list[str]]:
    """The rows whose caches are not larger than `elements`, and the names of the others."""
    fits = {
        part: [row for row in rows if row.pool_elements(l2_bytes) <= elements]
        for part, rows in parts.items()
    }
    left_out = [row.name for part, rows in parts.items() for row in rows if row not in fits[part]]
    return fits, left_out


def run_parts(
    parts: dict[str, list[Row]], setting: Setting, result: dict[str, Any], deadline: float
) -> None:
    """Measure everything into `result`, printing a line each."""
    measures = {
        "rows": lambda row: measure(row, setting),
        "append": lambda row: measure_append(row, setting),
        "curve": lambda row: measure(row, setting, one_split=False),
    }
    lines = {"rows": row_line, "append": append_line, "curve": curve_line}
    for part, rows in parts.items():
        for row in rows:
            if part != "rows" and time.perf_counter() > deadline:
                result["left_out"].append(row.name)
                continue
            try:
                result[part].append(measures[part](row))
                print(lines[part](result[part][-1]), flush=True)
            except WrongResultError as error:
                result["wrong"].append(f"{part} {row.name}: {error}")
                print("WRONG", result["wrong"][-1], flush=True)


def main(argv: list[str] | None = None) -> int:
    """Measure what was asked for and write it; returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    args = parse_args(argv)
    if args.list:
        print(*(row.name for row in ROWS), sep="\n")
        return 0
    if not torch.cuda.is_available():
        print("bench_decode.py needs a CUDA GPU; torch sees none", file=sys.stderr)
        return 2
    device = torch.device("cuda", torch.cuda.current_device())
    l2_bytes = torch.cuda.get_device_properties(device).L2_cache_size
    free = MEMORY_SHARE * torch.cuda.mem_get_info(device)[0] - COPY_BYTES
    parts, left_out = fitting(planned(args), int(free) // 2, l2_bytes)
    facts = environment(device)
    result: dict[str, Any] = {
        "environment": facts,
        "command": command_line("bench_decode.py", argv),
    }
    result |= {"dtype": "bf16", "head_dim": HEAD_DIM, "l2_bytes": l2_bytes}
    result |= {"rows": [], "append": [], "curve": [], "wrong": [], "left_out": left_out}
    print(f"{facts['device']}, torch {facts['torch']}, CUDA {facts['cuda']}, bf16, d{HEAD_DIM}")
    deadline = time.perf_counter() + BUDGET_SECONDS
    with ClockLog() as clocks:
        sizes = [row.pool_elements(l2_bytes) for rows in parts.values() for row in rows]
        pool = make_pool(max([COPY_BYTES // 2, *sizes]), args.seed, str(device))
        copy = copy_rate(pool, args.repeats)
        print(f"copy, read plus written: {copy / 1e12:.3f} TB/s\n{ROW_HEADER}", flush=True)
        setting = Setting(pool, l2_bytes, copy, args.repeats, not args.no_peers, args.seed)
        run_parts(parts, setting, result, deadline)
        result["copy_bytes_per_second"] = copy
        result["copy_bytes_per_second_after"] = copy_rate(pool, args.repeats)
    facts["clocks"] = clocks.summary()
    print(summary(result))
    code = finish(result, args.json)
    if args.plot:
        from plot import plot_decode

        args.plot.parent.mkdir(parents=True, exist_ok=True)
        plot_decode(result, args.plot)
    return code


if __name__ == "__main__":
    sys.exit(main())
