"""Operators of the norms, for the CPU and CUDA.  Used by ``layer_norm`` alone.

Tensors: x, residual, x1 (rows, cols); weight, bias, weight1, bias1 (cols,); rowscale (rows,); seeds
(rows, 2), int64: those of x and of x1.  total (rows, cols) is what is normalised::

    total = dropout(rowscale * x) + dropout(x1) + residual

What is absent is None as an argument and an empty tensor as a result.  Computed in fp32, or in fp64 if
there is an fp64 tensor.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from flash_attn._vmap import maybe_contiguous
from flash_attn.cpu.philox import _philox
from flash_attn.ops._library import batch_first, register, vmap_by_loop
from flash_attn.ops.triton import _layer_norm_kernels as kernels

__all__ = ["backward", "forward", "gradients", "keep_mask"]

# A weight is kept by 24 bits: fp32 tells them apart.
RANDOM_BITS = 24
MASK_32 = 0xFFFFFFFF


def keep_mask(seeds: Tensor, cols: int, dropout_p: float) -> Tensor:
    """What dropout keeps: bool (rows, cols), for seeds (rows,).

    Column c of a row is kept if the upper 24 bits of word c % 4 of Philox4x32-7, with the row's seed as
    key and the counter (c // 4, 0, 0, 0), are at least round(dropout_p * 2^24).
    """
    groups = torch.arange(-(-cols // 4), device=seeds.device)[None, :]
    keys = seeds[:, None] & MASK_32, (seeds[:, None] >> 32) & MASK_32
    zeros = torch.zeros_like(groups)
    words, _ = _philox(groups, zeros, zeros, zeros, *keys)
    bits = torch.stack(words, -1).flatten(1)[:, :cols].long() & MASK_32
    return bits >> (32 - RANDOM_BITS) >= _threshold(dropout_p)


def _threshold(dropout_p: float) -> int:
    return round(dropout_p * (1 << RANDOM_BITS))


def _keep_scale(dropout_p: float) -> float:
    return 1 / (1 - dropout_p) if dropout_p < 1 else 0.0


def _drop(x: Tensor, seeds: Tensor | None, dropout_p: float) -> Tensor:
    if seeds is None:
        return x
    return torch.where(keep_mask(seeds, x.shape[1], dropout_p), x * _keep_scale(dropout_p), 0.0)


def _both(seeds: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    if seeds is None:
        return None, None
    of_x, of_x1 = seeds.unbind(1)
    return of_x, of_x1


def _wide(*tensors: Tensor | None) -> torch.dtype:
    has_double = any(x is not None and x.dtype == torch.float64 for x in tensors)
    return torch.float64 if has_double else torch.float32


def _uses_kernels(x: Tensor, *tensors: Tensor | None) -> bool:
    fits = x.shape[1] <= kernels.MAX_COLS
    return x.is_cuda and kernels.triton is not None and fits and _wide(x, *tensors) == torch.float32


def statistics(total: Tensor, eps: float, is_rms_norm: bool) -> tuple[Tensor | None, Tensor]:
    """mean, which is None of an RMS norm, and 1 / standard deviation, of each row."""
    if is_rms_norm:
        return None, torch.rsqrt(total.square().mean(1) + eps)
    mean = total.mean(1)
    return mean, torch.rsqrt((total - mean[:, None]).square().mean(1) + eps)


def _forward_torch(
    x: Tensor,
    weights: list[Tensor | None],
    residual: Tensor | None,
    x1: Tensor | None,
    rowscale: Tensor | None,
    seeds: Tensor | None,
    options: tuple,
    wide: torch.dtype,
) -> tuple[Tensor | None, ...]:
    """y, y1, total, mean and rstd in the wide dtype; None: absent."""
    eps, dropout_p, is_rms_norm, zero_centered = options
    of_x, of_x1 = _both(seeds)
    total = x.to(wide)
    if rowscale is not None:
        total = total * rowscale.to(wide)[:, None]
    total = _drop(total, of_x, dropout_p)
    if x1 is not None:
        total = total + _drop(x1.to(wide), of_x1, dropout_p)
    if residual is not None:
        total = total + residual
    mean, rstd = statistics(total, eps, is_rms_norm)
    normal = (total if mean is None else total - mean[:, None]) * rstd[:, None]
    results: list[Tensor | None] = []
    for weight, bias in (weights[:2], weights[2:]):
        y = None if weight is None else normal * (weight.to(wide) + zero_centered)
        results.append(y if y is None or bias is None else y + bias)
    return *results, total, mean, rstd


def _run_forward(
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
    dropout_p: float,
    is_rms_norm: bool,
    zero_centered: bool,
    keeps_total: bool,
    out_dtype: torch.dtype,
    total_dtype: torch.dtype,
) -> tuple[Tensor, ...]:
    options = eps, dropout_p, is_rms_norm, zero_centered
    inputs = x, weight, bias, residual, x1, weight1, bias1
    results = _fake_forward(*inputs, rowscale, seeds, *options, keeps_total, out_dtype, total_dtype)
    if x.shape[0] == 0:
        return results
    y, y1, total, mean, rstd = results
    if not _uses_kernels(*inputs, rowscale):
        weights = [weight, bias, weight1, bias1]
        wide = _wide(*inputs, rowscale)
        computed = _forward_torch(x, weights, residual, x1, rowscale, seeds, options, wide)
        for result, value in zip(results, computed):
            if value is not None and result.numel() > 0:
                result.copy_(value)
        return results
    x, residual, x1 = maybe_contiguous(x), maybe_contiguous(residual), maybe_contiguous(x1)
    weight = weight.contiguous()
    bias, weight1, bias1, rowscale, seeds = (
        None if t is None else t.contiguous() for t in (bias, weight1, bias1, rowscale, seeds)
    )
    filled_y1, filled_total = None if weight1 is None else y1, total if keeps_total else None
    kernels.forward(
        *(y, filled_y1, filled_total, None if is_rms_norm else mean, rstd, x, weight, bias),
        *(residual, x1, weight1, bias1, rowscale, seeds),
        *(eps, _threshold(dropout_p), _keep_scale(dropout_p), zero_centered),
    )
    return results


def gradients(
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
    dropout_p: float,
    zero_centered: bool,
    wants: list[bool],
) -> list[Tensor | None]:
    """``backward`` in torch operations that have gradients, in the dtype of rstd."""
    wide = rstd.dtype
    of_x, of_x1 = _both(seeds)
    normal = total.to(wide) if mean is None else total.to(wide) - mean[:, None]
    normal = normal * rstd[:, None]
    d = torch.zeros_like(normal)
    of_weights: list[Tensor | None] = []
    for grad, w in ((dy, weight), (dy1, weight1)):
        if grad is None or w is None:
            missing = None if w is None else torch.zeros_like(normal[0])
            of_weights += [missing, missing]
            continue
        grad = grad.to(wide)
        d = d + grad * (w.to(wide) + zero_centered)
        of_weights += [(grad * normal).sum(0), grad.sum(0)]
    along = (d * normal).mean(1, keepdim=True)
    if mean is not None:
        d = d - d.mean(1, keepdim=True)
    d = (d - normal * along) * rstd[:, None]
    if dresult is not None:
        d = d + dresult
    dx = _drop(d, of_x, dropout_p)
    if rowscale is not None:
        dx = dx * rowscale.to(wide)[:, None]
    results = [d, dx, _drop(d, of_x1, dropout_p), *of_weights]
    return [result if wanted else None for result, wanted in zip(results, wants)]


def _run_backward(
    dy: Tensor | None,
    dy1: Tensor | None,
    dresult: Tensor | None,
    total: Tensor,
    weight: Tensor,
    weight1: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    rowscale: Tensor | None,
    seeds: Tensor | None,
    dropout_p: float,
    is_rms_norm: bool,
    zero_centered: bool,
    wants: list[bool],
    x_dtype: torch.dtype,
    x1_dtype: torch.dtype,
) -> tuple[Tensor, ...]:
    inputs = dy, dy1, dresult, total, weight, weight1
    results = _fake_backward(*inputs, mean, rstd, *[None] * 5, wants, x_dtype, x1_dtype)
    if total.shape[0] == 0:
        return tuple(result.zero_() for result in results)
    centre = None if is_rms_norm else mean
    if not _uses_kernels(total, rstd, weight, weight1, dy, dy1):
        computed = gradients(
            *inputs, centre, rstd, rowscale, seeds, dropout_p, zero_centered, wants
        )
        for result, value in zip(results, computed):
            if value is not None:
                result.copy_(value)
        return results
    dy, dy1, dresult = map(maybe_contiguous, (dy, dy1, dresult))
    total, weight = maybe_contiguous(total), weight.contiguous()
    weight1, rowscale, seeds = (
        None if t is None else t.contiguous() for t in (weight1, rowscale, seeds)
    )
    dtotal, dx, dx1 = (result if wanted else None for result, wanted in zip(results[:3], wants))
    of_weights = kernels.backward(
        *(dtotal, dx, dx1, (wants[3], wants[4], wants[5], wants[6]), dy, dy1, dresult),
        *(total, weight, weight1, centre, rstd, rowscale, seeds),
        *(_threshold(dropout_p), _keep_scale(dropout_p), zero_centered),
    )
    return *results[:3], *(r if g is None else g for r, g in zip(results[3:], of_weights))


def _fake_forward(x: Tensor, *args: Any) -> tuple[Tensor, ...]:
    weight1, wide = args[4], _wide(x, *args[:7])
    is_rms_norm, _, keeps_total, out_dtype, total_dtype = args[-5:]
    rows, none = x.shape[0], (0,)
    return (
        x.new_empty(x.shape, dtype=out_dtype),
        x.new_empty(none if weight1 is None else x.shape, dtype=out_dtype),
        x.new_empty(x.shape if keeps_total else none, dtype=total_dtype),
        x.new_empty(none if is_rms_norm else (rows,), dtype=wide),
        x.new_empty((rows,), dtype=wide),
    )


def _fake_backward(*args: Any) -> tuple[Tensor, ...]:
    total, rstd = args[3], args[7]
    wants, x_dtype, x1_dtype = args[-3:]
    dtypes = (total.dtype, x_dtype, x1_dtype, *[rstd.dtype] * 4)
    shapes = (*[total.shape] * 3, *[total.shape[1:]] * 4)
    return tuple(
        total.new_empty(shape if wanted else (0,), dtype=dtype)
        for shape, dtype, wanted in zip(shapes, dtypes, wants)
    )


def _vmap_forward(info: Any, in_dims: tuple, *args: Any) -> tuple[tuple, tuple]:
    """In one call where the weights are those of all entries."""
    if any(in_dims[i] is not None for i in (1, 2, 5, 6)):
        return vmap_by_loop(forward)(info, in_dims, *args)
    weights = {i: args[i] for i in (1, 2, 5, 6)}
    rows = batch_first(info, in_dims, args)
    flat = [x.flatten(0, 1) if isinstance(x, Tensor) else x for x in rows]
    results = forward(*(weights.get(i, x) for i, x in enumerate(flat)))
    sizes = info.batch_size, rows[0].shape[1]
    entries = [
        x.unflatten(0, sizes) if x.numel() > 0 else x.expand(info.batch_size, *x.shape)
        for x in results
    ]
    return tuple(entries), (0,) * len(entries)


forward = register(
    "layer_norm_fwd",
    "(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, Tensor? x1, Tensor? weight1,"
    " Tensor? bias1, Tensor? rowscale, Tensor? seeds, float eps, float dropout_p,"
    " bool is_rms_norm, bool zero_centered, bool keeps_total, ScalarType out_dtype,"
    " ScalarType total_dtype)"
    " -> (Tensor y, Tensor y1, Tensor total, Tensor mean, Tensor rstd)",
    _run_forward,
    _fake_forward,
    _vmap_forward,
)
# wants: which of the results.  dtotal is the gradient of residual, and of x and x1 where these are
# neither scaled nor dropped and have total's dtype.
backward: Callable[..., Any] = register(
    "layer_norm_bwd",
    "(Tensor? dy, Tensor? dy1, Tensor? dresult, Tensor total, Tensor weight, Tensor? weight1,"
    " Tensor mean, Tensor rstd, Tensor? rowscale, Tensor? seeds, float dropout_p,"
    " bool is_rms_norm, bool zero_centered, bool[] wants, ScalarType x_dtype, ScalarType x1_dtype)"
    " -> (Tensor dtotal, Tensor dx, Tensor dx1, Tensor dw, Tensor db, Tensor dw1, Tensor db1)",
    _run_backward,
    _fake_backward,
    lambda info, in_dims, *args: vmap_by_loop(backward)(info, in_dims, *args),
)
