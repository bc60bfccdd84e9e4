"""The kernels' integer and layout logic, compiled with g++ and checked without a GPU."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent
CPP = TESTS / "cpp"
ROOT = TESTS.parent
FLAGS = ["-std=c++17", "-Wall", "-Wextra", "-Werror"]

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
needs_source = pytest.mark.skipif(
    not (ROOT / "csrc" / "kernels" / "pieces").is_dir(), reason="needs the source tree"
)


def _cuda_roots() -> list[Path]:
    roots = [Path(os.environ[n]) for n in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(n)]
    nvcc = shutil.which("nvcc")
    if nvcc is not None:
        roots.append(Path(nvcc).resolve().parents[1])
    roots += sorted(Path("/usr/local").glob("cuda*"), reverse=True)
    spec = importlib.util.find_spec("nvidia")
    for base in (spec.submodule_search_locations or []) if spec else []:
        roots += [Path(base) / "cuda_runtime", *sorted(Path(base).glob("cu1*"))]
    return roots


@cache
def cuda_include() -> Path | None:
    """Folder with the CUDA runtime's headers."""
    folders = (root / "include" for root in _cuda_roots())
    return next((f for f in folders if (f / "cuda_runtime_api.h").is_file()), None)


@cache
def cutlass_include() -> Path | None:
    """Folder with cute/tensor.hpp: CUTLASS_PATH, or what setup.py put under third_party/."""
    given = os.environ.get("CUTLASS_PATH")
    folders = [Path(given), Path(given) / "include"] if given else []
    third_party = ROOT / "third_party"
    folders += [p.parents[1] for p in third_party.glob("**/cute/tensor.hpp")]
    return next((f for f in folders if (f / "cute" / "tensor.hpp").is_file()), None)


def build(name: str, tmp_path: Path, *, optimise: str, cute: bool = False) -> Path:
    """Compile cpp/<name>.cpp and return the program."""
    includes = [f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'csrc' / 'kernels'}"]
    cuda = cuda_include()
    includes += [f"-isystem{CPP / 'stub'}"] if cuda is None else [f"-isystem{cuda}"]
    if cute:
        if cuda is None:
            pytest.skip("needs the CUDA headers (set CUDA_HOME)")
        if cutlass_include() is None:
            pytest.skip("needs the CUTLASS headers (set CUTLASS_PATH)")
        includes += [f"-isystem{cuda / 'cccl'}", f"-isystem{cutlass_include()}"]
    program = tmp_path / name
    command = ["g++", *FLAGS, optimise, *includes, str(CPP / f"{name}.cpp"), "-o", str(program)]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr[-4000:]
    return program


def run(program: Path, *arguments: str, **env: str) -> str:
    """Run a program and return what it printed.  env: environment variables for it alone."""
    command = [str(program), *arguments]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=120, env=os.environ | env)
    sys.stdout.write(ran.stdout)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout


@needs_source
@needs_compiler
@pytest.mark.parametrize(
    "name",
    [
        *("check_visibility", "check_tile_order", "check_shares", "check_split"),
        *("check_kv_cache", "check_level", "check_dropout", "check_choose", "check_decode_plan"),
        *("check_ring", "check_tile_counter"),
    ],
)
def test_integer_piece(name: str, tmp_path: Path) -> None:
    assert " 0 wrong" in run(build(name, tmp_path, optimise="-O2"))


@needs_source
@needs_compiler
def test_dispatch_to_made_up_kernels(tmp_path: Path) -> None:
    program = build("check_dispatch", tmp_path, optimise="-O1")
    for isa in ("", "sm80", "sm90", "hopper"):
        assert " 0 wrong" in run(program, isa, FLASH_ATTN_ISA=isa, FLASH_ATTN_TEST_SMEM_KB="")
    wrong = ("100", "0", "-99", "+99", "099", " 99", "99 ", "99 KB", "4294967395", "small")
    for kb in ("99", "163", "227", *wrong):
        env = {"FLASH_ATTN_ISA": "", "FLASH_ATTN_TEST_SMEM_KB": kb}
        assert " 0 wrong" in run(program, "", kb, **env)


@needs_source
@needs_compiler
@pytest.mark.parametrize("name", ["check_mask", "check_fragment", "check_tiles"])
def test_layout_piece(name: str, tmp_path: Path) -> None:
    assert " 0 wrong" in run(build(name, tmp_path, optimise="-O1", cute=True))


@needs_source
@needs_compiler
def test_launch_gets_all_that_it_asks_for_or_is_an_error(tmp_path: Path) -> None:
    if cuda_include() is None:
        pytest.skip("needs the CUDA headers (set CUDA_HOME)")
    assert " 0 wrong" in run(build("check_launch", tmp_path, optimise="-O1"))


@needs_source
@needs_compiler
def test_stub_of_the_cuda_header_is_enough_for_the_seam(tmp_path: Path) -> None:
    """Machines without CUDA compile csrc/flash.h, too."""
    source = tmp_path / "seam.cpp"
    source.write_text('#include "flash.h"\nint main() { return flash::Problem{}.batch; }\n')
    includes = [f"-isystem{CPP / 'stub'}", f"-I{ROOT / 'csrc'}"]
    subprocess.run(["g++", *FLAGS, *includes, "-fsyntax-only", str(source)], check=True)
