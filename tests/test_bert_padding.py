"""Padding and unpadding: values, places and gradients against loops over the batch."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from flash_attn import bert_padding, flash_attn_func, flash_attn_varlen_func
from flash_attn.bert_padding import (
    index_first_axis,
    index_first_axis_residual,
    index_put_first_axis,
    pad_input,
    unpad_input,
    unpad_input_for_concatenated_sequences,
)

MASKS = {
    "right": [[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1]],
    "left": [[0, 1, 1, 1], [0, 0, 0, 1], [1, 1, 1, 1]],
    "holes": [[1, 0, 1, 0], [0, 1, 1, 0], [0, 0, 0, 1]],
    "empty_row": [[1, 1, 0, 0], [0, 0, 0, 0], [1, 1, 1, 0]],
    "all": [[1, 1, 1, 1], [1, 1, 1, 1]],
    "none": [[0, 0], [0, 0]],
}
every_mask = pytest.mark.parametrize("name", MASKS)


def by_hand(x: Tensor, mask: list[list[int]]) -> tuple[list[Tensor], list[int], list[int]]:
    """The tokens, where they stood, and the sequences' lengths."""
    tokens, places = [], []
    for b, row in enumerate(mask):
        for i, there in enumerate(row):
            if there:
                tokens.append(x[b, i])
                places.append(b * len(row) + i)
    return tokens, places, [sum(row) for row in mask]


@every_mask
@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.int32, torch.float32], ids=str)
@pytest.mark.parametrize("trailing", [(), (3,), (2, 5)], ids=str)
def test_unpad_takes_the_tokens(
    name: str, dtype: torch.dtype, trailing: tuple[int, ...], device: str
) -> None:
    mask = MASKS[name]
    x = torch.randn(len(mask), len(mask[0]), *trailing, device=device)
    tokens, places, lengths = by_hand(x, mask)
    out, indices, cu_seqlens, max_seqlen, seqused = unpad_input(
        x, torch.tensor(mask, device=device).to(dtype)
    )
    assert torch.equal(out, torch.stack(tokens) if tokens else x.new_empty(0, *trailing))
    assert indices.tolist() == places and indices.dtype == torch.int64
    assert cu_seqlens.tolist() == [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    assert cu_seqlens.dtype == seqused.dtype == torch.int32
    assert seqused.tolist() == lengths
    assert type(max_seqlen) is int and max_seqlen == max(lengths)
    assert {t.device.type for t in (out, indices, cu_seqlens, seqused)} == {device}


@every_mask
def test_pad_puts_tokens_back(name: str, device: str) -> None:
    mask = torch.tensor(MASKS[name], device=device)
    x = torch.randn(*mask.shape, 2, 3, device=device)
    tokens, indices, *_ = unpad_input(x, mask)
    want = x * mask[..., None, None]
    assert torch.equal(pad_input(tokens, indices, *mask.shape), want)
    assert torch.equal(pad_input(tokens, indices.int(), *mask.shape), want)


def test_unused_places_are_kept_but_not_counted_as_used(device: str) -> None:
    mask = torch.tensor([[1, 1, 0, 0, 0], [0, 1, 0, 0, 0], [1, 1, 1, 0, 0]], device=device)
    unused = torch.tensor([[0, 0, 1, 1, 0], [1, 0, 0, 0, 0], [0, 1, 0, 0, 0]], device=device)
    x = torch.arange(15.0, device=device).view(3, 5)
    for kind in (torch.bool, torch.int64):
        out, indices, cu_seqlens, max_seqlen, seqused = unpad_input(
            x, mask.to(kind), unused.to(kind)
        )
        assert out.tolist() == [0, 1, 2, 3, 5, 6, 10, 11, 12]
        assert indices.tolist() == out.long().tolist()
        assert cu_seqlens.tolist() == [0, 4, 6, 9] and max_seqlen == 4
        assert seqused.tolist() == [2, 1, 3]


def test_concatenated_sequences(device: str) -> None:
    """The example of three rows: two sequences, one, three."""
    lengths = torch.tensor([[2, 3, 0, 0, 0, 0], [6, 0, 0, 0, 0, 0], [1, 1, 2, 0, 0, 0]])
    x = torch.arange(18.0, device=device).view(3, 6, 1)
    out, indices, cu_seqlens, max_seqlen = unpad_input_for_concatenated_sequences(
        x, lengths.to(device)
    )
    places = [0, 1, 2, 3, 4, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15]
    assert indices.tolist() == places and out.flatten().tolist() == places
    assert cu_seqlens.tolist() == [0, 2, 5, 11, 12, 13, 15] and cu_seqlens.dtype == torch.int32
    assert max_seqlen == 6


def test_empty_batch(device: str) -> None:
    x, mask = torch.randn(0, 4, 2, device=device), torch.ones(0, 4, device=device)
    out, indices, cu_seqlens, max_seqlen, seqused = unpad_input(x, mask)
    assert out.shape == (0, 2) and cu_seqlens.tolist() == [0] and max_seqlen == 0
    assert indices.numel() == seqused.numel() == 0
    assert pad_input(out, indices, 0, 4).shape == (0, 4, 2)


INDICES = torch.tensor([4, 0, 2])
REPEATED = torch.tensor([4, 0, 4, 2, 4])


def test_gradients() -> None:
    x = torch.randn(5, 2, 3, dtype=torch.float64, requires_grad=True)
    values = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[1, 0, 1], [0, 1, 1]])
    padded = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)

    def there_and_back(t: Tensor) -> Tensor:
        tokens, indices, *_ = unpad_input(t, mask)
        return pad_input(tokens.sin(), indices, 2, 3)

    assert gradcheck(lambda t: index_first_axis(t, INDICES), x)
    assert gradcheck(lambda t: index_first_axis(t, REPEATED), x)
    assert gradcheck(lambda t: index_put_first_axis(t, INDICES, 6), values)
    assert gradcheck(lambda t: index_first_axis_residual(t, REPEATED), x)
    assert gradcheck(there_and_back, padded)
    assert gradcheck(
        lambda t: unpad_input_for_concatenated_sequences(t, torch.tensor([[1, 1, 0], [2, 0, 0]]))[
            0
        ],
        padded,
    )


