"""Cost of the build: seconds and peak memory of every file, registers and spills of every kernel.

    python benchmarks/bench_build.py                          every file, one at a time
    python benchmarks/bench_build.py --units fwd_sm90_hd128_bf16   these only; the others keep their entry
    python benchmarks/bench_build.py --archs 90               for these architectures only; what the
                                                              report says of others stays if it is of
                                                              the same sources, flags and compilers
    python benchmarks/bench_build.py --show                   the tables of the last run

Compiles with setup.py's flags, for every size of shared memory and without a compiler cache, writes
results/build.json and prints the tables.
Only csrc/torch needs torch.  The exit status is 1 when a kernel spills, uses local memory or serialises
wgmma, or when a compiler warns.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from csrc import build_config  # noqa: E402
from csrc.build_config import BuildError, Toolkit  # noqa: E402
from csrc.kernels import kernel_list  # noqa: E402
from csrc.kernels.generate import generate, targets_of  # noqa: E402
from third_party.fetch_cutlass import Cutlass, CutlassError, fetch_cutlass  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "build.json"
DEFAULT_ARCH = 90
ARCHS = (80, 86, 89, 90, 120)  # of the report
GENERATED = Path("build") / "generated_complete"  # setup.py's folder may hold a part of the kernels


# --- ptxas -----------------------------------------------------------------------------------------


@dataclass
class Kernel:
    """What ptxas reports of one kernel; bytes but for registers."""

    name: str
    arch: str
    registers: int = 0
    spill_stores: int = 0
    spill_loads: int = 0
    stack: int = 0
    smem: int = 0  # static only
    serialized: list[str] = field(default_factory=list)  # ptxas on wgmma that runs one at a time

    @property
    def is_clean(self) -> bool:
        """Neither spills nor local memory nor serialised wgmma."""
        return self.spill_stores == self.spill_loads == self.stack == 0 and not self.serialized


def parse_ptxas(text: str) -> list[Kernel]:
    """Kernels in the output of `nvcc -Xptxas -v`, with mangled names.

    What ptxas says of a function that was not inlined counts for the kernel it is listed under.
    Its words on wgmma (C7510, C7517, ...) come before all kernels, with a function's name; those of
    a function that is no kernel count for the first kernel.
    """
    kernels: list[Kernel] = []
    serialized: list[tuple[str, str]] = []  # function, what ptxas says
    for line in text.splitlines():
        entry = re.search(r"Compiling entry function '([^']+)' for '([^']+)'", line)
        if entry:
            kernels.append(Kernel(entry[1], entry[2]))
        wgmma = re.search(r"\((C75\d\d)\) (.+?) in (?:the )?function '([^']+)'", line)
        if wgmma:
            serialized.append((wgmma[3], f"{wgmma[1]}: {wgmma[2]}"))
        if not kernels:
            continue
        kernel = kernels[-1]
        frame = re.search(
            r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line
        )
        if frame:
            kernel.stack = max(kernel.stack, int(frame[1]))
            kernel.spill_stores += int(frame[2])
            kernel.spill_loads += int(frame[3])
        used = re.search(r"Used (\d+) registers", line)
        if used:
            kernel.registers = int(used[1])
            smem = re.search(r"(\d+) bytes smem", line)
            kernel.smem = int(smem[1]) if smem else 0
    for function, text in serialized:
        found = [kernel for kernel in kernels if kernel.name == function] or kernels[:1]
        for kernel in found:
            kernel.serialized.append(text)
    return kernels


def find_warnings(text: str) -> list[str]:
    """Lines of a compiler's output that warn, whichever of nvcc's compilers wrote them, each once."""
    word = r"\bwarning\b(?!-)"  # not nvcc's remark on how to suppress a <warning-number>
    return list(
        dict.fromkeys(line.strip() for line in text.splitlines() if re.search(word, line, re.I))
    )


def demangle(names: Sequence[str]) -> list[str]:
    """C++ names without their parameter lists; unchanged where there is no c++filt."""
    tool = shutil.which("c++filt")
    if tool is None or not names:
        return list(names)
    text = subprocess.run([tool, "-p"], input="\n".join(names), capture_output=True, text=True)
    return text.stdout.splitlines() if text.returncode == 0 else list(names)


# --- Compiling one file ----------------------------------------------------------------------------


@dataclass
class Unit:
    """One compiled file, what it cost for its archs, and the kernels of these and of earlier runs."""

    name: str
    source: str  # relative to the repository
    seconds: float
    peak_gb: float  # of the largest process
    object_mb: float
    archs: list[int]
    jobs: int  # compilers that ran at once
    inputs: list[str] = field(default_factory=list)  # our files that it read
    hash: str = ""
    kernels: list[Kernel] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def code_hash(inputs: Iterable[str], root: Path = ROOT) -> str:
    """Hash of files of the repository that comments and white space do not change.

    Raises FileNotFoundError when one is gone.
    """
    digest = hashlib.sha256()
    for name in sorted(inputs):
        code = re.sub(r"//.*|\s+", "", (root / name).read_text())
        digest.update(f"{name}:{code}\n".encode())
    return digest.hexdigest()[:16]


def flags_hash() -> str:
    """Hash of what besides the sources decides the kernels' code: nvcc's flags."""
    return hashlib.sha256(" ".join(build_config.nvcc_flags(())).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Compiler:
    """The commands of a build, by file."""

    toolkit: Toolkit
    cutlass: Cutlass
    archs: tuple[int, ...]

    def archs_of(self, source: Path) -> tuple[int, ...]:
        """Architectures for which source is compiled."""
        return targets_of(ROOT / source) or self.archs

    def command(self, source: Path, output: Path, depfile: Path) -> list[str]:
        """Command that compiles source; for .cu files ptxas reports."""
        includes = build_config.include_flags(self.cutlass.include, self.toolkit)
        tail = ["-MD", "-MF", str(depfile), "-c", str(source), "-o", str(output)]
        if source.suffix == ".cu":
            flags = build_config.nvcc_flags(self.archs_of(source))
            position_independent = ["-Xcompiler", "-fPIC", "-Xptxas", "-v"]
            return [str(self.toolkit.nvcc), *includes, *flags, *position_independent, *tail]
        flags = build_config.cxx_flags(self.toolkit)
        standard = "c++17"
        if source.parts[:2] == ("csrc", "torch"):
            import torch

            torch_include = Path(torch.__file__).parent / "include"
            for folder in (torch_include, torch_include / "torch/csrc/api/include"):
                includes += ["-isystem", str(folder)]
            includes += ["-isystem", sysconfig.get_paths()["include"]]
            flags += ["-DTORCH_EXTENSION_NAME=flash_attn_2_cuda"]
            version = tuple(int(n) for n in re.findall(r"\d+", torch.__version__)[:2])
            standard = "c++20" if version >= (2, 12) else "c++17"
        return ["c++", *includes, *flags, f"-std={standard}", "-fPIC", *tail]


def _our_inputs(depfile: Path) -> list[str]:
    words = depfile.read_text().replace("\\\n", " ").split()[1:]
    paths = {Path(os.path.normpath(ROOT / word)) for word in words}
    ours = (p.relative_to(ROOT) for p in paths if p.is_relative_to(ROOT / "csrc"))
    return sorted(str(p) for p in ours)


def compile_file(compiler: Compiler, source: Path, folder: Path, jobs: int = 1) -> Unit:
    """Compiles source, a path relative to the repository, into folder.

    Raises BuildError with the compiler's output when it fails.
    """
    name = source.stem if source.suffix == ".cu" else f"{source.parent.name}_{source.stem}"
    output, depfile = folder / f"{name}.o", folder / f"{name}.d"
    command = compiler.command(source, output, depfile)
    with tempfile.TemporaryFile("w+") as log:
        start = time.perf_counter()
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        log.seek(0)
        text = log.read()
    if process.returncode != 0:
        raise BuildError(f"{name} does not compile:\n{' '.join(command)}\n{text}")
    kernels = parse_ptxas(text)
    for kernel, readable in zip(kernels, demangle([k.name for k in kernels]), strict=True):
        kernel.name = readable
    inputs = _our_inputs(depfile)
    return Unit(
        name=name,
        source=str(source),
        seconds=round(seconds, 1),
        peak_gb=round(usage.ru_maxrss * 1024 / 1e9, 2),
        object_mb=round(output.stat().st_size / 1e6, 2),
        archs=list(compiler.archs_of(source)),
        jobs=jobs,
        inputs=inputs,
        hash=code_hash(inputs),
        kernels=kernels,
        warnings=find_warnings(text),
    )


def find_compiler(archs: tuple[int, ...] = (DEFAULT_ARCH,)) -> Compiler:
    """The toolkit and CUTLASS of this machine.  Raises BuildError or CutlassError without them."""
    toolkit = build_config.find_toolkit()
    if toolkit is None:
        raise BuildError("there is no nvcc on PATH, in CUDA_HOME or in CUDA_PATH")
    return Compiler(toolkit, fetch_cutlass(), archs)


def sources_of_build(archs: tuple[int, ...]) -> list[Path]:
    """Every file of a complete build, relative to the repository; writes the generated ones."""
    files = generate(ROOT / GENERATED, archs, smem_kb=kernel_list.SMEM_KB)
    generated = [path.relative_to(ROOT) for path in files]
    return [*generated[:-1], *build_config.handwritten_sources(), generated[-1]]


def sources_of_report() -> set[str]:
    """Every file of a complete build for all architectures of the report; writes nothing."""
    generated = [f"{unit.name}.cu" for unit in kernel_list.units(ARCHS)] + ["registry.cpp"]
    return {
        str(p) for p in [*(GENERATED / n for n in generated), *build_config.handwritten_sources()]
    }


def select(sources: Sequence[Path], names: Sequence[str]) -> list[Path]:
    """Sources by file name without suffix, or by a unit's short name (bwd_hd128_bf16) if one isa has it.

    Raises BuildError for a name that is in none.
    """
    by_name = {source.stem: source for source in sources}
    by_name |= {f"{s.parent.name}_{s.stem}": s for s in sources}
    short = [re.sub(r"_sm\d+_", "_", source.stem) for source in sources]
    by_name |= {n: s for n, s in zip(short, sources, strict=True) if short.count(n) == 1}
    unknown = [name for name in names if name not in by_name]
    if unknown:
        raise BuildError(f"no unit {unknown[0]!r}; there are {', '.join(s.stem for s in sources)}")
    return [by_name[name] for name in names]


# --- Report ----------------------------------------------------------------------------------------


def _table(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    rows = [rows[0], ["-" * width for width in widths], *rows[1:]]
    text = ("| " + " | ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)) for r in rows)
    return "\n".join(line + " |" for line in text)


def tables(report: dict) -> str:
    """The report as two Markdown tables: files and kernels."""
    units = sorted(report["units"], key=lambda u: -u["seconds"])
    files = [("file", "for", "seconds", "peak GB", "object MB", "kernels")]
    for u in units:
        archs = " ".join(map(str, u["archs"])) if u["kernels"] else ""
        numbers = (u["seconds"], u["peak_gb"], u["object_mb"], len(u["kernels"]))
        files.append((u["name"], archs, *map(str, numbers)))
    seconds = sum(u["seconds"] for u in units)
    peak = max((u["peak_gb"] for u in units), default=0)
    size = sum(u["object_mb"] for u in units)
    files.append((f"{len(units)} files", "", f"{seconds:.0f}", f"{peak:.1f}", f"{size:.1f}", ""))
    facts = ("registers", "spill bytes", "stack bytes", "static smem bytes")
    kernels = [("unit", "for", "kernel", *facts)]
    for u in sorted(units, key=lambda u: u["name"]):
        for k in u["kernels"]:
            spills = k["spill_stores"] + k["spill_loads"]
            numbers = (k["registers"], spills, k["stack"], k["smem"])
            kernels.append((u["name"], k["arch"], k["name"], *map(str, numbers)))
    head = f"nvcc {report['nvcc']}, CUTLASS {report['cutlass']}, {report['machine']}"
    return "\n\n".join([head, _table(files), _table(kernels)])


def _machine() -> str:
    try:
        names = re.findall(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.M)
    except OSError:
        names = []
    return f"{build_config.available_cpus()} cores of {names[0] if names else platform.machine()}"


def measure(compiler: Compiler, sources: Sequence[Path], folder: Path, jobs: int) -> list[Unit]:
    """Compiles sources, jobs at a time, and prints one line for each."""
    folder.mkdir(parents=True, exist_ok=True)
    units: list[Unit] = []

    def one(source: Path) -> None:
        unit = compile_file(compiler, source, folder, jobs)
        units.append(unit)
        progress = f"[{len(units)}/{len(sources)}]"
        print(f"{progress} {unit.name}  {unit.seconds} s  {unit.peak_gb} GB", flush=True)

    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(one, sources))
    return units


def with_other_archs(unit: Unit, before: dict | None) -> dict:
    """A unit's entry in the report, with what the one before says of architectures not compiled now.

    That stays if it is of the same sources.  What the unit cost is of this run alone.
    """
    entry, compiled = asdict(unit), {build_config.target_name(arch) for arch in unit.archs}
    same = before is not None and before["hash"] == unit.hash
    others = [k for k in before["kernels"] if k["arch"] not in compiled] if same else []
    if others:
        entry["kernels"] = sorted(others + entry["kernels"], key=lambda kernel: kernel["arch"])
        entry["warnings"] = list(dict.fromkeys(before["warnings"] + entry["warnings"]))
    return entry


def merged(new: dict, units: Sequence[Unit], old: dict | None) -> dict:
    """The report new, which has no units yet, with units and what the old one says beside them.

    Nothing stays of files that there are no longer, nor of other flags and compilers.
    """
    is_same = old is not None and all(old[key] == new[key] for key in ("nvcc", "cutlass", "flags"))
    known = sources_of_report()
    kept = {u["name"]: u for u in old["units"] if u["source"] in known} if is_same else {}
    entries = kept | {unit.name: with_other_archs(unit, kept.get(unit.name)) for unit in units}
    # Times that stay are of other machines.
    machines = old["machine"].split("; ") if len(entries) > len(units) else []
    machine = "; ".join(dict.fromkeys([*machines, new["machine"]]))
    return new | {"machine": machine, "units": [entries[name] for name in sorted(entries)]}


def as_json(report: dict) -> str:
    """The report's text, a line for each kernel."""
    text = json.dumps(report, indent=1)
    flat = re.sub(r'\{\s*"name"[^{}]*\}', lambda found: re.sub(r"\n\s*", " ", found[0]), text)
    return re.sub(r"(?<=\{) | (?=\})", "", flat) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--units", nargs="+", default=[], help="files to compile; default: all")
    parser.add_argument("--archs", default=",".join(map(str, ARCHS)), help="default: %(default)s")
    parser.add_argument("--jobs", type=int, default=1, help="compilers at once")
    parser.add_argument("--out-dir", type=Path, help="folder that keeps the objects")
    parser.add_argument("--json", type=Path, default=RESULTS, help="report to write")
    parser.add_argument("--show", action="store_true", help="print the report, compile nothing")
    args = parser.parse_args()
    old = json.loads(args.json.read_text()) if args.json.is_file() else None
    if args.show:
        sys.exit("there is no report yet" if old is None else print(tables(old)))
    try:
        compiler = find_compiler(build_config.parse_archs(args.archs))
        everything = sources_of_build(compiler.archs)
        sources = select(everything, args.units) if args.units else everything
        torch = build_config.find_torch()
        if isinstance(torch, str) or torch.cuda is None:
            if any(s.parts[:2] == ("csrc", "torch") for s in sources):
                print("skipping csrc/torch: it needs a CUDA build of torch")
            sources = [s for s in sources if s.parts[:2] != ("csrc", "torch")]
        with tempfile.TemporaryDirectory() as scratch:
            folder = args.out_dir.resolve() if args.out_dir else Path(scratch)
            start = time.perf_counter()
            units = measure(compiler, sources, folder, args.jobs)
            wall = time.perf_counter() - start
    except (BuildError, CutlassError) as error:
        sys.exit(f"bench_build.py: {error}")

    head = {
        "nvcc": compiler.toolkit.version,
        "cutlass": compiler.cutlass.version,
        "machine": _machine(),
        "flags": flags_hash(),
    }
    report = merged(head, units, old)
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(as_json(report))
    print(f"\n{tables(report)}\n\n{len(units)} files in {wall:.0f} s, {args.jobs} at a time")
    dirty = [f"{k.name} ({k.arch})" for unit in units for k in unit.kernels if not k.is_clean]
    if dirty:
        names = ", ".join(dirty)
        sys.exit(f"{len(dirty)} kernels spill, use local memory or serialise wgmma: {names}")
    warned = [f"{unit.name}: {line}" for unit in units for line in unit.warnings]
    if warned:
        sys.exit("\n".join([f"{len(warned)} warnings", *warned]))


if __name__ == "__main__":
    main()
