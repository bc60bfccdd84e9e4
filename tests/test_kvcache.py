"""flash_attn_with_kvcache: attention to a cache, appending, rotary, pages, splits, graphs.

Caches hold NaN in every row that is no key; entries of block tables that no row needs are out of
range.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import cycle, product
from typing import Any

import numpy as np
import pytest
import torch
from cases import Alibi, Mask, cuda_build, everywhere, on_devices
from decoding import (
    DecodeCase,
    DecodeInputs,
    check_caches,
    check_decode,
    expect,
    make_decode_inputs,
    packed,
    run_decode,
)
from harness import assert_bitwise, assert_nearly
from oracle import Result
from torch import Tensor

from flash_attn import (
    _decode,
    flash_attn_func,
    flash_attn_varlen_func,
    flash_attn_with_kvcache,
)

CAUSAL, FULL = Mask.causal, Mask.none
RAGGED = (0, 1, 63, 64, 65, 200, 513)
GROUPS = ((1, 1), (4, 2), (3, 1), (8, 2), (8, 1), (16, 1), (6, 3))
DIMS = (32, 40, 64, 72, 80, 96, 128, 160, 192, 224, 256)
PAGES = (0, 16, 48, 64, 256)


def attending() -> Iterator[DecodeCase]:
    """No new keys: every length of queries on every kind of cache; the rest takes turns."""
    heads, dim, dtype, mask = (cycle(x) for x in (GROUPS, DIMS, ("bf16", "fp16"), (CAUSAL, FULL)))
    for seqlen_q, page_size in product((1, 2, 5, 17, 64, 128, 300), PAGES):
        lengths = RAGGED if seqlen_q < 100 else (0, 70, 301, 513)
        shape = (next(heads), next(dim), next(mask), next(dtype))
        yield DecodeCase(lengths, seqlen_q, *shape, page_size=page_size)
    for group, head_dim in zip(GROUPS * 2, DIMS):
        yield DecodeCase((300, 1, 129), 1, group, head_dim, CAUSAL, page_size=next(cycle(PAGES)))


def with_options() -> Iterator[DecodeCase]:
    """Masks, scores, entries, left padding, splits."""
    some = DecodeCase((0, 7, 64, 190, 330), 3, (4, 2), 64, CAUSAL)
    for page_size in (0, 16, 64):
        base = some.but(page_size=page_size)
        yield base.but(window=(40, 0))
        yield base.but(window=(20, 9), mask=FULL, head_dim=128)
        yield base.but(window=(-1, 2), mask=FULL, seqlen_q=70)
        yield base.but(window=(0, 0), mask=FULL, seqlen_q=1, dtype="fp16")
        yield base.but(softcap=4.0, heads=(8, 1))
        yield base.but(alibi=Alibi.per_head, mask=FULL, heads=(6, 2))
        yield base.but(alibi=Alibi.per_batch, window=(33, 5), softcap=9.0, head_dim=96)
        yield base.but(leftpad=(0, 0, 64, 3, 129))
        yield base.but(leftpad=(0, 7, 20, 190, 300), window=(50, 0), seqlen_q=1)
        yield base.but(leftpad=(0, 5, 63, 1, 256), alibi=Alibi.per_head, mask=FULL, seqlen_q=20)
        for num_splits in (1, 3, 8, 128):
            yield base.but(num_splits=num_splits, head_dim=128, seqlen_q=1 + num_splits % 3)
        yield base.but(num_splits=5, window=(30, 4), softcap=3.0, mask=FULL, seqlen_q=40)
    yield some.but(entries="permuted")
    yield some.but(entries="repeated", seqlen_q=1, heads=(16, 1), head_dim=128)
    yield some.but(entries="repeated", leftpad=(0, 5, 63, 1, 256), num_splits=3)
    yield some.but(
        entries="permuted", alibi=Alibi.per_batch, window=(60, 0), leftpad=(0, 1, 2, 3, 4)
    )
    yield some.but(head_dim=33), some.but(head_dim=111, mask=FULL)  # the cache has 40 and 112


def appending() -> Iterator[DecodeCase]:
    """New keys: one step, a few tokens, a chunk; with rotary, pages and what else there is."""
    some = DecodeCase((0, 5, 64, 191), 1, (4, 2), 64, CAUSAL, append=1)
    dims, pages = cycle((64, 128, 96, 256, 32, 192, 80, 40)), cycle((0, 16, 64, 256, 48))
    for seqlen, rotary in product((1, 2, 17, 70, 130), ("", "interleaved", "halves")):
        for mask in (CAUSAL, FULL):
            head_dim = next(dims)
            rotary_dim = 16 if head_dim % 16 or mask is FULL else 0
            yield some.but(
                **dict(seqlen_q=seqlen, append=seqlen, rotary=rotary, mask=mask),
                **dict(head_dim=head_dim, page_size=next(pages)),
                rotary_dim=rotary_dim if rotary else 0,
                dtype="fp16" if seqlen == 17 else "bf16",
            )
    yield some.but(append=5), some.but(append=1, seqlen_q=5, rotary="halves")
    yield some.but(append=0, rotary="interleaved"), some.but(lengths=(0, 0), append=9, seqlen_q=9)
    yield some.but(room=0, append=20, seqlen_q=20, rotary="halves"), some.but(room=0, page_size=64)
    for page_size in (0, 16):
        base = some.but(page_size=page_size, append=3, seqlen_q=3, rotary="halves", rotary_dim=32)
        yield base.but(window=(40, 0), mask=FULL)
        yield base.but(window=(50, 3), mask=FULL, softcap=5.0, alibi=Alibi.per_batch)
        yield base.but(leftpad=(0, 5, 60, 17), rotary="interleaved")
        yield base.but(leftpad=(2, 0, 67, 190), mask=FULL)
        yield base.but(num_splits=3, heads=(16, 1), head_dim=128)
        yield base.but(head_dim=33, rotary_dim=16)
    yield some.but(entries="permuted", append=4, seqlen_q=4, rotary="interleaved")
    yield some.but(entries="permuted", leftpad=(0, 1, 2, 3), alibi=Alibi.per_head, mask=FULL)


def ragged_queries() -> Iterator[DecodeCase]:
    """cu_seqlens_q: steps and chunks in one call, sequences without queries, unused rows."""
    some = DecodeCase((0, 130, 64, 300, 9), (7, 1, 0, 65, 1), (4, 2), 64, CAUSAL)
    for page_size in (0, 16, 64):
        base = some.but(page_size=page_size)
        yield base
        yield base.but(head_dim=128, heads=(8, 1), unused=9, mask=FULL)
        yield base.but(append=1, head_dim=96)
        yield base.but(append=1, rotary="halves", unused=5, heads=(3, 3))
        yield base.but(append=1, rotary="interleaved", mask=FULL, rotary_dim=16, dtype="fp16")
        yield base.but(append=1, rotary="halves", window=(40, 9), mask=FULL, num_splits=3)
        yield base.but(window=(70, 0), softcap=5.0, alibi=Alibi.per_batch, leftpad=(0, 9, 64, 1, 2))
    yield some.but(seqlen_q=(0, 0, 0, 0, 0)), some.but(seqlen_q=(0,) * 5, append=1, unused=3)
    yield some.but(seqlen_q=(0,) * 5, unused=3, num_splits=2)
    yield some.but(entries="permuted", append=1), some.but(entries="repeated", head_dim=256)
    yield some.but(lengths=(0, 0), seqlen_q=(20, 3)), some.but(head_dim=72, append=1)


def unpadded() -> Iterator[DecodeCase]:
    """Caches whose head_dim is no multiple of 8, in the combinations that flash-attn's test has.

    Five sequences of 6 heads; head_dim 59, of which none, half or all is rotated, in multiples of 16.
    """
    groups, dtypes = cycle(((6, 6), (6, 1), (6, 3))), cycle(("fp16", "bf16"))
    rotary = cycle(
        (("", 0), ("halves", 16), ("interleaved", 16), ("halves", 48), ("interleaved", 48))
    )
    ragged, equal = (0, 127, 64, 5, 90), (250,) * 5
    masks = cycle((dict(mask=CAUSAL), dict(mask=FULL), dict(mask=FULL, window=(20, 9))))
    for seqlen_q, page_size in product((1, 3, 64), (0, 256, 16)):
        # Tables of equal sequences name fewer pages than there are, those of ragged ones more.
        base = DecodeCase(ragged, seqlen_q, (6, 6), 59, page_size=page_size, unpadded=True)
        for lengths, new in product((ragged, equal), (None, 1, seqlen_q)):
            name, rotary_dim = next(rotary) if new is not None else ("", 0)
            options = dict(rotary=name, rotary_dim=rotary_dim, heads=next(groups), **next(masks))
            yield base.but(lengths=lengths, append=new, dtype=next(dtypes), **options)
        alibi = base.but(alibi=Alibi.per_batch, mask=CAUSAL, append=seqlen_q, heads=(6, 3))
        yield alibi, alibi.but(leftpad=(0, 100, 64, 1, 33), append=None, num_splits=3)
        yield base.but(leftpad=(0, 100, 3, 1, 33), append=1, rotary="halves", rotary_dim=48)
    some, pages = DecodeCase(ragged, 3, (6, 3), 59, CAUSAL, append=3, unpadded=True), cycle(PAGES)
    yield some.but(entries="permuted"), some.but(entries="permuted", rotary="halves", rotary_dim=48)
    yield some.but(entries="repeated", append=None), some.but(softcap=5.0, head_dim=201)
    for head_dim in (1, 2, 7, 33, 60, 111, 255):
        yield some.but(head_dim=head_dim, page_size=next(pages))
    varlen = some.but(seqlen_q=(3, 0, 17, 1, 9), rotary="interleaved", rotary_dim=48, unused=4)
    yield varlen, varlen.but(page_size=16), varlen.but(append=None, rotary="", page_size=64)


def flattened(cases: Iterator[Any]) -> list[DecodeCase]:
    return [c for case in cases for c in (case if isinstance(case, tuple) else (case,))]


ATTENDING, OPTIONS, APPENDING, QUERIES, UNPADDED = (
    flattened(f()) for f in (attending, with_options, appending, ragged_queries, unpadded)
)


def all_devices(found: list[DecodeCase]) -> Callable:
    """All on CUDA; on the CPU in fp32, and some in the other dtypes."""
    dtypes = cycle(("bf16", "fp64", "fp16"))
    cpu = [c.but(dtype=next(dtypes) if i % 5 == 2 else "fp32") for i, c in enumerate(found)]
    return on_devices(cpu=cpu, cuda=found)


@all_devices([*ATTENDING, *OPTIONS])
def test_attention_to_a_cache_matches_oracle(device: str, case: DecodeCase) -> None:
    check_decode(case, make_decode_inputs(case, device))


@all_devices(APPENDING)
def test_append_matches_oracle(device: str, case: DecodeCase) -> None:
    """Also the cache, bitwise: new values and keys in their rows, all others as they were."""
    check_decode(case, make_decode_inputs(case, device))


@all_devices(QUERIES)
def test_queries_of_different_lengths_match_oracle(device: str, case: DecodeCase) -> None:
    check_decode(case, make_decode_inputs(case, device))


@all_devices(UNPADDED)
def test_cache_of_any_head_dim_matches_oracle(device: str, case: DecodeCase) -> None:
    """Appended to where it is, bitwise."""
    check_decode(case, make_decode_inputs(case, device))


@everywhere(UNPADDED[1].but(lengths=(90,) * 5))
def test_cache_of_any_head_dim_takes_a_number_as_length(device: str, case: DecodeCase) -> None:
    """Rows beyond it are not looked at."""
    x = make_decode_inputs(case, device)
    want, y = run_decode(x.fresh()), x.fresh()
    ours = run_decode(y, cache_seqlens=90)
    assert_nearly("out", ours.out, want.out, case, eps=2 * torch.finfo(want.out.dtype).eps)
    assert_nearly("lse", ours.lse, want.lse, case, eps=1e-6)
    check_caches(case, y, expect(case, x))


def test_copies_are_announced_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the call is compiled."""

    def twice(x: Tensor) -> Tensor:
        return x + _decode._warn_of_copies() + _decode._warn_of_copies()

    for call in (twice, torch.compile(twice, backend="eager", fullgraph=True)):
        monkeypatch.setattr(_decode, "_warned_of_copies", False)
        with pytest.warns(
            UserWarning, match="zeros with head_dim rounded up to a multiple of 8"
        ) as all:
            call(torch.ones(1)), call(torch.ones(1))
        assert len(all) == 1


