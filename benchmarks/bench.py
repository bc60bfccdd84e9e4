"""Timing and environment for the benchmarks.

device_times() measures time on the GPU, not time spent launching: a spin kernel occupies the
device until every launch of a round is queued, and a round in which the spin ended too early is
measured again. All providers take turns within a round, starting with a different one each time.
"""

from __future__ import annotations

import datetime
import platform
import resource
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath

import torch

SMI_FIELDS = ("driver_version", "clocks.max.sm", "clocks.max.mem", "power.limit")
CLOCK_FIELDS = ("clocks.sm", "clocks.mem", "power.draw")
CLOCK_PERIOD_MS = 500
CYCLES_PER_SECOND = 2.0e9  # at least the SM clock, so that a spin is never shorter than asked
SPIN_MARGIN_SECONDS = 100e-6
MAX_SPIN_SECONDS = 0.1
FLUSH_BYTES = 256 * 2**20  # several times the largest L2
WARMUP_CALLS = 3
MIN_REPEATS = 24
MAX_REPEATS = 100
HOST_WARMUP_CALLS = 30
HOST_CALLS = 200
HOST_BATCHES = 7

Call = Callable[[], object]


@dataclass(frozen=True)
class Times:
    """Device times of one call, in milliseconds."""

    median_ms: float
    min_ms: float
    repeats: int


def smi_query(fields: Sequence[str]) -> dict[str, str]:
    """nvidia-smi's answer for the first GPU, or an empty dict where it is missing."""
    if shutil.which("nvidia-smi") is None:
        return {}
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader", "--id=0"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    values = [value.strip() for value in done.stdout.strip().split(",")]
    return dict(zip(fields, values, strict=False)) if done.returncode == 0 else {}


def cpu_name() -> str:
    """The processor's name, as far as the system tells it."""
    name = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            models = (line.split(":", 1)[1].strip() for line in lines if "model name" in line)
            name = next(models, name)
    except OSError:
        pass
    return name


def environment(device: torch.device) -> dict[str, object]:
    """What a result depends on: device, versions, clocks, date."""
    on_gpu = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if on_gpu else cpu_name(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda if on_gpu else None,
        "nvidia_smi": smi_query(SMI_FIELDS) if on_gpu else {},
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
    }


def command_line(script: str, argv: Sequence[str]) -> str:
    """The command as a reader would repeat it: absolute paths are cut to their last part."""
    words = [PurePath(word).name if word.startswith("/") else word for word in argv]
    return shlex.join(["python3", f"benchmarks/{script}", *words])


def peak_memory_bytes(device: torch.device) -> int:
    """Peak of the memory allocated on a GPU, or of this process's resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


class ClockLog:
    """Polls the GPU's clocks and power with nvidia-smi while the context is open."""

    def __enter__(self) -> ClockLog:
        self._process = None
        if shutil.which("nvidia-smi"):
            command = ["nvidia-smi", f"--query-gpu={','.join(CLOCK_FIELDS)}", "--id=0"]
            command += ["--format=csv,noheader,nounits", f"--loop-ms={CLOCK_PERIOD_MS}"]
            self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        return self

    def __exit__(self, *_: object) -> None:
        self.text = ""
        if self._process:
            self._process.terminate()
            self.text = self._process.communicate()[0]

    def summary(self) -> dict[str, list[float]]:
        """[minimum, median, maximum] of each field (MHz, MHz, W) over the samples."""
        return clock_summary(self.text)


def clock_summary(text: str) -> dict[str, list[float]]:
    """Parse nvidia-smi's lines of CLOCK_FIELDS; lines that are not numbers are left out."""
    samples = []
    for line in text.splitlines():
        try:
            values = [float(value) for value in line.split(",")]
        except ValueError:
            continue
        if len(values) == len(CLOCK_FIELDS):
            samples.append(values)
    columns = zip(CLOCK_FIELDS, zip(*samples, strict=True), strict=False)
    return {name: [min(c), statistics.median(c), max(c)] for name, c in columns}


def choose_repeats(call_seconds: float, target_seconds: float, least: int, most: int) -> int:
    """Calls that fill `target_seconds`, within [least, most]."""
    return max(least, min(most, round(target_seconds / max(call_seconds, 1e-9))))


def device_times(
    calls: Mapping[str, Call],
    target_seconds: float,
    repeats: int | None = None,
    flush: bool = True,
) -> dict[str, Times]:
    """Median and minimum device time of every call, measured in turns.

    `target_seconds` of device time are spent on each call unless `repeats` is given. `flush`
    overwrites the L2 cache before every call.
    """
    scratch = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda") if flush else None
    for call in calls.values():
        for _ in range(WARMUP_CALLS):
            call()
    torch.cuda.synchronize()
    order = list(calls)
    spin, probe = _measured_round(calls, order, SPIN_MARGIN_SECONDS, scratch)
    if repeats is None:
        mean_seconds = 1e-3 * sum(probe.values()) / len(probe)
        repeats = choose_repeats(mean_seconds, target_seconds, MIN_REPEATS, MAX_REPEATS)
    times: dict[str, list[float]] = {name: [] for name in order}
    for _ in range(repeats):
        spin, measured = _measured_round(calls, order, spin, scratch)
        for name, milliseconds in measured.items():
            times[name].append(milliseconds)
        order.append(order.pop(0))
    return {
        name: Times(statistics.median(values), min(values), len(values))
        for name, values in times.items()
    }


def _measured_round(
    calls: Mapping[str, Call], order: Sequence[str], spin: float, scratch: torch.Tensor | None
) -> tuple[float, dict[str, float]]:
    """Time every call once; returns the spin that was long enough, and milliseconds by name."""
    while True:
        torch.cuda._sleep(int(spin * CYCLES_PER_SECOND))
        spin_end = torch.cuda.Event()
        spin_end.record()
        events = {}
        launch_start = time.perf_counter()
        for name in order:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            if scratch is not None:
                scratch.zero_()
            start.record()
            calls[name]()
            end.record()
            events[name] = start, end
        starved = spin_end.query()
        launch_seconds = time.perf_counter() - launch_start
        torch.cuda.synchronize()
        if not starved:
            return spin, {name: start.elapsed_time(end) for name, (start, end) in events.items()}
        if spin >= MAX_SPIN_SECONDS:
            raise RuntimeError(
                f"launching a round took {launch_seconds:.3f} s, longer than a spin of {spin} s: "
                "a call waits for the GPU"
            )
        spin = min(MAX_SPIN_SECONDS, max(2 * spin, 1.5 * launch_seconds + SPIN_MARGIN_SECONDS))


def host_microseconds(calls: Mapping[str, Call]) -> dict[str, float]:
    """Wall time the host spends in each call, in microseconds: median of batches in turns.

    Meant for problems so small that the GPU is never the slower side.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        for _ in range(HOST_WARMUP_CALLS):
            call()
    for _ in range(HOST_BATCHES):
        for name, call in calls.items():
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(HOST_CALLS):
                call()
            times[name].append((time.perf_counter() - start) / HOST_CALLS)
            torch.cuda.synchronize()
    return {name: 1e6 * statistics.median(values) for name, values in times.items()}
