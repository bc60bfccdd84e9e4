"""merge_states: results for parts of the keys put together."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from cases import (
    AttnCase,
    Inputs,
    Mask,
    VarlenCase,
    everywhere,
    make_inputs,
    make_varlen_inputs,
    on_devices,
)
from harness import assert_bitwise, assert_nearly, leaves, run_flash, run_varlen
from oracle import Result, attention_oracle, attention_peer, check_result, per_sequence
from torch import Tensor

from flash_attn import flash_attn_func, flash_attn_varlen_func, merge_states

State = tuple[Tensor, Tensor]


def state(result: Result) -> State:
    return result.out, result.lse


def merged(*states: State) -> State:
    """All of them, one after another."""
    first, *others = states
    for other in others:
        first = merge_states(*first, *other)
    return first


def parts(case: AttnCase, x: Inputs, *ends: int) -> list[State]:
    """Attention to the keys before each end, from the one before it on."""
    states = []
    for begin, end in itertools.pairwise((0, *ends)):
        cols = slice(begin, end)
        states.append(state(run_flash(x.q, x.k[:, cols], x.v[:, cols], causal=False)))
    return states


CASES = [
    AttnCase(1, 300, (8, 2), 128, batch=3),
    AttnCase(65, 130, (4, 2), 64, batch=2),
    AttnCase(33, 97, (3, 1), 40, dtype="fp16"),
    AttnCase(20, 64, (2, 2), 256),
    AttnCase(9, 64, (2, 1), 33),
]


@everywhere(*CASES)
def test_parts_are_the_whole(device: str, case: AttnCase) -> None:
    """Any number of parts in any order, parts without keys among them."""
    x = make_inputs(case, device)
    n = case.seqlen_k
    states = parts(case, x, n // 4, n // 4, n // 2 + 3, n)
    want = attention_oracle(x.q, x.k, x.v, scale=case.scale, causal=False)
    peer = attention_peer(x.q, x.k, x.v, scale=case.scale, causal=False)
    eps = 4 * torch.finfo(x.q.dtype).eps  # the parts are rounded too
    for order in itertools.islice(itertools.permutations(states), 0, 24, 5):
        out, lse = merged(*order)
        assert out.is_contiguous() and lse.is_contiguous() and lse.dtype == torch.float32
        assert_nearly("out", out, want.out.to(out.dtype), case, eps=eps)
        assert_nearly("lse", lse, want.lse.to(lse.dtype), case, eps=1e-6)
    if x.q.dtype == torch.float32:
        check_result(Result(*merged(*states)), peer, want, case=case)


@on_devices(cpu=[CASES[0], CASES[2]])
def test_parts_in_fp32(device: str, case: AttnCase) -> None:
    """Partial results that are not rounded: the whole is as exact as attention itself."""
    x = make_inputs(case, device)
    n, states = case.seqlen_k, []
    for cols in (slice(0, n // 3), slice(n // 3, n)):
        part = attention_oracle(x.q, x.k[:, cols], x.v[:, cols], scale=case.scale, causal=False)
        states.append((part.out.float(), part.lse.float()))
    out, lse = merged(*states)
    want = attention_oracle(x.q, x.k, x.v, scale=case.scale, causal=False)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out.double(), want.out, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(lse.double(), want.lse, rtol=1e-5, atol=1e-6)


@everywhere(
    VarlenCase((5, 0, 64, 1), (30, 7, 200, 90), (4, 2), 64, unused=(3, 0)),
    VarlenCase((5, 0, 64, 1), (30, 7, 0, 90), (2, 2), 128, dtype="fp16"),
)
def test_varlen_parts(device: str, case: VarlenCase) -> None:
    """Rows of no sequence, and of one without keys, are 0 and +inf in the parts and merged."""
    x = make_varlen_inputs(case, device)
    want = run_varlen(x, causal=False, backward=False)
    cu = x.cu_seqlens_k
    halves = []
    for first in (True, False):
        # cu_seqlens of the first, and of the second half of each sequence's keys
        lengths = cu.diff() // 2 if first else cu.diff() - cu.diff() // 2
        rows = [
            torch.arange(n, device=device) + int(c) + (0 if first else int(d - n))
            for n, c, d in zip(lengths.tolist(), cu[:-1], cu.diff())
        ]
        index = torch.cat(rows)
        ends = torch.cat((cu[:1], lengths.cumsum(0, dtype=torch.int32)))
        out, lse, _ = flash_attn_varlen_func(
            *(x.q, x.k[index], x.v[index], x.cu_seqlens_q, ends, x.max_seqlen_q, x.max_seqlen_k),
            return_attn_probs=True,
        )
        halves.append((out, lse))
    out, lse = merged(*halves)
    assert_nearly("out", out, want.out, case, eps=4 * torch.finfo(out.dtype).eps)
    assert_nearly("lse", lse, want.lse, case, eps=1e-6)
    used = sum(case.lengths_q)
    assert not out[used:].any() and (lse[:, used:] == torch.inf).all()
    exact = dict(cu_seqlens_q=x.cu_seqlens_q.tolist(), cu_seqlens_k=cu.tolist())
    oracle = per_sequence(attention_oracle, x.q, x.k, x.v, scale=case.scale, causal=False, **exact)
    assert_nearly("lse", lse, oracle.lse.to(lse.dtype), case, eps=1e-6)


@everywhere(AttnCase(40, 60, (4, 2), 64, batch=2), AttnCase(40, 60, (2, 1), 40, dtype="fp16"))
@pytest.mark.parametrize("infinity", [torch.inf, -torch.inf], ids=str)
def test_part_that_saw_no_key_has_no_weight(device: str, case: AttnCase, infinity: float) -> None:
    """The other part, out bitwise, whatever its own out holds; both: 0 and +inf."""
    x = make_inputs(case, device)
    ((out, lse),) = parts(case, x, case.seqlen_k)
    none = torch.full_like(out, torch.nan), torch.full_like(lse, infinity)
    for result in (merge_states(out, lse, *none), merge_states(*none, out, lse)):
        assert_bitwise("out", result[0], out, case)
        assert_nearly("lse", result[1], lse, case, eps=1e-6)
    for other in (infinity, -infinity):
        nothing = merge_states(*none, none[0], torch.full_like(lse, other))
        assert not nothing[0].any() and (nothing[1] == torch.inf).all()
    # Row by row: of some queries one part saw a key, of some the other, of some none.
    seen = torch.arange(case.seqlen_q, device=device) % 3
    a, b = (
        (
            out.where((seen == n)[:, None, None], torch.nan),
            lse.where(seen == n, infinity),
        )
        for n in (0, 1)
    )
    mixed = merge_states(*a, *b)
    assert_bitwise("out", mixed[0], out.where((seen < 2)[:, None, None], 0), case)
    assert_nearly("lse", mixed[1], lse.where(seen < 2, torch.inf), case, eps=1e-6)


@everywhere(AttnCase(9, 60, (2, 1), 64))
def test_large_and_small_parts(device: str, case: AttnCase) -> None:
    """Sums of exponentials that overflow or vanish in fp32; parts of very different weight."""
    x = make_inputs(case, device)
    ((out, lse),) = parts(case, x, case.seqlen_k)
    for shift in (300.0, -300.0, 3e4):
        got = merge_states(out, lse + shift, out, lse + shift)
        assert_nearly("out", got[0], out, case)
        assert_nearly("lse", got[1], lse + shift + math.log(2), case, eps=1e-6)
        got = merge_states(out, lse + shift, out * 5, lse + shift - 200)
        assert_bitwise("out", got[0], out, case)
        assert_nearly("lse", got[1], lse + shift, case, eps=1e-6)


def random_states(device: str, dtype: torch.dtype, *shape: int) -> list[Tensor]:
    torch.manual_seed(0)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    *batch, seqlen, heads, _ = shape
    made = []
    for _ in range(2):
        made.append(torch.randn(*shape, device=device, dtype=wide).to(dtype))
        made.append(2 * torch.randn(*batch, heads, seqlen, device=device, dtype=wide))
    return made


@pytest.mark.parametrize("shape", [(2, 3, 2, 4), (5, 2, 4)], ids=["dense", "varlen"])
def test_gradients(shape: tuple[int, ...]) -> None:
    """Against differences, in fp64 on the CPU; of gradients too."""
    states = leaves(*random_states("cpu", torch.float64, *shape))
    assert torch.autograd.gradcheck(merge_states, states)
    assert torch.autograd.gradgradcheck(merge_states, states)


@pytest.mark.parametrize("wanted", [(0,), (3,), (0, 1), (1, 3)], ids=str)
def test_only_requested_gradients_come(device: str, wanted: tuple[int, ...]) -> None:
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    states = random_states(device, dtype, 2, 3, 2, 64)
    all_leaves = leaves(*states)
    dout, dlse = torch.randn_like(states[0]), torch.randn_like(states[1])
    want = torch.autograd.grad(merge_states(*all_leaves), all_leaves, (dout, dlse))
    some = [t.clone().requires_grad_(i in wanted) for i, t in enumerate(states)]
    torch.autograd.backward(merge_states(*some), (dout, dlse))
    for i, t in enumerate(some):
        assert (t.grad is not None) == (i in wanted)
        if i in wanted:
            assert_bitwise("gradient", t.grad, want[i], wanted)
    # Of one result alone.
    for index, grad in enumerate((dout, dlse)):
        some = [t.clone().requires_grad_(i in wanted) for i, t in enumerate(states)]
        merge_states(*some)[index].backward(grad)
        assert all(t.grad is not None for i, t in enumerate(some) if i in wanted and i + index != 1)


def test_parts_without_keys_get_no_gradient(device: str) -> None:
    dtype = torch.float32 if device == "cpu" else torch.float16
    out_a, lse_a, out_b, lse_b = random_states(device, dtype, 1, 4, 2, 64)
    lse_a[..., 0], lse_b[..., 1], lse_a[..., 2], lse_b[..., 2] = (
        torch.inf,
        -torch.inf,
        *[torch.inf] * 2,
    )
    out_a[:, 0], out_b[:, 1] = torch.nan, torch.nan
    states = leaves(out_a, lse_a, out_b, lse_b)
    out, lse = merge_states(*states)
    dlse = torch.ones_like(lse)
    grads = torch.autograd.grad((out, lse), states, (torch.ones_like(out), dlse))
    assert all(g.isfinite().all() for g in grads)
    da, dlse_a, db, dlse_b = grads
    assert not da[:, (0, 2)].any() and not dlse_a[..., (0, 2)].any()
    assert not db[:, (1, 2)].any() and not dlse_b[..., (1, 2)].any()
    assert (da[:, 1] == 1).all() and (db[:, 0] == 1).all()


@everywhere(AttnCase(33, 80, (4, 2), 64, Mask.none, batch=2), AttnCase(33, 80, (4, 2), 40))
def test_gradients_of_attention_in_parts(device: str, case: AttnCase) -> None:
    """Ring attention's way: the gradients of q, k and v are those of attention to all keys."""
    x = make_inputs(case, device)
    results = []
    for in_parts in (True, False):
        q, k, v = leaves(x.q, x.k, x.v)
        cuts = [slice(0, 30), slice(30, None)] if in_parts else [slice(0, None)]
        states = [flash_attn_func(q, k[:, c], v[:, c], return_attn_probs=True)[:2] for c in cuts]
        out, _ = merged(*states)
        results.append(torch.autograd.grad(out, (q, k, v), x.dout))
    for name, ours, want in zip(("dq", "dk", "dv"), *results):
        assert_nearly(name, ours, want, case, eps=6 * torch.finfo(want.dtype).eps)


