"""Triton kernels of the cross entropy, and their launches.  Used by ``cross_entropy`` alone.

Logits are read once forward and once backward, and computed with in fp32; nothing of their size is
allocated but the gradient.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

# Classes that one program reads at a time, and its warps.
FORWARD = 8192, 16
BACKWARD = 4096, 8
SMALLEST_BLOCK = 128
ELEMENTS_PER_WARP = 256


def _block_and_warps(config: tuple[int, int], cols: int) -> tuple[int, int]:
    block = min(config[0], max(SMALLEST_BLOCK, triton.next_power_of_2(cols)))
    return block, min(config[1], max(1, block // ELEMENTS_PER_WARP))


def forward(
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
    """Fills losses and z_losses, and lse unless has_lse; all fp32 (rows,), contiguous."""
    rows, cols = logits.shape
    block, warps = _block_and_warps(FORWARD, cols)
    with torch.cuda.device(logits.device) if logits.is_cuda else nullcontext():
        _forward_kernel[(rows,)](
            losses,
            z_losses,
            lse,
            logits,
            labels,
            smoothing,
            logit_scale,
            lse_square_scale,
            ignore_index,
            first_class,
            classes,
            cols,
            cols // block * block,
            *logits.stride(),
            labels.stride(0),
            HAS_LSE=has_lse,
            SMOOTHS=smoothing > 0,
            IS_PART=classes != cols,
            BLOCK=block,
            num_warps=warps,
        )


def backward(
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
    """Fills dlogits, which may be logits."""
    rows, cols = logits.shape
    block, warps = _block_and_warps(BACKWARD, cols)
    blocks = triton.cdiv(cols, block)
    with torch.cuda.device(logits.device) if logits.is_cuda else nullcontext():
        _backward_kernel[(rows * blocks,)](
            dlogits,
            dlosses,
            logits,
            labels,
            lse,
            smoothing,
            logit_scale,
            lse_square_scale,
            ignore_index,
            first_class,
            classes,
            cols,
            blocks,
            *dlogits.stride(),
            dlosses.stride(0),
            *logits.stride(),
            labels.stride(0),
            BLOCK=block,
            num_warps=warps,
        )


if triton is not None:

    @triton.jit
    def _read(at, col, stride, logit_scale):
        return tl.load(at + col.to(tl.int64) * stride).to(tl.float32) * logit_scale

    @triton.jit
    def _accumulate(x, largest, sums):
        """Sums of exp(x - largest), by the place in the block, for the larger `largest`."""
        larger = tl.maximum(largest, tl.max(x, axis=0))
        # Nothing but -inf so far: the difference of two infinities would be NaN.
        origin = tl.where(larger == -float("inf"), 0.0, larger)
        return larger, sums * tl.exp(largest - origin) + tl.exp(x - origin)

    @triton.jit(do_not_specialize=["ignore_index", "first_class", "classes"])
    def _forward_kernel(
        LOSSES,  # (rows,)
        Z_LOSSES,  # (rows,)
        LSE,  # (rows,)
        LOGITS,  # (rows, cols)
        LABELS,  # (rows,)
        smoothing,
        logit_scale,
        lse_square_scale,
        ignore_index,
        first_class,
        classes,
        cols,
        whole,  # cols in whole blocks
        logits_row,
        logits_col,
        labels_row,
        HAS_LSE: tl.constexpr,
        SMOOTHS: tl.constexpr,
        IS_PART: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        row = tl.program_id(0).to(tl.int64)
        x_at = LOGITS + row * logits_row
        total = 0.0
        if HAS_LSE:
            lse = tl.load(LSE + row)
        else:
            place = tl.arange(0, BLOCK)
            largest = -float("inf")
            sums = tl.zeros([BLOCK], tl.float32)
            totals = tl.zeros([BLOCK], tl.float32)
            for start in range(0, whole, BLOCK):
                x = _read(x_at, start + place, logits_col, logit_scale)
                largest, sums = _accumulate(x, largest, sums)
                if SMOOTHS:
                    totals += x
            if whole < cols:
                inside = whole + place < cols
                at = x_at + (whole + place).to(tl.int64) * logits_col
                x = tl.load(at, mask=inside, other=0.0).to(tl.float32) * logit_scale
                if SMOOTHS:
                    totals += x
                largest, sums = _accumulate(tl.where(inside, x, -float("inf")), largest, sums)
            lse = largest + tl.log(tl.sum(sums, axis=0))
            tl.store(LSE + row, lse)
            total = tl.sum(totals, axis=0)

        label = tl.load(LABELS + row * labels_row).to(tl.int64)
        is_ignored = label == ignore_index
        local = label - first_class
        is_here = (local >= 0) & (local < cols) & (label != ignore_index)
        target = tl.load(x_at + local * logits_col, mask=is_here, other=0.0)
        loss = -(1.0 - smoothing) * (target.to(tl.float32) * logit_scale)
        if SMOOTHS:
            loss -= smoothing * (total / classes)
        z_loss = 0.0
        if not IS_PART:
            z_loss = lse_square_scale * lse * lse
            loss += lse + z_loss
        # Whoever gives a label that does not exist sees it.
        loss = tl.where((label >= 0) & (label < classes), loss, float("nan"))
        tl.store(LOSSES + row, tl.where(is_ignored, 0.0, loss))
        tl.store(Z_LOSSES + row, tl.where(is_ignored, 0.0, z_loss))

    @triton.jit(do_not_specialize=["ignore_index", "first_class", "classes"])
    def _backward_kernel(
        DLOGITS,  # (rows, cols)
        DLOSSES,  # (rows,)
        LOGITS,  # (rows, cols)
        LABELS,  # (rows,)
        LSE,  # (rows,)
        smoothing,
        logit_scale,
        lse_square_scale,
        ignore_index,
        first_class,
        classes,
        cols,
        blocks,
        dlogits_row,
        dlogits_col,
        dlosses_row,
        logits_row,
        logits_col,
        labels_row,
        BLOCK: tl.constexpr,
    ):
        # One axis of the grid holds rows and blocks: the others end at 65535.
        program = tl.program_id(0)
        row = (program // blocks).to(tl.int64)
        col = (program % blocks) * BLOCK + tl.arange(0, BLOCK)
        inside = col < cols
        wide_col = col.to(tl.int64)

        label = tl.load(LABELS + row * labels_row).to(tl.int64)
        is_ignored = label == ignore_index
        dloss = tl.load(DLOSSES + row * dlosses_row).to(tl.float32)
        lse = tl.load(LSE + row)
        at = LOGITS + row * logits_row + wide_col * logits_col
        x = tl.load(at, mask=inside, other=0.0).to(tl.float32) * logit_scale
        d = (1.0 + 2.0 * lse_square_scale * lse) * tl.exp(x - lse) - smoothing / classes
        d = tl.where(col == label - first_class, d - (1.0 - smoothing), d)
        d = tl.where(is_ignored, 0.0, d * (dloss * logit_scale))
        tl.store(DLOGITS + row * dlogits_row + wide_col * dlogits_col, d, mask=inside)
