"""Sequences of different lengths in one tensor: lengths, unused rows, pages, checks of the data."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import cycle, product
from typing import Any

import numpy as np
import pytest
import torch
from cases import (
    Alibi,
    Mask,
    VarlenCase,
    VarlenInputs,
    cuda_build,
    cumulative,
    everywhere,
    generator,
    make_alibi,
    make_dlse,
    make_varlen_inputs,
    on_devices,
)
from harness import (
    assert_bitwise,
    assert_nearly,
    assert_same_result,
    capture,
    check_varlen,
    features_of,
    leaves,
    peek_rng_state,
    poison,
    run_flash,
    run_varlen,
    varlen_keep,
)
from oracle import (
    Result,
    assert_probs,
    attention_oracle,
    attention_peer,
    check_result,
    per_sequence,
)
from philox import keep_mask
from torch import Tensor

from flash_attn import flash_attn_varlen_func
from flash_attn._head_dims import HEAD_DIMS as DIMS
from flash_attn.flash_attn_interface import _flash_attn_varlen_forward

HALF = ("fp16", "bf16")
Lengths = tuple[int, ...]
BORDERS: Lengths = (31, 32, 33, 63, 64, 65, 95, 97, 127, 128, 129, 16, 1)
MANY: Lengths = tuple((7 * n) % 23 for n in range(60))
LENGTHS: tuple[tuple[Lengths, Lengths], ...] = (
    ((0, 5, 0, 130, 0), (0, 5, 0, 130, 0)),
    ((0, 5, 0, 130, 0), (7, 0, 3, 64, 300)),
    ((40, 5, 20, 130, 9), (0, 5, 0, 200, 0)),
    ((1, 1, 1, 1), (100, 1, 257, 0)),
    ((1, 200, 3), (1, 1, 1)),
    (BORDERS, BORDERS),
    (BORDERS, BORDERS[::-1]),
    ((257,), (257,)),
    ((128, 128, 128), (128, 128, 128)),
    (MANY, MANY),
    (MANY, tuple((5 * n + 3) % 31 for n in range(60))),
    ((700, 3, 1, 0, 20, 5), (700, 3, 1, 0, 20, 5)),
    ((2, 1, 9), (1000, 129, 63)),
)
UNUSED = ((0, 0), (13, 0), (0, 29), (200, 300), (1, 1))
GROUPS = ((2, 1), (4, 2), (3, 3), (6, 1), (1, 1))


def varlen_cases() -> Iterator[VarlenCase]:
    """All lengths on every kernel; heads, dtypes, unused rows and masks take turns."""
    heads, dtype, unused, mask = (
        cycle(x) for x in (GROUPS, HALF, UNUSED, (Mask.causal, Mask.none, Mask.causal))
    )
    for (lengths_q, lengths_k), head_dim in product(LENGTHS, DIMS):
        for _ in range(2):
            shape = (next(heads), head_dim, next(mask), next(dtype), next(unused))
            yield VarlenCase(lengths_q, lengths_k, *shape)
    for head_dim in (1, 33, 40, 59, 72, 111, 160, 200, 248):
        shape = (next(heads), head_dim, next(mask), next(dtype), next(unused))
        yield VarlenCase((0, 65, 3, 130), (9, 100, 3, 70), *shape)


def cpu_varlen_cases() -> Iterator[VarlenCase]:
    dtype = cycle(("fp32", "bf16", "fp32", "fp64", "fp16"))
    for index, case in enumerate(varlen_cases()):
        if index % 3 == 1:
            yield case.but(dtype=next(dtype))


def assert_unused_rows_are_clean(case: VarlenCase, ours: Result) -> None:
    """Exactly 0, and LSE +inf: in rows of no sequence, and of those with no keys or queries."""
    begin_q = begin_k = 0
    for sq, sk in (*zip(case.lengths_q, case.lengths_k), case.unused):
        last = begin_q == sum(case.lengths_q) and begin_k == sum(case.lengths_k)
        rows, cols = slice(begin_q, begin_q + sq), slice(begin_k, begin_k + sk)
        if sk == 0 or last:
            assert not ours.out[rows].any(), f"out, rows {rows}; case {case}"
            assert (ours.lse[:, rows] == torch.inf).all(), f"lse, rows {rows}; case {case}"
            assert ours.dq is None or not ours.dq[rows].any(), f"dq, rows {rows}; case {case}"
        if ours.dk is not None and (sq == 0 or last):
            assert not ours.dk[cols].any(), f"dk, rows {cols}; case {case}"
            assert not ours.dv[cols].any(), f"dv, rows {cols}; case {case}"
        begin_q, begin_k = begin_q + sq, begin_k + sk


@on_devices(cpu=cpu_varlen_cases(), cuda=varlen_cases())
def test_varlen_matches_oracle(device: str, case: VarlenCase) -> None:
    """Rows of no sequence hold NaN, and their results are 0, LSE +inf."""
    ours = check_varlen(case, make_varlen_inputs(case, device))
    assert_unused_rows_are_clean(case, ours)


FEATURES = [
    VarlenCase((0, 5, 0, 130, 0), (7, 9, 3, 200, 300), (4, 2), 64, Mask.causal, window=(40, 0)),
    VarlenCase(BORDERS, BORDERS[::-1], (2, 1), 128, Mask.none, "fp16", (5, 9), window=(20, 30)),
    VarlenCase((1, 200, 30), (65, 100, 400), (2, 2), 96, Mask.causal, softcap=3.0),
    VarlenCase((70, 200, 0, 30), (65, 100, 8, 400), (4, 2), 40, Mask.none, alibi=Alibi.per_head),
    VarlenCase(BORDERS, BORDERS, (4, 2), 256, Mask.causal, alibi=Alibi.per_batch),
    VarlenCase(MANY, MANY, (2, 1), 32, Mask.causal, "fp16", (100, 100), dropout=0.17),
    VarlenCase((150, 20, 0, 30), (100, 90, 3, 40), (3, 1), 192, Mask.none, dropout=0.3),
    VarlenCase(
        *((33, 160, 0, 80), (40, 220, 5, 60), (6, 2), 64, Mask.causal, "bf16", (9, 70)),
        *((50, 10), 5.0, Alibi.per_batch, 0.1),
    ),
    VarlenCase(
        *((130, 1, 64), (130, 300, 20), (2, 1), 128, Mask.none, "fp16", (9, 70)),
        *((50, 10), 5.0, Alibi.per_head, 0.1),
    ),
]
features = everywhere(*FEATURES)


@features
@pytest.mark.parametrize("deterministic", [False, True], ids=["default", "deterministic"])
@pytest.mark.parametrize("with_dlse", [False, True], ids=["", "dlse"])
def test_varlen_with_features(
    device: str, case: VarlenCase, deterministic: bool, with_dlse: bool
) -> None:
    """Also: the gradient of LSE, NaN in the rows of no sequence; the deterministic backward."""
    dlse = make_dlse(case, device) if with_dlse else None
    if dlse is not None and case.unused[0]:
        dlse[:, sum(case.lengths_q) :] = torch.nan
    x = make_varlen_inputs(case, device)
    ours = check_varlen(case, x, dlse=dlse, deterministic=deterministic)
    assert_unused_rows_are_clean(case, ours)


@everywhere(FEATURES[1], FEATURES[3], FEATURES[7])
@pytest.mark.parametrize("scale", [0.0, -0.3, 1.0], ids=str)
def test_softmax_scale(device: str, case: VarlenCase, scale: float) -> None:
    check_varlen(case, make_varlen_inputs(case, device), scale=scale)


@everywhere(FEATURES[0], FEATURES[7])
def test_only_requested_gradients_come(device: str, case: VarlenCase) -> None:
    x = make_varlen_inputs(case, device)
    options = features_of(case, device) | dict(causal=case.causal)
    want = run_varlen(x, **options)
    lengths = (x.cu_seqlens_q, x.cu_seqlens_k, x.max_seqlen_q, x.max_seqlen_k)
    for wanted in product((False, True), repeat=3):
        inputs = [t.detach().requires_grad_(w) for t, w in zip((x.q, x.k, x.v), wanted)]
        torch.manual_seed(0)
        out = flash_attn_varlen_func(*inputs, *lengths, **options)
        assert out.requires_grad == any(wanted)
        if not any(wanted):
            continue
        out.backward(x.dout)
        for name, t, w in zip(("dq", "dk", "dv"), inputs, wanted):
            assert (t.grad is not None) == w, f"{name}, wanted {wanted}; case {case}"
            if w:
                assert_nearly(name, t.grad, getattr(want, name), case)


@everywhere(FEATURES[0])
@pytest.mark.parametrize("which", range(6), ids=["q", "k", "v", "cu_q", "cu_k", "out"])
def test_saved_tensor_changed_in_place_raises(device: str, case: VarlenCase, which: int) -> None:
    x = make_varlen_inputs(case, device)
    q, k, v = (t + 0 for t in leaves(x.q, x.k, x.v))
    cu_q, cu_k = x.cu_seqlens_q, x.cu_seqlens_k
    out = flash_attn_varlen_func(q, k, v, cu_q, cu_k, x.max_seqlen_q, x.max_seqlen_k)
    with torch.no_grad():
        (q, k, v, cu_q, cu_k, out)[which].mul_(1)
    with pytest.raises(RuntimeError, match="modified (by an )?inplace"):
        out.backward(x.dout)


@everywhere(FEATURES[7])
def test_no_grad_and_inference_mode_record_nothing(device: str, case: VarlenCase) -> None:
    x = make_varlen_inputs(case, device)
    options = features_of(case, device) | dict(causal=case.causal)
    lengths = (x.cu_seqlens_q, x.cu_seqlens_k, x.max_seqlen_q, x.max_seqlen_k)
    results = []
    for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        torch.manual_seed(3)
        with mode():
            out = flash_attn_varlen_func(*leaves(x.q, x.k, x.v), *lengths, **options)
        assert out.requires_grad == (mode is torch.enable_grad)
        results.append(out.detach().clone())
    assert_bitwise("out", results[1], results[0], case)
    assert_bitwise("out", results[2], results[0], case)


EMPTY = [
    VarlenCase(lengths_q, lengths_k, (4, 2), head_dim, Mask.causal, unused=unused)
    for lengths_q, lengths_k, unused in (
        ((0, 0, 0), (0, 0, 0), (0, 0)),
        ((0, 0, 0), (0, 0, 0), (70, 90)),
        ((0,), (0,), (0, 0)),
        ((0, 0), (5, 70), (0, 0)),
        ((5, 70), (0, 0), (0, 0)),
        ((5, 70), (0, 0), (3, 0)),
        ((0, 0), (5, 70), (0, 300)),
    )
    for head_dim in (64, 33, 128)
]


@everywhere(*EMPTY)
@pytest.mark.parametrize("deterministic", [False, True], ids=["default", "deterministic"])
def test_nothing_to_attend_to(device: str, case: VarlenCase, deterministic: bool) -> None:
    """No tokens at all, no queries, or no keys: zeros, LSE +inf, and no launch error."""
    x = make_varlen_inputs(case, device)
    ours = run_varlen(x, causal=True, deterministic=deterministic)
    assert ours.out.shape == case.q_shape and not ours.out.any()
    assert ours.lse.shape == (case.heads[0], case.q_shape[0]) and ours.lse.dtype == torch.float32
    assert (ours.lse == torch.inf).all()
    for grad, shape in (
        (ours.dq, case.q_shape),
        (ours.dk, case.kv_shape),
        (ours.dv, case.kv_shape),
    ):
        assert grad.shape == shape and not grad.any(), case


@on_devices(
    cpu=[VarlenCase((3, 0) * 1000, (5, 4) * 1000, (2, 1), 16, Mask.causal, "fp32")],
    cuda=[
        VarlenCase((3,) * 70_000, (5,) * 70_000, (2, 1), 64, Mask.causal),
        VarlenCase((3, 0) * 35_000, (5, 4) * 35_000, (1, 1), 128, Mask.none, "fp16"),
        VarlenCase((2, 2) * 35_000, (0, 4) * 35_000, (2, 2), 32, Mask.causal, window=(1, 0)),
        VarlenCase((3,) * 70_000, (5,) * 70_000, (2, 1), 64, Mask.causal, dropout=0.3),
    ],
)
@pytest.mark.parametrize("deterministic", [False, True], ids=["default", "deterministic"])
def test_70_000_sequences(device: str, case: VarlenCase, deterministic: bool) -> None:
    """Those with queries and keys, all of one shape, are a dense batch for the oracle."""
    x = make_varlen_inputs(case, device)
    options = features_of(case, device) | dict(causal=case.causal)
    ours = run_varlen(x, deterministic=deterministic, **options)
    pairs = list(zip(case.lengths_q, case.lengths_k))
    kinds = {pair for pair in pairs if all(pair)}
    assert len(kinds) == 1
    ((sq, sk),) = kinds
    full = [n for n, pair in enumerate(pairs) if all(pair)]
    ends_q, ends_k = np.cumsum(case.lengths_q), np.cumsum(case.lengths_k)

    def rows_of(ends: np.ndarray, length: int) -> Tensor:
        rows = (ends[full] - length)[:, None] + np.arange(length)
        return torch.from_numpy(rows).to(device)

    rows, cols = rows_of(ends_q, sq), rows_of(ends_k, sk)
    exact = options | dict(scale=case.scale)
    if case.dropout:
        exact["keep"] = keep_mask(
            *(ours.rng_state, full, case.heads[0], sq, sk, case.dropout, device)
        )
    dense = (x.q[rows], x.k[cols], x.v[cols], x.dout[rows])
    want, peer = attention_oracle(*dense, **exact), attention_peer(*dense, **exact)
    part = Result(ours.out[rows], ours.lse[:, rows].transpose(0, 1), ours.dq[rows])
    part.dk, part.dv = ours.dk[cols], ours.dv[cols]
    check_result(part, peer, want, case=case)
    if len(full) < len(pairs):
        others = torch.ones(len(x.q), dtype=torch.bool, device=device)
        others[rows.flatten()] = False
        assert not ours.out[others].any() and not ours.dq[others].any(), case
        assert (ours.lse[:, others] == torch.inf).all(), case
        others = torch.ones(len(x.k), dtype=torch.bool, device=device)
        others[cols.flatten()] = False
        assert not ours.dk[others].any() and not ours.dv[others].any(), case


@features
def test_each_sequence_is_what_it_is_alone(device: str, case: VarlenCase) -> None:
    """Against the dense function, sequence by sequence: the same but for the order of sums."""
    case = case.but(dropout=0.0)  # its masks have the sequences' numbers
    x, slopes = make_varlen_inputs(case, device), make_alibi(case, device)
    options = features_of(case, device) | dict(causal=case.causal, deterministic=True)
    ours = run_varlen(x, **options)
    cu_q, cu_k = x.cu_seqlens_q.tolist(), x.cu_seqlens_k.tolist()
    for n in range(0, case.batch, 1 + case.batch // 8):
        rows, cols = slice(cu_q[n], cu_q[n + 1]), slice(cu_k[n], cu_k[n + 1])
        if slopes is not None:
            options["alibi_slopes"] = slopes if slopes.dim() == 1 else slopes[n : n + 1]
        alone = run_flash(x.q[None, rows], x.k[None, cols], x.v[None, cols], **options)
        eps = 2 * torch.finfo(x.q.dtype).eps
        message = f"{case}, sequence {n}"
        assert_nearly("out", ours.out[rows], alone.out[0], message, eps=eps)
        assert_nearly("lse", ours.lse[:, rows], alone.lse[0], message, eps=1e-6)


@everywhere(
    VarlenCase((130,) * 4, (130,) * 4, (4, 2), 64, Mask.causal),
    VarlenCase((100,) * 3, (200,) * 3, (2, 1), 128, Mask.none, "fp16"),
    VarlenCase((90,) * 3, (70,) * 3, (2, 2), 96, Mask.causal, window=(30, 0)),
    VarlenCase((90,) * 3, (120,) * 3, (4, 2), 64, Mask.causal, dropout=0.2),
    VarlenCase((90,) * 3, (120,) * 3, (4, 2), 40, Mask.none, softcap=4.0, alibi=Alibi.per_batch),
)
def test_equal_lengths_are_a_dense_batch(device: str, case: VarlenCase) -> None:
    """Dropout too: sequence n draws what batch entry n draws."""
    x = make_varlen_inputs(case, device)
    options = features_of(case, device) | dict(causal=case.causal, deterministic=True)
    ours = run_varlen(x, **options)
    q, k, v, dout = (t.unflatten(0, (case.batch, -1)) for t in (x.q, x.k, x.v, x.dout))
    want = run_flash(q, k, v, dout, **options)
    eps = 2 * torch.finfo(x.q.dtype).eps
    for name in ("out", "dq", "dk", "dv"):
        assert_nearly(name, getattr(ours, name), getattr(want, name).flatten(0, 1), case, eps=eps)
    lse = want.lse.transpose(0, 1).flatten(1)
    assert_nearly("lse", ours.lse, lse, case, eps=1e-6)


# The last rows of a sequence share a warp with the first ones of the next, over two key blocks.
SHARED_WARPS = [VarlenCase((70, 200), (256, 200), (2, 1), d, Mask.none) for d in (64, 128, 256)]


@everywhere(*FEATURES, *SHARED_WARPS)
def test_sequences_do_not_mix(device: str, case: VarlenCase) -> None:
    """NaN and inf in one sequence change no bit of the others."""
    x = make_varlen_inputs(case, device)
    options = features_of(case, device) | dict(causal=case.causal, deterministic=True)
    want = run_varlen(x, **options)
    n = max(range(case.batch), key=lambda n: min(case.lengths_q[n], case.lengths_k[n]))
    rows = slice(*x.cu_seqlens_q[n : n + 2].tolist())
    cols = slice(*x.cu_seqlens_k[n : n + 2].tolist())
    bad = x.map(torch.clone)
    for t, part in ((bad.q, rows), (bad.dout, rows), (bad.k, cols), (bad.v, cols)):
        t[part] = torch.nan
        t[part][::2] = torch.inf
    ours = run_varlen(bad, **options)
    for result in (ours, want):
        for t, part in ((result.out, rows), (result.dq, rows), (result.dk, cols)):
            t[part] = 0
        result.dv[cols] = 0
        result.lse[:, rows] = 0
    assert_same_result(ours, want, case, dq_bitwise=True)


@everywhere(*(FEATURES[n] for n in (1, 3, 6, 7)))
def test_max_seqlen_may_be_a_tensor_and_larger_than_needed(device: str, case: VarlenCase) -> None:
    x = make_varlen_inputs(case, device)
    options = features_of(case, device) | dict(causal=case.causal, deterministic=True)
    want = run_varlen(x, **options)
    longest = x.max_seqlen_q, x.max_seqlen_k
    kinds: list[Callable[[int], Any]] = [
        torch.tensor,
        lambda n: torch.tensor(n, dtype=torch.int32),
        lambda n: torch.tensor(n, device=device),
        np.int64,
        lambda n: n + 200,
    ]
    for kind in kinds:
        y = replace(x, max_seqlen_q=kind(longest[0]), max_seqlen_k=kind(longest[1]))
        assert_same_result(run_varlen(y, **options), want, case, dq_bitwise=True)


OVERFLOW = [
    VarlenCase((76, 34, 146), (1, 1, 1), (5, 5), head_dim, mask, dtype)
    for head_dim, mask, dtype in product((*DIMS, 80), Mask, HALF)
]


@on_devices(cpu=[case.but(dtype="fp32") for case in OVERFLOW[::9]], cuda=OVERFLOW)
def test_one_key_for_many_queries(device: str, case: VarlenCase) -> None:
    """Upstream's overflow: columns past the only key got into the backward pass as NaN."""
    x = make_varlen_inputs(case, device)
    x.q, x.k, x.v = x.q * 3, x.k * 3, x.v * 3
    assert x.cu_seqlens_q.tolist() == [0, 76, 110, 256] and x.cu_seqlens_k.tolist() == [0, 1, 2, 3]
    for deterministic in (False, True):
        ours = check_varlen(case, x, deterministic=deterministic)
        for name in ("out", "dq", "dk", "dv"):
            assert getattr(ours, name).isfinite().all(), f"{name}; case {case}"