def test_gradient_of_repeated_rows_adds_up(device: str) -> None:
    x = torch.ones(5, 2, device=device, requires_grad=True)
    index_first_axis(x, REPEATED.to(device)).sum().backward()
    assert x.grad[:, 0].tolist() == [1, 0, 1, 0, 3]


def test_residual_carries_both_gradients(device: str) -> None:
    x = torch.randn(5, 2, device=device, requires_grad=True)
    rows, rest = index_first_axis_residual(x, INDICES.to(device))
    assert torch.equal(rows, x[INDICES.to(device)]) and torch.equal(rest, x)
    (2 * rows.sum() + 3 * rest.sum()).backward()
    assert x.grad[:, 0].tolist() == [5, 3, 5, 3, 5]


def test_attention_between_unpad_and_pad(device: str) -> None:
    """A padded batch through the variable-length function is each sequence on its own."""
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    lengths = [7, 0, 19, 1]
    mask = torch.arange(19, device=device) < torch.tensor(lengths, device=device)[:, None]
    q, k, v = (torch.randn(4, 19, 2, 32, device=device, dtype=dtype) for _ in range(3))
    tokens, indices, cu_seqlens, max_seqlen, _ = unpad_input(torch.stack((q, k, v), 2), mask)
    out = flash_attn_varlen_func(
        *tokens.unbind(1), cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, causal=True
    )
    out = pad_input(out, indices, 4, 19)
    for b, n in enumerate(lengths):
        assert not out[b, n:].any()
        if n:
            want = flash_attn_func(*(x[b : b + 1, :n] for x in (q, k, v)), causal=True)[0]
            torch.testing.assert_close(out[b, :n], want)