@everywhere(UNPADDED[1], UNPADDED[1].but(unpadded=False), UNPADDED[1].but(head_dim=64))
def test_only_copies_are_announced(
    device: str, case: DecodeCase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_decode, "_warned_of_copies", False)
    x = make_decode_inputs(case, device)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        run_decode(x), run_decode(x)
    copies = device == "cuda" and case.cache_head_dim % 8 != 0
    assert len(found) == copies, [str(w.message) for w in found]


EDGES = [
    DecodeCase((0, 0, 0), 1, (4, 2), 64, CAUSAL),
    DecodeCase((0, 0), 5, (2, 2), 128, FULL, page_size=16),
    DecodeCase((0, 0), 5, (2, 1), 64, CAUSAL, room=0),  # a cache without rows
    DecodeCase((9, 70, 0), 4, (4, 2), 64, FULL, leftpad=(9, 70, 0)),
    DecodeCase((3, 9), 20, (4, 1), 64, CAUSAL, num_splits=3),  # more queries than keys
    DecodeCase((3, 90), 20, (4, 1), 128, FULL, window=(2, -1)),
    DecodeCase((5, 90), 0, (4, 1), 64, CAUSAL),
    DecodeCase((5, 90), 0, (4, 1), 64, CAUSAL, append=3),
    DecodeCase((0, 5), 2, (4, 1), 64, CAUSAL, append=0, page_size=16),
    DecodeCase((0, 0), 5, (2, 1), 59, CAUSAL, room=0, unpadded=True),
    DecodeCase((0, 0), 5, (2, 1), 59, CAUSAL, page_size=16, unpadded=True),
]


