"""Registration of the operators under ``ops``: one implementation for the CPU and CUDA, and errors.

The operators are opaque to torch.compile.  Their gradients are those of the autograd functions that
call them; whoever gets to an operator past these asks for a derivative that it does not have, which is
an error.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from flash_attn.cpu.isolation import isolated


def register(
    name: str,
    schema: str,
    implementation: Callable[..., Any],
    fake: Callable[..., Any],
    vmap: Callable[..., Any] | None = None,
) -> Any:
    """Defines flash_attn::name and returns it.

    Args:
        implementation: for tensors on the CPU and on CUDA.  It does not see the caller's autocast, nor
            on the CPU anything else of what ``isolated`` keeps away.
        fake: allocates the results, from fake inputs.
        vmap: the rule for ``torch.library.register_vmap``; None for an operator that changes its
            arguments, which is not asked for a derivative either.
    """

    def run_on_cuda(*args: Any) -> Any:
        if not torch.is_autocast_enabled("cuda"):
            return implementation(*args)
        with torch.autocast("cuda", enabled=False):
            return implementation(*args)

    def refuse(ctx: Any, *grads: Tensor) -> None:
        raise RuntimeError(
            f"flash_attn::{name} has no derivative of its own: call the function in flash_attn.ops"
            " that calls it, and torch.func's transforms outside of torch.compile"
        )

    full_name = f"flash_attn::{name}"
    torch.library.define(full_name, schema, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.impl(full_name, "cpu", isolated(implementation))
    torch.library.impl(full_name, "cuda", run_on_cuda)
    torch.library.register_fake(full_name, fake)
    if vmap is not None:
        torch.library.register_autograd(full_name, refuse)
        torch.library.register_vmap(full_name, vmap)
    return getattr(torch.ops.flash_attn, name).default


def batch_first(info: Any, in_dims: tuple, args: tuple) -> list[Any]:
    """The arguments of a vmap rule, with each tensor's batch dimension first, expanded if it had none."""
    return [
        arg
        if not isinstance(arg, Tensor)
        else arg.expand(info.batch_size, *arg.shape)
        if dim is None
        else arg.movedim(dim, 0)
        for arg, dim in zip(args, in_dims)
    ]


def vmap_by_loop(operator: Callable[..., tuple[Tensor, ...]]) -> Callable[..., Any]:
    """The vmap rule that calls the operator for every entry and stacks its several results."""

    def rule(info: Any, in_dims: tuple, *args: Any) -> tuple[tuple, tuple]:
        entries = [
            operator(*(x.select(d, i) if isinstance(d, int) else x for x, d in zip(args, in_dims)))
            for i in range(info.batch_size)
        ]
        results = tuple(torch.stack(result) for result in zip(*entries))
        return results, (0,) * len(results)

    return rule


def as_views(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """What an autograd function gets: under torch.compile views of the tensors, else these.

    dynamo refuses a function that gets one tensor twice.  And of a tensor that is an input of its graph
    it does not see that torch.func.grad wants the gradient: that gradient was missing without a word.
    """
    if not torch.compiler.is_compiling():
        return tensors
    return tuple(None if x is None else x.view_as(x) for x in tensors)