# Pattern, sizes, shape, and the same in torch.
PATTERNS = [
    ("b s ... -> (b s) ...", {}, (2, 3, 4, 5), lambda x: x.flatten(0, 1)),
    ("b s ... -> (b s) ...", {}, (2, 3), lambda x: x.flatten()),
    ("(b s) ... -> b s ...", {"b": 2}, (6, 4), lambda x: x.unflatten(0, (2, 3))),
    (
        "b s (three h d) -> b s three h d",
        {"three": 3, "h": 2},
        (2, 3, 24),
        lambda x: x.unflatten(2, (3, 2, 4)),
    ),
    ("b s t h d -> b s (t h) d", {}, (2, 3, 2, 4, 5), lambda x: x.flatten(2, 3)),
    ("b s t h d -> b s (h t) d", {}, (2, 3, 2, 4, 5), lambda x: x.transpose(2, 3).flatten(2, 3)),
    ("... (d two) -> ... d two", {"two": 2}, (2, 3, 8), lambda x: x.unflatten(-1, (4, 2))),
    ("... d two -> ... (two d)", {}, (2, 4, 2), lambda x: x.transpose(1, 2).flatten(1)),
    ("b 1 s -> s b", {}, (2, 1, 3), lambda x: x[:, 0].T),
    ("b s -> s 1 b", {}, (2, 3), lambda x: x.T[:, None]),
    ("a b c -> c a b", {}, (2, 3, 4), lambda x: x.permute(2, 0, 1)),
    ("b ... -> (b ...)", {}, (2, 3, 4), lambda x: x.flatten()),
]
REPEATS = [
    ("s d -> s (n d)", {"n": 2}, (3, 4), lambda x: x.repeat(1, 2)),
    ("s d -> s 1 (d n)", {"n": 2}, (3, 4), lambda x: x.repeat_interleave(2, 1)[:, None]),
    ("b ... -> b n ...", {"n": 3}, (2, 4, 5), lambda x: x[:, None].expand(2, 3, 4, 5)),
]


@pytest.mark.parametrize(
    ("name", "pattern", "sizes", "shape", "want"),
    [("rearrange", *case) for case in PATTERNS] + [("repeat", *c) for c in PATTERNS + REPEATS],
)
def test_names_of_einops(
    name: str, pattern: str, sizes: dict, shape: tuple[int, ...], want: Callable
) -> None:
    """What stands in for einops, and what is exported: the same, or einops' own."""
    x = torch.randn(shape)
    may_repeat = name == "repeat"
    assert torch.equal(bert_padding._rearrange(x, pattern, sizes, may_repeat), want(x))
    assert torch.equal(getattr(bert_padding, name)(x, pattern, **sizes), want(x))


@pytest.mark.parametrize(
    ("pattern", "sizes"),
    [
        ("a b c -> a b c", {}),
        ("a -> a", {}),
        ("a b -> a", {}),
        ("a b -> a b c", {}),
        ("a b -> a a b", {}),
        ("(a c) b -> a c b", {}),
        ("(a c) b -> a c b", {"a": 5}),
        ("a b c ... -> a b c ...", {}),
    ],
    ids=str,
)
def test_rearrange_refuses_what_does_not_fit(pattern: str, sizes: dict) -> None:
    with pytest.raises(ValueError, match="'"):
        bert_padding._rearrange(torch.zeros(4, 3), pattern, sizes, may_repeat=False)


def test_names_are_there_without_einops() -> None:
    """verl and others import rearrange from here."""
    code = """
import sys
sys.modules["einops"] = None
import torch
from flash_attn.bert_padding import rearrange, repeat
assert rearrange(torch.zeros(2, 3, 4), "b s ... -> (b s) ...").shape == (6, 4)
assert repeat(torch.zeros(2), "b -> b n", n=3).shape == (2, 3)
"""
    root = str(Path(bert_padding.__file__).resolve().parents[1])
    env = os.environ | {"PYTHONPATH": root}
    ran = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-2000:]
