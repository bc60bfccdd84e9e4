"""Builds flash_attn, and flash_attn_2_cuda where a CUDA toolkit and a CUDA build of torch are found.

Environment variables
    FLASH_ATTN_CUDA_ARCHS         "80;90": targets; default: the visible GPU's, "80;90" without one
    FLASH_ATTN_HEAD_DIMS          "64,128": head dimensions to build; default: all of kernel_list.py
    FLASH_ATTN_DTYPES             "bf16": dtypes to build; default: "fp16,bf16"
    FLASH_ATTN_SMEM_KB            "227,99": sizes of shared memory, in KB per thread block, to have tiles
                                  for; default: those of the targets' GPUs
    FLASH_ATTN_TEST_UNITS         1: with a unit for tests of the build alone
    FLASH_ATTN_SKIP_CUDA_BUILD    1: the Python package and the CPU backend only
    FLASH_ATTN_BUILD_WITHOUT_GPU  0: the same where no GPU is visible and FLASH_ATTN_CUDA_ARCHS names
                                  no target; default: 1, in the Makefile 0
    MAX_JOBS                      compilers at once; default: min(cores, free memory / 5 GB; 1.5 GB more
                                  for each further size of FLASH_ATTN_SMEM_KB)
    CUTLASS_PATH                  a CUTLASS (4.2 or later) on disk; default: the pinned wheel, downloaded once
    CUDA_HOME, CUDA_PATH          the CUDA toolkit; default: that of nvcc on PATH

torch is imported only to build, never for metadata.  `pip install -v` shows the build's progress.
"""

import os
import re
import shlex
import shutil
import sys
import sysconfig
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
NVCC_OF_UNIT = ROOT / "csrc" / "nvcc_of_unit.py"
sys.path.insert(0, str(ROOT))

from csrc import build_config  # noqa: E402
from csrc.build_config import BuildError, Plan, Toolkit  # noqa: E402
from csrc.kernels.generate import generate  # noqa: E402
from third_party.fetch_cutlass import CutlassError, fetch_cutlass  # noqa: E402


class FlashDistribution(Distribution):
    """Decides what to build at the first command that builds."""

    @cached_property
    def plan(self) -> Plan:
        try:
            plan = build_config.plan_from_environment()
        except BuildError as error:
            sys.exit(f"flash_attn: {error}")
        print(f"flash_attn: {plan.message}", flush=True)
        return plan

    def has_ext_modules(self) -> bool:
        # Until a build decides, there may be one; metadata does not depend on the answer.
        return self.plan.has_extension if "plan" in self.__dict__ else True


class BuildWheel(bdist_wheel):
    """A platform wheel with the extension, a pure one without."""

    def run(self) -> None:
        self.root_is_pure = not self.distribution.plan.has_extension
        super().run()


class BuildKernels(build_ext):
    """Generates the units and hands the compilation to torch's BuildExtension."""

    def run(self) -> None:
        plan = self.distribution.plan
        if not plan.has_extension:
            return
        try:
            extension = make_extension(plan)
        except (BuildError, CutlassError) as error:
            sys.exit(f"flash_attn: {error}")
        from torch.utils.cpp_extension import BuildExtension

        class OrderedBuild(BuildExtension):
            def build_extension(self, ext) -> None:
                # setuptools sorts the sources by name; ninja starts them in the order it is given.
                compile_sorted, order = self.compiler.compile, ext.sources.index

                def compile_slowest_first(sources, *args, **kwargs):
                    return compile_sorted(sorted(sources, key=order), *args, **kwargs)

                self.compiler.compile = compile_slowest_first
                super().build_extension(ext)

        self.distribution.ext_modules = [extension]
        command = OrderedBuild(self.distribution)
        for option in ("build_lib", "inplace", "debug", "editable_mode"):
            setattr(command, option, getattr(self, option))
        # One folder for every kind of installation, so that none compiles what another has compiled.
        command.build_temp = f"build/temp.{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
        command.ensure_finalized()
        if not command.use_ninja:
            sys.exit("flash_attn: ninja is needed to build: pip install ninja")
        with short_progress():
            command.run()
        self.extensions, self.ext_map = command.extensions, command.ext_map

    def get_source_files(self) -> list[str]:
        return []  # MANIFEST.in lists them


