"""The Triton kernels on the CPU, interpreted.  ``test_triton_kernels`` runs this with TRITON_INTERPRET=1."""

from __future__ import annotations

import pytest
import torch
from triton.runtime import interpreter

from flash_attn.ops.triton import _cross_entropy_kernels, _cross_entropy_ops


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
    kernels = _cross_entropy_kernels
    ops = _cross_entropy_ops
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
