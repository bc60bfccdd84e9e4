"""v with a head dimension of its own, as the prefill of multi-head latent attention has it (192, 128).

The CPU serves any, forward and backward.  On CUDA kernels of sm90 serve it, forward only: these tests
are skipped on other GPUs, where the call is an error.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import hopper
import pytest
import torch
from cases import (
    FEATURE_SETS,
    Alibi,
    AttnCase,
    Case,
    Mask,
    VarlenCase,
    cuda_build,
    is_built,
    make_inputs,
    make_varlen_inputs,
)
from harness import (
    assert_bitwise,
    assert_nearly,
    check_case,
    check_varlen,
    features_of,
    leaves,
    run_flash,
)
from hopper import IS_HOPPER
from oracle import (
    Result,
    assert_probs,
)
from philox import keep_mask
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import grad, vmap
from torch.utils.flop_counter import FlopCounterMode

from flash_attn import (
    flash_attn_func,
    flash_attn_interface,
    flash_attn_varlen_func,
    flash_attn_with_kvcache,
)
from flash_attn._head_dims import HEAD_DIMS

needs_hopper = pytest.mark.skipif(
    not IS_HOPPER, reason="needs a GPU of capability 9.0 and its kernels"
)


def where_served(*cases: Case) -> Callable:
    """Parametrize `device` and `case`: fp32 on the CPU, 16 bits on CUDA."""
    rows = [
        pytest.param("cpu", c.but(dtype="fp32"), id=f"cpu-{c.but(dtype='fp32')}") for c in cases
    ]
    if cuda_build() is not None:
        rows += [
            pytest.param("cuda", case, id=f"cuda-{case}", marks=needs_hopper)
            for case in cases
            if is_built(case)
        ]
    return pytest.mark.parametrize(("device", "case"), rows)


def check(case: AttnCase, device: str) -> Result:
    """Against the oracle; gradients too where there are some."""
    x = make_inputs(case, device)
    if device == "cpu":
        return check_case(case, x)
    return hopper.check(case, x)


def check_lengths(case: VarlenCase, device: str) -> Result:
    """The same of sequences of different lengths."""
    x = make_varlen_inputs(case, device)
    if device == "cpu":
        return check_varlen(case, x)
    return hopper.check_varlen(case, x)


MLA = AttnCase(130, 203, (4, 2), 192, Mask.causal, batch=2, head_dim_v=128)
DENSE = [
    MLA,
    MLA.but(mask=Mask.none, dtype="fp16"),
    MLA.but(heads=(8, 1)),
    MLA.but(heads=(2, 2), seqlen_q=257, seqlen_k=64),  # rows that see no key
    MLA.but(seqlen_q=1, seqlen_k=1),
    MLA.but(seqlen_q=1, seqlen_k=513, mask=Mask.none),
    MLA.but(seqlen_q=0),
    MLA.but(seqlen_k=0),
    MLA.but(seqlen_q=700, seqlen_k=700, heads=(2, 1), batch=1),
    *(MLA.but(head_dim=d, head_dim_v=dv) for d, dv in ((136, 8), (160, 64), (184, 120), (192, 72))),
    # padded to multiples of 8, q and k apart from v
    *(MLA.but(head_dim=d, head_dim_v=dv) for d, dv in ((190, 128), (192, 125), (130, 33))),
]
FEATURED = [
    MLA.but(mask=mask, **features)
    for features, mask in zip(FEATURE_SETS, (Mask.none, Mask.causal) * len(FEATURE_SETS))
]
LENGTHS = VarlenCase(
    *((70, 0, 5, 130, 1), (70, 33, 0, 200, 64), (4, 2), 192, Mask.causal),
    unused=(3, 2),
    head_dim_v=128,
)
VARLEN = [
    LENGTHS,
    LENGTHS.but(mask=Mask.none, dtype="fp16", heads=(3, 1)),
    LENGTHS.but(window=(20, 5), mask=Mask.none),
    LENGTHS.but(softcap=4.0),
    LENGTHS.but(alibi=Alibi.per_batch),
    LENGTHS.but(dropout=0.2),
    LENGTHS.but(window=(70, 5), softcap=8.0, alibi=Alibi.per_head, dropout=0.1),
    LENGTHS.but(head_dim=140, head_dim_v=48),
    LENGTHS.but(head_dim=187, head_dim_v=99),
]


@where_served(*DENSE, *FEATURED)
def test_matches_the_oracle(device: str, case: AttnCase) -> None:
    ours = check(case, device)
    assert ours.out.shape == case.out_shape and ours.out.is_contiguous()


@where_served(*VARLEN)
def test_sequences_match_the_oracle(device: str, case: VarlenCase) -> None:
    assert check_lengths(case, device).out.shape == case.out_shape


@pytest.mark.parametrize("dtype", ["fp64", "fp16", "bf16"])
@pytest.mark.parametrize("head_dims", [(64, 128), (16, 256), (256, 1), (7, 9)])
def test_cpu_serves_any_pair_with_gradients(dtype: str, head_dims: tuple[int, int]) -> None:
    head_dim, head_dim_v = head_dims
    case = MLA.but(head_dim=head_dim, head_dim_v=head_dim_v, dtype=dtype, batch=1, softcap=3.0)
    check(case, "cpu")


@where_served(MLA, MLA.but(window=(40, 9)))
def test_is_the_call_with_padded_values(device: str, case: AttnCase) -> None:
    """v with zeros up to q's head_dim, and out cut, is what callers did before."""
    x = make_inputs(case, device)
    options = features_of(case, device) | dict(causal=case.causal)
    ours = run_flash(x.q, x.k, x.v, **options)
    wide = torch.nn.functional.pad(x.v, (0, case.head_dim - case.head_dim_v))
    want = run_flash(x.q, x.k, wide, **options)
    assert not want.out[..., case.head_dim_v :].any()
    assert_nearly("out", ours.out, want.out[..., : case.head_dim_v].contiguous(), case)
    torch.testing.assert_close(ours.lse, want.lse, rtol=1e-6, atol=1e-5)


