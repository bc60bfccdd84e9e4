"""Time what each feature costs against plain attention, side by side on one GPU.

Without arguments: bf16, 16k tokens, hidden size 2048, head dimensions 64 and 128: sliding window,
ALiBi, softcap, dropout (also against torch's) and variable length, each with its targets. Where
sm90's forward kernels serve, sm80's are timed beside them. Prints a table and writes JSON. A missed
target is reported; it does not change the exit code.
"""

from __future__ import annotations

import argparse
import math
import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from bench import ClockLog, command_line, device_times, environment
from bench_fwd_bwd import Attend, make_inputs, timed_calls
from bench_smem import sm80_alone
from report import mask_name, write_json
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from flash_attn import flash_attn_func, flash_attn_varlen_func
from flash_attn.modules.mha import get_alibi_slopes

TARGET_SECONDS = 0.05
WINDOW = (1023, 0)
SOFTCAP = 50.0
DROPOUT = 0.1
SHORTEST, LONGEST = 64, 8192  # of the sequences with different lengths
MIXED_TOKENS = 4  # times --tokens: their total
COLUMNS = (
    *("head_dim", "pass", "mask", "feature", "ms", "plain ms", "torch ms", "sm80 ms"),
    *("ratio", "target"),
)
LINE = "{:>8} {:4} {:6} {:14} {:>8} {:>8} {:>8} {:>8} {:>6} {:>6}  {}"


@dataclass(frozen=True)
class Feature:
    """One attention and what it may cost: a target times its share of the plain attention's time."""

    name: str
    attend: Attend
    targets: dict[str, float]  # by pass
    share: float = 1.0  # its visible pairs of query and key, of the plain attention's
    torch: Attend | None = None  # torch's counterpart, than which ours should not be slower


@dataclass(frozen=True)
class Group:
    """Features timed in turns with plain attention of the same mask, on the same inputs."""

    batch: int
    seqlen: int
    causal: bool
    features: list[Feature]


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--head-dims", type=int, nargs="+", default=[64, 128])
    add("--tokens", type=int, default=16384, help="batch x seqlen; the window's seqlen")
    add("--seqlen", type=int, default=4096, help="of everything but the window")
    add("--hidden", type=int, default=2048, help="heads x head_dim")
    add("--repeats", type=int, help=f"default: what fits into {TARGET_SECONDS} s per measurement")
    add("--seed", type=int, default=0)
    add("--json", type=Path, default=Path("build/features.json"), help="file to write")
    args = parser.parse_args(argv)
    if args.seqlen < 1 or args.tokens < SHORTEST or args.tokens % args.seqlen:
        parser.error(f"--seqlen: must divide --tokens {args.tokens}; got {args.seqlen}")
    if any(d < 1 or args.hidden % d for d in args.head_dims):
        parser.error(f"--head-dims: must divide --hidden {args.hidden}; got {args.head_dims}")
    if args.repeats is not None and args.repeats < 1:
        parser.error(f"--repeats: must be at least 1; got {args.repeats}")
    return args


def visible_pairs(seqlen: int, causal: bool, left: int | None = None) -> int:
    """Pairs of a query and a key that it sees; `left` is the window's, for causal masks."""
    if not causal:
        return seqlen**2
    width = seqlen if left is None else min(left + 1, seqlen)
    return width * (width + 1) // 2 + (seqlen - width) * width


def log_uniform_lengths(total: int, seed: int) -> list[int]:
    """Lengths in [SHORTEST, LONGEST], log-uniform but for the last, of the given sum."""
    rng = random.Random(seed)
    lengths: list[int] = []
    rest = total
    while rest:
        length = round(math.exp(rng.uniform(math.log(SHORTEST), math.log(LONGEST))))
        length = min(length, rest)
        if rest - length == 0 or rest - length >= SHORTEST:
            lengths.append(length)
            rest -= length
    return lengths


def with_options(**options: object) -> Attend:
    """flash_attn_func with these arguments."""
    return lambda q, k, v, causal: flash_attn_func(q, k, v, causal=causal, **options)


def targets(fwd: float, bwd: float) -> dict[str, float]:
    """Targets by pass."""
    return {"fwd": fwd, "bwd": bwd}


plain = with_options()  # what the features are compared with


