"""What runs under the profiler: every case of a JSON list in a file, launched once."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from .library import MAIN, PREPARE, Library, Problem, make_backward, make_forward
from .profiler import Case
from .variants import BackwardVariant


def launch(library: Library, case: Case) -> None:
    """The case's kernel, exactly once."""
    problem = Problem(*case["problem"], case["causal"])
    if case["kind"] == "forward":
        make_forward(library, problem, partial=True).run(case["name"], case["splits"])
        torch.cuda.synchronize()
        return
    fields = case["variant"]
    variant = BackwardVariant(**fields) if fields else None
    run = make_backward(library, problem, forward=False)  # the forward pass would be counted too
    run.run(variant, PREPARE)
    run.run(variant, MAIN)
    torch.cuda.synchronize()


def main() -> int:
    """Launches everything; returns the exit code."""
    library = Library(Path(sys.argv[1]))
    for case in json.loads(Path(sys.argv[2]).read_text()):
        launch(library, case)
    return 0


if __name__ == "__main__":
    sys.exit(main())