@where_served(MLA)
def test_any_layout_gives_the_same_bits(device: str, case: AttnCase) -> None:
    """v as a part of a wider tensor, as a projection of both makes it; v expanded."""
    x = make_inputs(case, device)
    want = run_flash(x.q, x.k, x.v, causal=True)
    beside = torch.full_like(x.k[..., :64], torch.nan)
    part = torch.cat((beside, x.v), -1)[..., 64:]
    heads_first = x.v.transpose(1, 2).contiguous().transpose(1, 2)
    with_gaps = torch.stack((x.v, x.v), -1)[..., 0]
    for v in (part, heads_first, with_gaps):
        assert_bitwise("out", run_flash(x.q, x.k, v, causal=True).out, want.out, case)
    expanded = x.v[:, :, :1].expand_as(x.v)
    want = run_flash(x.q, x.k, expanded.contiguous(), causal=True)
    assert_bitwise("out", run_flash(x.q, x.k, expanded, causal=True).out, want.out, case)
    # Rows that are the same place, or overlap, as TMA has no name for them.
    one_row = x.v[:, :1].expand_as(x.v)
    rows, dim = x.v.shape[1], x.v.shape[-1]
    flat = x.v.flatten()[: rows * dim]
    overlapping = flat.as_strided((1, rows, 1, dim), (0, 8, 0, 1)).expand_as(x.v)
    for v in (one_row, overlapping):
        want = run_flash(x.q, x.k, v.contiguous(), causal=True)
        assert_bitwise("out", run_flash(x.q, x.k, v, causal=True).out, want.out, case)


@where_served(MLA)
def test_scale_comes_from_the_head_dim_of_q(device: str, case: AttnCase) -> None:
    x = make_inputs(case, device)
    ours, same, other = (
        run_flash(x.q, x.k, x.v, causal=True, softmax_scale=scale).out
        for scale in (None, case.head_dim**-0.5, case.head_dim_v**-0.5)
    )
    assert torch.equal(ours, same) and not torch.equal(ours, other)


@where_served(MLA.but(dropout=0.2))
def test_s_dmask_has_the_dropped_weights(device: str, case: AttnCase) -> None:
    x = make_inputs(case, device)
    arguments = (case.dropout, case.scale, case.causal, -1, -1, 0.0, None, True)
    forward = torch.ops.flash_attn._flash_attn_forward
    out, _, probs, state = forward(x.q, x.k, x.v, *arguments)
    assert out.shape == case.out_shape
    shape = (range(case.batch), case.heads[0], case.seqlen_q, case.seqlen_k)
    keep = keep_mask(state.cpu(), *shape, case.dropout, x.q.device)
    assert_probs(case, x.q, x.k, probs, keep, None)


