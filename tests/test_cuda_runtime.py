"""What only a GPU has: grids, offsets beyond 2^31, streams, graphs, several devices, memory."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import product

import pytest
import torch
from cases import (
    FEATURE_SETS,
    AttnCase,
    Case,
    Inputs,
    Mask,
    VarlenCase,
    VarlenInputs,
    cuda_build,
    cumulative,
    is_built,
    make_inputs,
    make_varlen_inputs,
    on_devices,
)
from decoding import DecodeCase, check_decode, make_decode_inputs, run_decode
from harness import (
    assert_bitwise,
    assert_nearly,
    assert_same_result,
    capture,
    check_case,
    features_of,
    leaves,
    peek_rng_state,
    run_flash,
    run_varlen,
)
from oracle import Result, attention_oracle, attention_peer, check_result
from philox import keeps
from torch import Tensor

from flash_attn import flash_attn_func, flash_attn_varlen_func
from flash_attn._head_dims import HEAD_DIMS as DIMS

pytestmark = pytest.mark.cuda


def needs_memory(gib: float) -> None:
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info()[0] / 2**30
    if free < gib:
        pytest.skip(f"needs {gib} GiB of GPU memory, {free:.1f} are free")


@on_devices(
    cuda=[
        AttnCase(8, 8, (1, 1), 64, Mask.causal, "bf16", 70000),
        AttnCase(8, 8, (1, 1), 64, Mask.none, "fp16", 70000),
        AttnCase(16, 16, (70000, 70000), 32, Mask.causal, "bf16"),
        AttnCase(16, 16, (70000, 35000), 32, Mask.none, "fp16"),
        AttnCase(3, 5, (70000, 1), 32, Mask.causal, "bf16"),
        AttnCase(1, 1, (300, 300), 64, Mask.causal, "bf16", 300),
    ]
)
@pytest.mark.parametrize("deterministic", [False, True], ids=["default", "deterministic"])
def test_more_than_65535_batches_or_heads(device: str, case: AttnCase, deterministic: bool) -> None:
    check_case(case, make_inputs(case, device), deterministic=deterministic)
    torch.cuda.empty_cache()


FAR = [AttnCase(130, 130, (2, 1), d, Mask.causal, batch=2) for d in (40, 64, 96, 128, 192, 256)]


@pytest.mark.slow
@on_devices(cuda=FAR)
@pytest.mark.parametrize("which", ["row", "batch", "head"])
def test_input_offsets_beyond_32_bits(device: str, case: AttnCase, which: str) -> None:
    """One stride is so large that the last element lies more than 2^32 elements from the first."""
    needs_memory(24)
    dense = make_inputs(case, device)
    steps = {"row": case.seqlen_q - 1, "batch": case.batch - 1, "head": 1}[which]
    stride = (2**32 // steps // 64 + 1) * 64
    small = [case.seqlen_q * 2 * 256, 2 * 256, 256]  # batch, row, head
    small[{"batch": 0, "row": 1, "head": 2}[which]] = stride
    if which == "row":
        small[0] = 4 * 256
    storage = torch.empty(stride * steps + 2**22, dtype=case.torch_dtype, device=device)

    def spread(x: Tensor, offset: int) -> Tensor:
        view = storage.as_strided(x.shape, (*small, 1), storage_offset=offset)
        return view.copy_(x)

    region = 2**19  # small strides stay inside
    far = Inputs(
        *(spread(t, i * region) for i, t in enumerate((dense.q, dense.k, dense.v, dense.dout)))
    )
    options = dict(causal=True, deterministic=True)
    want = run_flash(dense.q, dense.k, dense.v, dense.dout, **options)
    assert_same_result(
        run_flash(far.q, far.k, far.v, far.dout, **options), want, case, dq_bitwise=True
    )


@pytest.mark.slow
@on_devices(
    cuda=[
        AttnCase(128, 128, (32, 32), 128, Mask.causal, "bf16", 4104),
        AttnCase(15, 15, (16, 16), 72, Mask.none, "fp16", 28800),  # the backward's workspace
        AttnCase(729, 729, (16, 16), 72, Mask.none, "bf16", 2600),
    ]
)
def test_tensors_of_more_than_2_to_the_31_elements(device: str, case: AttnCase) -> None:
    """The last batches equal a run of their own."""
    needs_memory(80)
    gen = torch.Generator(device).manual_seed(0)
    q, k, v, dout = (
        torch.randn(case.q_shape, generator=gen, device=device, dtype=case.torch_dtype)
        for _ in range(4)
    )
    options = dict(causal=case.causal, deterministic=True)
    q, k, v = leaves(q, k, v)
    out, lse, _ = flash_attn_func(q, k, v, return_attn_probs=True, **options)
    grads = torch.autograd.grad(out, (q, k, v), dout)
    for part in (slice(0, 2), slice(case.batch // 2, case.batch // 2 + 2), slice(-3, None)):
        want = run_flash(q[part], k[part], v[part], dout[part], **options)
        ours = Result(out[part].detach(), lse[part].detach(), *(g[part] for g in grads))
        assert_same_result(ours, want, f"{case}, batches {part}", dq_bitwise=True)


@pytest.mark.slow
@on_devices(
    cuda=[AttnCase(2**18, 2**18, (2, 1), 64, Mask.causal), AttnCase(300, 2**20, (4, 1), 128)]
)
def test_very_long_sequences(device: str, case: AttnCase) -> None:
    """The last rows equal a run of their own, and the oracle."""
    needs_memory(48)  # the oracle's, in fp64
    x = make_inputs(case, device)
    rows = 64
    ours = run_flash(x.q, x.k, x.v, causal=case.causal)
    tail = Inputs(x.q[:, -rows:], x.k, x.v, x.dout[:, -rows:])
    want = check_case(case.but(seqlen_q=rows), tail)
    assert_nearly("out", ours.out[:, -rows:], want.out, case)
    # When a row's reference moves depends on the other rows of its warp, and with it how sums are rounded: each
    # of four threads adds a quarter of the weights in fp32, off by up to half an eps each time, at random.  A
    # missing block of 64 keys would be at least twice that.
    slack = math.sqrt(case.seqlen_k / 4) * torch.finfo(torch.float32).eps / 2
    assert_nearly("lse", ours.lse[..., -rows:], want.lse, case, slack=slack)


ONE_EACH = [
    AttnCase(130, 193, (4, 2), d, mask, dtype, 2)
    for (d, dtype), mask in product(zip(DIMS, ("bf16", "fp16") * 3), Mask)
]
ONE_EACH.append(AttnCase(130, 193, (4, 2), 33, Mask.causal))


@on_devices(cuda=ONE_EACH)
def test_side_stream(device: str, case: AttnCase) -> None:
    """Inputs written on a stream are read on that stream: no work slips onto the default one."""
    x = make_inputs(case, device)
    options = dict(causal=case.causal, deterministic=True)
    want = run_flash(x.q, x.k, x.v, x.dout, **options)
    busy = torch.randn(2048, 2048, device=device)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        late = x.map(lambda t: torch.full_like(t, torch.nan))
        for _ in range(20):
            busy = busy @ busy * 1e-3
        for name in ("q", "k", "v", "dout"):
            getattr(late, name).copy_(getattr(x, name))
        ours = run_flash(late.q, late.k, late.v, late.dout, **options)
    torch.cuda.current_stream().wait_stream(stream)
    assert_same_result(ours, want, case, dq_bitwise=True)


@on_devices(cuda=ONE_EACH)
@pytest.mark.parametrize("deterministic", [False, True], ids=["default", "deterministic"])
def test_cuda_graph_of_forward_and_backward(
    device: str, case: AttnCase, deterministic: bool
) -> None:
    options = dict(causal=case.causal, deterministic=deterministic)
    fixed = make_inputs(case, device)

    def step() -> Result:
        q, k, v = leaves(fixed.q, fixed.k, fixed.v)
        out, lse, _ = flash_attn_func(q, k, v, return_attn_probs=True, **options)
        return Result(out.detach(), lse.detach(), *torch.autograd.grad(out, (q, k, v), fixed.dout))

    graph, recorded = capture(step)
    for salt in (1, 2, 3):
        x = make_inputs(case, device, salt)
        for name in ("q", "k", "v", "dout"):
            getattr(fixed, name).copy_(getattr(x, name))
        graph.replay()
        want = run_flash(x.q, x.k, x.v, x.dout, **options)
        assert_same_result(recorded, want, f"{case}, replay {salt}", dq_bitwise=deterministic)


@on_devices(cuda=ONE_EACH[::3])
def test_cuda_graph_of_forward(device: str, case: AttnCase) -> None:
    fixed = make_inputs(case, device)
    run_flash(fixed.q, fixed.k, fixed.v, causal=case.causal)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        out = flash_attn_func(fixed.q, fixed.k, fixed.v, causal=case.causal)
    for salt in (1, 2):
        x = make_inputs(case, device, salt)
        for name in ("q", "k", "v"):
            getattr(fixed, name).copy_(getattr(x, name))
        graph.replay()
        want = run_flash(x.q, x.k, x.v, causal=case.causal)
        assert_bitwise("out", out, want.out, f"{case}, replay {salt}")


@on_devices(cuda=ONE_EACH)
def test_calls_do_not_synchronise(device: str, case: AttnCase) -> None:
    x = make_inputs(case, device)
    q, k, v = leaves(x.q, x.k, x.v)
    flash_attn_func(q, k, v, causal=case.causal).backward(x.dout)
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for deterministic in (False, True):
            out = flash_attn_func(q, k, v, causal=case.causal, deterministic=deterministic)
            out.backward(x.dout)
    finally:
        torch.cuda.set_sync_debug_mode(before)


@on_devices(cuda=[AttnCase(8192, 8192, (8, 1), d, Mask.causal) for d in (64, 128, 256)])
@pytest.mark.parametrize("deterministic", [False, True], ids=["default", "deterministic"])
def test_memory_is_linear_and_has_no_copy_per_query_head(
    device: str, case: AttnCase, deterministic: bool
) -> None:
    """Forward: out and lse. Backward: the gradients, an fp32 dQ and a few values per row."""
    x = make_inputs(case, device)
    q, k, v = leaves(x.q, x.k, x.v)
    q_bytes, kv_bytes = (t.numel() * t.element_size() for t in (x.q, x.k))
    rows = case.seqlen_q * case.heads[0]
    torch.cuda.reset_peak_memory_stats()
    base = torch.cuda.memory_allocated()
    out = flash_attn_func(q, k, v, causal=True, deterministic=deterministic)
    used = torch.cuda.max_memory_allocated() - base
    slack = 4 << 20
    assert used <= q_bytes + 4 * rows + slack, f"forward uses {used >> 20} MiB"
    torch.cuda.reset_peak_memory_stats()
    base = torch.cuda.memory_allocated()
    torch.autograd.grad(out, (q, k, v), x.dout)
    used = torch.cuda.max_memory_allocated() - base
    limit = q_bytes + 2 * kv_bytes + 2 * q_bytes + 32 * rows + slack
    assert used <= limit, f"backward uses {used >> 20} MiB, limit {limit >> 20}"


@on_devices(cuda=[AttnCase(1000, 1000, (4, 2), 128, Mask.causal)])
def test_repeated_calls_leak_nothing(device: str, case: AttnCase) -> None:
    x = make_inputs(case, device)
    sizes = []
    for _ in range(6):
        run_flash(x.q, x.k, x.v, x.dout, causal=True)
        torch.cuda.synchronize()
        sizes.append(torch.cuda.memory_allocated())
    assert sizes[2] == sizes[-1], sizes


def test_head_dimension_that_is_not_built_names_the_variable(device: str) -> None:
    missing = [d for d in DIMS if d not in cuda_build()["head_dims"]]
    if not missing:
        pytest.skip("this build has every head dimension")
    for head_dim in missing:
        q = torch.zeros(1, 8, 1, head_dim, dtype=torch.bfloat16, device=device)
        with pytest.raises(RuntimeError, match="FLASH_ATTN_HEAD_DIMS") as caught:
            flash_attn_func(q, q, q)
        assert str(head_dim) in str(caught.value)


def test_build_info(device: str) -> None:
    info = cuda_build()
    assert set(info) >= {
        *("archs", "head_dims", "dtypes", "kernels", "isa", "cuda_version", "cutlass_version"),
    }
    assert all(isinstance(a, int) for a in info["archs"] + info["head_dims"])
    assert set(info["dtypes"]) <= {"fp16", "bf16"}
    assert {name for _, name, _, _ in info["kernels"]} == {"fwd", "bwd", "decode"}
    assert {d for _, _, d, _ in info["kernels"]} == set(info["head_dims"])
    assert info["cuda_version"].split(".")[0] == torch.version.cuda.split(".")[0]


TWO_GPUS = AttnCase(130, 193, (4, 2), 64, Mask.causal)


@pytest.mark.gpus(2)
@on_devices(cuda=[TWO_GPUS, TWO_GPUS.but(head_dim=33), TWO_GPUS.but(head_dim=256)])
def test_tensors_on_the_second_gpu_while_the_first_is_current(device: str, case: AttnCase) -> None:
    x = make_inputs(case, "cuda:0")
    options = dict(causal=True, deterministic=True)
    want = run_flash(x.q, x.k, x.v, x.dout, **options)
    far = x.map(lambda t: t.to("cuda:1"))
    assert torch.cuda.current_device() == 0
    ours = run_flash(far.q, far.k, far.v, far.dout, **options)
    assert torch.cuda.current_device() == 0
    for name in ("out", "lse", "dq", "dk", "dv"):
        t = getattr(ours, name)
        assert t.device == torch.device("cuda:1"), name
        assert_bitwise(name, t.cpu(), getattr(want, name).cpu(), case)


@pytest.mark.gpus(2)
@pytest.mark.parametrize("argument", ["q", "k", "v"])
def test_tensors_on_two_gpus_are_refused(device: str, argument: str) -> None:
    x = {name: torch.zeros(1, 8, 2, 64, dtype=torch.bfloat16, device="cuda:0") for name in "qkv"}
    x[argument] = x[argument].to("cuda:1")
    with pytest.raises(RuntimeError, match="device"):
        flash_attn_func(**x)


@pytest.mark.gpus(2)
def test_two_gpus_at_once(device: str) -> None:
    """Interleaved calls on both devices, each on its own stream."""
    assert is_built(TWO_GPUS)
    x = make_inputs(TWO_GPUS, "cuda:0")
    both = {name: x.map(lambda t, d=name: t.to(d)) for name in ("cuda:0", "cuda:1")}
    results: dict[str, list[Result]] = {name: [] for name in both}
    for _ in range(20):
        for name, y in both.items():
            results[name].append(run_flash(y.q, y.k, y.v, y.dout, causal=True, deterministic=True))
    first = results["cuda:0"][0]
    for name, runs in results.items():
        for run in runs:
            for field in ("out", "lse", "dq", "dk", "dv"):
                want = getattr(first, field).cpu()
                assert_bitwise(field, getattr(run, field).cpu(), want, name)


# Features and sequences of different lengths.

LENGTHS = (130, 0, 257, 33, 1)
VARLEN = [
    VarlenCase(LENGTHS, LENGTHS[::-1], (4, 2), d, mask, dtype, (20, 30), **features)
    for d, mask, dtype, features in zip(
        (*DIMS, 33, 72, 64),
        (Mask.causal, Mask.none) * 5,
        ("bf16", "fp16") * 5,
        ({}, *FEATURE_SETS[::-1]),
    )
]
FEATURED = [
    AttnCase(130, 193, (4, 2), d, mask, dtype, 2, **features)
    for d, mask, dtype, features in zip(
        (*DIMS, 33, 72), (Mask.causal, Mask.none) * 4, ("bf16", "fp16") * 4, FEATURE_SETS
    )
]


@on_devices(cuda=[*FEATURED, *VARLEN])
def test_side_stream_with_features(device: str, case: Case) -> None:
    """Also what the host writes for a call: lengths, tile lists, seeds."""
    dense = isinstance(case, AttnCase)
    x = make_inputs(case, device) if dense else make_varlen_inputs(case, device)
    options = features_of(case, device) | dict(causal=case.causal, deterministic=True)

    def run(y: Inputs) -> Result:
        return run_flash(y.q, y.k, y.v, y.dout, **options) if dense else run_varlen(y, **options)

    want = run(x)
    busy = torch.randn(2048, 2048, device=device)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        late = x.map(lambda t: torch.full_like(t, torch.nan))
        if not dense:
            late = replace(late, cu_seqlens_q=torch.zeros_like(x.cu_seqlens_q))
        for _ in range(20):
            busy = busy @ busy * 1e-3
        for name in ("q", "k", "v", "dout"):
            getattr(late, name).copy_(getattr(x, name))
        if not dense:
            late.cu_seqlens_q.copy_(x.cu_seqlens_q)
        ours = run(late)
    torch.cuda.current_stream().wait_stream(stream)
    assert_same_result(ours, want, case, dq_bitwise=True)


@on_devices(cuda=FEATURED)
def test_features_do_not_synchronise(device: str, case: AttnCase) -> None:
    x = make_inputs(case, device)
    q, k, v = leaves(x.q, x.k, x.v)
    options = features_of(case, device) | dict(causal=case.causal)
    flash_attn_func(q, k, v, **options).backward(x.dout)
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for deterministic in (False, True):
            out = flash_attn_func(q, k, v, deterministic=deterministic, **options)
            out.backward(x.dout)
    finally:
        torch.cuda.set_sync_debug_mode(before)


def peak_of(function: Callable[[], object]) -> int:
    """Bytes that a call has in use at most, beside what was in use before."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    base = torch.cuda.memory_allocated()
    function()
    return torch.cuda.max_memory_allocated() - base


