"""The sm90 forward kernels: ring, tiles without keys, tails, strides, neighbours; falling to sm80.

Where a test pins calls to sm90, one that these kernels do not serve is an error: the pin proves
that they ran.  Elsewhere the suite runs them too, as the first choice of a GPU of capability 9.0.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from cases import (
    FEATURE_SETS,
    AttnCase,
    Mask,
    VarlenCase,
    make_inputs,
    make_varlen_inputs,
    native_head_dim,
)
from harness import (
    assert_bitwise,
    assert_same_result,
    features_of,
    run_flash,
    run_varlen,
)
from hopper import (
    GENERAL_TILES,
    ISA,
    MULTIPROCESSORS,
    TILES,
    Tile,
    check,
    check_varlen,
    on_hopper,
)
from test_layouts import (
    buffer_like,
    heads_first,
    middle_of_a_longer_sequence,
    misaligned_base_by_8_bytes,
    odd_row_stride,
)
from test_varlen import check_forward as check_varlen_result
from test_varlen import fill_beside, int32, only_keys, run_forward
from torch import Tensor

from csrc.kernels import kernel_list
from flash_attn import flash_attn_func, flash_attn_with_kvcache

PAGE = Path(__file__).resolve().parents[1] / "docs" / "hopper.md"


def test_tile_table_is_read() -> None:
    """Also where a number depends on what the kernel does."""
    assert tuple(TILES) == tuple(GENERAL_TILES) == kernel_list.ONLY_HEAD_DIMS[ISA]
    plain, general = TILES[64], GENERAL_TILES[64]
    assert (plain.rows, plain.block_n, general.rows, general.block_n) == (192, 128, 192, 96)
    assert TILES[128].q_in_registers and not GENERAL_TILES[128].q_in_registers


def test_page_about_hopper_has_the_tiles_of_the_table() -> None:
    """Those of features where they are others."""
    pattern = r"^\| (\d+)(, features|) \|" + r" (\d+) \|" * 6 + r" (registers|shared) \|"
    rows = re.findall(pattern, PAGE.read_text(), re.MULTILINE)
    found = {(int(d), bool(features)): numbers for d, features, *numbers in rows}

    def cells(d: int, tile: Tile) -> list[str]:
        kb = 2 * d * (tile.stages * tile.block_n + tile.q_buffers * tile.rows) // 1024
        numbers = (tile.rows // 64, tile.rows, tile.block_n, tile.stages, tile.q_buffers, kb)
        return [*map(str, numbers), "registers" if tile.q_in_registers else "shared"]

    want = {(d, False): cells(d, tile) for d, tile in TILES.items()}
    want |= {(d, True): cells(d, t) for d, t in GENERAL_TILES.items() if t != TILES[d]}
    assert found == want


# Keys around the ends of the ring, whose stages K and V share; windows have masks at both ends.
RING = [
    AttnCase(200, keys, (2, 1), d, mask, dtype, window=window)
    for (d, (_, block_n, stages, *_)), dtype in zip(TILES.items(), ("bf16", "fp16") * 3)
    for keys, mask, window in (
        (1, Mask.none, (-1, -1)),
        (block_n, Mask.none, (-1, -1)),
        (stages // 2 * block_n, Mask.none, (-1, -1)),
        (stages * block_n, Mask.none, (-1, -1)),
        (stages * block_n + 1, Mask.causal, (-1, -1)),
        ((stages + 1) * block_n, Mask.causal, (-1, -1)),
        ((stages + 1) * block_n - 1, Mask.none, (block_n + 3, 5)),
    )
]


@on_hopper(*RING)
def test_keys_around_the_ends_of_the_ring(
    device: str, case: AttnCase, pinned_to_sm90: None
) -> None:
    check(case, make_inputs(case, device))


AROUND_THE_GPU = [
    AttnCase(50, 150, (heads, 1), d, Mask.causal)
    for d in (64, 128, 256)
    for heads in (MULTIPROCESSORS - 1, MULTIPROCESSORS, MULTIPROCESSORS + 1)
]
AROUND_THE_GPU.append(AttnCase(400, 400, (MULTIPROCESSORS, 1), 64, Mask.causal))


@on_hopper(*AROUND_THE_GPU)
def test_tiles_around_the_number_of_multiprocessors(
    device: str, case: AttnCase, pinned_to_sm90: None
) -> None:
    """Some thread blocks take no second tile, one does, all do."""
    check(case, make_inputs(case, device))


BLIND = [
    AttnCase(sq, sk, (3, 1), d, Mask.causal, batch=2)
    for d in TILES
    for sq, sk in ((500, 100), (400, 1), (193, 192))
]


@on_hopper(*BLIND)
def test_tiles_without_keys(device: str, case: AttnCase, pinned_to_sm90: None) -> None:
    ours = check(case, make_inputs(case, device))
    blind = case.seqlen_q - case.seqlen_k
    assert not ours.out[:, :blind].any() and (ours.lse[:, :, :blind] == torch.inf).all(), case


EMPTY_SEQUENCES = [
    VarlenCase(lengths_q, lengths_k, (2, 1), d, mask, "bf16", unused)
    for d, mask in ((64, Mask.none), (128, Mask.causal), (192, Mask.causal), (256, Mask.none))
    for lengths_q, lengths_k, unused in (
        ((0, 300, 0, 200, 0), (0, 0, 500, 200, 70), (0, 0)),
        ((150, 300, 20), (0, 200, 100), (9, 30)),
        ((150, 300, 20), (100, 0, 64), (200, 0)),
        ((150, 300, 200), (100, 200, 0), (0, 300)),
        ((129, 300, 1, 64), (1, 90, 0, 64), (0, 0)),
    )
]


@on_hopper(*EMPTY_SEQUENCES)
def test_empty_sequences_between_others(
    device: str, case: VarlenCase, pinned_to_sm90: None
) -> None:
    """Also NaN in the rows of no sequence, which TMA loads with the last sequence's."""
    check_varlen(case, make_varlen_inputs(case, device))