@pytest.mark.cuda
@needs_hopper
@pytest.mark.parametrize("varlen", [False, True], ids=["dense", "varlen"])
def test_the_usual_call_takes_the_quick_way(
    device: str, varlen: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Past Python's checks, with the same bits."""
    name = "_fast_varlen_attend" if varlen else "_fast_attend"
    quick, served = getattr(flash_attn_interface, name), []

    def attend(*arguments: object) -> Tensor | None:
        served.append(quick(*arguments))
        return served[-1]

    monkeypatch.setattr(flash_attn_interface, name, attend)
    x = make_varlen_inputs(LENGTHS, device) if varlen else make_inputs(MLA, device)
    lengths = (x.cu_seqlens_q, x.cu_seqlens_k, x.max_seqlen_q, x.max_seqlen_k) if varlen else ()
    function = flash_attn_varlen_func if varlen else flash_attn_func
    out = function(x.q, x.k, x.v, *lengths, causal=True)
    assert out is served[0]
    want = function(x.q, x.k, x.v, *lengths, causal=True, return_attn_probs=True)[0]
    assert served[1] is None
    assert_bitwise("out", out, want, "the usual call")


# --- torch.compile, fake tensors, transforms ------------------------------------------------------


def forward_and_lse(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    return flash_attn_func(q * 1.5, k, v, causal=True, return_attn_probs=True)[:2]


@where_served(MLA)
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compiles_as_a_full_graph(device: str, case: AttnCase, dynamic: bool) -> None:
    torch._dynamo.reset()
    options = dict(backend="aot_eager", fullgraph=True, dynamic=dynamic)
    compiled = torch.compile(forward_and_lse, **options)
    for shape in (case, case.but(seqlen_q=case.seqlen_q + 9)):
        x = make_inputs(shape, device)
        for name, ours, want in zip(
            ("out", "lse"), compiled(x.q, x.k, x.v), forward_and_lse(x.q, x.k, x.v)
        ):
            assert_nearly(name, ours, want, shape)


@where_served(MLA)
def test_export_keeps_the_head_dim_of_v(device: str, case: AttnCase) -> None:
    class Attend(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return flash_attn_func(q, k, v, causal=True)

    x = make_inputs(case, device)
    program = torch.export.export(Attend(), (x.q, x.k, x.v))
    assert_nearly("out", program.module()(x.q, x.k, x.v), Attend()(x.q, x.k, x.v), case)


@where_served(MLA)
@pytest.mark.parametrize("varlen", [False, True], ids=["dense", "varlen"])
def test_opcheck(device: str, case: AttnCase, varlen: bool) -> None:
    x = make_inputs(case.but(batch=1), device)
    options = (0.0, case.scale, True, -1, -1, 0.0, None, False)
    if not varlen:
        torch.library.opcheck(
            torch.ops.flash_attn._flash_attn_forward.default, (x.q, x.k, x.v, *options)
        )
        return
    ends = [torch.tensor([0, t.shape[1]], dtype=torch.int32, device=device) for t in (x.q, x.k)]
    longest = case.seqlen_q, case.seqlen_k
    torch.library.opcheck(
        torch.ops.flash_attn._flash_attn_varlen_forward.default,
        (x.q[0], x.k[0], x.v[0], *ends, *longest, *options),
    )


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_fake_and_meta_tensors_have_the_real_shapes(dtype: str) -> None:
    case = MLA.but(dtype=dtype)
    x = make_inputs(case, "cpu")
    want = forward_and_lse(x.q, x.k, x.v)
    with FakeTensorMode() as mode:
        fake = forward_and_lse(*(mode.from_tensor(t) for t in (x.q, x.k, x.v)))
        q, k, v, dout = leaves(*(mode.from_tensor(t) for t in (x.q, x.k, x.v, x.dout)))
        grads = torch.autograd.grad(flash_attn_func(q, k, v), (q, k, v), dout)
    meta = forward_and_lse(*(t.to("meta") for t in (x.q, x.k, x.v)))
    for results in (fake, meta):
        for ours, real in zip(results, want, strict=True):
            assert (ours.shape, ours.dtype, ours.stride()) == (
                real.shape,
                real.dtype,
                real.stride(),
            )
    assert [g.shape for g in grads] == [x.q.shape, x.k.shape, x.v.shape]


def test_gradients_compile_on_the_cpu() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(forward_and_lse, backend="aot_eager", fullgraph=True)
    x = make_inputs(MLA.but(dtype="fp32"), "cpu")
    results = []
    for function in (compiled, forward_and_lse):
        inputs = leaves(x.q, x.k, x.v)
        out, lse = function(*inputs)
        seen = lse.isfinite()
        results.append(torch.autograd.grad((out, lse), inputs, (x.dout, seen.to(lse.dtype))))
    for name, ours, want in zip(("dq", "dk", "dv"), *results):
        assert_nearly(name, ours, want, MLA)


@where_served(MLA.but(batch=3), MLA.but(batch=3, softcap=5.0))
@pytest.mark.parametrize("varlen", [False, True], ids=["dense", "varlen"])
def test_vmap_is_a_loop_over_the_examples(device: str, case: AttnCase, varlen: bool) -> None:
    x = make_inputs(case, device)
    options = features_of(case, device) | dict(causal=True)
    ends = [
        torch.tensor([0, n // 2, n], dtype=torch.int32, device=device)
        for n in (case.seqlen_q, case.seqlen_k)
    ]

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if varlen:
            longest = case.seqlen_q, case.seqlen_k
            return flash_attn_varlen_func(q, k, v, *ends, *longest, **options)
        return flash_attn_func(q[None], k[None], v[None], **options)[0]

    ours = vmap(attend)(x.q, x.k, x.v)
    want = torch.stack([attend(*example) for example in zip(x.q, x.k, x.v)])
    assert_nearly("out", ours, want, case)
    # Values of their own, and the same queries and keys for all.
    ours = vmap(attend, (None, None, 0))(x.q[0], x.k[0], x.v)
    want = torch.stack([attend(x.q[0], x.k[0], v) for v in x.v])
    assert_nearly("out", ours, want, case)


def test_gradients_of_examples_on_the_cpu() -> None:
    x = make_inputs(MLA.but(dtype="fp32", batch=3), "cpu")

    def loss(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return flash_attn_func(q[None], k[None], v[None], causal=True).square().sum()

    ours = vmap(grad(loss, (0, 1, 2)))(x.q, x.k, x.v)
    examples = [grad(loss, (0, 1, 2))(*example) for example in zip(x.q, x.k, x.v)]
    for name, one, want in zip(("dq", "dk", "dv"), ours, zip(*examples)):
        assert_nearly(name, one, torch.stack(want), MLA)


# --- What it costs --------------------------------------------------------------------------------


@where_served(MLA.but(mask=Mask.none))
def test_flops_are_of_both_widths(device: str, case: AttnCase) -> None:
    x = make_inputs(case, device)
    pairs = case.batch * case.heads[0] * case.seqlen_q * case.seqlen_k
    forward = 2 * pairs * (case.head_dim + case.head_dim_v)
    with FlopCounterMode(display=False) as counter:
        flash_attn_func(x.q, x.k, x.v)
    assert counter.get_total_flops() == forward
    if device != "cpu":
        return
    with FlopCounterMode(display=False) as counter:
        flash_attn_func(*leaves(x.q, x.k, x.v)).sum().backward()
    backward = 2 * pairs * (3 * case.head_dim + 2 * case.head_dim_v)
    assert counter.get_total_flops() == forward + backward


# --- Errors ---------------------------------------------------------------------------------------

NO_GRADIENT = (
    r"on CUDA there are no gradients where v has a head_dim of its own.* got head_dim 128 of v and "
    r"192 of q and k"
)


def fake_cuda(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.bfloat16, device="cuda")


@pytest.mark.parametrize("wanted", ["q", "k", "v", "softmax_scale"])
def test_gradients_on_cuda_are_refused_before_the_forward_pass(wanted: str) -> None:
    """Of fake tensors, which take the way of real ones up to the operator."""
    with FakeTensorMode():
        x = {name: fake_cuda(2, 8, 2, 192) for name in "qk"} | {"v": fake_cuda(2, 8, 2, 128)}
        x["softmax_scale"] = torch.tensor(0.1, device="cuda")
        x[wanted].requires_grad_()
        with pytest.raises(RuntimeError, match=f"flash_attn_func: {NO_GRADIENT}"):
            flash_attn_func(**x)
        with torch.no_grad():
            assert flash_attn_func(**x).shape == (2, 8, 2, 128)
        q, k, v = (x[name].detach() for name in "qkv")
        assert flash_attn_func(q, k, v).shape == (2, 8, 2, 128)


def test_gradients_of_transforms_and_operators_on_cuda_are_refused() -> None:
    with FakeTensorMode():
        q, v = fake_cuda(9, 2, 192), fake_cuda(9, 2, 128)
        ends = torch.zeros(3, dtype=torch.int32, device="cuda")

        def loss(q: Tensor) -> Tensor:
            return flash_attn_varlen_func(q, q.detach(), v, ends, ends, 9, 9).sum()

        with pytest.raises(RuntimeError, match=f"flash_attn_varlen_func: {NO_GRADIENT}"):
            grad(loss)(q)
        arguments = (ends, ends, 9, 9, 0.0, 0.1, True)
        operator = torch.ops.flash_attn._flash_attn_varlen_forward
        with pytest.raises(RuntimeError, match=f"_flash_attn_varlen_forward: {NO_GRADIENT}"):
            operator(q.requires_grad_(), q, v, *arguments)


@pytest.mark.cuda
@needs_hopper
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_gradients_are_refused_on_the_gpu(device: str, compiled: bool) -> None:
    torch._dynamo.reset()
    x = make_inputs(MLA, device)
    attend = torch.compile(flash_attn_func, backend="aot_eager") if compiled else flash_attn_func
    with pytest.raises(RuntimeError, match=NO_GRADIENT):
        attend(*leaves(x.q, x.k, x.v))
    with torch.no_grad():
        out = attend(*leaves(x.q, x.k, x.v))
    assert_nearly("out", out, flash_attn_func(x.q, x.k, x.v), MLA)


@pytest.mark.cuda
def test_backward_operators_refuse_it_on_the_gpu(device: str) -> None:
    x = make_inputs(MLA, device)
    lse = torch.zeros(MLA.batch, MLA.heads[0], MLA.seqlen_q, device=device)
    options = (0.0, MLA.scale, True, -1, -1, 0.0, None, False)
    operator = torch.ops.flash_attn._flash_attn_backward.functional
    match = "v: its head_dim must equal q's in the backward pass.* got 128 and 192"
    with pytest.raises(RuntimeError, match=match):
        operator(x.dout, x.q, x.k, x.v, x.dout, lse, *options)


UNSERVED = [(192, 136), (192, 256), (128, 64), (256, 128), (64, 128), (32, 16)]


@pytest.mark.cuda
@pytest.mark.parametrize("head_dims", UNSERVED, ids=str)
def test_pairs_without_a_kernel_are_refused_on_the_gpu(
    device: str, head_dims: tuple[int, int]
) -> None:
    """Wherever the GPU and the build are those of other calls."""
    refuse(device, MLA.but(head_dim=head_dims[0], head_dim_v=head_dims[1]), "all")


@pytest.mark.cuda
def test_shared_kernels_refuse_it(device: str, pin_isa: Callable[[str], None]) -> None:
    pin_isa("sm80")
    refuse(device, MLA, "sm80")


def refuse(device: str, case: AttnCase, isa: str) -> None:
    x = make_inputs(case, device)
    message = (
        rf"no kernel for head_dim {case.head_dim} of q and k with head_dim {case.head_dim_v} of v, "
        r"bf16, .*sm90's kernels alone, for the forward pass on GPUs of compute capability 9\.0, "
        rf"q's head_dim from 129 to 192 with v's up to 128 .*allowed by FLASH_ATTN_ISA: {isa}\)"
    )
    with pytest.raises(RuntimeError, match=message):
        flash_attn_func(x.q, x.k, x.v)


def test_caches_and_pages_of_two_head_dims_are_refused(device: str) -> None:
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    q, k = (torch.zeros(2, n, 2, 192, dtype=dtype, device=device) for n in (1, 32))
    v = torch.zeros(2, 32, 2, 128, dtype=dtype, device=device)
    match = "v_cache must have the same shape as k_cache.*" + re.escape("(2, 32, 2, 128)")
    with pytest.raises(RuntimeError, match=match):
        flash_attn_with_kvcache(q, k, v, cache_seqlens=5)
    with pytest.raises(RuntimeError, match=r"v must have the same shape as k"):
        flash_attn_with_kvcache(q, k, k, k[:, :1], v[:, :1], cache_seqlens=5)
    ends = torch.tensor([0, 1, 2], dtype=torch.int32, device=device)
    table = torch.tensor([[0], [1]], dtype=torch.int32, device=device)
    with pytest.raises(RuntimeError, match="v must have the head_dim of k with a block_table"):
        flash_attn_varlen_func(q[:, 0], k, v, ends, ends, 1, 1, block_table=table)


@pytest.mark.parametrize("shape", [(2, 7, 2, 0), (2, 7, 2, 257)], ids=str)
def test_head_dim_of_v_is_checked(device: str, shape: tuple[int, ...]) -> None:
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    q, k = (torch.zeros(2, n, 2, 64, dtype=dtype, device=device) for n in (5, 7))
    v = torch.zeros(shape, dtype=dtype, device=device)
    with pytest.raises(
        RuntimeError, match=f"v: .*at most {max(HEAD_DIMS)}.*{re.escape(str(shape))}"
    ):
        flash_attn_func(q, k, v)
