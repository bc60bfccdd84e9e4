"""benchmarks/compare_sass.py: what it reads from cuobjdump, and when two builds are the same.  Needs no GPU."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from benchmarks import compare_sass
from benchmarks.compare_sass import Code, Key
from csrc import build_config

SASS = """\
Fatbin elf code:
================
arch = sm_90a
code version = [1,8]

	code for sm_90
	.target	sm_90

		Function : _Z3addPf
	.headerflags	@"EF_CUDA_SM90"
        /*0000*/                   LDC R1, c[0x0][0x28] ;                                     /* 0x00000a00ff017b82 */
                                                                                              /* 0x000fe20000000800 */
        /*0010*/              @!P0 BRA 0xb90 ;                                                /* 0x0000000800c48947 */
                                                                                              /* 0x000fda000bf05300 */
		..........

		Function : _Z4zeroPf
	.headerflags	@"EF_CUDA_SM90"
        /*0000*/                   EXIT ;                                                     /* 0x000000000000794d */
                                                                                              /* 0x000fea0003800000 */

Fatbin elf code:
================
arch = sm_80

		Function : _Z3addPf
        /*0000*/                   EXIT ;                                                     /* 0x000000000000794d */
                                                                                              /* 0x000fea0003800000 */
"""


def test_parser_reads_instructions_with_their_bits_by_architecture_and_kernel() -> None:
    kernels = compare_sass.parse_sass(SASS)
    assert list(kernels) == [
        ("sm_90a", "_Z3addPf"),
        ("sm_90a", "_Z4zeroPf"),
        ("sm_80", "_Z3addPf"),
    ]
    load, jump = kernels["sm_90a", "_Z3addPf"]
    assert load == "LDC R1, c[0x0][0x28]  0x00000a00ff017b82 0x000fe20000000800"
    assert jump.startswith("@!P0 BRA 0xb90  0x")


A: Code = ("LDC R1  0x1 0x2", "EXIT  0x3 0x4")
WAITS: Code = ("LDC R1  0x1 0x9", "EXIT  0x3 0x4")  # another scheduling of the same text
B: Code = ("EXIT  0x3 0x4",)
BEFORE: dict[Key, Code] = {("sm_90a", "fwd<1>"): A, ("sm_90a", "bwd"): B}


def test_the_same_kernels_are_the_same() -> None:
    result = compare_sass.compare(BEFORE, dict(reversed(BEFORE.items())))
    assert result.is_same and len(result.same) == 2


def test_a_renamed_kernel_is_found_by_its_code() -> None:
    result = compare_sass.compare(BEFORE, {("sm_90a", "forward"): A, ("sm_90a", "bwd"): B})
    assert result.is_same and result.renamed == ["sm_90a fwd<1> -> forward"]


@pytest.mark.parametrize(
    "after, title",
    [
        ({("sm_90a", "fwd<1>"): WAITS, ("sm_90a", "bwd"): B}, "changed"),
        ({("sm_90a", "fwd<1>"): A[:1], ("sm_90a", "bwd"): B}, "changed"),
        ({("sm_90a", "fwd<1>"): A}, "removed"),
        (BEFORE | {("sm_90a", "more"): A}, "added"),
        ({("sm_80", "fwd<1>"): A, ("sm_90a", "bwd"): B}, "removed"),  # of another architecture
        ({("sm_90a", "forward"): WAITS, ("sm_90a", "bwd"): B}, "removed"),
    ],
)
def test_a_difference_is_named(after: dict[Key, Code], title: str) -> None:
    result = compare_sass.compare(BEFORE, after)
    assert not result.is_same and getattr(result, title)


def test_names_lose_parameter_types_unless_they_would_fall_together() -> None:
    kernels = {("sm_90a", "_Z3addPf"): A, ("sm_90a", "_Z4zeroPf"): A, ("sm_90a", "_Z4zeroPd"): B}
    names = [name for _, name in compare_sass.with_readable_names(kernels)]
    assert names in (["add", "_Z4zeroPf", "_Z4zeroPd"], [name for _, name in kernels])  # c++filt


def test_objects_of_a_changed_and_an_unchanged_kernel(tmp_path: Path) -> None:
    toolkit = build_config.find_toolkit()
    if toolkit is None:
        pytest.skip("needs nvcc")
    try:
        cuobjdump = compare_sass.find_cuobjdump()
    except SystemExit:
        pytest.skip("needs cuobjdump")
    kernels = []
    for name, factor in (("one", 2), ("same", 2), ("other", 3)):
        source = tmp_path / f"{name}.cu"
        source.write_text(
            f"// {name}\n__global__ void scale(float* x) {{ x[threadIdx.x] *= {factor}.f; }}\n"
        )
        command = [str(toolkit.nvcc), "-arch=sm_90a", "-lineinfo", "-c", str(source)]
        subprocess.run([*command, "-o", str(source.with_suffix(".o"))], check=True)
        kernels.append(compare_sass.kernels_of([source.with_suffix(".o")], cuobjdump))
    one, same, other = kernels
    assert len(one) == 1
    assert compare_sass.compare(one, same).is_same
    assert len(compare_sass.compare(one, other).changed) == 1