@contextmanager
def short_progress() -> Iterator[None]:
    """Shows ninja's progress lines with the name of the file instead of the whole command."""
    sys.stdout.flush()
    reader, writer = os.pipe()
    stdout = os.dup(1)
    os.dup2(writer, 1)
    os.close(writer)

    def copy() -> None:
        with os.fdopen(reader, errors="replace") as lines, os.fdopen(stdout, "w") as out:
            for line in lines:
                match = re.match(r"(\[\d+/\d+, [^]]*\]) .* -c (\S+) -o ", line)
                print(
                    f"{match[1]} {Path(match[2]).name}\n" if match else line,
                    end="",
                    file=out,
                    flush=True,
                )

    thread = threading.Thread(target=copy)
    thread.start()
    restore = os.dup(stdout)
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(restore, 1)  # closes the pipe, which ends the thread
        os.close(restore)
        thread.join()


def cxx_compiler() -> list[str]:
    """The command that setuptools links C++ with."""
    return shlex.split(os.environ.get("CXX") or sysconfig.get_config_var("CXX") or "c++")


def nvcc_command(toolkit: Toolkit) -> str:
    """What ninja runs for .cu files: each unit with its own targets, through ccache where there is one."""
    given = os.environ.get("PYTORCH_NVCC", "")
    if str(NVCC_OF_UNIT) in given:
        return given
    ccache = "ccache " if shutil.which("ccache") else ""
    compiler = given or ccache + shlex.quote(str(toolkit.nvcc))
    return f"{shlex.join([sys.executable, str(NVCC_OF_UNIT)])} {compiler}"


def make_extension(plan: Plan):
    """The flash_attn_2_cuda extension of a plan, with its generated sources written."""
    toolkit = plan.toolkit
    cutlass = fetch_cutlass()
    jobs = build_config.compute_jobs(
        build_config.parse_max_jobs(os.environ.get("MAX_JOBS", "")),
        build_config.available_cpus(),
        build_config.available_memory(),
        len(plan.smem_kb),
    )
    os.environ["MAX_JOBS"] = str(jobs)
    os.environ["CUDA_HOME"] = str(toolkit.root)  # read when torch.utils.cpp_extension is imported
    os.environ["NINJA_STATUS"] = "[%f/%t, %e s] "
    os.environ["PYTORCH_NVCC"] = nvcc_command(toolkit)
    from torch.utils.cpp_extension import CUDAExtension

    os.chdir(ROOT)
    generated = generate(
        build_config.GENERATED,
        plan.archs,
        plan.head_dims,
        plan.dtypes,
        smem_kb=plan.smem_kb,
        test_units=plan.test_units,
    )
    sources = [*generated[:-1], *build_config.handwritten_sources(), generated[-1]]
    print(
        f"flash_attn: CUTLASS {cutlass.version}, {len(sources)} files, {jobs} at a time", flush=True
    )
    folders = build_config.site_folders()
    includes = build_config.include_flags(cutlass.include, toolkit)
    return CUDAExtension(
        "flash_attn_2_cuda",
        [str(source) for source in sources],
        library_dirs=[
            str(build_config.cudart_folder(toolkit, folders, Path("build") / "lib_cudart"))
        ],
        extra_compile_args={
            "cxx": includes + build_config.cxx_flags(toolkit, folders),
            "nvcc": includes + build_config.nvcc_flags(plan.archs),
        },
        extra_link_args=["-Wl,--strip-debug", *build_config.shared_cxx_library(cxx_compiler())],
    )


setup(
    distclass=FlashDistribution,
    cmdclass={"bdist_wheel": BuildWheel, "build_ext": BuildKernels},
)
