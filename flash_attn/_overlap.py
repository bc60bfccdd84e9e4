"""Whether tensors that are written to share memory, with themselves or with each other.

Used by ``cpu.register``, for what is appended to a cache or written to given gradients, and by the
rotary embedding on every device; csrc/torch/overlap.h is the same for the CUDA operators.  Views
that take turns in memory, such as ``cache[:, :, 0]`` and ``cache[:, :, 1]``, share none: the answer
is that of the addresses, not of their ranges.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

# Two addresses are equal if a sum of strides, each taken a limited number of times, is a certain
# distance.  A term is such a stride, and how often it may be taken.
Term = tuple[int, int]
# Strides in which one is larger than all smaller ones together need a few steps.  A layout that
# takes more than these counts as overlapping.
MAXIMUM_STEPS = 10_000


def check_not_overlapping_itself(name: str, x: Tensor) -> None:
    """x, an argument that is written to, has an address of its own for every element."""
    if not overlaps_itself(x):
        return
    raise RuntimeError(
        f"{name} is written to and must not overlap itself in memory, as an expanded tensor does;"
        f" got shape {tuple(x.shape)}, strides {x.stride()}"
    )


def check_written(written: dict[str, Tensor], read: dict[str, Tensor] | None = None) -> None:
    """Tensors that are written to overlap neither themselves nor each other, nor those that are read."""
    names = list(written)
    for index, name in enumerate(names):
        check_not_overlapping_itself(name, written[name])
        others = {other: written[other] for other in names[:index]} | (read or {})
        for other, x in others.items():
            if overlap(x, written[name]):
                raise RuntimeError(
                    f"{name} is written to and must not overlap {other} in memory; got shapes"
                    f" {tuple(written[name].shape)} and {tuple(x.shape)}, strides"
                    f" {written[name].stride()} and {x.stride()}"
                )


def overlaps_itself(x: Tensor) -> bool:
    """Whether two elements of x have one address."""
    if x.is_contiguous():
        return False
    sizes_and_strides = [(n, s) for n, s in zip(x.shape, x.stride()) if n != 1]
    if any(n == 0 for n, _ in sizes_and_strides):
        return False
    if any(s == 0 for _, s in sizes_and_strides):
        return True
    if torch.compiler.is_compiling():  # sizes may be symbols, which cannot be sorted
        return False
    dims = sorted(((s, n - 1) for n, s in sizes_and_strides), reverse=True)
    span = 0
    for stride, limit in reversed(dims):
        if stride <= span:
            return _has_equal_addresses(dims)
        span += stride * limit
    return False  # each stride is larger than all smaller ones together


def _has_equal_addresses(dims: Sequence[Term]) -> bool:
    """Whether two elements have one address; dims: stride and size less 1, from the largest on."""
    # Two elements differ first in some dimension; the index of the one is larger there, by 1 at
    # least.  In the dimensions after it they may differ either way.
    for index, (stride, limit) in enumerate(dims):
        others = dims[index + 1 :]
        terms = [(stride, limit - 1), *((s, 2 * most) for s, most in others)]
        if _is_a_sum(terms, sum(s * most for s, most in others) - stride):
            return True
    return False


def overlap(x: Tensor, y: Tensor) -> bool:
    """Whether some byte belongs to both."""
    if x.numel() == 0 or y.numel() == 0:
        return False
    (begin_x, terms_x), (begin_y, terms_y) = _bytes(x), _bytes(y)
    end_x, end_y = begin_x + _largest(terms_x), begin_y + _largest(terms_y)  # the last bytes
    if end_x < begin_y or end_y < begin_x:
        return False
    # An address of x less one of y; the distances within y are counted from its end.
    return _is_a_sum(terms_x + terms_y, end_y - begin_x)


def _bytes(x: Tensor) -> tuple[int, list[Term]]:
    """The address of x, and what leads from there to each of its bytes."""
    size = x.element_size()
    return x.data_ptr(), [*((s * size, n - 1) for n, s in zip(x.shape, x.stride())), (1, size - 1)]


def _largest(terms: Sequence[Term]) -> int:
    return sum(stride * limit for stride, limit in terms)


def _is_a_sum(terms: Sequence[Term], distance: int) -> bool:
    """Whether the distance is a sum of the terms' strides, none of which is negative."""
    merged: dict[int, int] = {}
    for stride, limit in terms:
        if stride * limit > 0:
            merged[stride] = merged.get(stride, 0) + limit
    ordered = sorted(merged.items(), reverse=True)
    steps = MAXIMUM_STEPS

    def reach(index: int, rest: int) -> bool:
        nonlocal steps
        if rest == 0:
            return True
        if rest < 0 or index == len(ordered):
            return False
        steps -= 1
        if steps < 0:
            return True
        stride, limit = ordered[index]
        fewest = max(0, -(-(rest - _largest(ordered[index + 1 :])) // stride))
        most = min(limit, rest // stride)
        return any(reach(index + 1, rest - n * stride) for n in range(most, fewest - 1, -1))

    return reach(0, distance)
