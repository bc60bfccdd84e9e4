"""Derivatives of rotary embedding, and its rule under vmap.

``ops.triton.rotary`` does the rotations.  A rotation is linear in what it rotates: its tangent is
rotated as well, its gradient is rotated the other way.  The tables cos and sin get no derivative, and
whoever asks for one gets an error.
"""

from typing import Any

import torch
from torch import Tensor

from flash_attn.ops.triton.rotary import apply_rotary

__all__ = ["check_tables", "packed_rotary_function", "rotary_function"]


class ApplyRotary(torch.autograd.Function):
    """``apply_rotary`` with a gradient, which has one again.

    torch.compile traces this class out of place; it does not trace one with forward-mode derivatives.
    """

    @staticmethod
    def forward(
        x,
        cos,
        sin,
        interleaved,
        inplace,
        seqlen_offsets,
        cu_seqlens,
        max_seqlen,
        conjugate,
    ):
        return apply_rotary(
            x, cos, sin, seqlen_offsets, cu_seqlens, max_seqlen, interleaved, inplace, conjugate
        )

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, *tables, interleaved, inplace, offsets, cu_seqlens, max_seqlen, conjugate = inputs
        if inplace:
            ctx.mark_dirty(output)
        _save(ctx, offsets, *tables, cu_seqlens)
        ctx.options = interleaved, max_seqlen, conjugate

    @staticmethod
    def backward(ctx, dout):
        if dout is None:
            return (None,) * 9
        _refuse_gradients(ctx, "apply_rotary_emb", slice(1, 3))
        offsets, (cos, sin, cu_seqlens) = _saved(ctx)
        interleaved, max_seqlen, conjugate = ctx.options
        options = interleaved, False, offsets, cu_seqlens, max_seqlen, not conjugate
        return rotary_function().apply(dout, cos, sin, *options), *[None] * 8

    @staticmethod
    def vmap(info, in_dims, *args):
        return _map_rotation(rotary_function(), info, in_dims, args, inplace=4, offsets=5)


class _ApplyRotaryEager(ApplyRotary):
    """``ApplyRotary`` with forward-mode derivatives."""

    @staticmethod
    def setup_context(ctx, inputs, output):
        ApplyRotary.setup_context(ctx, inputs, output)
        _save_for_tangents(ctx, inputs)

    @staticmethod
    def jvp(ctx, dx, dcos, dsin, *_):
        _refuse_tangents("apply_rotary_emb", dcos, dsin)
        return _ApplyRotaryEager.apply(dx, *_other_inputs(ctx))


class ApplyRotaryPacked(torch.autograd.Function):
    """Rotates the queries and keys of a packed tensor, with a gradient, which has one again.

    packed: (..., 3 or 2, heads, head_dim), or with num_heads_q (..., heads, head_dim).
    """

    @staticmethod
    def forward(
        packed,
        cos,
        sin,
        cos_k,
        sin_k,
        num_heads_q,
        inplace,
        seqlen_offsets,
        cu_seqlens,
        max_seqlen,
        interleaved,
        conjugate,
    ):
        # The other heads come along in a copy.
        out = packed if inplace else packed.clone(memory_format=torch.contiguous_format)
        tables = (cos, sin), (cos if cos_k is None else cos_k, sin if sin_k is None else sin_k)
        joint = cos_k is None and sin_k is None
        for heads, (c, s) in zip(_rotated_heads(out, num_heads_q, joint), tables):
            apply_rotary(
                heads, c, s, seqlen_offsets, cu_seqlens, max_seqlen, interleaved, True, conjugate
            )
        return out

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, *tables, num_heads_q, inplace, offsets, cu_seqlens, max_seqlen, _, _ = inputs
        if inplace:
            ctx.mark_dirty(output)
        _save(ctx, offsets, *tables, cu_seqlens)
        ctx.options = num_heads_q, max_seqlen, *inputs[-2:]

    @staticmethod
    def backward(ctx, dout):
        if dout is None:
            return (None,) * 12
        _refuse_gradients(ctx, "apply_rotary_emb_qkv_ and _kv_", slice(1, 5))
        offsets, (*tables, cu_seqlens) = _saved(ctx)
        num_heads_q, max_seqlen, interleaved, conjugate = ctx.options
        # A copy: the gradient that arrives may be somebody else's too.
        options = num_heads_q, False, offsets, cu_seqlens, max_seqlen, interleaved, not conjugate
        return packed_rotary_function().apply(dout, *tables, *options), *[None] * 11

    @staticmethod
    def vmap(info, in_dims, *args):
        return _map_rotation(packed_rotary_function(), info, in_dims, args, inplace=6, offsets=7)


class _ApplyRotaryPackedEager(ApplyRotaryPacked):
    """``ApplyRotaryPacked`` with forward-mode derivatives."""

    @staticmethod
    def setup_context(ctx, inputs, output):
        ApplyRotaryPacked.setup_context(ctx, inputs, output)
        _save_for_tangents(ctx, inputs)

    @staticmethod
    def jvp(ctx, dpacked, dcos, dsin, dcos_k, dsin_k, *_):
        _refuse_tangents("apply_rotary_emb_qkv_ and _kv_", dcos, dsin, dcos_k, dsin_k)
        return _ApplyRotaryPackedEager.apply(dpacked, *_other_inputs(ctx))