@everywhere(*EDGES)
def test_rows_without_keys(device: str, case: DecodeCase) -> None:
    """Nothing cached, all of it left padding, queries before the first key, no queries: 0 and +inf."""
    ours = packed(check_decode(case, make_decode_inputs(case, device)))
    nothing = ours.lse.isinf()
    assert not ours.out.transpose(0, 1)[nothing].any(), case
    if max(case.ends) == 0 or case.leftpad:
        assert nothing.all(), case


STEPS = [
    DecodeCase((0, 0, 0), 1, (4, 2), 64, CAUSAL, append=1, room=90),
    DecodeCase((0, 0, 0), 1, (8, 1), 128, CAUSAL, append=1, page_size=16, room=90),
    DecodeCase((0, 0), 1, (2, 2), 96, CAUSAL, append=1, page_size=64, room=90, window=(20, 0)),
]


@everywhere(*STEPS)
def test_token_by_token_is_the_whole_sequence(device: str, case: DecodeCase) -> None:
    """A prompt in one chunk, then steps, all in one cache."""
    total, prompt = 60, 41
    shape = case.but(lengths=(total,) * case.batch, seqlen_q=total, append=None, page_size=0)
    whole = make_decode_inputs(shape, device)
    k, v = whole.k_cache[:, :total], whole.v_cache[:, :total]
    want = flash_attn_func(whole.q, k, v, causal=True, window_size=case.window)
    x = make_decode_inputs(case.but(append=total, seqlen_q=total), device)
    lengths = torch.zeros(case.batch, dtype=torch.int32, device=device)
    options = x.options | dict(cache_seqlens=lengths)
    outs = []
    for begin in (0, *range(prompt, total)):
        rows = slice(0, prompt) if begin == 0 else slice(begin, begin + 1)
        options |= dict(k=k[:, rows], v=v[:, rows])
        outs.append(flash_attn_with_kvcache(whole.q[:, rows], x.k_cache, x.v_cache, **options))
        lengths += rows.stop - rows.start
    eps = 2 * torch.finfo(want.dtype).eps
    assert_nearly("out", torch.cat(outs, 1), want, case, eps=eps)


# The same call in other words.

FORMS = [
    DecodeCase((90, 90), 5, (4, 2), 64, CAUSAL, append=5, rotary="halves"),
    DecodeCase((90, 90), 1, (8, 2), 128, CAUSAL, append=1, page_size=16),
    DecodeCase((90, 90), 3, (4, 2), 64, FULL),
]


