"""Launches of the sm90 forward: repeats under load, back to back, graphs; memory beside results.

All are pinned to sm90: a call that these kernels do not serve would be an error.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from cases import (
    Alibi,
    AttnCase,
    Inputs,
    Mask,
    VarlenCase,
    is_built,
    make_inputs,
    make_varlen_inputs,
)
from harness import assert_bitwise, capture, features_of, run_flash
from hopper import IS_HOPPER, MULTIPROCESSORS, on_hopper
from torch import Tensor

from flash_attn import flash_attn_func, flash_attn_varlen_func

STRESSED = [
    AttnCase(1500, 1500, (8, 4), d, mask, batch=4)
    for d, mask in ((64, Mask.causal), (128, Mask.causal), (128, Mask.none), (256, Mask.causal))
]
STRESSED += [
    AttnCase(1500, 1500, (8, 4), 64, Mask.causal, batch=4, window=(300, 0)),
    AttnCase(1500, 1500, (8, 4), 192, Mask.causal, batch=4, head_dim_v=128),
    AttnCase(1500, 1500, (8, 4), 64, batch=4, softcap=5.0, alibi=Alibi.per_head),
]


@on_hopper(*STRESSED)
def test_repeats_are_bitwise_equal_under_load(
    device: str, case: AttnCase, pinned_to_sm90: None
) -> None:
    """A second stream keeps L2 and memory busy, so that loads arrive at other times."""
    x, options = make_inputs(case, device), features_of(case, device)
    want = run_flash(x.q, x.k, x.v, causal=case.causal, **options)
    options |= dict(causal=case.causal, return_attn_probs=True)
    busy = torch.zeros(96 << 20, dtype=torch.uint8, device=device)
    load, other = torch.cuda.Stream(), torch.empty_like(busy)
    load.wait_stream(torch.cuda.current_stream())
    differs = torch.zeros((), dtype=torch.bool, device=device)
    with torch.no_grad():
        for _ in range(200):
            with torch.cuda.stream(load):
                other.copy_(busy)
            out, lse, _ = flash_attn_func(x.q, x.k, x.v, **options)
            differs |= (out != want.out).any() | (lse != want.lse).any()
    torch.cuda.current_stream().wait_stream(load)
    assert not differs.item(), case


SIZES = [
    AttnCase(300, 300, (4, 1), 128, Mask.causal),
    AttnCase(1, 1, (1, 1), 64, Mask.none),
    AttnCase(130, 900, (MULTIPROCESSORS + 5, 1), 64, Mask.causal),
    AttnCase(900, 70, (9, 1), 256, Mask.causal),
]


@pytest.mark.cuda
@pytest.mark.skipif(not IS_HOPPER, reason="needs a GPU of capability 9.0 and its kernels")
def test_launches_back_to_back(device: str, pinned_to_sm90: None) -> None:
    """Grids of other sizes find the counter of tiles at zero; nothing waits in between."""
    cases = [case for case in SIZES if is_built(case)]
    inputs = [make_inputs(c, device) for c in cases]
    want = [run_flash(x.q, x.k, x.v, causal=c.causal).out for c, x in zip(cases, inputs)]
    with torch.no_grad():
        ours = [
            flash_attn_func(x.q, x.k, x.v, causal=c.causal)
            for _ in range(30)
            for c, x in zip(cases, inputs)
        ]
    for i, out in enumerate(ours):
        assert_bitwise("out", out, want[i % len(cases)], cases[i % len(cases)])


@on_hopper(
    AttnCase(1000, 1000, (8, 2), 128, Mask.causal), AttnCase(1000, 1000, (40, 8), 64, Mask.none)
)
def test_graphs_on_two_streams_at_once(device: str, case: AttnCase, pinned_to_sm90: None) -> None:
    """Each graph has a counter of its own."""
    inputs = [make_inputs(case, device, salt) for salt in (0, 1)]
    want = [run_flash(x.q, x.k, x.v, causal=case.causal).out for x in inputs]

    def step(x: Inputs) -> Callable[[], Tensor]:
        return lambda: flash_attn_func(x.q, x.k, x.v, causal=case.causal)

    with torch.no_grad():
        graphs = [capture(step(x)) for x in inputs]
    streams = [torch.cuda.Stream() for _ in inputs]
    torch.cuda.synchronize()
    for _ in range(50):
        for stream, (graph, _) in zip(streams, graphs):
            with torch.cuda.stream(stream):
                graph.replay()
    torch.cuda.synchronize()
    for (_, out), expected in zip(graphs, want):
        assert_bitwise("out", out, expected, case)


CANARY = 0x5A
SMALL_BYTES, GRANULE_BYTES = 1 << 20, 512  # the allocator's small blocks, and what it rounds to


BESIDE = [
    AttnCase(sq, sk, (2, 1), d, mask, dtype, batch=2)
    for sq, sk, d, mask, dtype in (
        (1, 1, 40, Mask.none, "bf16"),
        (7, 8, 104, Mask.causal, "fp16"),
        (65, 63, 72, Mask.none, "bf16"),
        (127, 128, 128, Mask.causal, "fp16"),
        (129, 1, 200, Mask.causal, "bf16"),
        (129, 129, 256, Mask.none, "bf16"),
    )
]
BESIDE += [AttnCase(129, 200, (2, 1), 192, Mask.causal, batch=2, head_dim_v=v) for v in (72, 128)]


@on_hopper(*BESIDE)
def test_nothing_beside_the_results_is_written(
    device: str, case: AttnCase, pinned_to_sm90: None
) -> None:
    """out and lse lie in two MiB of canaries, and the rest of these stays as it is."""
    x = make_inputs(case, device)

    def results() -> tuple[Tensor, ...]:
        return flash_attn_func(x.q, x.k, x.v, causal=case.causal, return_attn_probs=True)[:2]

    assert_beside_is_untouched(results, case)


@on_hopper(
    VarlenCase((70, 33), (90, 200), (2, 1), 72, Mask.causal),
    VarlenCase((128, 65, 1), (1, 90, 300), (1, 1), 128, Mask.none, "fp16"),
    VarlenCase((200, 63), (90, 200), (2, 2), 256, Mask.causal),
    VarlenCase((200, 63), (90, 200), (2, 2), 192, Mask.causal, head_dim_v=128),
    VarlenCase((70, 130), (90, 200), (2, 2), 136, Mask.none, head_dim_v=40),
)
def test_nothing_beside_the_results_of_sequences_is_written(
    device: str, case: VarlenCase, pinned_to_sm90: None
) -> None:
    """Their last tiles are stored row by row."""
    x = make_varlen_inputs(case, device)
    lengths = (x.cu_seqlens_q, x.cu_seqlens_k, x.max_seqlen_q, x.max_seqlen_k)

    def results() -> tuple[Tensor, ...]:
        options = dict(causal=case.causal, return_attn_probs=True)
        return flash_attn_varlen_func(x.q, x.k, x.v, *lengths, **options)[:2]

    assert_beside_is_untouched(results, case)


def assert_beside_is_untouched(call: Callable[[], tuple[Tensor, ...]], case: object) -> None:
    """Two MiB of canaries, from which `call` gets its results, stay as they are beside these."""
    pool = torch.cuda.MemPool()
    with torch.cuda.use_mem_pool(pool):
        filled = [
            torch.full((SMALL_BYTES,), CANARY, dtype=torch.uint8, device="cuda") for _ in range(2)
        ]
        begin = min(t.data_ptr() for t in filled)
        del filled
        results = call()
        used = sum(-(-t.nbytes // GRANULE_BYTES) for t in results)
        rest = [
            torch.empty(GRANULE_BYTES, dtype=torch.uint8, device="cuda")
            for _ in range(2 * SMALL_BYTES // GRANULE_BYTES - used)
        ]
    outside = [t for t in (*results, *rest) if not 0 <= t.data_ptr() - begin < 2 * SMALL_BYTES]
    assert not outside, "the allocator took other memory: nothing was tested"
    changed = (torch.stack(rest) != CANARY).any(1).nonzero().flatten().tolist()
    assert not changed, f"runs of {GRANULE_BYTES} bytes beside out and lse: {changed}; case {case}"
