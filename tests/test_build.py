"""The build's decisions, without compiling: variables, jobs, toolkit, CUTLASS, generated files, metadata."""

import hashlib
import importlib.metadata
import inspect
import itertools
import os
import re
import runpy
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest

import flash_attn
import flash_attn.__main__ as flash_main
from csrc import build_config
from csrc.build_config import BuildError, Toolkit, Torch
from csrc.kernels import kernel_list
from csrc.kernels.generate import LISTS, generate, targets_of
from csrc.nvcc_of_unit import command_for_unit
from third_party import fetch_cutlass
from third_party.fetch_cutlass import CutlassError

ROOT = Path(__file__).resolve().parents[1]
GIB = 2**30
PASSES = ("fwd", "bwd", "decode")
ISAS = tuple(kernel_list.PASSES)
SOURCES = {".py", ".h", ".cpp", ".cuh", ".cu"}


# --- Environment variables -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, archs",
    [
        ("", ()),
        ("90", (90,)),
        ("90;80", (80, 90)),
        ("8.0, 9.0", (80, 90)),
        ("sm_90a", (90,)),
        ("12.0", (120,)),
        ("90 90a", (90,)),
    ],
)
def test_archs_are_read(text: str, archs: tuple[int, ...]) -> None:
    assert build_config.parse_archs(text) == archs


@pytest.mark.parametrize("text", ["hopper", "9", "90b", "80;x", "-80"])
def test_bad_archs_are_named(text: str) -> None:
    with pytest.raises(BuildError, match="FLASH_ATTN_CUDA_ARCHS.*not an architecture"):
        build_config.parse_archs(text)


def test_archs_before_ampere_are_refused() -> None:
    with pytest.raises(BuildError, match="sm_80 or newer, got sm_75"):
        build_config.parse_archs("75;90")


def test_head_dims_are_read() -> None:
    assert build_config.parse_head_dims("") == kernel_list.HEAD_DIMS
    assert build_config.parse_head_dims("128, 64;128") == (64, 128)


def test_head_dim_without_its_own_kernel_is_refused_with_the_kernel_to_build() -> None:
    with pytest.raises(BuildError, match=r"FLASH_ATTN_HEAD_DIMS.*'80'.*kernel of 96"):
        build_config.parse_head_dims("64,80")
    with pytest.raises(BuildError, match="'512' is not one of 32"):
        build_config.parse_head_dims("512")


def test_dtypes_are_read() -> None:
    assert build_config.parse_dtypes("") == ("fp16", "bf16")
    assert build_config.parse_dtypes("bf16") == ("bf16",)
    with pytest.raises(BuildError, match="FLASH_ATTN_DTYPES.*'fp8'.*fp16, bf16"):
        build_config.parse_dtypes("bf16,fp8")


def test_sizes_of_shared_memory_are_read() -> None:
    assert build_config.parse_smem_kb("") == ()
    assert build_config.parse_smem_kb("99,227;99") == (227, 99)
    with pytest.raises(BuildError, match="FLASH_ATTN_SMEM_KB.*'100'.*227, 163, 99"):
        build_config.parse_smem_kb("227,100")


@pytest.mark.parametrize("text", ["0", "-1", "two", "1.5"])
def test_bad_max_jobs_is_refused(text: str) -> None:
    with pytest.raises(BuildError, match="MAX_JOBS"):
        build_config.parse_max_jobs(text)


@pytest.mark.parametrize("text, value", [("", False), ("0", False), ("1", True)])
def test_switch_is_read(text: str, value: bool) -> None:
    assert build_config.parse_switch("FLASH_ATTN_TEST_UNITS", text) is value
    assert build_config.parse_switch("ANY", text, default=True) is (value or text == "")


@pytest.mark.parametrize(
    "name",
    ["FLASH_ATTN_SKIP_CUDA_BUILD", "FLASH_ATTN_BUILD_WITHOUT_GPU", "FLASH_ATTN_TEST_UNITS"],
)
def test_bad_switch_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "yes")
    with pytest.raises(BuildError, match=f"{name}='yes' is neither 0 nor 1"):
        build_config.plan_from_environment()


def test_skip_builds_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASH_ATTN_SKIP_CUDA_BUILD", "1")
    monkeypatch.setattr(build_config, "find_torch", lambda: pytest.fail("torch is not needed"))
    assert not build_config.plan_from_environment().has_extension


# --- Jobs ------------------------------------------------------------------------------------------


def machine(root: Path, files: dict[str, str], cgroup: str = "0::/box\n") -> Path:
    """A /proc and a /sys with these files."""
    files = {"proc/meminfo": f"MemAvailable: {64 * GIB // 1024} kB\n"} | files
    for name, text in (files | {"proc/self/cgroup": cgroup}).items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


V1 = "4:memory:/a/b\n3:cpu,cpuacct:/a/b\n0::/\n"


@pytest.mark.parametrize(
    "cgroup, files, cpus",
    [
        ("0::/box\n", {}, 16),
        ("0::/box\n", {"sys/fs/cgroup/box/cpu.max": "max 100000\n"}, 16),
        ("0::/box\n", {"sys/fs/cgroup/box/cpu.max": "400000 100000\n"}, 4),
        ("0::/box\n", {"sys/fs/cgroup/box/cpu.max": "50000 100000\n"}, 1),
        ("0::/box/job\n", {"sys/fs/cgroup/box/cpu.max": "300000 100000\n"}, 3),
        (
            V1,
            {
                "sys/fs/cgroup/cpu,cpuacct/a/b/cpu.cfs_quota_us": "200000\n",
                "sys/fs/cgroup/cpu,cpuacct/a/b/cpu.cfs_period_us": "100000\n",
            },
            2,
        ),
        (
            V1,
            {
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            },
            16,
        ),
    ],
)
def test_cpus_honor_cgroup_quotas(
    tmp_path: Path, cgroup: str, files: dict[str, str], cpus: int
) -> None:
    assert build_config.available_cpus(machine(tmp_path, files, cgroup), affinity=16) == cpus


def test_cpus_honor_affinity(tmp_path: Path) -> None:
    assert build_config.available_cpus(machine(tmp_path, {}), affinity=3) == 3
    here = build_config.available_cpus(machine(tmp_path, {}))
    assert here == len(os.sched_getaffinity(0))