@everywhere(*FORMS)
def test_one_length_for_all_is_a_number(device: str, case: DecodeCase) -> None:
    x = make_decode_inputs(case, device)
    want_x = x.fresh()
    want = run_decode(want_x)
    for number in (90, np.int64(90)):
        y = x.fresh()
        ours = run_decode(y, cache_seqlens=number)
        for name in ("out", "lse"):
            assert_bitwise(name, getattr(ours, name), getattr(want, name), case)
        assert_bitwise("k_cache", y.k_cache, want_x.k_cache, case)


@everywhere(DecodeCase((90, 90), 3, (4, 2), 64, FULL, room=0))
def test_default_length_is_the_capacity(device: str, case: DecodeCase) -> None:
    x = make_decode_inputs(case, device)
    want, ours = run_decode(x), run_decode(x, cache_seqlens=None)
    assert_bitwise("out", ours.out, want.out, case)


@everywhere(*(case.but(append=None, rotary="", page_size=0) for case in FORMS))
def test_attention_is_that_of_the_training_functions(device: str, case: DecodeCase) -> None:
    x = make_decode_inputs(case, device)
    ours = run_decode(x)
    k, v = x.k_cache[:, :90], x.v_cache[:, :90]
    out, lse, _ = flash_attn_func(x.q, k, v, causal=case.causal, return_attn_probs=True)
    assert_nearly("out", ours.out, out, case, eps=2 * torch.finfo(out.dtype).eps)
    assert_nearly("lse", ours.lse, lse, case, eps=1e-6)


@everywhere(*[c for c in OPTIONS if c.page_size == 16 and not c.leftpad][:8])
def test_paged_decoding_is_the_varlen_function(device: str, case: DecodeCase) -> None:
    x = make_decode_inputs(case, device)
    ours = packed(run_decode(x))
    options = {n: o for n, o in x.options.items() if n not in ("cache_seqlens", "num_splits")}
    cu_q = torch.arange(case.batch + 1, dtype=torch.int32, device=device) * case.seqlen_q
    lengths = torch.tensor((0, *case.lengths), device=device).cumsum(0, dtype=torch.int32)
    out, lse, _ = flash_attn_varlen_func(
        *(x.q.flatten(0, 1), x.k_cache, x.v_cache, cu_q, lengths, case.seqlen_q, max(case.lengths)),
        return_attn_probs=True,
        **options,
    )
    assert_nearly("out", ours.out, out, case, eps=2 * torch.finfo(out.dtype).eps)
    assert_nearly("lse", ours.lse, lse, case, eps=1e-6)


@everywhere(DecodeCase((90, 30), 3, (4, 2), 64, CAUSAL, append=3, rotary="halves"))
def test_returns_out_alone_by_default(device: str, case: DecodeCase) -> None:
    x = make_decode_inputs(case, device)
    want = run_decode(x.fresh())
    out = flash_attn_with_kvcache(x.q, x.k_cache, x.v_cache, **x.options)
    assert isinstance(out, Tensor)
    assert_bitwise("out", out, want.out, case)


@everywhere(DecodeCase((90, 30), 3, (4, 2), 64, CAUSAL, append=3, rotary="halves"))
def test_there_is_no_gradient(device: str, case: DecodeCase) -> None:
    x = make_decode_inputs(case, device)
    want = run_decode(x.fresh())
    leaf = x.q.clone().requires_grad_()
    new = {name: x.options[name].clone().requires_grad_() for name in "kv"}
    ours = run_decode(replace(x, q=leaf).but(**new))
    assert not ours.out.requires_grad and not ours.lse.requires_grad
    assert not x.k_cache.requires_grad and not x.v_cache.requires_grad
    assert_bitwise("out", ours.out, want.out, case)


# Layouts: caches are used where they are.

LAYOUTS = [
    DecodeCase((90, 5, 200), 3, (4, 2), 64, CAUSAL, append=3, rotary="halves"),
    DecodeCase((90, 5, 200), 1, (8, 2), 128, CAUSAL, append=1, page_size=16),
    DecodeCase((90, 5, 200), 40, (4, 2), 96, FULL, page_size=64),
    DecodeCase((90, 5, 200), 2, (2, 1), 256, FULL),
    DecodeCase((90, 5, 200), 2, (6, 3), 59, CAUSAL, append=2, unpadded=True),
    DecodeCase((90, 5, 200), 2, (6, 3), 59, CAUSAL, append=2, page_size=16, unpadded=True),
]


def kv_packed(x: DecodeInputs) -> DecodeInputs:
    both = torch.stack((x.k_cache, x.v_cache), 2)  # (blocks, rows, 2, heads, head_dim)
    return replace(x, k_cache=both[:, :, 0], v_cache=both[:, :, 1])


def heads_first(x: DecodeInputs) -> DecodeInputs:
    caches = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (x.k_cache, x.v_cache))
    return replace(x, k_cache=next(caches), v_cache=next(caches))


def in_a_larger_buffer(x: DecodeInputs) -> DecodeInputs:
    def spread(t: Tensor) -> Tensor:
        blocks, rows, heads, dim = t.shape
        wide = t.new_full((blocks + 1, 2, rows + 3, heads + 1, dim + 8), torch.nan)
        return wide[1:, 1, 2:-1, 1:, :dim].copy_(t)

    return replace(x, k_cache=spread(x.k_cache), v_cache=spread(x.v_cache))


