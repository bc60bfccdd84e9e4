"""The papers' tables measured again: kernels, training throughput, peak memory."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from types import SimpleNamespace
from typing import Any

import bench_fwd_bwd
import torch
from bench_fwd_bwd import Attend, Shape, WrongResultError, load_provider, make_inputs
from gpt import Preset
from report import OURS, cell_line
from torch import Tensor
from training import Precision
from training_speed import compare_attention, speed_table

from . import ROOT, formulas

TOKENS, HIDDEN = 16384, 2048
SEQLENS = (512, 1024, 2048, 4096, 8192, 16384)
DIRECTIONS = ("fwd", "bwd", "fwd_bwd")
REPEATS = 10
UNFUSED = "unfused"
PROVIDERS = (OURS, "fa2", "cudnn", "efficient", UNFUSED)
MODELS = {
    "85M, d 64": Preset(12, 768, 12, 2048, 8, 1e-4, 0),
    "302M, d 128": Preset(24, 1024, 8, 2048, 8, 1e-4, 0),
}
CONTEXTS = (2048, 8192)
STEP_TOKENS = 16384
TRAINING_SECONDS = 3.0
MEMORY_HEADS, MEMORY_HEAD_DIM = 8, 128
MEMORY_SEQLENS = tuple(2**i for i in range(9, 19))  # 512 to 256k
BUILD_ENVIRONMENT = {"FLASH_ATTN_HEAD_DIMS": "64,128", "FLASH_ATTN_DTYPES": "bf16"}


def unfused(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """Attention with the score matrix in memory, all in the inputs' dtype."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    if causal:
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill_(hidden, -math.inf)
    return (scores.softmax(-1) @ v).transpose(1, 2)


def provider(name: str) -> Attend:
    """One of PROVIDERS."""
    return unfused if name == UNFUSED else load_provider(name)


def build_extension() -> None:
    """Compiles flash_attn_2_cuda in place where it is missing: head_dim 64 and 128, bf16."""
    probe = subprocess.run(
        [sys.executable, "-c", "import torch, flash_attn_2_cuda"], cwd=ROOT, capture_output=True
    )
    if probe.returncode == 0:
        return
    print("flash_attn_2_cuda is not built: python3 setup.py build_ext --inplace", flush=True)
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    subprocess.run(command, cwd=ROOT, check=True, env=os.environ | BUILD_ENVIRONMENT)


def tables_section(seqlens: tuple[int, ...] = SEQLENS) -> dict[str, Any]:
    """Forward, backward and both, by the method of bench_fwd_bwd.py with fewer repeats."""
    build_extension()
    providers = {name: provider(name) for name in PROVIDERS}
    args = SimpleNamespace(dtype="bf16", seed=0, no_check=False, no_flush=False, repeats=REPEATS)
    section: dict[str, Any] = {"dtype": "bf16", "repeats": REPEATS, "cells": [], "wrong": {}}
    for direction in DIRECTIONS:
        for head_dim in (64, 128):
            for causal in (False, True):
                for seqlen in seqlens:
                    shape = Shape(TOKENS // seqlen, seqlen, HIDDEN // head_dim, head_dim, causal)
                    try:
                        cell = bench_fwd_bwd.measure(shape, direction, providers, args)
                    except WrongResultError as error:
                        section["wrong"][f"{direction} {shape}"] = str(error)
                        print(f"WRONG {direction} {shape}: {error}", flush=True)
                        continue
                    section["cells"].append(cell)
                    print(cell_line(cell), flush=True)
                    torch.cuda.empty_cache()
    return section


# --- Training -------------------------------------------------------------------------------------


def training_section(contexts: tuple[int, ...] = CONTEXTS) -> dict[str, Any]:
    """Whole training steps of two models; where unfused attention does not fit, the others alone."""
    build_extension()
    precision = Precision(torch.device("cuda"), torch.bfloat16)
    section: dict[str, Any] = {"peak_tflops": formulas.PEAK_TFLOPS, "models": {}, "speeds": []}
    for name, preset in MODELS.items():
        section["models"][name] = {
            **asdict(preset),
            "parameters": formulas.model_parameters(preset.layers, preset.width),
        }
        for context in contexts:
            batch = max(1, STEP_TOKENS // context)
            speeds = []
            for attention in (("flash", "sdpa", "unfused"), ("flash", "sdpa")):
                try:
                    speeds = compare_attention(
                        preset, attention, context, batch, precision, TRAINING_SECONDS
                    )
                    break
                except torch.OutOfMemoryError:
                    torch.cuda.empty_cache()
            print(f"{name}\n{speed_table(speeds)}", flush=True)
            for speed in speeds:
                share = formulas.utilisation(
                    preset.layers, preset.width, context, speed.tokens_per_second
                )
                section["speeds"].append({"model": name, **asdict(speed), "utilisation": share})
            torch.cuda.empty_cache()
    return section


# --- Memory ---------------------------------------------------------------------------------------


def peak_bytes(run: Callable[[], object]) -> int | None:
    """Peak of what a call allocates beyond what was there; None when it does not fit."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    try:
        run()
        torch.cuda.synchronize()
    except torch.OutOfMemoryError:
        return None
    return torch.cuda.max_memory_allocated() - before


def memory_section(seqlens: tuple[int, ...] = MEMORY_SEQLENS) -> dict[str, Any]:
    """Peak bytes of one causal forward and backward, beyond q, k, v and the gradient of out."""
    build_extension()
    cells = []
    gave_up: set[str] = set()
    for seqlen in seqlens:
        shape = (1, seqlen, MEMORY_HEADS, MEMORY_HEAD_DIM)
        q, k, v, dout = make_inputs(shape, torch.bfloat16, seed=0)
        found: dict[str, int | None] = {}
        for name in PROVIDERS:
            if name in gave_up:  # longer sequences need more
                found[name] = None
                continue
            attend = provider(name)

            def both(attend: Attend = attend, q=q, k=k, v=v, dout=dout) -> object:
                return torch.autograd.grad(attend(q, k, v, True), (q, k, v), dout)

            try:
                found[name] = peak_bytes(both)
            except RuntimeError as error:  # a torch backend that refuses the shape
                if name == OURS:
                    raise
                print(f"  {name}: {str(error).splitlines()[0]}", flush=True)
                found[name] = None
            if found[name] is None:
                gave_up.add(name)
        cells.append({"seqlen": seqlen, "bytes": found})
        parts = [
            f"{name} {'-' if size is None else f'{size / 2**20:,.0f} MiB'}"
            for name, size in found.items()
        ]
        print(f"s{seqlen:<7d}" + "  ".join(parts), flush=True)
    return {
        "heads": MEMORY_HEADS,
        "head_dim": MEMORY_HEAD_DIM,
        "causal": True,
        "total_bytes": torch.cuda.get_device_properties("cuda").total_memory,
        "cells": cells,
    }
