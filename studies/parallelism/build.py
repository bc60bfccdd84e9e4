"""Compiles the variants into one shared library that knows no torch. Needs nvcc and CUTLASS, no GPU.

python3 -m studies.parallelism.build                       everything
python3 -m studies.parallelism.build keys_outside_hd64     objects of these units only
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import bench_build

from csrc import build_config
from csrc.build_config import BuildError, Toolkit
from third_party.fetch_cutlass import Cutlass, fetch_cutlass

from . import ROOT
from .variants import units

KERNELS = Path(__file__).resolve().parent / "kernels"
EXTENSION = KERNELS / "extension"  # the extension's kernels as of one commit; README.md says which
FOLDER = ROOT / "build" / "parallelism"
COMMON = (EXTENSION / "common" / "bwd_preprocess.cu",)


@dataclass(frozen=True)
class Built:
    """One object file, and what ptxas says of its kernels."""

    path: Path
    kernels: list[bench_build.Kernel]
    seconds: float  # 0 when it was there already


def compile_flags(toolkit: Toolkit, cutlass: Cutlass, arch: int) -> list[str]:
    """nvcc's words for every unit: the extension's, with the study's folders instead of csrc."""
    flags = [*build_config.nvcc_flags((arch,)), "-Xptxas", "-v", "-Xcompiler", "-fPIC"]
    ours = [f"-I{folder}" for folder in (KERNELS, EXTENSION)]  # nothing of csrc
    others = (cutlass.include, toolkit.include, toolkit.include / "cccl")
    return [*flags, *ours, *(word for folder in others for word in ("-isystem", str(folder)))]


def headers() -> list[Path]:
    """Every file that a unit may include."""
    return sorted(p for p in KERNELS.rglob("*") if p.suffix in {".h", ".cuh", ".cu"})


def _key(text: str, arch: int, version: str) -> str:
    """What an object depends on."""
    digest = hashlib.sha256(f"{text}\n{arch} {version} {bench_build.flags_hash()}".encode())
    for path in headers():
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def compile_unit(
    name: str, text: str, toolkit: Toolkit, cutlass: Cutlass, arch: int, folder: Path = FOLDER
) -> Built:
    """The object of one unit, compiled unless it is there; raises BuildError with nvcc's words."""
    folder.mkdir(parents=True, exist_ok=True)
    stem = folder / f"{name}.{_key(text, arch, toolkit.version)}"
    source, target, log = (stem.with_name(stem.name + s) for s in (".cu", ".o", ".log"))
    if target.is_file() and log.is_file():
        return Built(target, bench_build.parse_ptxas(log.read_text()), 0.0)
    source.write_text(text)
    partial = target.with_suffix(".part.o")
    command = [str(toolkit.nvcc), *compile_flags(toolkit, cutlass, arch), "-c", str(source)]
    start = time.perf_counter()
    result = subprocess.run([*command, "-o", str(partial)], capture_output=True, text=True)
    if result.returncode:
        raise BuildError(f"{name} does not compile:\n{result.stdout}{result.stderr}")
    log.write_text(result.stdout + result.stderr)
    partial.rename(target)
    return Built(target, bench_build.parse_ptxas(log.read_text()), time.perf_counter() - start)


def compile_units(names: Iterable[str], arch: int = 90) -> dict[str, Built]:
    """Objects of the named units, several compilers at once."""
    toolkit = build_config.find_toolkit()
    if toolkit is None:
        raise BuildError("the variants need nvcc: set CUDA_HOME or put nvcc on PATH")
    cutlass = fetch_cutlass()
    texts = units() | {path.stem: path.read_text() for path in COMMON}
    cpus, memory = build_config.available_cpus(), build_config.available_memory()
    limit = build_config.parse_max_jobs(os.environ.get("MAX_JOBS", ""))
    with ThreadPoolExecutor(build_config.compute_jobs(limit, cpus, memory)) as pool:
        tasks = {
            name: pool.submit(compile_unit, name, texts[name], toolkit, cutlass, arch)
            for name in names
        }
        return {name: task.result() for name, task in tasks.items()}


def build(arch: int = 90) -> tuple[Path, dict[str, object]]:
    """The library's path, and a record of its build."""
    start = time.perf_counter()
    names = [*units(), *(path.stem for path in COMMON)]
    objects = compile_units(names, arch)
    toolkit = build_config.find_toolkit()
    key = hashlib.sha256(" ".join(o.path.name for o in objects.values()).encode()).hexdigest()
    library = FOLDER / f"libparallelism.{key[:16]}.so"
    if not library.is_file():
        runtime = build_config.cudart_folder(toolkit, build_config.site_folders(), FOLDER)
        compiler = os.environ.get("CXX") or shutil.which("g++") or "c++"
        files = [str(o.path) for o in objects.values()]
        command = [compiler, "-shared", "-o", str(library), *files, f"-L{runtime}", "-lcudart"]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode:
            raise BuildError(f"the library does not link:\n{result.stdout}{result.stderr}")
    spilling = [k for o in objects.values() for k in o.kernels if not k.is_clean]
    record = {
        "units": len(objects),
        "seconds": round(time.perf_counter() - start, 1),
        "slowest": max((round(o.seconds, 1), name) for name, o in objects.items()),
        "kernels": sum(len(o.kernels) for o in objects.values()),
        "spilling": [asdict(kernel) for kernel in spilling],
        "nvcc": toolkit.version,
        "arch": arch,
    }
    return library, record


def main(argv: list[str] | None = None) -> int:
    """Builds everything, or the objects of the named units; prints registers and spills."""
    names = sys.argv[1:] if argv is None else argv
    try:
        if not names:
            library, record = build()
            print(f"{library.relative_to(ROOT)}: {record}")
        for name, built in compile_units(names).items():
            for kernel in built.kernels:
                state = "clean" if kernel.is_clean else "SPILLS"
                print(f"{name} {built.seconds:.0f} s, {kernel.registers} registers, {state}")
    except BuildError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