def strided_tensors(x: DecodeInputs) -> DecodeInputs:
    """q, new keys, tables of cos and sin with gaps between their rows; q without a last stride of 1."""

    def spread(t: Tensor) -> Tensor:
        wide = t.new_full((*t.shape[:-1], t.shape[-1] + 3), torch.nan)
        return wide[..., 1:-2].copy_(t)

    names = [n for n in ("k", "v", "rotary_cos", "rotary_sin") if n in x.options]
    q = x.q.transpose(-1, -2).contiguous().transpose(-1, -2)
    return replace(x, q=q).but(**{name: spread(x.options[name]) for name in names})


@everywhere(*LAYOUTS)
@pytest.mark.parametrize(
    "layout",
    [kv_packed, heads_first, in_a_larger_buffer, strided_tensors],
    ids=lambda f: f.__name__,
)
def test_layouts_change_no_bit(device: str, case: DecodeCase, layout: Callable) -> None:
    x = make_decode_inputs(case, device)
    expected, y, want = expect(case, x), layout(x), run_decode(x.fresh())
    ours = run_decode(y)
    for name in ("out", "lse"):
        assert_bitwise(name, getattr(ours, name), getattr(want, name), case)
    check_caches(case, y, expected)
    for t in (y.k_cache, y.v_cache):
        if layout is in_a_larger_buffer:
            base = t._base
            assert base[0].isnan().all() and base[:, 0].isnan().all(), case
            assert base[:, :, :2].isnan().all() and base[..., -8:].isnan().all(), case


# Splits, and what a result may depend on.

INVARIANT = [
    DecodeCase((0, 700, 64, 1025, 3), 1, (8, 2), 128, CAUSAL),
    DecodeCase(
        (5, 700, 64, 1025, 3), 1, (4, 4), 64, CAUSAL, append=1, rotary="halves", page_size=16
    ),
    DecodeCase((5, 700, 64, 1025, 90), 7, (16, 1), 64, FULL, page_size=64, softcap=5.0),
    DecodeCase((90, 700, 64, 525, 3), 70, (4, 2), 96, CAUSAL, window=(300, 0), dtype="fp16"),
    DecodeCase((90, 700, 64, 525, 9), 2, (6, 2), 256, FULL, alibi=Alibi.per_batch, page_size=48),
    DecodeCase((90, 700, 64, 525, 9), 2, (6, 2), 192, CAUSAL, leftpad=(3, 200, 64, 100, 0)),
    DecodeCase((90, 700, 0, 525, 9), (3, 1, 9, 0, 130), (4, 2), 128, CAUSAL, append=1),
    DecodeCase((90, 700, 64, 525, 9), 2, (6, 2), 59, CAUSAL, page_size=48, unpadded=True),
]


def alone(case: DecodeCase, x: DecodeInputs, n: int) -> DecodeInputs:
    """Sequence n as a call of its own on the same cache."""
    options, q = dict(x.options), x.q
    if "cu_seqlens_q" in options:
        rows = slice(*options["cu_seqlens_q"][n : n + 2].tolist())
        options |= dict(cu_seqlens_q=options["cu_seqlens_q"][n : n + 2] - rows.start)
    else:
        rows = slice(n, n + 1)
    for name in ("k", "v"):
        if name in options:
            options[name] = options[name][rows]
    for name in ("cache_seqlens", "cache_leftpad", "block_table", "cache_batch_idx"):
        if name in options:
            options[name] = options[name][n : n + 1]
    if case.alibi is Alibi.per_batch:
        options["alibi_slopes"] = options["alibi_slopes"][n : n + 1]
    if not case.page_size and not case.entries:
        options["cache_batch_idx"] = torch.tensor([n], dtype=torch.int32, device=q.device)
    return DecodeInputs(q[rows], x.k_cache, x.v_cache, options)


@everywhere(*INVARIANT)
@pytest.mark.parametrize("num_splits", [1, 4])
def test_result_is_the_same_alone_and_in_any_batch(
    device: str, case: DecodeCase, num_splits: int
) -> None:
    """Bitwise on CUDA; on the CPU, where torch multiplies other shapes in another order, nearly."""
    x = make_decode_inputs(case.but(num_splits=num_splits), device)
    together = run_decode(x.fresh())
    for n in range(case.batch):
        ours = run_decode(alone(case, x.fresh(), n))
        rows = slice(n, n + 1)
        want = Result(together.out[rows], together.lse[rows])
        if isinstance(case.seqlen_q, tuple):
            rows = slice(*x.options["cu_seqlens_q"][n : n + 2].tolist())
            want = Result(together.out[rows], together.lse[:, rows])
        for name in ("out", "lse"):
            pair = getattr(ours, name), getattr(want, name)
            if device == "cuda":
                assert_bitwise(name, *pair, f"{case}, sequence {n}")
            else:
                assert_nearly(name, *pair, f"{case}, sequence {n}")


@everywhere(*INVARIANT)
def test_number_of_splits_changes_only_roundings(device: str, case: DecodeCase) -> None:
    x = make_decode_inputs(case, device)
    want = check_decode(case, x.fresh())
    for num_splits in (1, 2, 3, 8, 31, 128):
        ours = check_decode(case, x.fresh(), num_splits=num_splits)
        assert_nearly("out", ours.out, want.out, case, eps=2 * torch.finfo(want.out.dtype).eps)
        assert_nearly("lse", ours.lse, want.lse, case, eps=1e-6)


