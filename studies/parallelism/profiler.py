"""Hardware counters of single launches, read by Nsight Compute in a process of its own.

Where ncu is missing or may not read counters, the results are None and a notice says why: the
tables then hold formulas only.
"""

from __future__ import annotations

import csv
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .variants import BackwardVariant

ROOT = Path(__file__).resolve().parents[2]
KERNELS = (
    "forward_walk_kernel",
    "forward_grid_kernel",
    "fwd_kernel",
    "keys_outside_kernel",
    "backward_kernel",
    "bwd_kernel",
)
CORE_METRICS = ("dram__bytes_read.sum", "dram__bytes_write.sum")
WAVEFRONTS = "l1tex__data_pipe_lsu_wavefronts_mem_shared.sum"
WAVEFRONT_BYTES = 128  # that shared memory moves in a clock
SHARED = "smsp__sass_data_bytes_mem_shared"
SHARED_WRITES = (f"{SHARED}_op_st.sum", f"{SHARED}_op_stsm.sum", f"{SHARED}_op_ldgsts.sum")
WANTED_METRICS = (
    *CORE_METRICS,
    "lts__t_bytes.sum",
    WAVEFRONTS,
    f"{SHARED}.sum",
    *SHARED_WRITES,
    f"{SHARED}_op_ld.sum",
    f"{SHARED}_op_ldsm.sum",
)
TIMEOUT_SECONDS = 300
QUERY_SECONDS = 60

Case = dict[str, Any]
Counters = dict[str, float]


def forward_case(problem: Any, name: str, splits: int) -> Case:
    """One launch of a forward kernel."""
    shape = {"problem": list(problem.shape), "causal": problem.causal}
    return {"kind": "forward", "name": name, "splits": splits, **shape}


def backward_case(problem: Any, variant: BackwardVariant | None) -> Case:
    """One launch of a backward kernel's main part; None is the extension's own."""
    fields = None
    if variant is not None:
        names = ("head_dim", "block_m", "block_n", "split_k", "async_copies", "key_parallel")
        fields = {name: getattr(variant, name) for name in names}
    shape = {"problem": list(problem.shape), "causal": problem.causal}
    return {"kind": "backward", "variant": fields, **shape}


def parse_counters(text: str) -> list[Counters]:
    """Metric values of each launch, in order, from ncu's CSV with base units."""
    lines = text.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), None)
    if start is None:
        return []
    launches: dict[int, Counters] = {}
    for row in csv.DictReader(lines[start:]):
        try:
            number = int(row["ID"])
            value = float(row["Metric Value"].replace(",", ""))
        except (KeyError, TypeError, ValueError, AttributeError):
            continue
        launches.setdefault(number, {})[row["Metric Name"]] = value
    return [launches[number] for number in sorted(launches)]


def summarise(counters: Counters) -> dict[str, Any]:
    """Bytes through device memory, the second-level cache and shared memory, as far as counted."""
    found: dict[str, Any] = {"metrics": counters}
    names = {
        "dram__bytes_read.sum": ("dram_read", 1),
        "dram__bytes_write.sum": ("dram_written", 1),
        "lts__t_bytes.sum": ("l2", 1),
        WAVEFRONTS: ("shared_wavefronts", WAVEFRONT_BYTES),
    }
    for metric, (name, factor) in names.items():
        if metric in counters:
            found[name] = counters[metric] * factor
    if f"{SHARED}.sum" in counters and all(name in counters for name in SHARED_WRITES):
        found["shared_written"] = sum(counters[name] for name in SHARED_WRITES)
        found["shared_read"] = counters[f"{SHARED}.sum"] - found["shared_written"]
    return found


def first_complaint(text: str) -> str:
    """What ncu says first went wrong."""
    found = re.search(r"==(?:ERROR|WARNING)==\s*(.+)", text)
    lines = [line for line in text.splitlines() if line.strip()]
    return (found[1] if found else lines[-1] if lines else "no output").strip()


class Profiler:
    """Runs ncu once per list of cases."""

    def __init__(self, library: Path, enabled: bool = True) -> None:
        self.library = library
        self.enabled = enabled
        self._metrics: tuple[str, ...] | None = None

    def count(self, cases: Sequence[Case]) -> tuple[list[dict[str, Any] | None], str | None]:
        """Counters of every case, or Nones and the reason."""
        if not cases:
            return [], None
        try:
            launches = self._launches(cases)
        except (OSError, ValueError, subprocess.SubprocessError) as error:
            notice = f"formula only, no counters: {error}"
            print(notice, flush=True)
            return [None] * len(cases), notice
        return [summarise(launch) for launch in launches], None

    def _launches(self, cases: Sequence[Case]) -> list[Counters]:
        if not self.enabled:
            raise ValueError("switched off")
        program = shutil.which("ncu")
        if program is None:
            raise ValueError("ncu is not on PATH")
        wanted = self._available(program)
        why = ""
        for metrics in dict.fromkeys((wanted, CORE_METRICS)):
            with tempfile.TemporaryDirectory() as folder:
                file = Path(folder) / "cases.json"  # standard input is the profiler's
                file.write_text(json.dumps(list(cases)))
                done = subprocess.run(
                    self._command(program, metrics, file),
                    capture_output=True,
                    text=True,
                    cwd=ROOT,
                    timeout=TIMEOUT_SECONDS,
                )
            launches = parse_counters(done.stdout)
            if len(launches) == len(cases):
                return launches
            why = first_complaint(done.stdout + done.stderr)
            if launches:
                why = f"{len(launches)} of {len(cases)} launches were counted; {why}"
        raise ValueError(why)

    def _available(self, program: str) -> tuple[str, ...]:
        """Those of WANTED_METRICS that this ncu lists for this GPU; all of them where it lists none."""
        if self._metrics is None:
            command = [program, "--query-metrics"]
            done = subprocess.run(command, capture_output=True, text=True, timeout=QUERY_SECONDS)
            listed = set(re.findall(r"^(\w+__\w+)", done.stdout, re.MULTILINE))
            self._metrics = tuple(
                m
                for m in WANTED_METRICS
                if not listed or m in CORE_METRICS or m.split(".")[0] in listed
            )
        return self._metrics

    def _command(self, program: str, metrics: Sequence[str], file: Path) -> list[str]:
        names = f"regex:^({'|'.join(KERNELS)})$"
        options = ["--csv", "--print-units", "base", "--clock-control", "none"]
        options += ["--target-processes", "all", "--kernel-name-base", "function"]
        options += ["--kernel-name", names, "--metrics", ",".join(metrics)]
        script = ["-m", "studies.parallelism.profiled", str(self.library), str(file)]
        return [program, *options, sys.executable, *script]
