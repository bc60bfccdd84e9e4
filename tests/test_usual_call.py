"""fast_attend, fast_varlen_attend: the way from Python to C++ for the usual calls, and what they leave alone."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import pytest
import torch
from cases import AttnCase, Mask, make_inputs, on_devices
from harness import assert_bitwise, features_of, leaves
from torch import Tensor
from torch._dynamo import compiled_autograd
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils._python_dispatch import TorchDispatchMode

from flash_attn import (
    flash_attn_func,
    flash_attn_interface,
    flash_attn_varlen_func,
)

ATTEND = flash_attn_interface._fast_attend
ATTEND_VARLEN = flash_attn_interface._fast_varlen_attend
needs_extension = pytest.mark.skipif(ATTEND is None, reason="needs the compiled extension")
needs_cuda = pytest.mark.cuda
DEFAULTS = dict(
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
)


class Subclass(Tensor):
    """Behaves as a tensor; may be anything to the code that made it."""


def attend(q: object, k: object, v: object, **options: object) -> Tensor | None:
    return ATTEND(q, k, v, *(DEFAULTS | options).values())


def attend_varlen(*tensors: object, block_table: object = None, **options: object) -> Tensor | None:
    """tensors: q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k."""
    return ATTEND_VARLEN(*tensors, *(DEFAULTS | options).values(), block_table)


def make_varlen(device: str, head_dim: int = 64) -> tuple[object, ...]:
    q, k, v = (t.flatten(0, 1) for t in make_qkv(device, head_dim=head_dim))
    cu_seqlens = torch.tensor([0, 30, 30, 77], dtype=torch.int32, device=device)
    return q, k, v, cu_seqlens, cu_seqlens, 47, 47


def make_qkv(device: str, seqlen: int = 40, heads: int = 2, head_dim: int = 64) -> list[Tensor]:
    gen = torch.Generator(device).manual_seed(1)
    shape = 3, 2, seqlen, heads, head_dim
    return list(torch.randn(shape, generator=gen, device=device).to(torch.bfloat16).unbind(0))


# Without a GPU.


@needs_extension
def test_cpu_tensors_and_subclasses_are_left_to_python() -> None:
    q, k, v = make_qkv("cpu")
    assert attend(q, k, v) is None
    assert attend(*leaves(q, k, v)) is None
    assert attend(*(t.as_subclass(Subclass) for t in (q, k, v))) is None
    assert attend(*(TwoTensor(t, t) for t in (q, k, v))) is None
    assert attend(*(t.to("meta") for t in (q, k, v))) is None
    assert attend(*(torch.nn.Parameter(t) for t in (q, k, v))) is None


@needs_extension
def test_any_objects_are_left_to_python() -> None:
    q, k, v = make_qkv("cpu")
    assert attend(None, k, v) is None and attend(q, "k", v) is None and attend(q, k, 3) is None
    assert ATTEND() is None and ATTEND(q, k, v) is None
    assert ATTEND(*(None,) * 11) is None
    with pytest.raises(TypeError):
        ATTEND(q, k, v=v)


@needs_extension
def test_fake_cuda_tensors_are_left_to_python() -> None:
    with FakeTensorMode() as mode:
        q, k, v = (mode.from_tensor(t) for t in make_qkv("cpu"))
        assert attend(q, k, v) is None
    assert attend(q, k, v) is None


# On CUDA.


@needs_cuda
def test_served_calls_cuda(device: str) -> None:
    q, k, v = make_qkv(device)
    served = [
        *((q, k, v), tuple(leaves(q, k, v)), (q, k, k), (q[:, :1], k, v), (q, k[:, :0], v[:, :0])),
        (q, k[..., :1, :], v[..., :1, :]),
        tuple(torch.nn.Parameter(t) for t in (q, k, v)),
        tuple(t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v)),
    ]
    for tensors in served:
        out = attend(*tensors)
        assert isinstance(out, Tensor) and out.shape == tensors[0].shape
        assert out.requires_grad == tensors[0].requires_grad
    for options in (
        dict(softmax_scale=0.5, causal=True, deterministic=True, softcap=2.0),
        dict(window_size=(3, 4)),
        dict(window_size=[3, -1]),
        dict(dropout_p=0.1),
    ):
        assert isinstance(attend(q, k, v, **options), Tensor), options
    with torch.autocast("cuda", dtype=torch.float16):
        assert attend(q, k, v).dtype == q.dtype


@needs_cuda
def test_unusual_calls_are_left_to_python_cuda(device: str) -> None:
    q, k, v = make_qkv(device)
    odd = make_qkv(device, head_dim=33)
    wide = make_qkv(device, head_dim=264)
    columns = [t.transpose(1, 3).contiguous().transpose(1, 3) for t in (q, k, v)]
    for tensors in (
        *(odd, wide, columns, (q.float(), k.float(), v.float()), (q.half(), k, v)),
        *((q[0], k[0], v[0]), (q[:0], k[:0], v[:0]), (q[:1], k, v), (q, k, v[:, :9])),
        *((q, k[..., :32], v[..., :32]), (q[..., :1, :], k, v), (q, k, v.cpu())),
        *((q, k[..., :0, :], v[..., :0, :]), (q[..., :0], k[..., :0], v[..., :0])),
        [torch._neg_view(t) for t in (q, k, v)],
        [t.as_subclass(Subclass) for t in (q, k, v)],
        [TwoTensor(t, t) for t in (q, k, v)],
    ):
        assert attend(*tensors) is None, [t.shape for t in tensors]
    slopes, one = torch.ones(2, device=device), torch.tensor(1, device=device)
    for options in (
        *(dict(dropout_p=1.0), dict(dropout_p=0), dict(dropout_p=-0.1), dict(alibi_slopes=slopes)),
        *(dict(return_attn_probs=True), dict(softmax_scale=one), dict(softmax_scale="1")),
        *(dict(window_size=(one, 1)), dict(window_size=(1, 2, 3)), dict(window_size=(2**70, 0))),
        *(dict(window_size=3), dict(window_size=None), dict(window_size=(1.0, 2.0))),
        *(dict(softcap=-1.0), dict(softcap=torch.inf), dict(softcap=torch.nan), dict(causal=one)),
        dict(deterministic=None),
    ):
        assert attend(q, k, v, **options) is None, options


@needs_cuda
def test_served_varlen_calls_cuda(device: str) -> None:
    q, k, v, cu_q, cu_k, *longest = make_varlen(device)
    for tensors in ((q, k, v), leaves(q, k, v), (q, k[:, :1], v[:, :1]), (q, k, k)):
        out = attend_varlen(*tensors, cu_q, cu_k, *longest, causal=True)
        assert isinstance(out, Tensor) and out.shape == q.shape
        assert out.requires_grad == tensors[0].requires_grad
        want = flash_attn_varlen_func(
            *tensors, cu_q, cu_k, *longest, causal=True, return_attn_probs=True
        )[0]
        assert torch.equal(out, want)
    assert isinstance(attend_varlen(q, k, v, cu_q, cu_k, *longest, dropout_p=0.2), Tensor)


@needs_cuda
def test_unusual_varlen_calls_are_left_to_python_cuda(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    q, k, v, cu_q, cu_k, *longest = make_varlen(device)
    one = torch.tensor(47, device=device)
    for lengths in (
        *((cu_q.long(), cu_k, *longest), (cu_q.cpu(), cu_k, *longest), (cu_q[:-1], cu_k, *longest)),
        *((cu_q[::2], cu_k, *longest), (cu_q[None], cu_k[None], *longest), (cu_q, None, *longest)),
        *((cu_q, cu_k, one, 47), (cu_q, cu_k, 47.0, 47), (cu_q[:1], cu_k[:1], *longest)),
    ):
        assert attend_varlen(q, k, v, *lengths) is None, lengths
    table = torch.zeros(3, 1, dtype=torch.int32, device=device)
    assert attend_varlen(q, k, v, cu_q, cu_k, *longest, block_table=table) is None
    assert attend_varlen(*make_varlen(device, 33)) is None
    assert attend_varlen(q[None], k[None], v[None], cu_q, cu_k, *longest) is None
    assert ATTEND_VARLEN(q, k, v) is None and ATTEND_VARLEN(*(None,) * 16) is None
    for value, is_served in (("0", True), ("", True), ("1", False)):
        monkeypatch.setenv("FLASH_ATTN_CHECK_DEVICE_DATA", value)
        out = attend_varlen(q, k, v, cu_q, cu_k, *longest)
        assert isinstance(out, Tensor) == is_served, value


@needs_cuda
@pytest.mark.parametrize("varlen", [False, True], ids=["dense", "varlen"])
def test_gradients_of_a_batch_of_gradients_cuda(device: str, varlen: bool) -> None:
    """is_grads_batched: the node hands over to Python, and gives what a loop gives."""
    *tensors, cu_q, cu_k, max_q, max_k = make_varlen(device)
    if not varlen:
        tensors = make_qkv(device)
    inputs = leaves(*tensors)
    options = dict(causal=True, dropout_p=0.2, deterministic=True)
    if varlen:
        out = flash_attn_varlen_func(*inputs, cu_q, cu_k, max_q, max_k, **options)
    else:
        out = flash_attn_func(*inputs, **options)
    assert out.grad_fn.name() == "FlashAttnBackward"
    douts = torch.randn(3, *out.shape, device=device).to(out.dtype)
    batched = torch.autograd.grad(out, inputs, douts, is_grads_batched=True, retain_graph=True)
    for i, dout in enumerate(douts):
        for ours, want in zip(batched, torch.autograd.grad(out, inputs, dout, retain_graph=True)):
            assert torch.equal(ours[i], want)


@needs_cuda
def test_modes_and_transforms_are_left_to_python_cuda(device: str) -> None:
    q, k, v = make_qkv(device)
    names: list[str] = []

    class Dispatch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            names.append(str(function))
            return function(*args, **(kwargs or {}))

    class Function(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            return function(*args, **(kwargs or {}))

    with Dispatch():
        assert attend(q, k, v) is None
        inputs = leaves(q, k, v)
        torch.autograd.grad(flash_attn_func(*inputs).sum(), inputs)
    assert {
        "flash_attn._flash_attn_forward.default",
        "flash_attn._flash_attn_backward.default",
    } <= set(names)
    with Function():
        assert attend(q, k, v) is None
    with torch.autograd.forward_ad.dual_level():
        assert attend(torch.autograd.forward_ad.make_dual(q, q), k, v) is None

    results: list[Tensor | None] = []

    def probe(x: Tensor) -> Tensor:
        results.append(attend(x, k, v))
        return x.sum()

    torch.func.vmap(probe)(torch.stack([q, q]))
    torch.func.grad(probe)(q)
    torch.jit.trace(probe, (q,), check_trace=False)
    assert results == [None] * 3
    assert isinstance(attend(q, k, v), Tensor)


@needs_cuda
def test_wrong_arguments_get_pythons_messages_cuda(device: str) -> None:
    q, k, v = make_qkv(device)
    for match, tensors, options in (
        ("only support fp16 and bf16", [t.float() for t in (q, k, v)], {}),
        ("at most 256", make_qkv(device, head_dim=264), {}),
        ("must divide", (q, *(torch.cat([t] * 3, 2) for t in (k, v))), {}),
        ("same shape as k", (q, k, v[:, 1:]), {}),
        ("dropout_p must be in", (q, k, v), dict(dropout_p=1.5)),
        ("softcap must be", (q, k, v), dict(softcap=-1.0)),
        ("window_size must be", (q, k, v), dict(window_size=(1, 2, 3))),
    ):
        with pytest.raises(RuntimeError, match=match):
            flash_attn_func(*tensors, **options)


CASES = [
    AttnCase(65, 97, (4, 2), 64, Mask.causal),
    AttnCase(200, 130, (4, 1), 64, Mask.none, batch=2),
    AttnCase(130, 130, (2, 2), 64, Mask.causal, window=(40, 9)),
    AttnCase(130, 130, (2, 2), 64, Mask.none, softcap=3.0),
    AttnCase(130, 60, (2, 1), 128, Mask.causal, "fp16"),
    AttnCase(33, 40, (2, 1), 40, Mask.none, "fp16", batch=3),
]


def out_and_gradients(case: AttnCase, device: str, **options: object) -> list[Tensor]:
    x = make_inputs(case, device)
    inputs = leaves(x.q, x.k, x.v)
    options |= features_of(case, device)
    out = flash_attn_func(*inputs, causal=case.causal, deterministic=True, **options)
    with torch.no_grad():
        assert_bitwise(
            "out without gradients",
            flash_attn_func(*inputs, causal=case.causal, **options),
            out,
            case,
        )
    return [out.detach(), *torch.autograd.grad(out, inputs, x.dout)]


@on_devices(cuda=CASES)
@pytest.mark.parametrize("scale", [None, 0.3, -0.2])
def test_both_ways_give_the_same_bits(
    device: str, case: AttnCase, scale: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From C++ at once; through Python's checks and autograd.Function."""
    served: list[bool] = []

    def observed(*arguments: object) -> Tensor | None:
        out = ATTEND(*arguments)
        served.append(out is not None)
        return out

    monkeypatch.setattr(flash_attn_interface, "_fast_attend", observed)
    ours = out_and_gradients(case, device, softmax_scale=scale)
    assert served == [True, True]
    monkeypatch.setattr(flash_attn_interface, "_fast_attend", None)
    want = out_and_gradients(case, device, softmax_scale=scale)
    for name, a, b in zip(("out", "dq", "dk", "dv"), ours, want, strict=True):
        assert_bitwise(name, a, b, case)