@everywhere(AttnCase(33, 80, (4, 2), 64, batch=2))
def test_strides_change_no_bit(device: str, case: AttnCase) -> None:
    x = make_inputs(case, device)
    a, b = parts(case, x, 30, 80)
    want = merge_states(*a, *b)
    for change in (
        lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
        lambda t: t.transpose(-1, -2).contiguous().transpose(-1, -2),
        lambda t: torch.stack((t, t * torch.nan), 1)[:, 0],
    ):
        got = merge_states(*(change(t) for t in (*a, *b)))
        assert_bitwise("out", got[0], want[0], case)
        assert_bitwise("lse", got[1], want[1], case)


@everywhere(AttnCase(0, 80, (4, 2), 64, batch=2), AttnCase(0, 80, (4, 2), 64))
def test_no_queries(device: str, case: AttnCase) -> None:
    x = make_inputs(case, device)
    out, lse = merged(*parts(case, x, 30, 80))
    assert out.shape == case.q_shape and lse.shape == (case.batch, 4, 0)


def test_compiles_as_a_full_graph(device: str) -> None:
    torch._dynamo.reset()
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    compiled = torch.compile(merge_states, backend="aot_eager", fullgraph=True, dynamic=True)
    for seqlen in (5, 9):
        states = random_states(device, dtype, 2, seqlen, 4, 64)
        for name, ours, want in zip(("out", "lse"), compiled(*states), merge_states(*states)):
            assert_bitwise(name, ours, want, seqlen)
        results = []
        for function in (compiled, merge_states):
            inputs = leaves(*states)
            out, lse = function(*inputs)
            results.append(torch.autograd.grad((out * out).sum() + lse.sum(), inputs))
        for ours, want in zip(*results):
            assert_nearly("gradient", ours, want, seqlen)


