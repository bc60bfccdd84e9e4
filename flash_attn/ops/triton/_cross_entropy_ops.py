"""Operators of the cross entropy, for the CPU and CUDA.  Used by ``cross_entropy`` alone.

logits (rows, cols) are the classes from first_class on of all classes; labels (rows,) count through all;
lse (rows,).  Where cols are not all classes, losses lack what depends on lse, and z_losses are 0.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from flash_attn.ops._library import batch_first, register
from flash_attn.ops.triton import _cross_entropy_kernels as kernels

__all__ = ["backward", "backward_into", "forward"]

# Logits that the torch path widens at a time.
CHUNK_ELEMENTS = {"cpu": 1 << 20, "cuda": 1 << 26}


def _uses_kernels(logits: Tensor) -> bool:
    return logits.is_cuda and kernels.triton is not None and logits.dtype != torch.float64


def _run_forward(
    logits: Tensor, labels: Tensor, lse: Tensor | None, *options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    rows = logits.shape[0]
    wide = torch.promote_types(logits.dtype, torch.float32)
    losses, z_losses = (logits.new_empty((rows,), dtype=wide) for _ in range(2))
    has_lse = lse is not None
    lse = torch.empty_like(losses) if lse is None else lse.contiguous().clone()
    if rows > 0:
        _check_labels(labels, *options[3:])
        run = kernels.forward if _uses_kernels(logits) else _forward_torch
        run(losses, z_losses, lse, logits, labels, has_lse, *options)
    return losses, z_losses, lse


def _run_backward_into(
    dlosses: Tensor, logits: Tensor, labels: Tensor, lse: Tensor, *options: Any
) -> None:
    *numbers, dlogits = options
    if logits.shape[0] > 0:
        run = kernels.backward if _uses_kernels(logits) else _backward_torch
        run(dlogits, dlosses, logits, labels, lse, *numbers)


def _run_backward(
    dlosses: Tensor, logits: Tensor, labels: Tensor, lse: Tensor, *options: Any
) -> Tensor:
    dlogits = logits.new_empty(logits.shape)
    _run_backward_into(dlosses, logits, labels, lse, *options, dlogits)
    return dlogits


def _chunks(logits: Tensor) -> Iterator[slice]:
    """The rows in parts of CHUNK_ELEMENTS."""
    rows, cols = logits.shape
    step = max(1, CHUNK_ELEMENTS[logits.device.type] // cols)
    return (slice(start, start + step) for start in range(0, rows, step))


def _forward_torch(
    losses: Tensor,
    z_losses: Tensor,
    lse: Tensor,
    logits: Tensor,
    labels: Tensor,
    has_lse: bool,
    smoothing: float,
    logit_scale: float,
    lse_square_scale: float,
    ignore_index: int,
    first_class: int,
    classes: int,
) -> None:
    """What ``_cross_entropy_kernels.forward`` does."""
    is_ignored = labels == ignore_index
    local = labels.long() - first_class
    is_here = (local >= 0) & (local < logits.shape[1]) & ~is_ignored
    local = local.where(is_here, 0)[:, None]
    losses.copy_(logits.gather(1, local).squeeze(1)).mul_(-logit_scale * (1 - smoothing))
    losses.masked_fill_(~is_here, 0.0)
    if not has_lse:
        for rows in _chunks(logits):
            x = logits[rows].to(lse.dtype)
            x = x if logit_scale == 1.0 else x * logit_scale
            lse[rows] = torch.logsumexp(x, 1)
            if smoothing > 0:
                losses[rows] -= x.sum(1) * (smoothing / classes)
    z_losses.zero_()
    if classes == logits.shape[1]:
        z_losses.copy_(lse).square_().mul_(lse_square_scale)
        losses += lse + z_losses
    losses.masked_fill_((labels < 0) | (labels >= classes), torch.nan)
    losses.masked_fill_(is_ignored, 0.0)
    z_losses.masked_fill_(is_ignored, 0.0)


def _backward_torch(
    dlogits: Tensor,
    dlosses: Tensor,
    logits: Tensor,
    labels: Tensor,
    lse: Tensor,
    smoothing: float,
    logit_scale: float,
    lse_square_scale: float,
    ignore_index: int,
    first_class: int,
    classes: int,
) -> None:
    """What ``_cross_entropy_kernels.backward`` does."""
    is_ignored = labels == ignore_index
    local = labels.long() - first_class
    is_here = (local >= 0) & (local < logits.shape[1])
    local = local.where(is_here, 0)[:, None]
    weight = dlosses.to(lse.dtype) * logit_scale
    all_classes = (weight * (1 + 2 * lse_square_scale * lse))[:, None]
    target = (weight * (smoothing - 1) * is_here)[:, None]
    for rows in _chunks(logits):
        x = logits[rows].to(lse.dtype, copy=True)
        if logit_scale != 1.0:
            x *= logit_scale
        x = x.sub_(lse[rows, None]).exp_().mul_(all_classes[rows])
        if smoothing > 0:
            x -= (weight[rows] * (smoothing / classes))[:, None]
        x.scatter_add_(1, local[rows], target[rows])
        dlogits[rows] = x.masked_fill_(is_ignored[rows, None], 0.0)


def _check_labels(labels: Tensor, ignore_index: int, first_class: int, classes: int) -> None:
    asked = os.environ.get("FLASH_ATTN_CHECK_DEVICE_DATA", "0") not in ("", "0")
    if labels.is_cuda and not asked:
        return
    is_wrong = ((labels < 0) | (labels >= classes)) & (labels != ignore_index)
    if bool(is_wrong.any()):
        raise RuntimeError(
            f"labels must be in [0, {classes}) or ignore_index = {ignore_index}; got"
            f" {int(labels[is_wrong][0])} in row {int(is_wrong.nonzero()[0])}"
        )


_OPTIONS = (
    "float smoothing, float logit_scale, float lse_square_scale, SymInt ignore_index,"
    " SymInt first_class, SymInt classes"
)


def _fake_forward(logits: Tensor, labels: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    wide = torch.promote_types(logits.dtype, torch.float32)
    losses, z_losses, lse = (logits.new_empty(logits.shape[:1], dtype=wide) for _ in range(3))
    return losses, z_losses, lse


def _vmap_forward(info: Any, in_dims: tuple, *args: Any) -> tuple[tuple, tuple]:
    logits, labels, lse, *options = batch_first(info, in_dims, args)
    lse = None if lse is None else lse.flatten()
    results = forward(logits.flatten(0, 1), labels.flatten(), lse, *options)
    return tuple(x.unflatten(0, logits.shape[:2]) for x in results), (0, 0, 0)


def _vmap_backward(info: Any, in_dims: tuple, *args: Any) -> tuple[Tensor, int]:
    dlosses, logits, labels, lse, *options = batch_first(info, in_dims, args)
    rows = dlosses.flatten(), logits.flatten(0, 1), labels.flatten(), lse.flatten()
    return backward(*rows, *options).unflatten(0, logits.shape[:2]), 0


forward = register(
    "cross_entropy_fwd",
    f"(Tensor logits, Tensor labels, Tensor? lse, {_OPTIONS})"
    " -> (Tensor losses, Tensor z_losses, Tensor lse)",
    _run_forward,
    _fake_forward,
    _vmap_forward,
)
backward = register(
    "cross_entropy_bwd",
    f"(Tensor dlosses, Tensor logits, Tensor labels, Tensor lse, {_OPTIONS}) -> Tensor dlogits",
    _run_backward,
    lambda dlosses, logits, *_: logits.new_empty(logits.shape),
    _vmap_backward,
)
backward_into = register(
    "cross_entropy_bwd_into",
    "(Tensor dlosses, Tensor logits, Tensor labels, Tensor lse,"
    f" {_OPTIONS}, Tensor(a!) dlogits) -> ()",
    _run_backward_into,
    lambda *_: None,
)
