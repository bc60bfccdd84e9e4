"""Cross entropy of logits over a large vocabulary: Triton kernels on CUDA, torch on the CPU.

Logits stay in their dtype: no copy of them is made, in fp32 or otherwise, and the backward computes
from them and one number per row.  Used by ``losses.cross_entropy``.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from flash_attn._checks import resolve_integer
from flash_attn.ops._library import as_views
from flash_attn.ops.triton import _cross_entropy_ops as ops
from flash_attn.utils.distributed import all_gather_raw

__all__ = ["CrossEntropyLoss", "cross_entropy_loss"]


def cross_entropy_loss(
    logits: Tensor,
    labels: Tensor,
    precomputed_lse: Tensor | None = None,
    label_smoothing: float = 0.0,
    logit_scale: float = 1.0,
    lse_square_scale: float = 0.0,
    ignore_index: int = -100,
    inplace_backward: bool = False,
    process_group: dist.ProcessGroup | None = None,
) -> tuple[Tensor, Tensor]:
    """Cross entropy of every row, with label smoothing, a scale of the logits and a z loss.

    With s = logit_scale * logits[row] and lse = log(sum(exp(s))), the loss of a row is::

        lse - (1 - label_smoothing) * s[label] - label_smoothing * mean(s) + lse_square_scale * lse^2

    Args:
        logits: (rows, vocab), fp16, bf16, fp32 or fp64, any strides.
        labels: (rows,), int32 or int64, on logits' device.
        precomputed_lse: (rows,), floating: lse, for whoever has it; it saves the forward pass over
            the logits.  Used where label_smoothing is 0 and logit_scale 1, and computed otherwise.  It
            gets no gradient: that of logits includes it.
        ignore_index: the loss and the gradient of a row with this label are 0.
        inplace_backward: the backward writes the gradient over the logits, which saves its memory.
            It does not where it cannot: with create_graph, in torch.func's transforms, in
            torch.compile, and where rows share memory.
        process_group: the vocabulary is divided among the processes of this group, each of which has
            vocab classes; rank r has the classes from r * vocab on.  Labels count through all of
            them and are the same in every process, as are the losses; precomputed_lse is of the
            process's own logits.

    Returns:
        losses: (rows,), fp32 (fp64 for fp64).
        z_losses: (rows,), the same: lse_square_scale * lse^2, as it is contained in losses.  For the
            record: it carries no gradient.

    Raises:
        RuntimeError: a wrong shape, dtype, device or value; a label that is no class and not
            ignore_index, which is looked for on the CPU, and on CUDA with
            FLASH_ATTN_CHECK_DEVICE_DATA=1 in the environment.  Unchecked, its loss is NaN.
    """
    ignore_index = resolve_integer("ignore_index", ignore_index)
    given = dict(label_smoothing=label_smoothing, logit_scale=logit_scale)
    given["lse_square_scale"] = lse_square_scale
    scales = [_number(name, x) for name, x in given.items()]
    _check(logits, labels, precomputed_lse, scales[0])
    if precomputed_lse is not None:
        usable = scales[:2] == [0.0, 1.0]
        wide = torch.promote_types(logits.dtype, torch.float32)
        precomputed_lse = precomputed_lse.detach().to(wide) if usable else None
    inplace = bool(inplace_backward) and not torch.compiler.is_compiling()
    inputs = *as_views(logits, labels, precomputed_lse), *scales, ignore_index
    if process_group is None or dist.get_world_size(process_group) == 1:
        losses, z_losses, _ = _CrossEntropy.apply(*inputs, 0, logits.shape[1], inplace, None)
    else:
        losses, z_losses, _ = _divided(*inputs, inplace, process_group)
    return losses, z_losses


class CrossEntropyLoss:
    """For clients that call the autograd function itself: ``apply`` is ``cross_entropy_loss``."""

    apply = staticmethod(cross_entropy_loss)


@torch.compiler.disable
def _divided(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The loss of a vocabulary that several processes divide."""
    *inputs, inplace, group = arguments
    cols = inputs[0].shape[1]
    part = dist.get_rank(group) * cols, dist.get_world_size(group) * cols
    return _CrossEntropy.apply(*inputs, *part, inplace, group)