@everywhere(*INVARIANT)
@pytest.mark.parametrize("num_splits", [0, 8])
def test_runs_repeat_bitwise(device: str, case: DecodeCase, num_splits: int) -> None:
    x = make_decode_inputs(case.but(num_splits=num_splits), device)
    first = run_decode(x.fresh())
    for _ in range(50 if device == "cuda" else 3):
        again = run_decode(x.fresh())
        assert_bitwise("out", again.out, first.out, case)
        assert_bitwise("lse", again.lse, first.lse, case)


@everywhere(*(case for case in OPTIONS if case.entries), *(c for c in APPENDING if c.entries))
def test_entries_may_be_anywhere(device: str, case: DecodeCase) -> None:
    """The same keys in entries 0, 1, ... give the same bits."""
    x = make_decode_inputs(case, device)
    index = x.options["cache_batch_idx"].long()
    ordered = replace(x, k_cache=x.k_cache[index], v_cache=x.v_cache[index])
    want = run_decode(ordered, cache_batch_idx=None, num_splits=1)
    ours = run_decode(x, num_splits=1)
    assert_bitwise("out", ours.out, want.out, case)
    assert_bitwise("k_cache", x.k_cache[index], ordered.k_cache, case)


# Few sequences: on GPUs that have clusters, the thread blocks that share a single one merge in these.

FEW_LENGTHS = (0, 1, 127, 128, 129, 1000, 8192)


def few_sequences() -> Iterator[DecodeCase]:
    """One and two, every group that makes narrow tiles; caches that are full and far from it."""
    dims, rooms = cycle((128, 64, 128, 256, 32, 96, 192)), cycle((0, 7, 9000))
    heads = {1: cycle(((1, 1), (8, 8), (40, 40))), 4: cycle(((32, 8), (4, 1), (12, 3)))}
    heads[16] = cycle(((16, 1), (32, 2), (96, 6)))
    for n, (batch, length, group) in enumerate(product((1, 2), FEW_LENGTHS, heads)):
        lengths = (length,) if batch == 1 else (length, FEW_LENGTHS[n % len(FEW_LENGTHS)])
        seqlen_q = 1 if group == 16 else 1 + n % 3
        shape = (next(heads[group]), next(dims), CAUSAL if n % 2 else FULL)
        yield DecodeCase(lengths, seqlen_q, *shape, room=next(rooms))
    some = DecodeCase((8192,), 1, (16, 1), 128, CAUSAL)
    yield some.but(window=(500, 0)), some.but(window=(129, 3), mask=FULL, seqlen_q=2, heads=(8, 1))
    yield some.but(window=(3000, -1), mask=FULL, room=5000), some.but(window=(0, 0), mask=FULL)
    yield (
        some.but(leftpad=(8192,)),
        some.but(leftpad=(7000,)),
        some.but(leftpad=(131,), dtype="fp16"),
    )
    yield some.but(page_size=16, room=3000), some.but(page_size=256, lengths=(999,), heads=(32, 8))
    yield some.but(softcap=5.0, heads=(32, 8), lengths=(3000,)), some.but(alibi=Alibi.per_head)
    yield some.but(append=1, rotary="halves"), some.but(append=1, lengths=(0,), room=4000)
    yield some.but(append=3, seqlen_q=3, heads=(12, 3), lengths=(127,), page_size=64, room=2000)
    yield some.but(seqlen_q=(3,), heads=(4, 1), lengths=(2000,), unused=5, append=1)
    yield some.but(seqlen_q=(0,), heads=(4, 1), lengths=(2000,), unused=5)
    yield some.but(seqlen_q=20, heads=(4, 1), lengths=(2000,))  # wide tiles
    yield some.but(entries="permuted", lengths=(5000,), head_dim=40)


FEW = flattened(few_sequences())


@pytest.mark.cuda
@on_devices(cuda=FEW)
def test_few_sequences_match_oracle_and_repeat(device: str, case: DecodeCase) -> None:
    """Against the oracle, against one split, and bitwise in calls that follow each other closely."""
    x = make_decode_inputs(case, device)
    first = check_decode(case, x.fresh())
    one = run_decode(x.fresh(), num_splits=1)
    assert_nearly("out", first.out, one.out, case, eps=2 * torch.finfo(one.out.dtype).eps)
    assert_nearly("lse", first.lse, one.lse, case, eps=1e-6)
    if case.append is not None:
        return
    again = [run_decode(x) for _ in range(20)]
    for ours in again:
        assert_bitwise("out", ours.out, first.out, case)
        assert_bitwise("lse", ours.lse, first.lse, case)


@pytest.mark.cuda
@on_devices(
    cuda=[
        DecodeCase((8192,), 1, heads, dim, CAUSAL, room=0, page_size=page_size)
        for heads, dim, page_size in (((16, 1), 128, 0), ((32, 8), 128, 16), ((40, 40), 64, 0))
    ]
)
def test_one_graph_serves_every_length_of_a_sequence(device: str, case: DecodeCase) -> None:
    """Also none, and in turns: what one replay leaves behind is no other's."""
    x = make_decode_inputs(case, device)
    y = x.but(cache_seqlens=x.options["cache_seqlens"].clone())
    run_decode(y)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = flash_attn_with_kvcache(
            *(y.q, y.k_cache, y.v_cache), return_softmax_lse=True, **y.options
        )
    for length in (*FEW_LENGTHS, *reversed(FEW_LENGTHS), 2500, 5121):
        for z in (x, y):
            z.options["cache_seqlens"].fill_(length)
        graph.replay()
        want, one = run_decode(x), run_decode(x, num_splits=1)
        message = f"{case}, {length} tokens"
        assert_bitwise("out", out, want.out, message)
        assert_bitwise("lse", lse, want.lse, message)
        assert_nearly("out", out, one.out, message, eps=2 * torch.finfo(out.dtype).eps)
        assert_nearly("lse", lse, one.lse, message, eps=1e-6)


