"""How vmap of torch.func goes through attention: rules that fold its dimension into one of ours.

Used by ``_autograd``, ``_op_gradients`` and ``_merge``.  Attention has two dimensions along which
nothing is summed, and a rule moves vmap's dimension there: to the batch, or for variable length, where
sequences follow each other in one dimension, to the heads.  Query head ``i * heads_q + h`` of the
folded tensors attends with key head ``i * heads_k + h // group``, as it did before.
"""

from collections.abc import Callable, Sequence
from contextvars import ContextVar
from typing import Any, NamedTuple, overload

import torch
from torch import Tensor

Apply = Callable[..., tuple[Tensor, ...]]
Dims = Sequence[int | None]

# Whether a call has the random state that the call before drew, to draw the same again.  A vmap around
# may have folded that call: then it folds this one too.  A state that the caller gives is never folded.
_repeats_a_draw = ContextVar("_repeats_a_draw", default=False)


class Statics(NamedTuple):
    """What a call is, beside its tensors."""

    score: tuple[float, bool, int, int, float]
    dropout_p: float
    deterministic: bool
    return_softmax: bool
    max_seqlen_q: int | None  # None: tensors with a batch dimension
    max_seqlen_k: int | None


def forward_rule(apply: Apply, info: Any, in_dims: tuple, arguments: tuple) -> tuple:
    """vmap of ``FlashAttention``, which apply calls."""
    dims = outer_dims(in_dims)
    x, y, z, scale, softcap, slopes, state, cu_seqlens_q, *_, statics = arguments
    # Folded, the examples have one random state, and with it masks of their own.
    has_given_state = state is not None and not _repeats_a_draw.get()
    is_masked_alike = has_given_state or info.randomness == "same"
    is_looped = Statics(*statics).dropout_p > 0 and is_masked_alike
    if is_looped or any(dims[i] is not None for i in (3, 4, 6, 7, 8, 9)):
        return _loop_forward(apply, info, dims, arguments)

    size = info.batch_size
    folded = [_fold(t, dims[i], size, cu_seqlens_q) for i, t in enumerate((x, y, z))]
    slopes = _fold_slopes(slopes, dims[5], size, x.shape, dims[0], cu_seqlens_q)
    results = apply(*folded, scale, softcap, slopes, state, cu_seqlens_q, *arguments[8:])
    out, softmax_lse, probabilities, state = results
    if cu_seqlens_q is None:
        split = [t.unflatten(0, (size, -1)) for t in (out, softmax_lse)]
        split_dims = [0, 0]
    else:
        pairs = [
            unfold_heads(out, size, -2),
            unfold_heads(softmax_lse, size, -2),
        ]
        split, split_dims = [t for t, _ in pairs], [dim for _, dim in pairs]
    probabilities_dim = None
    if probabilities.dim() > 1:
        probabilities_dim = 0 if cu_seqlens_q is None else 1
        probabilities = probabilities.unflatten(probabilities_dim, (size, -1))
    return (*split, probabilities, state), (*split_dims, probabilities_dim, None)


def _loop_forward(apply: Apply, info: Any, dims: list[int | None], arguments: tuple) -> tuple:
    """Example after example: numbers, lengths or random states of their own, or one mask for all."""
    drawn: list[Tensor] = []

    def apply_one(*one: Any) -> tuple:
        if drawn and one[6] is None and info.randomness == "same":
            token = _repeats_a_draw.set(True)
            try:
                return apply(*one[:6], drawn[0], *one[7:])
            finally:
                _repeats_a_draw.reset(token)
        results = apply(*one)
        drawn.append(results[3])
        return results

    return loop(apply_one, info.batch_size, dims, arguments)


def backward_rule(apply: Apply, info: Any, in_dims: tuple, arguments: tuple) -> tuple:
    """vmap of ``FlashAttentionGradients``, which apply calls."""
    dims = outer_dims(in_dims)
    dout, dlse, x, y, z, out, softmax_lse, scale, softcap, slopes, *_ = arguments
    state, cu_seqlens_q, cu_seqlens_k, statics = arguments[10:]
    # The forward pass was folded if its result has the dimension and all share its random state.
    was_folded = dims[5] is not None
    if not was_folded or any(dims[i] is not None for i in (7, 8, 10, 11, 12)):
        return loop(apply, info.batch_size, dims, arguments)

    size = info.batch_size
    folded = (
        _fold(dout, dims[0], size, cu_seqlens_q),
        _fold_rows(dlse, dims[1], size, cu_seqlens_q),
        *(_fold(t, dims[i], size, cu_seqlens_q) for i, t in ((2, x), (3, y), (4, z), (5, out))),
        _fold_rows(softmax_lse, dims[6], size, cu_seqlens_q),
    )
    slopes = _fold_slopes(slopes, dims[9], size, x.shape, dims[2], cu_seqlens_q)
    grads = apply(*folded, scale, softcap, slopes, state, cu_seqlens_q, cu_seqlens_k, statics)
    if cu_seqlens_q is None:
        return tuple(t.unflatten(0, (size, -1)) for t in grads), (0,) * len(grads)
    pairs = [unfold_heads(t, size, -2) for t in grads]
    return tuple(t for t, _ in pairs), tuple(dim for _, dim in pairs)


