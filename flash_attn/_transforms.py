"""Which transforms of torch.func are active, and what they may ask for.

Used by ``_autograd``, ``_merge`` and ``_decode``.  Under ``torch.func`` a tensor may wrap another one
for each transform; whether somebody wants its gradient is then not said by ``requires_grad`` of the
outermost.
"""

import torch
from torch import Tensor
from torch._C import _functorch
from torch._functorch.pyfunctorch import VmapInterpreter, retrieve_all_functorch_interpreters


def are_active() -> bool:
    """Whether a transform of torch.func is at work, also while torch.compile traces or runs."""
    return torch._C._are_functorch_transforms_active()


def refuse_compiled(function: str) -> None:
    """Raises where torch.compile traces function inside of a transform of torch.func.

    The compiled function would lose the derivative.  Without ``fullgraph`` torch.compile takes the error
    as a reason to run that part uncompiled, where it is right.
    """
    if torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        raise RuntimeError(
            f"{function} inside of torch.func's transforms (grad, vmap, jvp, ...) cannot be compiled as"
            " one graph: apply the transform outside of torch.compile, or compile without fullgraph"
        )


def are_active_or_wrap(x: Tensor) -> bool:
    """Whether a transform is active, or has wrapped x: torch.func.vjp's function runs after it."""
    return are_active() or _functorch.is_functorch_wrapped_tensor(x)


def asks_for_gradient(*tensors: Tensor | None) -> bool:
    """Whether any of the tensors, or what a transform wrapped in it, requires a gradient.

    While torch.compile traces, only the tensors themselves are looked at.
    """
    for x in tensors:
        while x is not None:
            if x.requires_grad:
                return True
            if torch.compiler.is_compiling() or not _functorch.is_functorch_wrapped_tensor(x):
                break
            x = _functorch.get_unwrapped(x)
    return False


def refuse_gradient(function: str, *tensors: Tensor | None) -> None:
    """Raises where a transform of torch.func wants a gradient that function does not have.

    While torch.compile traces, ``refuse_compiled`` takes its place.
    """
    if not torch.compiler.is_compiling() and are_active() and asks_for_gradient(*tensors):
        names = ", ".join(t.key().name.lower() for t in retrieve_all_functorch_interpreters())
        raise RuntimeError(
            f"{function} has no gradient, but torch.func's transforms ({names}) ask for one: call it"
            " on detached tensors, or outside of the transform"
        )


def refuse_tangents(function: str, *tensors: Tensor | None) -> None:
    """Raises for a tensor with a tangent of forward-mode differentiation; not while torch.compile traces."""
    if not torch.compiler.is_compiling() and torch.autograd.forward_ad._current_level >= 0:
        refuse_tangents_now(function, *tensors)


def refuse_tangents_now(function: str, *tensors: Tensor | None) -> None:
    """The same, whatever torch.compile does."""
    for x in tensors:
        while x is not None and _functorch.is_batchedtensor(x):
            x = _functorch.get_unwrapped(x)
        if (
            x is not None and torch._VF._unpack_dual(x, level=0)[1] is not None
        ):  # there is one level
            raise_no_forward_mode(function)


def raise_no_forward_mode(function: str) -> None:
    raise NotImplementedError(
        f"{function} has no forward-mode derivative, as torch.func.jvp, jacfwd, hessian and"
        " torch.autograd.forward_ad demand: use reverse mode (torch.func.vjp, jacrev, grad)"
    )


def raise_no_randomness(function: str) -> None:
    raise RuntimeError(
        f"{function}: dropout_p > 0 draws random numbers, which vmap refuses with"
        ' randomness="error" (the default): call vmap with randomness="same" for one mask, or'
        ' with "different" for a mask of its own for each example'
    )


def with_randomness(function: str, x: Tensor) -> Tensor:
    """x, ready for dropout as vmap's ``randomness`` says.

    Raises under "error".  Under "different" x gets the dimension of every vmap, whether it varied
    along it or not, so that each of them draws weights of its own.
    """
    kinds = [
        t.randomness()
        for t in retrieve_all_functorch_interpreters()
        if isinstance(t, VmapInterpreter)
    ]
    if "error" in kinds:
        raise_no_randomness(function)
    if "different" in kinds:
        return x + 0 * torch.rand((), dtype=x.dtype, device=x.device)
    return x