@pytest.mark.parametrize(
    "cgroup, files, gib",
    [
        ("0::/box\n", {}, 64),
        (
            "0::/box\n",
            {
                "sys/fs/cgroup/box/memory.max": f"{16 * GIB}\n",
                "sys/fs/cgroup/box/memory.current": f"{10 * GIB}\n",
                "sys/fs/cgroup/box/memory.stat": f"anon 1\ninactive_file {4 * GIB}\n",
            },
            10,
        ),
        (
            "0::/box\n",
            {
                "sys/fs/cgroup/box/memory.max": "max\n",
                "sys/fs/cgroup/box/memory.current": f"{10 * GIB}\n",
            },
            64,
        ),
        (
            V1,
            {
                "sys/fs/cgroup/memory/a/memory.limit_in_bytes": f"{8 * GIB}\n",
                "sys/fs/cgroup/memory/a/memory.usage_in_bytes": f"{3 * GIB}\n",
                "sys/fs/cgroup/memory/a/memory.stat": f"total_inactive_file {GIB}\n",
                "sys/fs/cgroup/memory/a/b/memory.limit_in_bytes": "9223372036854771712\n",
                "sys/fs/cgroup/memory/a/b/memory.usage_in_bytes": f"{3 * GIB}\n",
            },
            6,
        ),
    ],
)
def test_memory_honors_cgroup_limits(
    tmp_path: Path, cgroup: str, files: dict[str, str], gib: int
) -> None:
    assert build_config.available_memory(machine(tmp_path, files, cgroup)) == gib * GIB


def test_memory_may_be_unknown(tmp_path: Path) -> None:
    assert build_config.available_memory(tmp_path) is None


@pytest.mark.parametrize(
    "max_jobs, cpus, memory, jobs",
    [
        (None, 16, 64 * 10**9, 12),
        (None, 2, 16 * 10**9, 2),
        (None, 16, 2 * 10**9, 1),
        (None, 4, None, 4),
        (7, 2, 10**9, 7),
        (None, 1, 64 * 10**9, 1),
    ],
)
def test_jobs(max_jobs: int | None, cpus: int, memory: int | None, jobs: int) -> None:
    assert build_config.compute_jobs(max_jobs, cpus, memory) == jobs


def test_units_with_tiles_of_several_sizes_take_more_memory() -> None:
    found = [build_config.compute_jobs(None, 16, 63 * 10**9, sizes) for sizes in (1, 2, 3)]
    assert found == [12, 9, 7]


# --- Toolkit and plan ------------------------------------------------------------------------------


def fake_toolkit(root: Path, version: str = "13.0", archs: str = "75 80 90") -> Toolkit:
    """A toolkit whose nvcc answers --version, --dryrun and --list-gpu-arch."""
    (root / "bin").mkdir(parents=True)
    (root / "include").mkdir()
    (root / "include" / "cuda_runtime.h").touch()
    nvcc = root / "bin" / "nvcc"
    nvcc.write_text(
        "#!/bin/sh\n"
        'case "$*" in\n'
        f'*--version*) echo "Cuda compilation tools, release {version}, V{version}.88";;\n'
        f'*--dryrun*) echo "#\\$ TOP={root}/bin/.." >&2;;\n'
        f"*--list-gpu-arch*) for arch in {archs}; do echo compute_$arch; done;;\n"
        "esac\n"
    )
    nvcc.chmod(0o755)
    return Toolkit(root, version)


def test_toolkit_is_found_through_a_wrapper_script(tmp_path: Path) -> None:
    toolkit = fake_toolkit(tmp_path / "cuda")
    wrapper = tmp_path / "scripts" / "nvcc"
    wrapper.parent.mkdir()
    wrapper.write_text(f'#!/bin/sh\nexec {toolkit.nvcc} "$@"\n')
    wrapper.chmod(0o755)
    env = {"PATH": f"{wrapper.parent}{os.pathsep}{os.environ['PATH']}"}
    assert build_config.find_toolkit(env) == toolkit


def test_cuda_home_goes_before_cuda_path_and_nvcc_on_path(tmp_path: Path) -> None:
    home = fake_toolkit(tmp_path / "home", "12.9")
    path = fake_toolkit(tmp_path / "path", "13.1")
    nvcc = fake_toolkit(tmp_path / "nvcc", "13.2")
    env = {"PATH": f"{nvcc.root / 'bin'}{os.pathsep}{os.environ['PATH']}"}
    assert build_config.find_toolkit(env) == nvcc
    env["CUDA_PATH"] = str(path.root)
    assert build_config.find_toolkit(env) == path
    env["CUDA_HOME"] = str(home.root)
    assert build_config.find_toolkit(env) == home
    env["CUDA_HOME"] = str(tmp_path / "not there")
    assert build_config.find_toolkit(env) == path


CUDA_TORCH = Torch("2.11.0+cu130", "13.0", ())


def test_plan_without_cuda_in_torch(tmp_path: Path) -> None:
    plan = build_config.make_plan({}, fake_toolkit(tmp_path / "c"), Torch("2.13.0+cpu", None, ()))
    assert not plan.has_extension
    assert plan.message.startswith("torch 2.13.0+cpu has no CUDA")


def test_plan_without_nvcc() -> None:
    plan = build_config.make_plan({}, None, CUDA_TORCH)
    assert not plan.has_extension
    assert "CUDA 13.0, but there is no nvcc" in plan.message


def test_plan_without_torch(tmp_path: Path) -> None:
    plan = build_config.make_plan({}, fake_toolkit(tmp_path / "c"), "no torch")
    assert not plan.has_extension
    assert plan.message.startswith("no torch in this environment")


def test_mismatch_names_both_versions(tmp_path: Path) -> None:
    toolkit = fake_toolkit(tmp_path / "c", "12.8")
    with pytest.raises(BuildError, match=r"version 12\.8.*CUDA 13\.0.*must match"):
        build_config.make_plan({}, toolkit, CUDA_TORCH)


@pytest.mark.parametrize(
    "capabilities, env, archs",
    [
        ((), {}, (80, 90)),
        ((90,), {}, (90,)),
        ((75, 80), {}, (80,)),
        ((90,), {"FLASH_ATTN_CUDA_ARCHS": "80"}, (80,)),
    ],
)
def test_plan_builds_for_the_gpu_that_is_there(
    tmp_path: Path, capabilities: tuple[int, ...], env: dict[str, str], archs: tuple[int, ...]
) -> None:
    torch = Torch("2.11.0+cu130", "13.0", capabilities)
    plan = build_config.make_plan(env, fake_toolkit(tmp_path / "c", "13.1"), torch)
    assert plan.archs == archs
    assert plan.head_dims == kernel_list.HEAD_DIMS and plan.dtypes == kernel_list.DTYPES
    assert all(f"sm_{arch}" in plan.message for arch in archs) and "13.1" in plan.message