@features
def test_s_dmask_of_each_sequence(device: str, case: VarlenCase) -> None:
    case = case.but(dropout=case.dropout or 0.25)
    x, slopes = make_varlen_inputs(case, device), make_alibi(case, device)
    lengths = (x.cu_seqlens_q, x.cu_seqlens_k, x.max_seqlen_q, x.max_seqlen_k)
    options = features_of(case, device) | dict(causal=case.causal)
    torch.manual_seed(5)
    state = peek_rng_state(x.q, case.batch, case.heads[0])
    poison(device)
    _, _, probs = flash_attn_varlen_func(
        *(x.q, x.k, x.v, *lengths), return_attn_probs=True, **options
    )
    rounded = tuple(-(-n // 128) * 128 for n in lengths[2:])
    assert probs.shape == (case.batch, case.heads[0], *rounded) and probs.dtype == x.q.dtype
    cu_q, cu_k = x.cu_seqlens_q.tolist(), x.cu_seqlens_k.tolist()
    for n, keep in enumerate(varlen_keep(case, state, device)):
        q, k = x.q[None, cu_q[n] : cu_q[n + 1]], x.k[None, cu_k[n] : cu_k[n + 1]]
        of_n = slopes[n : n + 1] if slopes is not None and slopes.dim() == 2 else slopes
        assert_probs(case.sequence(n), q, k, probs[n : n + 1], keep, of_n)


# Pages, used keys, left padding: forward only, K and V rearranged for the oracle.


def paged(
    x: Tensor, cu_seqlens: Sequence[int], page_size: int, table: Tensor, blocks: int
) -> Tensor:
    """Rows of x in pages: (blocks, page_size, hk, d), NaN in all that no sequence uses."""
    pages = torch.full((blocks, page_size, *x.shape[1:]), torch.nan, dtype=x.dtype, device=x.device)
    for n in range(len(cu_seqlens) - 1):
        rows = x[cu_seqlens[n] : cu_seqlens[n + 1]]
        for index in range(-(-len(rows) // page_size)):
            part = rows[index * page_size : (index + 1) * page_size]
            pages[int(table[n, index]), : len(part)] = part
    return pages


def make_pages(case: VarlenCase, x: VarlenInputs, page_size: int) -> tuple[VarlenInputs, Tensor]:
    """K and V in pages of a shuffled table, whose entries without a page are out of range."""
    lengths, device = case.lengths_k, x.k.device
    counts = [-(-n // page_size) for n in lengths]
    blocks = sum(counts) + 3
    gen = generator(case, "cpu", salt=page_size)
    numbers = iter(torch.randperm(blocks, generator=gen).tolist())
    table = torch.full((case.batch, max(counts) + 2), 2**30, dtype=torch.int32)
    table[:, 1::2] = -1
    for n, count in enumerate(counts):
        for index in range(count):
            table[n, index] = next(numbers)
    ends = x.cu_seqlens_k.tolist()
    k, v = (paged(t, ends, page_size, table, blocks) for t in (x.k, x.v))
    return replace(x, k=k, v=v), table.to(device)


PAGED = [
    VarlenCase((0, 5, 0, 130, 1), (7, 40, 0, 300, 513), (4, 2), 64, Mask.causal),
    VarlenCase((1, 1, 1, 1), (600, 1, 63, 257), (6, 2), 128, Mask.causal, "fp16", (5, 0)),
    VarlenCase((100, 64), (90, 513), (2, 2), 96, Mask.none),
    VarlenCase((100, 64, 3), (90, 500, 33), (4, 1), 256, Mask.causal, "bf16", window=(70, 0)),
    VarlenCase((100, 64, 3), (90, 500, 33), (2, 1), 40, Mask.none, "fp16", window=(30, 90)),
    VarlenCase(
        *((33, 160, 9), (260, 220, 60), (6, 2), 64, Mask.causal, "bf16", (9, 0)),
        *((50, 10), 5.0, Alibi.per_batch),
    ),
    VarlenCase((65, 200), (300, 100), (2, 1), 192, Mask.causal, softcap=2.0),
    VarlenCase((65, 200), (300, 100), (2, 1), 32, Mask.none, alibi=Alibi.per_head),
    VarlenCase((0, 65, 3, 130), (9, 100, 0, 170), (4, 2), 59, Mask.causal, "fp16", (5, 9)),
    VarlenCase((1, 1, 40), (600, 1, 63), (2, 1), 33, Mask.none, window=(90, 9)),
]


def check_forward(
    case: VarlenCase, dense: VarlenInputs, ours: Result, features: dict[str, Any] | None = None
) -> None:
    """out and lse against the oracle on `dense`, whose K and V are one sequence after another."""
    if features is None:
        features = features_of(case, dense.q.device)
    exact = dict(
        scale=case.scale,
        causal=case.causal,
        cu_seqlens_q=dense.cu_seqlens_q.tolist(),
        cu_seqlens_k=dense.cu_seqlens_k.tolist(),
    )
    qkv = dense.q, dense.k, dense.v
    want = per_sequence(attention_oracle, *qkv, **exact, **features)
    peer = per_sequence(attention_peer, *qkv, **exact, **features)
    check_result(ours, peer, want, case=case)


@everywhere(*PAGED)
@pytest.mark.parametrize("page_size", [16, 48, 64, 256, 1024])
def test_pages_of_any_multiple_of_16(device: str, case: VarlenCase, page_size: int) -> None:
    """Pages that no sequence uses hold NaN; table entries that are not needed are out of range."""
    x = make_varlen_inputs(case, device)
    pages, table = make_pages(case, x, page_size)
    options = features_of(case, device) | dict(causal=case.causal)
    ours = run_varlen(pages, backward=False, block_table=table, **options)
    check_forward(case, x, ours)
    want = run_varlen(x, backward=False, **options)
    eps = 2 * torch.finfo(x.q.dtype).eps
    assert_nearly("out", ours.out, want.out, case, eps=eps)
    assert_nearly("lse", ours.lse, want.lse, case, eps=1e-6)


@everywhere(*PAGED[:4])
def test_pages_may_be_shared_and_strided(device: str, case: VarlenCase) -> None:
    """Two sequences with one prefix; K and V as halves of one buffer; a table with a row stride."""
    case = case.but(lengths_q=(70, 1, 33), lengths_k=(150, 64, 130), unused=(0, 0))
    x = make_varlen_inputs(case, device)
    for t in (x.k, x.v):
        t[150 + 64 :][:128] = t[:128]  # sequence 2 begins as sequence 0 does
    pages, table = make_pages(case, x, 64)
    table[2, :2] = table[0, :2]
    buffer = torch.stack([pages.k, pages.v], dim=2)  # (blocks, page, 2, hk, d)
    wide = torch.full((case.batch, 2 * table.shape[1]), 2**30, dtype=torch.int32, device=device)
    strided = wide[:, : table.shape[1]].copy_(table)
    options = features_of(case, device) | dict(causal=case.causal)
    shared = replace(pages, k=buffer[:, :, 0], v=buffer[:, :, 1])
    ours = run_varlen(shared, backward=False, block_table=strided, **options)
    check_forward(case, x, ours)


@pytest.mark.cuda
def test_of_a_pool_only_used_pages_are_copied(device: str) -> None:
    """Where head_dim is no multiple of 8, and the kernels need a copy."""
    pool = torch.zeros(1 << 13, 64, 2, 60, dtype=torch.bfloat16, device=device)  # 126 MB
    q = torch.zeros(3, 4, 60, dtype=pool.dtype, device=device)
    lengths = int32([0, 1, 3], device), int32([0, 90, 120], device)
    table = int32([5, 8000, 17, 3], device).view(2, 2)

    def attend() -> Tensor:
        return flash_attn_varlen_func(q, pool, pool, *lengths, 2, 90, block_table=table)

    attend()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    assert attend().shape == q.shape
    assert torch.cuda.max_memory_allocated(device) - before < pool.nbytes / 8


def run_forward(case: VarlenCase, x: VarlenInputs, **options: Any) -> Result:
    """The internal forward, which clients call for seqused_k and leftpad_k."""
    features = features_of(case, x.q.device)
    torch.manual_seed(9)
    poison(x.q.device)
    out, lse, _, rng_state = _flash_attn_varlen_forward(
        *(x.q, x.k, x.v, x.cu_seqlens_q, x.cu_seqlens_k, x.max_seqlen_q, x.max_seqlen_k),
        features.get("dropout_p", 0.0),
        case.scale,
        case.causal,
        window_size_left=case.window[0],
        window_size_right=case.window[1],
        softcap=case.softcap,
        alibi_slopes=features.get("alibi_slopes"),
        **options,
    )
    return Result(out, lse, rng_state=rng_state)


def int32(values: Sequence[int], device: str) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)


def only_keys(
    case: VarlenCase, x: VarlenInputs, begins: Sequence[int], ends: Sequence[int]
) -> tuple[VarlenCase, VarlenInputs]:
    """The keys from begins[n] to ends[n] of each sequence, one sequence after another."""
    cu = x.cu_seqlens_k.tolist()
    rows = [r for n, (a, b) in enumerate(zip(begins, ends)) for r in range(cu[n] + a, cu[n] + b)]
    lengths = tuple(b - a for a, b in zip(begins, ends))
    index = torch.tensor(rows, dtype=torch.int64, device=x.k.device)
    cu_k = cumulative(lengths, x.k.device)
    dense = replace(x, k=x.k[index], v=x.v[index], cu_seqlens_k=cu_k, max_seqlen_k=max(lengths))
    return case.but(lengths_k=lengths, unused=(case.unused[0], 0)), dense


PARTS = [
    VarlenCase((40, 5, 0, 130, 20), (70, 33, 9, 200, 64), (4, 2), 64, Mask.causal),
    VarlenCase((40, 1, 3, 130, 1), (70, 33, 9, 200, 64), (2, 2), 128, Mask.none, "fp16", (3, 0)),
    VarlenCase((40, 5, 9, 130, 20), (70, 33, 9, 200, 64), (4, 2), 96, Mask.causal, window=(30, 9)),
    VarlenCase((40, 5, 9, 130, 20), (70, 33, 9, 200, 64), (3, 1), 256, alibi=Alibi.per_batch),
    VarlenCase((40, 5, 9, 130, 20), (70, 33, 9, 200, 64), (2, 1), 40, Mask.causal, softcap=2.0),
    VarlenCase((40, 5, 9, 130, 20), (70, 33, 9, 200, 64), (2, 1), 32, Mask.causal, dropout=0.3),
]
USED = (70, 0, 5, 129, 63)
LEFTPAD = (1, 0, 4, 129, 17)


def fill_beside(x: VarlenInputs, begins: Sequence[int], ends: Sequence[int]) -> VarlenInputs:
    """NaN in all keys that do not count."""
    cu = x.cu_seqlens_k.tolist()
    k, v = x.k.clone(), x.v.clone()
    for n, (a, b) in enumerate(zip(begins, ends)):
        for t in (k, v):
            t[cu[n] : cu[n] + a] = torch.nan
            t[cu[n] + b : cu[n + 1]] = torch.nan
    return replace(x, k=k, v=v)


@everywhere(*(case for case in PARTS if case.head_dim % 8 == 0))
@pytest.mark.parametrize(
    ("seqused", "leftpad"),
    [(USED, None), (None, LEFTPAD), ((70, 33, 9, 190, 40), LEFTPAD), ((1, 0, 4, 129, 17), LEFTPAD)],
    ids=["seqused", "leftpad", "both", "nothing_left"],
)
@pytest.mark.parametrize("page_size", [None, 16, 64], ids=["", "pages_of_16", "pages_of_64"])
def test_used_keys_and_left_padding(
    device: str,
    case: VarlenCase,
    seqused: Sequence[int] | None,
    leftpad: Sequence[int] | None,
    page_size: int | None,
) -> None:
    """The keys that count are at the same place for all masks; the others may hold NaN."""
    if page_size is not None:
        case = case.but(dropout=0.0)
    x = make_varlen_inputs(case, device)
    begins = leftpad or (0,) * case.batch
    ends = seqused or case.lengths_k
    part, dense = only_keys(case, x, begins, ends)
    x = fill_beside(x, begins, ends)
    options: dict[str, Tensor] = {}
    if seqused is not None:
        options["seqused_k"] = int32(seqused, device)
    if leftpad is not None:
        options["leftpad_k"] = int32(leftpad, device)
    if page_size is not None:
        x, options["block_table"] = make_pages(case, x, page_size)
    ours = run_forward(case, x, **options)
    slopes = make_alibi(case, device)
    features = features_of(part, device)
    if slopes is not None:
        features["alibi_slopes"] = slopes
    if case.dropout:
        features["keep"] = varlen_keep(part, ours.rng_state, device)
    check_forward(case, dense, ours, features)


@everywhere(FEATURES[1], FEATURES[7].but(dropout=0.0))
def test_zero_tensors_changes_no_valid_row(device: str, case: VarlenCase) -> None:
    x = make_varlen_inputs(case, device)
    want, ours = run_forward(case, x), run_forward(case, x, zero_tensors=True)
    used = sum(case.lengths_q)
    assert_bitwise("out", ours.out, want.out, case)
    assert_bitwise("lse", ours.lse[:, :used], want.lse[:, :used], case)
    assert ours.out[used:].numel() and not ours.out[used:].any(), case


@everywhere(VarlenCase((40, 5), (70, 33), (2, 1), 64))
def test_gradients_do_not_flow_to_pages(device: str, case: VarlenCase) -> None:
    """Paged K and V are a cache: the backward pass says so rather than give something wrong."""
    x = make_varlen_inputs(case, device)
    pages, table = make_pages(case, x, 16)
    inputs = leaves(pages.q, pages.k, pages.v)
    lengths = (x.cu_seqlens_q, x.cu_seqlens_k, x.max_seqlen_q, x.max_seqlen_k)
    with pytest.raises(RuntimeError, match="block_table|paged"):
        flash_attn_varlen_func(*inputs, *lengths, block_table=table).backward(x.dout)


# Checks.  Those of shapes and dtypes are always made; those of the data need a switch on CUDA.

RIGHT = VarlenCase((40, 5, 70), (33, 0, 90), (2, 1), 64, unused=(5, 6))


def call(x: VarlenInputs, **changes: Any) -> Tensor:
    arguments = dict(
        q=x.q,
        k=x.k,
        v=x.v,
        cu_seqlens_q=x.cu_seqlens_q,
        cu_seqlens_k=x.cu_seqlens_k,
        max_seqlen_q=x.max_seqlen_q,
        max_seqlen_k=x.max_seqlen_k,
    )
    return flash_attn_varlen_func(**(arguments | changes))


@everywhere(RIGHT)
@pytest.mark.parametrize("name", ["cu_seqlens_q", "cu_seqlens_k"])
def test_cu_seqlens_of_a_wrong_kind_are_refused(device: str, case: VarlenCase, name: str) -> None:
    x = make_varlen_inputs(case, device)
    right = getattr(x, name)
    wrong = {
        "dtype int32": right.long(),
        "contiguous": right.repeat_interleave(2)[::2],
        "shape": right[None],
    }
    for word, value in wrong.items():
        with pytest.raises(RuntimeError, match=f"{name} must.*{word}"):
            call(x, **{name: value})
    with pytest.raises(RuntimeError, match=f"{name}|cu_seqlens_k"):
        call(x, **{name: right[:-1]})
    with pytest.raises(RuntimeError, match="batch size must be positive"):
        call(x, cu_seqlens_q=right[:1], cu_seqlens_k=right[:1])
    if device == "cuda":
        with pytest.raises(RuntimeError, match=name):
            call(x, **{name: right.cpu()})


WRONG_DATA: list[tuple[str, dict[str, Any], str]] = [
    ("q_does_not_start_at_0", dict(cu_seqlens_q=[1, 40, 45, 115]), "cu_seqlens_q"),
    ("q_is_not_monotonic", dict(cu_seqlens_q=[0, 45, 40, 115]), "cu_seqlens_q"),
    ("q_is_negative", dict(cu_seqlens_q=[0, -5, 45, 115]), "cu_seqlens_q"),
    ("q_ends_beyond_the_buffer", dict(cu_seqlens_q=[0, 40, 45, 121]), "cu_seqlens_q"),
    ("k_does_not_start_at_0", dict(cu_seqlens_k=[3, 33, 33, 123]), "cu_seqlens_k"),
    ("k_is_not_monotonic", dict(cu_seqlens_k=[0, 33, 32, 123]), "cu_seqlens_k"),
    ("k_ends_beyond_the_buffer", dict(cu_seqlens_k=[0, 33, 33, 130]), "cu_seqlens_k"),
    ("max_seqlen_q_is_too_small", dict(max_seqlen_q=69), "max_seqlen_q"),
    ("max_seqlen_k_is_too_small", dict(max_seqlen_k=89), "max_seqlen_k"),
]


@pytest.fixture
def data_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASH_ATTN_CHECK_DEVICE_DATA", "1")


@everywhere(RIGHT)
@pytest.mark.parametrize(
    ("changes", "word"), [w[1:] for w in WRONG_DATA], ids=[w[0] for w in WRONG_DATA]
)
def test_wrong_data_is_refused(
    device: str, case: VarlenCase, changes: dict[str, Any], word: str, data_checks: None
) -> None:
    x = make_varlen_inputs(case, device)
    call(x)
    changes = {n: int32(v, device) if isinstance(v, list) else v for n, v in changes.items()}
    with pytest.raises(RuntimeError, match=word):
        call(x, **changes)


@everywhere(RIGHT)
def test_wrong_pages_and_lengths_are_refused(
    device: str, case: VarlenCase, data_checks: None
) -> None:
    x = make_varlen_inputs(case, device)
    pages, table = make_pages(case, x, 16)
    call(pages, block_table=table)
    for value in (-1, pages.k.shape[0], 2**30):
        bad = table.clone()
        bad[2, 5] = value  # the last page of the last sequence
        with pytest.raises(RuntimeError, match="block_table"):
            call(pages, block_table=bad)
    with pytest.raises(RuntimeError, match="block_table"):
        call(pages, block_table=table[:, :5].contiguous())
    for name, value in (
        ("seqused_k", [33, 0, 91]),
        ("seqused_k", [-1, 0, 90]),
        ("leftpad_k", [34, 0, 0]),
        ("leftpad_k", [0, -1, 0]),
    ):
        with pytest.raises(RuntimeError, match=name):
            run_forward(case, x, **{name: int32(value, device)})
    run_forward(case, x, seqused_k=int32([33, 0, 90], device))
    run_forward(case, x, leftpad_k=int32([33, 0, 90], device))


@pytest.mark.cuda
@on_devices(cuda=[RIGHT, *(case for case in FEATURES if case.head_dim % 8 == 0)])
def test_calls_do_not_synchronise_without_the_checks(device: str, case: VarlenCase) -> None:
    x = make_varlen_inputs(case, device)
    q, k, v = leaves(x.q, x.k, x.v)
    options = features_of(case, device) | dict(causal=case.causal)
    lengths = (x.cu_seqlens_q, x.cu_seqlens_k, x.max_seqlen_q, x.max_seqlen_k)
    flash_attn_varlen_func(q, k, v, *lengths, **options).backward(x.dout)
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for deterministic in (False, True):
            out = flash_attn_varlen_func(q, k, v, *lengths, deterministic=deterministic, **options)
            out.backward(x.dout)
    finally:
        torch.cuda.set_sync_debug_mode(before)


@pytest.mark.cuda
@on_devices(cuda=FEATURES)
def test_cuda_graph_takes_new_lengths(device: str, case: VarlenCase) -> None:
    """Lengths are data: a recorded call serves others, up to the recorded maximum."""
    assert cuda_build() is not None
    case = case.but(dropout=0.0)
    x = make_varlen_inputs(case, device)
    fixed = replace(x.map(torch.clone), cu_seqlens_q=x.cu_seqlens_q.clone())
    fixed.cu_seqlens_k = x.cu_seqlens_k.clone()
    options = features_of(case, device) | dict(causal=case.causal, deterministic=True)

    def step() -> Result:
        q, k, v = leaves(fixed.q, fixed.k, fixed.v)
        lengths = (fixed.cu_seqlens_q, fixed.cu_seqlens_k, fixed.max_seqlen_q, fixed.max_seqlen_k)
        out, lse, _ = flash_attn_varlen_func(
            *(q, k, v, *lengths), return_attn_probs=True, **options
        )
        return Result(out.detach(), lse.detach(), *torch.autograd.grad(out, (q, k, v), fixed.dout))

    graph, recorded = capture(step)
    # The same lengths in another order, half of the query lengths shorter.
    lengths_q = [n // 2 if i % 2 else n for i, n in enumerate(case.lengths_q[::-1])]
    for new_q, new_k in (
        (case.lengths_q, case.lengths_k),
        (lengths_q, case.lengths_k[::-1]),
        ([0] * case.batch, case.lengths_k),
    ):
        fixed.cu_seqlens_q.copy_(cumulative(new_q))
        fixed.cu_seqlens_k.copy_(cumulative(new_k))
        graph.replay()
        want = run_varlen(fixed, **options)
        assert_same_result(recorded, want, f"{case}, lengths {new_q}", dq_bitwise=True)
