"""Time attention's forward and backward against torch's backends, side by side on one GPU.

Without arguments: bf16, 16k tokens, hidden size 2048, head dimensions 64, 128 and 256, causal and
full, sequence lengths 512 to 16k. Every cell checks our results against torch's first. Prints a
line per shape and a summary, and writes JSON; --plot draws it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from bench import ClockLog, command_line, device_times, environment, host_microseconds
from report import (
    LABELS,
    OURS,
    Cell,
    attention_flops,
    cell_line,
    finish,
    mask_name,
    summary,
)
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

PASSES = {
    "fwd": ("fwd",),
    "bwd": ("bwd",),
    "fwd_bwd": ("fwd_bwd",),
    "both": ("fwd", "bwd"),
    "all": ("fwd", "bwd", "fwd_bwd"),
}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
BACKENDS = {
    "fa2": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
TARGET_SECONDS = 0.1
# Differences that rounding explains, relative to the norm and to the largest element.
NORM_TOLERANCE = {"bf16": 1.5e-2, "fp16": 3e-3}
MAX_TOLERANCE = {"bf16": 4e-2, "fp16": 1e-2}
HOST_SHAPE = (1, 64, 2, 64)  # batch, seqlen, heads, head_dim: the GPU is always done first

Attend = Callable[[Tensor, Tensor, Tensor, bool], Tensor]


@dataclass(frozen=True)
class Shape:
    """One problem; q, k and v are (batch, seqlen, heads, head_dim)."""

    batch: int
    seqlen: int
    heads: int
    head_dim: int
    causal: bool

    def __str__(self) -> str:
        return (
            f"b{self.batch} s{self.seqlen} h{self.heads} d{self.head_dim} {mask_name(self.causal)}"
        )


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--pass", dest="passes", choices=tuple(PASSES), default="both", help="both: fwd, then bwd")
    add("--head-dims", type=int, nargs="+", default=[64, 128, 256])
    add("--seqlens", type=int, nargs="+", default=[512, 1024, 2048, 4096, 8192, 16384])
    mask = parser.add_mutually_exclusive_group()
    mask.add_argument("--causal", dest="masks", action="store_const", const=[True])
    mask.add_argument("--full", dest="masks", action="store_const", const=[False])
    add("--tokens", type=int, default=16384, help="batch x seqlen")
    add("--hidden", type=int, default=2048, help="heads x head_dim")
    add("--dtype", choices=tuple(DTYPES), default="bf16")
    add("--providers", nargs="+", choices=tuple(LABELS), default=[OURS, "fa2", "cudnn"])
    add("--repeats", type=int, help=f"default: what fits into {TARGET_SECONDS} s per provider")
    add("--no-flush", action="store_true", help="leave the L2 cache as the call before left it")
    add("--no-check", action="store_true", help="time without comparing the results first")
    add("--no-host", action="store_true", help="leave out the host time per call")
    add("--seed", type=int, default=0)
    add("--json", type=Path, default=Path("build/fwd_bwd.json"), help="file to write")
    add("--plot", type=Path, nargs="?", const=Path("build/fwd_bwd.png"), help="PNG to draw")
    parser.set_defaults(masks=[False, True])
    args = parser.parse_args(argv)
    if any(s < 1 or args.tokens % s for s in args.seqlens):
        parser.error(f"--seqlens: must divide --tokens {args.tokens}; got {args.seqlens}")
    if any(d < 1 or args.hidden % d for d in args.head_dims):
        parser.error(f"--head-dims: must divide --hidden {args.hidden}; got {args.head_dims}")
    if args.repeats is not None and args.repeats < 1:
        parser.error(f"--repeats: must be at least 1; got {args.repeats}")
    return args


def shapes(args: argparse.Namespace) -> Iterator[Shape]:
    """The problems asked for: head dimension, mask, then sequence length."""
    for head_dim in args.head_dims:
        for causal in args.masks:
            for seqlen in args.seqlens:
                heads = args.hidden // head_dim
                yield Shape(args.tokens // seqlen, seqlen, heads, head_dim, causal)


def load_provider(name: str) -> Attend:
    """The attention called `name`, on (batch, seqlen, heads, head_dim)."""
    if name == OURS:
        from flash_attn import flash_attn_func

        return lambda q, k, v, causal: flash_attn_func(q, k, v, causal=causal)
    backend = BACKENDS[name]

    def attend(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2)

    return attend


def make_inputs(
    shape: tuple[int, ...], dtype: torch.dtype, seed: int, device: str = "cuda"
) -> list[Tensor]:
    """q, k, v (which require gradients) and dout, standard normal."""
    generator = torch.Generator(device).manual_seed(seed)
    tensors = [
        torch.randn(shape, generator=generator, device=device, dtype=dtype) for _ in range(4)
    ]
    for x in tensors[:3]:
        x.requires_grad_()
    return tensors


def run_providers(
    providers: dict[str, Attend], inputs: list[Tensor], causal: bool, backward: bool
) -> dict[str, list[Tensor]]:
    """[out], or [out, dq, dk, dv], of each; a torch backend that refuses the shape is left out."""
    q, k, v, dout = inputs
    results = {}
    for name, attend in providers.items():
        try:
            out = attend(q, k, v, causal)
            gradients = ()
            if backward:
                gradients = torch.autograd.grad(out, (q, k, v), dout, retain_graph=True)
            results[name] = [out, *gradients]
        except RuntimeError as error:
            if name == OURS:
                raise
            print(f"  {name}: {str(error).splitlines()[0]}")
    return results


def difference(ours: Tensor, other: Tensor) -> tuple[float, float]:
    """Norm of the difference over the norm, and largest difference over the largest element."""
    ours, other = ours.detach().float(), other.detach().float()
    delta = ours - other
    worst = delta.abs().max() / other.abs().max()
    return (delta.norm() / other.norm()).item(), worst.item()


class WrongResultError(Exception):
    """Our result is not torch's; the message says by how much."""


