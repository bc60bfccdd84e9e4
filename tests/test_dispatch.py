"""Which kernels serve a call: the isa that calls are limited to, and the registry as the extension reports it.

The choice itself is checked with made-up kernels and without a GPU: cpp/check_choose.cpp and
cpp/check_dispatch.cpp.  The CUDA tests here run each isa's kernels by themselves.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from cases import (
    FEATURE_SETS,
    AttnCase,
    Mask,
    built_isas,
    cuda_build,
    make_inputs,
    on_devices,
)
from decoding import DecodeCase, check_decode, make_decode_inputs
from harness import assert_same_result, check_case, features_of, run_flash

from csrc.kernels import kernel_list
from flash_attn import flash_attn_func
from flash_attn._head_dims import HEAD_DIMS

CASES = [
    AttnCase(130, 203, (4, 2), head_dim, mask, dtype, batch=2)
    for head_dim in (*HEAD_DIMS, 40, 72)
    for mask, dtype in ((Mask.causal, "bf16"), (Mask.none, "fp16"))
]
FEATURED = [
    AttnCase(130, 203, (4, 2), head_dim, Mask.causal, batch=2, **features)
    for head_dim in (64, 96, 128, 192, 200)
    for features in FEATURE_SETS
]
DECODING = [
    DecodeCase((90, 5, 200), 1, (8, 2), 64, Mask.causal),
    DecodeCase((90, 5, 200), 30, (4, 2), 128, Mask.causal, page_size=16),
    DecodeCase((1000,), 2, (4, 2), 64, num_splits=3),
]


@pytest.mark.parametrize("isa", built_isas("bwd"))
@on_devices(cuda=CASES)
def test_kernels_of_each_isa_match_the_oracle(
    device: str, case: AttnCase, isa: str, pin_isa
) -> None:
    pin_isa(isa)
    check_case(case, make_inputs(case, device))


@pytest.mark.parametrize("isa", built_isas("decode"))
@on_devices(cuda=DECODING)
def test_decoding_kernels_of_each_isa_match_the_oracle(
    device: str, case: DecodeCase, isa: str, pin_isa
) -> None:
    pin_isa(isa)
    check_decode(case, make_decode_inputs(case, device))


@on_devices(cuda=CASES + FEATURED)
def test_calls_take_the_newest_isa_that_serves(device: str, case: AttnCase, pin_isa) -> None:
    """Of the forward pass.  A unit that serves nothing, first in its table, changes nothing."""
    x, options = make_inputs(case, device), features_of(case, device)
    pin_isa("")
    want = run_flash(x.q, x.k, x.v, causal=case.causal, **options)
    unit_dim = next(d for d in HEAD_DIMS if d >= case.head_dim)
    kernels = cuda_build()["kernels"]
    isas = [i for i in built_isas("fwd") if (i, "fwd", unit_dim, case.dtype) in kernels]
    pin_isa(isas[0])
    ours = run_flash(x.q, x.k, x.v, causal=case.causal, **options)
    assert_same_result(ours, want, case, dq_bitwise=True)


@pytest.mark.cuda
def test_an_isa_that_does_not_serve_is_named(device: str, pin_isa) -> None:
    """With FLASH_ATTN_TEST_UNITS=1 at build time: the unit is built, listed, and serves nothing."""
    unit = kernel_list.TEST_UNIT
    built = (unit.isa, unit.pass_name, unit.head_dim, unit.dtype)
    if cuda_build()["kernels"].count(built) < 2:  # the other one is the isa's own
        pytest.skip("needs a build with FLASH_ATTN_TEST_UNITS=1")
    q = torch.zeros(1, 8, 1, unit.head_dim, dtype=torch.bfloat16, device=device)
    k = q[:, :1].expand(q.shape)  # no kernel of this isa takes rows that are all the same
    pin_isa(unit.isa)
    with pytest.raises(RuntimeError, match=rf"head_dim 64 with bf16.*FLASH_ATTN_ISA: {unit.isa}"):
        flash_attn_func(q, k, k)
    pin_isa("")
    flash_attn_func(q, k, k)


def test_pinning_to_no_isa_is_refused(pin_isa) -> None:
    with pytest.raises(RuntimeError, match="isa must be 'sm90', 'sm80' or .*; got 'hopper'"):
        pin_isa("hopper")


def test_environment_pins_the_isa(pin_isa) -> None:
    code = "import torch, flash_attn_2_cuda as e; print(e.build_info()['isa'])"
    for isa in ("", "sm80", "hopper"):
        env = os.environ | {"FLASH_ATTN_ISA": isa}
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, env=env, capture_output=True, text=True)
        assert done.stdout.strip() == isa, done.stderr


def test_build_info_lists_the_units_of_the_build(pin_isa) -> None:
    import flash_attn_2_cuda

    info = flash_attn_2_cuda.build_info()
    units = kernel_list.units(info["archs"], info["head_dims"], info["dtypes"])
    wanted = {(u.isa, u.pass_name, u.head_dim, u.dtype) for u in units}
    unit = kernel_list.TEST_UNIT
    optional = {(unit.isa, unit.pass_name, unit.head_dim, unit.dtype)}
    assert wanted <= set(info["kernels"]) <= wanted | optional
    isas = list(kernel_list.PASSES)
    for name in {kernel[1] for kernel in info["kernels"]}:
        order = [isas.index(isa) for isa, other, _, _ in info["kernels"] if other == name]
        assert order == sorted(order), "the newest isa is asked first"
    sizes = tuple(info["smem_kb"])
    assert set(sizes) <= set(kernel_list.SMEM_KB) and sorted(sizes, reverse=True) == list(sizes)
