"""Operators under torch.library, torch.compile, FakeTensor and torch.export."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import pytest
import torch
from cases import Alibi, AttnCase, Mask, everywhere, make_inputs
from decoding import DecodeCase, make_decode_inputs
from harness import assert_bitwise, assert_nearly, leaves, run_flash
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from flash_attn import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
    flash_attn_with_kvcache,
)

CASES = [
    AttnCase(33, 47, (4, 2), 64, Mask.causal, batch=2),
    AttnCase(40, 40, (2, 2), 40, Mask.none, "fp16"),
    AttnCase(33, 47, (2, 1), 33, Mask.causal),
]
NATIVE = [case for case in CASES if case.head_dim % 8 == 0]

QKV = "Tensor q, Tensor k, Tensor v"
LENGTHS = "Tensor cu_seqlens_q, Tensor cu_seqlens_k, SymInt max_seqlen_q, SymInt max_seqlen_k"
SCORE = (
    "float dropout_p, float softmax_scale, bool causal, SymInt window_size_left, "
    "SymInt window_size_right, float softcap, Tensor? alibi_slopes"
)
NUMBERS = "Tensor? softmax_scale_tensor=None, Tensor? softcap_tensor=None"
RESULTS = "(Tensor out, Tensor softmax_lse, Tensor S_dmask, Tensor rng_state)"
SAVED = f"Tensor dout, {QKV}, Tensor out, Tensor softmax_lse"
INTO = "Tensor(a!)? dq, Tensor(b!)? dk, Tensor(c!)? dv"
CACHE = (
    "Tensor? cu_seqlens_q, SymInt max_seqlen_q, Tensor? cache_seqlens, SymInt cache_seqlen, "
    "Tensor? cache_batch_idx, Tensor? cache_leftpad, Tensor? block_table, float softmax_scale, "
    "bool causal, SymInt window_size_left, SymInt window_size_right, float softcap, "
    "Tensor? alibi_slopes, SymInt num_splits"
)
# Upstream's arguments come first, ours after them, with defaults.
SCHEMAS = {
    "_flash_attn_forward": f"({QKV}, {SCORE}, bool return_softmax, Tensor? rng_state=None, "
    f"{NUMBERS}, bool deterministic=False) -> {RESULTS}",
    "_flash_attn_varlen_forward": f"({QKV}, {LENGTHS}, float dropout_p, float softmax_scale, "
    "bool causal, SymInt window_size_left=-1, SymInt window_size_right=-1, float softcap=0., "
    "Tensor? alibi_slopes=None, bool return_softmax=False, Tensor? block_table=None, "
    "Tensor? leftpad_k=None, Tensor? seqused_k=None, bool zero_tensors=False, "
    f"SymInt num_splits=0, Tensor? rng_state=None, {NUMBERS}, "
    f"bool deterministic=False) -> {RESULTS}",
    "_flash_attn_backward": f"({SAVED}, {INTO}, {SCORE}, bool deterministic, "
    f"Tensor? rng_state=None, *, Tensor? dlse=None, bool return_softmax_d=True, {NUMBERS}) "
    "-> Tensor softmax_d",
    "_flash_attn_backward.functional": f"({SAVED}, {SCORE}, bool deterministic, "
    f"Tensor? rng_state=None, Tensor? dlse=None, {NUMBERS}) "
    "-> (Tensor dq, Tensor dk, Tensor dv)",
    "_flash_attn_varlen_backward": f"({SAVED}, {INTO}, {LENGTHS}, {SCORE}, bool deterministic, "
    "Tensor? rng_state=None, bool zero_tensors=False, *, Tensor? dlse=None, "
    f"bool return_softmax_d=True, {NUMBERS}) -> Tensor softmax_d",
    "_flash_attn_varlen_backward.functional": f"({SAVED}, {LENGTHS}, {SCORE}, "
    f"bool deterministic, Tensor? rng_state=None, Tensor? dlse=None, {NUMBERS}) "
    "-> (Tensor dq, Tensor dk, Tensor dv)",
    "_flash_attn_kvcache": f"(Tensor q, Tensor k_cache, Tensor v_cache, {CACHE}, *, {NUMBERS}) "
    "-> (Tensor out, Tensor softmax_lse)",
    "_flash_attn_kvcache.append": "(Tensor q, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor k, "
    "Tensor v, Tensor? rotary_cos, Tensor? rotary_sin, bool rotary_interleaved, "
    f"{CACHE}, *, {NUMBERS}) -> (Tensor out, Tensor softmax_lse)",
    "merge_states": "(Tensor out_a, Tensor lse_a, Tensor out_b, Tensor lse_b) "
    "-> (Tensor out, Tensor softmax_lse)",
}


@pytest.mark.parametrize("name", SCHEMAS)
def test_schema(name: str) -> None:
    packet, _, overload = name.partition(".")
    op = getattr(getattr(torch.ops.flash_attn, packet), overload or "default")
    assert str(op._schema) == f"flash_attn::{name}{SCHEMAS[name]}"
    assert torch.Tag.pt2_compliant_tag in op.tags
    draws = name.endswith("forward")
    assert (torch.Tag.nondeterministic_seeded in op.tags) == draws


@pytest.mark.parametrize("name", SCHEMAS)
def test_operator_is_registered(device: str, name: str) -> None:
    for key in (device.upper(), "Meta"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"flash_attn::{name}", key), key


@dataclass
class Call:
    """Arguments of all operators for one problem, dense or of two sequences and rows of none."""

    case: AttnCase
    varlen: bool
    with_features: bool
    device: str

    def __post_init__(self) -> None:
        x = make_inputs(self.case, self.device)
        self.inputs = [x.q, x.k, x.v]
        self.dout = x.dout
        heads_q = self.case.heads[0]
        self.options = (0.0, self.case.scale, self.case.causal, -1, -1, 0.0, None)
        self.rng_state = None
        if self.with_features:
            slopes = torch.linspace(0.1, 0.9, heads_q, device=self.device)
            self.rng_state = torch.tensor([7, 64], device=self.device)
            self.options = (0.25, self.case.scale, False, 20, 9, 3.0, slopes)
        self.name, self.lengths = "", ()
        if self.varlen:
            self.inputs = [t.flatten(0, 1) for t in self.inputs]
            self.dout = self.dout.flatten(0, 1)
            ends = [[0, t.shape[0] // 3, t.shape[0] - 4] for t in self.inputs[:2]]
            cu_seqlens = [torch.tensor(e, dtype=torch.int32, device=self.device) for e in ends]
            longest = [max(e[1], e[2] - e[1]) for e in ends]
            self.name, self.lengths = "_varlen", (*cu_seqlens, *longest)

    def op(self, name: str) -> torch._ops.OpOverload:
        """name: forward, backward or backward.functional."""
        name, _, overload = name.partition(".")
        packet = getattr(torch.ops.flash_attn, f"_flash_attn{self.name}_{name}")
        return getattr(packet, overload or "default")

    def forward(self) -> tuple[tuple, dict]:
        arguments = (*self.inputs, *self.lengths, *self.options, True)
        return arguments, dict(rng_state=self.rng_state)

    def backward(
        self, out: Tensor, lse: Tensor, dlse: Tensor | None, grads: tuple = ()
    ) -> tuple[tuple, dict]:
        saved = self.dout, *self.inputs, out, lse, *grads
        return (*saved, *self.lengths, *self.options, True, self.rng_state), dict(dlse=dlse)


kinds = pytest.mark.parametrize(
    ("varlen", "with_features"),
    [(False, False), (False, True), (True, False), (True, True)],
    ids=["dense", "dense-features", "varlen", "varlen-features"],
)


@everywhere(*NATIVE)
@kinds
def test_opcheck(device: str, case: AttnCase, varlen: bool, with_features: bool) -> None:
    call = Call(case, varlen, with_features, device)
    torch.library.opcheck(call.op("forward"), *call.forward())
    arguments, options = call.forward()
    out, lse, _, _ = call.op("forward")(*arguments, **options)
    for dlse in (None, torch.ones_like(lse)):
        torch.library.opcheck(call.op("backward.functional"), *call.backward(out, lse, dlse))
        grads = tuple(torch.zeros_like(t) for t in call.inputs)
        torch.library.opcheck(call.op("backward"), *call.backward(out, lse, dlse, grads))
    arguments, options = call.backward(out, lse, None, (None, grads[1], None))
    torch.library.opcheck(call.op("backward"), arguments, dict(return_softmax_d=False))


def test_numbers_may_be_tensors(device: str) -> None:
    """Operators read them; what the numbers in their places are does not matter."""
    call = Call(NATIVE[0], False, False, device)
    (q, k, v, dropout_p, scale, *others), _ = call.forward()
    op = call.op("forward")
    numbers = [torch.tensor(x, device=d) for x, d in ((scale, "cpu"), (3.0, device))]
    given = dict(softmax_scale_tensor=numbers[0], softcap_tensor=numbers[1])
    torch.library.opcheck(op, (q, k, v, dropout_p, 9.0, *others), given)
    ours = op(q, k, v, dropout_p, 9.0, *others, **given)
    want = op(q, k, v, dropout_p, float(numbers[0]), *others[:3], 3.0, *others[4:])
    for name, a, b in zip(("out", "lse"), ours, want):
        assert_bitwise(name, a, b, call.case)
    for wrong in (torch.ones(2), torch.ones((), dtype=torch.bool)):
        for name in given:
            with pytest.raises(RuntimeError, match=name):
                op(q, k, v, dropout_p, 9.0, *others, **{name: wrong})


DECODING = [
    DecodeCase((90, 5, 60), 1, (4, 2), 64, Mask.causal, append=1, rotary="halves", page_size=16),
    DecodeCase((90, 5, 60), 3, (4, 2), 64, window=(30, 3), softcap=4.0, alibi=Alibi.per_head),
    DecodeCase((90, 5, 60), (3, 0, 9), (4, 2), 64, Mask.causal, append=1, leftpad=(3, 0, 60)),
    DecodeCase((90, 5, 60), 2, (4, 2), 64, Mask.causal, entries="permuted", append=2),
]


def decode_arguments(case: DecodeCase, device: str) -> tuple[torch._ops.OpOverload, tuple]:
    """The operator of the cache, and its arguments."""
    x = make_decode_inputs(case, device)
    new = ("k", "v", "rotary_cos", "rotary_sin", "rotary_interleaved")
    indices = ("cache_batch_idx", "cache_leftpad", "block_table")
    cache = (
        x.options.get("cu_seqlens_q"),
        max(case.lengths_q),
        x.options["cache_seqlens"],
        0,
        *(x.options.get(name) for name in indices),
        *(case.scale, case.causal, *case.window, case.softcap, x.options.get("alibi_slopes"), 2),
    )
    if case.append is None:
        return torch.ops.flash_attn._flash_attn_kvcache.default, (x.q, x.k_cache, x.v_cache, *cache)
    given = [x.options.get(name) for name in new[:-1]]
    given.append(x.options.get(new[-1], True))
    arguments = (x.q, x.k_cache, x.v_cache, *given, *cache)
    return torch.ops.flash_attn._flash_attn_kvcache.append, arguments


@everywhere(*DECODING)
def test_opcheck_of_decoding(device: str, case: DecodeCase) -> None:
    op, arguments = decode_arguments(case, device)
    for t in arguments[1:3]:
        t.nan_to_num_(0.5)  # the check compares with torch.equal
    torch.library.opcheck(op, arguments)
    out, lse = op(*arguments)
    with FakeTensorMode() as mode:
        fake = op(*(mode.from_tensor(a) if isinstance(a, Tensor) else a for a in arguments))
    for a, b in zip(fake, (out, lse), strict=True):
        assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())
        assert b.is_contiguous()
    torch.library.opcheck(torch.ops.flash_attn.merge_states.default, (out, lse, out, lse - 1))


@everywhere(*DECODING)
def test_decoding_runs_on_fake_and_meta_tensors(device: str, case: DecodeCase) -> None:
    x = make_decode_inputs(case, device)

    def run(convert: Callable[[Tensor], Tensor]) -> list[tuple]:
        options = {n: convert(o) if isinstance(o, Tensor) else o for n, o in x.options.items()}
        caches = (convert(t) for t in (x.q, x.k_cache, x.v_cache))
        results = flash_attn_with_kvcache(*caches, return_softmax_lse=True, **options)
        return [(t.shape, t.dtype, t.stride()) for t in results]

    want = run(lambda t: t)
    with FakeTensorMode() as mode:
        assert run(mode.from_tensor) == want
    assert run(lambda t: t.to("meta")) == want


class Decoding(torch.nn.Module):
    def forward(self, q: Tensor, k_cache: Tensor, v_cache: Tensor, options: dict) -> Tensor:
        return flash_attn_with_kvcache(q, k_cache, v_cache, **options)


@everywhere(DECODING[0])
def test_export_of_decoding(device: str, case: DecodeCase) -> None:
    """The exported program writes to the caches it is given."""
    x = make_decode_inputs(case, device)
    y, z = x.fresh(), x.fresh()
    program = torch.export.export(Decoding(), (x.q, x.k_cache, x.v_cache, x.options))
    assert "flash_attn._flash_attn_kvcache.append" in str(program.graph)
    want = Decoding()(y.q, y.k_cache, y.v_cache, y.options)
    assert_nearly("out", program.module()(z.q, z.k_cache, z.v_cache, z.options), want, case)
    assert_bitwise("k_cache", z.k_cache, y.k_cache, case)


@everywhere(CASES[0])
@pytest.mark.parametrize("varlen", [False, True], ids=["dense", "varlen"])
def test_gradients_are_written_into_slices(device: str, case: AttnCase, varlen: bool) -> None:
    """Every element, whatever was there; nothing between the slices."""
    call = Call(case, varlen, True, device)
    arguments, options = call.forward()
    out, lse, _, _ = call.op("forward")(*arguments, **options)
    arguments, options = call.backward(out, lse, None)
    want = call.op("backward.functional")(*arguments, **options)
    heads = max(case.heads)
    grads = []
    for t in call.inputs:
        wide = torch.full((*t.shape[:-2], 3, heads + 1, t.shape[-1] + 8), torch.nan, device=device)
        grads.append(wide.to(t.dtype)[..., 1, : t.shape[-2], : t.shape[-1]])
    arguments, options = call.backward(out, lse, None, tuple(grads))
    softmax_d = call.op("backward")(*arguments, **options)
    delta = (call.dout.double() * out).sum(-1).transpose(-1, -2)
    padding = softmax_d.shape[-1] - delta.shape[-1]
    assert padding == (2 * 128 if varlen else -case.seqlen_q % 128)
    expected = torch.nn.functional.pad(delta, (0, padding))
    torch.testing.assert_close(softmax_d.double(), expected, rtol=1e-4, atol=1e-4)
    for name, grad, expected in zip(("dq", "dk", "dv"), grads, want):
        assert torch.equal(grad, expected), name
        whole = grad._base
        assert int(whole.isnan().sum()) == whole.numel() - grad.numel(), name


@everywhere(*NATIVE)
@kinds
def test_fake_tensors_have_the_real_shapes_and_strides(
    device: str, case: AttnCase, varlen: bool, with_features: bool
) -> None:
    call = Call(case, varlen, with_features, device)

    def run(inputs: list[Tensor], convert: Callable[[Tensor], Tensor]) -> list[Tensor]:
        def converted(arguments: tuple) -> list:
            return [convert(a) if isinstance(a, Tensor) else a for a in arguments]

        call.inputs, call.dout = inputs[:3], inputs[3]
        results = call.op("forward")(*converted(call.forward()[0]))
        arguments = converted(call.backward(*results[:2], None)[0])
        grads = call.op("backward.functional")(*arguments)
        into = tuple(torch.empty_like(t) for t in grads)
        arguments = converted(call.backward(*results[:2], None, into)[0])
        return [*results, *grads, call.op("backward")(*arguments)]

    def heads_first(t: Tensor) -> Tensor:
        return t.transpose(-3, -2).contiguous().transpose(-3, -2)

    given = [*call.inputs, call.dout]
    for layout in (lambda t: t, heads_first):
        tensors = [layout(t) for t in given]
        real = run(tensors, lambda t: t)
        with FakeTensorMode() as mode:
            fake = run(tensors, lambda t: t if isinstance(t, FakeTensor) else mode.from_tensor(t))
        for a, b in zip(fake, real, strict=True):
            assert (a.shape, a.dtype, a.device, a.stride()) == (
                b.shape,
                b.dtype,
                b.device,
                b.stride(),
            )
            assert b.is_contiguous()


@everywhere(*CASES)
def test_public_function_runs_on_fake_tensors(device: str, case: AttnCase) -> None:
    x = make_inputs(case, device)
    with FakeTensorMode() as mode:
        q, k, v, dout = (mode.from_tensor(t) for t in (x.q, x.k, x.v, x.dout))
        q, k, v = leaves(q, k, v)
        out, lse, _ = flash_attn_func(q, k, v, causal=case.causal, return_attn_probs=True)
        grads = torch.autograd.grad(out, (q, k, v), dout)
    assert out.shape == q.shape and lse.shape == (case.batch, case.heads[0], case.seqlen_q)
    assert [g.shape for g in grads] == [x.q.shape, x.k.shape, x.v.shape]


def compare_compiled(
    case: AttnCase, device: str, backend: str, dynamic: bool | None = None
) -> None:
    torch._dynamo.reset()

    def block(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        out, lse, _ = flash_attn_func(
            q * 1.5, k, v, causal=case.causal, deterministic=True, return_attn_probs=True
        )
        return out.relu() + out, lse

    compiled = torch.compile(block, backend=backend, fullgraph=True, dynamic=dynamic)
    shapes = [case]
    if dynamic:
        shapes.append(case.but(seqlen_q=case.seqlen_q + 9, seqlen_k=case.seqlen_k + 3))
    for shape in shapes:
        x = make_inputs(shape, device)
        results = []
        for function in (compiled, block):
            inputs = leaves(x.q, x.k, x.v)
            out, lse = function(*inputs)
            grads = torch.autograd.grad((out, lse), inputs, (x.dout, torch.ones_like(lse)))
            results.append((out.detach(), lse.detach(), *grads))
        for name, ours, want in zip(("out", "lse", "dq", "dk", "dv"), *results):
            assert_nearly(name, ours, want, f"{shape}, {backend}")


@everywhere(*CASES)
def test_compiles_as_a_full_graph(device: str, case: AttnCase) -> None:
    compare_compiled(case, device, "aot_eager")


@everywhere(CASES[0])
def test_compiles_with_dynamic_shapes(device: str, case: AttnCase) -> None:
    compare_compiled(case, device, "aot_eager", dynamic=True)


@everywhere(CASES[0])
def test_compiles_with_inductor(device: str, case: AttnCase) -> None:
    if device == "cuda":
        pytest.importorskip("triton")
    if shutil.which("g++") is None:
        pytest.skip("inductor and triton need a compiler")
    compare_compiled(case, device, "inductor")


@everywhere(*CASES)
def test_plain_call_compiles(device: str, case: AttnCase) -> None:
    """The common call, without the tuple, under no_grad and with gradients."""
    torch._dynamo.reset()
    x = make_inputs(case, device)
    compiled = torch.compile(flash_attn_func, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        out = compiled(x.q, x.k, x.v, causal=case.causal)
    want = run_flash(x.q, x.k, x.v, x.dout, causal=case.causal, deterministic=True)
    assert_nearly("out", out, want.out, case)
    q, k, v = leaves(x.q, x.k, x.v)
    compiled(q, k, v, causal=case.causal, deterministic=True).backward(x.dout)
    for name, t in (("dq", q), ("dk", k), ("dv", v)):
        assert_nearly(name, t.grad, getattr(want, name), case)


FORMS = {
    "dense": lambda qkv, cu, n, **options: flash_attn_func(*qkv.unbind(2), **options),
    "one_tensor": lambda qkv, cu, n, **options: flash_attn_func(*(qkv[:, :, 0],) * 3, **options),
    "kvpacked": lambda qkv, cu, n, **options: flash_attn_kvpacked_func(
        qkv[:, :, 0], qkv[:, :, 1:], **options
    ),
    "qkvpacked": lambda qkv, cu, n, **options: flash_attn_qkvpacked_func(qkv, **options),
    "varlen": lambda qkv, cu, n, **options: flash_attn_varlen_func(
        *qkv.flatten(0, 1).unbind(1), cu, cu, n, n, **options
    ),
    "varlen_kvpacked": lambda qkv, cu, n, **options: flash_attn_varlen_kvpacked_func(
        qkv.flatten(0, 1)[:, 0], qkv.flatten(0, 1)[:, 1:], cu, cu, n, n, **options
    ),
    "varlen_qkvpacked": lambda qkv, cu, n, **options: flash_attn_varlen_qkvpacked_func(
        qkv.flatten(0, 1), cu, n, **options
    ),
}
ALL_FEATURES = dict(window_size=(9, 4), softcap=5.0, dropout_p=0.2, return_attn_probs=True)


def make_packed(device: str, rows: int = 20) -> tuple[Tensor, Tensor, int]:
    """qkv (2, rows, 3, 2, 64), cu_seqlens of three sequences in its rows, the longest length."""
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    torch.manual_seed(0)
    qkv = torch.randn(2, rows, 3, 2, 64, device=device).to(dtype)
    cu_seqlens = torch.tensor([0, 9, 9, 2 * rows - 3], dtype=torch.int32, device=device)
    return qkv, cu_seqlens, 2 * rows - 12


COMPILED = [(form, None) for form in FORMS]
COMPILED += [("dense", True), ("varlen_qkvpacked", True)]


@pytest.mark.parametrize(("form", "dynamic"), COMPILED)
def test_every_form_compiles(device: str, form: str, dynamic: bool | None) -> None:
    """With all features, as one graph; the seed gives the same dropout as in eager mode."""
    slopes = torch.tensor([0.3, 0.1], device=device)

    def block(qkv: Tensor, cu_seqlens: Tensor, longest: int) -> tuple[Tensor, Tensor, Tensor]:
        plain = FORMS[form](qkv * 1.5, cu_seqlens, longest, causal=True, deterministic=True)
        out, lse, s_dmask = FORMS[form](
            *(qkv * 1.5, cu_seqlens, longest),
            alibi_slopes=slopes,
            deterministic=True,
            **ALL_FEATURES,
        )
        return plain + out, lse.masked_fill(lse.isinf(), 0), s_dmask

    torch._dynamo.reset()
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for rows in (20, 27) if dynamic else (20,):
        qkv, cu_seqlens, longest = make_packed(device, rows)
        results = []
        for function in (compiled, block):
            torch.manual_seed(1)
            (leaf,) = leaves(qkv)
            out, lse, s_dmask = function(leaf, cu_seqlens, longest)
            ((out * out).sum() + lse.sum()).backward()
            results.append((out.detach(), lse.detach(), s_dmask, leaf.grad))
        # Compiled, tensors have other strides and addresses, which products on the CPU may sum by.
        eps = 32 * torch.finfo(torch.float32).eps if device == "cpu" else None
        for name, ours, want in zip(("out", "lse", "s_dmask", "dqkv"), *results):
            assert_nearly(name, ours, want, form, eps=eps)


def test_packed_gradients_compile_with_inductor(device: str) -> None:
    """The operator writes into slices of one tensor, which a compiler may not copy apart."""
    if device == "cuda":
        pytest.importorskip("triton")
    if shutil.which("g++") is None:
        pytest.skip("inductor and triton need a compiler")

    def block(qkv: Tensor) -> Tensor:
        return flash_attn_qkvpacked_func(qkv * 2, dropout_p=0.3, causal=True, deterministic=True)

    torch._dynamo.reset()
    results = []
    for function in (torch.compile(block, fullgraph=True), block):
        torch.manual_seed(1)
        (leaf,) = leaves(make_packed(device)[0])
        out = function(leaf)
        (out * out).sum().backward()
        results.append((out.detach(), leaf.grad))
    for name, ours, want in zip(("out", "dqkv"), *results):
        assert_nearly(name, ours, want, "inductor")


@pytest.mark.parametrize("form", FORMS)
def test_every_form_runs_on_fake_tensors(device: str, form: str) -> None:
    qkv, cu_seqlens, longest = make_packed(device)
    results = []
    for mode in (None, FakeTensorMode()):
        with mode or nullcontext():
            x, cu = (t if mode is None else mode.from_tensor(t) for t in (qkv, cu_seqlens))
            (leaf,) = leaves(x)
            out, lse, s_dmask = FORMS[form](leaf, cu, longest, **ALL_FEATURES)
            (grad,) = torch.autograd.grad(out.sum() + lse.sum(), leaf)
        results.append(
            [(t.shape, t.dtype, t.device, t.stride()) for t in (out, lse, s_dmask, grad)]
        )
    assert results[0] == results[1]


class Attention(torch.nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return flash_attn_func(q, k, v, causal=True)


class VarlenAttention(torch.nn.Module):
    def forward(self, qkv: Tensor, cu_seqlens: Tensor) -> Tensor:
        window = dict(window_size=(9, 0), softcap=5.0)
        return flash_attn_varlen_qkvpacked_func(qkv, cu_seqlens, qkv.shape[0], **window)


def test_export_varlen(device: str) -> None:
    qkv, cu_seqlens, _ = make_packed(device)
    total = torch.export.Dim("total", min=2)
    program = torch.export.export(
        VarlenAttention(), (qkv.flatten(0, 1), cu_seqlens), dynamic_shapes=({0: total}, None)
    )
    assert "flash_attn._flash_attn_varlen_forward" in str(program.graph)
    for rows in (20, 31):
        qkv, cu_seqlens, _ = make_packed(device, rows)
        want = VarlenAttention()(qkv.flatten(0, 1), cu_seqlens)
        assert_nearly("out", program.module()(qkv.flatten(0, 1), cu_seqlens), want, "export")


@everywhere(CASES[0])
def test_export(device: str, case: AttnCase) -> None:
    x = make_inputs(case, device)
    seqlen_q, seqlen_k = torch.export.Dim("seqlen_q", min=2), torch.export.Dim("seqlen_k", min=2)
    program = torch.export.export(
        Attention(),
        (x.q, x.k, x.v),
        dynamic_shapes=({1: seqlen_q}, {1: seqlen_k}, {1: seqlen_k}),
    )
    assert "flash_attn._flash_attn_forward" in str(program.graph)
    other = make_inputs(case.but(seqlen_q=50, seqlen_k=60), device)
    for inputs in (x, other):
        want = flash_attn_func(inputs.q, inputs.k, inputs.v, causal=True)
        got = program.module()(inputs.q, inputs.k, inputs.v)
        assert_nearly("out", got, want, case)


@everywhere(CASES[0])
def test_meta_tensors(device: str, case: AttnCase) -> None:
    x = make_inputs(case, device)
    out, lse, _ = flash_attn_func(*(t.to("meta") for t in (x.q, x.k, x.v)), return_attn_probs=True)
    assert out.device.type == "meta" and out.shape == x.q.shape
    assert lse.shape == (case.batch, case.heads[0], case.seqlen_q)
