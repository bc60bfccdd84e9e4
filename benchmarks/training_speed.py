"""Speed and memory of a GPT's training step with different attention functions, side by side.

Used by train.py and bench_train.py. The steps of all implementations alternate, so that a change
of clock or load meets all of them; a speed is the median step.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from gpt import VOCAB, Preset, load_attention
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from training import Precision, Trainer

MIN_ROUNDS = 2
MAX_ROUNDS = 20
WARMUP_STEPS = {"cpu": 1, "cuda": 3}


@dataclass(frozen=True)
class StepSpeed:
    """One implementation at one shape. `step_bytes`: peak beyond weights and optimizer state."""

    attention: str
    context: int
    batch: int
    step_seconds: float
    tokens_per_second: float
    step_bytes: int


def compare_attention(
    preset: Preset,
    names: tuple[str, ...],
    context: int,
    batch: int,
    precision: Precision,
    seconds: float,
) -> list[StepSpeed]:
    """Time one model's training step with every attention in `names`, for about `seconds`.

    On a GPU the batch is halved until all implementations fit; raises torch.OutOfMemoryError
    when a batch of one does not.
    """
    while True:
        try:
            return _compare(preset, names, context, batch, precision, seconds)
        except torch.OutOfMemoryError:
            if batch == 1:
                raise
        batch //= 2
        torch.cuda.empty_cache()


def _compare(
    preset: Preset,
    names: tuple[str, ...],
    context: int,
    batch: int,
    precision: Precision,
    seconds: float,
) -> list[StepSpeed]:
    deadline = time.perf_counter() + seconds
    trainer = Trainer(preset, names[0], context, precision, rate=1e-4)
    functions = {name: load_attention(name) for name in names}
    window = torch.randint(VOCAB, (batch, context + 1), device=precision.device)
    peak: dict[str, int] = {}
    for name, function in functions.items():
        trainer.model.attention = function
        for _ in range(WARMUP_STEPS[precision.device.type]):
            trainer.step(window)
        peak[name] = step_bytes(trainer, window)
    times: dict[str, list[float]] = {name: [] for name in names}
    for round_index in range(MAX_ROUNDS):
        if round_index >= MIN_ROUNDS and time.perf_counter() > deadline:
            break
        for name, function in functions.items():
            trainer.model.attention = function
            precision.synchronize()
            start = time.perf_counter()
            trainer.step(window)
            precision.synchronize()
            times[name].append(time.perf_counter() - start)
    median = {name: statistics.median(times[name]) for name in names}
    return [
        StepSpeed(name, context, batch, median[name], batch * context / median[name], peak[name])
        for name in names
    ]


def step_bytes(trainer: Trainer, window: Tensor) -> int:
    """Peak memory of one training step in bytes, beyond what was allocated before it."""
    trainer.optimizer.zero_grad(set_to_none=True)
    if trainer.precision.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(window.device)
        before = torch.cuda.memory_allocated(window.device)
        trainer.step(window)
        return torch.cuda.max_memory_allocated(window.device) - before
    activities = [ProfilerActivity.CPU]
    with profile(activities=activities, profile_memory=True, acc_events=True) as recorded:
        trainer.step(window)
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        recorded.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    allocations = sorted(
        (event["ts"], event["args"]["Bytes"]) for event in events if event["name"] == "[memory]"
    )
    current = peak = 0
    for _, size in allocations:
        current += size
        peak = max(peak, current)
    return peak


def pick_threads(preset: Preset, precision: Precision) -> int:
    """Time a small step with all of torch's CPU threads and with half of them; keep the faster.

    A machine that other work keeps busy is often faster with fewer threads, because every
    parallel region waits for its slowest one.
    """
    most = torch.get_num_threads()
    trainer = Trainer(preset, "unfused", preset.context, precision, rate=1e-4)
    window = torch.randint(VOCAB, (preset.batch, preset.context + 1))
    seconds: dict[int, float] = {}
    for threads in sorted({most, max(1, most // 2)}):
        torch.set_num_threads(threads)
        trainer.step(window)
        start = time.perf_counter()
        for _ in range(4):
            trainer.step(window)
        seconds[threads] = time.perf_counter() - start
    best = min(seconds, key=lambda threads: seconds[threads])
    torch.set_num_threads(best)
    return best


def speed_table(speeds: list[StepSpeed]) -> str:
    """One aligned line per implementation and shape, with the ratio to the unfused one."""
    unfused = {s.context: s.tokens_per_second for s in speeds if s.attention == "unfused"}
    lines = ["context  batch  attention    ms/step    tokens/s  vs unfused  memory of a step"]
    for s in speeds:
        base = unfused.get(s.context)
        ratio = f"{s.tokens_per_second / base:.2f}x" if base else "-"
        lines.append(
            f"{s.context:7d}  {s.batch:5d}  {s.attention:9s}  {1e3 * s.step_seconds:9.1f}  "
            f"{s.tokens_per_second:10,.0f}  {ratio:>10s}  {s.step_bytes / 2**20:12,.0f} MiB"
        )
    return "\n".join(lines)
