"""Cross entropy on a GPU: this package's against torch's, eager and compiled.

    python3 benchmarks/bench_cross_entropy.py --json benchmarks/results/cross_entropy.json
    python3 benchmarks/bench_cross_entropy.py --sweep   # other blocks and warps of the kernels too

bf16 logits, int64 labels, losses in fp32, mean over the rows. torch's is
F.cross_entropy(logits.float(), labels). All take turns, after their losses and gradients were compared;
time is the GPU's. bandwidth: what must be moved over the time, that is the logits once forward, twice
backward. Memory: the peak of one forward and backward above the logits.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch._functorch.config
import torch.nn.functional as F
from bench import ClockLog, command_line, device_times, environment
from report import write_json
from torch import Tensor

from flash_attn.losses.cross_entropy import CrossEntropyLoss
from flash_attn.ops.triton import _cross_entropy_kernels as kernels

TARGET_SECONDS = 0.2
OURS, COMPILED, EAGER = "flash_attn", "compiled", "eager"
SWEEP = [(block, warps) for block in (2048, 4096, 8192, 16384) for warps in (4, 8, 16, 32)]
DIRECTIONS = ("fwd", "bwd")
TENSORS_MOVED = {"fwd": 1, "bwd": 2}
LINE = "{:4} {:>6} {:>7}  {:22} {:>8} {:>8} {:>8} {:>9}"
COLUMNS = ("pass", "rows", "vocab", "provider", "ms", "min ms", "GB/s", "peak MiB")

Loss = Callable[[Tensor, Tensor], Tensor]


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--rows", type=int, nargs="+", default=[4096, 8192])
    add("--vocabs", type=int, nargs="+", default=[131072, 32000])
    add("--sweep", action="store_true", help="time other blocks and warps of our kernels too")
    add("--repeats", type=int, help=f"default: what fits into {TARGET_SECONDS} s per measurement")
    add("--seed", type=int, default=0)
    add("--json", type=Path, default=Path("build/cross_entropy.json"), help="file to write")
    args = parser.parse_args(argv)
    if min(*args.rows, *args.vocabs) < 1:
        parser.error("--rows, --vocabs: must be at least 1")
    return args


def eager(logits: Tensor, labels: Tensor) -> Tensor:
    """torch's, with the losses in fp32."""
    return F.cross_entropy(logits.float(), labels)


def ours_with(config: tuple[int, int] | None) -> Loss:
    """Ours, with these blocks and warps in both kernels."""
    module = CrossEntropyLoss()

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        return module(logits, labels)

    loss.config = config
    return loss


def providers(sweep: bool) -> dict[str, Loss]:
    """What is timed, by name."""
    torch._dynamo.reset()
    found = {OURS: ours_with(None), COMPILED: torch.compile(eager, dynamic=False), EAGER: eager}
    if sweep:
        found |= {f"{OURS} {block}x{warps}": ours_with((block, warps)) for block, warps in SWEEP}
    return found


def configured(loss: Loss, call: Callable[[], object]) -> Callable[[], object]:
    """The call, with the kernels' constants set to those of the loss while it runs."""
    config = getattr(loss, "config", None)
    if config is None:
        return call

    def run() -> object:
        kept = kernels.FORWARD, kernels.BACKWARD
        kernels.FORWARD = kernels.BACKWARD = config
        try:
            return call()
        finally:
            kernels.FORWARD, kernels.BACKWARD = kept

    return run


def compare(name: str, ours: list[Tensor], want: list[Tensor]) -> str | None:
    """What is wrong with loss and gradient, or None."""
    for what, a, b in zip(("loss", "gradient"), ours, want):
        error = (a.float() - b.float()).abs().max().item()
        limit = 1e-2 * b.float().abs().max().item()
        if not error <= limit:
            return f"{name}: {what} differs by {error:.3g}, limit {limit:.3g}"
    return None


def step(loss: Loss, logits: Tensor, labels: Tensor) -> list[Tensor]:
    """The loss and the gradient of the logits."""
    value = loss(logits, labels)
    return [value.detach(), *torch.autograd.grad(value, logits)]


def peak_bytes(run: Callable[[], object], logits: Tensor) -> int | None:
    """Memory of a forward and backward above what is held before; None without a GPU."""
    if not logits.is_cuda:
        return None
    torch.cuda.synchronize()
    held = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    return torch.cuda.max_memory_allocated() - held


