"""flash_attn_2_cuda as other libraries call it: positional entry points with the arguments of flash-attn 2.8."""

from __future__ import annotations

import pytest
import torch
from cases import Alibi, AttnCase, Mask, cuda_build, is_built, make_inputs
from decoding import DecodeCase, DecodeInputs, make_decode_inputs, run_decode
from harness import assert_bitwise
from torch import Tensor

from flash_attn import flash_attn_func, flash_attn_varlen_func
from flash_attn.flash_attn_interface import flash_attn_gpu

CASE = AttnCase(130, 130, heads=(4, 2), head_dim=64)

pytestmark = pytest.mark.skipif(
    cuda_build() is None or not is_built(CASE), reason="needs a GPU and the compiled extension"
)


def inputs():
    x = make_inputs(CASE, "cuda")
    return x.q, x.k, x.v, x.dout


def test_fwd_and_bwd_cuda() -> None:
    q, k, v, dout = inputs()
    scale, mask = CASE.scale, (True, 40, 0)
    out, lse, probs, rng_state = flash_attn_gpu.fwd(
        q, k, v, None, None, 0.0, scale, *mask, 0.0, False, None
    )
    assert probs.numel() == 0 and rng_state.shape == (2,)
    leaves = [t.clone().requires_grad_() for t in (q, k, v)]
    want, want_lse, _ = flash_attn_func(
        *leaves, causal=True, window_size=(40, 0), return_attn_probs=True, deterministic=True
    )
    assert torch.equal(out, want) and torch.equal(lse, want_lse)
    want_grads = torch.autograd.grad(want, leaves, dout)
    dq = torch.full_like(q, torch.nan)
    *grads, softmax_d = flash_attn_gpu.bwd(
        *(dout, q, k, v, out, lse, dq, None, None, None, 0.0, scale),
        *(*mask, 0.0, True, None, None),
    )
    assert grads[0].data_ptr() == dq.data_ptr()
    for name, ours, grad in zip(("dq", "dk", "dv"), grads, want_grads):
        assert torch.equal(ours, grad), name
    want_d = (dout.float() * out.float()).sum(-1).transpose(1, 2)
    assert softmax_d.shape[-1] % 128 == 0 and not softmax_d[..., want_d.shape[-1] :].any()
    torch.testing.assert_close(softmax_d[..., : want_d.shape[-1]], want_d)


@pytest.mark.parametrize("more", [(), (0,)], ids=["21", "22"])
def test_varlen_fwd_takes_21_and_22_arguments_cuda(more: tuple[int, ...]) -> None:
    q, k, v, dout = (t.flatten(0, 1) for t in inputs())
    cu_seqlens = torch.tensor([0, 50, 130], dtype=torch.int32, device="cuda")
    out_given = torch.empty_like(q)
    out, lse, _, _ = flash_attn_gpu.varlen_fwd(
        *(q, k, v, out_given, cu_seqlens, cu_seqlens, None, None, None, None, 80, 80),
        *(0.0, CASE.scale, False, True, -1, -1, 0.0, False, None, *more),
    )
    assert out.data_ptr() == out_given.data_ptr()
    leaves = [t.clone().requires_grad_() for t in (q, k, v)]
    want = flash_attn_varlen_func(
        *leaves, cu_seqlens, cu_seqlens, 80, 80, causal=True, deterministic=True
    )
    assert torch.equal(out, want)
    want_grads = torch.autograd.grad(want, leaves, dout)
    *grads, _ = flash_attn_gpu.varlen_bwd(
        *(dout, q, k, v, out, lse, None, None, None, cu_seqlens, cu_seqlens, None, 80, 80),
        *(0.0, CASE.scale, False, True, -1, -1, 0.0, True, None, None),
    )
    for name, ours, grad in zip(("dq", "dk", "dv"), grads, want_grads):
        assert torch.equal(ours, grad), name


def test_dropout_and_its_probabilities_cuda() -> None:
    q, k, v, _ = inputs()
    torch.manual_seed(3)
    out, _, probs, rng_state = flash_attn_gpu.fwd(
        q, k, v, None, None, 0.25, CASE.scale, False, -1, -1, 0.0, True, None
    )
    torch.manual_seed(3)
    want, _, want_probs = flash_attn_func(q, k, v, dropout_p=0.25, return_attn_probs=True)
    assert torch.equal(out, want) and torch.equal(probs, want_probs)
    assert probs.shape == (1, 4, 256, 256) and rng_state[0].item() == 3