@pytest.mark.cuda
def test_cuda_graph(device: str) -> None:
    states = random_states(device, torch.bfloat16, 2, 65, 4, 128)
    merge_states(*states)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        recorded = merge_states(*states)
    for t in states:
        t.mul_(-0.7)
    graph.replay()
    for name, ours, want in zip(("out", "lse"), recorded, merge_states(*states)):
        assert_bitwise(name, ours, want, "replay")


WRONG = {
    "out_of_2_dimensions": (0, lambda t: t[0, 0], ("out_a", "(4, 64)")),
    "out_in_int32": (0, lambda t: t.int(), ("out_a", "int32")),
    "head_dim_320": (0, lambda t: t.repeat(1, 1, 1, 5), ("out_a", "256", "320")),
    "out_b_shorter": (2, lambda t: t[:, :-1], ("out_b", "(2, 4, 4, 64)", "(2, 5, 4, 64)")),
    "out_b_in_fp64": (2, lambda t: t.double(), ("out_b", "float64")),
    "out_b_on_meta": (2, lambda t: t.to("meta"), ("out_b", "meta")),
    "lse_in_order_of_out": (1, lambda t: t.mT, ("lse_a", "(2, 4, 5)", "(2, 5, 4)")),
    "lse_in_fp16": (3, lambda t: t.half(), ("lse_b", "float32", "float16")),
    "lse_of_one_batch": (3, lambda t: t[:1], ("lse_b", "(1, 4, 5)")),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_states_are_refused(device: str, name: str) -> None:
    which, change, words = WRONG[name]
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    states = random_states(device, dtype, 2, 5, 4, 64)
    states[which] = change(states[which])
    with pytest.raises(RuntimeError) as caught:
        merge_states(*states)
    missing = [word for word in words if word not in str(caught.value)]
    assert not missing, f"{missing} not in: {caught.value}"
