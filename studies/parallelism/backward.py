"""The section on the backward pass: what each of version 2's choices contributes, one at a time."""

from __future__ import annotations

from typing import Any

from . import check, formulas
from .library import MAIN, PREPARE, Library, Problem, make_backward
from .profiler import Profiler, backward_case
from .timing import times_in_turns
from .variants import HEAD_DIMS, BackwardVariant, backward_variants

HIDDEN = 2048
SHAPES = ((8, 2048), (1, 16384))  # batch, seqlen: many heads, and long sequences
COUNTED = (1, 2048, 8)  # batch, seqlen, heads of the launches that the profiler repeats
SHIPPED = "shipped"


def _mask(causal: bool) -> str:
    return "causal" if causal else "full"


def check_backward(library: Library, head_dim: int) -> dict[str, str]:
    """What each wrong kernel gets wrong, by name."""
    keys = [(v, causal) for v in [*backward_variants(head_dim), None] for causal in (False, True)]
    cases = [check.backward_case(variant, head_dim, causal) for variant, causal in keys]
    found = check.failures(library.path, cases)
    return {key_of(v): why for (v, _), why in zip(keys, found, strict=True) if why}


def key_of(variant: BackwardVariant | None) -> str:
    """Name of a variant in the results."""
    if variant is None:
        return SHIPPED
    return variant.unit + ("" if variant.key_parallel else "_per_head")


def facts_of(library: Library, head_dim: int, variant: BackwardVariant | None) -> dict[str, int]:
    """Registers, memory and thread blocks per multiprocessor."""
    unit = variant.unit if variant else f"shipped_backward_hd{head_dim}"
    return library.facts(unit, 0, False)


def backward_section(library: Library, profiler: Profiler) -> dict[str, Any]:
    """Every variant at every shape, and its shared memory traffic."""
    section: dict[str, Any] = {"wrong": {}, "variants": {}, "cells": [], "notice": None}
    for head_dim in HEAD_DIMS:
        found = check_backward(library, head_dim)
        section["wrong"] |= {f"d{head_dim} {name}": why for name, why in found.items()}
        variants = [v for v in [*backward_variants(head_dim), None] if key_of(v) not in found]
        records = {key_of(v): _record(library, head_dim, v) for v in variants}
        section["variants"][str(head_dim)] = records
        for batch, seqlen in SHAPES:
            for causal in (False, True):
                problem = Problem(batch, seqlen, HIDDEN // head_dim, head_dim, causal)
                section["cells"].append(_measure(library, problem, variants))
                print(backward_line(section["cells"][-1]), flush=True)
        problem = Problem(*COUNTED, head_dim, False)
        cases = [backward_case(problem, variant) for variant in variants]
        counters, notice = profiler.count(cases)
        section["notice"] = section["notice"] or notice
        for variant, values in zip(variants, counters, strict=False):
            records[key_of(variant)]["counters"] = values
    section["counted"] = dict(zip(("batch", "seqlen", "heads"), COUNTED, strict=True))
    return section


def _record(library: Library, head_dim: int, variant: BackwardVariant | None) -> dict[str, Any]:
    """What is known of a variant before it is timed."""
    record: dict[str, Any] = {"facts": facts_of(library, head_dim, variant), "counters": None}
    if variant is not None:
        batch, seqlen, heads = COUNTED
        read, written = formulas.shared_bytes(variant, batch * heads, seqlen, False)
        record |= {"shared_read": read, "shared_written": written}
    return record


def _measure(
    library: Library, problem: Problem, variants: list[BackwardVariant | None]
) -> dict[str, Any]:
    """Times of the main kernel, without the preparation and the conversion of dQ."""
    run = make_backward(library, problem)
    calls = {}
    for variant in variants:
        # Rows depend on the tile: each variant has its own, made once.
        run.run(variant, PREPARE)
        rows, dq_accum = run.rows.clone(), run.dq_accum
        own = type(run)(**{**vars(run), "rows": rows, "dq_accum": dq_accum})
        calls[key_of(variant)] = lambda own=own, variant=variant: own.run(variant, MAIN)
    flops = formulas.backward_flops(problem.pairs, problem.seqlen, problem.head_dim, problem.causal)
    measured = {
        name: {"ms": ms, "tflops": flops / ms / 1e9} for name, ms in times_in_turns(calls).items()
    }
    return {
        "batch": problem.batch,
        "seqlen": problem.seqlen,
        "heads": problem.heads,
        "head_dim": problem.head_dim,
        "causal": problem.causal,
        "variants": measured,
    }


def backward_line(cell: dict[str, Any]) -> str:
    """One line for one problem."""
    parts = [
        f"{name.removeprefix('backward_').split('_', 1)[-1]} {v['tflops']:.0f}"
        for name, v in cell["variants"].items()
    ]
    shape = f"d{cell['head_dim']} {_mask(cell['causal'])} b{cell['batch']} s{cell['seqlen']}"
    return f"{shape}: " + ", ".join(parts)
