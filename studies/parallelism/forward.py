"""The sections on the forward pass: which thread block takes which tiles, and which loop is outside."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from . import check, formulas
from .library import (
    Forward,
    Library,
    Problem,
    forward_unit,
    make_forward,
    query_blocks,
)
from .profiler import Profiler, forward_case
from .timing import times_in_turns
from .variants import HEAD_DIMS, MAPPINGS

ALL_PAIRS = tuple(2**i for i in range(10))  # batch x heads, 1 to 512
ALL_SEQLENS = tuple(2**i for i in range(9, 17))  # 512 to 64k
MOST_ROWS = 2**20  # pairs x seqlen: beyond it every mapping has many waves
HEADS = 16
LOOP_ORDERS = ("row_splits", "keys_outside", "tile_grid")
LOOP_ORDER_SHAPES = ((4, 4096, 16), (1, 16384, 16))  # batch, seqlen, heads


def sm_count() -> int:
    """Of the current GPU."""
    return torch.cuda.get_device_properties("cuda").multi_processor_count


def splits_of(name: str, problem: Problem, sms: int, per_sm: int) -> int:
    """The third grid dimension of a mapping, or the grid of the persistent one."""
    blocks = query_blocks(problem.seqlen)
    if name == "persistent":
        return formulas.grid_blocks(name, problem.pairs, blocks, 1, sms, per_sm)
    if name in ("row_splits", "keys_outside"):
        return formulas.row_splits(problem.pairs, sms, per_sm, blocks)
    return 1


def check_forward(library: Library, names: tuple[str, ...]) -> dict[str, str]:
    """What each wrong kernel gets wrong, by "name d64 causal"."""
    keys = [(name, d, causal) for name in names for d in HEAD_DIMS for causal in (False, True)]
    found = check.failures(library.path, [check.forward_case(*key) for key in keys])
    return {
        f"{name} d{d} {_mask(causal)}": why
        for (name, d, causal), why in zip(keys, found, strict=True)
        if why
    }


def _mask(causal: bool) -> str:
    return "causal" if causal else "full"


# --- Mapping --------------------------------------------------------------------------------------


def mapping_problems(pairs: tuple[int, ...], seqlens: tuple[int, ...]) -> Iterator[Problem]:
    """The sweep, small ones first."""
    for head_dim in HEAD_DIMS:
        for causal in (True, False):
            for seqlen in seqlens:
                for count in pairs:
                    if count * seqlen <= MOST_ROWS:
                        heads = min(count, HEADS)
                        yield Problem(count // heads, seqlen, heads, head_dim, causal)


def mapping_section(
    library: Library,
    profiler: Profiler,
    pairs: tuple[int, ...] = ALL_PAIRS,
    seqlens: tuple[int, ...] = ALL_SEQLENS,
) -> dict[str, Any]:
    """All mappings over batch x heads and sequence length."""
    del profiler
    sms = sm_count()
    found = check_forward(library, tuple(MAPPINGS))
    facts = {
        f"{name} d{head_dim} {_mask(causal)}": library.facts(*forward_unit(name, head_dim), causal)
        for name in MAPPINGS
        for head_dim in HEAD_DIMS
        for causal in (False, True)
    }
    pools: dict[int, Forward] = {}
    cells = []
    for problem in mapping_problems(pairs, seqlens):
        if problem.head_dim not in pools:
            pools.clear()
            most = Problem(1, MOST_ROWS, 1, problem.head_dim, False)
            pools[problem.head_dim] = make_forward(library, most)
        run = _part_of(pools[problem.head_dim], problem)
        cells.append(_measure_mapping(run, sms, facts, found))
        print(mapping_line(cells[-1]), flush=True)
    return {"sms": sms, "wrong": found, "facts": facts, "cells": cells}


def _part_of(pool: Forward, problem: Problem) -> Forward:
    """Tensors of a problem in the memory of a larger one."""
    rows = problem.batch * problem.seqlen * problem.heads

    def part(tensor: Tensor) -> Tensor:
        return tensor.view(-1)[: rows * problem.head_dim].view(problem.shape)

    tensors = [part(t) for t in (pool.q, pool.k, pool.v, pool.out)]
    return Forward(pool.library, problem, *tensors, pool.lse.view(-1)[:rows])


def _measure_mapping(
    run: Forward, sms: int, facts: dict[str, dict[str, int]], found: dict[str, str]
) -> dict[str, Any]:
    problem = run.problem
    blocks = query_blocks(problem.seqlen)
    calls, mappings = {}, {}
    for name in MAPPINGS:
        key = f"{name} d{problem.head_dim} {_mask(problem.causal)}"
        if key in found:
            continue
        per_sm = facts[key]["blocks_per_sm"]
        splits = splits_of(name, problem, sms, per_sm)
        grid = formulas.grid_blocks(name, problem.pairs, blocks, splits, sms, per_sm)
        waves = formulas.Waves(grid, sms, per_sm)
        mappings[name] = {
            "splits": splits,
            "blocks": grid,
            "waves": waves.waves,
            "idle_sms": waves.idle_sms,
        }
        calls[name] = lambda name=name, splits=splits: run.run(name, splits)
    flops = formulas.forward_flops(problem.pairs, problem.seqlen, problem.head_dim, problem.causal)
    for name, milliseconds in times_in_turns(calls).items():
        mappings[name] |= {"ms": milliseconds, "tflops": flops / milliseconds / 1e9}
    return {
        "pairs": problem.pairs,
        "seqlen": problem.seqlen,
        "head_dim": problem.head_dim,
        "causal": problem.causal,
        "mappings": mappings,
    }


def mapping_line(cell: dict[str, Any]) -> str:
    """One aligned line for one cell."""
    shape = (
        f"d{cell['head_dim']:<4d}{_mask(cell['causal']):7s}s{cell['seqlen']:<6d}"
        f"pairs {cell['pairs']:<4d}"
    )
    parts = [
        f"{name} {m['tflops']:5.0f} ({m['waves']:.2f} waves)"
        for name, m in cell["mappings"].items()
    ]
    return f"{shape}  " + "  ".join(parts)


# --- Loop order -----------------------------------------------------------------------------------


def loop_order_section(library: Library, profiler: Profiler) -> dict[str, Any]:
    """Queries outside against keys outside, on the same grid; and version 2's grid beside them."""
    sms = sm_count()
    found = check_forward(library, LOOP_ORDERS)
    cells, cases = [], []
    for head_dim in HEAD_DIMS:
        for batch, seqlen, heads in LOOP_ORDER_SHAPES:
            for causal in (False, True):
                problem = Problem(batch, seqlen, heads, head_dim, causal)
                cell = _measure_loop_order(library, problem, found, sms)
                cells.append(cell)
                for name, order in cell["orders"].items():
                    cases.append((order, forward_case(problem, name, cell["splits"])))
                print(loop_order_line(cell), flush=True)
    counters, notice = profiler.count([case for _, case in cases])
    for (order, _), values in zip(cases, counters, strict=False):
        order["counters"] = values
    return {"sms": sms, "wrong": found, "cells": cells, "notice": notice}