class _CrossEntropy(torch.autograd.Function):
    """losses, z_losses and lse; the last two without gradients."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        logits,
        labels,
        lse,
        smoothing,
        logit_scale,
        lse_square_scale,
        ignore_index,
        first_class,
        classes,
        inplace,
        group,
    ):
        scales = smoothing, logit_scale, lse_square_scale
        part = ignore_index, first_class, classes
        losses, z_losses, lse = ops.forward(logits, labels, lse, *scales, *part)
        if group is None:
            return losses, z_losses, lse
        return _combine(losses, lse, labels, lse_square_scale, ignore_index, group)

    @staticmethod
    def setup_context(ctx, inputs, output):
        logits, labels, _, *ctx.options, ctx.inplace, ctx.group = inputs
        _, z_losses, lse = output
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(z_losses, lse)
        ctx.save_for_backward(logits, labels, lse)

    @staticmethod
    def backward(ctx, dlosses, dz_losses, dlse):
        nones = (None,) * 10
        if dlosses is None:
            return None, *nones
        logits, labels, lse = ctx.saved_tensors
        inputs = dlosses, logits, labels
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            if ctx.group is not None:
                raise RuntimeError(
                    "process_group: the gradient of a divided vocabulary has no gradient of its own,"
                    " as create_graph=True demands"
                )
            return _differentiable_gradient(*inputs, *ctx.options), *nones
        if ctx.inplace and _may_be_overwritten(logits):
            dlogits = logits.detach()
            ops.backward_into(*inputs, lse, *ctx.options, dlogits)
            # Whoever else saved the logits is told, instead of computing with something else.
            torch.autograd.graph.increment_version(logits)
            return dlogits, *nones
        return ops.backward(*inputs, lse, *ctx.options), *nones


def _may_be_overwritten(logits: Tensor) -> bool:
    """Whether no two elements share memory, and no transform of torch.func is at work."""
    if torch._C._functorch.is_functorch_wrapped_tensor(logits):
        return False
    (rows, cols), (row, col) = logits.shape, logits.stride()
    by_rows = col > 0 and (rows <= 1 or row >= (cols - 1) * col + 1)
    by_cols = row > 0 and (cols <= 1 or col >= (rows - 1) * row + 1)
    return by_rows or by_cols


def _combine(
    losses: Tensor,
    lse: Tensor,
    labels: Tensor,
    lse_square_scale: float,
    ignore_index: int,
    group: dist.ProcessGroup,
) -> tuple[Tensor, Tensor, Tensor]:
    """The whole vocabulary's result from every process's part: losses lack what depends on lse."""
    parts, _ = all_gather_raw(lse[None], group)
    dist.all_reduce(losses, group=group)
    lse = torch.logsumexp(parts, 0)
    z_losses = lse_square_scale * lse.square()
    is_ignored = labels == ignore_index
    losses += lse + z_losses
    return losses.masked_fill_(is_ignored, 0.0), z_losses.masked_fill_(is_ignored, 0.0), lse


def _differentiable_gradient(
    dlosses: Tensor,
    logits: Tensor,
    labels: Tensor,
    smoothing: float,
    logit_scale: float,
    lse_square_scale: float,
    ignore_index: int,
    first_class: int,
    classes: int,
) -> Tensor:
    """``ops.backward`` in torch operations that have gradients; it needs the memory that they need."""
    x = logits.to(torch.promote_types(logits.dtype, torch.float32)) * logit_scale
    is_ignored = labels == ignore_index
    is_class = (labels >= 0) & (labels < classes)
    target = labels.long().masked_fill(~is_class, 0)
    lse = torch.logsumexp(x, -1)
    weight = dlosses.masked_fill(is_ignored, 0.0)
    at_target = (weight * (smoothing - 1)).masked_fill(~is_class, 0.0)
    d = (weight * (1 + 2 * lse_square_scale * lse))[:, None] * torch.exp(x - lse[:, None])
    d = d - (weight * (smoothing / classes))[:, None]
    d = d.scatter_add(1, target[:, None], at_target[:, None])
    return (d * logit_scale).masked_fill(is_ignored[:, None], 0.0).to(logits.dtype)


def _number(name: str, x: float) -> float:
    if isinstance(x, Tensor):
        raise RuntimeError(
            f"{name} must be a number, as it gets no gradient; got a tensor: give {name}.item(), or"
            " apply it to logits or to the loss"
        )
    return float(x)


def _check(
    logits: Tensor, labels: Tensor, precomputed_lse: Tensor | None, label_smoothing: float
) -> None:
    if logits.dim() != 2 or logits.shape[1] == 0:
        raise RuntimeError(
            f"logits must have shape (rows, vocab), vocab at least 1; got {tuple(logits.shape)}"
        )
    if not logits.is_floating_point():
        raise RuntimeError(f"logits must have a floating dtype; got {logits.dtype}")
    if logits.device.type not in ("cpu", "cuda", "meta"):
        raise RuntimeError(f"logits must be on the CPU or on CUDA; got {logits.device}")
    if labels.shape != logits.shape[:1] or labels.dtype not in (torch.int32, torch.int64):
        raise RuntimeError(
            f"labels must have shape (rows,) = ({logits.shape[0]},) and dtype int32 or int64; got"
            f" {tuple(labels.shape)}, {labels.dtype}"
        )
    if precomputed_lse is not None and (
        precomputed_lse.shape != labels.shape or not precomputed_lse.is_floating_point()
    ):
        raise RuntimeError(
            f"precomputed_lse must have shape (rows,) = ({logits.shape[0]},) and a floating dtype;"
            f" got {tuple(precomputed_lse.shape)}, {precomputed_lse.dtype}"
        )
    for name, tensor in (("labels", labels), ("precomputed_lse", precomputed_lse)):
        if tensor is not None and tensor.device != logits.device:
            raise RuntimeError(
                f"{name} must be on logits' device {logits.device}; got {tensor.device}"
            )
    if not 0.0 <= label_smoothing <= 1.0:
        raise RuntimeError(f"label_smoothing must be in [0, 1]; got {label_smoothing}")