@pytest.mark.parametrize(
    "archs, sizes",
    [
        ("80", (163, 99)),
        ("87", (163,)),
        ("86", (99,)),
        ("89;120;121", (99,)),
        ("90", (227,)),
        ("100;103", (227,)),
        ("80;90", (227, 163, 99)),  # code for 8.0 runs on 8.6 and 8.9
        ("80;86;89;90;120", (227, 163, 99)),
        ("88", (99,)),  # not in the table: the size that fits every GPU
    ],
)
def test_plan_has_the_tiles_that_its_targets_need(
    tmp_path: Path, archs: str, sizes: tuple[int, ...]
) -> None:
    torch = Torch("2.11.0+cu130", "13.0", ())
    env = {"FLASH_ATTN_CUDA_ARCHS": archs}
    toolkit = fake_toolkit(tmp_path / "c", "13.0", "80 86 87 88 89 90 100 103 120 121")
    plan = build_config.make_plan(env, toolkit, torch)
    assert plan.smem_kb == sizes == kernel_list.smem_kb(plan.archs)
    assert f"tiles for {', '.join(map(str, sizes))} KB" in plan.message
    wanted = build_config.make_plan(env | {"FLASH_ATTN_SMEM_KB": "99,163"}, toolkit, torch)
    assert wanted.smem_kb == (163, 99)
    if 99 in sizes and 80 not in plan.archs:
        with pytest.raises(BuildError, match=r"SMEM_KB='163': sm_\d+ needs tiles for 99 KB"):
            build_config.make_plan(env | {"FLASH_ATTN_SMEM_KB": "163"}, toolkit, torch)


NO_BUILD_WITHOUT_GPU = {"FLASH_ATTN_BUILD_WITHOUT_GPU": "0"}


@pytest.mark.parametrize(
    "capabilities, env, archs",
    [
        ((), NO_BUILD_WITHOUT_GPU, ()),
        ((), {"FLASH_ATTN_BUILD_WITHOUT_GPU": "1"}, (80, 90)),
        ((), {"FLASH_ATTN_BUILD_WITHOUT_GPU": ""}, (80, 90)),
        ((), NO_BUILD_WITHOUT_GPU | {"FLASH_ATTN_CUDA_ARCHS": "90"}, (90,)),
        ((90,), NO_BUILD_WITHOUT_GPU, (90,)),
    ],
)
def test_plan_without_a_gpu_may_be_to_build_nothing(
    tmp_path: Path, capabilities: tuple[int, ...], env: dict[str, str], archs: tuple[int, ...]
) -> None:
    torch = Torch("2.11.0+cu130", "13.0", capabilities)
    plan = build_config.make_plan(env, fake_toolkit(tmp_path / "c"), torch)
    assert plan.archs == archs and plan.has_extension == bool(archs)
    if not archs:
        assert plan.message.startswith("no GPU visible, no kernel compiled (make build")
        assert "\n" not in plan.message


def test_extension_of_an_earlier_build_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build_config, "ROOT", tmp_path)
    (tmp_path / "flash_attn_2_cuda.abi3.so").touch()
    toolkit = fake_toolkit(tmp_path / "c")
    message = build_config.make_plan(NO_BUILD_WITHOUT_GPU, toolkit, CUDA_TORCH).message
    assert "; flash_attn_2_cuda.abi3.so stays as it is, make build renews it" in message


def test_plan_refuses_a_gpu_before_ampere(tmp_path: Path) -> None:
    torch = Torch("2.11.0+cu130", "13.0", (75,))
    with pytest.raises(BuildError, match=r"8\.0 or newer.*sm_75"):
        build_config.make_plan({}, fake_toolkit(tmp_path / "c"), torch)


def test_plan_refuses_an_arch_that_nvcc_does_not_know(tmp_path: Path) -> None:
    env = {"FLASH_ATTN_CUDA_ARCHS": "80;120"}
    with pytest.raises(BuildError, match=r"nvcc 13\.0 cannot compile for sm_120"):
        build_config.make_plan(env, fake_toolkit(tmp_path / "c"), CUDA_TORCH)


# --- Headers, libraries, flags ---------------------------------------------------------------------


def test_missing_library_headers_come_from_wheels(tmp_path: Path) -> None:
    toolkit = fake_toolkit(tmp_path / "c")
    site = tmp_path / "site"
    for name, headers in {"cu13": ("cublas_v2.h", "cusparse.h"), "nccl": ("nccl.h",)}.items():
        include = site / "nvidia" / name / "include"
        include.mkdir(parents=True)
        for header in headers:
            (include / header).touch()
    folders = build_config.library_include_folders(toolkit, [str(site)])
    assert folders == [site / "nvidia" / "cu13" / "include"]
    flags = build_config.cxx_flags(toolkit, [str(site)])
    assert flags[flags.index("-idirafter") + 1] == str(folders[0])


def test_complete_toolkit_takes_no_headers_from_wheels(tmp_path: Path) -> None:
    toolkit = fake_toolkit(tmp_path / "c")
    include = tmp_path / "site" / "nvidia" / "cu13" / "include"
    include.mkdir(parents=True)
    for header in build_config.LIBRARY_HEADERS:
        (toolkit.include / header).touch()
        (include / header).touch()
    assert build_config.library_include_folders(toolkit, [str(tmp_path / "site")]) == []


def test_cudart_of_the_toolkit_is_linked(tmp_path: Path) -> None:
    toolkit = fake_toolkit(tmp_path / "c")
    (toolkit.root / "lib64").mkdir()
    (toolkit.root / "lib64" / "libcudart.so").touch()
    found = build_config.cudart_folder(toolkit, [], tmp_path / "scratch")
    assert found == toolkit.root / "lib64"


def test_cudart_of_a_wheel_is_linked_under_its_plain_name(tmp_path: Path) -> None:
    toolkit = fake_toolkit(tmp_path / "c")
    lib = tmp_path / "site" / "nvidia" / "cu13" / "lib"
    lib.mkdir(parents=True)
    (lib / "libcudart.so.12").write_text("12")
    (lib / "libcudart.so.13").write_text("13")
    for _ in range(2):  # the second time the link is there
        found = build_config.cudart_folder(toolkit, [str(tmp_path / "site")], tmp_path / "scratch")
        assert (found / "libcudart.so").read_text() == "13"


def test_no_cudart_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match=r"no libcudart\.so\.13"):
        build_config.cudart_folder(fake_toolkit(tmp_path / "c"), [], tmp_path / "scratch")


@pytest.mark.parametrize("shared", [True, False])
def test_a_compiler_without_shared_cxx_library_links_that_of_torch(
    tmp_path: Path, shared: bool
) -> None:
    library, compiler = tmp_path / "libstdc++.so", tmp_path / "c++"
    if shared:
        library.touch()
    # As gcc does: the path of a library that is there, otherwise the name.
    answer = library if shared else library.name
    compiler.write_text(f'#!/bin/sh\n[ "$2" = -print-file-name=libstdc++.so ] && echo {answer}\n')
    compiler.chmod(0o755)
    expected = [] if shared else ["-l:libstdc++.so.6"]
    assert build_config.shared_cxx_library([str(compiler), "-pthread"]) == expected
    assert build_config.shared_cxx_library([str(tmp_path / "none")]) == []


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_name_of_the_shared_cxx_library_is_known_to_the_linker(tmp_path: Path) -> None:
    source = tmp_path / "x.cpp"
    source.write_text("#include <iostream>\nvoid print() { std::cout << 1; }\n")
    command = ["g++", "-shared", "-fPIC", str(source), "-o", str(tmp_path / "x.so")]
    subprocess.run([*command, "-l:libstdc++.so.6"], check=True)