PAIRS = (
    *((1, 1), (1, 129), (7, 8), (8, 7), (63, 65), (64, 64), (65, 63), (127, 128), (128, 127)),
    *((129, 1), (129, 129), (63, 64)),
)
PADDED = (8, 40, 72, 104, 128, 200, 256)
TAILS = [
    AttnCase(*pair, (2, 1), PADDED[(i + offset) % 7], mask, dtype, batch=2)
    for i, pair in enumerate(PAIRS)
    for offset, mask, dtype in ((0, Mask.none, "bf16"), (3, Mask.causal, "fp16"))
    if native_head_dim(PADDED[(i + offset) % 7]) in TILES
]


@on_hopper(*TAILS)
def test_tails(device: str, case: AttnCase, pinned_to_sm90: None) -> None:
    check(case, make_inputs(case, device))


def one_of_three(x: Tensor) -> Tensor:
    """A slice of packed q, k, v."""
    return buffer_like(x, *x.shape[:2], 3, *x.shape[2:])[:, :, 1].copy_(x)


def base_of_16_bytes(x: Tensor) -> Tensor:
    return buffer_like(x, x.numel() + 16)[8:-8].view(x.shape).copy_(x)


STRIDES = [
    AttnCase(130, 200, (4, 2), 64, Mask.causal, batch=2),
    AttnCase(130, 200, (4, 2), 104, Mask.none, "fp16", batch=2),
    AttnCase(70, 300, (4, 1), 256, Mask.causal, batch=3),
]


@on_hopper(*STRIDES)
@pytest.mark.parametrize(
    "layout",
    [one_of_three, heads_first, base_of_16_bytes, middle_of_a_longer_sequence],
    ids=lambda f: f.__name__,
)
def test_strides_that_tma_can_address(
    device: str, case: AttnCase, layout: Callable[[Tensor], Tensor], pinned_to_sm90: None
) -> None:
    x = make_inputs(case, device)
    want = run_flash(x.q, x.k, x.v, causal=case.causal)
    assert_same_result(check(case, x.map(layout)), want, case, dq_bitwise=True)