LONG_FEATURED = [
    AttnCase(8192, 8192, (8, 1), d, Mask.causal, **features)
    for d, features in product((64, 128), FEATURE_SETS)
]
LONG_VARLEN = [
    VarlenCase(lengths, lengths, (8, 1), d, Mask.causal, **features)
    for lengths, d, features in (
        ((8192,), 64, {}),
        ((2048, 100, 0, 6000), 128, FEATURE_SETS[-1]),
        ((4,) * 2048, 64, {}),
    )
]


@on_devices(cuda=[*LONG_FEATURED, *LONG_VARLEN])
def test_memory_with_features_is_linear_and_bounded_in_deterministic_mode(
    device: str, case: Case
) -> None:
    """Forward: out and lse. Backward: as without features, alike in both modes."""
    dense = isinstance(case, AttnCase)
    x = make_inputs(case, device) if dense else make_varlen_inputs(case, device)
    options = features_of(case, device) | dict(causal=True)
    lengths = () if dense else (x.cu_seqlens_q, x.cu_seqlens_k, x.max_seqlen_q, x.max_seqlen_k)
    function = flash_attn_func if dense else flash_attn_varlen_func
    q, k, v = leaves(x.q, x.k, x.v)
    q_bytes, kv_bytes = (t.numel() * t.element_size() for t in (x.q, x.k))
    rows = x.q.numel() // case.head_dim
    slack = 4 << 20
    used = []
    for deterministic in (False, True):
        results: list[Tensor] = []

        def forward(deterministic: bool = deterministic, results: list = results) -> None:
            results.append(function(q, k, v, *lengths, deterministic=deterministic, **options))

        forward_bytes = peak_of(forward)
        assert forward_bytes <= q_bytes + 4 * rows + slack, (
            f"forward uses {forward_bytes >> 20} MiB"
        )
        out = results[0]
        used.append(peak_of(lambda out=out: torch.autograd.grad(out, (q, k, v), x.dout)))
    limit = q_bytes + 2 * kv_bytes + 2 * q_bytes + 32 * rows + slack
    if not dense:
        limit += 128 * case.batch * case.heads[0] * (4 * case.head_dim + 32)  # rounded-up sequences
    assert used[0] <= limit, f"backward uses {used[0] >> 20} MiB, limit {limit >> 20}"
    assert used[1] - used[0] <= 2 << 20, f"deterministic mode uses {used}"


