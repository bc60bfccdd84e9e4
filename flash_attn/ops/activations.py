"""Activations.  SwiGLU: one Triton kernel for each pass on CUDA, torch elsewhere."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from flash_attn.ops._library import as_views, batch_first, register

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

__all__ = ["swiglu"]

# Elements of a program, and of a row that a warp reads in vectors of 16 bytes.
BLOCK, SMALLEST_BLOCK = 1024, 64
ROW_OF_A_WARP = 256


def swiglu(x: Tensor, y: Tensor) -> Tensor:
    """silu(x) * y = x / (1 + exp(-x)) * y, computed in fp32 (fp64 for fp64) and rounded once.

    x and y are what is kept for the gradients, which have gradients themselves.

    Args:
        x, y: one shape, one floating dtype, any strides.

    Returns:
        The same shape and dtype.

    Raises:
        RuntimeError: shapes, dtypes or devices that differ, or a dtype that is not floating.
    """
    if y.shape != x.shape or y.dtype != x.dtype or y.device != x.device:
        raise RuntimeError(
            "y must have x's shape, dtype and device; got"
            f" x = {tuple(x.shape)}, {x.dtype}, {x.device};"
            f" y = {tuple(y.shape)}, {y.dtype}, {y.device}"
        )
    if not x.is_floating_point():
        raise RuntimeError(f"x must have a floating dtype; got {x.dtype}")
    return _Swiglu.apply(*as_views(x, y))


class _Swiglu(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x, y):
        return _forward(x, y)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, dout):
        x, y = ctx.saved_tensors
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            return _gradients(dout, x, y)
        return _backward(dout, x, y)


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _gradients(dout: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Those of x and y, in torch operations that have gradients."""
    d, wide_x = dout.to(_wide(x)), x.to(_wide(x))
    sigmoid = torch.sigmoid(wide_x)
    dx = d * y * sigmoid * (1 + wide_x * (1 - sigmoid))
    return dx.to(x.dtype), (d * wide_x * sigmoid).to(y.dtype)


def _uses_kernels(x: Tensor) -> bool:
    return x.is_cuda and triton is not None and x.dtype != torch.float64


def _launch(kernel: Any, results: tuple[Tensor, ...], *inputs: Tensor) -> None:
    """Halves of one tensor are read where they are, by their rows; contiguous tensors are one row."""
    cols = results[0].shape[-1] if results[0].dim() > 0 else 1
    tensors = [t.reshape(-1, cols) for t in (*results, *inputs)]
    tensors = [t if t.stride(1) == 1 else t.contiguous() for t in tensors]
    if all(t.is_contiguous() for t in tensors):
        tensors = [t.view(1, -1) for t in tensors]
    rows, cols = tensors[0].shape
    block = min(BLOCK, max(SMALLEST_BLOCK, triton.next_power_of_2(cols)))
    blocks = triton.cdiv(cols, block)
    strides = [t.stride(0) for t in tensors]
    with torch.cuda.device(results[0].device) if results[0].is_cuda else nullcontext():
        kernel[(rows * blocks,)](
            *tensors, *strides, cols, blocks, BLOCK=block, num_warps=max(1, block // ROW_OF_A_WARP)
        )


def _run_forward(x: Tensor, y: Tensor) -> Tensor:
    if not _uses_kernels(x) or x.numel() == 0:
        wide = F.silu(x.to(_wide(x))) * y
        return wide.to(x.dtype, memory_format=torch.contiguous_format)
    out = x.new_empty(x.shape)
    _launch(_forward_kernel, (out,), x, y)
    return out


def _run_backward(dout: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    if not _uses_kernels(x) or x.numel() == 0:
        dx, dy = _gradients(dout, x, y)
        return dx.contiguous(), dy.contiguous()
    grads = x.new_empty(x.shape), x.new_empty(x.shape)
    _launch(_backward_kernel, grads, dout, x, y)
    return grads


if triton is not None:

    @triton.jit
    def _load(X, x_row, row, col, cols):
        at = X + row.to(tl.int64) * x_row + col
        return tl.load(at, mask=col < cols, other=0.0).to(tl.float32)

    @triton.jit
    def _forward_kernel(OUT, X, Y, out_row, x_row, y_row, cols, blocks, BLOCK: tl.constexpr):
        program = tl.program_id(0)
        row = program // blocks
        col = (program % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        x = _load(X, x_row, row, col, cols)
        y = _load(Y, y_row, row, col, cols)
        at = OUT + row.to(tl.int64) * out_row + col
        tl.store(at, x * tl.sigmoid(x) * y, mask=col < cols)

    @triton.jit
    def _backward_kernel(
        DX,
        DY,
        DOUT,
        X,
        Y,
        dx_row,
        dy_row,
        dout_row,
        x_row,
        y_row,
        cols,
        blocks,
        BLOCK: tl.constexpr,
    ):
        program = tl.program_id(0)
        row = program // blocks
        col = (program % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        d = _load(DOUT, dout_row, row, col, cols)
        x = _load(X, x_row, row, col, cols)
        y = _load(Y, y_row, row, col, cols)
        s = tl.sigmoid(x)
        dx = d * y * s * (1.0 + x * (1.0 - s))
        tl.store(DX + row.to(tl.int64) * dx_row + col, dx, mask=col < cols)
        tl.store(DY + row.to(tl.int64) * dy_row + col, d * x * s, mask=col < cols)


def _vmap_forward(info: Any, in_dims: tuple, *args: Tensor) -> tuple[Tensor, int]:
    return _forward(*batch_first(info, in_dims, args)), 0


def _vmap_backward(info: Any, in_dims: tuple, *args: Tensor) -> tuple[tuple, tuple]:
    return _backward(*batch_first(info, in_dims, args)), (0, 0)


_forward = register(
    "swiglu_fwd",
    "(Tensor x, Tensor y) -> Tensor",
    _run_forward,
    lambda x, y: x.new_empty(x.shape),
    _vmap_forward,
)
_backward = register(
    "swiglu_bwd",
    "(Tensor dout, Tensor x, Tensor y) -> (Tensor dx, Tensor dy)",
    _run_backward,
    lambda dout, x, y: (x.new_empty(x.shape), x.new_empty(x.shape)),
    _vmap_backward,
)
