"""What torch's flop counter says of the public functions, against a count of visible pairs one by one."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import flash_attn
from flash_attn import _flops, _ops

HEADS, HEADS_K, HEAD_DIM = 4, 2, 16
Window = tuple[int, int]
MASKS: list[tuple[bool, Window]] = [
    (False, (-1, -1)),
    (True, (-1, -1)),
    (False, (3, 2)),
    (True, (4, -1)),
    (False, (-1, 1)),
    (False, (0, -1)),
    (True, (2, 5)),
]
every_mask = pytest.mark.parametrize("causal, window", MASKS)


def pairs_by_hand(seqlen_q: int, seqlen_k: int, causal: bool, window: Window) -> int:
    shift, (left, right) = seqlen_k - seqlen_q, window
    return sum(
        (left < 0 or j >= i + shift - left)
        and (right < 0 or j <= i + shift + right)
        and (not causal or j <= i + shift)
        for i in range(seqlen_q)
        for j in range(seqlen_k)
    )


def forward_flops(
    lengths: list[tuple[int, int]], causal: bool, window: Window, head_dim: int = HEAD_DIM
) -> int:
    pairs = sum(pairs_by_hand(*pair, causal, window) for pair in lengths)
    return 4 * HEADS * head_dim * pairs


def random(device: str, *shape: int, grad: bool = False) -> Tensor:
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    return torch.randn(shape, device=device, dtype=dtype, requires_grad=grad)


def counted(call: Callable[[], Any]) -> int:
    with FlopCounterMode(display=False) as counter:
        call()
    # Nothing but our operators multiplies here.
    of_ours = {op: n for op, n in counter.get_flop_counts()["Global"].items()}
    assert all("flash_attn" in str(op) for op in of_ours), of_ours
    return counter.get_total_flops()


def test_pairs_by_formula_are_those_by_hand() -> None:
    sizes = (0, 1, 2, 5, 8)
    limits = (-1, 0, 1, 3, 20)
    for sizes_and_window in itertools.product(sizes, sizes, (False, True), limits, limits):
        seqlen_q, seqlen_k, causal, left, right = sizes_and_window
        by_formula = _flops.visible_pairs(seqlen_q, seqlen_k, causal, left, right)
        assert by_formula == pairs_by_hand(seqlen_q, seqlen_k, causal, (left, right)), (
            sizes_and_window
        )


def test_pairs_of_a_long_sequence() -> None:
    n = 10**9
    assert _flops.visible_pairs(n, n, True, -1, -1) == n * (n + 1) // 2


@every_mask
@pytest.mark.parametrize("seqlen_q, seqlen_k", [(9, 9), (5, 12), (12, 5), (1, 7), (6, 0)])
def test_dense_counts_visible_pairs(
    seqlen_q: int, seqlen_k: int, causal: bool, window: Window, device: str
) -> None:
    q = random(device, 3, seqlen_q, HEADS, HEAD_DIM, grad=True)
    k, v = (random(device, 3, seqlen_k, HEADS_K, HEAD_DIM, grad=True) for _ in range(2))
    expected = 3 * forward_flops([(seqlen_q, seqlen_k)], causal, window)
    options = dict(causal=causal, window_size=window)
    with torch.no_grad():
        forward = counted(lambda: flash_attn.flash_attn_func(q, k, v, **options))
    assert forward == expected
    both = counted(lambda: flash_attn.flash_attn_func(q, k, v, **options).sum().backward())
    assert both == expected + expected * 5 // 2


@pytest.mark.parametrize(
    "options",
    [
        dict(dropout_p=0.2),
        dict(dropout_p=0.2, return_attn_probs=True),
        dict(softcap=5.0),
        dict(deterministic=True),
    ],
    ids=lambda options: "-".join(options),
)
def test_options_that_hide_nothing_count_nothing(options: dict[str, Any], device: str) -> None:
    q, k, v = (random(device, 2, 7, HEADS, HEAD_DIM, grad=True) for _ in range(3))

    def step() -> None:
        result = flash_attn.flash_attn_func(q, k, v, **options)
        (result if isinstance(result, Tensor) else result[0]).sum().backward()

    assert counted(step) == 2 * forward_flops([(7, 7)], False, (-1, -1)) * 7 // 2


def test_packed_tensors_count_as_their_parts(device: str) -> None:
    qkv = random(device, 2, 9, 3, HEADS, HEAD_DIM, grad=True)
    q = random(device, 2, 5, HEADS, HEAD_DIM, grad=True)
    kv = random(device, 2, 9, 2, HEADS_K, HEAD_DIM, grad=True)
    one = 2 * forward_flops([(9, 9)], True, (-1, -1))
    other = 2 * forward_flops([(5, 9)], True, (-1, -1))
    function = flash_attn.flash_attn_qkvpacked_func
    assert counted(lambda: function(qkv, causal=True).sum().backward()) == one * 7 // 2
    function = flash_attn.flash_attn_kvpacked_func
    assert counted(lambda: function(q, kv, causal=True).sum().backward()) == other * 7 // 2


LENGTHS = [(5, 8), (1, 9), (0, 3), (7, 2), (4, 4)]


def ends(numbers: list[int], device: str) -> Tensor:
    return torch.tensor([0, *itertools.accumulate(numbers)], dtype=torch.int32, device=device)


def varlen(device: str) -> dict[str, Any]:
    """Arguments of flash_attn_varlen_func; max_seqlen is larger than need be."""
    seqlens_q, seqlens_k = zip(*LENGTHS)
    return dict(
        q=random(device, sum(seqlens_q), HEADS, HEAD_DIM, grad=True),
        k=random(device, sum(seqlens_k), HEADS_K, HEAD_DIM, grad=True),
        v=random(device, sum(seqlens_k), HEADS_K, HEAD_DIM, grad=True),
        cu_seqlens_q=ends(list(seqlens_q), device),
        cu_seqlens_k=ends(list(seqlens_k), device),
        max_seqlen_q=10,
        max_seqlen_k=12,
    )


@every_mask
def test_varlen_counts_each_sequence(causal: bool, window: Window, device: str) -> None:
    arguments = varlen(device) | dict(causal=causal, window_size=window)
    expected = forward_flops(LENGTHS, causal, window)
    with torch.no_grad():
        assert counted(lambda: flash_attn.flash_attn_varlen_func(**arguments)) == expected
    both = counted(lambda: flash_attn.flash_attn_varlen_func(**arguments).sum().backward())
    assert both == expected + expected * 5 // 2


@every_mask
def test_fake_lengths_count_as_the_longest(causal: bool, window: Window) -> None:
    arguments = varlen("cpu") | dict(causal=causal, window_size=window)
    bound = forward_flops([(10, 12)] * len(LENGTHS), causal, window)
    assert bound >= forward_flops(LENGTHS, causal, window)
    with FakeTensorMode() as mode:
        fake = {
            name: mode.from_tensor(x) if isinstance(x, Tensor) else x
            for name, x in arguments.items()
        }
        both = counted(lambda: flash_attn.flash_attn_varlen_func(**fake).sum().backward())
    assert both == bound + bound * 5 // 2


def test_keys_in_use_and_left_padding_are_counted(device: str) -> None:
    used, skipped = [6, 9, 0, 1, 4], [1, 0, 0, 0, 2]
    arguments = varlen(device)
    lengths = [(q, n - pad) for (q, _), n, pad in zip(LENGTHS, used, skipped)]
    operator = torch.ops.flash_attn._flash_attn_varlen_forward

    def call() -> None:
        operator(
            *(arguments.values()),
            *(0.0, 0.25, True),
            seqused_k=torch.tensor(used, dtype=torch.int32, device=device),
            leftpad_k=torch.tensor(skipped, dtype=torch.int32, device=device),
        )

    with torch.no_grad():
        assert counted(call) == forward_flops(lengths, True, (-1, -1))


CACHED = [3, 20, 0, 31]


@every_mask
@pytest.mark.parametrize("new", [0, 1, 4])
@pytest.mark.parametrize("paged", [False, True], ids=["", "paged"])
def test_kvcache_counts_what_is_in_use(
    paged: bool, new: int, causal: bool, window: Window, device: str
) -> None:
    batch, capacity = len(CACHED), 48
    q = random(device, batch, max(new, 1), HEADS, HEAD_DIM)
    shape = (batch * 3, 16) if paged else (batch, capacity)
    caches = [random(device, *shape, HEADS_K, HEAD_DIM) for _ in range(2)]
    table = torch.arange(batch * 3, device=device, dtype=torch.int32).view(batch, 3)
    lengths = torch.tensor(CACHED, dtype=torch.int32, device=device)
    added = [random(device, batch, new, HEADS_K, HEAD_DIM) for _ in range(2)] if new else []
    options: dict[str, Any] = dict(causal=causal, window_size=window, cache_seqlens=lengths)
    options |= dict(block_table=table) if paged else {}
    expected = forward_flops([(q.shape[1], n + new) for n in CACHED], causal, window)
    function = flash_attn.flash_attn_with_kvcache
    assert counted(lambda: function(q, *caches, *added, **options)) == expected


def test_kvcache_with_one_length_with_left_padding_and_with_ragged_queries(device: str) -> None:
    caches = [random(device, 3, 24, HEADS_K, HEAD_DIM) for _ in range(2)]
    q = random(device, 3, 2, HEADS, HEAD_DIM)
    function = flash_attn.flash_attn_with_kvcache
    full = (-1, -1)
    assert counted(lambda: function(q, *caches)) == 3 * forward_flops([(2, 24)], False, full)
    expected = 3 * forward_flops([(2, 9)], True, full)
    assert counted(lambda: function(q, *caches, cache_seqlens=9, causal=True)) == expected
    skipped = torch.tensor([0, 4, 9], dtype=torch.int32, device=device)
    options = dict(cache_seqlens=9, cache_leftpad=skipped, causal=True)
    expected = forward_flops([(2, 9), (2, 5), (2, 0)], True, full)
    assert counted(lambda: function(q, *caches, **options)) == expected

    q = random(device, 6, HEADS, HEAD_DIM)
    new = [random(device, 6, HEADS_K, HEAD_DIM) for _ in range(2)]
    options = dict(cu_seqlens_q=ends([1, 0, 5], device), max_seqlen_q=5, causal=True)
    lengths = torch.tensor([3, 7, 11], dtype=torch.int32, device=device)
    expected = forward_flops([(1, 4), (0, 7), (5, 16)], True, full)
    call = counted(lambda: function(q, *caches, *new, cache_seqlens=lengths, **options))
    assert call == expected


def test_fake_kvcache_counts_its_capacity() -> None:
    function = flash_attn.flash_attn_with_kvcache
    with FakeTensorMode():
        q = random("cpu", 2, 1, HEADS, HEAD_DIM)
        caches = [random("cpu", 2, 24, HEADS_K, HEAD_DIM) for _ in range(2)]
        lengths = torch.zeros(2, dtype=torch.int32)
        flops = counted(lambda: function(q, *caches, cache_seqlens=lengths))
    assert flops == 2 * forward_flops([(1, 24)], False, (-1, -1))


def test_every_operator_with_products_has_a_formula() -> None:
    names = {name.partition(".")[0] for name in _ops.SCHEMAS}
    assert names - {"merge_states"} == set(_flops.OPERATORS)


def test_arguments_are_bound_to_the_overload_that_takes_them() -> None:
    q, k = torch.zeros(1, 3, 2, 8), torch.zeros(1, 4, 2, 8)
    lse, options = torch.zeros(1, 2, 3), (0.0, 1.0, True, -1, -1, 0.0, None, False)
    operator = torch.ops.flash_attn._flash_attn_backward
    into = _flops.bind(operator, (q, q, k, k, q, lse, q, None, k, *options), {})
    assert into["dk"] is None and into["causal"] is True and into["return_softmax_d"] is True
    returned = _flops.bind(operator, (q, q, k, k, q, lse, *options), {"dlse": lse})
    assert "dk" not in returned and returned["dlse"] is lse and returned["window_size_left"] == -1
    with pytest.raises(RuntimeError, match="no overload of .*_flash_attn_backward"):
        _flops.bind(operator, (q, q, k), {})
