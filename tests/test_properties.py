"""Whole configurations drawn at random, forward and backward against the oracle.

On the CPU a fixed number of small ones; on CUDA as many as FLASH_ATTN_FUZZ_SECONDS allow for each
test.  What is drawn depends on FLASH_ATTN_TEST_SEED alone.  A failure shows the smallest case that
hypothesis found, as an expression that can be pasted, and the seed.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

import pytest
from cases import (
    DTYPES,
    SEED,
    UNLIMITED,
    Alibi,
    AttnCase,
    Case,
    Inputs,
    Mask,
    VarlenCase,
    is_built,
    make_dlse,
    make_inputs,
    make_varlen_inputs,
)
from decoding import DecodeCase, check_decode, make_decode_inputs
from harness import assert_same_result, check_case, check_varlen, features_of, run_varlen
from test_layouts import heads_first, misaligned_base, odd_head_stride, odd_row_stride
from test_varlen import check_forward, make_pages

from flash_attn._head_dims import HEAD_DIMS

hypothesis = pytest.importorskip("hypothesis")
st = hypothesis.strategies

FUZZ_SECONDS = float(os.environ.get("FLASH_ATTN_FUZZ_SECONDS", "20"))
CPU_EXAMPLES = 60
EXAMPLES_PER_ROUND = 50  # on CUDA, until the time is up
LAYOUTS = ("contiguous", "heads_first", "misaligned_base", "odd_row_stride", "odd_head_stride")
BORDERS = (15, 16, 17, 31, 32, 33, 63, 64, 65, 95, 96, 97, 127, 128, 129, 159, 160, 161, 192, 256)


def lengths(longest: int) -> Any:
    borders = st.sampled_from([n for n in BORDERS if n <= longest])
    return st.one_of(st.integers(0, 8), borders, st.integers(0, longest))


def common(device: str, longest: int) -> dict[str, Any]:
    """Strategies of the fields that dense and variable-length cases share."""
    side = st.one_of(st.just(-1), st.integers(0, 8), st.integers(0, longest + 20))
    group = st.tuples(st.integers(1, 3), st.integers(1, 3)).map(lambda x: (x[0] * x[1], x[1]))
    dims = st.one_of(st.sampled_from(HEAD_DIMS), st.integers(1, 256))
    dtypes = ("fp16", "bf16") if device == "cuda" else ("fp32", *DTYPES)
    return dict(
        heads=group,
        head_dim=dims if device == "cuda" else st.integers(1, 48),
        mask=st.sampled_from(Mask),
        dtype=st.sampled_from(dtypes),
        window=st.one_of(st.just(UNLIMITED), st.tuples(side, side)),
        softcap=st.sampled_from((0.0, 0.0, 0.5, 5.0, 30.0)),
        alibi=st.sampled_from((Alibi.none, *Alibi)),
        dropout=st.sampled_from((0.0, 0.0, 0.05, 0.3, 0.8)),
    )


def dense_cases(device: str) -> Any:
    longest = 500 if device == "cuda" else 180
    shape = dict(seqlen_q=lengths(longest), seqlen_k=lengths(longest), batch=st.integers(1, 3))
    return st.builds(AttnCase, **shape, **common(device, longest))


def varlen_cases(device: str) -> Any:
    longest = 300 if device == "cuda" else 100
    pairs = st.lists(st.tuples(lengths(longest), lengths(longest)), min_size=1, max_size=8)
    unused = st.one_of(st.just((0, 0)), st.tuples(st.integers(0, 40), st.integers(0, 200)))
    return st.builds(varlen_case, pairs, unused=unused, **common(device, longest))


def varlen_case(lengths: list[tuple[int, int]], **fields: Any) -> VarlenCase:
    """Of (query length, key length) for each sequence."""
    return VarlenCase(*(tuple(column) for column in zip(*lengths)), **fields)


def decode_cases(device: str) -> Any:
    """Every option with every other: those that exclude each other are put right in decode_case."""
    longest = 400 if device == "cuda" else 90
    sequence = st.tuples(
        lengths(longest), lengths(70), lengths(40)
    )  # cached, queries, left padding
    fields = common(device, longest)
    fields |= dict(
        heads=st.tuples(st.sampled_from((1, 2, 3, 4, 8, 16)), st.integers(1, 2)).map(
            lambda x: (x[0] * x[1], x[1])
        ),
        dropout=st.just(0.0),
        head_dim=fields["head_dim"].map(lambda d: max(d, 16)),
    )
    return st.builds(
        decode_case,
        st.lists(sequence, min_size=1, max_size=5),
        is_varlen=st.booleans(),
        padded=st.booleans(),
        append=st.one_of(st.none(), st.integers(0, 40)),
        page_size=st.sampled_from((0, 0, 16, 32, 48, 64, 256)),
        rotary=st.sampled_from(("", "", "interleaved", "halves")),
        rotary_dim=st.sampled_from((0, 16, 32)),
        entries=st.sampled_from(("", "", "permuted", "repeated")),
        room=st.integers(0, 70),
        num_splits=st.sampled_from((0, 0, 1, 2, 3, 8, 30)),
        unused=st.sampled_from((0, 0, 5)),
        **fields,
    )


def decode_case(
    sequences: list[tuple[int, int, int]], is_varlen: bool, padded: bool, **fields: Any
) -> DecodeCase:
    cached, queries, leftpad = (tuple(column) for column in zip(*sequences))
    if fields["append"] is None:
        fields["rotary"] = ""
    elif fields["entries"] == "repeated":
        fields["entries"] = "permuted"
    if fields["page_size"]:
        fields["entries"] = ""
    if not is_varlen:
        fields["unused"] = 0
    if fields["rotary_dim"] > fields["head_dim"] or not fields["rotary"]:
        fields["rotary_dim"] = 0
    if fields["rotary"] and not fields["rotary_dim"]:
        fields["rotary_dim"] = fields["head_dim"] // 16 * 16
    case = DecodeCase(cached, queries if is_varlen else queries[0], **fields)
    if not padded:
        return case
    return case.but(leftpad=tuple(map(min, leftpad, case.ends)))


def explore(body: Callable[..., None], device: str, **strategies: Any) -> None:
    """body(case, ...) on many drawn arguments."""

    def checked(case: Case, **arguments: Any) -> None:
        hypothesis.assume(device == "cpu" or is_built(case))
        body(case, **arguments)

    settings = hypothesis.settings(
        max_examples=CPU_EXAMPLES if device == "cpu" else EXAMPLES_PER_ROUND,
        deadline=None,
        database=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    seed, end = SEED, time.monotonic() + FUZZ_SECONDS
    while True:
        print(f"hypothesis seed {seed} (the first is FLASH_ATTN_TEST_SEED)")
        hypothesis.seed(seed)(settings(hypothesis.given(**strategies)(checked)))()
        seed += 1_000_003
        if device == "cpu" or time.monotonic() > end:
            return


def rearranged(x: Inputs, layout: str, which: int) -> Inputs:
    """Some of the four tensors (bits of `which`) in another layout."""
    known = (heads_first, misaligned_base, odd_row_stride, odd_head_stride)
    function = next((f for f in known if f.__name__ == layout), None)
    tensors = [x.q, x.k, x.v, x.dout]
    if function is not None:
        tensors = [function(t) if which >> i & 1 else t for i, t in enumerate(tensors)]
    return Inputs(*tensors)


choices = dict(
    scale=st.sampled_from((None, None, 0.3, 1.0, 0.0, -0.2)),
    with_dlse=st.booleans(),
    deterministic=st.booleans(),
)


def test_dense(device: str) -> None:
    def check(
        case: AttnCase,
        scale: float | None,
        with_dlse: bool,
        deterministic: bool,
        layout: str,
        which: int,
    ) -> None:
        x = rearranged(make_inputs(case, device), layout, which)
        dlse = make_dlse(case, device) if with_dlse else None
        check_case(case, x, scale=scale, dlse=dlse, deterministic=deterministic)

    layouts = dict(layout=st.sampled_from(LAYOUTS), which=st.integers(1, 15))
    explore(check, device, case=dense_cases(device), **choices, **layouts)


def test_varlen(device: str) -> None:
    def check(case: VarlenCase, scale: float | None, with_dlse: bool, deterministic: bool) -> None:
        x = make_varlen_inputs(case, device)
        dlse = make_dlse(case, device) if with_dlse else None
        check_varlen(case, x, scale=scale, dlse=dlse, deterministic=deterministic)

    explore(check, device, case=varlen_cases(device), **choices)


def test_pages(device: str) -> None:
    def check(case: VarlenCase, page_size: int) -> None:
        x = make_varlen_inputs(case, device)
        pages, table = make_pages(case, x, page_size)
        options = features_of(case, device) | dict(causal=case.causal)
        ours = run_varlen(pages, backward=False, block_table=table, **options)
        check_forward(case, x, ours)

    sizes = st.sampled_from((16, 32, 48, 80, 128, 256))
    cases = varlen_cases(device).map(lambda case: case.but(dropout=0.0))
    if device == "cuda":  # pages are never padded to another head dimension
        cases = cases.map(lambda case: case.but(head_dim=-(-case.head_dim // 8) * 8))
    explore(check, device, case=cases, page_size=sizes)


def test_decoding(device: str) -> None:
    def check(case: DecodeCase) -> None:
        check_decode(case, make_decode_inputs(case, device))

    explore(check, device, case=decode_cases(device))


def test_deterministic_mode_repeats(device: str) -> None:
    def check(case: VarlenCase) -> None:
        x = make_varlen_inputs(case, device)
        options = features_of(case, device) | dict(causal=case.causal, deterministic=True)
        first, second = run_varlen(x, **options), run_varlen(x, **options)
        assert_same_result(first, second, case, dq_bitwise=True)

    explore(check, device, case=varlen_cases(device))