def varlen(lengths: list[int], device: str) -> Attend:
    """The same tokens as (batch, seqlen, ...) holds, as sequences of these lengths."""
    offsets = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)
    bounds = (offsets, offsets, max(lengths), max(lengths))

    def attend(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
        rows = (x.flatten(0, 1) for x in (q, k, v))
        return flash_attn_varlen_func(*rows, *bounds, causal=causal).view_as(q)

    return attend


def torch_dropout(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """torch's FLASH_ATTENTION backend with dropout."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        out = F.scaled_dot_product_attention(q, k, v, dropout_p=DROPOUT, is_causal=causal)
    return out.transpose(1, 2)


def groups(args: argparse.Namespace, head_dim: int, device: str = "cuda") -> Iterator[Group]:
    """What is measured for one head dimension."""
    tokens, seqlen = args.tokens, args.seqlen
    slopes = torch.tensor(get_alibi_slopes(args.hidden // head_dim), device=device)
    share = visible_pairs(tokens, True, WINDOW[0]) / visible_pairs(tokens, True)
    window = with_options(window_size=WINDOW)
    yield Group(1, tokens, True, [Feature("window 1024", window, targets(1.35, 1.3), share)])
    features = [
        Feature("alibi", with_options(alibi_slopes=slopes), targets(1.25, 1.25)),
        Feature("softcap 50", with_options(softcap=SOFTCAP), targets(1.25, 1.25)),
        Feature(
            "dropout 0.1", with_options(dropout_p=DROPOUT), targets(1.5, 1.35), torch=torch_dropout
        ),
    ]
    yield Group(tokens // seqlen, seqlen, True, features)
    equal = varlen([seqlen] * (tokens // seqlen), device)
    lengths = log_uniform_lengths(MIXED_TOKENS * tokens, args.seed)
    mixed, batch = varlen(lengths, device), MIXED_TOKENS * tokens // seqlen
    for causal in (False, True):
        same = Feature("varlen equal", equal, targets(1.05, 1.05))
        yield Group(tokens // seqlen, seqlen, causal, [same])
        share = sum(visible_pairs(n, causal) for n in lengths)
        share /= batch * visible_pairs(seqlen, causal)
        # Backward: at least 85 % of the FLOP rate.
        mix = Feature("varlen mixed", mixed, targets(1.15, 1 / 0.85), share)
        yield Group(batch, seqlen, causal, [mix])


def make_row(feature: Feature, direction: str, times: dict[str, float]) -> dict[str, Any]:
    """One feature's figures; `ratio` is the time over the feature's share of the plain time.

    times: milliseconds of the feature, of "plain", and where they were measured of "torch NAME" and
    "sm80 NAME", than which the feature must not be slower.
    """
    ms, plain_ms = times[feature.name], times["plain"]
    torch_ms, sm80_ms = (times.get(f"{other} {feature.name}") for other in ("torch", "sm80"))
    ratio, target = ms / (feature.share * plain_ms), feature.targets[direction]
    met = ratio <= target and all(other is None or ms <= other for other in (torch_ms, sm80_ms))
    row = {"name": feature.name, "median_ms": ms, "reference_ms": plain_ms}
    row |= {"torch_ms": torch_ms, "sm80_ms": sm80_ms}
    return {**row, "share": feature.share, "ratio": ratio, "target": target, "met": met}


def on_sm80(attend: Attend) -> Attend:
    """The same call on sm80's kernels."""

    def attend_pinned(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
        import flash_attn_2_cuda as extension

        with sm80_alone(extension):
            return attend(q, k, v, causal)

    return attend_pinned


def has_sm90_forward() -> bool:
    """Whether this GPU's forward passes run on sm90's kernels."""
    import flash_attn_2_cuda as extension

    info = extension.build_info()
    built = {isa for isa, direction, *_ in info["kernels"] if direction == "fwd"}
    is_allowed = info["isa"] in ("", "sm90")
    return torch.cuda.get_device_capability() == (9, 0) and "sm90" in built and is_allowed


def measure(
    group: Group,
    head_dim: int,
    direction: str,
    args: argparse.Namespace,
    with_sm80: bool = False,
    device: str = "cuda",
) -> list[dict[str, Any]]:
    """Time a group; a row for each of its features.  with_sm80: beside sm80's kernels."""
    size = (group.batch, group.seqlen, args.hidden // head_dim, head_dim)
    inputs = make_inputs(size, torch.bfloat16, args.seed, device)
    providers = {"plain": plain}
    for feature in group.features:
        providers[feature.name] = feature.attend
        if feature.torch:
            providers[f"torch {feature.name}"] = feature.torch
        if with_sm80:
            providers[f"sm80 {feature.name}"] = on_sm80(feature.attend)
    results: dict[str, list[Tensor]] = {name: [] for name in providers}
    if direction == "bwd":
        results = {name: [f(*inputs[:3], group.causal)] for name, f in providers.items()}
    calls = timed_calls(direction, providers, results, inputs, group.causal)
    times = {n: t.median_ms for n, t in device_times(calls, TARGET_SECONDS, args.repeats).items()}
    cell = {"head_dim": head_dim, "pass": direction, "causal": group.causal}
    cell |= {"batch": group.batch, "seqlen": group.seqlen}
    return [{**cell, **make_row(feature, direction, times)} for feature in group.features]


def row_line(row: dict[str, Any]) -> str:
    """One line of the table."""
    times = (row["median_ms"], row["reference_ms"], row["torch_ms"], row["sm80_ms"])
    return LINE.format(
        *(row["head_dim"], row["pass"], mask_name(row["causal"]), row["name"]),
        *("-" if ms is None else f"{ms:.3f}" for ms in times),
        *(f"{row['ratio']:.3f}", f"{row['target']:.3f}", "" if row["met"] else "MISSED"),
    ).rstrip()


def main(argv: list[str] | None = None) -> int:
    """Measure what was asked for and write it; returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    args = parse_args(argv)
    if not torch.cuda.is_available():
        print("bench_features.py needs a CUDA GPU; torch sees none", file=sys.stderr)
        return 2
    facts = environment(torch.device("cuda", torch.cuda.current_device()))
    print(f"{facts['device']}, torch {facts['torch']}, CUDA {facts['cuda']}, bf16")
    print(LINE.format(*COLUMNS, "").rstrip())
    rows = []
    with ClockLog() as clocks:
        for head_dim in args.head_dims:
            for group in groups(args, head_dim):
                for direction in ("fwd", "bwd"):
                    with_sm80 = direction == "fwd" and has_sm90_forward()
                    found = measure(group, head_dim, direction, args, with_sm80)
                    print(*map(row_line, found), sep="\n", flush=True)
                    rows += found
    facts["clocks"] = clocks.summary()
    print(f"{sum(row['met'] for row in rows)} of {len(rows)} targets met; {facts['clocks']}")
    command = command_line("bench_features.py", argv)
    result = {"environment": facts, "command": command, "dtype": "bf16", "rows": rows}
    write_json(result, args.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
