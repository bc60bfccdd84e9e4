"""Modes of torch in which a tensor belongs to what runs now, and must not be kept for later calls.

Used by ``layers`` and ``modules``, whose modules keep tensors that follow from their arguments, and by
``ops.triton``, whose kernels only torch.compile can trace.
"""

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor, is_legacy_batchedtensor
from torch._guards import detect_fake_mode
from torch._ops import _len_torch_dispatch_stack_pre_dispatch
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode

__all__ = ["can_launch_on", "has_values", "in_fake_mode", "in_mode", "is_capturing"]


def in_mode() -> bool:
    """Whether torch traces, transforms, fakes or records what is computed now."""
    return (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack() > 0
        or _len_torch_dispatch_stack_pre_dispatch() > 0
    )


def in_fake_mode() -> bool:
    """Whether new tensors have shapes only.  Under torch.compile and torch.export: False, as
    these turn the tensors that a module holds into fake ones themselves."""
    return not torch.compiler.is_compiling() and detect_fake_mode() is not None


def is_capturing(device: torch.device) -> bool:
    """Whether a CUDA graph records what is launched on the current stream."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def has_values(tensor: Tensor) -> bool:
    """Whether tensor is more than a shape, and its values are its own rather than a transform's."""
    if tensor.is_meta:
        return False
    return torch.compiler.is_compiling() or not (
        isinstance(tensor, FakeTensor) or is_functorch_wrapped_tensor(tensor)
    )


def can_launch_on(x: Tensor) -> bool:
    """Whether a Triton kernel may be given x: it has memory of its own, and no graph is traced that
    would miss the launch.  Under torch.compile: True, as the kernel becomes part of its graph."""
    if torch.compiler.is_dynamo_compiling():
        return True
    if type(x) not in (Tensor, torch.nn.Parameter) or is_functorch_wrapped_tensor(x):
        return False
    # Mapped gradients in torch.autograd.grad(is_grads_batched=True) are of a kind of their own.
    return not is_legacy_batchedtensor(x) and get_proxy_mode() is None