def check(results: dict[str, list[Tensor]], dtype: str) -> None:
    """Compare ours with the first torch backend; raises WrongResultError when they disagree."""
    others = [name for name in results if name != OURS]
    if OURS not in results or not others:
        return
    names = ("out", "dq", "dk", "dv")
    for name, ours, other in zip(names, results[OURS], results[others[0]], strict=False):
        norm, worst = difference(ours, other)
        if not (norm <= NORM_TOLERANCE[dtype] and worst <= MAX_TOLERANCE[dtype]):
            raise WrongResultError(
                f"{name} differs from {others[0]} by {norm:.2e} of its norm (allowed "
                f"{NORM_TOLERANCE[dtype]}), {worst:.2e} of its largest element (allowed "
                f"{MAX_TOLERANCE[dtype]})"
            )


def timed_calls(
    direction: str,
    providers: dict[str, Attend],
    results: dict[str, list[Tensor]],
    inputs: list[Tensor],
    causal: bool,
) -> dict[str, Callable[[], object]]:
    """What is timed, by provider: the forward, the backward of a recorded graph, or both."""
    q, k, v, dout = inputs

    def forward(attend: Attend) -> Tensor:
        with torch.no_grad():
            return attend(q, k, v, causal)

    def backward(out: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(out, (q, k, v), dout, retain_graph=True)

    if direction == "fwd":
        return {name: (lambda f=providers[name]: forward(f)) for name in results}
    if direction == "bwd":
        return {name: (lambda out=results[name][0]: backward(out)) for name in results}
    return {name: (lambda f=providers[name]: backward(f(q, k, v, causal))) for name in results}


def measure(
    shape: Shape, direction: str, providers: dict[str, Attend], args: argparse.Namespace
) -> Cell:
    """Check and time one shape."""
    size = (shape.batch, shape.seqlen, shape.heads, shape.head_dim)
    inputs = make_inputs(size, DTYPES[args.dtype], args.seed)
    results = run_providers(providers, inputs, shape.causal, backward=direction != "fwd")
    if not args.no_check:
        check(results, args.dtype)
    calls = timed_calls(direction, providers, results, inputs, shape.causal)
    times = device_times(calls, TARGET_SECONDS, args.repeats, flush=not args.no_flush)
    flops = attention_flops(
        direction, shape.batch, shape.heads, shape.seqlen, shape.head_dim, shape.causal
    )
    measured = {
        name: {**asdict(t), "tflops": flops / t.median_ms / 1e9} for name, t in times.items()
    }
    return {"direction": direction, **asdict(shape), "providers": measured}


class Nothing(torch.autograd.Function):
    """What torch's autograd takes by itself for a function of q, k and v: no kernel is launched."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        ctx.save_for_backward(q, k, v)
        return q.detach()

    @staticmethod
    def backward(ctx, dout: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return dout, dout, dout


def host_times(providers: dict[str, Attend], dtype: torch.dtype) -> dict[str, dict[str, float]]:
    """Host microseconds per call, causal: forward without gradients, forward and backward.

    "nothing": an autograd.Function without kernels.
    """
    providers = providers | {"nothing": lambda q, k, v, causal: Nothing.apply(q, k, v)}
    inputs = make_inputs(HOST_SHAPE, dtype, seed=0)
    results = run_providers(providers, inputs, True, backward=True)
    times: dict[str, dict[str, float]] = {name: {} for name in results}
    for direction in ("fwd", "fwd_bwd"):
        calls = timed_calls(direction, providers, results, inputs, True)
        for name, microseconds in host_microseconds(calls).items():
            times[name][direction] = microseconds
    return times


def main(argv: list[str] | None = None) -> int:
    """Measure what was asked for and write it; returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    args = parse_args(argv)
    if not torch.cuda.is_available():
        print("bench_fwd_bwd.py needs a CUDA GPU; torch sees none", file=sys.stderr)
        return 2
    device = torch.device("cuda", torch.cuda.current_device())
    result = {
        "environment": environment(device),
        "command": command_line("bench_fwd_bwd.py", argv),
        "dtype": args.dtype,
        "cells": [],
        "wrong": [],
        "host_us": {},
    }
    facts = result["environment"]
    print(f"{facts['device']}, torch {facts['torch']}, CUDA {facts['cuda']}, {args.dtype}")
    providers = {name: load_provider(name) for name in args.providers}
    if not args.no_host:  # first, and without the clock log, which takes time from the host
        result["host_us"] = host_times(providers, DTYPES[args.dtype])
    with ClockLog() as clocks:
        for direction in PASSES[args.passes]:
            for shape in shapes(args):
                try:
                    result["cells"].append(measure(shape, direction, providers, args))
                    print(cell_line(result["cells"][-1]), flush=True)
                except WrongResultError as error:
                    result["wrong"].append(f"{direction} {shape}: {error}")
                    print("WRONG", result["wrong"][-1], flush=True)
    facts["clocks"] = clocks.summary()
    print(f"\nclocks {facts['clocks']}\n{summary(result)}")
    code = finish(result, args.json)
    if args.plot:
        from plot import plot_speed

        args.plot.parent.mkdir(parents=True, exist_ok=True)
        plot_speed(result, args.plot)
    return code


if __name__ == "__main__":
    sys.exit(main())
