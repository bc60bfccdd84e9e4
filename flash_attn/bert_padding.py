"""Padded batches to ragged ones and back: what the variable-length functions take and return.

A padded batch is (batch, seqlen, ...) with a mask of its tokens; a ragged one holds the tokens alone,
(total, ...), one sequence after the other, with cu_seqlens (batch + 1,) saying where each begins.
Plain torch on every device; the gradients of everything here are exact.
"""

import re
from itertools import chain

import torch
import torch.nn.functional as F
from torch import Tensor

try:
    from einops import rearrange, repeat
except ImportError:
    # Clients import these two names from here.  einops is no requirement of ours, so that without it
    # the following stand in for it.

    def rearrange(tensor: Tensor, pattern: str, **axes_lengths: int) -> Tensor:
        """Reorders, joins and splits the axes of a tensor, as einops.rearrange does."""
        return _rearrange(tensor, pattern, axes_lengths, may_repeat=False)

    def repeat(tensor: Tensor, pattern: str, **axes_lengths: int) -> Tensor:
        """``rearrange`` with new axes, along which the tensor is repeated, as einops.repeat does."""
        return _rearrange(tensor, pattern, axes_lengths, may_repeat=True)


__all__ = [
    "index_first_axis",
    "index_first_axis_residual",
    "index_put_first_axis",
    "pad_input",
    "rearrange",
    "repeat",
    "unpad_input",
    "unpad_input_for_concatenated_sequences",
]


def index_first_axis(x: Tensor, indices: Tensor) -> Tensor:
    """x[indices]: the rows of x that indices names.

    Args:
        x: (rows, ...), any dtype.
        indices: (selected,), int32 or int64, on x's device.  A row may be named more than once.

    Returns:
        (selected, ...).  Each row's gradient is the sum of those of its copies.
    """
    return torch.index_select(x, 0, indices)


def index_put_first_axis(values: Tensor, indices: Tensor, first_axis_dim: int) -> Tensor:
    """Zeros with the rows of values written to the places that indices names.

    Args:
        values: (selected, ...), any dtype.
        indices: (selected,), int32 or int64, on values' device, each place at most once.
        first_axis_dim: number of rows of the result.

    Returns:
        (first_axis_dim, ...).
    """
    result = values.new_zeros((first_axis_dim, *values.shape[1:]))
    return result.index_copy_(0, indices.long(), values)


