"""Triton kernels of the norms, and their launches.  Used by ``_layer_norm_ops`` alone.

Every tensor is read and written once.  A program holds whole rows; in the backward it walks over the
rows and keeps its part of the weights' gradients, so that their sums repeat bitwise.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

MAX_COLS = 32768
# Elements of a tile: rows are joined to so many.
TILE_ELEMENTS = 4096
SMALLEST_BLOCK = 16
ELEMENTS_PER_WARP = 512
MAX_WARPS = 32
# Of the backward, which holds sums in registers.
PROGRAMS_PER_SM = 2
PROGRAMS_WITHOUT_A_GPU = 3
PHILOX_ROUNDS = 7


def _tile(rows: int, cols: int) -> dict[str, int]:
    block_n = max(SMALLEST_BLOCK, triton.next_power_of_2(cols))
    block_m = max(1, min(TILE_ELEMENTS // block_n, triton.next_power_of_2(rows)))
    warps = min(MAX_WARPS, max(1, block_m * block_n // ELEMENTS_PER_WARP))
    return dict(BLOCK_M=block_m, BLOCK_N=block_n, num_warps=warps)


def _row_stride(x: Tensor | None) -> int:
    return 0 if x is None else x.stride(0)


def _on_device_of(x: Tensor) -> Any:
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def forward(
    y: Tensor,
    y1: Tensor | None,
    total: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    x1: Tensor | None,
    weight1: Tensor | None,
    bias1: Tensor | None,
    rowscale: Tensor | None,
    seeds: Tensor | None,
    eps: float,
    threshold: int,
    keep_scale: float,
    zero_centered: bool,
) -> None:
    """Fills y, y1, total, mean and rstd; None: not wanted (mean: an RMS norm), or not there."""
    rows, cols = x.shape
    tile = _tile(rows, cols)
    tensors = (y, y1, total, mean, rstd, x, weight, bias, residual, x1, weight1, bias1)
    strides = map(_row_stride, (y, y1, total, x, residual, x1))
    with _on_device_of(x):
        _forward_kernel[(triton.cdiv(rows, tile["BLOCK_M"]),)](
            *(*tensors, rowscale, seeds, eps, threshold, keep_scale, rows, cols, *strides),
            ZERO_CENTERED=zero_centered,
            ROUNDS=PHILOX_ROUNDS,
            **tile,
        )


def backward(
    dtotal: Tensor | None,
    dx: Tensor | None,
    dx1: Tensor | None,
    wants: tuple[bool, bool, bool, bool],
    dy: Tensor | None,
    dy1: Tensor | None,
    dresult: Tensor | None,
    total: Tensor,
    weight: Tensor,
    weight1: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor,
    rowscale: Tensor | None,
    seeds: Tensor | None,
    threshold: int,
    keep_scale: float,
    zero_centered: bool,
) -> list[Tensor | None]:
    """Fills dtotal, dx and dx1 (None: not wanted); returns the gradients of weight, bias, weight1 and
    bias1 that ``wants`` asks for, in fp32."""
    rows, cols = total.shape
    tile = _tile(rows, cols)
    programs = PROGRAMS_WITHOUT_A_GPU
    if total.is_cuda:
        sms = torch.cuda.get_device_properties(total.device).multi_processor_count
        programs = sms * PROGRAMS_PER_SM
    programs = min(programs, triton.cdiv(rows, tile["BLOCK_M"]))
    parts = [
        total.new_empty((programs, cols), dtype=torch.float32) if wanted else None
        for wanted in wants
    ]
    tensors = (dtotal, dx, dx1, *parts, dy, dy1, dresult, total, weight, weight1, mean, rstd)
    strides = map(_row_stride, (dtotal, dx, dx1, dy, dy1, dresult, total))
    with _on_device_of(total):
        _backward_kernel[(programs,)](
            *(*tensors, rowscale, seeds, threshold, keep_scale, rows, cols),
            *(programs * tile["BLOCK_M"], *strides),
            ZERO_CENTERED=zero_centered,
            ROUNDS=PHILOX_ROUNDS,
            **tile,
        )
    return [None if part is None else part.sum(0) for part in parts]


if triton is not None:

    @triton.jit
    def _load(X, row, col, stride, mask):
        at = X + row[:, None].to(tl.int64) * stride + col[None, :]
        return tl.load(at, mask=mask, other=0.0).to(tl.float32)

    @triton.jit
    def _store(X, x, row, col, stride, mask):
        tl.store(X + row[:, None].to(tl.int64) * stride + col[None, :], x, mask=mask)

    @triton.jit
    def _load_weight(W, col, cols, ZERO_CENTERED: tl.constexpr):
        w = tl.load(W + col, mask=col < cols, other=0.0).to(tl.float32)
        if ZERO_CENTERED:
            w += 1.0
        return w[None, :]

    @triton.jit
    def _drop(
        x,
        SEEDS,
        row,
        rows,
        which,
        threshold,
        keep_scale,
        BLOCK_M: tl.constexpr,
        BLOCK_N: tl.constexpr,
        ROUNDS: tl.constexpr,
    ):
        """x without what is dropped: see ``_layer_norm_ops.keep_mask``."""
        seed = tl.load(SEEDS + 2 * row.to(tl.int64) + which, mask=row < rows, other=0)[:, None]
        group = tl.arange(0, BLOCK_N // 4)[None, :] + tl.zeros([BLOCK_M, 1], tl.int32)
        w0, w1, w2, w3 = tl.randint4x(seed, group, n_rounds=ROUNDS)
        words = tl.join(tl.join(w0, w2), tl.join(w1, w3))
        words = tl.reshape(words, (BLOCK_M, BLOCK_N)).to(tl.uint32, bitcast=True)
        keep = (words >> 8).to(tl.int32) >= threshold
        return tl.where(keep, x * keep_scale, 0.0)

    @triton.jit(do_not_specialize=["rows", "threshold"])
    def _forward_kernel(
        Y,
        Y1,
        TOTAL,
        MEAN,
        RSTD,
        X,
        W,
        B,
        RESIDUAL,
        X1,
        W1,
        B1,
        ROWSCALE,
        SEEDS,
        eps,
        threshold,
        keep_scale,
        rows,
        cols,
        y_row,
        y1_row,
        total_row,
        x_row,
        residual_row,
        x1_row,
        ZERO_CENTERED: tl.constexpr,
        ROUNDS: tl.constexpr,
        BLOCK_M: tl.constexpr,
        BLOCK_N: tl.constexpr,
    ):
        row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
        col = tl.arange(0, BLOCK_N)
        mask = (row < rows)[:, None] & (col < cols)[None, :]

        x = _load(X, row, col, x_row, mask)
        if ROWSCALE is not None:
            x *= tl.load(ROWSCALE + row, mask=row < rows, other=0.0).to(tl.float32)[:, None]
        if SEEDS is not None:
            x = _drop(x, SEEDS, row, rows, 0, threshold, keep_scale, BLOCK_M, BLOCK_N, ROUNDS)
        if X1 is not None:
            x1 = _load(X1, row, col, x1_row, mask)
            if SEEDS is not None:
                x1 = _drop(x1, SEEDS, row, rows, 1, threshold, keep_scale, BLOCK_M, BLOCK_N, ROUNDS)
            x += x1
        if RESIDUAL is not None:
            x += _load(RESIDUAL, row, col, residual_row, mask)
        if TOTAL is not None:
            _store(TOTAL, x, row, col, total_row, mask)

        if MEAN is not None:
            mean = tl.sum(x, axis=1) / cols
            tl.store(MEAN + row, mean, mask=row < rows)
            x = tl.where(mask, x - mean[:, None], 0.0)
        rstd = 1.0 / tl.sqrt(tl.sum(x * x, axis=1) / cols + eps)
        tl.store(RSTD + row, rstd, mask=row < rows)
        x *= rstd[:, None]

        y = x * _load_weight(W, col, cols, ZERO_CENTERED)
        if B is not None:
            y += _load_weight(B, col, cols, False)
        _store(Y, y, row, col, y_row, mask)
        if W1 is not None:
            y = x * _load_weight(W1, col, cols, ZERO_CENTERED)
            if B1 is not None:
                y += _load_weight(B1, col, cols, False)
            _store(Y1, y, row, col, y1_row, mask)

    @triton.jit(do_not_specialize=["rows", "threshold", "step"])
    def _backward_kernel(
        DTOTAL,
        DX,
        DX1,
        DW,  # DW to DB1: (programs, cols)
        DB,
        DW1,
        DB1,
        DY,
        DY1,
        DRESULT,
        TOTAL,
        W,
        W1,
        MEAN,
        RSTD,
        ROWSCALE,
        SEEDS,
        threshold,
        keep_scale,
        rows,
        cols,
        step,  # rows of all programs' tiles
        dtotal_row,
        dx_row,
        dx1_row,
        dy_row,
        dy1_row,
        dresult_row,
        total_row,
        ZERO_CENTERED: tl.constexpr,
        ROUNDS: tl.constexpr,
        BLOCK_M: tl.constexpr,
        BLOCK_N: tl.constexpr,
    ):
        program = tl.program_id(0)
        col = tl.arange(0, BLOCK_N)
        if DY is not None:
            w = _load_weight(W, col, cols, ZERO_CENTERED)
        if DY1 is not None:
            w1 = _load_weight(W1, col, cols, ZERO_CENTERED)
        dw = tl.zeros([BLOCK_N], tl.float32)
        db = tl.zeros([BLOCK_N], tl.float32)
        dw1 = tl.zeros([BLOCK_N], tl.float32)
        db1 = tl.zeros([BLOCK_N], tl.float32)

        for start in range(program * BLOCK_M, rows, step):
            row = start + tl.arange(0, BLOCK_M)
            inside = row < rows
            mask = inside[:, None] & (col < cols)[None, :]
            rstd = tl.load(RSTD + row, mask=inside, other=0.0)[:, None]
            x = _load(TOTAL, row, col, total_row, mask)
            if MEAN is not None:
                x -= tl.load(MEAN + row, mask=inside, other=0.0)[:, None]
            x = tl.where(mask, x * rstd, 0.0)

            d = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
            if DY is not None:
                dy = _load(DY, row, col, dy_row, mask)
                d += dy * w
                if DW is not None:
                    dw += tl.sum(dy * x, axis=0)
                if DB is not None:
                    db += tl.sum(dy, axis=0)
            if DY1 is not None:
                dy1 = _load(DY1, row, col, dy1_row, mask)
                d += dy1 * w1
                if DW1 is not None:
                    dw1 += tl.sum(dy1 * x, axis=0)
                if DB1 is not None:
                    db1 += tl.sum(dy1, axis=0)

            along = tl.sum(d * x, axis=1)[:, None] / cols
            if MEAN is not None:
                d -= tl.sum(d, axis=1)[:, None] / cols
            d = (d - x * along) * rstd
            if DRESULT is not None:
                d += _load(DRESULT, row, col, dresult_row, mask)
            if DTOTAL is not None:
                _store(DTOTAL, d, row, col, dtotal_row, mask)
            if DX1 is not None:
                d1 = d
                if SEEDS is not None:
                    d1 = _drop(
                        d, SEEDS, row, rows, 1, threshold, keep_scale, BLOCK_M, BLOCK_N, ROUNDS
                    )
                _store(DX1, d1, row, col, dx1_row, mask)
            if DX is not None:
                if SEEDS is not None:
                    d = _drop(
                        d, SEEDS, row, rows, 0, threshold, keep_scale, BLOCK_M, BLOCK_N, ROUNDS
                    )
                if ROWSCALE is not None:
                    d *= tl.load(ROWSCALE + row, mask=inside, other=0.0).to(tl.float32)[:, None]
                _store(DX, d, row, col, dx_row, mask)

        at = program.to(tl.int64) * cols + col
        if DW is not None:
            tl.store(DW + at, dw, mask=col < cols)
        if DB is not None:
            tl.store(DB + at, db, mask=col < cols)
        if DW1 is not None:
            tl.store(DW1 + at, dw1, mask=col < cols)
        if DB1 is not None:
            tl.store(DB1 + at, db1, mask=col < cols)