def test_every_arch_has_its_target() -> None:
    flags = " ".join(build_config.nvcc_flags((80, 90)))
    assert "-gencode arch=compute_80,code=sm_80" in flags
    assert "-gencode arch=compute_90a,code=sm_90a" in flags
    assert "sm_90a" not in " ".join(build_config.nvcc_flags((80,)))


# --- Generated files -------------------------------------------------------------------------------


def test_every_unit_is_generated_and_registered(tmp_path: Path) -> None:
    paths = generate(tmp_path, (90, 80))
    units = kernel_list.units((90, 80))
    head_dims = {isa: kernel_list.ONLY_HEAD_DIMS.get(isa, kernel_list.HEAD_DIMS) for isa in ISAS}
    wanted = sum(len(passes) * len(head_dims[isa]) for isa, passes in kernel_list.PASSES.items())
    own = [(isa, *pair) for isa, pairs in kernel_list.VALUE_HEAD_DIMS.items() for pair in pairs]
    assert len(units) == (wanted + len(own)) * len(kernel_list.DTYPES)
    assert {(u.isa, u.head_dim) for u in units} == {(i, d) for i in ISAS for d in head_dims[i]}
    assert [p.name for p in paths] == [f"{u.name}.cu" for u in units] + ["registry.cpp"]
    registry = paths[-1].read_text()
    assert 'kBuiltArchs = "80,90"' in registry
    for unit, path in zip(units, paths, strict=False):
        text, entry = path.read_text(), f"{unit.pass_name.capitalize()}Entry const {unit.symbol}"
        assert f"{unit.pass_name.capitalize()}<{unit.head_dim}, cutlass::" in text
        is_own = (unit.isa, unit.head_dim, unit.head_dim_v) in own
        assert (
            is_own
            == (f"Sizes, {unit.head_dim_v}>;" in text)
            == (f"v{unit.head_dim_v}_" in path.name)
        )
        assert f"{unit.isa.capitalize()}, {unit.head_dim}, {unit.head_dim_v}, DType::" in text
        assert f"{entry}{{" in text and f"{{ extern {entry}; }}" in registry
        assert registry.count(f"    &{unit.isa}::{unit.symbol},\n") == 1


@pytest.mark.parametrize("smem_kb, sizes", [(None, (227, 163, 99)), ((163, 99), (163, 99))])
def test_units_and_registry_have_the_sizes_of_the_build(
    tmp_path: Path, smem_kb: tuple[int, ...] | None, sizes: tuple[int, ...]
) -> None:
    *units, registry = generate(tmp_path, (80, 90), smem_kb=smem_kb)
    line = f"using Sizes = BuiltSizes<{', '.join(f'SmemSize::k{size}' for size in sizes)}>;"
    assert all(line in path.read_text() for path in units)
    built = ",".join(map(str, sizes))
    assert f'kBuiltSmemKb = "{built}";' in registry.read_text()


def test_sizes_of_shared_memory_are_the_same_in_python_and_cpp() -> None:
    text = (ROOT / "csrc/kernels/pieces/smem_size.h").read_text()
    assert tuple(map(int, re.findall(r"k(\d+) = (?=\1)", text))) == kernel_list.SMEM_KB
    (falling,) = re.findall(r"kSmemSizes\[\] = \{(.*?)\};", text)
    assert tuple(map(int, re.findall(r"k(\d+)", falling))) == kernel_list.SMEM_KB
    assert set(kernel_list.SMEM_KB_OF_ARCH.values()) == set(kernel_list.SMEM_KB)


def test_tables_of_the_registry_have_the_newest_isa_first(tmp_path: Path) -> None:
    registry = generate(tmp_path, (80, 90), test_units=True)[-1].read_text()
    tables = re.findall(r"k(\w+)Entries\[\] = \{\n(.*?)    nullptr,\n\};", registry, re.DOTALL)
    assert [name.lower() for name, _ in tables] == list(PASSES)
    for _, table in tables:
        isas = re.findall(r"&(\w+)::", table)
        assert isas == sorted(isas, reverse=True)
    of_forward = dict(tables)["Fwd"]
    assert kernel_list.TEST_UNIT.symbol in of_forward
    of_hopper = {u.symbol for u in kernel_list.units((90,), test_units=True) if u.isa == "sm90"}
    assert set(re.findall(r"&sm90::(\w+)", of_forward)) == of_hopper


@pytest.mark.parametrize(
    "archs, head_dims, is_there",
    [((80, 90), None, True), ((90,), None, True), ((80,), None, False), ((90,), (128,), False)],
)
def test_unit_of_an_isa_is_generated_where_an_architecture_has_it(
    tmp_path: Path, archs: tuple[int, ...], head_dims: tuple[int, ...] | None, is_there: bool
) -> None:
    paths = {p.stem: p for p in generate(tmp_path, archs, head_dims, test_units=True)}
    assert (kernel_list.TEST_UNIT.name in paths) == is_there
    assert (kernel_list.TEST_UNIT.symbol in paths["registry"].read_text()) == is_there
    assert ("sm90" in paths["registry"].read_text()) == (90 in archs)
    targets = {name: targets_of(path) for name, path in paths.items()}
    assert targets.pop("registry") is None
    of_hopper = {t for name, t in targets.items() if "_sm90_" in name}
    assert of_hopper == ({(90,)} if 90 in archs else set())
    assert {t for name, t in targets.items() if "_sm80_" in name} == {archs}


def test_unit_for_tests_is_in_no_other_build() -> None:
    assert kernel_list.TEST_UNIT not in kernel_list.units((80, 90))


def test_a_unit_is_compiled_for_its_own_targets_alone(tmp_path: Path) -> None:
    paths = {p.stem: p for p in generate(tmp_path, (80, 90), test_units=True)}

    def targets(source: str) -> list[str]:
        flags = ["-O3", *build_config.nvcc_flags((80, 90)), "-Xptxas", "-v"]
        command = ["ccache", "nvcc", "-MD", *flags[:1], "-c", source, "-o", "x.o", *flags[1:]]
        changed = command_for_unit(command)
        others = [w for w in command if w != "-gencode" and not w.startswith("arch=")]
        assert [w for w in changed if w != "-gencode" and not w.startswith("arch=")] == others
        return [w for before, w in itertools.pairwise(changed) if before == "-gencode"]

    both = ["arch=compute_80,code=sm_80", "arch=compute_90a,code=sm_90a"]
    assert targets(str(paths[kernel_list.TEST_UNIT.name])) == both[1:]
    assert targets(str(paths["fwd_sm80_hd64_bf16"])) == both
    assert targets(str(ROOT / "csrc" / "kernels" / "common" / "kv_update.cu")) == both