def measure(
    rows: int, vocab: int, args: argparse.Namespace, device: str = "cuda"
) -> tuple[list[dict[str, Any]], list[str]]:
    """Rows of the table for one size, and what was wrong."""
    gen = torch.Generator(device).manual_seed(args.seed)
    logits = torch.randn(rows, vocab, generator=gen, device=device, dtype=torch.bfloat16)
    labels = torch.randint(vocab, (rows,), generator=gen, device=device)
    logits.requires_grad_()
    losses = providers(args.sweep)
    want = None
    wrong, peaks, graphs = [], {}, {}
    for name in (EAGER, *(n for n in losses if n != EAGER)):
        run = configured(losses[name], lambda name=name: step(losses[name], logits, labels))
        result = run()
        want = want or result
        problem = compare(name, result, want)
        if problem:
            wrong.append(f"{rows} x {vocab}: {problem}")
            del losses[name]
            continue
        peaks[name] = peak_bytes(run, logits)
    del want, result
    found = []
    for direction in DIRECTIONS:
        calls: dict[str, Callable[[], object]] = {}
        for name, function in losses.items():
            if direction == "fwd":
                call = lambda function=function: function(logits, labels)  # noqa: E731
            else:
                graphs[name] = function(logits, labels)
                call = lambda graph=graphs[name]: torch.autograd.grad(  # noqa: E731
                    graph, logits, retain_graph=True
                )
            calls[name] = configured(function, call)
        if direction == "fwd":
            calls = {name: torch.no_grad()(call) for name, call in calls.items()}
        times = device_times(calls, TARGET_SECONDS, args.repeats)
        moved = TENSORS_MOVED[direction] * 2 * rows * vocab
        for name, t in times.items():
            row = {"pass": direction, "rows": rows, "vocab": vocab, "provider": name}
            row |= {"median_ms": t.median_ms, "min_ms": t.min_ms, "repeats": t.repeats}
            row |= {"gb_per_s": 1e-6 * moved / t.median_ms, "peak_bytes": peaks[name]}
            found.append(row)
    return found, wrong


def row_line(row: dict[str, Any]) -> str:
    """One line of the table."""
    peak = "-" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**20:.0f}"
    return LINE.format(
        *(row["pass"], row["rows"], row["vocab"], row["provider"]),
        *(f"{row['median_ms']:.3f}", f"{row['min_ms']:.3f}", f"{row['gb_per_s']:.0f}", peak),
    )


def ratios(rows: list[dict[str, Any]]) -> list[str]:
    """How many times faster ours is than torch's, a line for each size and direction."""
    cells: dict[tuple, dict[str, float]] = {}
    for row in rows:
        key = row["pass"], row["rows"], row["vocab"]
        cells.setdefault(key, {})[row["provider"]] = row["median_ms"]
    return [
        f"{direction} {size}x{vocab}: {OURS} is {times[COMPILED] / times[OURS]:.2f} times as fast as"
        f" compiled, {times[EAGER] / times[OURS]:.2f} as eager"
        for (direction, size, vocab), times in cells.items()
        if {OURS, COMPILED, EAGER} <= times.keys()
    ]


def main(argv: list[str] | None = None) -> int:
    """Measure what was asked for and write it; returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    args = parse_args(argv)
    if not torch.cuda.is_available():
        print("bench_cross_entropy.py needs a CUDA GPU; torch sees none", file=sys.stderr)
        return 2
    # A graph is run backward more than once, which compiled graphs with donated buffers refuse.
    torch._functorch.config.donated_buffer = False
    facts = environment(torch.device("cuda", torch.cuda.current_device()))
    print(f"{facts['device']}, torch {facts['torch']}, CUDA {facts['cuda']}, bf16")
    print(LINE.format(*COLUMNS))
    rows, wrong = [], []
    with ClockLog() as clocks:
        for vocab in args.vocabs:
            for size in args.rows:
                found, problems = measure(size, vocab, args)
                print(*map(row_line, found), sep="\n", flush=True)
                rows += found
                wrong += problems
    facts["clocks"] = clocks.summary()
    print(*ratios(rows), sep="\n")
    print(*wrong, sep="\n", file=sys.stderr)
    command = command_line("bench_cross_entropy.py", argv)
    result = {"environment": facts, "command": command, "dtype": "bf16", "rows": rows}
    write_json({**result, "wrong": wrong}, args.json)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
