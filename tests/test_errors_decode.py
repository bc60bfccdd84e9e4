"""Wrong arguments of flash_attn_with_kvcache: refused before any launch, by name, given and allowed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_errors import Bad, cast, integers, reshaped, strided
from torch import Tensor

from flash_attn import flash_attn_with_kvcache

Change = Callable[[dict[str, Any]], dict[str, Any]]
INDICES = (
    *("cache_seqlens", "cache_batch_idx", "cache_leftpad", "block_table", "cu_seqlens_q"),
    *("rotary_cos", "rotary_sin", "alibi_slopes"),
)


def right_call(device: str) -> dict[str, Any]:
    """q (2, 3, 4, 64), caches (2, 32, 2, 64), 3 new keys for each sequence, rotary."""
    dtype = torch.float32 if device == "cpu" else torch.float16

    def zeros(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=device)

    x: dict[str, Any] = {"q": zeros(2, 3, 4, 64)}
    x |= {name: zeros(2, 32, 2, 64) for name in ("k_cache", "v_cache")}
    x |= {name: zeros(2, 3, 2, 64) for name in ("k", "v")}
    x |= {name: zeros(32, 16) for name in ("rotary_cos", "rotary_sin")}
    x["cache_seqlens"] = torch.tensor([5, 29], dtype=torch.int32, device=device)
    return x


def given(**arguments: Any) -> Change:
    return lambda x: arguments


def without(*names: str) -> Change:
    return lambda x: dict.fromkeys(names)


PLAIN = without("k", "v", "rotary_cos", "rotary_sin")


def also(*changes: Change) -> Change:
    """All changes, each on top of those before."""

    def changed(x: dict[str, Any]) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for change in changes:
            result |= change(x | result)
        return result

    return changed


def head_dim(size: int, *names: str) -> Change:
    return lambda x: {
        n: torch.zeros(*x[n].shape[:-1], size, dtype=x["q"].dtype, device=x["q"].device)
        for n in names or ("q", "k_cache", "v_cache", "k", "v")
    }


def paged(x: dict[str, Any]) -> dict[str, Any]:
    """A right call with two pages of 16 for each sequence."""
    caches = {name: x[name].new_zeros(5, 16, 2, 64) for name in ("k_cache", "v_cache")}
    table = torch.tensor([[0, 4], [2, 3]], dtype=torch.int32, device=x["q"].device)
    return caches | {"block_table": table}


def varlen(x: dict[str, Any]) -> dict[str, Any]:
    """A right call with 2 and 1 queries, and one row of no sequence."""
    shapes = {"q": (4, 4, 64), "k": (4, 2, 64), "v": (4, 2, 64)}
    tensors = {name: x["q"].new_zeros(shape) for name, shape in shapes.items()}
    cu = torch.tensor([0, 2, 3], dtype=torch.int32, device=x["q"].device)
    return tensors | {"cu_seqlens_q": cu, "max_seqlen_q": 2}


def expanded(dim: int, *names: str) -> Change:
    """Caches whose entries, rows or heads are all the same memory."""

    def changed(x: dict[str, Any]) -> dict[str, Any]:
        names_here = names or ("k_cache", "v_cache")
        return {n: x[n].narrow(dim, 0, 1).expand_as(x[n]) for n in names_here}

    return changed


def restrided(name: str, *strides: int) -> Change:
    return lambda x: {name: x[name].as_strided(x[name].shape, strides)}


def one_buffer(shift: int) -> Change:
    """v_cache begins `shift` elements behind k_cache, whose size is 8192."""

    def changed(x: dict[str, Any]) -> dict[str, Any]:
        buffer = x["q"].new_zeros(2 * 8192)
        starts = {"k_cache": 0, "v_cache": shift}
        return {n: buffer[at : at + 8192].view(2, 32, 2, 64) for n, at in starts.items()}

    return changed


def in_turns(x: dict[str, Any]) -> dict[str, Any]:
    """Keys and values of one tensor, as layers and transformers keep them."""
    both = x["q"].new_zeros(2, 32, 2, 2, 64)
    return {"k_cache": both[:, :, 0], "v_cache": both[:, :, 1]}


def in_turns_by_page(x: dict[str, Any]) -> dict[str, Any]:
    """One tensor (pages, 2, ...), in which values have another order of dimensions than keys."""
    both = x["q"].new_zeros(5, 2, 16 * 2 * 64)
    caches = {"k_cache": both[:, 0].view(5, 16, 2, 64)}
    return paged(x) | caches | {"v_cache": both[:, 1].view(5, 2, 16, 64).transpose(1, 2)}


RIGHT = {
    "append": given(),
    "head_dim_60": head_dim(60),
    "expanded_entries_that_are_read": also(PLAIN, expanded(0)),
    "expanded_pages_that_are_read": also(PLAIN, paged, expanded(0)),
    "keys_that_are_the_values": also(PLAIN, one_buffer(0)),
    "keys_and_values_in_turns": in_turns,
    "keys_and_values_in_turns_by_page": in_turns_by_page,
    "keys_then_values": one_buffer(8192),
    "page_that_two_sequences_read": also(
        paged,
        integers("cache_seqlens", 16, 29),
        lambda x: {"block_table": x["block_table"].masked_fill(x["block_table"] == 2, 0)},
    ),
    "plain": PLAIN,
    "paged": paged,
    "varlen": varlen,
    "varlen_paged": also(paged, varlen),
    "entries": lambda x: integers("cache_batch_idx", 1, 0)(x),
    "leftpad": lambda x: integers("cache_leftpad", 8, 0)(x),
    "number": given(cache_seqlens=29),
    "splits": given(num_splits=128),
    "pages_to_spare": also(PLAIN, paged, lambda x: {"block_table": x["block_table"].repeat(1, 2)}),
    "entries_twice": also(PLAIN, integers("cache_batch_idx", 1, 1)),
}

SHAPES = [
    Bad("q_with_3_dimensions", reshaped("q", 3, 4, 64), ("q", "(3, 4, 64)", "cu_seqlens_q")),
    Bad("q_with_4_and_cu_seqlens", also(varlen, reshaped("q", 2, 3, 4, 64)), ("q", "total_q")),
    Bad("k_cache_with_3", reshaped("k_cache", 64, 2, 64), ("k_cache", "(64, 2, 64)", "paged")),
    Bad("v_cache_shorter", reshaped("v_cache", 2, 31, 2, 64), ("v_cache", "(2, 31, 2, 64)")),
    Bad("v_cache_other_heads", reshaped("v_cache", 2, 32, 1, 64), ("v_cache", "(2, 32, 1, 64)")),
    Bad("batch_0", also(PLAIN, lambda x: {"q": x["q"][:0]}), ("batch size must be positive",)),
    Bad(
        "one_entry_for_two",
        lambda x: {n: x[n][:1] for n in ("k_cache", "v_cache")},
        ("k_cache", "2 sequences", "cache_batch_idx", "(1, 32, 2, 64)"),
    ),
    Bad(
        "3_heads_in_cache",
        lambda x: {n: x[n].repeat(1, 1, 2, 1)[:, :, :3] for n in ("k_cache", "v_cache")},
        ("Number of heads in key/value must divide number of heads in query", "3", "4"),
    ),
    Bad("head_dim_264", head_dim(264), ("at most 256", "264")),
    Bad("head_dim_0", head_dim(0), ("head", "0")),
    Bad("cache_of_head_dim_72", head_dim(72, "k_cache", "v_cache"), ("k_cache", "72", "64")),
    Bad(
        "cache_of_head_dim_61_for_60",
        also(head_dim(60, "q", "k", "v"), head_dim(61, "k_cache", "v_cache")),
        ("k_cache", "rounded up to a multiple of 8", "(2, 32, 2, 61)", "(2, 3, 4, 60)"),
    ),
]
DTYPES = [
    Bad("k_cache_in_fp64", cast(torch.float64, "k_cache"), ("query and key", "k_cache", "float64")),
    Bad("v_cache_in_fp64", cast(torch.float64, "v_cache"), ("query and value", "v_cache")),
    Bad("q_in_fp64", cast(torch.float64, "q"), ("float64",)),
    Bad("k_in_fp64", cast(torch.float64, "k"), ("query and key must have the same dtype", "k ")),
    Bad("v_in_fp64", cast(torch.float64, "v"), ("query and value must have the same dtype", "v ")),
    Bad(
        "all_int32",
        cast(torch.int32, "q", "k_cache", "v_cache", "k", "v"),
        ("q: FlashAttention only support fp16 and bf16 data type", "int32"),
    ),
    Bad("cos_in_fp64", cast(torch.float64, "rotary_cos"), ("rotary_cos must have the same dtype",)),
    Bad("sin_in_fp64", cast(torch.float64, "rotary_sin"), ("rotary_sin must have the same dtype",)),
    *(
        Bad(f"{name}_on_meta", lambda x, n=name: {n: x[n].to("meta")}, (name, "meta", "device"))
        for name in ("k_cache", "v_cache", "k", "v", "rotary_cos", "rotary_sin", "cache_seqlens")
    ),
]


def gaps(*names: str) -> Change:
    return lambda x: {n: x[n].repeat_interleave(2, -1)[..., ::2] for n in names}


STRIDES = [
    Bad("k_cache_with_gaps", gaps("k_cache"), ("k_cache must have contiguous last dimension",)),
    Bad("v_cache_with_gaps", gaps("v_cache"), ("v_cache must have contiguous last dimension",)),
    Bad("cos_with_gaps", gaps("rotary_cos"), ("rotary_cos must have contiguous last dimension",)),
    Bad("sin_with_gaps", gaps("rotary_sin"), ("rotary_sin must have contiguous last dimension",)),
    Bad("lengths_with_gaps", strided("cache_seqlens"), ("cache_seqlens must be contiguous",)),
    Bad("table_with_gaps", also(paged, strided("block_table")), ("block_table", "contiguous")),
]
OVERLAPS = [
    Bad(
        "expanded_entries",
        expanded(0),
        ("k_cache", "overlap itself", "0, 128, 64, 1", "2, 32, 2, 64"),
    ),
    Bad("expanded_rows", expanded(1), ("k_cache", "overlap itself")),
    Bad("expanded_heads", expanded(2, "v_cache"), ("v_cache", "overlap itself", "4096, 128, 0, 1")),
    Bad("expanded_pages", also(paged, expanded(0)), ("k_cache", "overlap itself", "5, 16, 2, 64")),
    Bad("expanded_and_varlen", also(varlen, expanded(0)), ("k_cache", "overlap itself")),
    Bad("expanded_head_dim_59", also(head_dim(59), expanded(0)), ("k_cache", "overlap itself")),
    Bad("rows_that_overlap", restrided("k_cache", 4096, 64, 64, 1), ("k_cache", "overlap itself")),
    Bad("entries_that_overlap", restrided("v_cache", 256, 128, 64, 1), ("v_cache", "itself")),
    Bad("keys_that_are_the_values", one_buffer(0), ("v_cache", "overlap k_cache")),
    Bad("keys_one_row_before_values", one_buffer(128), ("v_cache", "overlap k_cache")),
    Bad("last_row_of_keys_in_values", one_buffer(8192 - 64), ("v_cache", "overlap k_cache")),
]
NEW = [
    Bad(
        "k_alone",
        without("v", "rotary_cos", "rotary_sin"),
        ("If key is supplied, value must also be passed in", "k without v"),
    ),
    Bad("v_alone", without("k", "rotary_cos", "rotary_sin"), ("v without k",)),
    Bad(
        "no_lengths",
        without("cache_seqlens"),
        ("If key is supplied, seqlens_k must also be passed in", "cache_seqlens"),
    ),
    Bad("k_of_another_batch", reshaped("k", 1, 3, 2, 64), ("k must", "(1, 3, 2, 64)", "(2, 3,")),
    Bad("k_of_query_heads", reshaped("k", 2, 3, 4, 64), ("k must", "(2, 3, 4, 64)", "(2, 3, 2")),
    Bad("k_with_3_dimensions", reshaped("k", 3, 2, 64), ("k must", "seqlen_new", "(3, 2, 64)")),
    Bad("v_of_another_length", reshaped("v", 2, 2, 2, 64), ("v must", "(2, 2, 2, 64)")),
    Bad(
        "k_longer_than_cache",
        lambda x: {n: x["q"].new_zeros(2, 33, 2, 64) for n in ("k", "v")},
        ("it must have seqlen <= the seqlen of the KV cache", "33", "32"),
    ),
    Bad(
        "other_new_keys_than_queries",
        also(varlen, lambda x: {n: x["q"].new_zeros(3, 2, 64) for n in ("k", "v")}),
        ("k must", "total_q", "(4, 2, 64)", "(3, 2, 64)"),
    ),
]


def tables(*shape: int) -> Change:
    return lambda x: {n: x["q"].new_zeros(shape) for n in ("rotary_cos", "rotary_sin")}


ROTARY = [
    Bad("cos_alone", without("rotary_sin"), ("rotary_cos", "rotary_sin")),
    Bad("sin_alone", without("rotary_cos"), ("rotary_sin", "rotary_cos")),
    Bad("rotary_of_q_alone", without("k", "v"), ("If rotary cos/sin are provided, new key",)),
    Bad("rotary_dim_80", tables(32, 40), ("rotary_dim must be <= headdim", "80", "64")),
    Bad("rotary_dim_24", tables(32, 12), ("Only rotary dimensions divisible by 16", "24")),
    Bad("rotary_dim_0", tables(32, 0), ("rotary", "0")),
    Bad(
        "short_tables",
        tables(31, 16),
        ("cos/sin seqlen must be at least the seqlen of KV cache", "31", "32"),
    ),
    Bad("cos_with_3_dimensions", tables(1, 32, 16), ("rotary_cos", "(1, 32, 16)")),
    Bad("sin_of_another_shape", reshaped("rotary_sin", 33, 16), ("rotary_sin", "(33, 16)")),
]
ENTRIES = [
    Bad(
        "lengths_in_int64",
        cast(torch.int64, "cache_seqlens"),
        ("cache_seqlens must have dtype int32", "int64"),
    ),
    Bad("3_lengths", integers("cache_seqlens", 1, 1, 1), ("cache_seqlens", "(3,)", "(2,)")),
    Bad("length_of_a_half", given(cache_seqlens=1.5), ("cache_seqlens", "integer", "1.5")),
    Bad("length_negative", given(cache_seqlens=-1), ("cache_seqlens", "-1")),
    Bad("length_30", given(cache_seqlens=30), ("cache_seqlens", "30 + 3", "32")),
    Bad("length_33", also(PLAIN, given(cache_seqlens=33)), ("cache_seqlens", "33", "32")),
    Bad("paged_length_30", also(paged, given(cache_seqlens=30)), ("block_table", "30", "32")),
    Bad(
        "entries_in_int64",
        integers("cache_batch_idx", 0, 1, dtype=torch.int64),
        ("cache_batch_idx must have dtype int32", "int64"),
    ),
    Bad("3_entries", integers("cache_batch_idx", 0, 1, 1), ("cache_batch_idx", "(3,)", "(2,)")),
    Bad("1_leftpad", integers("cache_leftpad", 0), ("cache_leftpad", "(1,)", "(2,)")),
    Bad(
        "entries_of_pages",
        also(paged, integers("cache_batch_idx", 0, 1)),
        ("Paged KVcache does not support cache_batch_idx",),
    ),
    Bad("table_of_1", also(paged, lambda x: {"block_table": x["block_table"][:1]}), ("(1, 2)",)),
    Bad("table_in_int64", also(paged, cast(torch.int64, "block_table")), ("block_table", "int32")),
    Bad("table_flat", also(paged, integers("block_table", 0, 1)), ("block_table", "(2,)")),
    *(
        Bad(
            f"pages_of_{size}",
            also(paged, reshaped("k_cache", 5, size, 2, 64), reshaped("v_cache", 5, size, 2, 64)),
            ("Paged KV cache block size must be divisible by 16", str(size)),
        )
        for size in (0, 8, 24)
    ),
]
VALUES = [
    Bad("splits_129", given(num_splits=129), ("num_splits > 128 not supported", "129")),
    Bad("splits_negative", given(num_splits=-1), ("num_splits", "-1")),
    Bad("splits_of_a_half", given(num_splits=0.5), ("num_splits", "0.5")),
    Bad("softcap_negative", given(softcap=-1.0), ("softcap", "-1.0")),
    Bad("window_of_3", given(window_size=(1, 2, 3)), ("window_size", "(1, 2, 3)")),
    Bad(
        "slopes_of_key_heads",
        lambda x: {"alibi_slopes": torch.ones(2, device=x["q"].device)},
        ("alibi_slopes", "(2,)", "(4,)", "(2, 4)"),
    ),
    Bad("longest_alone", given(max_seqlen_q=3), ("max_seqlen_q", "cu_seqlens_q", "3")),
    Bad("no_longest", also(varlen, given(max_seqlen_q=None)), ("max_seqlen_q", "cu_seqlens_q")),
    Bad("longest_negative", also(varlen, given(max_seqlen_q=-1)), ("max_seqlen_q", "-1")),
    Bad("longest_of_a_half", also(varlen, given(max_seqlen_q=1.5)), ("max_seqlen_q", "1.5")),
    Bad(
        "cu_seqlens_q_in_int64",
        also(varlen, cast(torch.int64, "cu_seqlens_q")),
        ("cu_seqlens_q must have dtype int32", "int64"),
    ),
    Bad("cu_seqlens_q_of_one", also(varlen, integers("cu_seqlens_q", 0)), ("batch size", "(1,)")),
    Bad("cu_seqlens_q_of_3", also(varlen, integers("cu_seqlens_q", 0, 1, 2, 3)), ("(2,)", "(3,)")),
]
# What only the tensors' contents tell.
CONTENTS = [
    Bad("length_of_1", integers("cache_seqlens", 5, 30), ("cache_seqlens[1]", "30 + 3", "32")),
    Bad("length_below_0", integers("cache_seqlens", -1, 3), ("cache_seqlens[0]", "-1")),
    Bad(
        "more_rows_than_cache",
        also(PLAIN, integers("cache_seqlens", 33, 32)),
        ("cache_seqlens[0]", "33", "seqlen_cache = 32"),
    ),
    Bad(
        "more_rows_than_pages",
        also(paged, PLAIN, integers("cache_seqlens", 1, 40)),
        ("cache_seqlens[1]", "40", "block_table, max_blocks * page_size = 32"),
    ),
    Bad("entry_2", integers("cache_batch_idx", 0, 2), ("cache_batch_idx[1]", "0 to 1", "2")),
    Bad("entry_below_0", integers("cache_batch_idx", -1, 1), ("cache_batch_idx[0]", "-1")),
    Bad("entry_twice", integers("cache_batch_idx", 1, 1), ("cache_batch_idx", "twice", "[1, 1]")),
    Bad("leftpad_9", integers("cache_leftpad", 9, 0), ("cache_leftpad[0]", "0 to 8", "9")),
    Bad("leftpad_below_0", integers("cache_leftpad", 0, -3), ("cache_leftpad[1]", "-3")),
    Bad(
        "page_that_is_not_there",
        also(paged, lambda x: {"block_table": x["block_table"] + 2}),
        ("block_table[1, 1]", "0 to 4", "5"),
    ),
    Bad(
        "negative_page",
        also(paged, lambda x: {"block_table": x["block_table"] - 3}),
        ("block_table[0, 0]", "-3"),
    ),
    Bad(
        "no_page_for_new_keys",
        also(paged, integers("cache_seqlens", 5, 16), lambda x: hole(x["block_table"])),
        ("block_table[1, 1]", "-1"),
    ),
    Bad(
        "page_twice",
        also(
            paged,
            integers("cache_seqlens", 5, 21),
            lambda x: {"block_table": x["block_table"].masked_fill(x["block_table"] == 3, 0)},
        ),
        ("block_table must not name a block twice", "block 0", "sequences 0 and 1"),
    ),
    Bad("cu_seqlens_q_from_1", also(varlen, integers("cu_seqlens_q", 1, 2, 3)), ("start at 0",)),
    Bad("cu_seqlens_q_falls", also(varlen, integers("cu_seqlens_q", 0, 2, 1)), ("decrease",)),
    Bad("cu_seqlens_q_too_far", also(varlen, integers("cu_seqlens_q", 0, 2, 5)), ("4 rows", "5")),
    Bad("longest_too_short", also(varlen, given(max_seqlen_q=1)), ("max_seqlen_q", "2", "1")),
    Bad(
        "varlen_beyond_cache",
        also(varlen, integers("cache_seqlens", 31, 31)),
        ("cache_seqlens[0]", "31 + 2"),
    ),
    Bad(
        "query_beyond_tables",
        also(reshaped("q", 2, 9, 4, 64), given(causal=True)),
        ("rotary_cos", "[1]", "0 to 32", "38"),
    ),
]


def hole(table: Tensor) -> dict[str, Tensor]:
    table = table.clone()
    table[1, 1] = -1
    return {"block_table": table}


@pytest.mark.parametrize("name", RIGHT)
def test_right_call_is_taken(device: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASH_ATTN_CHECK_DEVICE_DATA", "1")
    x = right_call(device)
    x |= RIGHT[name](x)
    assert flash_attn_with_kvcache(**x).shape == x["q"].shape


@pytest.mark.parametrize(
    "bad",
    [*SHAPES, *DTYPES, *STRIDES, *OVERLAPS, *NEW, *ROTARY, *ENTRIES, *VALUES, *CONTENTS],
    ids=str,
)
def test_wrong_call_is_refused(device: str, bad: Bad, monkeypatch: pytest.MonkeyPatch) -> None:
    """And nothing is written."""
    if bad in CONTENTS:
        monkeypatch.setenv("FLASH_ATTN_CHECK_DEVICE_DATA", "1")
    x = right_call(device)
    x |= bad.change(x)
    before = {n: x[n].clone() for n in ("k_cache", "v_cache")}
    for name in ("k", "v"):
        if isinstance(x[name], Tensor) and x[name].device.type != "meta":
            x[name] = x[name] + torch.ones_like(x[name])
    with pytest.raises(RuntimeError) as caught:
        flash_attn_with_kvcache(**x)
    missing = [word for word in bad.words if word not in str(caught.value)]
    assert not missing, f"{missing} not in: {caught.value}"
    for name, want in before.items():
        assert want.device.type == "meta" or torch.equal(x[name], want), name


@pytest.mark.parametrize("size", [59, 60, 63])
def test_head_dim_is_padded_to_that_of_the_cache(device: str, size: int) -> None:
    x = right_call(device)
    x |= head_dim(size, "q", "k", "v")(x)
    assert flash_attn_with_kvcache(**x).shape == (2, 3, 4, size)


@pytest.mark.cuda
@pytest.mark.parametrize("name", ["q", "k_cache", "v_cache", "k", "v", *INDICES])
def test_one_tensor_on_the_cpu(device: str, name: str) -> None:
    x = right_call(device)
    if name == "block_table":
        x |= paged(x)
    elif name == "cu_seqlens_q":
        x |= varlen(x)
    elif name in ("cache_batch_idx", "cache_leftpad"):
        x |= integers(name, 0, 1)(x)
    elif name == "alibi_slopes":
        x[name] = torch.ones(4, device=device)
    flash_attn_with_kvcache(**x)
    with pytest.raises(RuntimeError, match="device|cpu|CUDA"):
        flash_attn_with_kvcache(**(x | {name: x[name].cpu()}))


@pytest.mark.parametrize("is_new", [False, True], ids=["", "append"])
def test_one_column_may_have_any_stride(device: str, is_new: bool) -> None:
    """A head_dim of 1: the stride of the last dimension is never used."""
    dtype = torch.float16
    gen = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(2, 3, 2, 1, generator=gen).to(device, dtype) for _ in range(3))
    caches = [torch.randn(2, 32, 2, 1, generator=gen).to(device, dtype) for _ in range(2)]
    new = dict(k=k, v=v) if is_new else {}
    lengths = torch.tensor([9, 20], dtype=torch.int32, device=device)

    def attend(k_cache: torch.Tensor, v_cache: torch.Tensor) -> torch.Tensor:
        return flash_attn_with_kvcache(q, k_cache, v_cache, **new, cache_seqlens=lengths)

    strided = [t.clone().as_strided(t.shape, (64, 2, 1, 7)) for t in caches]
    assert torch.equal(attend(*strided), attend(*caches))
    assert all(torch.equal(a, b) for a, b in zip(strided, caches))
    call = torch.ops.flash_attn._flash_attn_kvcache
    rest = None, 3, lengths, 0, None, None, None, 1.0, False, -1, -1, 0.0, None, 0
    for a, b in zip(call(q, *strided, *rest), call(q, *caches, *rest)):
        assert torch.equal(a, b)


@pytest.mark.cuda
def test_strides_that_vectors_do_not_fit(device: str) -> None:
    x = right_call(device)
    wide = torch.zeros(2, 32, 2, 68, dtype=x["q"].dtype, device=device)
    for name in ("k_cache", "v_cache"):
        with pytest.raises(RuntimeError, match=f"{name}: strides must be multiples of 8"):
            flash_attn_with_kvcache(**(x | {name: wide[..., :64]}))
    shifted = torch.zeros(2 * 32 * 2 * 64 + 8, dtype=x["q"].dtype, device=device)[4:-4]
    for name in ("k_cache", "v_cache"):
        with pytest.raises(RuntimeError, match=f"{name}.*(16 bytes|align)"):
            flash_attn_with_kvcache(**(x | {name: shifted.view(2, 32, 2, 64)}))


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_cuda_takes_only_half_precision(device: str, dtype: torch.dtype) -> None:
    x = right_call(device)
    with pytest.raises(RuntimeError, match="fp16 and bf16"):
        flash_attn_with_kvcache(**(x | cast(dtype, "q", "k_cache", "v_cache", "k", "v")(x)))