def test_nvcc_of_a_unit_runs_the_command_that_it_is_given(tmp_path: Path) -> None:
    (unit,) = (p for p in generate(tmp_path, (80, 90), test_units=True) if "test_" in p.name)
    script = ROOT / "csrc" / "nvcc_of_unit.py"
    words = ["-gencode", "arch=compute_80,code=sm_80", "-Xcompiler", "'a b'", "-c", str(unit)]
    command = [sys.executable, str(script), "printf", "[%s]", *words]
    result = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    want = ["-Xcompiler", "'a b'", "-c", str(unit), "-gencode", "arch=compute_90a,code=sm_90a"]
    assert result.stdout == "".join(f"[{word}]" for word in want)


NVCC_THAT_RECORDS = """\
#!/bin/sh
echo "$@" >> {log}
while [ "$1" != -o ]; do shift; done
touch "$2" && echo "$2:" > "$2.d"
"""


def test_ninja_compiles_each_unit_for_its_own_targets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file that torch writes for ninja in a build for 80 and 90, run with an nvcc that records."""
    from torch.utils import cpp_extension

    if shutil.which("ninja") is None:
        pytest.skip("needs ninja")
    nvcc, log = tmp_path / "nvcc", tmp_path / "log"
    nvcc.write_text(NVCC_THAT_RECORDS.format(log=log))
    nvcc.chmod(0o755)
    monkeypatch.setattr("setuptools.setup", lambda **_: None)
    monkeypatch.setenv("PYTORCH_NVCC", str(nvcc))
    command = runpy.run_path(str(ROOT / "setup.py"))["nvcc_command"](Toolkit(tmp_path, "13.0"))
    monkeypatch.setenv("PYTORCH_NVCC", command)
    units = [p for p in generate(tmp_path, (80, 90), (64,), test_units=True) if p.suffix == ".cu"]
    given = dict(
        path=str(tmp_path / "build.ninja"),
        sources=list(map(str, units)),
        objects=[str(p.with_suffix(".o")) for p in units],
        cuda_post_cflags=build_config.nvcc_flags((80, 90)),
        library_target=None,
        with_cuda=True,
        with_sycl=False,
    )
    parameters = inspect.signature(cpp_extension._write_ninja_file).parameters
    cpp_extension._write_ninja_file(**{name: given.get(name, []) for name in parameters})
    subprocess.run(["ninja", "-C", str(tmp_path)], check=True, capture_output=True)

    lines = [line.split() for line in log.read_text().splitlines()]
    targets = {
        Path(line[line.index("-c") + 1]).stem: re.findall(r"-gencode (\S+)", " ".join(line))
        for line in lines
    }
    both = ["arch=compute_80,code=sm_80", "arch=compute_90a,code=sm_90a"]
    assert targets == {p.stem: both[1:] if "_sm90_" in p.stem else both for p in units}


def test_head_dims_are_listed_once() -> None:
    """Other files import the list, or its C++ form."""
    listed = re.compile(r",\s*".join(map(str, kernel_list.HEAD_DIMS)))
    files = [ROOT / "setup.py"]
    for folder in ("csrc", "flash_attn", "benchmarks", "studies", "tests"):
        files += [p for p in (ROOT / folder).rglob("*.*") if p.suffix in SOURCES]
    found = {p for p in files if listed.search(p.read_text())}
    assert found == {ROOT / "csrc" / "kernels" / "kernel_list.py", *LISTS}


@pytest.mark.parametrize("path", LISTS, ids=lambda path: path.name)
def test_committed_list_of_head_dims_is_the_generated_one(path: Path) -> None:
    written = path.read_text()
    assert written == LISTS[path](), "run csrc/kernels/generate.py --lists"
    numbers = tuple(map(int, re.findall(r"\d+", re.search(r"= [({](.*?)[)}]", written)[1])))
    assert numbers == kernel_list.HEAD_DIMS


def test_units_of_a_partial_build(tmp_path: Path) -> None:
    names = {p.stem for p in generate(tmp_path, (90,), (64, 128), ("bf16",))}
    assert names == {
        *(f"{name}_sm80_hd{head_dim}_bf16" for name in PASSES for head_dim in (64, 128)),
        *("fwd_sm90_hd64_bf16", "fwd_sm90_hd128_bf16", "registry"),
    }
    assert "half_t" not in (tmp_path / "fwd_sm80_hd64_bf16.cu").read_text()
    assert "fp16" not in (tmp_path / "registry.cpp").read_text().replace("kFp16", "")


def test_slow_units_come_first(tmp_path: Path) -> None:
    names = [p.name for p in generate(tmp_path, (90,))]
    assert names[0].startswith(f"bwd_sm80_hd{max(kernel_list.HEAD_DIMS)}")
    assert names[-2].startswith(f"fwd_sm80_hd{min(kernel_list.HEAD_DIMS)}")


def test_unchanged_files_are_not_written(tmp_path: Path) -> None:
    paths = generate(tmp_path, (90,))
    for path in paths:
        os.utime(path, (1, 1))
    paths[0].write_text("changed")
    generate(tmp_path, (90,))
    assert [p for p in paths if p.stat().st_mtime != 1] == [paths[0]]
    assert paths[0].read_text() != "changed"


def test_stale_files_are_removed_and_others_kept(tmp_path: Path) -> None:
    generate(tmp_path, (90,))
    (tmp_path / "mine.cu").write_text("// not generated\n")
    paths = generate(tmp_path, (90,), (64,), ("bf16",))
    assert {p.name for p in tmp_path.iterdir()} == {p.name for p in paths} | {"mine.cu"}


def test_generate_runs_as_a_script(tmp_path: Path) -> None:
    script = ROOT / "csrc" / "kernels" / "generate.py"
    command = [sys.executable, str(script), "--out", str(tmp_path), "--archs", "90"]
    subprocess.run([*command, "--head-dims", "64"], check=True, cwd=tmp_path, capture_output=True)
    assert (tmp_path / "fwd_sm80_hd64_fp16.cu").is_file()
    bad = subprocess.run([*command, "--head-dims", "65"], capture_output=True, text=True)
    assert bad.returncode != 0 and "'65' is not one of" in bad.stderr


# --- CUTLASS ---------------------------------------------------------------------------------------


def fake_cutlass(include: Path, version: str = "4.2.0") -> None:
    (include / "cute").mkdir(parents=True)
    (include / "cutlass").mkdir()
    (include / "cute" / "tensor.hpp").touch()
    parts = zip(("MAJOR", "MINOR", "PATCH"), version.split("."), strict=True)
    text = "".join(f"#define CUTLASS_{name} {number}\n" for name, number in parts)
    (include / "cutlass" / "version.h").write_text(text)


@pytest.mark.parametrize("below", ["", "include", "cutlass_library/source/include"])
def test_cutlass_path_may_be_root_or_include(tmp_path: Path, below: str) -> None:
    fake_cutlass(tmp_path / "c" / below, "4.3.1")
    found = fetch_cutlass.find_cutlass({"CUTLASS_PATH": str(tmp_path / "c")})
    assert (found.include, found.version) == ((tmp_path / "c" / below), "4.3.1")


def test_cutlass_path_without_cutlass_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CutlassError, match="CUTLASS_PATH=.* holds no CUTLASS"):
        fetch_cutlass.find_cutlass({"CUTLASS_PATH": str(tmp_path)})


def test_old_cutlass_is_an_error(tmp_path: Path) -> None:
    fake_cutlass(tmp_path, "3.9.2")
    with pytest.raises(CutlassError, match=r"3\.9\.2; 4\.2 or later"):
        fetch_cutlass.find_cutlass({"CUTLASS_PATH": str(tmp_path)})


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package index with a small CUTLASS wheel, and an empty third_party folder."""
    try:
        fetch_cutlass._pip_command()
    except CutlassError as error:
        pytest.skip(str(error))
    fake_cutlass(tmp_path / "content" / fetch_cutlass.INCLUDE_IN_WHEEL)
    (tmp_path / "index").mkdir()
    wheel = tmp_path / "index" / fetch_cutlass.WHEEL
    info = "nvidia_cutlass-4.2.0.0.dist-info"
    with zipfile.ZipFile(wheel, "w") as archive:
        for path in sorted((tmp_path / "content").rglob("*")):
            archive.write(path, path.relative_to(tmp_path / "content"))
        text = "Metadata-Version: 2.1\nName: nvidia-cutlass\nVersion: 4.2.0.0\nRequires-Dist: no-such\n"
        archive.writestr(f"{info}/METADATA", text)
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
        archive.writestr("cutlass_library/code.py", "")
    (tmp_path / "third_party").mkdir()
    monkeypatch.setattr(fetch_cutlass, "FOLDER", tmp_path / "third_party" / "cutlass")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.delenv("CUTLASS_PATH", raising=False)
    return wheel