@on_devices(
    cuda=[
        AttnCase(2**20, 2**20, (1, 1), 64, Mask.causal, window=(1024, 0)),
        AttnCase(2**20, 2**20, (2, 1), 128, Mask.none, "fp16", window=(200, 300)),
    ]
)
def test_window_of_a_very_long_sequence(device: str, case: AttnCase) -> None:
    """A million tokens take as long as their windows; first, middle and last rows by the oracle."""
    x = make_inputs(case, device)
    ours = run_flash(
        *(x.q, x.k, x.v, x.dout),
        causal=case.causal,
        window_size=case.window,
    )
    left, right = case.window[0], 0 if case.causal else case.window[1]
    n = case.seqlen_q
    for first in (0, n // 2 + 37, n - 64):
        rows = slice(first, first + 64)
        keys = slice(max(first - left, 0), min(first + 64 + right, n))
        # The rows as a problem of their own, whose last query stands `shift` before the last key.
        shift = keys.stop - (first + 64)
        exact = dict(scale=case.scale, causal=False, window_size=(left + shift, right - shift))
        part = (x.q[:, rows], x.k[:, keys], x.v[:, keys])
        want, peer = attention_oracle(*part, **exact), attention_peer(*part, **exact)
        message = f"{case}, rows {first}"
        check_result(Result(ours.out[:, rows], ours.lse[..., rows]), peer, want, case=message)
    # Every key's gradient of V: columns of P sum to about 1, so none is left out.
    ones = run_flash(
        x.q, x.k, x.v, torch.ones_like(x.q), causal=case.causal, window_size=case.window
    )
    total = ones.dv.double().sum((1, 2))
    expected = torch.full_like(total, n * case.heads[0])
    torch.testing.assert_close(total, expected, rtol=1e-3, atol=0)


@pytest.mark.slow
@on_devices(
    cuda=[
        AttnCase(50_000, 50_000, (2, 1), 64, Mask.none, dropout=0.3),
        AttnCase(50_000, 50_000, (2, 2), 128, Mask.causal, "fp16", dropout=0.3),
    ]
)
def test_s_dmask_of_more_than_2_to_the_31_elements(device: str, case: AttnCase) -> None:
    needs_memory(40)
    x = make_inputs(case, device)
    torch.manual_seed(3)
    state = peek_rng_state(x.q, case.batch, case.heads[0]).tolist()
    _, _, probs = flash_attn_func(
        x.q, x.k, x.v, dropout_p=case.dropout, causal=case.causal, return_attn_probs=True
    )
    n = case.seqlen_q
    assert probs.shape == (1, 2, 50_048, 50_048)
    gen = torch.Generator().manual_seed(1)
    for head, row in product((0, 1), (0, 25_000, n - 1)):
        key = x.k[0, :, head // (case.heads[0] // case.heads[1])].double()
        scores = key @ x.q[0, row, head].double() * case.scale
        if case.causal:
            scores[row + 1 :] = -torch.inf
        want = (scores - scores.max()).exp()
        got = probs[0, head, row, :n]
        torch.testing.assert_close(got.abs().double(), want, rtol=8e-3, atol=1e-6)
        for col in torch.randint(row + 1 if case.causal else n, (60,), generator=gen).tolist():
            kept = keeps(*state, head, row, col, case.dropout)
            assert got[col] == 0 or got[col].signbit().item() != kept, (head, row, col)
    assert not probs[:, :, n:].any() and not probs[..., n:].any()


@pytest.mark.slow
@on_devices(cuda=[VarlenCase((4096,) * 2**14, (64,) * 2**14, (33, 1), 8, Mask.causal)])
def test_lse_of_more_than_2_to_the_31_elements(device: str, case: VarlenCase) -> None:
    """Forward alone; its last sequences equal a run of their own."""
    needs_memory(100)
    gen = torch.Generator(device).manual_seed(0)
    q = torch.empty(case.q_shape, dtype=case.torch_dtype, device=device).normal_(generator=gen)
    k, v = (
        torch.empty(case.kv_shape, dtype=case.torch_dtype, device=device).normal_(generator=gen)
        for _ in range(2)
    )
    cu_q, cu_k = cumulative(case.lengths_q, device), cumulative(case.lengths_k, device)
    with torch.no_grad():
        out, lse, _ = flash_attn_varlen_func(
            *(q, k, v, cu_q, cu_k, 4096, 64), causal=True, return_attn_probs=True
        )
    assert lse.numel() > 2**31
    for first in (0, case.batch // 2, case.batch - 3):
        rows, cols = (slice(int(c[first]), int(c[first + 3])) for c in (cu_q, cu_k))
        part = VarlenInputs(
            *(q[rows], k[cols], v[cols], q[rows]),
            *(cumulative((4096,) * 3, device), cumulative((64,) * 3, device), 4096, 64),
        )
        want = run_varlen(part, causal=True, backward=False)
        assert_bitwise("out", out[rows], want.out, f"{case}, sequences from {first}")
        assert_bitwise("lse", lse[:, rows], want.lse, f"{case}, sequences from {first}")


@pytest.mark.slow
@on_devices(cuda=[case for case in VARLEN if case.head_dim % 8 == 0])
def test_varlen_offsets_beyond_32_bits(device: str, case: VarlenCase) -> None:
    """The rows' stride puts the last of them more than 2^32 elements from the first."""
    needs_memory(24)
    dense = make_varlen_inputs(case, device)
    rows = max(case.q_shape[0], case.kv_shape[0]) - 1
    stride = (2**32 // rows // 64 + 1) * 64
    storage = torch.empty(stride * rows + 2**22, dtype=case.torch_dtype, device=device)
    numbers = iter(range(4))

    def spread(x: Tensor) -> Tensor:
        offset = next(numbers) * 2**19
        view = storage.as_strided(x.shape, (stride, case.head_dim, 1), storage_offset=offset)
        return view.copy_(x)

    options = features_of(case, device) | dict(causal=case.causal, deterministic=True)
    want = run_varlen(dense, **options)
    assert_same_result(run_varlen(dense.map(spread), **options), want, case, dq_bitwise=True)


DECODING = [
    DecodeCase((300, 5, 513), 1, (8, 2), 128, Mask.causal, append=1, rotary="halves"),
    DecodeCase((300, 5, 513), 1, (8, 2), 128, Mask.causal, append=1, page_size=16),
    DecodeCase((300, 5, 513), 70, (4, 2), 64, Mask.causal, append=70, page_size=64),
    DecodeCase((300, 5, 513), 5, (4, 2), 256, page_size=256),
    DecodeCase((300, 5, 513), 5, (4, 2), 96, entries="permuted"),
]


@pytest.mark.slow
@on_devices(cuda=DECODING)
@pytest.mark.parametrize("which", ["block", "row", "head"])
def test_caches_beyond_32_bits(device: str, case: DecodeCase, which: str) -> None:
    """Views of huge buffers: the last page, row or head lies more than 2^32 elements from the first."""
    needs_memory(24)
    x = make_decode_inputs(case, device)
    blocks, rows, heads, dim = x.k_cache.shape
    steps = {"block": blocks, "row": rows, "head": heads}[which] - 1
    stride = (2**32 // steps // 64 + 1) * 64
    strides = {
        "block": (stride, heads * dim, dim, 1),
        "row": (heads * dim, stride, dim, 1),
        "head": (rows * dim, dim, stride, 1),
    }[which]
    storage = torch.empty(stride * steps + 2**23, dtype=case.torch_dtype, device=device)

    def spread(t: Tensor, offset: int) -> Tensor:
        return storage.as_strided(t.shape, strides, storage_offset=offset).copy_(t)

    # A row's blocks, a head's rows and blocks are between two steps of the large stride.
    assert stride >= 2 * 2**21 and x.k_cache.numel() // (steps + 1) <= 2**21
    far = replace(x, k_cache=spread(x.k_cache, 0), v_cache=spread(x.v_cache, 2**21))
    want, ours = run_decode(x), run_decode(far)
    for name in ("out", "lse"):
        assert_bitwise(name, getattr(ours, name), getattr(want, name), case)
    assert_bitwise("k_cache", far.k_cache, x.k_cache, case)
    assert_bitwise("v_cache", far.v_cache, x.v_cache, case)


@pytest.mark.slow
@on_devices(cuda=[DecodeCase((2**20 + 5, 2**20 - 60), 1, (4, 1), 128, Mask.causal, append=1)])
@pytest.mark.parametrize("page_size", [0, 64])
def test_very_long_cache(device: str, case: DecodeCase, page_size: int) -> None:
    needs_memory(24)
    case = case.but(page_size=page_size)
    check_decode(case, make_decode_inputs(case, device))


@pytest.mark.slow
@on_devices(cuda=[DecodeCase((200,) * 4, 70_000, (2, 1), 64), DecodeCase((40,) * 70_000, 1)])
def test_partial_results_of_many_rows(device: str, case: DecodeCase) -> None:
    """More sequences than a grid's second axis holds; splits * batch * heads * rows beyond 2^31."""
    needs_memory(60)
    x = make_decode_inputs(case, device)
    want = run_decode(x, num_splits=1)
    for num_splits in (0, 3) if case.batch > 4 else (0, 64):
        ours = run_decode(x, num_splits=num_splits)
        assert_nearly("out", ours.out, want.out, case, eps=2 * torch.finfo(want.out.dtype).eps)
        assert_nearly("lse", ours.lse, want.lse, case, eps=1e-6)


@pytest.mark.gpus(2)
@on_devices(cuda=[*FEATURED, *VARLEN])
def test_features_on_the_second_gpu_while_the_first_is_current(device: str, case: Case) -> None:
    """Slopes, lengths, seeds and workspaces are on the tensors' device."""
    dense = isinstance(case, AttnCase)
    x = make_inputs(case, device) if dense else make_varlen_inputs(case, device)
    options = features_of(case, device) | dict(causal=case.causal, deterministic=True)
    y = x.map(lambda t: t.to("cuda:1"))
    if not dense:
        lengths = (x.cu_seqlens_q.to("cuda:1"), x.cu_seqlens_k.to("cuda:1"))
        y = replace(y, cu_seqlens_q=lengths[0], cu_seqlens_k=lengths[1])
    there = {n: o.to("cuda:1") if isinstance(o, Tensor) else o for n, o in options.items()}
    assert torch.cuda.current_device() == 0
    if dense:
        want = run_flash(x.q, x.k, x.v, x.dout, **options)
        ours = run_flash(y.q, y.k, y.v, y.dout, **there)
    else:
        want, ours = run_varlen(x, **options), run_varlen(y, **there)
    for name in ("out", "lse", "dq", "dk", "dv"):
        t = getattr(ours, name)
        assert t.device == torch.device("cuda:1"), name
        assert_bitwise(name, t.cpu(), getattr(want, name).cpu(), case)