@on_hopper(*STRIDES)
def test_expanded_heads_and_batch(device: str, case: AttnCase, pinned_to_sm90: None) -> None:
    """Dimensions of stride 0, of q too, alone and together."""
    x = make_inputs(case, device)
    x.k, x.v = x.k[:, :, :1], x.v[:1]
    x.k, x.v = (t.expand(case.kv_shape) for t in (x.k, x.v))
    x.q = x.q[:1, :, :1].expand(case.q_shape)
    want = run_flash(x.q.contiguous(), x.k.contiguous(), x.v.contiguous(), causal=case.causal)
    assert_same_result(check(case, x), want, case, dq_bitwise=True)


@on_hopper(*STRIDES)
@pytest.mark.parametrize("layout", [misaligned_base_by_8_bytes, odd_row_stride])
def test_other_strides_are_right_too(
    device: str, case: AttnCase, layout: Callable[[Tensor], Tensor]
) -> None:
    check(case, make_inputs(case, device).map(layout))


@on_hopper(*STRIDES)
def test_rows_that_are_all_the_same_stay_with_sm80(device: str, case: AttnCase, pin_isa) -> None:
    x = make_inputs(case, device)
    x.k = x.k[:, :1].expand(case.kv_shape)
    check(case, x)
    pin_isa(ISA)
    with pytest.raises(RuntimeError, match=f"serves this call.*FLASH_ATTN_ISA: {ISA}"):
        flash_attn_func(x.q, x.k, x.v)


GROUPED = [
    AttnCase(200, 260, heads, d, mask, batch=2)
    for heads, d, mask in (
        ((6, 6), 64, Mask.causal),
        ((8, 2), 96, Mask.none),
        ((8, 1), 128, Mask.causal),
        ((6, 3), 192, Mask.causal),
        ((5, 1), 256, Mask.none),
    )
]


@on_hopper(*GROUPED)
def test_grouped_heads(device: str, case: AttnCase, pinned_to_sm90: None) -> None:
    check(case, make_inputs(case, device))


PARTS = [
    VarlenCase((40, 5, 0, 130, 20), (70, 33, 9, 200, 64), (4, 2), 64, Mask.causal),
    VarlenCase((40, 1, 3, 130, 1), (70, 33, 9, 200, 64), (2, 2), 128, Mask.none, "fp16", (3, 0)),
    VarlenCase((40, 5, 9, 130, 20), (70, 33, 9, 200, 64), (4, 2), 256, Mask.none, window=(30, 9)),
]


@on_hopper(*PARTS)
@pytest.mark.parametrize(
    ("begins", "ends"),
    [
        ((0,) * 5, (70, 0, 5, 129, 63)),
        ((1, 0, 4, 129, 17), None),
        ((1, 0, 4, 129, 17), (70, 33, 9, 190, 40)),
    ],
    ids=["seqused", "leftpad", "both"],
)
def test_used_keys_and_left_padding(
    device: str,
    case: VarlenCase,
    begins: Sequence[int],
    ends: Sequence[int] | None,
    pinned_to_sm90: None,
) -> None:
    """NaN in the keys that do not count."""
    x, last = make_varlen_inputs(case, device), ends or case.lengths_k
    options = {"leftpad_k": int32(begins, device)} if any(begins) else {}
    options |= {} if ends is None else {"seqused_k": int32(ends, device)}
    _, dense = only_keys(case, x, begins, last)
    ours = run_forward(case, fill_beside(x, begins, last), **options)
    check_varlen_result(case, dense, ours, features_of(case, device))


@on_hopper(AttnCase(512, 600, (32, 4), 128, Mask.causal, batch=2))
def test_long_prompt_with_a_cache(device: str, case: AttnCase, pinned_to_sm90: None) -> None:
    """The forward kernels serve it; rows beyond the length hold NaN."""
    x = make_inputs(case, device)
    k_cache, v_cache = (buffer_like(t, 2, 700, 4, 128) for t in (x.k, x.v))
    k_cache[:, :600], v_cache[:, :600] = x.k, x.v
    out = flash_attn_with_kvcache(x.q, k_cache, v_cache, cache_seqlens=600, causal=True)
    assert_bitwise("out", out, run_flash(x.q, x.k, x.v, causal=True).out, case)