# Appending beyond the capacity.

FULL_CACHES = [
    DecodeCase((60, 3, 62), 4, (4, 2), 64, CAUSAL, append=4, room=-2),
    DecodeCase((60, 3, 62), 4, (4, 2), 128, CAUSAL, append=4, room=-2, page_size=16),
    DecodeCase((62, 3, 64), (4, 1, 3), (4, 2), 64, CAUSAL, append=1, room=-3, page_size=64),
    DecodeCase((60, 3, 62), 4, (4, 2), 59, CAUSAL, append=4, room=-2, unpadded=True),
    DecodeCase((60, 3, 62), 4, (4, 2), 59, CAUSAL, append=4, room=-2, page_size=16, unpadded=True),
]


@on_devices(cpu=[c.but(dtype="fp32") for c in FULL_CACHES], cuda=FULL_CACHES)
def test_append_beyond_the_capacity(
    device: str, case: DecodeCase, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error where no device has to be waited for; else the sequence ends at the capacity."""
    fits = case.but(lengths=(40, 3, 41), room=0)
    x = make_decode_inputs(fits.but(room=case.rows - fits.rows), device)
    assert (
        x.k_cache.shape[1] * (1 if not case.page_size else x.options["block_table"].shape[1]) == 64
    )
    x = x.but(cache_seqlens=torch.tensor(case.lengths, dtype=torch.int32, device=device))
    if case.page_size:  # every sequence has all pages
        pages = 64 // case.page_size
        table = torch.arange(3 * pages, dtype=torch.int32, device=device).view(3, pages)
        x = x.but(block_table=table)
        x.k_cache, x.v_cache = (
            torch.randn(3 * pages + 1, *t.shape[1:], device=device).to(t.dtype)
            for t in (x.k_cache, x.v_cache)
        )
    else:
        x.k_cache, x.v_cache = (torch.randn_like(t) for t in (x.k_cache, x.v_cache))
    before = x.fresh()
    if isinstance(case.seqlen_q, int):
        with pytest.raises(RuntimeError, match="62 . 4 new rows"):
            run_decode(x, cache_seqlens=62)
    word = "block_table" if case.page_size else "capacity"
    if device == "cuda":
        ours = run_decode(x)
        assert_cut_at_capacity(case, before, x, ours)
        monkeypatch.setenv("FLASH_ATTN_CHECK_DEVICE_DATA", "1")
    with pytest.raises(RuntimeError, match=rf"cache_seqlens\[[02]\] must be from 0 to .*{word}"):
        run_decode(before.fresh())


def assert_cut_at_capacity(
    case: DecodeCase, before: DecodeInputs, after: DecodeInputs, ours: Result
) -> None:
    """Each sequence as if it had only as many new keys as fit, its queries standing at its end."""
    cu = [0, *torch.tensor(case.lengths_q).cumsum(0).tolist()]
    got, options = packed(ours), before.options
    for n, length in enumerate(case.lengths):
        rows, fits = slice(cu[n], cu[n + 1]), min(case.lengths_new[n], 64 - length)
        q = before.q.reshape(-1, *before.q.shape[-2:])[rows].unsqueeze(0)
        k_all, v_all = (
            rows_of(t, options.get("block_table"), n) for t in (before.k_cache, before.v_cache)
        )
        for t, name in ((k_all, "k"), (v_all, "v")):
            new = options[name]
            new = new[n] if new.dim() == 4 else new[rows]
            t[length : length + fits] = new[:fits]
        end = length + fits
        out, lse, _ = flash_attn_func(
            *(q, k_all[None, :end], v_all[None, :end]), causal=True, return_attn_probs=True
        )
        message = f"{case}, sequence {n}"
        eps = 2 * torch.finfo(out.dtype).eps
        assert_nearly("out", got.out[rows], out[0], message, eps=eps)
        assert_nearly("lse", got.lse[:, rows], lse[0], message, eps=1e-6)
        for t, want in ((after.k_cache, k_all), (after.v_cache, v_all)):
            assert_bitwise("cache", rows_of(t, options.get("block_table"), n), want, message)


def rows_of(cache: Tensor, table: Tensor | None, n: int) -> Tensor:
    """The 64 rows of sequence n, a copy."""
    return cache[n].clone() if table is None else cache[table[n].long()].flatten(0, 1)


# torch.compile, graphs, streams.

COMPILED = [
    DecodeCase((90, 5, 60), 1, (4, 2), 64, CAUSAL, append=1, rotary="halves", page_size=16),
    DecodeCase((90, 5, 60), 3, (4, 2), 64, FULL, window=(30, 3), softcap=4.0, num_splits=2),
    DecodeCase((90, 5, 60), (3, 0, 9), (4, 2), 64, CAUSAL, append=1, alibi=Alibi.per_head),
    DecodeCase((90, 5, 60), 2, (4, 2), 33, CAUSAL, append=2),
    DecodeCase((90, 5, 60), 2, (6, 2), 59, CAUSAL, append=2, rotary="halves", rotary_dim=48).but(
        unpadded=True
    ),
    DecodeCase((90, 5, 60), 1, (6, 1), 59, CAUSAL, append=1, page_size=16, unpadded=True),
]


@everywhere(*COMPILED)
@pytest.mark.parametrize("dynamic", [None, True], ids=["static", "dynamic"])
def test_compiles_as_a_full_graph(device: str, case: DecodeCase, dynamic: bool | None) -> None:
    """The caches are written in place in the compiled function too."""
    torch._dynamo.reset()

    def step(q: Tensor, k_cache: Tensor, v_cache: Tensor, options: dict) -> tuple:
        out, lse = flash_attn_with_kvcache(
            q * 1.5, k_cache, v_cache, return_softmax_lse=True, **options
        )
        return out + 1, lse, k_cache.nan_to_num().sum()

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    x = make_decode_inputs(case, device)
    y, z = x.fresh(), x.fresh()
    for grad in (torch.no_grad, torch.enable_grad):
        with grad():
            want = step(y.q, y.k_cache, y.v_cache, y.options)
            ours = compiled(z.q, z.k_cache, z.v_cache, z.options)
        for name, a, b in zip(("out", "lse", "sum"), ours, want):
            assert_nearly(name, a, b, case)
        assert_bitwise("k_cache", z.k_cache, y.k_cache, case)
        assert_bitwise("v_cache", z.v_cache, y.v_cache, case)


@everywhere(COMPILED[0])
def test_compiled_steps_with_a_number_as_length(device: str, case: DecodeCase) -> None:
    """cache_seqlens counts up: one graph serves all steps."""
    torch._dynamo.reset()
    case = case.but(lengths=(60,) * 3, rotary="", room=40)
    x = make_decode_inputs(case.but(append=9), device)
    options = x.options | {name: x.options[name][:, :1] for name in "kv"}
    options.pop("cache_seqlens")
    y = x.fresh()
    compiled = torch.compile(flash_attn_with_kvcache, backend="eager", fullgraph=True, dynamic=True)
    for length in range(60, 66):
        want = flash_attn_with_kvcache(x.q, x.k_cache, x.v_cache, cache_seqlens=length, **options)
        ours = compiled(y.q, y.k_cache, y.v_cache, cache_seqlens=length, **options)
        assert_bitwise("out", ours, want, case)
        assert_bitwise("k_cache", y.k_cache, x.k_cache, case)


GRAPHED = [
    *(*COMPILED, *INVARIANT),
    DecodeCase((1000,), 1, (16, 1), 128, CAUSAL, room=7000),
    DecodeCase((121,), 1, (32, 8), 128, CAUSAL, append=1, room=900),
]


@pytest.mark.cuda
@on_devices(cuda=GRAPHED)
def test_cuda_graph_takes_new_lengths(device: str, case: DecodeCase) -> None:
    """Captured once; cache_seqlens, q and new keys change in place between replays."""
    assert cuda_build() is not None
    grown = case.but(lengths=tuple(n + 6 for n in case.lengths))  # has the pages of all steps
    x = make_decode_inputs(grown, device)
    for t in (x.k_cache, x.v_cache):
        t.nan_to_num_(0.5)
    lengths = torch.tensor(case.lengths, dtype=torch.int32, device=device)
    x = x.but(cache_seqlens=lengths.clone())
    y = x.fresh()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run_decode(y.fresh())
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = flash_attn_with_kvcache(
            *(y.q, y.k_cache, y.v_cache), return_softmax_lse=True, **y.options
        )
    for step in range(1, 4):
        new = lengths + step if step < 3 else torch.tensor(case.begins)
        x.options["cache_seqlens"].copy_(new)
        y.options["cache_seqlens"].copy_(new)
        x.q.mul_(-0.9)  # x and y share it
        graph.replay()
        want = run_decode(x)
        assert_bitwise("out", out, want.out, f"{case}, replay {step}")
        assert_bitwise("lse", lse, want.lse, f"{case}, replay {step}")
        assert_bitwise("k_cache", y.k_cache, x.k_cache, f"{case}, replay {step}")
        assert_bitwise("v_cache", y.v_cache, x.v_cache, f"{case}, replay {step}")


@pytest.mark.cuda
@on_devices(cuda=[*GRAPHED, *EDGES[:5]])
def test_calls_do_not_synchronise(device: str, case: DecodeCase) -> None:
    x = make_decode_inputs(case, device)
    run_decode(x.fresh())
    y = x.fresh()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        flash_attn_with_kvcache(y.q, y.k_cache, y.v_cache, **y.options)
    finally:
        torch.cuda.set_sync_debug_mode(before)


@pytest.mark.cuda
@on_devices(cuda=INVARIANT[:3])
def test_side_stream(device: str, case: DecodeCase) -> None:
    """What is appended on a stream is read on that stream."""
    x = make_decode_inputs(case, device)
    want = run_decode(x.fresh())
    busy = torch.randn(2048, 2048, device=device)
    late = replace(x.fresh(), q=torch.full_like(x.q, torch.nan))
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        for _ in range(20):
            busy = busy @ busy * 1e-3
        late.q.copy_(x.q)
        ours = run_decode(late)
    torch.cuda.current_stream().wait_stream(stream)
    assert_bitwise("out", ours.out, want.out, case)


@pytest.mark.gpus(2)
@pytest.mark.cuda
@on_devices(cuda=INVARIANT[:3])
def test_second_gpu_while_the_first_is_current(device: str, case: DecodeCase) -> None:
    x = make_decode_inputs(case, device)
    there = {n: o.to("cuda:1") if isinstance(o, Tensor) else o for n, o in x.options.items()}
    y = DecodeInputs(*(t.to("cuda:1") for t in (x.q, x.k_cache, x.v_cache)), there)
    want, ours = run_decode(x), run_decode(y)
    assert ours.out.device == torch.device("cuda:1")
    assert_bitwise("out", ours.out.cpu(), want.out.cpu(), case)