def test_cutlass_is_downloaded_once(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    digest = hashlib.sha256(index.read_bytes()).hexdigest()
    monkeypatch.setattr(fetch_cutlass, "SHA256", digest)
    # An isolated build hides pip from its own path.
    monkeypatch.setenv("PYTHONPATH", str(index.parent))
    found = fetch_cutlass.fetch_cutlass({})
    assert found.version == "4.2.0" and found.include == fetch_cutlass.FOLDER / "include"
    assert [p.name for p in fetch_cutlass.FOLDER.iterdir()] == ["include"]
    assert [p.name for p in fetch_cutlass.FOLDER.parent.iterdir()] == ["cutlass"]
    index.unlink()
    assert fetch_cutlass.fetch_cutlass({}) == found


def test_cutlass_with_another_hash_is_refused(index: Path) -> None:
    with pytest.raises(CutlassError, match="could not download(.|\n)*sha256"):
        fetch_cutlass.fetch_cutlass({})
    assert list(fetch_cutlass.FOLDER.parent.iterdir()) == []


def test_broken_cutlass_folder_is_replaced(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    digest = hashlib.sha256(index.read_bytes()).hexdigest()
    monkeypatch.setattr(fetch_cutlass, "SHA256", digest)
    (fetch_cutlass.FOLDER / "include" / "cute").mkdir(parents=True)
    assert fetch_cutlass.find_cutlass({}) is None
    assert fetch_cutlass.fetch_cutlass({}).version == "4.2.0"


def test_another_build_may_fetch_cutlass_at_the_same_time(
    index: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unpack = fetch_cutlass._unpack

    def unpack_and_lose_the_race(wheel: Path, folder: Path) -> None:
        unpack(wheel, folder)
        shutil.copytree(folder, fetch_cutlass.FOLDER)

    digest = hashlib.sha256(index.read_bytes()).hexdigest()
    monkeypatch.setattr(fetch_cutlass, "SHA256", digest)
    monkeypatch.setattr(fetch_cutlass, "_unpack", unpack_and_lose_the_race)
    assert fetch_cutlass.fetch_cutlass({}).version == "4.2.0"
    assert [p.name for p in fetch_cutlass.FOLDER.parent.iterdir()] == ["cutlass"]


# --- setup.py --------------------------------------------------------------------------------------


def source_tree(folder: Path) -> Path:
    """A copy of what setup.py needs, so that tests write nothing into the repository."""
    try:
        version = importlib.metadata.version("setuptools")
    except importlib.metadata.PackageNotFoundError:
        version = "0"
    if int(version.split(".")[0]) < 77:
        pytest.skip(f"needs setuptools 77 or newer, has {version}")
    for name in ("setup.py", "pyproject.toml", "LICENSE", "MANIFEST.in", "README.md"):
        if (ROOT / name).is_file():
            shutil.copy(ROOT / name, folder / name)
        else:
            (folder / name).touch()
    ignored = shutil.ignore_patterns("__pycache__", "cutlass", "*.so")
    for name in ("csrc", "flash_attn", "third_party"):
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    return folder


@pytest.fixture
def no_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes every import of torch in a subprocess fail."""
    (tmp_path / "blocked" / "torch").mkdir(parents=True)
    text = "raise RuntimeError('metadata must not import torch')\n"
    (tmp_path / "blocked" / "torch" / "__init__.py").write_text(text)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "blocked"))


def run_setup(folder: Path, *arguments: str) -> str:
    command = [sys.executable, "setup.py", *arguments]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


@pytest.mark.usefixtures("no_torch")
def test_metadata_does_not_import_torch(tmp_path: Path) -> None:
    tree = source_tree(tmp_path)
    assert run_setup(tree, "--version").split()[-1] == flash_attn.__version__ == "2.8.3"
    run_setup(tree, "-q", "egg_info")
    metadata = (tree / "flash_attn.egg-info" / "PKG-INFO").read_text()
    assert "Name: flash-attn\n" in metadata and "Version: 2.8.3\n" in metadata
    assert "Requires-Python: >=3.10" in metadata and "Requires-Dist: torch>=2.9" in metadata
    run_setup(tree, "-q", "dist_info")
    assert (tree / "flash_attn-2.8.3.dist-info" / "METADATA").is_file()


@pytest.mark.usefixtures("no_torch")
def test_sdist_has_the_sources_and_does_not_import_torch(tmp_path: Path) -> None:
    tree = source_tree(tmp_path)
    (tree / "third_party" / "cutlass" / "include").mkdir(parents=True)
    (tree / "third_party" / "cutlass" / "include" / "x.py").touch()
    run_setup(tree, "-q", "sdist", "--formats", "zip")
    with zipfile.ZipFile(tree / "dist" / "flash_attn-2.8.3.zip") as archive:
        names = {name.partition("/")[2] for name in archive.namelist()}
    wanted = {"csrc/build_config.py", "csrc/kernels/generate.py", "csrc/kernels/kernel_list.py"}
    wanted |= {"csrc/nvcc_of_unit.py", "flash_attn/_head_dims.py"}
    wanted |= {"csrc/flash.h", "third_party/fetch_cutlass.py", "setup.py", "LICENSE"}
    wanted |= {str(p.relative_to(ROOT)) for p in (ROOT / "csrc").rglob("*.cu*")}
    assert wanted <= names
    assert not any(name.startswith("third_party/cutlass/") for name in names)


@pytest.mark.usefixtures("no_torch")
def test_wheel_without_extension_is_pure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASH_ATTN_SKIP_CUDA_BUILD", "1")
    tree = source_tree(tmp_path)
    output = run_setup(tree, "-q", "bdist_wheel")
    assert "flash_attn: FLASH_ATTN_SKIP_CUDA_BUILD=1: installing the Python package" in output
    (wheel,) = (tree / "dist").iterdir()
    assert wheel.name == "flash_attn-2.8.3-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert {name.split("/")[0] for name in names} == {"flash_attn", "flash_attn-2.8.3.dist-info"}
    assert "flash_attn/py.typed" in names  # its annotations are for users, too


def test_broken_torch_builds_the_python_package(tmp_path: Path) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise ImportError('libfoo.so is missing')\n")
    tree = tmp_path / "tree"
    tree.mkdir()
    source_tree(tree)
    env = os.environ | {"PYTHONPATH": str(tmp_path)}
    env.pop("FLASH_ATTN_SKIP_CUDA_BUILD", None)
    command = [sys.executable, "setup.py", "-q", "build_ext"]
    result = subprocess.run(command, cwd=tree, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "torch does not import (libfoo.so is missing)" in result.stdout
    assert "CPU backend only" in result.stdout


@pytest.fixture
def gpuless(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A source tree, nvcc and a CUDA build of torch, no visible GPU, and no CUTLASS: what gets as
    far as compiling fails because of it."""
    (tmp_path / "tree").mkdir()
    tree = source_tree(tmp_path / "tree")
    torch = tree / "torch"  # the Makefile puts the tree alone on PYTHONPATH
    torch.mkdir()
    text = "__version__ = '2.11.0+cu130'\nfrom . import cuda, version\n"
    (torch / "__init__.py").write_text(text)
    (torch / "version.py").write_text("cuda = '13.0'\n")
    (torch / "cuda.py").write_text("def is_available():\n    return False\n")
    smi = tmp_path / "bin" / "nvidia-smi"
    smi.parent.mkdir()
    smi.write_text("#!/bin/sh\nexit 9\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{smi.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("CUDA_HOME", str(fake_toolkit(tmp_path / "cuda").root))
    monkeypatch.setenv("CUTLASS_PATH", str(tmp_path / "no-cutlass"))
    for name in ("FLASH_ATTN_BUILD_WITHOUT_GPU", "FLASH_ATTN_CUDA_ARCHS", "MAKEFLAGS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delenv("FLASH_ATTN_SKIP_CUDA_BUILD", raising=False)
    shutil.copy(ROOT / "Makefile", tree)
    return tree


BUILDS = "building flash_attn_2_cuda for sm_80, sm_90"
BUILDS_NOTHING = "no GPU visible, no kernel compiled"


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["build/.ready-system"], BUILDS_NOTHING),
        (["build/.ready-system-cuda", "FLASH_ATTN_BUILD_WITHOUT_GPU=1"], BUILDS),
        (["build/.ready-system-cuda", "FLASH_ATTN_CUDA_ARCHS=80;90"], BUILDS),
        (["build"], BUILDS),
    ],
    ids=["", "asked", "archs", "build"],
)
def test_make_compiles_without_a_gpu_only_if_asked(
    gpuless: Path, arguments: list[str], said: str
) -> None:
    if shutil.which("make") is None:
        pytest.skip("needs make")
    command = ["make", "SYSTEM=1", f"PYTHON={sys.executable}", *arguments]
    result = subprocess.run(command, cwd=gpuless, capture_output=True, text=True)
    assert result.stdout.count("flash_attn: ") == 1 and said in result.stdout, result.stderr
    assert (result.returncode == 0) == (said == BUILDS_NOTHING)
    assert ("holds no CUTLASS" in result.stderr) == (said == BUILDS)


@pytest.mark.parametrize("target", ["demo", "test", "bench", "lint"])
def test_make_asks_anew_when_a_build_is_wanted(gpuless: Path, target: str) -> None:
    """That the tree was made ready without the extension does not keep a later request from it."""
    if shutil.which("make") is None:
        pytest.skip("needs make")
    command = ["make", "SYSTEM=1", f"PYTHON={sys.executable}"]
    subprocess.run([*command, "build/.ready-system"], cwd=gpuless, check=True, capture_output=True)
    command += ["--dry-run", target]
    plain = subprocess.run(command, cwd=gpuless, capture_output=True, text=True, check=True)
    assert "build_ext" not in plain.stdout
    command.append("FLASH_ATTN_BUILD_WITHOUT_GPU=1")
    asked = subprocess.run(command, cwd=gpuless, capture_output=True, text=True, check=True)
    assert "build_ext" in asked.stdout


def test_setup_compiles_without_a_gpu(gpuless: Path) -> None:
    """What pip install runs: no variable of the Makefile is set."""
    command = [sys.executable, "setup.py", "-q", "build_ext"]
    env = os.environ | {"PYTHONPATH": str(gpuless)}
    result = subprocess.run(command, cwd=gpuless, env=env, capture_output=True, text=True)
    assert BUILDS in result.stdout and "holds no CUTLASS" in result.stderr


def test_hidden_torch_is_found_in_the_interpreters_own_packages(tmp_path: Path) -> None:
    """What an isolated build does: site-packages is not on sys.path."""
    code = (
        "import sys\n"
        "site = [p for p in sys.path if p.endswith('-packages')]\n"
        "sys.path = [p for p in sys.path if p not in site]\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "from csrc import build_config\n"
        "build_config.site_folders = lambda: site\n"
        "print(build_config.find_torch().version)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    import torch

    assert result.stdout.strip() == torch.__version__, result.stderr


def test_site_folders_hold_torch() -> None:
    import torch

    assert str(Path(torch.__file__).parents[1]) in build_config.site_folders()


def test_variables_are_documented() -> None:
    names = set(re.findall(r"FLASH_ATTN_[A-Z_]+", (ROOT / "csrc" / "build_config.py").read_text()))
    assert {"FLASH_ATTN_HEAD_DIMS", "FLASH_ATTN_BUILD_WITHOUT_GPU"} <= names
    for name in (*names, "MAX_JOBS"):
        assert name in (ROOT / "setup.py").read_text().split('"""')[1]
        assert f"`{name}`" in (ROOT / "README.md").read_text()


# --- python -m flash_attn --------------------------------------------------------------------------


def test_report_names_versions() -> None:
    import torch

    report = flash_main.report()
    assert f"flash_attn  {flash_attn.__version__}" in report
    assert torch.__version__ in report
    assert "CPU tensors" in report


INFO = {
    "archs": [80],
    "smem_kb": [163],
    "head_dims": [128, 64],
    "dtypes": ["bf16"],
    "kernels": [("sm80", name, d, "bf16") for name in PASSES for d in (128, 64)],
    "value_head_dims": [],
    "isa": "",
    "cuda_version": "13.0",
    "cutlass_version": "4.2.1",
}


def test_report_says_which_path_serves_what(monkeypatch: pytest.MonkeyPatch) -> None:
    extension = SimpleNamespace(build_info=lambda: INFO)
    monkeypatch.setattr(flash_main._ops, "extension", extension)
    lines = flash_main.report().splitlines()
    rows = {line.split()[0]: line for line in lines if line.strip()}
    for name in PASSES:
        assert all(cell in rows[name] for cell in ("64, 128", "bf16", "sm80")), rows[name]
    assert "flash_attn_with_kvcache" in rows["decode"] and "paged" in rows["decode"]
    assert any("merge_states" in line and "common" in line for line in lines)


def test_report_names_files_that_exist() -> None:
    text = "\n".join([flash_main.report(), *map(str, flash_main.CPU_FILES)])
    assert "flash_attn/cpu/decode.py" in text
    for path in set(re.findall(r"flash_attn/[\w/]+\.py", text)):
        assert (ROOT / path).is_file(), path


def test_report_has_a_row_for_each_isa_of_a_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    newer = [("sm90", "fwd", 64, "bf16"), ("sm90", "fwd", 64, "fp16")]
    info = INFO | {"kernels": newer + INFO["kernels"], "isa": "sm80"}
    monkeypatch.setattr(flash_main._ops, "extension", SimpleNamespace(build_info=lambda: info))
    report = flash_main.report()
    rows = [line.split() for line in report.splitlines() if line.split()[:1] == ["fwd"]]
    assert ["sm90" in row for row in rows] == [True, False]
    assert {"64", "bf16,", "fp16"} <= set(rows[0]) and "128" not in rows[0]
    assert {"64,", "128", "sm80"} <= set(rows[1]) and "fp16" not in rows[1]
    assert "FLASH_ATTN_ISA=sm80" in report and "of a pass,\n  the first row" in report
    assert ["9.0" in row for row in rows] == [True, False]


def test_report_names_pairs_of_head_dims(monkeypatch: pytest.MonkeyPatch) -> None:
    newer = [("sm90", "fwd", d, "bf16") for d in (64, 192)]
    kernels = {"kernels": newer + INFO["kernels"]}
    for own, cells in (([("sm90", "fwd", 192, 128)], "64, 192, 192/128"), ([], "64, 192")):
        info = INFO | kernels | {"value_head_dims": own}
        extension = SimpleNamespace(build_info=lambda info=info: info)
        monkeypatch.setattr(flash_main._ops, "extension", extension)
        report = flash_main.report()
        newer_row, older_row = [x for x in report.splitlines() if x.split()[:1] == ["fwd"]]
        assert f"  {cells}  " in newer_row and "/" not in older_row
        assert ("192 of q and k, 128 of v" in report) == bool(own)


def test_report_knows_every_isa_and_pass() -> None:
    built = {name for passes in kernel_list.PASSES.values() for name in passes}
    assert built == set(PASSES) == set(flash_main.SERVES)
    assert list(flash_main.ISAS) == list(kernel_list.PASSES)


@pytest.mark.parametrize(
    "built, allowed, words",
    [
        ([227, 99], 227, "tiles for 227 KB"),
        ([227, 99], 163, "tiles for 99 KB"),
        ([163], 99, "some tiles do not fit"),
    ],
)
def test_report_says_which_tiles_a_gpu_gets(
    monkeypatch: pytest.MonkeyPatch, built: list[int], allowed: int, words: str
) -> None:
    info = INFO | {"smem_kb": built}
    extension = SimpleNamespace(build_info=lambda: info, smem_kb=lambda index: allowed)
    monkeypatch.setattr(flash_main._ops, "extension", extension)
    monkeypatch.setattr(flash_main, "_gpus", lambda: [("L4", (8, 9))])
    monkeypatch.setenv("FLASH_ATTN_TEST_SMEM_KB", "99")
    report = flash_main.report()
    assert "FLASH_ATTN_TEST_SMEM_KB=99: tiles for no more" in report
    assert f"{allowed} KB of shared memory per thread block: {words}" in report
    assert ("tiles for the 99 KB" in report) == ("not fit" in words)
    assert f"tiles for {', '.join(map(str, built))} KB of shared memory; CUDA" in report


def test_missing_tiles_are_named_with_what_is_built() -> None:
    (piece,) = flash_main.missing_pieces(INFO, "13.0", [("L4", (8, 9))], True, [99])
    assert '99 KB of shared memory of L4 (built: 163 KB): FLASH_ATTN_CUDA_ARCHS="80;89"' in piece


@pytest.mark.parametrize(
    "gpu, kb, words",
    [("T4", 64, "T4 is sm_75"), ("RTX 5090", 99, "kernels for RTX 5090 (sm_120)")],
)
def test_a_gpu_whose_code_is_missing_is_named_once(gpu: str, kb: int, words: str) -> None:
    """Not also for tiles; what is advised, the build accepts, and it keeps what is built."""
    capability = {"T4": (7, 5), "RTX 5090": (12, 0)}[gpu]
    info = INFO | {"archs": [80, 90], "smem_kb": [227, 163]}
    (piece,) = flash_main.missing_pieces(info, "13.0", [(gpu, capability)], True, [kb])
    assert words in piece
    for archs in re.findall(r'ARCHS="(.*?)"', piece):
        assert build_config.parse_archs(archs) == (80, 90, 120)


H200 = ("H200", (9, 0))
NO_DECODE = [kernel for kernel in INFO["kernels"] if kernel[1] != "decode"]


@pytest.mark.parametrize(
    "info, cuda, gpus, nvcc, words",
    [
        (None, None, [], False, ["a CUDA build of torch"]),
        (None, "13.0", [], False, ["a visible GPU", "CUDA 13.0 toolkit", "the extension"]),
        (None, "13.0", [H200], True, ["the extension flash_attn_2_cuda"]),
        (INFO, "13.0", [H200], True, ['FLASH_ATTN_CUDA_ARCHS="80;90"']),
        (INFO, "13.0", [("T4", (7, 5))], True, ["T4 is sm_75"]),
        (INFO, "13.0", [("A100", (8, 0))], True, []),
        (INFO, "13.0", [("L4", (8, 9))], True, []),
        (INFO | {"archs": [90]}, "13.0", [H200], True, []),
        (INFO | {"kernels": NO_DECODE}, "13.0", [("A100", (8, 0))], True, ["for decode"]),
    ],
)
def test_report_names_what_is_missing(
    info: dict | None, cuda: str | None, gpus: list, nvcc: bool, words: list[str]
) -> None:
    missing = flash_main.missing_pieces(info, cuda, gpus, nvcc)
    assert len(missing) == len(words)
    assert all(word in text for word, text in zip(words, missing, strict=True)), missing
