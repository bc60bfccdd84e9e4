"""End-to-end training speed: one GPT, several attention implementations, tokens per second.

Times whole training steps (forward, backward, clipping, AdamW) of the model of train.py on random
bytes, implementations in turn, and the peak memory of a step. Prints a table and writes JSON.
"""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import asdict
from pathlib import Path

os.environ.setdefault("KINETO_LOG_LEVEL", "9")  # the profiler's own messages tear the table

import torch
from bench import command_line, environment
from gpt import ATTENTION_NAMES, PRESETS, Preset
from report import write_json
from training import DTYPES, Precision
from training_speed import StepSpeed, compare_attention, speed_table

CONTEXTS = {"cpu": [256, 1024, 2048], "cuda": [1024, 2048, 4096, 8192]}
SIZE = {"cpu": "small", "cuda": "large"}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line; options left out follow the device."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--size", choices=tuple(PRESETS), help="default: large on cuda, small on the CPU")
    add("--contexts", type=int, nargs="+", help="bytes per window")
    add("--tokens", type=int, help="bytes per step; default: the size's batch x context")
    add("--attention", nargs="+", choices=ATTENTION_NAMES, default=list(ATTENTION_NAMES))
    add("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    add("--dtype", choices=tuple(DTYPES), help="default: bfloat16 on cuda, float32 on the CPU")
    add("--seconds", type=float, default=10.0, help="about how long each context is timed")
    add("--json", type=Path, default=Path("build/train_speed.json"), help="file to write")
    args = parser.parse_args(argv)
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    args.dtype = args.dtype or ("bfloat16" if args.device == "cuda" else "float32")
    args.size = args.size or SIZE[args.device]
    args.contexts = args.contexts or CONTEXTS[args.device]
    return args


def measure(args: argparse.Namespace, preset: Preset, precision: Precision) -> list[StepSpeed]:
    """All implementations at all contexts, with the same tokens per step where memory allows."""
    tokens = args.tokens or preset.batch * preset.context
    speeds: list[StepSpeed] = []
    for context in args.contexts:
        speeds += compare_attention(
            preset,
            tuple(args.attention),
            context,
            max(1, tokens // context),
            precision,
            args.seconds,
        )
        print(f"context {context} done", file=sys.stderr)
    return speeds


def main(argv: list[str] | None = None) -> int:
    """Measure and write; returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    args = parse_args(argv)
    preset = PRESETS[args.size]
    precision = Precision(torch.device(args.device), DTYPES[args.dtype])
    facts = environment(precision.device)
    print(f"{facts['device']}, torch {facts['torch']}, {args.dtype}, size {args.size}")
    speeds = measure(args, preset, precision)
    print(speed_table(speeds))
    result = {
        "environment": facts,
        "command": command_line("bench_train.py", argv),
        "size": args.size,
        "model": asdict(preset),
        "dtype": args.dtype,
        "speeds": [asdict(speed) for speed in speeds],
    }
    write_json(result, args.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
