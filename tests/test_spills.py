"""No shipped kernel spills registers, uses local memory or serialises wgmma, and no compiler warns.

Needs nvcc for fresh compilations, never a GPU.
"""

import json
import os
from pathlib import Path

import pytest

from benchmarks import bench_build
from csrc import build_config
from csrc.build_config import BuildError
from csrc.kernels import kernel_list
from third_party.fetch_cutlass import CutlassError, find_cutlass

ROOT = Path(__file__).resolve().parents[1]
# Compiled afresh: the first kernels to spill when something grows, at about a minute each.
UNITS = os.environ.get(
    "FLASH_ATTN_SPILL_UNITS", "fwd_sm80_hd64_bf16 fwd_sm90_hd128_bf16 bwd_hd128_bf16"
).split()

CLEAN = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z3fooPf' for 'sm_90a'
ptxas info    : Function properties for _Z3fooPf
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 168 registers, used 1 barriers, 1024 bytes smem
"""
SPILLING = """\
ptxas warning : Registers are spilled to local memory in function '_Z3barPf', 8 bytes spill stores
ptxas info    : Compiling entry function '_Z3barPf' for 'sm_80'
ptxas info    : Function properties for _Z3barPf
    16 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers, 16 bytes cumulative stack size
"""
CALLEE = """\
ptxas info    : Function properties for _Z6calleev
    32 bytes stack frame, 4 bytes spill stores, 4 bytes spill loads
