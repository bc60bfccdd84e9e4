"""Tiles for less shared memory: every size of the build against the oracle, on a GPU that has more.

The whole suite runs on them with FLASH_ATTN_TEST_SMEM_KB=99 or 163 in the environment.  The choice itself is
checked without a GPU: cpp/check_tiles.cpp and cpp/check_dispatch.cpp.
"""

from __future__ import annotations

import os
import subprocess
import sys
from itertools import product

import pytest
import torch
from cases import (
    FEATURE_SETS,
    AttnCase,
    Mask,
    VarlenCase,
    built_smem_kb,
    cuda_build,
    make_inputs,
    make_varlen_inputs,
    on_devices,
)
from decoding import DecodeCase, check_decode, make_decode_inputs
from harness import assert_same_result, check_case, check_varlen, run_flash

from csrc.kernels import kernel_list
from flash_attn import flash_attn_func, flash_attn_with_kvcache
from flash_attn._head_dims import HEAD_DIMS

# Lengths around the ends of tiles of 32, 48, 64 and 128.
LENGTHS = ((97, 97), (130, 203), (203, 130), (65, 300), (1, 129), (33, 64), (257, 95))
PLAIN = [
    AttnCase(*lengths, (4, 2), head_dim, mask, dtype, batch=2)
    for head_dim, lengths, (mask, dtype) in product(
        (*HEAD_DIMS, 40, 136, 200), LENGTHS, zip(Mask, ("bf16", "fp16"))
    )
]
FEATURES = [
    AttnCase(130, 203, (4, 2), head_dim, Mask.none, dtype, batch=2, **features)
    for head_dim, dtype in zip(HEAD_DIMS, ("bf16", "fp16") * 3)
    for features in FEATURE_SETS
]
RAGGED = [
    VarlenCase((33, 0, 130, 7), (33, 5, 97, 64), (4, 2), head_dim, mask, "bf16", (17, 5))
    for head_dim in HEAD_DIMS
    for mask in Mask
]
REPEATED = [
    AttnCase(300, 300, (4, 2), d, mask, "bf16", batch=2) for d in HEAD_DIMS for mask in Mask
]
DECODING = [
    DecodeCase((300, 5, 200), seqlen_q, (8, 2), head_dim, Mask.causal, page_size=page_size)
    for head_dim in HEAD_DIMS
    for seqlen_q, page_size in ((1, 0), (1, 16), (30, 48))
]
# One sequence: its thread blocks are clusters on a GPU of 9.0, and read what was appended by a kernel that
# started early.  A limit takes both away.
DECODING += [
    DecodeCase((2000,), 1, (8, 2), head_dim, Mask.causal, append=append)
    for head_dim in HEAD_DIMS
    for append in (None, 1)
]
each_size = pytest.mark.parametrize("kb", built_smem_kb())


@each_size
@on_devices(cuda=[*PLAIN, *FEATURES])
def test_tiles_of_each_size_match_the_oracle(
    device: str, case: AttnCase, kb: int, limit_smem
) -> None:
    limit_smem(kb)
    check_case(case, make_inputs(case, device))


@each_size
@on_devices(cuda=RAGGED)
def test_ragged_batches_match_the_oracle(
    device: str, case: VarlenCase, kb: int, limit_smem
) -> None:
    limit_smem(kb)
    check_varlen(case, make_varlen_inputs(case, device))


@each_size
@on_devices(cuda=REPEATED)
def test_deterministic_mode_repeats_bitwise(
    device: str, case: AttnCase, kb: int, limit_smem
) -> None:
    limit_smem(kb)
    x = make_inputs(case, device)
    first = run_flash(x.q, x.k, x.v, x.dout, causal=case.causal, deterministic=True)
    for _ in range(10):
        again = run_flash(x.q, x.k, x.v, x.dout, causal=case.causal, deterministic=True)
        assert_same_result(again, first, case, dq_bitwise=True)


@each_size
@on_devices(cuda=[case.but(seqlen_q=1000, seqlen_k=1000) for case in REPEATED])
def test_default_mode_repeats_bitwise_except_dq(
    device: str, case: AttnCase, kb: int, limit_smem
) -> None:
    """Also the race test of the loads that take the place of what has just been read."""
    limit_smem(kb)
    x = make_inputs(case, device)
    first = run_flash(x.q, x.k, x.v, x.dout, causal=case.causal)
    for _ in range(50):
        again = run_flash(x.q, x.k, x.v, x.dout, causal=case.causal)
        assert_same_result(again, first, case, dq_bitwise=False)


@each_size
@on_devices(cuda=DECODING)
def test_decoding_matches_the_oracle(device: str, case: DecodeCase, kb: int, limit_smem) -> None:
    limit_smem(kb)
    check_decode(case, make_decode_inputs(case, device))


@each_size
@pytest.mark.cuda
@pytest.mark.parametrize("head_dim", [128, 192, 256])
def test_backward_takes_what_the_forward_of_another_limit_saved(
    device: str, head_dim: int, kb: int, limit_smem
) -> None:
    """Forward under a limit and backward without, and the reverse.

    That a plan keeps its limit until its launch is checked without a GPU: cpp/check_dispatch.cpp.
    """
    case = AttnCase(130, 203, (4, 2), head_dim, Mask.causal, "bf16", batch=2)
    x = make_inputs(case, device)
    q, k, v = (t.detach().requires_grad_() for t in (x.q, x.k, x.v))
    limit_smem(0)
    expected = torch.autograd.grad(flash_attn_func(q, k, v, causal=True), (q, k, v), x.dout)
    for of_forward, of_backward in ((kb, 0), (0, kb)):
        limit_smem(of_forward)
        out = flash_attn_func(q, k, v, causal=True)
        limit_smem(of_backward)
        for got, want in zip(torch.autograd.grad(out, (q, k, v), x.dout), expected, strict=True):
            assert (got - want).norm() <= 2e-2 * want.norm()


