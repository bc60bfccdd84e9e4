"""Layer norm and RMS norm, with what comes before them in a transformer: dropout and the residual sum.

Triton kernels on CUDA, torch elsewhere.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flash_attn.ops._library import as_views
from flash_attn.ops.triton import _layer_norm_ops as ops

__all__ = ["RMSNorm", "layer_norm_fn", "layer_norm_linear_fn", "rms_norm_fn"]

Result = Tensor | tuple[Tensor | None, ...]


def layer_norm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    x1: Tensor | None = None,
    weight1: Tensor | None = None,
    bias1: Tensor | None = None,
    eps: float = 1e-6,
    dropout_p: float = 0.0,
    rowscale: Tensor | None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    zero_centered_weight: bool = False,
    is_rms_norm: bool = False,
    return_dropout_mask: bool = False,
    out_dtype: torch.dtype | None = None,
    out: Tensor | None = None,
    residual_out: Tensor | None = None,
) -> Result:
    """Normalises every row of a sum, and scales it by one or two sets of weights::

        total = dropout(rowscale * x) + dropout(x1) + residual
        y  = (total - mean(total)) / sqrt(var(total) + eps) * weight  + bias
        y1 = (total - mean(total)) / sqrt(var(total) + eps) * weight1 + bias1

    An RMS norm does not subtract the mean: y = total / sqrt(mean(total^2) + eps) * weight + bias.
    Computed in fp32 (fp64 if there is an fp64 tensor) and rounded once, under autocast too.

    Args:
        x: (..., hidden), any floating dtype and strides.
        weight, bias, weight1, bias1: (hidden,), floating; all but weight may be None, and bias1 is for
            weight1 only.
        residual, x1: x's shape, floating.
        dropout_p: the probability with which an element of x, and of x1, is 0; the others are divided
            by 1 - dropout_p.  torch.manual_seed repeats it; what is kept follows from the numbers that
            torch draws, alike on the CPU and on CUDA.
        rowscale: x's shape without hidden, floating; not with x1.  It gets no gradient.
        prenorm: return total too.
        residual_in_fp32: total is fp32 where there is no residual; otherwise it has residual's dtype.
        zero_centered_weight: weight + 1 and weight1 + 1 take the place of the weights.
        return_dropout_mask: return which elements of x and of x1 were kept.
        out_dtype: of y and y1; default: x's.
        out, residual_out: x's shape: y and total are copied there, and these are returned.

    Returns:
        y, or a tuple of y, y1 (with weight1), total (with prenorm), and with return_dropout_mask the
        masks of x and of x1, bool, None where nothing is dropped.  All of x's shape.  Where total is
        x, it is x itself.

    Raises:
        RuntimeError: a wrong shape, dtype, device or value.
    """
    weights = dict(weight=weight, bias=bias, weight1=weight1, bias1=bias1)
    buffers = dict(out=out, residual_out=residual_out)
    _check(dropout_p, x=x, residual=residual, x1=x1, rowscale=rowscale, **weights, **buffers)
    total_dtype = torch.float32 if residual_in_fp32 else x.dtype
    if residual is not None:
        total_dtype = residual.dtype
    is_summed = (
        residual is not None or x1 is not None or rowscale is not None or dropout_p > 0
    ) or total_dtype != x.dtype
    hidden = x.shape[-1]
    flat_x = x.reshape(-1, hidden)
    residual, x1 = (None if t is None else t.reshape(-1, hidden) for t in (residual, x1))
    if rowscale is not None:
        rowscale = rowscale.reshape(-1)
    seeds = None
    if dropout_p > 0:
        # All 64 bits, so that no two rows of a long training draw the same.
        shape, limits = (flat_x.shape[0], 2), torch.iinfo(torch.int64)
        seeds = torch.randint(limits.min, limits.max, shape, device=x.device)
    y, y1, total, _, _ = _LayerNorm.apply(
        *as_views(flat_x, weight, bias, residual, x1, weight1, bias1, rowscale, seeds),
        *(float(eps), float(dropout_p), bool(is_rms_norm), bool(zero_centered_weight)),
        is_summed and (bool(prenorm) or torch.is_grad_enabled()),
        out.dtype if out is not None else out_dtype or x.dtype,
        total_dtype,
    )
    y = _given(out, y.view(x.shape))
    others: list[Tensor | None] = []
    if weight1 is not None:
        others.append(y1.view(x.shape))
    if prenorm:
        others.append(_given(residual_out, total.view(x.shape) if is_summed else x))
    if return_dropout_mask:
        of_x, of_x1 = (None, None) if seeds is None else seeds.unbind(1)
        for seed in (of_x, None if x1 is None else of_x1):
            mask = None if seed is None else ops.keep_mask(seed, hidden, dropout_p).view(x.shape)
            others.append(mask)
    return (y, *others) if others else y


def rms_norm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    x1: Tensor | None = None,
    weight1: Tensor | None = None,
    bias1: Tensor | None = None,
    eps: float = 1e-6,
    dropout_p: float = 0.0,
    rowscale: Tensor | None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    zero_centered_weight: bool = False,
    return_dropout_mask: bool = False,
    out_dtype: torch.dtype | None = None,
    out: Tensor | None = None,
    residual_out: Tensor | None = None,
) -> Result:
    """``layer_norm_fn`` with is_rms_norm=True."""
    return layer_norm_fn(
        *(x, weight, bias, residual, x1, weight1, bias1, eps, dropout_p, rowscale, prenorm),
        *(residual_in_fp32, zero_centered_weight, True, return_dropout_mask, out_dtype, out),
        residual_out,
    )


def layer_norm_linear_fn(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    residual: Tensor | None = None,
    eps: float = 1e-6,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    is_rms_norm: bool = False,
) -> Result:
    """F.linear of ``layer_norm_fn``, in x's dtype, or under autocast in autocast's.

    Args:
        x, residual: (..., hidden).
        linear_weight: (out_features, hidden); linear_bias: (out_features,) or None.

    Returns:
        (..., out_features), or with prenorm a tuple of it and total.
    """
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
    normed = layer_norm_fn(
        *(x, norm_weight, norm_bias, residual),
        eps=eps,
        prenorm=prenorm,
        residual_in_fp32=residual_in_fp32,
        is_rms_norm=is_rms_norm,
        out_dtype=dtype,
    )
    y = cast(Tensor, normed[0] if prenorm else normed)  # None can only follow
    linear_bias = None if linear_bias is None else linear_bias.to(dtype)
    projected = F.linear(y, linear_weight.to(dtype), linear_bias)
    return (projected, normed[1]) if prenorm else projected


class RMSNorm(nn.Module):
    """``rms_norm_fn`` as a module with a weight.

    Args:
        hidden_size: of the last dimension.
        dropout_p: in training.
        zero_centered_weight: the weight begins with 0 and 1 is added to it.
        device, dtype: of the weight.
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-5,
        dropout_p: float = 0.0,
        zero_centered_weight: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.eps = eps
        self.drop = nn.Dropout(dropout_p) if dropout_p > 0 else None
        self.zero_centered_weight = zero_centered_weight
        self.weight = nn.Parameter(torch.empty(hidden_size, device=device, dtype=dtype))
        self.register_parameter("bias", None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The weight that changes nothing."""
        nn.init.constant_(self.weight, 0.0 if self.zero_centered_weight else 1.0)

    def forward(
        self,
        x: Tensor,
        residual: Tensor | None = None,
        prenorm: bool = False,
        residual_in_fp32: bool = False,
    ) -> Result:
        """y, or with prenorm (y, total), as of ``layer_norm_fn``."""
        return rms_norm_fn(
            *(x, self.weight, self.bias, residual),
            eps=self.eps,
            dropout_p=self.drop.p if self.drop is not None and self.training else 0.0,
            prenorm=prenorm,
            residual_in_fp32=residual_in_fp32,
            zero_centered_weight=self.zero_centered_weight,
        )


class _LayerNorm(torch.autograd.Function):
    """y, y1, total, mean and rstd, as ``ops.forward``; the last two without gradients."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x, weight, bias, residual, x1, weight1, bias1, rowscale, seeds,
        eps, dropout_p, is_rms_norm, zero_centered, keeps_total, out_dtype, total_dtype,
    ):  # fmt: skip
        options = eps, dropout_p, is_rms_norm, zero_centered, keeps_total, out_dtype, total_dtype
        return ops.forward(x, weight, bias, residual, x1, weight1, bias1, rowscale, seeds, *options)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, weight, bias, _, x1, weight1, bias1, rowscale, seeds, *options = inputs
        ctx.eps, ctx.dropout_p, ctx.is_rms_norm, ctx.zero_centered, keeps_total, *_ = options
        _, _, total, mean, rstd = output
        ctx.keeps_total = keeps_total
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(mean, rstd)
        total = total if keeps_total else x
        ctx.save_for_backward(total, weight, weight1, mean, rstd, rowscale, seeds)
        ctx.dtypes = x.dtype, None if x1 is None else x1.dtype
        ctx.weight_dtypes = [None if w is None else w.dtype for w in (weight, bias, weight1, bias1)]
        # Not dropped and not scaled, the gradient of x is that of total.
        is_direct = rowscale is None and seeds is None
        ctx.x_is_apart = not is_direct or x.dtype != total.dtype
        ctx.x1_is_apart = x1 is not None and (seeds is not None or x1.dtype != total.dtype)

    @staticmethod
    def backward(ctx, dy, dy1, dresult, dmean, drstd):
        total, weight, weight1, mean, rstd, rowscale, seeds = ctx.saved_tensors
        x, w, b, residual, x1, w1, b1, scale, *_ = ctx.needs_input_grad
        if scale:
            raise RuntimeError("rowscale gets no gradient: detach it, or scale x without it")
        # Of an empty tensor, which stands for what is absent, a transform may give a gradient.
        dy1 = None if weight1 is None else dy1
        dresult = dresult if ctx.keeps_total else None
        if dy is None and dy1 is None and dresult is None:
            return (None,) * 16
        dx_is_total, dx1_is_total = x and not ctx.x_is_apart, x1 and not ctx.x1_is_apart
        wants = [residual or dx_is_total or dx1_is_total, x and ctx.x_is_apart]
        wants += [x1 and ctx.x1_is_apart, w, b, w1, b1]
        tensors = dy, dy1, dresult, total, weight, weight1
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            mean, rstd = ops.statistics(total.to(rstd.dtype), ctx.eps, ctx.is_rms_norm)
            how = ctx.dropout_p, ctx.zero_centered, wants
            grads = ops.gradients(*tensors, mean, rstd, rowscale, seeds, *how)
            dtotal, dx, dx1, *of_weights = grads
            dtotal, dx, dx1 = (
                None if d is None else d.to(dtype)
                for d, dtype in zip((dtotal, dx, dx1), (total.dtype, *ctx.dtypes))
            )
        else:
            last = rowscale, seeds, ctx.dropout_p, ctx.is_rms_norm, ctx.zero_centered, wants
            dtypes = ctx.dtypes[0], ctx.dtypes[1] or total.dtype
            dtotal, dx, dx1, *of_weights = ops.backward(*tensors, mean, rstd, *last, *dtypes)
        of_weights = [
            g.to(dtype) if wanted and g is not None else None
            for g, dtype, wanted in zip(of_weights, ctx.weight_dtypes, wants[3:])
        ]
        return (
            dtotal if dx_is_total else dx if x else None,
            *of_weights[:2],
            dtotal if residual else None,
            dtotal if dx1_is_total else dx1 if x1 else None,
            *of_weights[2:],
            *[None] * 9,
        )


