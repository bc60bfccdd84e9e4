"""Train a small GPT on real text with flash_attn_func, and say what it cost.

Without arguments: the standard library's sources as text, a size that suits this machine, and a
time limit that the run keeps whatever the machine's speed. Prints the speed and memory of a
training step with flash_attn_func and with unfused attention, trains, and writes loss curves
(PNG), a generated sample (text) and a record (JSON) into the output folder.

Exit code 1 when the held-out loss ends at or above that of a unigram model.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from dataclasses import asdict
from pathlib import Path

os.environ.setdefault("KINETO_LOG_LEVEL", "9")  # the profiler's own messages tear the progress bar

import torch
from bench import environment
from corpus import load_corpus, standard_library
from gpt import ATTENTION_NAMES, PRESETS, Preset
from training import DTYPES, Outcome, Plan, Precision, Trainer, generate, train
from training_speed import StepSpeed, compare_attention, pick_threads, speed_table

TIME_LIMIT_SECONDS = {"cpu": 210.0, "cuda": 150.0}
LARGE_GPU_BYTES = 40 * 2**30
# Shares of the time limit: each of the two comparisons, and what follows the last step.
COMPARE_SHARE = 0.05
ENDING_SHARE = 0.08
LONG_CONTEXT = {"cpu": 8, "cuda": 4}
SAMPLE_BYTES = 800


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line; options left out are None and follow the device and the size."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--data", type=Path, help="folder with text files; default: Python's standard library")
    add("--max-bytes", type=int, default=32 * 2**20, help="bytes of text read at most")
    add("--size", choices=("auto", *PRESETS), default="auto", help="model and training size")
    add("--steps", type=int, help="training steps at most; the time limit holds besides")
    add("--batch", type=int, help="windows per step")
    add("--context", type=int, help="bytes per window")
    add("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    add("--dtype", choices=tuple(DTYPES), help="default: bfloat16 on cuda, float32 on the CPU")
    add("--attention", choices=ATTENTION_NAMES, default="flash", help="what the run trains with")
    add("--seed", type=int, default=0)
    add("--threads", type=int, help="CPU threads; default: the faster of all and half of them")
    add("--output", type=Path, default=Path("build/demo"), help="folder for PNG, text and JSON")
    add("--time-limit", type=float, help="seconds for the whole run; 0: none, --steps decides")
    add("--no-compare", action="store_true", help="leave out the side-by-side timing")
    add("--prompt", default="def ", help="start of the generated sample")
    args = parser.parse_args(argv)
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    args.dtype = args.dtype or ("bfloat16" if args.device == "cuda" else "float32")
    if args.time_limit is None:
        args.time_limit = TIME_LIMIT_SECONDS[args.device]
    for name in ("steps", "batch", "context", "threads", "max_bytes"):
        value = getattr(args, name)
        if value is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')}: got {value}, must be at least 1")
    if args.device == "cuda" and args.dtype == "float32" and args.attention == "flash":
        parser.error("--dtype float32: flash attention takes float16 and bfloat16 on a GPU")
    return args


def choose_size(args: argparse.Namespace) -> str:
    """Name of the preset: as asked, or by the device's kind and memory."""
    if args.size != "auto":
        return args.size
    if args.device == "cpu":
        return "small"
    memory = torch.cuda.get_device_properties(0).total_memory
    return "large" if memory >= LARGE_GPU_BYTES else "medium"


def side_by_side(
    args: argparse.Namespace, preset: Preset, precision: Precision, batch: int, context: int
) -> list[StepSpeed]:
    """Time flash and unfused attention at the training context and at a longer one."""
    names = tuple(dict.fromkeys(("flash", "unfused", args.attention)))
    budget = COMPARE_SHARE * (args.time_limit or TIME_LIMIT_SECONDS[args.device])
    speeds = []
    for scale in (1, LONG_CONTEXT[args.device]):
        speeds += compare_attention(
            preset, names, scale * context, max(1, batch // scale), precision, budget
        )
    return speeds


def write_outputs(
    args: argparse.Namespace,
    size: str,
    context: int,
    trainer: Trainer,
    speeds: list[StepSpeed],
    outcome: Outcome,
    sample: str,
) -> None:
    """Write loss.png, sample.txt and run.json into the output folder."""
    from plot import plot_losses

    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "sample.txt").write_text(sample + "\n", encoding="utf-8")
    title = f"{size} GPT, {trainer.model.parameter_count / 1e6:.1f} M parameters, {args.attention}"
    plot_losses(
        outcome.curves.train,
        outcome.curves.held_out,
        outcome.unigram,
        title,
        args.output / "loss.png",
    )
    settings = {
        "size": size,
        "parameters": trainer.model.parameter_count,
        "context": context,
        "device": args.device,
        "dtype": args.dtype,
        "attention": args.attention,
        "seed": args.seed,
        "data": "standard library" if args.data is None else args.data.name,
    }
    record = {
        "environment": environment(trainer.precision.device),
        "settings": settings,
        "attention_speed": [asdict(speed) for speed in speeds],
        "outcome": asdict(outcome),
    }
    (args.output / "run.json").write_text(json.dumps(record, indent=1) + "\n")