@pytest.mark.parametrize("kb", [-1, 1, 100, 228])
def test_a_limit_that_is_no_size_is_refused(kb: int, limit_smem) -> None:
    with pytest.raises(RuntimeError, match=f"kb must be 99, 163, 227 or 0 .no limit.; got {kb}"):
        limit_smem(kb)


def size_that_is_not_built() -> int:
    """A size below all that this build has tiles for; skips where there is none."""
    smallest = min(cuda_build()["smem_kb"])
    kb = next((kb for kb in reversed(kernel_list.SMEM_KB) if kb < smallest), None)
    if kb is None:
        pytest.skip("needs a build without tiles for 99 KB")
    return kb


@pytest.mark.cuda
def test_tiles_that_are_not_built_are_named(device: str, limit_smem) -> None:
    """The backward of 256 fits no smaller size than its own."""
    build, kb = cuda_build(), size_that_is_not_built()
    if 256 not in build["head_dims"]:
        pytest.skip("needs a build with head dimension 256")
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[build["dtypes"][0]]
    q = torch.randn(1, 64, 1, 256, dtype=dtype, device=device, requires_grad=True)
    out = flash_attn_func(q, q, q)
    limit_smem(kb)
    sizes = ",".join(map(str, build["smem_kb"]))
    remedy = f"rebuild with a FLASH_ATTN_SMEM_KB that has {kb}"
    with pytest.raises(RuntimeError, match=f"tiles for {sizes} KB.*allows {kb} KB: {remedy}"):
        torch.autograd.grad(out.sum(), q, retain_graph=True)
    limit_smem(0)
    torch.autograd.grad(out.sum(), q)


@pytest.mark.cuda
@pytest.mark.filterwarnings("ignore:.*head_dim")
@pytest.mark.parametrize("head_dim", [64, 59])
@pytest.mark.parametrize("is_paged", [False, True], ids=["dense", "paged"])
@pytest.mark.parametrize("why", ["no kernel", "no tile"])
def test_append_that_is_refused_leaves_the_cache_as_it_was(
    device: str, why: str, is_paged: bool, head_dim: int, pin_isa, limit_smem
) -> None:
    if why == "no tile":
        limit_smem(size_that_is_not_built())
    else:
        pin_isa("sm90")  # which has no decoding
    build = cuda_build()
    if 64 not in build["head_dims"]:
        pytest.skip("needs a build with head dimension 64")
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[build["dtypes"][0]]
    q, k, v = (torch.randn(2, 1, 2, head_dim, dtype=dtype, device=device) for _ in range(3))
    caches = [torch.randn(2, 64, 2, head_dim, dtype=dtype, device=device) for _ in range(2)]
    before = [(cache.clone(), cache._version) for cache in caches]
    table = torch.tensor([[1], [0]], dtype=torch.int32, device=device) if is_paged else None
    cos, sin = (torch.randn(64, 8, dtype=dtype, device=device) for _ in range(2))

    def append() -> torch.Tensor:
        lengths = dict(cache_seqlens=5, block_table=table)
        return flash_attn_with_kvcache(q, *caches, k, v, cos, sin, **lengths, causal=True)

    with pytest.raises(RuntimeError, match="no kernel for|launch of the"):
        append()
    for cache, (values, version) in zip(caches, before, strict=True):
        assert torch.equal(cache, values) and cache._version == version
    pin_isa(""), limit_smem(0)
    assert append().isfinite().all()
    assert not any(torch.equal(cache, values) for cache, (values, _) in zip(caches, before))


@pytest.mark.cuda
def test_append_with_too_many_thread_blocks_leaves_the_cache_as_it_was(device: str) -> None:
    """2^24 rows in 128 parts each, about 1 GiB of new keys and queries."""
    build = cuda_build()
    if 32 not in build["head_dims"]:
        pytest.skip("needs a build with head dimension 32")
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[build["dtypes"][0]]
    q, k, v = (torch.ones(2**20, 1, 16, 8, dtype=dtype, device=device) for _ in range(3))
    caches = [torch.zeros(1, 16, 16, 8, dtype=dtype, device=device) for _ in range(2)]
    table = torch.zeros(2**20, 1, dtype=torch.int32, device=device)
    with pytest.raises(RuntimeError, match="invalid configuration"):
        flash_attn_with_kvcache(
            q, *caches, k, v, cache_seqlens=5, block_table=table, num_splits=128
        )
    assert not any(cache.any() for cache in caches)


@pytest.mark.cuda
@pytest.mark.parametrize("text", ["100", "99 KB", " 99", "-99", "4294967395"])
def test_environment_that_names_no_size_is_an_error(device: str, text: str) -> None:
    code = (
        "import torch, flash_attn as f; q = torch.zeros(1, 8, 1, 64, dtype=torch.bfloat16, "
        "device='cuda'); f.flash_attn_func(q, q, q)"
    )
    env = os.environ | {"FLASH_ATTN_TEST_SMEM_KB": text}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode != 0
    assert f"FLASH_ATTN_TEST_SMEM_KB={text} is no size" in done.stderr, done.stderr
    assert "99, 163 or 227" in done.stderr
