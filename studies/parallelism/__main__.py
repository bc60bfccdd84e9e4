"""Measures why the kernels are mapped to the GPU as they are, or shows what was measured.

python3 -m studies.parallelism                           build, check and measure everything (GPU)
python3 -m studies.parallelism --only mapping backward   these sections; the others keep their results
python3 -m studies.parallelism --show                    tables of the last run, no GPU
python3 -m studies.parallelism --show --docs --plots     and fills docs/parallelism.md, and draws
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from pathlib import Path, PurePath
from typing import Any

from report import write_json

from . import ROOT
from .report import RESULT_FILE, RESULTS, SECTIONS, text_report, update_docs


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python3 -m studies.parallelism", description=__doc__.split("\n\n")[0]
    )
    add = parser.add_argument
    add("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS), help="sections to measure")
    add(
        "--json",
        type=Path,
        default=ROOT / RESULT_FILE,
        help="file to write, or to read with --show",
    )
    add("--plots", type=Path, nargs="?", const=RESULTS, help="draws into this folder")
    add("--show", action="store_true", help="measures nothing: reads --json")
    add("--docs", action="store_true", help="fills docs/parallelism.md from the result")
    add("--no-counters", action="store_true", help="leaves the profiler out")
    return parser.parse_args(argv)


def command_line(argv: list[str]) -> str:
    """The command as a reader would repeat it."""
    words = [PurePath(word).name if word.startswith("/") else word for word in argv]
    return shlex.join(["python3", "-m", "studies.parallelism", *words])


def read_result(path: Path) -> dict[str, Any]:
    """The result in a file, or an empty one."""
    if not path.is_file():
        return {"build": None, "sections": {}}
    return json.loads(path.read_text())


def measure(args: argparse.Namespace, command: str) -> dict[str, Any]:
    """Builds what the sections need, measures them and writes the file after each."""
    import torch
    from bench import ClockLog, environment

    from . import backward, forward, paper
    from .build import build
    from .library import Library
    from .profiler import Profiler

    result = read_result(args.json)
    kernels = {
        "mapping": forward.mapping_section,
        "loop_order": forward.loop_order_section,
        "backward": backward.backward_section,
    }
    whole = {
        "tables": paper.tables_section,
        "training": paper.training_section,
        "memory": paper.memory_section,
    }
    library = profiler = None
    if kernels.keys() & set(args.only):
        major, minor = torch.cuda.get_device_capability()
        path, result["build"] = build(10 * major + minor)
        print(f"built: {result['build']}", flush=True)
        library, profiler = Library(path), Profiler(path, not args.no_counters)
    for name in (n for n in SECTIONS if n in args.only):
        print(f"\n== {name}", flush=True)
        start = time.perf_counter()
        with ClockLog() as clocks:
            try:
                section = kernels[name](library, profiler) if name in kernels else whole[name]()
            except Exception as error:  # the other sections are worth having
                print(f"FAILED {name}: {type(error).__name__}: {error}", file=sys.stderr)
                args.failed.append(name)
                continue
        facts = environment(torch.device("cuda")) | {"clocks": clocks.summary()}
        seconds = round(time.perf_counter() - start, 1)
        result["sections"][name] = {
            "environment": facts,
            "command": command,
            "seconds": seconds,
            **section,
        }
        print(f"== {name}: {seconds} s", flush=True)
        write_json(result, args.json)  # a run that is cut short leaves what it has
        torch.cuda.empty_cache()
    return result


def main(argv: list[str] | None = None) -> int:
    """Measures or shows; returns the exit code: 1 when something was wrong or failed."""
    argv = sys.argv[1:] if argv is None else argv
    args = parse_args(argv)
    args.failed = []
    if args.show:
        result = read_result(args.json)
        if not result["sections"]:
            print(f"{args.json} holds no result", file=sys.stderr)
            return 2
    else:
        import torch

        if not torch.cuda.is_available():
            print(
                "measuring needs a CUDA GPU; torch sees none (--show needs none)", file=sys.stderr
            )
            return 2
        result = measure(args, command_line(argv))
    print(f"\n{text_report(result)}")
    if args.plots:
        try:
            from .plots import draw
        except ImportError as error:
            print(f"no plots: {error}; --show --plots draws them elsewhere", file=sys.stderr)
        else:
            draw(result, args.plots)
    if args.docs:
        update_docs(result)
    wrong = [name for s in result["sections"].values() for name in s.get("wrong", {})]
    for name in wrong:
        print(f"WRONG, not timed: {name}", file=sys.stderr)
    return int(bool(wrong or args.failed))


if __name__ == "__main__":
    sys.exit(main())