def _fold(
    x: Tensor | None, dim: int | None, size: int, cu_seqlens_q: Tensor | None
) -> Tensor | None:
    """One of x, y, z, out, dout with the dimension that vmap added folded away."""
    if cu_seqlens_q is None:
        return fold_batch(x, dim, size)
    return maybe_contiguous(fold_heads(x, dim, size, -2))


def _fold_rows(
    rows: Tensor | None, dim: int | None, size: int, cu_seqlens_q: Tensor | None
) -> Tensor | None:
    """The same of softmax_lse or its gradient."""
    if cu_seqlens_q is None:
        return fold_batch(rows, dim, size)
    return fold_heads(rows, dim, size, -2)


def _fold_slopes(
    slopes: Tensor | None,
    dim: int | None,
    size: int,
    x_shape: torch.Size,
    x_dim: int | None,
    cu_seqlens_q: Tensor | None,
) -> Tensor | None:
    batch = None
    if cu_seqlens_q is None:
        batch = next(n for i, n in enumerate(x_shape) if i != x_dim)
    return fold_slopes(slopes, dim, size, batch)


@overload
def maybe_contiguous(x: Tensor) -> Tensor: ...
@overload
def maybe_contiguous(x: Tensor | None) -> Tensor | None: ...
def maybe_contiguous(x: Tensor | None) -> Tensor | None:
    """x with a contiguous last dimension: x itself where it has one, else a copy."""
    return x.contiguous() if x is not None and x.stride(-1) != 1 else x


def outer_dims(in_dims: Sequence[Any]) -> list[int | None]:
    """The dimension of each argument that vmap added; None for other arguments, tuples too."""
    return [dim if isinstance(dim, int) else None for dim in in_dims]


def fold_batch(x: Tensor | None, dim: int | None, size: int) -> Tensor | None:
    """(batch, ...) with a new dimension, or the same for all size examples: (size * batch, ...)."""
    if x is None:
        return None
    x = x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)
    return x.flatten(0, 1)


@overload
def fold_heads(x: Tensor, dim: int | None, size: int, heads_dim: int) -> Tensor: ...
@overload
def fold_heads(x: Tensor | None, dim: int | None, size: int, heads_dim: int) -> Tensor | None: ...
def fold_heads(x: Tensor | None, dim: int | None, size: int, heads_dim: int) -> Tensor | None:
    """The same with heads, at heads_dim from the end (-1, -2, ...), in the place of the batch."""
    if x is None:
        return None
    x = x.unsqueeze(0).expand(size, *x.shape) if dim is None else x.movedim(dim, 0)
    return x.movedim(0, heads_dim - 1).flatten(heads_dim - 1, heads_dim)


def fold_slopes(
    slopes: Tensor | None, dim: int | None, size: int, batch: int | None
) -> Tensor | None:
    """ALiBi's slopes; batch: None where the heads are folded."""
    if slopes is None or (batch is not None and dim is None and slopes.dim() == 1):
        return slopes
    if batch is None:
        return fold_heads(slopes, dim, size, -1)
    if slopes.dim() - (dim is not None) == 1:  # one for all entries of the batch
        slopes = slopes.movedim(dim or 0, 0).unsqueeze(1).expand(size, batch, -1)
        dim = 0
    return fold_batch(slopes, dim, size)


def unfold_heads(x: Tensor, size: int, heads_dim: int) -> tuple[Tensor, int]:
    """The inverse of fold_heads: x and the dimension that is vmap's."""
    x = x.unflatten(heads_dim, (size, -1))
    return x, x.dim() + heads_dim - 1


def loop(
    apply: Apply, size: int, dims: Dims, arguments: Sequence[Any]
) -> tuple[tuple[Tensor, ...], int]:
    """One example after the other, for what cannot be folded."""
    results = []
    for i in range(size):
        one = [x if dim is None else x.select(dim, i) for x, dim in zip(arguments, dims)]
        results.append(apply(*one))
    return tuple(torch.stack(outputs) for outputs in zip(*results)), 0
