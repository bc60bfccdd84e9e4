"""What is promised of the CPU alone: fp64 gradients, memory, speed; and the oracle's own check."""

from __future__ import annotations

import itertools
import math
import os
import time
from collections.abc import Callable

import pytest
import torch
from cases import AttnCase, Mask, generator, make_inputs, randn
from oracle import assert_same_specials, attention_oracle, attention_peer
from test_api import run_python

from flash_attn import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
)
from flash_attn.cpu import attention, scores, torch_kernel


def test_cuda_is_tested_here() -> None:
    """The one place that says so when it is not."""
    import cases

    reason = cases.why_no_cuda()
    if reason is not None:
        pytest.skip(reason)


ORACLE_CASES = [
    AttnCase(5, 7, (4, 2), 3, Mask.causal, "fp64", 2),
    AttnCase(7, 4, (3, 1), 2, Mask.causal, "fp64"),
    AttnCase(4, 4, (2, 2), 5, Mask.none, "fp64"),
]


def make_dlse(case: AttnCase) -> torch.Tensor:
    return randn((case.batch, case.heads[0], case.seqlen_q), torch.float64, generator(case, "cpu"))


@pytest.mark.parametrize("case", ORACLE_CASES, ids=str)
def test_oracle_is_the_definition(case: AttnCase) -> None:
    """Loops over scalars, for the values; finite differences of the oracle, for its gradients."""
    x = make_inputs(case, "cpu")
    dlse = make_dlse(case)
    options = dict(scale=0.7, causal=case.causal)
    want = attention_oracle(x.q, x.k, x.v, x.dout, dlse=dlse, **options)
    for b, h, i in itertools.product(range(case.batch), range(case.heads[0]), range(case.seqlen_q)):
        head_kv = h // (case.heads[0] // case.heads[1])
        keys = [
            j
            for j in range(case.seqlen_k)
            if not case.causal or j <= i + case.seqlen_k - case.seqlen_q
        ]
        weights = [math.exp(0.7 * float(x.q[b, i, h] @ x.k[b, j, head_kv])) for j in keys]
        total = sum(weights)
        out = sum((w / total * x.v[b, j, head_kv] for w, j in zip(weights, keys)), x.v[0, 0, 0] * 0)
        torch.testing.assert_close(want.out[b, i, h], out)
        assert math.isclose(float(want.lse[b, h, i]), math.log(total) if keys else math.inf)

    def loss(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        result = attention_oracle(q, k, v, **options)
        lse = torch.where(result.lse.isinf(), 0.0, result.lse)
        return (result.out * x.dout).sum() + (lse * dlse).sum()

    step = 1e-6
    for name, index in (("q", 0), ("k", 1), ("v", 2)):
        inputs = [x.q, x.k, x.v]
        direction = randn(inputs[index].shape, torch.float64, generator(case, "cpu", 1))
        ahead, behind = list(inputs), list(inputs)
        ahead[index] = inputs[index] + step * direction
        behind[index] = inputs[index] - step * direction
        slope = float(loss(*ahead) - loss(*behind)) / (2 * step)
        grad = getattr(want, f"d{name}")
        assert math.isclose(slope, float((grad * direction).sum()), rel_tol=1e-6, abs_tol=1e-7)


@pytest.mark.parametrize("case", ORACLE_CASES, ids=str)
def test_peer_agrees_with_the_oracle_in_fp64(case: AttnCase) -> None:
    x = make_inputs(case, "cpu")
    dlse = make_dlse(case)
    options = dict(scale=0.7, causal=case.causal, dlse=dlse)
    want = attention_oracle(x.q, x.k, x.v, x.dout, **options)
    peer = attention_peer(x.q, x.k, x.v, x.dout, **options)
    for name in ("out", "dq", "dk", "dv"):
        torch.testing.assert_close(getattr(peer, name), getattr(want, name))


GRADCHECK = [
    AttnCase(5, 5, (2, 2), 4, Mask.none, "fp64"),
    AttnCase(6, 6, (1, 1), 8, Mask.causal, "fp64", 2),
    AttnCase(4, 7, (4, 2), 5, Mask.causal, "fp64"),
    AttnCase(7, 4, (3, 1), 3, Mask.causal, "fp64"),
    AttnCase(1, 6, (2, 1), 8, Mask.causal, "fp64"),
    AttnCase(6, 1, (2, 1), 1, Mask.none, "fp64"),
    AttnCase(3, 9, (6, 2), 7, Mask.none, "fp64"),
]


@pytest.mark.parametrize("case", GRADCHECK, ids=str)
@pytest.mark.parametrize("deterministic", [False, True], ids=["default", "deterministic"])
def test_gradcheck(case: AttnCase, deterministic: bool) -> None:
    inputs = [t.requires_grad_() for t in (lambda x: (x.q, x.k, x.v))(make_inputs(case, "cpu"))]
    options = dict(causal=case.causal, softmax_scale=0.8, deterministic=deterministic)

    def out_and_lse(*qkv: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse, _ = flash_attn_func(*qkv, return_attn_probs=True, **options)
        assert lse.dtype == torch.float64
        return out, lse.masked_fill(lse.isinf(), 0.0)

    assert torch.autograd.gradcheck(lambda *qkv: flash_attn_func(*qkv, **options), inputs)
    assert torch.autograd.gradcheck(out_and_lse, inputs)


FEATURES = {
    "window": dict(window_size=(2, 1)),
    "left_window": dict(window_size=(1, -1)),
    "softcap": dict(softcap=0.7),
    "alibi": dict(alibi_slopes=True),
    "dropout": dict(dropout_p=0.4),
    "causal_window": dict(causal=True, window_size=(3, 3)),
    "softcap_dropout": dict(softcap=0.7, dropout_p=0.4),
    "all": dict(window_size=(3, 1), softcap=1.1, alibi_slopes=True, dropout_p=0.2),
}
FORMS = {
    "dense": (flash_attn_func, ((2, 3, 2, 2), (2, 5, 1, 2), (2, 5, 1, 2)), ()),
    "kvpacked": (flash_attn_kvpacked_func, ((1, 6, 2, 2), (1, 3, 2, 1, 2)), ()),
    "qkvpacked": (flash_attn_qkvpacked_func, ((2, 4, 3, 1, 2),), ()),
    "varlen": (
        flash_attn_varlen_func,
        ((9, 2, 2), (10, 1, 2), (10, 1, 2)),
        (torch.tensor([0, 3, 3, 8]).int(), torch.tensor([0, 4, 5, 9]).int(), 5, 4),
    ),
    "varlen_kvpacked": (
        flash_attn_varlen_kvpacked_func,
        ((9, 1, 2), (10, 2, 1, 2)),
        (torch.tensor([0, 3, 8]).int(), torch.tensor([0, 5, 9]).int(), 5, 5),
    ),
    "varlen_qkvpacked": (
        flash_attn_varlen_qkvpacked_func,
        ((9, 3, 1, 2),),
        (torch.tensor([0, 3, 3, 8]).int(), 5),
    ),
}


@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("form", FORMS)
def test_gradcheck_of_features(form: str, feature: str) -> None:
    """Gradients of out and LSE are those of the function as it is, dropout included."""
    function, shapes, lengths = FORMS[form]
    options = FEATURES[feature] | dict(softmax_scale=0.9, return_attn_probs=True)
    gen = torch.Generator().manual_seed(len(form) + len(feature))
    inputs = [torch.randn(s, generator=gen, dtype=torch.float64).requires_grad_() for s in shapes]
    if "alibi_slopes" in options:
        heads = shapes[0][-2]
        batch = len(lengths[0]) - 1 if lengths else shapes[0][0]
        options["alibi_slopes"] = torch.linspace(0.1, 1, batch * heads).view(batch, heads)

    def call(*tensors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        torch.manual_seed(5)
        out, lse, _ = function(*tensors, *lengths, **options)
        return out, lse.masked_fill(lse.isinf(), 0.0)

    out, lse = call(*inputs)
    assert out.any() and lse.any()
    assert torch.autograd.gradcheck(call, inputs)


@pytest.mark.parametrize("feature", FEATURES)
def test_tiles_and_parts_do_not_change_the_result(
    feature: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Small tiles, one head at a time, give what one tile gives; dropout drops the same weights."""
    options = FEATURES[feature] | dict(return_attn_probs=True)
    case = AttnCase(70, 90, (4, 2), 8, Mask.none, "fp64", 2)
    if "alibi_slopes" in options:
        options["alibi_slopes"] = torch.linspace(0.1, 1, 8).view(2, 4)
    x = make_inputs(case, "cpu")
    results = []
    for blocks in (None, (32, 48, 1)):
        if blocks is not None:
            for name, value in zip(("BLOCK_M", "BLOCK_N", "PART_SCORES"), blocks):
                monkeypatch.setattr(attention, name, value)
        torch.manual_seed(5)
        inputs = [t.clone().requires_grad_() for t in (x.q, x.k, x.v)]
        out, lse, s_dmask = flash_attn_func(*inputs, **options)
        results.append((out, lse, s_dmask, *torch.autograd.grad(out, inputs, x.dout)))
    for ours, want in zip(*results):
        torch.testing.assert_close(ours, want)


HIDDEN = AttnCase(
    300, 300, (4, 2), 32, Mask.causal
)  # queries 0 to 199 see nothing of what is broken


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)
@pytest.mark.parametrize("name", ["q", "k", "v", "dout"])
def test_what_a_mask_hides_may_hold_anything(name: str, value: float, dtype: str) -> None:
    """Rows that do not see it are right, heads that do not hold it are the same bit by bit."""
    x = make_inputs(HIDDEN.but(dtype=dtype), "cpu")

    def run() -> list[torch.Tensor]:
        inputs = [t.detach().requires_grad_() for t in (x.q, x.k, x.v)]
        out = flash_attn_func(*inputs, causal=True)
        return [out.detach(), *torch.autograd.grad(out, inputs, x.dout)]

    clean = run()
    getattr(x, name)[0, 200, -1, 3] = value  # in the last head
    broken = run()
    for result, ours, want in zip(("out", "dq", "dk", "dv"), broken, clean):
        heads = ours.shape[2] // 2  # of the key head that is as before
        assert torch.equal(ours[:, :, :heads], want[:, :, :heads]), result
        rows = slice(0, 200) if result in ("out", "dq") else slice(201, None)
        if result in ("dk", "dv") and name in ("k", "v"):
            continue  # later queries see it and these keys
        error = (ours[:, rows].double() - want[:, rows].double()).abs().max()
        # Broken heads are computed anew by other means, whose sums have another order.
        assert error <= 8 * torch.finfo(want.dtype).eps * want.abs().max(), result
    assert not all(t.isfinite().all() for t in broken)


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp64"])
@pytest.mark.parametrize("seqlen_k", [1, 2, 5, 15, 17, 40, 300, 513, 1040])
def test_nan_and_inf_that_are_seen_show(seqlen_k: int, dtype: str, causal: bool) -> None:
    """As the definition has it, in out and LSE, wherever they are among the blocks of keys."""
    seqlen_q = seqlen_k if causal else 3
    mask = Mask.causal if causal else Mask.none
    case = AttnCase(seqlen_q, seqlen_k, (2, 2), 16, mask, dtype)
    for name, value in itertools.product("qk", (math.nan, math.inf, -math.inf)):
        for row in {0, seqlen_k // 2, seqlen_k - 1}:
            x = make_inputs(case, "cpu")
            broken = getattr(x, name)
            broken[0, row % broken.shape[1], 1] = value * torch.ones(16)
            if not math.isnan(value):  # scores of inf or -inf, not of inf - inf
                x.q.abs_()
                x.k.abs_().neg_()
            out, lse, _ = flash_attn_func(x.q, x.k, x.v, causal=causal, return_attn_probs=True)
            want = attention_oracle(x.q, x.k, x.v, scale=case.scale, causal=causal)
            for ours, expected in ((out, want.out), (lse, want.lse)):
                assert_same_specials(name, ours, expected, (case, value, row))


def test_a_sum_that_overflows_is_no_inf() -> None:
    x = torch.full((1, 1200, 2, 8), 60.0, dtype=torch.float16)
    assert x.sum(1).isinf().all() and torch_kernel._numbers([torch_kernel._broken(x, 1)]) is None
    x[0, 7, 1, 2] = math.inf
    assert torch_kernel._broken(x, 2).tolist() == [[False, True]]


def test_bf16_products_are_torchs_where_the_processor_has_them() -> None:
    """Whether it has them is asked once; the inputs of the kernel tell which way was taken."""
    q = torch.zeros(1, 300, 2, 8, dtype=torch.bfloat16)
    want = torch.bfloat16 if torch_kernel._multiplies_bf16() else torch.float32
    assert torch_kernel._forward_dtype(q, q) == want
    assert torch_kernel._forward_dtype(q, q[:, :255]) == torch.float32
    assert torch_kernel._forward_dtype(q.half(), q.half()) == torch.float32
    assert torch_kernel._forward_dtype(q.double(), q.double()) == torch.float64


PEAK = """
import resource
import torch
from flash_attn import flash_attn_func

torch.set_num_threads(1)

def run(seqlen_q, seqlen_k, heads, heads_kv):
    q = torch.randn(1, seqlen_q, heads, 64, dtype={dtype}).requires_grad_()
    kv = torch.randn(2, 1, seqlen_k, heads_kv, 64, dtype={dtype})
    k, v = (t.requires_grad_() for t in kv)
    result = flash_attn_func(q, k, v, causal={causal}, {options})
    out, extra = (result, 0) if torch.is_tensor(result) else (result[0], result[1].sum())
    (out.sum() + extra).backward()

run(300, 300, {heads})
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
run({seqlen_q}, 8192, {heads})
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.parametrize(
    ("dtype", "causal", "seqlen_q", "heads", "options"),
    [
        ("torch.float32", True, 8192, "1, 1", ""),
        ("torch.bfloat16", False, 8192, "1, 1", ""),
        ("torch.float32", True, 8000, "2, 1", "return_attn_probs=True"),
        ("torch.float32", False, 8192, "1, 1", "window_size=(900, 100), softcap=9.0"),
        ("torch.float32", True, 8192, "1, 1", "dropout_p=0.1, alibi_slopes=torch.ones(1)"),
    ],
)
def test_memory_is_linear_in_the_sequence_length(
    dtype: str, causal: bool, seqlen_q: int, heads: str, options: str
) -> None:
    """8192 x 8192 scores alone would take 256 MiB in fp32; all tensors of the call take 30."""
    code = PEAK.format(dtype=dtype, causal=causal, seqlen_q=seqlen_q, heads=heads, options=options)
    grown_kib = int(run_python(code).split()[-1])
    assert grown_kib < 128 * 1024, f"peak memory grew by {grown_kib // 1024} MiB"


def test_work_is_linear_in_the_window(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles that no query sees are not computed, in either pass."""
    visited = 0
    tile = scores.Scores.tile

    def counted(self: scores.Scores, *arguments: object) -> tuple:
        nonlocal visited
        result = tile(self, *arguments)
        visited += result[0].numel()
        return result

    monkeypatch.setattr(scores.Scores, "tile", counted)
    seqlen, left, right = 5000, 300, 50
    inputs = [torch.randn(1, seqlen, 1, 4, requires_grad=True) for _ in range(3)]
    out = flash_attn_func(*inputs, window_size=(left, right))
    keys = left + right + 1 + scores.BLOCK_M + 16  # of a block of queries
    assert seqlen * (left + right) < visited < seqlen * keys
    visited = 0
    torch.autograd.grad(out.sum(), inputs)
    queries = left + right + 1 + scores.BLOCK_N + scores.BLOCK_M + 16  # of a block of keys
    assert seqlen * (left + right) < visited < seqlen * queries


def unfused(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> torch.Tensor:
    """softmax(Q K^T) V with ordinary operations, in fp32 as the backend.

    Processors with bf16 instructions are faster where scores and weights are rounded to bf16.
    """
    dtype = q.dtype
    q, k, v = (t.transpose(1, 2).float() for t in (q, k, v))
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(2, 3)
    if causal:
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        scores = scores.masked_fill(hidden, -torch.inf)
    return (scores.softmax(-1) @ v).transpose(1, 2).to(dtype)


def cpu_seconds(function: Callable[..., torch.Tensor], *inputs: torch.Tensor) -> float:
    """Of this process, all threads together: what else the machine does is not in it."""
    begin = time.process_time()
    out = function(*inputs)
    torch.autograd.grad(out, inputs, torch.ones_like(out))
    return time.process_time() - begin


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("threads", sorted({1, os.cpu_count() or 1}))
def test_speed_at_4096_tokens(causal: bool, dtype: torch.dtype, threads: int) -> None:
    """Forward + backward no slower than unfused attention: best of up to 6 interleaved rounds."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        compare_speed(causal, dtype)
    finally:
        torch.set_num_threads(before)


def compare_speed(causal: bool, dtype: torch.dtype) -> None:
    inputs = [torch.randn(1, 4096, 2, 64, dtype=dtype, requires_grad=True) for _ in range(3)]
    ours = theirs = math.inf
    for _ in range(6):
        theirs = min(theirs, cpu_seconds(lambda *qkv: unfused(*qkv, causal), *inputs))
        ours = min(ours, cpu_seconds(lambda *qkv: flash_attn_func(*qkv, causal=causal), *inputs))
        if ours <= theirs:
            return
    pytest.fail(f"flash_attn_func {ours:.2f} s, unfused {theirs:.2f} s of CPU time")


def test_threads_do_not_change_the_result_much() -> None:
    case = AttnCase(600, 700, (4, 2), 64, Mask.causal, "fp32")
    x = make_inputs(case, "cpu")
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2):
            torch.set_num_threads(count)
            results.append(flash_attn_func(x.q, x.k, x.v, causal=True))
    finally:
        torch.set_num_threads(threads)
    torch.testing.assert_close(*results)