KVCACHE = [
    DecodeCase((90, 5, 200), 1, (4, 2), 64, Mask.causal, append=1, rotary="halves", page_size=16),
    DecodeCase((90, 5, 200), 3, (4, 2), 64, Mask.causal, append=3, rotary="interleaved"),
    DecodeCase((90, 5, 200), 4, (4, 2), 64, entries="permuted", window=(40, 3), softcap=5.0),
    DecodeCase(
        (90, 5, 200), 4, (4, 2), 64, leftpad=(3, 0, 70), alibi=Alibi.per_batch, num_splits=3
    ),
    DecodeCase(
        (90, 5, 200), 3, (6, 3), 59, append=3, rotary="halves", rotary_dim=48, unpadded=True
    ),
    DecodeCase((90, 5, 200), 3, (6, 1), 59, Mask.causal, append=3, page_size=16, unpadded=True),
]


@pytest.mark.parametrize("case", KVCACHE, ids=str)
def test_fwd_kvcache_takes_20_arguments_cuda(case: DecodeCase) -> None:
    x = make_decode_inputs(case, "cuda")
    y, o = x.fresh(), x.options
    want = run_decode(y)
    for out_ in (None, torch.full_like(x.q, torch.nan)):
        z = x.fresh()
        tensors = (
            *(z.q, z.k_cache, z.v_cache, o.get("k"), o.get("v"), o["cache_seqlens"]),
            *(o.get("rotary_cos"), o.get("rotary_sin"), o.get("cache_batch_idx")),
            *(o.get("cache_leftpad"), o.get("block_table"), o.get("alibi_slopes"), out_),
        )
        scalars = (
            *(case.scale, case.causal, *case.window, case.softcap),
            *(o.get("rotary_interleaved", True), case.num_splits),
        )
        assert len(tensors) + len(scalars) == 20
        out, lse = flash_attn_gpu.fwd_kvcache(*tensors, *scalars)
        assert out_ is None or out.data_ptr() == out_.data_ptr()
        for name, ours, expected in (
            *(("out", out, want.out), ("lse", lse, want.lse)),
            *(("k_cache", z.k_cache, y.k_cache), ("v_cache", z.v_cache, y.v_cache)),
        ):
            assert_bitwise(name, ours, expected, case)


def fwd_kvcache(x: DecodeInputs, k_cache: Tensor, v_cache: Tensor, out_: Tensor | None) -> list:
    o = x.options
    return flash_attn_gpu.fwd_kvcache(
        *(x.q, k_cache, v_cache, o["k"], o["v"], o["cache_seqlens"], None, None, None, None, None),
        *(None, out_, 0.125, True, -1, -1, 0.0, False, 0),
    )


def test_what_is_written_must_not_overlap_cuda() -> None:
    """The caches, out_ and the gradients; and nothing is written then."""
    x = make_decode_inputs(DecodeCase((9, 9), 3, (4, 2), 64, append=3), "cuda")
    first, whole = x.k_cache[:1].expand_as(x.k_cache), x.v_cache.clone()
    row = torch.zeros_like(x.q)[:, :1].expand_as(x.q)
    for k_cache, v_cache, out_, words in (
        (first, x.v_cache, None, "k_cache is written to and must not overlap itself"),
        (x.v_cache, x.v_cache, None, "v_cache is written to and must not overlap k_cache"),
        (x.k_cache, x.v_cache, row, "out_ is written to and must not overlap itself"),
    ):
        with pytest.raises(RuntimeError, match=words):
            fwd_kvcache(x, k_cache, v_cache, out_)
    assert_bitwise("v_cache", x.v_cache, whole, "nothing written")
    q, k, v, dout = inputs()
    scalars = (0.0, CASE.scale, False, -1, -1, 0.0, False, None)
    with pytest.raises(RuntimeError, match="out_ is written to"):
        flash_attn_gpu.fwd(q, k, v, q[:, :1].expand_as(q), None, *scalars)
    out, lse, _, _ = flash_attn_gpu.fwd(q, k, v, None, None, *scalars)
    for grads, words in (
        ((None, k[:, :1].expand_as(k), None), "dk is written to and must not overlap itself"),
        ((None, torch.empty_like(k), k), "dv is written to and must not overlap k"),
    ):
        with pytest.raises(RuntimeError, match=words):
            flash_attn_gpu.bwd(dout, q, k, v, out, lse, *grads, None, *scalars, None)


def test_a_generator_is_refused_cuda() -> None:
    q, k, v, _ = inputs()
    generator = torch.Generator(device="cuda")
    with pytest.raises(RuntimeError, match="The `generator` argument is no longer supported"):
        flash_attn_gpu.fwd(
            q, k, v, None, None, 0.0, CASE.scale, False, -1, -1, 0.0, False, generator
        )