@on_devices(cuda=CASES[:1])
def test_node_in_the_graph(device: str, case: AttnCase) -> None:
    x = make_inputs(case, device)
    q, k, v = leaves(x.q, x.k, x.v)
    out = flash_attn_func(q, k.detach(), v * 1, causal=True)
    node = out.grad_fn
    assert node.name() == "FlashAttnBackward"
    edges = [edge and edge.name() for edge, _ in node.next_functions]
    assert edges == ["torch::autograd::AccumulateGrad", None, "MulBackward0"]
    seen: list[tuple[int, int]] = []
    node.register_hook(lambda grads, gradients: seen.append((len(grads), len(gradients))))
    node.register_prehook(lambda gradients: seen.append((0, len(gradients))))
    out.retain_grad()
    out.backward(x.dout)
    assert seen == [(0, 1), (3, 1)] and out.grad is not None


@on_devices(cuda=CASES[:1])
@pytest.mark.parametrize("varlen", [False, True], ids=["dense", "varlen"])
def test_compiled_autograd_records_the_node(device: str, case: AttnCase, varlen: bool) -> None:
    x = make_inputs(case, device)
    options = dict(causal=True, window_size=(30, 0), softcap=9.0, dropout_p=0.2, deterministic=True)
    slopes = torch.linspace(0.1, 0.9, case.heads[0], device=device)
    graphs: list[torch.fx.GraphModule] = []

    def compiler(graph: torch.fx.GraphModule) -> Callable:
        graphs.append(graph)
        return torch.compile(graph, backend="eager")

    def gradients(compiled: bool) -> list[Tensor]:
        torch.manual_seed(1)
        inputs = leaves(*((t[0] if varlen else t) for t in (x.q, x.k, x.v)))
        if varlen:
            cu_q, cu_k = (
                torch.tensor([0, 9, n], dtype=torch.int32, device=device)
                for n in (case.seqlen_q, case.seqlen_k)
            )
            lengths = (cu_q, cu_k, case.seqlen_q, case.seqlen_k)
            out = flash_attn_varlen_func(*inputs, *lengths, alibi_slopes=slopes, **options)
        else:
            out = flash_attn_func(*inputs, causal=True, deterministic=True)
            out = out + flash_attn_func(*inputs, alibi_slopes=slopes, **options)
        with compiled_autograd._enable(compiler) if compiled else nullcontext():
            out.backward(x.dout[0] if varlen else x.dout)
        return [t.grad for t in inputs]

    for name, a, b in zip(("dq", "dk", "dv"), gradients(True), gradients(False), strict=True):
        assert_bitwise(name, a, b, case)
    assert len(graphs) == 1