"""
# Of CUDA 13.0, for a kernel that changes an accumulator between two wgmma instructions.
SERIALIZED = (
    "ptxas info    : (C7519) warpgroup.arrive is injected in around line 42 by compiler to allow "
    "use of registers in GMMA in function '_Z6serialPfmm'\n"
    "ptxas info    : (C7511) Potential Performance Loss: wgmma.mma_async instructions are "
    "serialized due to insufficient register resources for the wgmma pipeline in the function "
    "'_Z6serialPfmm'\n"
    "ptxas info    : 0 bytes gmem\n"
)


def test_parser_reads_registers_and_shared_memory() -> None:
    (kernel,) = bench_build.parse_ptxas(CLEAN)
    assert (kernel.name, kernel.arch) == ("_Z3fooPf", "sm_90a")
    assert (kernel.registers, kernel.smem) == (168, 1024)
    assert kernel.is_clean


def test_parser_reads_spills_of_each_kernel() -> None:
    clean, spilling = bench_build.parse_ptxas(CLEAN + SPILLING)
    assert clean.is_clean
    assert (spilling.stack, spilling.spill_stores, spilling.spill_loads) == (16, 8, 12)
    assert not spilling.is_clean


def test_parser_counts_functions_that_were_not_inlined() -> None:
    (kernel,) = bench_build.parse_ptxas(CLEAN + CALLEE)
    assert (kernel.stack, kernel.spill_stores, kernel.spill_loads) == (32, 4, 4)


def test_parser_reads_serialized_wgmma_of_the_kernel_that_has_it() -> None:
    serial = CLEAN.replace("_Z3fooPf", "_Z6serialPfmm")
    clean, dirty = bench_build.parse_ptxas(SERIALIZED + CLEAN + serial)
    assert clean.is_clean and not dirty.is_clean
    assert [text.partition(":")[0] for text in dirty.serialized] == ["C7519", "C7511"]
    assert "wgmma.mma_async instructions are serialized" in dirty.serialized[1]


def test_parser_keeps_serialized_wgmma_of_a_function_that_is_no_kernel() -> None:
    (kernel,) = bench_build.parse_ptxas(SERIALIZED + CLEAN)
    assert not kernel.is_clean


@pytest.mark.parametrize(
    "line",
    [
        'a.cuh(3): warning #549-D: variable "x" is used before its value is set',
        "nvcc warning : Support for offline compilation will be removed",
        "a.cpp:3:5: warning: unused variable 'x' [-Wunused-variable]",
        SPILLING.splitlines()[0],
    ],
)
def test_warnings_of_every_compiler_are_found(line: str) -> None:
    assert bench_build.find_warnings(f"{CLEAN}  {line}\n{CLEAN}") == [line]
    assert bench_build.find_warnings(CLEAN + CALLEE) == []


def test_parser_of_text_without_kernels() -> None:
    assert bench_build.parse_ptxas("ptxas info    : 0 bytes gmem\n") == []


HEAD = {"nvcc": "13.0", "cutlass": "4.2.0", "machine": "m", "flags": "f"}


def _unit(
    archs: list[int], code: str, registers: int, name: str = "bwd_sm80_hd64_bf16"
) -> bench_build.Unit:
    kernels = [bench_build.Kernel("k", build_config.target_name(arch), registers) for arch in archs]
    source = str(bench_build.GENERATED / f"{name}.cu")
    warnings = [f"a warning of {arch}" for arch in archs]
    return bench_build.Unit(
        name, source, 1.0, 1.0, 1.0, archs, 1, [], code, kernels, warnings=warnings
    )


@pytest.mark.parametrize(
    "code, head, kept",
    [
        ("same", {}, True),
        ("other", {}, False),
        ("same", {"flags": "other"}, False),
        ("same", {"nvcc": "13.1"}, False),
    ],
    ids=["same", "code", "flags", "compiler"],
)
def test_report_keeps_other_architectures_of_the_same_code(
    code: str, head: dict[str, str], kept: bool
) -> None:
    old = bench_build.merged(HEAD, [_unit([80, 90], "same", 1)], None)
    (entry,) = bench_build.merged(HEAD | head, [_unit([90, 120], code, 2)], old)["units"]
    found = {kernel["arch"]: kernel["registers"] for kernel in entry["kernels"]}
    assert found == ({"sm_80": 1} if kept else {}) | {"sm_90a": 2, "sm_120": 2}
    assert ("a warning of 80" in entry["warnings"]) == kept
    assert entry["archs"] == [90, 120]  # what it cost is of the last run


@pytest.mark.parametrize("order", [1, -1], ids=["90 last", "90 first"])
def test_report_of_two_runs_has_the_units_of_both(order: int) -> None:
    """A run without sm_90 has none of its own units to compile, and leaves them."""
    own = "fwd_sm90_hd64_bf16"
    without, of_90 = [_unit([80, 86, 89, 120], "c", 1)], [_unit([90], "c", 1)]
    runs = [without, [*of_90, _unit([90], "c", 1, own)]][::order]
    report = None
    for units, machine in [*zip(runs, ("m", "n"), strict=True), (runs[1], "n")]:
        report = bench_build.merged(HEAD | {"machine": machine}, units, report)
    shared, alone = report["units"]
    assert (shared["name"], alone["name"]) == ("bwd_sm80_hd64_bf16", own)
    targets = {build_config.target_name(arch) for arch in bench_build.ARCHS}
    assert {kernel["arch"] for kernel in shared["kernels"]} == targets
    assert report["machine"] == ("n" if order == 1 else "m; n")


def test_report_forgets_files_that_are_gone() -> None:
    old = bench_build.merged(HEAD, [_unit([80], "c", 1, "bwd_sm80_hd65_bf16")], None)
    report = bench_build.merged(HEAD, [_unit([80], "c", 1)], old)
    assert [unit["name"] for unit in report["units"]] == ["bwd_sm80_hd64_bf16"]


def test_report_has_tiles_for_every_size_that_a_build_has_by_default() -> None:
    for arch in bench_build.ARCHS:
        assert set(kernel_list.smem_kb([arch])) <= set(kernel_list.SMEM_KB)
    sources = [bench_build.ROOT / s for s in bench_build.sources_of_build(bench_build.ARCHS)]
    units = [
        s for s in sources if s.parent.name == bench_build.GENERATED.name and s.suffix == ".cu"
    ]
    assert len(units) == len(kernel_list.units(bench_build.ARCHS))
    sizes = ", ".join(f"SmemSize::k{kb}" for kb in kernel_list.SMEM_KB)
    assert all(f"BuiltSizes<{sizes}>" in source.read_text() for source in units)
    assert {
        str(s.relative_to(bench_build.ROOT)) for s in sources
    } == bench_build.sources_of_report()


def test_report_has_a_line_for_each_kernel() -> None:
    report = bench_build.merged(HEAD, [_unit([80, 90], "", 7)], None)
    text = bench_build.as_json(report)
    assert json.loads(text) == report
    lines = [line for line in text.splitlines() if '"registers": 7' in line]
    assert len(lines) == 2 and all('"arch"' in line and '"smem"' in line for line in lines)


@pytest.mark.parametrize("change, same", [("int a;  // why", True), ("int b;", False)])
def test_code_hash_sees_code_only(tmp_path: Path, change: str, same: bool) -> None:
    (tmp_path / "a.cuh").write_text("int a;")
    before = bench_build.code_hash(["a.cuh"], tmp_path)
    (tmp_path / "a.cuh").write_text(change)
    assert (bench_build.code_hash(["a.cuh"], tmp_path) == before) == same


@pytest.fixture(scope="module")
def compiler() -> bench_build.Compiler:
    try:
        if build_config.find_toolkit() is None:
            pytest.skip("needs nvcc")
        if find_cutlass() is None:
            pytest.skip("needs CUTLASS: python3 third_party/fetch_cutlass.py")
        return bench_build.find_compiler()
    except (BuildError, CutlassError) as error:
        pytest.fail(str(error))


def test_the_check_sees_a_kernel_that_uses_local_memory(
    compiler: bench_build.Compiler, tmp_path: Path
) -> None:
    source = tmp_path / "local.cu"
    source.write_text(
        "__global__ void local(float* x, int i) {\n"
        "  float a[64];\n"
        "  for (int j = 0; j < 64; ++j) a[(j * i) & 63] = x[j];\n"
        "  x[0] = a[i & 63] + a[(i + 7) & 63];\n"
        "}\n"
    )
    (kernel,) = bench_build.compile_file(compiler, source, tmp_path).kernels
    assert kernel.stack >= 256
    assert not kernel.is_clean


def test_the_check_sees_a_kernel_whose_wgmma_is_serialized(
    compiler: bench_build.Compiler, tmp_path: Path
) -> None:
    source = tmp_path / "serial.cu"
    source.write_text(
        "__global__ void serial(float* x, unsigned long long a, unsigned long long b) {\n"
        "  float c[4] = {x[0], x[1], x[2], x[3]};\n"
        '  asm volatile("wgmma.fence.sync.aligned;");\n'
        "  for (int i = 0; i < 4; ++i) {\n"
        '    asm volatile("wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 "\n'
        '                 "{%0, %1, %2, %3}, %4, %5, 1, 1, 1, 0, 0;"\n'
        '                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "l"(a + i), "l"(b));\n'
        "    c[0] += 1.f;\n"  # the product before must have ended
        "  }\n"
        '  asm volatile("wgmma.commit_group.sync.aligned;");\n'
        '  asm volatile("wgmma.wait_group.sync.aligned 0;");\n'
        "  for (int i = 0; i < 4; ++i) x[i] = c[i];\n"
        "}\n"
    )
    (kernel,) = bench_build.compile_file(compiler, source, tmp_path).kernels
    assert any("serialized" in text for text in kernel.serialized)
    assert not kernel.is_clean


def test_the_check_sees_a_warning(compiler: bench_build.Compiler, tmp_path: Path) -> None:
    source = tmp_path / "unset.cu"
    source.write_text("__global__ void unset(int* x) {\n  int a;\n  x[0] = a;\n}\n")
    (warning,) = bench_build.compile_file(compiler, source, tmp_path).warnings
    assert "used before its value is set" in warning


@pytest.mark.slow
@pytest.mark.parametrize("name", UNITS)
def test_kernels_compile_without_spills_and_warnings(
    compiler: bench_build.Compiler, tmp_path: Path, name: str
) -> None:
    sources = bench_build.sources_of_build(compiler.archs)
    (source,) = bench_build.select(sources, [name])
    unit = bench_build.compile_file(compiler, source, tmp_path)
    assert unit.kernels, f"{name} holds no kernel"
    spilling = [kernel for kernel in unit.kernels if not kernel.is_clean]
    assert not spilling, "\n".join(map(str, spilling))
    assert not unit.warnings, "\n".join(unit.warnings)


@pytest.fixture(scope="module")
def report() -> dict[str, dict]:
    """Units of the committed report by name."""
    assert bench_build.RESULTS.is_file(), "run benchmarks/bench_build.py"
    return {u["name"]: u for u in json.loads(bench_build.RESULTS.read_text())["units"]}


def _kernel_units() -> list[str]:
    common = sorted((ROOT / "csrc/kernels/common").glob("*.cu"))
    return [u.name for u in kernel_list.units(bench_build.ARCHS)] + [path.stem for path in common]


def _archs_of_units() -> list[tuple[str, int]]:
    """Every unit with every architecture of the report that it is compiled for."""
    of_isas = {u.name: u.archs(bench_build.ARCHS) for u in kernel_list.units(bench_build.ARCHS)}
    return [
        (name, arch) for name in _kernel_units() for arch in of_isas.get(name, bench_build.ARCHS)
    ]


@pytest.mark.parametrize("name, arch", _archs_of_units())
def test_report_shows_no_spills(report: dict[str, dict], name: str, arch: int) -> None:
    again = f"run benchmarks/bench_build.py --archs {arch} --units {name}"
    assert name in report, again
    everything = [bench_build.Kernel(**kernel) for kernel in report[name]["kernels"]]
    kernels = [kernel for kernel in everything if kernel.arch == build_config.target_name(arch)]
    # Code for each architecture has the same kernels, those that are traps in it too.
    assert {kernel.name for kernel in kernels} == {kernel.name for kernel in everything}, again
    assert kernels, again
    assert all(kernel.is_clean for kernel in kernels), [k for k in kernels if not k.is_clean]


def test_report_is_of_every_kind_of_shared_memory() -> None:
    """A GPU of each size runs the code of one of its architectures."""
    sizes = {kernel_list.SMEM_KB_OF_ARCH[arch] for arch in bench_build.ARCHS}
    assert sizes == set(kernel_list.SMEM_KB)


@pytest.mark.parametrize("name", _kernel_units())
def test_report_shows_no_warnings(report: dict[str, dict], name: str) -> None:
    assert name in report, f"run benchmarks/bench_build.py --units {name}"
    assert report[name].get("warnings") == []


@pytest.mark.parametrize("name", _kernel_units())
def test_report_is_of_the_present_sources(report: dict[str, dict], name: str) -> None:
    assert name in report, f"run benchmarks/bench_build.py --units {name}"
    inputs = report[name]["inputs"]
    assert inputs and all((ROOT / path).is_file() for path in inputs)
    stale = f"{name} has changed: run benchmarks/bench_build.py --units {name}"
    assert bench_build.code_hash(inputs) == report[name]["hash"], stale


def test_report_is_of_the_present_flags() -> None:
    flags = json.loads(bench_build.RESULTS.read_text())["flags"]
    assert flags == bench_build.flags_hash(), "nvcc's flags have changed: run bench_build.py"
