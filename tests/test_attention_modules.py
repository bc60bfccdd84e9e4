"""FlashSelfAttention and its kin: the functions of flash_attn with fixed options."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from flash_attn import (
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
)
from flash_attn.modules import mha
from flash_attn.modules.mha import (
    MHA,
    CrossAttention,
    FlashCrossAttention,
    FlashSelfAttention,
    SelfAttention,
    get_alibi_slopes,
)

HEADS, HEAD_DIM = 4, 16
LENGTHS = [11, 1, 20, 6]
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": dict(causal=True),
    "scale": dict(softmax_scale=0.7),
    "window": dict(window_size=(4, 1)),
    "alibi": dict(alibi_slopes=get_alibi_slopes(HEADS), causal=True),
    "deterministic": dict(deterministic=True),
}
every_option = pytest.mark.parametrize("name", OPTIONS)


def new(*shape: int, device: str) -> Tensor:
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    return torch.randn(*shape, HEAD_DIM, device=device, dtype=dtype)


def boundaries(lengths: list[int], device: str) -> Tensor:
    return torch.tensor([0, *lengths], device=device).cumsum(0).int()


def for_function(options: dict[str, Any], device: str) -> dict[str, Any]:
    if "alibi_slopes" not in options:
        return options
    return options | dict(alibi_slopes=torch.tensor(options["alibi_slopes"], device=device))


@every_option
def test_self_attention_is_the_function(name: str, device: str) -> None:
    options = OPTIONS[name]
    given = for_function(options, device)
    module = FlashSelfAttention(**options).to(device)
    qkv = new(2, 37, 3, HEADS, device=device).requires_grad_()
    want = flash_attn_qkvpacked_func(qkv, **given)
    ours = module(qkv)
    assert torch.equal(ours, want)
    dout = torch.randn_like(want)
    grads = [torch.autograd.grad(out, qkv, dout)[0] for out in (ours, want)]
    torch.testing.assert_close(*grads, rtol=1e-2, atol=1e-2)
    ragged = new(sum(LENGTHS), 3, HEADS, device=device)
    lengths = boundaries(LENGTHS, device), max(LENGTHS)
    want = flash_attn_varlen_qkvpacked_func(ragged, *lengths, **given)
    assert torch.equal(module(ragged, None, *lengths), want)


@every_option
def test_cross_attention_is_the_function(name: str, device: str) -> None:
    options = OPTIONS[name]
    given = for_function(options, device)
    module = FlashCrossAttention(**options).to(device)
    q, kv = new(2, 9, HEADS, device=device), new(2, 31, 2, HEADS // 2, device=device)
    assert torch.equal(module(q, kv), flash_attn_kvpacked_func(q, kv, **given))
    lengths_k = [3, 8, 20, 0]
    q, kv = new(sum(LENGTHS), HEADS, device=device), new(sum(lengths_k), 2, HEADS, device=device)
    cu_seqlens, cu_seqlens_k = boundaries(LENGTHS, device), boundaries(lengths_k, device)
    longest = max(LENGTHS), max(lengths_k)
    want = flash_attn_varlen_kvpacked_func(q, kv, cu_seqlens, cu_seqlens_k, *longest, **given)
    lengths = cu_seqlens, longest[0], cu_seqlens_k, longest[1]
    assert torch.equal(module(q, kv, None, *lengths), want)


def test_causal_of_a_call_takes_the_place_of_the_module_s(device: str) -> None:
    qkv, q, kv = (new(2, 9, *n, device=device) for n in ((3, HEADS), (HEADS,), (2, HEADS)))
    for causal in (False, True):
        want = flash_attn_qkvpacked_func(qkv, causal=causal)
        for kind in (FlashSelfAttention, SelfAttention):
            assert torch.equal(kind(causal=not causal)(qkv, causal), want)
        want = flash_attn_kvpacked_func(q, kv, causal=causal)
        for kind in (FlashCrossAttention, CrossAttention):
            assert torch.equal(kind(causal=not causal)(q, kv, causal), want)


@pytest.mark.parametrize("causal", [False, True], ids=["", "causal"])
def test_padded_keys_are_as_if_absent(causal: bool, device: str) -> None:
    seqlen = max(LENGTHS)
    mask = torch.rand(len(LENGTHS), seqlen, device=device).argsort(1) < torch.tensor(
        LENGTHS, device=device
    ).unsqueeze(1)
    qkv = new(len(LENGTHS), seqlen, 3, HEADS, device=device)
    ours = SelfAttention(causal, 0.4)(qkv, key_padding_mask=mask)
    options = dict(causal=causal, softmax_scale=0.4)
    for out, row, kept in zip(ours, qkv, mask):
        want = flash_attn_qkvpacked_func(row[kept][None], **options)[0]
        torch.testing.assert_close(out[kept], want, rtol=1e-2, atol=1e-2)
        assert not out[~kept].any()
    q, kv = new(len(LENGTHS), 5, HEADS, device=device), qkv[:, :, :2, :2]
    ours = CrossAttention(causal, 0.4)(q, kv, key_padding_mask=mask)
    for out, query, row, kept in zip(ours, q, kv, mask):
        want = flash_attn_kvpacked_func(query[None], row[kept][None], **options)[0]
        torch.testing.assert_close(out, want, rtol=1e-2, atol=1e-2)


def test_dropout_is_of_the_training_mode_only(device: str) -> None:
    qkv = new(2, 37, 3, HEADS, device=device)
    q, kv = qkv[:, :, 0], qkv[:, :, 1:]
    for module, inputs in (
        (FlashSelfAttention(attention_dropout=0.5), (qkv,)),
        (FlashCrossAttention(attention_dropout=0.5), (q, kv)),
        (SelfAttention(attention_dropout=0.5), (qkv,)),
        (CrossAttention(attention_dropout=0.5), (q, kv)),
    ):
        plain = type(module)()(*inputs)
        assert torch.equal(module.eval()(*inputs), plain)
        assert not torch.equal(module.train()(*inputs), plain)


def test_slopes_of_a_caller_stay_in_fp32(device: str) -> None:
    slopes = torch.rand(2, HEADS, device=device)
    module = FlashSelfAttention(alibi_slopes=slopes)
    assert not module.state_dict() and not list(module.parameters())
    module = copy.deepcopy(module.half()).to(device)
    assert torch.equal(module.alibi_slopes, slopes)
    qkv = new(2, 9, 3, HEADS, device=device)
    assert torch.equal(module(qkv), flash_attn_qkvpacked_func(qkv, alibi_slopes=slopes))
    narrow = FlashSelfAttention(alibi_slopes=nn_parameter(slopes.half()))
    assert narrow.alibi_slopes.dtype == torch.float32 and not list(narrow.parameters())
    with pytest.raises(RuntimeError, match="alibi_slopes gets no gradient"):
        FlashSelfAttention(alibi_slopes=slopes.clone().requires_grad_())
    lost = FlashSelfAttention(alibi_slopes=slopes.to("meta"))
    with pytest.raises(RuntimeError, match="alibi_slopes has no values"):
        lost(qkv)


def nn_parameter(tensor: Tensor) -> torch.nn.Parameter:
    return torch.nn.Parameter(tensor, requires_grad=False)


def test_missing_lengths_raise() -> None:
    cu_seqlens = torch.tensor([0, 4], dtype=torch.int32)
    qkv, q, kv = torch.zeros(4, 3, 2, 8), torch.zeros(4, 2, 8), torch.zeros(4, 2, 2, 8)
    with pytest.raises(RuntimeError, match="max_seqlen must be given"):
        FlashSelfAttention()(qkv, cu_seqlens=cu_seqlens)
    for given, message in (
        ((), "max_seqlen must"),
        ((4,), "cu_seqlens_k must"),
        ((4, cu_seqlens), "max_seqlen_k must"),
    ):
        with pytest.raises(RuntimeError, match=message):
            FlashCrossAttention()(q, kv, None, cu_seqlens, *given)


def test_layer_attends_through_its_modules(device: str) -> None:
    """What a client changes on the layer or on its modules is what runs."""
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    options = dict(num_heads_kv=2, use_alibi=True, device=device, dtype=dtype)
    layer = MHA(64, HEADS, **options, dropout=0.2, use_flash_attn=True)
    assert type(layer.inner_attn) is FlashSelfAttention
    assert type(layer.inner_cross_attn) is FlashCrossAttention
    assert layer.use_flash_attn and layer.use_alibi and layer.dropout == 0.2
    plain = MHA(64, HEADS)
    assert not plain.use_flash_attn and not plain.use_alibi and plain.alibi_slopes is None
    x = torch.randn(2, 9, 64, device=device, dtype=dtype)
    layer.eval()
    for name, value in (
        ("causal", True),
        ("softmax_scale", 0.9),
        ("window_size", (2, 0)),
        ("alibi_slopes", torch.full((HEADS,), 0.3)),
        ("dropout", 0.0),
    ):
        setattr(layer, name, value)
        for inner in (layer.inner_attn, layer.inner_cross_attn):
            got = getattr(inner, name)
            assert torch.equal(got, value) if isinstance(value, Tensor) else got == value
    want = MHA(64, HEADS, **options, causal=True, softmax_scale=0.9, window_size=(2, 0))
    want.load_state_dict(layer.state_dict())
    want.inner_cross_attn.alibi_slopes = torch.full((HEADS,), 0.3)
    assert torch.equal(layer(x), want(x))
    calls = []
    hook = layer.inner_cross_attn.register_forward_hook(lambda *args: calls.append(args))
    layer(x)
    hook.remove()
    assert len(calls) == 1
    assert mha.SelfAttention is SelfAttention and mha.CrossAttention is CrossAttention
