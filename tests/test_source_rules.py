"""Rules of the sources: layers, lengths, prints, paths, headers that compile alone, format."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from csrc import build_config
from third_party.fetch_cutlass import find_cutlass

ROOT = Path(__file__).resolve().parents[1]
CPP = sorted(p for p in (ROOT / "csrc").rglob("*") if p.suffix in {".h", ".cpp", ".cuh", ".cu"})
CPP_TESTS = sorted(p for p in (ROOT / "tests").rglob("*") if p.suffix in {".h", ".cpp"})
CPP_STUDIES = sorted(p for p in (ROOT / "studies").rglob("*") if p.suffix in {".h", ".cuh", ".cu"})
PYTHON_FOLDERS = ("flash_attn", "csrc", "third_party", "tests", "benchmarks", "studies", "examples")
PYTHON = [ROOT / "setup.py"]
PYTHON += [
    p
    for folder in PYTHON_FOLDERS
    for p in (ROOT / folder).rglob("*.py")
    if "cutlass/" not in str(p)
]
TEXT_SUFFIXES = {".md", ".toml", ".cfg", ".yaml", ".yml", ".json", ".txt", ".in"}
TEST_NAME = re.compile(r"^def (test_\w+)", re.MULTILINE)
MAXIMUM_LINES = 370


def _id(path: Path) -> str:
    return str(path.relative_to(ROOT))


def code_of(text: str) -> str:
    """C++ text without its comments."""
    return re.sub(r"//[^\n]*|/\*.*?\*/", "", text, flags=re.DOTALL)


def torch_includes(text: str) -> list[str]:
    """Headers of torch that a C++ text includes."""
    return re.findall(r'#include\s*[<"]((?:torch|ATen|c10|pybind11)/[^>"]+)[>"]', text)


def prints(text: str) -> list[str]:
    """Calls in a C++ text that write to the terminal or end the process."""
    call = r"\b(?:f?printf|puts|abort|exit)\s*\(|\bstd::(?:cout|cerr|clog)\b"
    return re.findall(call, code_of(text))


def has_device_instructions(text: str) -> bool:
    """Whether a C++ text launches kernels or calls what only nvcc knows."""
    pattern = r"<<<|\b__\w+_sync\s*\(|\b__sync\w+\s*\(|\b__ldg\b|\bthreadIdx\b|\bblockIdx\b"
    return re.search(pattern, code_of(text)) is not None


def head_dim_comparisons(text: str) -> list[str]:
    """Comparisons of a head dimension with a number in a C++ text."""
    name, sign, number = r"(?:k?HeadDim|head_dim)\w*", r"(?:[<>]=?|[=!]=)", r"\d+\b"
    found = rf"\b{name}\s*{sign}\s*{number}|\b{number}\s*{sign}\s*(?:\w+::)*{name}"
    return re.findall(rf"{found}|\bswitch\s*\([^)]*{name}", code_of(text))


def compiler_tricks(text: str) -> list[str]:
    """What a C++ text does to the compiler alone: empty instructions, promises, computed barriers.

    A barrier of so many threads is none: that is how warps meet which are not the whole block.
    """
    return re.findall(
        r'asm\s*(?:volatile)?\s*\(\s*""|__builtin_assume|bar\.sync %\d;', code_of(text)
    )


def machine_paths(text: str) -> list[str]:
    """Absolute paths in a text that exist on one machine only."""
    folders = "|".join(("home", "root", "work", "Users", "mnt", "scratch"))
    return re.findall(rf"(?<![\w.\-/$}})])/(?:{folders})/[\w.\-]+", text)


def cited_pages(text: str) -> list[tuple[str, str]]:
    """Pages of documentation that a text names, each with the section in quotes behind it, if any."""
    return re.findall(r'\b((?:docs|csrc|benchmarks)/[\w/]+\.md)(?:, "([^"]+)")?', text)


def test_rules_see_what_they_are_for() -> None:
    assert cited_pages('(docs/a.md, "B c"), csrc/README.md') == [
        ("docs/a.md", "B c"),
        ("csrc/README.md", ""),
    ]
    assert torch_includes("#include <torch/extension.h>\n") == ["torch/extension.h"]
    assert not torch_includes('#include "torch_like.h"\n')
    assert prints('printf("x");') and prints("std::cout << 1;") and prints("  exit(1);")
    assert not prints('// printf("x")\nsnprintf(text, 4, "x");')
    assert has_device_instructions("kernel<<<1, 32>>>();")
    assert has_device_instructions("__shfl_xor_sync(~0u, x, 2)")
    assert not has_device_instructions("// threadIdx\nint tile = block / heads;")
    assert head_dim_comparisons("if (Traits::kHeadDim <= 64) {") == ["kHeadDim <= 64"]
    assert head_dim_comparisons("128 == Traits::kHeadDim") and head_dim_comparisons("head_dim>96")
    assert head_dim_comparisons("switch (Traits::kHeadDim) {")
    assert not head_dim_comparisons("column < problem.head_dim; kHeadDim / 16 // kHeadDim == 64")
    assert compiler_tricks('asm volatile("" : "+r"(x));') and compiler_tricks("__builtin_assume(x)")
    assert not compiler_tricks('asm volatile("ldmatrix %0" : "=r"(x)); // asm("")')
    assert compiler_tricks('asm volatile("bar.sync %0;" ::"r"(x))')
    assert not compiler_tricks('asm volatile("bar.sync %0, %1;" ::"r"(x), "n"(128))')
    # Written in parts, so that this file follows the rule.
    assert machine_paths("see " + "/home" + "/someone/x") and machine_paths("'" + "/root" + "/x'")
    assert not machine_paths("csrc/torch/work/x https://x.org/home/y")


@pytest.mark.parametrize("path", [*CPP, *CPP_STUDIES], ids=_id)
def test_comments_cite_pages_and_sections_that_exist(path: Path) -> None:
    for page, section in cited_pages(path.read_text()):
        headings = re.findall(r"^#+ (.+)$", (ROOT / page).read_text(), re.MULTILINE)
        assert not section or section in headings, f"{page} has no section {section}"


@pytest.mark.parametrize("path", CPP, ids=_id)
def test_only_csrc_torch_includes_torch(path: Path) -> None:
    if not path.is_relative_to(ROOT / "csrc" / "torch"):
        assert not torch_includes(path.read_text())


@pytest.mark.parametrize("path", CPP, ids=_id)
def test_kernels_and_seam_are_below_the_host(path: Path) -> None:
    if path.is_relative_to(ROOT / "csrc" / "kernels") or path.name == "flash.h":
        assert not re.findall(r'#include\s*"((?:host|torch)/[^"]+)"', path.read_text())


@pytest.mark.parametrize("path", CPP, ids=_id)
def test_tricks_on_the_compiler_stand_in_one_file(path: Path) -> None:
    assert path.name == "compiler.cuh" or not compiler_tricks(path.read_text())


def test_softcap_is_computed_in_one_place() -> None:
    users = {p.name for p in CPP if re.search(r"\btanh", code_of(p.read_text()))}
    assert users == {"approximations.cuh", "score.cuh"}


ISA = [p for p in CPP if re.search(r"/kernels/sm\d+/", p.as_posix())]


@pytest.mark.parametrize("path", ISA, ids=_id)
def test_choices_by_head_dimension_stand_in_the_tables(path: Path) -> None:
    tables = ("tile_config.h", "loop_forms.h")
    assert path.name in tables or not head_dim_comparisons(path.read_text())


@pytest.mark.parametrize("path", [*CPP, *CPP_STUDIES], ids=_id)
def test_file_is_short(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= MAXIMUM_LINES


@pytest.mark.parametrize("path", [*CPP, *CPP_STUDIES], ids=_id)
def test_nothing_prints_or_exits(path: Path) -> None:
    assert not prints(path.read_text())


def test_names_of_tests_say_what_they_test() -> None:
    """No codes of lists that a reader cannot look up, as in test_no_keys_Z2."""
    names = [
        n for p in (ROOT / "tests").glob("test_*.py") for n in TEST_NAME.findall(p.read_text())
    ]
    assert len(names) > 100
    assert not [name for name in names if re.search(r"_[A-Z]\d+(_|$)", name)]


def test_no_machine_paths() -> None:
    texts = [p for p in ROOT.glob("*") if p.is_file() and p.suffix in TEXT_SUFFIXES]
    for folder in (*PYTHON_FOLDERS, "docs", ".ci", ".github"):
        texts += [p for p in (ROOT / folder).rglob("*") if p.suffix in TEXT_SUFFIXES]
    texts += [ROOT / "Makefile", ROOT / ".ci" / "run", *CPP, *CPP_TESTS, *CPP_STUDIES, *PYTHON]
    texts = [p for p in texts if p.is_file() and not p.is_relative_to(ROOT / "third_party/cutlass")]
    found = {_id(p): machine_paths(p.read_text()) for p in texts}
    assert not {name: paths for name, paths in found.items() if paths}


HEADERS = [p for p in CPP if p.suffix == ".cuh" and p.parent.name in {"pieces", "instructions"}]
HEADERS += [p for p in CPP if p.suffix == ".h"]


@pytest.mark.parametrize("path", HEADERS, ids=_id)
def test_header_compiles_alone(path: Path, tmp_path: Path) -> None:
    """As plain C++ where it is integers and layouts; with nvcc where it has device instructions."""
    toolkit, cutlass = build_config.find_toolkit(), find_cutlass()
    if path.is_relative_to(ROOT / "csrc" / "torch"):
        pytest.skip("needs torch's CUDA headers; the build compiles it")
    files, names = _closure(path)
    on_device = "cutlass/numeric_conversion.h" in names
    on_device |= any(has_device_instructions(file.read_text()) for file in files)
    if on_device and toolkit is None:
        pytest.skip("needs nvcc")
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    command = ["g++", "-std=c++17", "-fsyntax-only", "-Wall", "-Wextra", "-x", "c++"]
    if on_device:
        command = [str(toolkit.nvcc), "-std=c++17", "-arch=sm_90a", "-c", "-x", "cu"]
        command += ["-o", str(tmp_path / "alone.o")]
    command += [f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'csrc' / 'kernels'}"]
    if any(name.startswith(("cute/", "cutlass/")) for name in names):
        if cutlass is None:
            pytest.skip("needs CUTLASS: python3 third_party/fetch_cutlass.py")
        command += ["-isystem", str(cutlass.include)]
    if any(re.match(r"cute/|cutlass/|cuda|vector_types", name) for name in names):
        if toolkit is None:
            pytest.skip("needs the headers of a CUDA toolkit")
        command += ["-isystem", str(toolkit.include), "-isystem", str(toolkit.include / "cccl")]
    source = tmp_path / "alone.cpp"
    source.write_text(f'#include "{path}"\n')
    result = subprocess.run([*command, str(source)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def _closure(path: Path) -> tuple[set[Path], set[str]]:
    """A file with our own headers that it reaches, and all names that these include."""
    files, names, pending = {path}, set(), [path]
    while pending:
        current = pending.pop()
        for name in re.findall(r'#include\s*[<"]([^>"]+)[>"]', current.read_text()):
            names.add(name)
            folders = (current.parent, ROOT / "csrc", ROOT / "csrc" / "kernels")
            ours = next((f / name for f in folders if (f / name).is_file()), None)
            if ours is not None and ours not in files:
                files.add(ours)
                pending.append(ours)
    return files, names


def _tool(name: str) -> str:
    beside = Path(sys.executable).parent / name
    found = str(beside) if beside.is_file() else shutil.which(name)
    if found is None:
        pytest.skip(f"needs {name}")
    return found


def test_cpp_is_formatted() -> None:
    files = [str(p) for p in (*CPP, *CPP_TESTS, *CPP_STUDIES)]
    command = [_tool("clang-format"), "--dry-run", "--Werror", *files]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, f"make format\n{result.stderr[:3000]}"


@pytest.mark.parametrize("arguments", [["check"], ["format", "--check"]], ids=" ".join)
def test_python_follows_ruff(arguments: list[str]) -> None:
    command = [_tool("ruff"), *arguments, "--no-cache", *map(str, PYTHON)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, f"make format\n{result.stdout[:3000]}"