def report(args: argparse.Namespace, outcome: Outcome, sample: str, started: float) -> int:
    """Print the sample and the results; return the exit code."""
    rule = "-" * 78
    print(f"\nsample ({args.output / 'sample.txt'})\n{rule}\n{sample}\n{rule}")
    recent = outcome.curves.train[-max(1, outcome.steps // 20) :]
    print(f"steps           {outcome.steps} of {outcome.batch} windows, {outcome.seconds:.0f} s")
    print(f"train loss      {sum(recent) / len(recent):.3f} nats/byte (last 5 % of the steps)")
    print(f"held-out loss   {outcome.held_out:.3f} nats/byte")
    print(f"unigram model   {outcome.unigram:.3f} nats/byte on the same held-out bytes")
    print(f"speed           {outcome.tokens_per_second:,.0f} tokens/s with {args.attention}")
    kind = "allocated on the GPU" if args.device == "cuda" else "resident, whole process"
    print(f"peak memory     {outcome.peak_bytes / 2**20:,.0f} MiB {kind}")
    print(f"loss curves     {args.output / 'loss.png'}")
    print(f"whole run       {time.perf_counter() - started:.0f} s")
    if outcome.learned:
        return 0
    print(
        f"FAILED: held-out loss {outcome.held_out:.3f} is not below the unigram model's "
        f"{outcome.unigram:.3f}",
        file=sys.stderr,
    )
    return 1


def main(argv: list[str] | None = None) -> int:
    """Run the training; returns the exit code."""
    started = time.perf_counter()
    args = parse_args(argv)
    import matplotlib  # noqa: F401  found missing now, not after the training

    torch.manual_seed(args.seed)
    size = choose_size(args)
    preset = PRESETS[size]
    batch, context = args.batch or preset.batch, args.context or preset.context
    precision = Precision(torch.device(args.device), DTYPES[args.dtype])
    corpus = load_corpus(args.data or standard_library(), args.max_bytes).to(precision.device)
    print(
        f"text: {len(corpus.train) / 1e6:.1f} MB in {corpus.train_files} files to train on, "
        f"{len(corpus.held_out) / 1e6:.2f} MB in {corpus.held_out_files} files held out"
    )
    if min(len(corpus.train), len(corpus.held_out)) <= context:
        print(f"--data: both parts must be longer than the context, {context}", file=sys.stderr)
        return 2
    if args.threads:
        torch.set_num_threads(args.threads)
    elif args.device == "cpu":
        pick_threads(preset, precision)
    machine = environment(precision.device)["device"]
    threads = f", {torch.get_num_threads()} threads" if args.device == "cpu" else ""
    print(f"machine: {machine}{threads}; {args.dtype}; size {size}; attention {args.attention}")
    speeds: list[StepSpeed] = []
    if not args.no_compare:
        print("\none training step of this model, implementations in turn")
        speeds = side_by_side(args, preset, precision, batch, context)
        print(speed_table(speeds), "\n")
    trainer = Trainer(preset, args.attention, context, precision, preset.learning_rate)
    max_steps = args.steps or preset.max_steps
    seconds = math.inf
    if args.time_limit:
        used = time.perf_counter() - started
        seconds = max(1.0, args.time_limit * (1 - ENDING_SHARE) - used)
    plan = Plan(batch, context, max_steps, seconds, preset.learning_rate, args.seed)
    outcome = train(trainer, corpus, plan)
    ending = 0.6 * ENDING_SHARE * args.time_limit if args.time_limit else math.inf
    sample = generate(trainer, args.prompt, SAMPLE_BYTES, ending, args.seed)
    write_outputs(args, size, context, trainer, speeds, outcome, sample)
    return report(args, outcome, sample, started)


if __name__ == "__main__":
    sys.exit(main())
