"""What a build consists of: environment variables, toolkit, architectures, jobs, flags.

Used by setup.py, csrc/kernels/generate.py and benchmarks/bench_build.py.  Importing it needs
neither torch nor setuptools.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import site
import subprocess
import sys
import sysconfig
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from csrc.kernels import kernel_list
from csrc.kernels.kernel_list import DTYPES, HEAD_DIMS, SMEM_KB

ROOT = Path(__file__).resolve().parents[1]
GENERATED = Path("build") / "generated"
DEFAULT_ARCHS = (80, 90)
MINIMUM_ARCH = 80
# Peak of one kernel unit's compilation (benchmarks/bench_build.py), with room; more for each further
# size of shared memory that it has tiles for.
BYTES_PER_JOB = 5 * 10**9
BYTES_PER_SIZE = 15 * 10**8

# Headers that torch's CUDA headers include and that a small toolkit may lack.
LIBRARY_HEADERS = ("cublas_v2.h", "cublasLt.h", "cusparse.h", "cusolverDn.h", "curand.h", "cufft.h")


class BuildError(Exception):
    """The build cannot go on; the text says why and what to change."""


# --- Environment variables ------------------------------------------------------------------------


def _words(text: str) -> list[str]:
    return [word for word in re.split(r"[;,\s]+", text) if word]


def parse_archs(text: str) -> tuple[int, ...]:
    """Architectures in "80;90", "8.0,9.0" or "sm_90a" form as sorted numbers; an empty text gives ()."""
    archs = set()
    for word in _words(text):
        match = re.fullmatch(r"(?:sm_)?(?:(\d{1,2})\.(\d)|(\d{2,3}))[af]?", word)
        if match is None:
            raise BuildError(
                f"FLASH_ATTN_CUDA_ARCHS={text!r}: {word!r} is not an architecture such as 80 or 90"
            )
        arch = int(match.group(3) or match.group(1) + match.group(2))
        if arch < MINIMUM_ARCH:
            raise BuildError(
                f"FLASH_ATTN_CUDA_ARCHS={text!r}: the kernels need sm_80 or newer, got sm_{arch}"
            )
        archs.add(arch)
    return tuple(sorted(archs))


def parse_head_dims(text: str) -> tuple[int, ...]:
    """Head dimensions in "64,128" form; an empty text gives all of kernel_list.HEAD_DIMS."""
    chosen = set()
    for word in _words(text):
        if not word.isdecimal() or int(word) not in HEAD_DIMS:
            hint = ""
            if word.isdecimal() and 0 < int(word) < max(HEAD_DIMS):
                hint = (
                    f" ({word} runs in the kernel of {min(d for d in HEAD_DIMS if d > int(word))})"
                )
            allowed = ", ".join(map(str, HEAD_DIMS))
            raise BuildError(
                f"FLASH_ATTN_HEAD_DIMS={text!r}: {word!r} is not one of {allowed}{hint}"
            )
        chosen.add(int(word))
    return tuple(d for d in HEAD_DIMS if d in chosen) if chosen else HEAD_DIMS


def parse_dtypes(text: str) -> tuple[str, ...]:
    """Dtypes in "bf16" or "fp16,bf16" form; an empty text gives all of kernel_list.DTYPES."""
    chosen = _words(text)
    for word in chosen:
        if word not in DTYPES:
            raise BuildError(
                f"FLASH_ATTN_DTYPES={text!r}: {word!r} is not one of {', '.join(DTYPES)}"
            )
    return tuple(d for d in DTYPES if d in chosen) if chosen else DTYPES


def parse_smem_kb(text: str) -> tuple[int, ...]:
    """Sizes of shared memory in "227,99" form, falling; an empty text gives ()."""
    chosen = _words(text)
    for word in chosen:
        if word not in map(str, SMEM_KB):
            raise BuildError(
                f"FLASH_ATTN_SMEM_KB={text!r}: {word!r} is not one of "
                f"{', '.join(map(str, SMEM_KB))}"
            )
    return tuple(size for size in SMEM_KB if str(size) in chosen)


def parse_switch(name: str, text: str, default: bool = False) -> bool:
    """A variable that is 0 or 1; empty: default."""
    if text not in ("", "0", "1"):
        raise BuildError(f"{name}={text!r} is neither 0 nor 1")
    return text == "1" if text else default


def parse_max_jobs(text: str) -> int | None:
    """MAX_JOBS as a number, None when it is empty."""
    if not text.strip():
        return None
    if not text.strip().isdecimal() or int(text) < 1:
        raise BuildError(f"MAX_JOBS={text!r} is not a number of at least 1")
    return int(text)


# --- Jobs -----------------------------------------------------------------------------------------


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def _cgroup_dirs(controller: str, root: Path) -> Iterator[Path]:
    """This process's cgroup folders, version 2 and 1, up to each mount's root."""
    mounts = root / "sys/fs/cgroup"
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            tops = [mounts, mounts / "unified"]
        elif controller in controllers.split(","):
            tops = [mounts / controllers, mounts / controller]
        else:
            continue
        for top in tops:
            here = top / path.lstrip("/")
            yield from (d for d in [here, *here.parents] if d.is_relative_to(top) and d.is_dir())


def _number(text: str) -> int | None:
    return int(text) if re.fullmatch(r"-?\d+", text) else None


def available_cpus(root: Path = Path("/"), affinity: int | None = None) -> int:
    """Cores that this process may use: its affinity and its cgroups' quotas."""
    cpus = [affinity or len(os.sched_getaffinity(0))]
    for folder in _cgroup_dirs("cpu", root):
        quota, _, period = _read(folder / "cpu.max").partition(" ")
        pairs = [(_number(quota), _number(period))]
        names = ("cpu.cfs_quota_us", "cpu.cfs_period_us")
        pairs.append(tuple(_number(_read(folder / name)) for name in names))
        cpus += [max(1, q // p) for q, p in pairs if q and p and q > 0]
    return min(cpus)


def available_memory(root: Path = Path("/")) -> int | None:
    """Bytes that can be allocated now: the machine's and every cgroup's; None where it cannot be read."""
    free = []
    match = re.search(r"^MemAvailable:\s+(\d+) kB", _read(root / "proc/meminfo"), re.MULTILINE)
    if match:
        free.append(int(match.group(1)) * 1024)
    files = (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    )
    for folder in _cgroup_dirs("memory", root):
        for limit_name, usage_name, cache_name in files:
            limit, usage = _number(_read(folder / limit_name)), _number(_read(folder / usage_name))
            if limit is None or usage is None:
                continue
            stat = _read(folder / "memory.stat")
            cache = re.search(rf"^{cache_name} (\d+)", stat, re.MULTILINE)  # reclaimed when needed
            free.append(max(0, limit - usage + (int(cache.group(1)) if cache else 0)))
    return min(free) if free else None


def compute_jobs(max_jobs: int | None, cpus: int, memory: int | None, sizes: int = 1) -> int:
    """Compilers to run at once: MAX_JOBS, otherwise what cores and free memory allow, at least 1.

    sizes: of shared memory, which each unit has tiles for.
    """
    if max_jobs is not None:
        return max_jobs
    bytes_per_job = BYTES_PER_JOB + (sizes - 1) * BYTES_PER_SIZE
    return max(1, cpus if memory is None else min(cpus, memory // bytes_per_job))


# --- Toolkit and torch ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Toolkit:
    root: Path
    version: str  # "13.0"

    @property
    def nvcc(self) -> Path:
        return self.root / "bin" / "nvcc"

    @property
    def include(self) -> Path:
        """Folder of cuda_runtime.h."""
        folders = [self.root / "include", *sorted(self.root.glob("targets/*-linux/include"))]
        return next((f for f in folders if (f / "cuda_runtime.h").is_file()), folders[0])

    def supported_archs(self) -> set[int]:
        output = subprocess.run(
            [self.nvcc, "--list-gpu-arch"], capture_output=True, text=True
        ).stdout
        return {int(n) for n in re.findall(r"compute_(\d+)\b", output)}


def _toolkit_at(root: Path) -> Toolkit | None:
    if not (root / "bin" / "nvcc").is_file():
        return None
    output = subprocess.run(
        [root / "bin" / "nvcc", "--version"], capture_output=True, text=True
    ).stdout
    match = re.search(r"release (\d+\.\d+)", output)
    return Toolkit(root, match.group(1)) if match else None


def _root_from_dry_run(nvcc: str) -> Path | None:
    command = [nvcc, "--dryrun", "-x", "cu", "-c", os.devnull]
    result = subprocess.run(command, capture_output=True, text=True)
    match = re.search(r"^#\$ TOP=(.+)$", result.stderr + result.stdout, re.MULTILINE)
    return Path(match.group(1).strip()).resolve() if match else None


def find_toolkit(env: Mapping[str, str] = os.environ) -> Toolkit | None:
    """The CUDA toolkit: CUDA_HOME, CUDA_PATH, the root that nvcc on PATH names, /usr/local/cuda."""
    for name in ("CUDA_HOME", "CUDA_PATH"):
        found = _toolkit_at(Path(env[name])) if env.get(name) else None
        if found is not None:
            return found
    nvcc = shutil.which("nvcc", path=env.get("PATH", ""))
    root = _root_from_dry_run(nvcc) if nvcc else None  # nvcc may be a script outside of the toolkit
    return (_toolkit_at(root) if root else None) or _toolkit_at(Path("/usr/local/cuda"))


def site_folders() -> list[str]:
    """Package folders of the running interpreter, which an isolated build hides from sys.path."""
    paths = sysconfig.get_paths()
    folders = [paths["purelib"], paths["platlib"], *site.getsitepackages()]
    if sys.prefix == sys.base_prefix:
        folders.append(site.getusersitepackages())
    return list(dict.fromkeys(f for f in folders if os.path.isdir(f)))


@dataclass(frozen=True)
class Torch:
    version: str
    cuda: str | None  # "13.0", None for a build without CUDA
    capabilities: tuple[int, ...]  # of the visible GPUs, for example (90,)


def find_torch() -> Torch | str:
    """The torch of the target environment, or why there is none."""
    try:
        if importlib.util.find_spec("torch") is None:
            sys.path += [f for f in site_folders() if f not in sys.path]
        import torch
    except (ImportError, OSError) as error:
        return (
            "no torch"
            if "No module named 'torch'" in str(error)
            else f"torch does not import ({error})"
        )
    capabilities = set()
    if torch.version.cuda and torch.cuda.is_available():
        for device in range(torch.cuda.device_count()):
            major, minor = torch.cuda.get_device_capability(device)
            capabilities.add(10 * major + minor)
    return Torch(torch.__version__, torch.version.cuda, tuple(sorted(capabilities)))


# --- The plan -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """What this installation builds; without a toolkit there is no extension."""

    message: str
    toolkit: Toolkit | None = None
    torch: Torch | None = None
    archs: tuple[int, ...] = ()
    head_dims: tuple[int, ...] = ()
    dtypes: tuple[str, ...] = ()
    smem_kb: tuple[int, ...] = ()  # sizes of shared memory with tiles
    test_units: bool = False

    @property
    def has_extension(self) -> bool:
        return self.toolkit is not None


def choose_archs(requested: tuple[int, ...], torch: Torch) -> tuple[tuple[int, ...], str]:
    """Architectures to build and where they come from.

    Raises BuildError when every visible GPU is older than the kernels and none was requested.
    """
    if requested:
        return requested, "FLASH_ATTN_CUDA_ARCHS"
    if not torch.capabilities:
        return DEFAULT_ARCHS, "no GPU visible, default"
    usable = tuple(c for c in torch.capabilities if c >= MINIMUM_ARCH)
    if not usable:
        raise BuildError(
            "the kernels need a GPU of compute capability 8.0 or newer, this machine's is "
            f"sm_{torch.capabilities[-1]}; set FLASH_ATTN_CUDA_ARCHS to build for another machine, "
            "or FLASH_ATTN_SKIP_CUDA_BUILD=1 for the CPU backend only"
        )
    return usable, "the visible GPU"


def _earlier_build(folder: Path) -> str:
    """What becomes of an extension that an earlier build left in the source tree."""
    names = sorted(path.name for path in folder.glob("flash_attn_2_cuda*.so"))
    return f"; {names[0]} stays as it is, make build renews it" if names else ""


def make_plan(env: Mapping[str, str], toolkit: Toolkit | None, torch: Torch | str) -> Plan:
    """Decides what to build.  Raises BuildError for bad variables and for toolkits that do not match torch."""
    requested = parse_archs(env.get("FLASH_ATTN_CUDA_ARCHS", ""))
    head_dims = parse_head_dims(env.get("FLASH_ATTN_HEAD_DIMS", ""))
    dtypes = parse_dtypes(env.get("FLASH_ATTN_DTYPES", ""))
    requested_kb = parse_smem_kb(env.get("FLASH_ATTN_SMEM_KB", ""))
    test_units = parse_switch("FLASH_ATTN_TEST_UNITS", env.get("FLASH_ATTN_TEST_UNITS", ""))
    name = "FLASH_ATTN_BUILD_WITHOUT_GPU"
    without_gpu = parse_switch(name, env.get(name, ""), default=True)
    python_only = "installing the Python package with the CPU backend only"
    if isinstance(torch, str):
        return Plan(f"{torch} in this environment: {python_only}")
    if torch.cuda is None:
        return Plan(f"torch {torch.version} has no CUDA: {python_only}")
    if toolkit is None:
        return Plan(
            f"torch {torch.version} has CUDA {torch.cuda}, but there is no nvcc: {python_only}"
        )
    if not (torch.capabilities or requested or without_gpu):
        return Plan(
            "no GPU visible, no kernel compiled (make build, or FLASH_ATTN_BUILD_WITHOUT_GPU=1, "
            f"compiles them all): {python_only}{_earlier_build(ROOT)}"
        )
    if toolkit.version.split(".")[0] != torch.cuda.split(".")[0]:
        raise BuildError(
            f"the CUDA toolkit at {toolkit.root} is version {toolkit.version}, but torch "
            f"{torch.version} was built with CUDA {torch.cuda}: their major versions must match. "
            f"Point CUDA_HOME at a CUDA {torch.cuda} toolkit, install a torch for this toolkit, or "
            "set FLASH_ATTN_SKIP_CUDA_BUILD=1 for the CPU backend only"
        )
    archs, source = choose_archs(requested, torch)
    unsupported = [a for a in archs if a not in toolkit.supported_archs()]
    if unsupported:
        raise BuildError(
            f"nvcc {toolkit.version} cannot compile for sm_{unsupported[0]} ({source})"
        )
    smem_kb = requested_kb or kernel_list.smem_kb(archs)
    for arch in archs:
        if min(smem_kb) > (kb := kernel_list.SMEM_KB_OF_ARCH.get(arch, min(kernel_list.SMEM_KB))):
            raise BuildError(
                f"FLASH_ATTN_SMEM_KB={env['FLASH_ATTN_SMEM_KB']!r}: sm_{arch} needs tiles for "
                f"{kb} KB of shared memory or less"
            )
    message = (
        f"CUDA {toolkit.version} at {toolkit.root}, torch {torch.version}: building "
        f"flash_attn_2_cuda for {', '.join(f'sm_{a}' for a in archs)} ({source}), "
        f"head_dim {', '.join(map(str, head_dims))}, {', '.join(dtypes)}, "
        f"tiles for {', '.join(map(str, smem_kb))} KB of shared memory"
    )
    return Plan(message, toolkit, torch, archs, head_dims, dtypes, smem_kb, test_units)


def plan_from_environment() -> Plan:
    """The plan of this machine.  Imports torch unless FLASH_ATTN_SKIP_CUDA_BUILD=1."""
    skip = "FLASH_ATTN_SKIP_CUDA_BUILD"
    if parse_switch(skip, os.environ.get(skip, "")):
        return Plan(
            "FLASH_ATTN_SKIP_CUDA_BUILD=1: installing the Python package with the CPU backend only"
        )
    return make_plan(os.environ, find_toolkit(), find_torch())


# --- Sources and flags ----------------------------------------------------------------------------


def handwritten_sources() -> list[Path]:
    """Sources beside the generated units, relative to the repository, the slow ones first."""
    patterns = ("csrc/torch/**/*.cpp", "csrc/kernels/common/*.cu", "csrc/host/*.cpp")
    return [p.relative_to(ROOT) for pattern in patterns for p in sorted(ROOT.glob(pattern))]


def include_flags(cutlass: Path, toolkit: Toolkit) -> list[str]:
    """Include folders of every source; those of others as system folders, so that -Wall is about our code."""
    ours = [f"-I{ROOT / folder}" for folder in ("csrc", "csrc/kernels")]
    others = (cutlass, toolkit.include, toolkit.include / "cccl")
    return ours + [word for folder in others for word in ("-isystem", str(folder))]


def target_name(arch: int) -> str:
    """The compiler's name of an architecture: sm_90 with its own instructions."""
    return "sm_90a" if arch == 90 else f"sm_{arch}"


def gencode(arch: int) -> list[str]:
    """nvcc's target of one architecture: SASS only.

    Two words, so that csrc/nvcc_of_unit.py finds them in a command.
    """
    name = target_name(arch)
    return ["-gencode", f"arch={name.replace('sm', 'compute')},code={name}"]


def nvcc_flags(archs: Iterable[int]) -> list[str]:
    """Flags of every .cu file, without include folders."""
    # torch's build adds these macros, which take the arithmetic of half types away from CUTLASS.
    macros = ("HALF_OPERATORS", "HALF_CONVERSIONS", "HALF2_OPERATORS", "BFLOAT16_CONVERSIONS")
    return [
        "-O3",
        "-std=c++17",
        "-DNDEBUG",
        *(f"-U__CUDA_NO_{macro}__" for macro in macros),
        "--use_fast_math",
        "-lineinfo",
        "--expt-relaxed-constexpr",
        "--expt-extended-lambda",
        "-Xcompiler",
        "-fvisibility=hidden",
        "-Xfatbin",
        "-compress-all",  # a fifth of the size; the driver unpacks a kernel's module when it is loaded
        "-Xptxas",
        "--warn-on-spills,--warn-on-local-memory-usage",
        *(flag for arch in archs for flag in gencode(arch)),
    ]


def cxx_flags(toolkit: Toolkit, folders: Sequence[str] | None = None) -> list[str]:
    """Flags of every .cpp file, without include folders and without -std, which torch's own version decides."""
    flags = [
        "-O3",
        "-g0",
        "-DNDEBUG",
        "-fvisibility=hidden",
        "-Wall",
        "-Wextra",
        "-Wno-unused-parameter",
    ]
    for folder in library_include_folders(toolkit, site_folders() if folders is None else folders):
        flags += ["-idirafter", str(folder)]
    return flags


def shared_cxx_library(compiler: Sequence[str]) -> list[str]:
    """Flags that link the C++ library as torch does, where compiler finds only a static one.

    A copy of its own inside the extension would crash where an exception's text is put together.
    """
    command = [*compiler, "-print-file-name=libstdc++.so"]  # prints the bare name if there is none
    try:
        found = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    except OSError:  # no such compiler: the build itself will say so
        return []
    return [] if os.path.isfile(found) else ["-l:libstdc++.so.6"]


def library_include_folders(toolkit: Toolkit, folders: Iterable[str]) -> list[Path]:
    """Include folders of nvidia wheels that hold library headers the toolkit lacks."""
    missing = {h for h in LIBRARY_HEADERS if not (toolkit.include / h).is_file()}
    found = []
    for folder in folders:
        for include in sorted(Path(folder).glob("nvidia/*/include")):
            here = {h for h in missing if (include / h).is_file()}
            if here:
                found.append(include)
                missing -= here
    return found


def cudart_folder(toolkit: Toolkit, folders: Iterable[str], scratch: Path) -> Path:
    """A folder with libcudart.so to link to.

    Taken from the toolkit, or made in scratch as a link to the versioned library of a wheel, which
    ships no plain name.
    """
    for name in ("lib64", "lib", "targets/x86_64-linux/lib", "targets/sbsa-linux/lib"):
        if (toolkit.root / name / "libcudart.so").exists():
            return toolkit.root / name
    roots = [toolkit.root / "lib64", toolkit.root / "lib"]
    roots += [lib for folder in folders for lib in sorted(Path(folder).glob("nvidia/*/lib"))]
    major = toolkit.version.split(".")[0]
    for lib in roots:
        for library in sorted(lib.glob(f"libcudart.so.{major}*")):
            scratch.mkdir(parents=True, exist_ok=True)
            link = scratch / "libcudart.so"
            link.unlink(missing_ok=True)
            link.symlink_to(library.resolve())
            return scratch.resolve()
    raise BuildError(
        f"no libcudart.so.{major} in {toolkit.root} nor in the nvidia packages of this environment"
    )
