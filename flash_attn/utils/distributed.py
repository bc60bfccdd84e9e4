"""Collectives with gradients, and what keeps parameters alike in a group of processes.

On torch.distributed, with any backend.  A process_group of None is the default group.  torch.compile
breaks its graph at those with gradients: traced by torch 2.11, their gradients were wrong.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

__all__ = [
    "all_gather",
    "all_gather_raw",
    "all_reduce",
    "all_reduce_raw",
    "allreduce_sequence_parallel_grad",
    "get_dim_for_local_rank",
    "reduce_scatter",
    "reduce_scatter_raw",
    "sync_shared_params",
]


def all_gather_raw(
    input_: Tensor, process_group: dist.ProcessGroup | None, async_op: bool = False
) -> tuple[Tensor, dist.Work | None]:
    """The inputs of all processes, one after the other along the first dimension.  No gradient.

    Args:
        input_: (n, ...), of the same shape and dtype in every process.
        async_op: return at once; what is returned may be read after handle.wait().

    Returns:
        (world_size * n, ...), and the handle, which is None without async_op.
    """
    _check_rows(input_)
    world_size = dist.get_world_size(process_group)
    output = input_.new_empty((world_size * input_.shape[0], *input_.shape[1:]))
    handle = dist.all_gather_into_tensor(
        output, input_.detach().contiguous(), group=process_group, async_op=async_op
    )
    return output, handle


def reduce_scatter_raw(
    input_: Tensor, process_group: dist.ProcessGroup | None, async_op: bool = False
) -> tuple[Tensor, dist.Work | None]:
    """This process's part, along the first dimension, of the sum over all processes.  No gradient.

    Args:
        input_: (world_size * n, ...), of the same shape and dtype in every process.
        async_op: as in ``all_gather_raw``.

    Returns:
        (n, ...), and the handle.

    Raises:
        RuntimeError: the first dimension is no multiple of world_size.
    """
    _check_rows(input_)
    world_size = dist.get_world_size(process_group)
    if input_.shape[0] % world_size:
        raise RuntimeError(
            "input_: the first dimension must be a multiple of the group's size; got"
            f" {tuple(input_.shape)} in a group of {world_size}"
        )
    output = input_.new_empty((input_.shape[0] // world_size, *input_.shape[1:]))
    handle = dist.reduce_scatter_tensor(
        output, input_.detach().contiguous(), group=process_group, async_op=async_op
    )
    return output, handle


def all_reduce_raw(
    input_: Tensor, process_group: dist.ProcessGroup | None, async_op: bool = False
) -> tuple[Tensor, dist.Work | None]:
    """The sum over all processes.  No gradient.

    Args:
        input_: of the same shape and dtype in every process.  It is overwritten with the sum if it
            is contiguous, as upstream's is; ``all_reduce`` leaves it.
        async_op: as in ``all_gather_raw``.

    Returns:
        The sum, and the handle.
    """
    output = input_.detach().contiguous()
    handle = dist.all_reduce(output, group=process_group, async_op=async_op)
    if output.data_ptr() == input_.data_ptr():
        torch.autograd.graph.increment_version(input_)
    return output, handle


@torch.compiler.disable
def all_gather(input_: Tensor, process_group: dist.ProcessGroup | None) -> Tensor:
    """``all_gather_raw`` with a gradient: this process's part of the sum of the outputs' gradients.

    input_ (n, ...) gives (world_size * n, ...).
    """
    return _AllGather.apply(input_, process_group)


@torch.compiler.disable
def reduce_scatter(input_: Tensor, process_group: dist.ProcessGroup | None) -> Tensor:
    """``reduce_scatter_raw`` with a gradient: the outputs' gradients, one after the other.

    input_ (world_size * n, ...) gives (n, ...).
    """
    return _ReduceScatter.apply(input_, process_group)


@torch.compiler.disable
def all_reduce(input_: Tensor, process_group: dist.ProcessGroup | None) -> Tensor:
    """The sum over all processes, with the gradient that arrives here as that of the input.

    That is right where every process goes on with the sum in the same way, as tensor parallelism
    does, so that the gradients that arrive are equal: they are not summed.  input_ stays as it is.
    """
    return _AllReduce.apply(input_, process_group)


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(input_, process_group):
        return all_gather_raw(input_, process_group)[0]

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, ctx.process_group = inputs

    @staticmethod
    def backward(ctx, grad):
        return _ReduceScatter.apply(grad, ctx.process_group), None


class _ReduceScatter(torch.autograd.Function):
    @staticmethod
    def forward(input_, process_group):
        return reduce_scatter_raw(input_, process_group)[0]

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, ctx.process_group = inputs

    @staticmethod
    def backward(ctx, grad):
        return _AllGather.apply(grad, ctx.process_group), None


class _AllReduce(torch.autograd.Function):
    @staticmethod
    def forward(input_, process_group):
        return all_reduce_raw(input_.clone(), process_group)[0]

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, grad):
        return grad, None


def sync_shared_params(model: nn.Module, process_group: dist.ProcessGroup | None) -> None:
    """Gives the parameters marked ``_shared_params = True`` the values of the group's first process.

    They must have the same names in every process of the group.
    """
    source = 0 if process_group is None else dist.get_global_rank(process_group, 0)
    for parameter in _marked(model, "_shared_params"):
        with torch.no_grad():
            dist.broadcast(parameter, src=source, group=process_group)


def allreduce_sequence_parallel_grad(
    model: nn.Module, process_group: dist.ProcessGroup | None
) -> None:
    """Sums the gradients of the parameters marked ``_sequence_parallel = True``, in place.

    Each process has seen a part of the sequence only.  The parameters must have the same names in
    every process of the group, and each a gradient in all of them or in none.
    """
    gradients = [p.grad for p in _marked(model, "_sequence_parallel") if p.grad is not None]
    by_kind: dict[Any, list[Tensor]] = {}
    for gradient in gradients:
        by_kind.setdefault((gradient.dtype, gradient.device), []).append(gradient)
    with torch.no_grad():
        for alike in by_kind.values():
            joined = torch.cat([gradient.flatten() for gradient in alike])
            dist.all_reduce(joined, group=process_group)
            parts = joined.split([gradient.numel() for gradient in alike])
            for gradient, part in zip(alike, parts):
                gradient.copy_(part.view_as(gradient))


def _marked(model: nn.Module, mark: str) -> list[nn.Parameter]:
    """In the order of their names: the same in every process, whatever else each has."""
    named = {name: p for name, p in model.named_parameters() if getattr(p, mark, False)}
    return [named[name] for name in sorted(named)]


def get_dim_for_local_rank(dim: int, world_size: int, local_rank: int, multiple_of: int = 1) -> int:
    """How much of dim is local_rank's, where world_size processes divide it in multiples.

    The multiples that are left over go to the first processes, one each; what is left of dim beyond
    whole multiples goes to none.
    """
    each, left_over = divmod(dim // multiple_of, world_size)
    return (each + (local_rank < left_over)) * multiple_of


def _check_rows(input_: Tensor) -> None:
    if input_.dim() == 0:
        raise RuntimeError("input_ must have at least one dimension; got a 0-dim tensor")