@needs_cuda
def test_profiler_sees_the_operators_cuda(device: str) -> None:
    inputs = leaves(*make_qkv(device))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        flash_attn_func(*inputs).sum().backward()
    names = {event.key for event in profile.key_averages()}
    assert {
        "flash_attn::_flash_attn_forward",
        "flash_attn::_flash_attn_backward",
        "FlashAttnBackward",
    } <= names


@needs_cuda
def test_backward_from_several_threads_cuda(device: str) -> None:
    inputs = leaves(*make_qkv(device))
    out = flash_attn_func(*inputs, causal=True, deterministic=True)
    dout = torch.ones_like(out)

    def gradients(_: int) -> tuple[Tensor, ...]:
        return torch.autograd.grad(out, inputs, dout, retain_graph=True)

    with ThreadPoolExecutor(4) as pool:
        first, *others = pool.map(gradients, range(16))
    for other in others:
        for a, b in zip(first, other, strict=True):
            assert torch.equal(a, b)


@needs_cuda
def test_compile_and_export_trace_pythons_way_cuda(device: str) -> None:
    q, k, v = make_qkv(device)

    def block(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return flash_attn_func(q, k, v, causal=True)

    class Module(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return block(q, k, v)

    want = block(q, k, v)
    torch._dynamo.reset()
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(q, k, v), want)
    assert torch.equal(compiled(*leaves(q, k, v)), want)
    for strict in (False, True):
        program = torch.export.export(Module(), (q, k, v), strict=strict)
        assert "flash_attn._flash_attn_forward" in str(program.graph)
        assert torch.equal(program.module()(q, k, v), want)