NEIGHBOURS = [
    VarlenCase((100, 90, 70), (700, 130, 600), (2, 1), d, mask)
    for d, mask in ((64, Mask.causal), (104, Mask.none), (192, Mask.none), (256, Mask.causal))
]


@on_hopper(*NEIGHBOURS)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, 50.0], ids=str)
def test_what_neighbours_hold_changes_no_bit(
    device: str, case: VarlenCase, value: float, pinned_to_sm90: None
) -> None:
    """TMA brings rows of the sequence in the middle into tiles and warps of the first one."""
    x = make_varlen_inputs(case, device)
    want = run_varlen(x, causal=case.causal, backward=False)
    (q0, q1), (k0, k1) = (t[1:3].tolist() for t in (x.cu_seqlens_q, x.cu_seqlens_k))
    for t, rows in ((x.q, slice(q0, q1)), (x.k, slice(k0, k1)), (x.v, slice(k0, k1))):
        t[rows] *= value
    ours = run_varlen(x, causal=case.causal, backward=False)
    for rows in (slice(0, q0), slice(q1, None)):
        assert_bitwise("out", ours.out[rows], want.out[rows], case)
        assert_bitwise("lse", ours.lse[:, rows], want.lse[:, rows], case)


UNSEEN = [AttnCase(100, 500, (2, 1), d, Mask.causal, window=(20, 0)) for d in TILES]


@on_hopper(*UNSEEN)
def test_keys_that_no_query_sees_may_hold_nan(
    device: str, case: AttnCase, pinned_to_sm90: None
) -> None:
    x, options = make_inputs(case, device), features_of(case, device)
    want = run_flash(x.q, x.k, x.v, causal=True, **options)
    first_seen = case.seqlen_k - case.seqlen_q - case.window[0]
    x.k[:, :first_seen], x.v[:, :first_seen] = torch.nan, torch.nan
    ours = run_flash(x.q, x.k, x.v, causal=True, **options)
    assert_same_result(ours, want, case, dq_bitwise=True)


@on_hopper(*(AttnCase(150, 200, (2, 1), d, batch=2) for d in TILES))
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
def test_one_value_that_is_not_finite(
    device: str, case: AttnCase, value: float, pinned_to_sm90: None
) -> None:
    """In V it reaches its own column of all queries of its batch and head, and nothing else."""
    x = make_inputs(case, device)
    x.v[1, 77, 0, 3] = value
    check(case, x)


UP_TO_32 = [
    AttnCase(130, 200, (4, 2), 32, Mask.causal),
    AttnCase(130, 200, (4, 2), 24, Mask.none, "fp16"),
    AttnCase(130, 200, (4, 2), 32, Mask.causal, **FEATURE_SETS[-1]),
]


@on_hopper(*UP_TO_32)
def test_what_sm90_does_not_serve_falls_to_sm80(device: str, case: AttnCase, pin_isa) -> None:
    """Without notice: the same bits as pinned to sm80.  Pinned to sm90 it is an error."""
    x = make_inputs(case, device)
    options = features_of(case, device) | dict(causal=case.causal)
    ours = run_flash(x.q, x.k, x.v, **options)
    pin_isa("sm80")
    assert_same_result(run_flash(x.q, x.k, x.v, **options), ours, case, dq_bitwise=True)
    pin_isa(ISA)
    message = (
        rf"head_dim {native_head_dim(case.head_dim)} with {case.dtype} serves this call on "
        rf"this GPU \(built for: sm90,sm80; allowed by FLASH_ATTN_ISA: {ISA}\)"
    )
    with pytest.raises(RuntimeError, match=message):
        flash_attn_func(x.q, x.k, x.v, **options)
