"""The Triton kernels on the CPU, interpreted.  ``test_triton_kernels`` runs this with TRITON_INTERPRET=1."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from triton.runtime import interpreter

from flash_attn.ops import activations
from flash_attn.ops.triton import _cross_entropy_kernels as kernels
from flash_attn.ops.triton import _cross_entropy_ops as ops
from flash_attn.ops.triton import _layer_norm_ops as norms


def _let_loops_end_at_arguments() -> None:
    """An argument is an array of one number, which numpy since 2.5 does not take for an integer."""
    patch = interpreter._patch_lang_tensor

    def patch_and_index(tensor: object, scope: object) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch_and_index


_let_loops_end_at_arguments()


CROSS_ENTROPY = [
    (1, 0.0, torch.float32),
    (300, 0.0, torch.float32),
    (300, 0.1, torch.float32),
    (512, 0.1, torch.bfloat16),
    (700, 0.0, torch.float16),
]


@pytest.mark.parametrize("cols, smoothing, dtype", CROSS_ENTROPY, ids=str)
def test_cross_entropy(
    cols: int, smoothing: float, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A whole vocabulary, and either half of one."""
    monkeypatch.setattr(kernels, "FORWARD", (256, 4))
    monkeypatch.setattr(kernels, "BACKWARD", (256, 4))
    gen = torch.Generator().manual_seed(cols)
    logits = (5 * torch.randn(6, 2 * cols + 1, generator=gen)).to(dtype)[:, 1 : 2 * cols : 2]
    labels = torch.randint(cols, (6,), generator=gen)
    labels[1] = -100
    if cols > 256 and smoothing == 0:
        logits[3, :260], labels[3] = -torch.inf, cols - 1
    dlosses = torch.randn(6, generator=gen)
    eps = torch.finfo(dtype).eps
    for part in ((0, cols), (0, 2 * cols), (cols, 2 * cols)):
        options = smoothing, 0.7, 0.01, -100, *part
        results = []
        for forward, backward in (
            (kernels.forward, kernels.backward),
            (ops._forward_torch, ops._backward_torch),
        ):
            losses, z_losses, lse = (torch.full((6,), torch.nan) for _ in range(3))
            forward(losses, z_losses, lse, logits, labels, False, *options)
            dlogits = torch.full_like(logits, torch.nan)
            backward(dlogits, dlosses, logits, labels, lse, *options)
            again = torch.full_like(losses, torch.nan)
            forward(again, z_losses, lse, logits, labels, True, *options[:1], 0.7, *options[2:])
            results.append((losses, z_losses, lse, dlogits, again if smoothing == 0 else losses))
        for ours, want in zip(*results):
            rtol, atol = (eps, 1e-6) if ours.dtype == dtype != torch.float32 else (1e-5, 2e-5)
            torch.testing.assert_close(ours, want, rtol=rtol, atol=atol)


def on_both_paths(monkeypatch: pytest.MonkeyPatch, function: Callable[[], Any]) -> tuple[Any, Any]:
    results = []
    for answer in (True, False):
        monkeypatch.setattr(norms, "_uses_kernels", lambda *_, answer=answer: answer)
        results.append(function())
    return tuple(results)


# rows, cols, what there is, dropout_p, dtype
NORMS = [
    (5, 24, "", 0.0, torch.float32),
    (300, 16, "bias", 0.0, torch.bfloat16),
    (7, 100, "bias residual x1 weight1 bias1", 0.3, torch.float32),
    (4, 33, "residual rowscale", 0.5, torch.float16),
    (3, 5000, "weight1", 0.0, torch.float32),
]


@pytest.mark.parametrize("is_rms_norm", [False, True], ids=["layer", "rms"])
@pytest.mark.parametrize("rows, cols, there, dropout_p, dtype", NORMS, ids=str)
def test_norm(
    rows: int,
    cols: int,
    there: str,
    dropout_p: float,
    dtype: torch.dtype,
    is_rms_norm: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gen = torch.Generator().manual_seed(rows)

    def draw(name: str, *shape: int) -> torch.Tensor | None:
        x = torch.randn(*shape, generator=gen).to(dtype)
        return x if name in there.split() else None

    x, weight = (torch.randn(*s, generator=gen).to(dtype) for s in ((rows, cols), (cols,)))
    bias, weight1, bias1 = (draw(name, cols) for name in ("bias", "weight1", "bias1"))
    residual, x1 = (draw(name, rows, cols) for name in ("residual", "x1"))
    rowscale = draw("rowscale", rows)
    seeds = torch.randint(-(2**63), 2**63 - 1, (rows, 2), generator=gen) if dropout_p else None
    tensors = (x, weight, bias, residual, x1, weight1, bias1, rowscale, seeds)
    options = (1e-5, dropout_p, is_rms_norm, True, True, dtype, torch.float32)
    ours, want = on_both_paths(monkeypatch, lambda: norms.forward(*tensors, *options))
    eps = torch.finfo(dtype).eps
    for a, b in zip(ours, want):
        torch.testing.assert_close(a, b, rtol=eps, atol=1e-5)

    _, _, total, mean, rstd = want
    dy, dy1, dresult = (torch.randn(rows, cols, generator=gen) for _ in range(3))
    grads = dy.to(dtype), dy1.to(dtype) if weight1 is not None else None, dresult
    has = [residual is not None, True, x1 is not None, True, bias is not None]
    has += [weight1 is not None, bias1 is not None]
    last = (rowscale, seeds, dropout_p, is_rms_norm, True, has, dtype, dtype)
    ours, want = on_both_paths(
        monkeypatch, lambda: norms.backward(*grads, total, weight, weight1, mean, rstd, *last)
    )
    for a, b in zip(ours, want):
        torch.testing.assert_close(a, b, rtol=2 * eps, atol=1e-4)


def test_dropout_keeps_what_the_mask_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """For every place: x is 1, and total shows what was kept."""
    seeds = torch.tensor([[1, -5], [2**40 + 3, 2**62], [-(2**63), 0]])
    x = torch.ones(3, 37)
    options = (1e-5, 0.25, True, False, True, torch.float32, torch.float32)
    tensors = (x, x[0], None, None, 0 * x, None, None, None, seeds)
    ours, _ = on_both_paths(monkeypatch, lambda: norms.forward(*tensors, *options))
    assert torch.equal(ours[2] != 0, norms.keep_mask(seeds[:, 0], 37, 0.25))
    assert 0 < (ours[2] == 0).sum() < 60


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_swiglu(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = [torch.randn(3, 700, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    x, y, dout = (t.to(dtype) for t in tensors)
    halves = torch.cat((x, y), 1).chunk(2, 1)
    results = []
    for answer in (True, False):
        monkeypatch.setattr(activations, "_uses_kernels", lambda x, answer=answer: answer)
        results.append((activations._forward(x, y), *activations._backward(dout, x, y)))
        results.append(
            (
                activations._forward(*halves),
                *activations._backward(dout[:1].expand(3, 700), *halves),
            )
        )
    for ours, want in zip(results[:2], results[2:]):
        torch.testing.assert_close(ours, want, rtol=2 * torch.finfo(dtype).eps, atol=1e-5)