def rotary_function() -> type[ApplyRotary]:
    """The class that serves here: torch.compile traces no forward-mode derivatives."""
    return ApplyRotary if torch.compiler.is_compiling() else _ApplyRotaryEager


def packed_rotary_function() -> type[ApplyRotaryPacked]:
    return ApplyRotaryPacked if torch.compiler.is_compiling() else _ApplyRotaryPackedEager


def check_tables(function: str, *tables: Tensor | None) -> None:
    """Raises where a table asks for the gradient that it won't get."""
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tables):
        raise RuntimeError(_no_derivative(function, "gradient"))


def _no_derivative(function: str, kind: str) -> str:
    return (
        f"{function}: cos and sin get no {kind}; give cos.detach() and sin.detach(), or rotate with"
        " apply_rotary_emb_torch, which gives them one"
    )


def _refuse_gradients(ctx, function: str, tables: slice) -> None:
    # torch.compile has seen check_tables.
    if not torch.compiler.is_compiling() and any(ctx.needs_input_grad[tables]):
        raise RuntimeError(_no_derivative(function, "gradient"))


def _refuse_tangents(function: str, *tangents: Tensor | None) -> None:
    if any(t is not None for t in tangents):
        raise RuntimeError(_no_derivative(function, "tangent (forward-mode derivative)"))


def _save(ctx, seqlen_offsets: int | Tensor, *tensors: Tensor | None) -> None:
    """Keeps the offsets and tensors for ``_saved``."""
    ctx.int_offset = None if isinstance(seqlen_offsets, Tensor) else seqlen_offsets
    ctx.save_for_backward(seqlen_offsets if ctx.int_offset is None else None, *tensors)


def _saved(ctx) -> tuple[int | Tensor, list[Tensor | None]]:
    tensor_offsets, *tensors = ctx.saved_tensors
    return tensor_offsets if ctx.int_offset is None else ctx.int_offset, tensors


def _save_for_tangents(ctx, inputs: tuple) -> None:
    """Keeps all inputs but the first for ``_other_inputs``; absent derivatives will be None."""
    ctx.set_materialize_grads(False)
    ctx.others = tuple(... if isinstance(arg, Tensor) else arg for arg in inputs[1:])
    ctx.save_for_forward(*(arg for arg in inputs[1:] if isinstance(arg, Tensor)))


def _other_inputs(ctx) -> tuple:
    tensors = iter(ctx.saved_tensors)
    return tuple(next(tensors) if arg is ... else arg for arg in ctx.others)


def _rotated_heads(packed: Tensor, num_heads_q: int | None, joint: bool) -> list[Tensor]:
    """Views (..., n, head_dim) of what is rotated: queries and keys, in one if they can be."""
    if num_heads_q is not None:
        num_heads_k = (packed.shape[-2] - num_heads_q) // 2
        if joint:
            return [packed.narrow(-2, 0, num_heads_q + num_heads_k)]
        return [
            packed.narrow(-2, 0, num_heads_q),
            packed.narrow(-2, num_heads_q, num_heads_k),
        ]
    if packed.shape[-3] == 2:
        return [packed.select(-3, 0)]
    if joint and packed.stride(-3) == packed.shape[-2] * packed.stride(-2):
        *rows, _, heads, head_dim = packed.shape
        return [packed.narrow(-3, 0, 2).view(*rows, 2 * heads, head_dim)]
    return [packed.select(-3, 0), packed.select(-3, 1)]


def _map_rotation(
    function: type[torch.autograd.Function],
    info: Any,
    in_dims: tuple[int | None, ...],
    args: tuple,
    inplace: int,
    offsets: int,
) -> tuple[Tensor, int]:
    """The function over the dimension that vmap maps, and where this lies in the result.

    inplace, offsets: the places of these arguments in args; cu_seqlens follows offsets.
    """
    x, x_dim, size, is_inplace = args[0], in_dims[0], info.batch_size, args[inplace]
    if is_inplace and x_dim is None:
        raise RuntimeError(
            "x: in place, vmap cannot rotate a tensor that it does not map by tables or positions"
            " that it maps; rotate out of place, or map x too"
        )
    args = (*args[:inplace], False, *args[inplace + 1 :])
    others = [i for i, dim in enumerate(in_dims) if dim is not None and i not in (0, offsets)]
    if x_dim is not None and args[offsets + 1] is None and not others:
        # The mapped dimension becomes part of batch.
        x = x.movedim(x_dim, 0)
        positions = args[offsets]
        if isinstance(positions, Tensor):
            dim = in_dims[offsets]
            rows = positions.expand(size, -1) if dim is None else positions.movedim(dim, 0)
            positions = rows.flatten()
        rest = (*args[1:offsets], positions, *args[offsets + 1 :])
        out = function.apply(x.flatten(0, 1), *rest).unflatten(0, x.shape[:2])
    else:
        # Sequences or tables differ: one call for each entry.
        columns = [
            [arg] * size if dim is None else arg.unbind(dim) for arg, dim in zip(args, in_dims)
        ]
        out = torch.stack([function.apply(*row) for row in zip(*columns)])
    if is_inplace and x_dim is not None:
        return args[0].copy_(out.movedim(0, x_dim)), x_dim
    return out, 0
