"""What only a GPU has: grids, offsets beyond 2^31, streams, graphs, several devices, memory."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from cases import AttnCase, Inputs, Mask, cuda_build, is_built, make_inputs, on_devices
from harness import assert_bitwise, assert_nearly, assert_same_result, check_case, leaves, run_flash
from oracle import Result
from torch import Tensor

from flash_attn import flash_attn_func

DIMS = (32, 64, 96, 128, 192, 256)
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
    assert_nearly("lse", ours.lse[..., -rows:], want.lse, case)


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

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        recorded = step()
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
        *("archs", "head_dims", "dtypes", "families", "cuda_version", "cutlass_version"),
    }
    assert all(isinstance(a, int) for a in info["archs"] + info["head_dims"])
    assert set(info["dtypes"]) <= {"fp16", "bf16"} and {"fwd", "bwd"} <= set(info["families"])
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
