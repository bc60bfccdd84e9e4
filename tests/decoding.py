"""Decoding for the tests: cases, caches of NaN with keys in some rows, what a call should do."""

from __future__ import annotations

import random
import zlib
from dataclasses import dataclass, replace
from typing import Any

import torch
from cases import UNLIMITED, Alibi, CaseBase, Mask, Window, cumulative, generator, make_alibi, randn
from harness import assert_bitwise, poison
from oracle import (
    Result,
    assert_close_rule,
    assert_same_specials,
    attention_oracle,
    attention_peer,
    per_sequence,
)
from torch import Tensor

from flash_attn import flash_attn_with_kvcache

NO_PAGE = (2**30, -1)  # entries of a block table that nobody may read


@dataclass(frozen=True)
class DecodeCase(CaseBase):
    """Sequences in a cache: `lengths` rows of each, `leftpad` of these are no keys; then `append` more.

    A tuple as seqlen_q is for cu_seqlens_q: then every query has a new key, if append is not None.
    """

    lengths: tuple[int, ...] = (100,)
    seqlen_q: int | tuple[int, ...] = 1
    heads: tuple[int, int] = (2, 1)
    head_dim: int = 64
    mask: Mask = Mask.none
    dtype: str = "bf16"
    append: int | None = None
    page_size: int = 0
    rotary: str = ""  # "interleaved" or "halves"
    rotary_dim: int = 0  # 0: all of head_dim
    entries: str = ""  # "permuted" or "repeated": cache_batch_idx
    leftpad: tuple[int, ...] = ()
    room: int = 7  # rows that the cache has beyond the longest sequence
    num_splits: int = 0
    unused: int = 0  # rows of q beyond the last sequence
    unpadded: bool = False  # the cache has head_dim itself, not the next multiple of 8
    window: Window = UNLIMITED
    softcap: float = 0.0
    alibi: Alibi = Alibi.none
    dropout: float = 0.0  # for CaseBase: there is none in decoding

    def __str__(self) -> str:
        def short(numbers: tuple[int, ...]) -> str:
            if len(numbers) <= 8:
                return ".".join(map(str, numbers))
            return f"{len(numbers)}x{zlib.crc32(str(numbers).encode()) % 10000:04d}"

        is_varlen = isinstance(self.seqlen_q, tuple)
        queries = f"cu{short(self.seqlen_q)}" if is_varlen else f"q{self.seqlen_q}"
        parts = [f"k{short(self.lengths)}", queries]
        if self.append is not None:
            parts.append("append" if is_varlen else f"append{self.append}")
        if self.page_size:
            parts.append(f"page{self.page_size}")
        if self.rotary:
            parts.append(f"{self.rotary}{self.rotary_dim or ''}")
        if self.leftpad:
            parts.append(f"pad{short(self.leftpad)}")
        parts += [self.entries] if self.entries else []
        parts += [f"splits{self.num_splits}"] if self.num_splits else []
        parts += [f"unused{self.unused}"] if self.unused else []
        parts += ["unpadded"] if self.unpadded else []
        return "-".join((*parts, self.tail()))

    @property
    def batch(self) -> int:
        return len(self.lengths)

    @property
    def lengths_q(self) -> tuple[int, ...]:
        if isinstance(self.seqlen_q, tuple):
            return self.seqlen_q
        return (self.seqlen_q,) * self.batch

    @property
    def lengths_new(self) -> tuple[int, ...]:
        if self.append is None:
            return (0,) * self.batch
        return self.seqlen_q if isinstance(self.seqlen_q, tuple) else (self.append,) * self.batch

    @property
    def begins(self) -> tuple[int, ...]:
        return self.leftpad or (0,) * self.batch

    @property
    def ends(self) -> tuple[int, ...]:
        """Rows of each sequence after the call."""
        return tuple(a + b for a, b in zip(self.lengths, self.lengths_new))

    @property
    def rows(self) -> int:
        """The capacity."""
        needed = max(self.ends) + self.room
        return -(-needed // self.page_size) * self.page_size if self.page_size else needed

    @property
    def cache_head_dim(self) -> int:
        return self.head_dim if self.unpadded else -(-self.head_dim // 8) * 8


@dataclass
class DecodeInputs:
    """Arguments of one call; `options` those that have a default, softmax_lse being asked for."""

    q: Tensor
    k_cache: Tensor
    v_cache: Tensor
    options: dict[str, Any]

    def fresh(self) -> DecodeInputs:
        """The same with caches of their own, in the same strides."""
        return replace(self, k_cache=_clone(self.k_cache), v_cache=_clone(self.v_cache))

    def but(self, **options: Any) -> DecodeInputs:
        return replace(self, options=self.options | options)


def _clone(x: Tensor) -> Tensor:
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device).copy_(x)


class Places:
    """Where the rows of each sequence are: entries or pages of the cache, others being unused."""

    def __init__(self, case: DecodeCase) -> None:
        self.case, self.table, self.index = case, None, list(range(case.batch))
        self.blocks = case.batch
        draw = random.Random(str(case))
        if case.page_size:
            self.blocks, self.table = self._deal_pages(draw)
        elif case.entries == "permuted":
            self.blocks = case.batch + 2
            self.index = draw.sample(range(self.blocks), case.batch)
        elif case.entries == "repeated":
            self.index = [draw.randrange(-(-case.batch // 2)) for _ in range(case.batch)]

    def _deal_pages(self, draw: random.Random) -> tuple[int, Tensor]:
        case, size = self.case, self.case.page_size
        table = torch.empty(case.batch, case.rows // size, dtype=torch.int32)
        table[:, ::2], table[:, 1::2] = NO_PAGE
        used = []
        for n, (begin, end) in enumerate(zip(case.begins, case.ends)):
            first = min(begin, case.lengths[n]) if case.append is not None else begin
            used += [(n, m) for m in range(first // size, -(-end // size)) if end > first]
        blocks = len(used) + 3
        for (n, m), page in zip(used, draw.sample(range(blocks), len(used))):
            table[n, m] = page
        return blocks, table

    def of(self, n: int, begin: int, end: int) -> tuple[Tensor, Tensor]:
        """Indices of the rows begin to end of sequence n."""
        rows = torch.arange(begin, end)
        if self.table is None:
            return torch.full_like(rows, self.index[n]), rows
        size = self.case.page_size
        return self.table[n, rows // size].long(), rows % size


def make_decode_inputs(case: DecodeCase, device: str, salt: int = 0) -> DecodeInputs:
    """Normally distributed inputs of `case`; NaN in all rows of the cache that are no keys."""
    gen, dtype, places = generator(case, device, salt), case.torch_dtype, Places(case)
    heads_q, heads_k = case.heads
    shape = places.blocks, case.page_size or case.rows, heads_k, case.cache_head_dim
    caches = [torch.full(shape, torch.nan, dtype=dtype, device=device) for _ in range(2)]
    for cache in caches:
        cache[..., case.head_dim :] = 0
        for n, (begin, end) in enumerate(zip(case.begins, case.lengths)):
            at = tuple(i.to(device) for i in places.of(n, begin, max(begin, end)))
            cache[(*at, slice(None), slice(case.head_dim))] = randn(
                (len(at[0]), heads_k, case.head_dim), dtype, gen
            )

    def of_queries(heads: int, length: int) -> Tensor:
        if not isinstance(case.seqlen_q, tuple):
            return randn((case.batch, length, heads, case.head_dim), dtype, gen)
        x = randn((sum(case.seqlen_q) + case.unused, heads, case.head_dim), dtype, gen)
        x[sum(case.seqlen_q) :] = torch.nan
        return x

    def int32(values: Any) -> Tensor:
        return torch.as_tensor(values, dtype=torch.int32).to(device)

    options: dict[str, Any] = dict(cache_seqlens=int32(case.lengths), causal=case.causal)
    q = of_queries(heads_q, case.lengths_q[0])
    if case.append is not None:
        options |= {name: of_queries(heads_k, case.lengths_new[0]) for name in "kv"}
    if case.rotary:
        longest = max(case.rows, max(case.lengths) + max(case.lengths_q)) + 3
        angles = torch.rand(
            (longest, (case.rotary_dim or case.head_dim) // 2), generator=gen, device=device
        )
        tables = (angles * 6.3).cos().to(dtype), (angles * 6.3).sin().to(dtype)
        options |= dict(zip(("rotary_cos", "rotary_sin"), tables))
        options["rotary_interleaved"] = case.rotary == "interleaved"
    if isinstance(case.seqlen_q, tuple):
        options |= dict(cu_seqlens_q=cumulative(case.seqlen_q, device))
        options |= dict(max_seqlen_q=max(case.seqlen_q))
    if case.entries:
        options["cache_batch_idx"] = int32(places.index)
    if case.leftpad:
        options["cache_leftpad"] = int32(case.leftpad)
    if places.table is not None:
        options["block_table"] = int32(places.table)
    if case.window != UNLIMITED:
        options["window_size"] = case.window
    if case.softcap:
        options["softcap"] = case.softcap
    if case.alibi is not Alibi.none:
        options["alibi_slopes"] = make_alibi(case, device)
    if case.num_splits:
        options["num_splits"] = case.num_splits
    return DecodeInputs(q, *caches, options)


def run_decode(x: DecodeInputs, **options: Any) -> Result:
    """flash_attn_with_kvcache, which changes the caches of x if there are new keys."""
    poison(x.q.device)
    out, lse = flash_attn_with_kvcache(
        *(x.q, x.k_cache, x.v_cache), **(x.options | options), return_softmax_lse=True
    )
    return Result(out, lse)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, position: Tensor, interleaved: bool) -> Tensor:
    """x (n, h, d) in fp64, each row by its own position."""
    c, s = (table.double()[position].unsqueeze(1) for table in (cos, sin))
    half, y = cos.shape[1], x.double().clone()
    if interleaved:
        first, second = slice(0, 2 * half, 2), slice(1, 2 * half, 2)
    else:
        first, second = slice(0, half), slice(half, 2 * half)
    a, b = x[..., first].double(), x[..., second].double()
    y[..., first], y[..., second] = a * c - b * s, a * s + b * c
    return y


@dataclass
class Expected:
    """What a call should give: results with packed queries; the caches after it."""

    want: Result  # out (total_q, h, d) in fp64, lse (h, total_q)
    peer: Result
    k_cache: Tensor
    v_cache: Tensor


def expect(case: DecodeCase, x: DecodeInputs) -> Expected:
    """By the definition, sequence by sequence.  x: as before the call."""
    places, device, options = Places(case), x.q.device, x.options
    q = (x.q if x.q.dim() == 3 else x.q.flatten(0, 1)).clone()
    k_cache, v_cache = x.k_cache.clone(), x.v_cache.clone()
    tables = options.get("rotary_cos"), options.get("rotary_sin")
    moves = case.causal or max(case.window) >= 0
    cu_q, cu_k = cumulative(case.lengths_q).tolist(), [0]
    keys, values = [], []
    for n, length in enumerate(case.lengths):
        begin, end, rows = case.begins[n], case.ends[n], slice(cu_q[n], cu_q[n + 1])
        at = tuple(i.to(device) for i in places.of(n, length, end))
        if case.append is not None:
            new = (options["k"], options["v"])
            k, v = (t[n] if t.dim() == 4 else t[rows] for t in new)
            if case.rotary:
                position = torch.arange(length, end, device=device)
                k = rotate(k, *tables, position, options["rotary_interleaved"]).to(k.dtype)
            k_cache[(*at, slice(None), slice(case.head_dim))] = k
            v_cache[(*at, slice(None), slice(case.head_dim))] = v
        if case.rotary:
            position = torch.arange(rows.stop - rows.start, device=device) * moves + length
            q[rows] = rotate(q[rows], *tables, position, options["rotary_interleaved"]).to(q.dtype)
        at = tuple(i.to(device) for i in places.of(n, begin, max(begin, end)))
        keys.append(k_cache[at][..., : case.head_dim])
        values.append(v_cache[at][..., : case.head_dim])
        cu_k.append(cu_k[-1] + len(at[0]))
    exact = dict(scale=case.scale, causal=case.causal, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k)
    for name in ("window_size", "softcap", "alibi_slopes"):
        if name in options:
            exact[name] = options[name]
    qkv = q, torch.cat(keys), torch.cat(values)
    want, peer = (per_sequence(f, *qkv, **exact) for f in (attention_oracle, attention_peer))
    return Expected(want, peer, k_cache, v_cache)


def packed(ours: Result) -> Result:
    """out (total_q, h, d) and lse (h, total_q), of either form."""
    if ours.out.dim() == 3:
        return ours
    return Result(ours.out.flatten(0, 1), ours.lse.transpose(0, 1).flatten(1))


def check_decode(case: DecodeCase, x: DecodeInputs, **options: Any) -> Result:
    """One call against the oracle: results, cache contents.  Changes the caches of x."""
    expected = expect(case, x)
    ours = run_decode(x, **options)
    assert ours.out.shape == x.q.shape and ours.out.dtype == x.q.dtype, case
    assert ours.out.is_contiguous() and ours.lse.is_contiguous(), case
    check_caches(case, x, expected)
    got = packed(ours)
    factor = 3.0 if case.alibi is Alibi.none else 5.0
    peer, want = expected.peer, expected.want
    assert_close_rule(*("out", got.out, peer.out, want.out), factor=factor, tiny=1e-5, case=case)
    check_lse(case, got.lse, want.lse)
    return ours


def check_lse(case: DecodeCase, ours: Tensor, want: Tensor) -> None:
    """To single precision; with rotary, to the rounding of rotated queries and keys."""
    assert ours.shape == want.shape, f"lse: shape {ours.shape}, want {want.shape}; case {case}"
    assert ours.dtype == (torch.float64 if case.dtype == "fp64" else torch.float32), case
    if want.numel() == 0:
        return
    assert_same_specials("lse", ours, want, case)
    error = torch.where(want.isfinite(), ours.double() - want, 0.0).abs().max().item()
    largest = torch.where(want.isfinite(), want, 0.0).abs().max().item()
    limit = 1e-12 if case.dtype == "fp64" else 1e-5
    if case.rotary:
        limit += torch.finfo(case.torch_dtype).eps
    assert error <= limit * (1 + largest), f"lse: error {error:.3g}, limit {limit:.3g}; case {case}"


def check_caches(case: DecodeCase, x: DecodeInputs, expected: Expected) -> None:
    """Values bitwise, also of rows that are nobody's; rotated keys within one rounding."""
    assert_bitwise("v_cache", x.v_cache, expected.v_cache, case)
    if not case.rotary:
        assert_bitwise("k_cache", x.k_cache, expected.k_cache, case)
        return
    rotated = case.rotary_dim or case.head_dim
    ours, want = x.k_cache[..., :rotated], expected.k_cache[..., :rotated]
    # Both round what differs by a few fp32 roundings of the larger product.
    eps = torch.finfo(case.torch_dtype).eps
    torch.testing.assert_close(ours, want, rtol=eps, atol=4e-6, equal_nan=True)
    assert_bitwise("k_cache", x.k_cache[..., rotated:], expected.k_cache[..., rotated:], case)
    places, old = Places(case), [x.k_cache.clone(), expected.k_cache.clone()]
    for cache in old:
        for n, (begin, end) in enumerate(zip(case.lengths, case.ends)):
            cache[tuple(i.to(cache.device) for i in places.of(n, begin, end))] = 0
    assert_bitwise("k_cache, rows that were there", *old, case)