def _given(buffer: Tensor | None, result: Tensor) -> Tensor:
    """The buffer with the result, or where there is none the result."""
    return result if buffer is None else buffer.copy_(result)


def _check(dropout_p: float, x: Tensor, **others: Tensor | None) -> None:
    if x.dim() == 0 or x.shape[-1] == 0:
        raise RuntimeError(
            f"x must have shape (..., hidden), hidden at least 1; got {tuple(x.shape)}"
        )
    for name, tensor in {"x": x, **others}.items():
        if tensor is None:
            continue
        shape, words = x.shape, "x's shape"
        if name == "rowscale":
            shape, words = x.shape[:-1], "x's shape without hidden"
        elif name in ("weight", "bias", "weight1", "bias1"):
            shape, words = x.shape[-1:], "(hidden,)"
        if tensor.shape != shape:
            raise RuntimeError(
                f"{name} must have {words}, {tuple(shape)}; got {tuple(tensor.shape)}"
            )
        if not tensor.is_floating_point():
            raise RuntimeError(f"{name} must have a floating dtype; got {tensor.dtype}")
        if tensor.device != x.device:
            raise RuntimeError(f"{name} must be on x's device {x.device}; got {tensor.device}")
    rowscale = others["rowscale"]
    if others["weight"] is None:
        raise RuntimeError("weight must be given; got None")
    if others["bias1"] is not None and others["weight1"] is None:
        raise RuntimeError("bias1 is for weight1, which is None")
    if rowscale is not None and others["x1"] is not None:
        raise RuntimeError("rowscale and x1 exclude each other")
    if rowscale is not None and rowscale.requires_grad and torch.is_grad_enabled():
        raise RuntimeError("rowscale gets no gradient: detach it, or scale x without it")
    if not 0.0 <= dropout_p <= 1.0:
        raise RuntimeError(f"dropout_p must be in [0, 1]; got {dropout_p}")
