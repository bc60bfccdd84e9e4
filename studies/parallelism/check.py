"""Every variant against a float32 reference, in a process of its own: one that faults takes nothing along.

`failures` starts this module as a program, which reads a JSON list of cases from standard input and
prints a line per checked case; where it ends early, the case it was at is wrong and the rest go on
in a new process.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from bench_fwd_bwd import MAX_TOLERANCE, NORM_TOLERANCE, difference
from torch import Tensor

from . import ROOT
from .library import Library, Problem, make_backward, make_forward, reference
from .variants import BackwardVariant

SHAPES = (
    (2, 1000, 3),
    (1, 2048, 5),
    (8, 640, 37),
)  # batch, seqlen, heads: ragged; long; many tiles
LSE_TOLERANCE = 1e-3
SPLITS = 3  # not a divisor of the query blocks
PERSISTENT_BLOCKS = 5
TIMEOUT_SECONDS = 120

Case = dict[str, Any]


def forward_case(name: str, head_dim: int, causal: bool) -> Case:
    """A forward kernel."""
    return {"kind": "forward", "name": name, "head_dim": head_dim, "causal": causal}


def backward_case(variant: BackwardVariant | None, head_dim: int, causal: bool) -> Case:
    """A backward variant, None for the extension's own kernel."""
    fields = None if variant is None else dict(vars(variant))
    return {"kind": "backward", "variant": fields, "head_dim": head_dim, "causal": causal}


def failures(library: Path, cases: Sequence[Case]) -> list[str | None]:
    """What each case gets wrong, None where nothing."""
    found: list[str | None] = []
    while len(found) < len(cases):
        command = [sys.executable, "-m", "studies.parallelism.check", str(library)]
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            text=True, cwd=ROOT,
        )  # fmt: skip
        try:
            out, err = process.communicate(json.dumps(cases[len(found) :]), TIMEOUT_SECONDS)
            why = err.strip().splitlines()[-1] if err.strip() else f"exit {process.returncode}"
        except subprocess.TimeoutExpired:
            process.kill()
            out, _ = process.communicate()
            why = f"did not end within {TIMEOUT_SECONDS} s"
        found += [json.loads(line)["why"] for line in out.splitlines() if line.startswith("{")]
        if len(found) < len(cases):
            found.append(why)
        for case, reason in zip(cases, found, strict=False):
            if reason and not case.get("told"):
                case["told"] = True
                print(f"WRONG {case}: {reason}", flush=True)
    return found


def wrong(results: dict[str, Tensor], expected: dict[str, Tensor]) -> str | None:
    """What differs from the reference by more than rounding of bf16; None when nothing does."""
    for name, got in results.items():
        if name == "lse":
            worst = (got - expected[name]).abs().max().item()
            if not worst <= LSE_TOLERANCE:
                return f"lse differs by {worst:.2e}"
            continue
        norm, worst = difference(got, expected[name])
        if not (norm <= NORM_TOLERANCE["bf16"] and worst <= MAX_TOLERANCE["bf16"]):
            return f"{name} differs by {norm:.2e} of its norm, {worst:.2e} of its largest element"
    return None


@cache
def _inputs(library: Library, problem: Problem, backward: bool) -> tuple[Any, dict[str, Tensor]]:
    """Tensors and what must come out; the same for every variant."""
    run = make_backward(library, problem) if backward else make_forward(library, problem, True)
    expected = reference(run.q, run.k, run.v, problem.causal, run.dout if backward else None)
    return run, expected


def check_case(library: Library, case: Case) -> str | None:
    """Runs a case at every shape, on results that hold NaN."""
    for batch, seqlen, heads in SHAPES:
        problem = Problem(batch, seqlen, heads, case["head_dim"], case["causal"])
        backward = case["kind"] == "backward"
        run, expected = _inputs(library, problem, backward)
        names = ("dq", "dk", "dv") if backward else ("out", "lse")
        scratch = ("dq_accum", "rows") if backward else ("o_partial", "row_partial")
        for name in (*names, *scratch):
            getattr(run, name).fill_(torch.nan)
        if backward:
            run.run(BackwardVariant(**case["variant"]) if case["variant"] else None)
        else:
            name = case["name"]
            run.run(name, PERSISTENT_BLOCKS if name == "persistent" else SPLITS)
        torch.cuda.synchronize()
        why = wrong({name: getattr(run, name) for name in names}, expected)
        if why:
            return f"{problem}: {why}"
    return None


def main() -> int:
    """Checks the cases on standard input; a CUDA error ends the process."""
    library = Library(Path(sys.argv[1]))
    for case in json.load(sys.stdin):
        print(json.dumps({"why": check_case(library, case)}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
