"""Whether two builds have the same machine code, kernel by kernel.

    python benchmarks/bench_build.py --units fwd_sm80_hd64_bf16 --out-dir before    (in the tree before a change)
    python benchmarks/bench_build.py --units fwd_sm80_hd64_bf16 --out-dir after     (in the tree after it)
    python benchmarks/compare_sass.py before after

A build is an object, an extension (.so), or a folder of objects.  Kernels are found by their
names without parameter types, and those that were renamed by their code.  Line numbers do not count.
The exit status is 1 when a kernel's code differs, or a kernel is in one build alone.
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import shutil
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from benchmarks.bench_build import demangle  # noqa: E402
from csrc import build_config  # noqa: E402

Code = tuple[str, ...]  # instructions, as text and bits
Key = tuple[str, str]  # architecture, name


def parse_sass(text: str) -> dict[Key, Code]:
    """Instructions of every kernel in the output of `cuobjdump -sass`, with mangled names."""
    kernels: dict[Key, list[str]] = {}
    arch, code = "", None
    for line in text.splitlines():
        if found := re.match(r"arch = (sm_\w+)", line):
            arch, code = found[1], None
        elif found := re.match(r"\s*Function : (\S+)", line):
            code = kernels.setdefault((arch, found[1]), [])
        elif code is not None and (found := re.search(r"/\* (0x[0-9a-f]{16}) \*/$", line)):
            instruction = re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(.+?)\s*;", line)
            if instruction:
                code.append(f"{instruction[1]}  {found[1]}")
            elif code:
                code[-1] += f" {found[1]}"  # the second half, with the scheduler's bits
    return {key: tuple(code) for key, code in kernels.items()}


@dataclass
class Comparison:
    """What two builds share; names of kernels."""

    same: list[str] = field(default_factory=list)
    renamed: list[str] = field(default_factory=list)  # same code, another name
    changed: list[str] = field(default_factory=list)
    removed: list[str] = field(default_factory=list)
    added: list[str] = field(default_factory=list)

    @property
    def is_same(self) -> bool:
        return not (self.changed or self.removed or self.added)


def _lines_changed(before: Code, after: Code) -> str:
    differing = sum(a != b for a, b in zip(before, after, strict=False))
    lengths = f"{len(before)} and {len(after)} instructions"
    return f"{lengths}, {differing + abs(len(before) - len(after))} differ in place"


def compare(before: Mapping[Key, Code], after: Mapping[Key, Code]) -> Comparison:
    """Compares kernels by name, then those that only one build names by their code."""
    result = Comparison()
    for key in sorted(before.keys() & after.keys()):
        name = " ".join(key)
        if before[key] == after[key]:
            result.same.append(name)
        else:
            result.changed.append(f"{name}: {_lines_changed(before[key], after[key])}")
    by_code: dict[tuple[str, Code], list[str]] = defaultdict(list)
    for arch, name in sorted(after.keys() - before.keys()):
        by_code[arch, after[arch, name]].append(name)
    for arch, name in sorted(before.keys() - after.keys()):
        found = by_code[arch, before[arch, name]]
        if found:
            result.renamed.append(f"{arch} {name} -> {found.pop()}")
        else:
            result.removed.append(f"{arch} {name}")
    result.added = [f"{arch} {name}" for (arch, _), names in by_code.items() for name in names]
    return result


def with_readable_names(kernels: Mapping[Key, Code]) -> dict[Key, Code]:
    """Kernels by their names without parameter types.  Names that would fall together stay mangled."""
    names = demangle([name for _, name in kernels])
    readable = [(arch, name) for (arch, _), name in zip(kernels, names, strict=True)]
    return {
        new if readable.count(new) == 1 else old: code
        for (old, code), new in zip(kernels.items(), readable, strict=True)
    }


def find_cuobjdump() -> str:
    """cuobjdump of the toolkit, of PATH, or of triton's package."""
    toolkit = build_config.find_toolkit()
    places = [toolkit.root / "bin" / "cuobjdump"] if toolkit else []
    triton = importlib.util.find_spec("triton")
    for folder in (triton.submodule_search_locations or []) if triton else []:
        places.append(Path(folder) / "backends" / "nvidia" / "bin" / "cuobjdump")
    found = next((str(p) for p in places if p.is_file()), None) or shutil.which("cuobjdump")
    if found is None:
        sys.exit("compare_sass.py: there is no cuobjdump in the toolkit, on PATH or in triton")
    return found


def files_of(build: Path) -> list[Path]:
    """The files of a build that hold machine code."""
    if build.is_file():
        return [build]
    found = sorted(build.rglob("*.o"))
    if not found:
        sys.exit(f"compare_sass.py: {build} is no object, extension or folder of objects")
    return found


def kernels_of(files: Iterable[Path], cuobjdump: str) -> dict[Key, Code]:
    """Kernels of all files."""
    kernels: dict[Key, Code] = {}
    for file in files:
        done = subprocess.run([cuobjdump, "-sass", str(file)], capture_output=True, text=True)
        if (
            done.returncode == 0
        ):  # a file of host code alone has none, which is an error to cuobjdump
            kernels |= parse_sass(done.stdout)
        elif "does not contain device code" not in done.stdout + done.stderr:
            sys.exit(f"compare_sass.py: cuobjdump failed on {file}: {done.stderr}")
    return with_readable_names(kernels)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument(
        "--same-files", action="store_true", help="only objects that both folders have"
    )
    args = parser.parse_args()
    cuobjdump = find_cuobjdump()
    before, after = files_of(args.before), files_of(args.after)
    if args.same_files:
        names = {p.name for p in before} & {p.name for p in after}
        before, after = ([p for p in files if p.name in names] for files in (before, after))
    result = compare(kernels_of(before, cuobjdump), kernels_of(after, cuobjdump))
    for title in ("renamed", "changed", "removed", "added"):
        for name in getattr(result, title):
            print(f"{title}: {name}")
    print(f"{len(result.same)} kernels are the same, {len(result.renamed)} under another name")
    sys.exit(0 if result.is_same else 1)


if __name__ == "__main__":
    main()