def index_first_axis_residual(x: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """``index_first_axis`` together with x itself, for a branch that adds to all of x later."""
    return index_first_axis(x, indices), x.view_as(x)


def unpad_input(
    hidden_states: Tensor, attention_mask: Tensor, unused_mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, int, Tensor]:
    """Takes the tokens out of a padded batch.  Waits for the device: their number is its to tell.

    Args:
        hidden_states: (batch, seqlen, ...), any dtype.
        attention_mask: (batch, seqlen), bool or number: nonzero where there is a token.
        unused_mask: (batch, seqlen), likewise: places that are kept but hold no token, such as room
            for tokens to come.

    Returns:
        x: (total, ...): the tokens and the places kept, sequence after sequence.
        indices: (total,), int64: where they stand in hidden_states, flattened to
            (batch * seqlen, ...).
        cu_seqlens: (batch + 1,), int32: where each sequence begins in x, and total.
        max_seqlen: length of the longest, kept places included.
        seqused: (batch,), int32: how many tokens each sequence has.
    """
    used = attention_mask != 0
    kept = used if unused_mask is None else used | (unused_mask != 0)
    indices = kept.flatten().nonzero().flatten()
    cu_seqlens, max_seqlen = _boundaries(kept.sum(-1, dtype=torch.int32))
    x = index_first_axis(hidden_states.flatten(0, 1), indices)
    return x, indices, cu_seqlens, max_seqlen, used.sum(-1, dtype=torch.int32)


def unpad_input_for_concatenated_sequences(
    hidden_states: Tensor, attention_mask_in_length: Tensor
) -> tuple[Tensor, Tensor, Tensor, int]:
    """``unpad_input`` for rows that hold several sequences, one after the other, then padding.

    Args:
        hidden_states: (batch, seqlen, ...), any dtype.
        attention_mask_in_length: (batch, seqlen), integer: the lengths of a row's sequences in
            order, and zeros.  [[2, 3, 0, 0, 0, 0]]: tokens 0 and 1 are a sequence, 2 to 4 another,
            5 is padding.

    Returns:
        x (total, ...), indices (total,) int64, cu_seqlens (sequences + 1,) int32, and max_seqlen, as
        of ``unpad_input``; the sequences of all rows are counted.
    """
    lengths = attention_mask_in_length
    places = torch.arange(lengths.shape[-1], device=lengths.device)
    kept = places < lengths.sum(-1, keepdim=True)
    indices = kept.flatten().nonzero().flatten()
    cu_seqlens, max_seqlen = _boundaries(lengths[lengths != 0])
    return index_first_axis(hidden_states.flatten(0, 1), indices), indices, cu_seqlens, max_seqlen


def pad_input(hidden_states: Tensor, indices: Tensor, batch: int, seqlen: int) -> Tensor:
    """Puts tokens back to their places in a padded batch; the padding is zero.

    Args:
        hidden_states: (total, ...), any dtype.
        indices: (total,), int32 or int64, as from ``unpad_input``.
        batch, seqlen: of the padded batch.

    Returns:
        (batch, seqlen, ...).
    """
    return index_put_first_axis(hidden_states, indices, batch * seqlen).unflatten(
        0, (batch, seqlen)
    )


def _boundaries(seqlens: Tensor) -> tuple[Tensor, int]:
    """cu_seqlens (sequences + 1,), int32, and the largest length."""
    cu_seqlens = F.pad(seqlens.cumsum(0, dtype=torch.int32), (1, 0))
    return cu_seqlens, int(seqlens.max()) if seqlens.numel() else 0


def _rearrange(tensor: Tensor, pattern: str, lengths: dict[str, int], may_repeat: bool) -> Tensor:
    """The patterns of einops: names, (joined axes), ... and 1."""
    left, right = (re.findall(r"\([^()]*\)|[^\s()]+", side) for side in pattern.split("->"))
    more = tensor.dim() - len([word for word in left if word != "..."])
    if left.count("...") > 1 or (more < 0 if "..." in left else more != 0):
        raise ValueError(f"{pattern!r} does not fit a tensor of shape {tuple(tensor.shape)}")
    dots = [f".{i}" for i in range(more)]

    def groups(side: list[str]) -> list[list[str]]:
        axes = []
        for word in side:
            names = re.findall(r"[^\s()]+", word)
            if word == "...":
                axes += [[name] for name in dots]
            else:
                expanded = (dots if name == "..." else [name] for name in names if name != "1")
                axes.append(list(chain.from_iterable(expanded)))
        return axes

    source, target = groups(left), groups(right)
    sizes = dict(lengths)
    for names, size in zip(source, tensor.shape):
        unknown = [name for name in names if name not in sizes]
        known = 1
        for name in names:
            known *= sizes.get(name, 1)
        if len(unknown) > 1 or size % max(known, 1) or (not unknown and known != size):
            raise ValueError(
                f"{pattern!r}: cannot divide an axis of {size} into {names}, {lengths}"
            )
        if unknown:
            sizes[unknown[0]] = size // max(known, 1)

    before, after = list(chain.from_iterable(source)), list(chain.from_iterable(target))
    new = [name for name in after if name not in before]
    if set(before) - set(after) or len(set(after)) != len(after) or (new and not may_repeat):
        raise ValueError(f"{pattern!r}: both sides must name the same axes, each once")
    x = tensor.reshape([sizes[name] for name in before] + [1] * len(new))
    x = x.permute([(before + new).index(name) for name in after])
    x = x.expand([sizes[name] for name in after])
    shape = []
    for names in target:
        shape.append(1)
        for name in names:
            shape[-1] *= sizes[name]
    return x.reshape(shape)
