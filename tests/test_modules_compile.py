"""torch.compile and torch.export of layers with rotary embedding, at lengths that change."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flash_attn.layers.rotary import RotaryEmbedding
from flash_attn.modules.mha import MHA

LAYERS: dict[str, dict[str, Any]] = {
    "packed": {},
    "grouped": dict(num_heads_kv=2, rotary_emb_interleaved=True),
    "cross": dict(cross_attn=True),
    "xpos": dict(rotary_emb_scale_base=64.0),
    "alibi": dict(use_alibi=True),
}


def layer_and_input(name: str, device: str) -> tuple[MHA, Tensor]:
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    options = dict(causal=True, rotary_emb_dim=16, device=device, dtype=dtype)
    return MHA(64, 4, **options, **LAYERS[name]), torch.randn(2, 90, 64, device=device, dtype=dtype)


def assert_same(ours: Tensor, want: Tensor) -> None:
    limit = 1e-5 if ours.dtype == torch.float32 else 3e-2
    torch.testing.assert_close(ours, want, rtol=limit, atol=limit)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
def test_compiled_at_other_lengths(name: str, backend: str, grad: bool, device: str) -> None:
    """The same, a longer and a shorter length; before and after an eager call; training or not."""
    if backend == "inductor" and name not in ("packed", "xpos"):
        pytest.skip("the compiled code is the same kind")
    torch._dynamo.reset()
    layer, x = layer_and_input(name, device)
    compiled = torch.compile(layer, backend=backend, fullgraph=True)
    for i, length in enumerate((16, 16, 40, 8, 16)):
        part = x[:, :length]
        layer.train(i < 4)
        with torch.set_grad_enabled(grad):
            out = compiled(part)
            if i == 0:
                assert layer.rotary_emb._cos_cached is None, "a table of a graph was kept"
            want = layer(part)
        assert_same(out, want)
        if grad:
            parameters = list(layer.parameters())
            dout = torch.randn_like(out)
            pairs = zip(*(torch.autograd.grad(t, parameters, dout) for t in (out, want)))
            for ours, expected in pairs:
                limit = 1e-4 if ours.dtype == torch.float32 else 5e-2
                scale = 1 + expected.abs().max().item()
                assert (ours - expected).abs().max().item() <= limit * scale
    torch._dynamo.reset()


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("strict", [False, True], ids=["", "strict"])
@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
@pytest.mark.parametrize("filled", [False, True], ids=["empty", "filled"])
def test_exported(name: str, strict: bool, grad: bool, filled: bool, device: str) -> None:
    if filled and name not in ("packed", "xpos"):
        pytest.skip("the tables are the same")
    layer, x = layer_and_input(name, device)
    if filled:
        layer(x[:, :20])
    length = torch.export.Dim("length", min=2, max=4096)
    part = x[:, :16].contiguous()
    with torch.set_grad_enabled(grad):
        fixed = torch.export.export(layer, (part,), strict=strict)
        dynamic = torch.export.export(layer, (part,), strict=strict, dynamic_shapes=({1: length},))
        assert_same(fixed.module()(part), layer(part))
        for n in (16, 90, 5):
            part = x[:, :n].contiguous()
            assert_same(dynamic.module()(part), layer(part))
    assert not any(isinstance(t, torch._subclasses.FakeTensor) for t in fixed.constants.values())


class Rotated(nn.Module):
    """Positions by a tensor, and a ragged input: what a decoding step has."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.rotary = RotaryEmbedding(16, device=device)

    def forward(self, qkv: Tensor, offsets: Tensor, ragged: Tensor, lengths: Tensor) -> Any:
        dense = self.rotary(qkv * 1, seqlen_offset=offsets, max_seqlen=64)
        return dense, self.rotary(ragged * 1, max_seqlen=9, cu_seqlens=lengths)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_offsets_and_ragged(backend: str, device: str) -> None:
    torch._dynamo.reset()
    module = Rotated(device)
    compiled = torch.compile(module, backend=backend, fullgraph=True)
    for n in (3, 3, 7):
        qkv = torch.randn(2, n, 3, 2, 16, device=device, requires_grad=True)
        ragged = torch.randn(11, 3, 2, 16, device=device, requires_grad=True)
        offsets = torch.tensor([5, 40], device=device)
        lengths = torch.tensor([0, 2, 11], device=device).int()
        results = [f(qkv, offsets, ragged, lengths) for f in (compiled, module)]
        for ours, want in zip(*results):
            assert_same(ours, want)
        douts = [torch.randn_like(t) for t in results[0]]
        grads = [torch.autograd.grad(r, (qkv, ragged), douts) for r in results]
        for ours, want in zip(*grads):
            assert_same(ours, want)
    torch._dynamo.reset()