def _measure_loop_order(
    library: Library, problem: Problem, found: dict[str, str], sms: int
) -> dict[str, Any]:
    run = make_forward(library, problem, partial=True)
    shape = (problem.pairs, problem.seqlen, problem.head_dim)
    # The same splits for both orders: those of the kernel with fewer thread blocks per multiprocessor.
    units = [forward_unit(n, problem.head_dim) for n in ("row_splits", "keys_outside")]
    per_sm = min(library.facts(*unit, problem.causal)["blocks_per_sm"] for unit in units)
    splits = splits_of("row_splits", problem, sms, per_sm)
    calls, orders = {}, {}
    for name in LOOP_ORDERS:
        if f"{name} d{problem.head_dim} {_mask(problem.causal)}" in found:
            continue
        if name == "keys_outside":
            moved = formulas.keys_outside_bytes(*shape, problem.causal, splits)
        else:
            moved = formulas.queries_outside_bytes(*shape, problem.causal)
        orders[name] = {"read": moved[0], "written": moved[1], "counters": None}
        calls[name] = lambda name=name: run.run(name, splits)
    flops = formulas.forward_flops(*shape, problem.causal)
    for name, milliseconds in times_in_turns(calls).items():
        orders[name] |= {"ms": milliseconds, "tflops": flops / milliseconds / 1e9}
    least = formulas.least_bytes(*shape)
    return {
        "pairs": problem.pairs,
        "seqlen": problem.seqlen,
        "head_dim": problem.head_dim,
        "causal": problem.causal,
        "splits": splits,
        "least_read": least[0],
        "least_written": least[1],
        "orders": orders,
    }


def loop_order_line(cell: dict[str, Any]) -> str:
    """One aligned line for one problem."""
    parts = [
        f"{name} {o['tflops']:5.0f} TFLOP/s, {(o['read'] + o['written']) / 1e9:7.2f} GB"
        for name, o in cell["orders"].items()
    ]
    return (
        f"d{cell['head_dim']:<4d}{_mask(cell['causal']):7s}s{cell['seqlen']:<6d}"
        f"pairs {cell['pairs']:<4d}  " + "  ".join(parts)
    )
