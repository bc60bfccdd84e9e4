"""Modes of torch in which a tensor belongs to what runs now, and must not be kept for later calls.

Used by ``layers`` and ``modules``, whose modules keep tensors that follow from their arguments.
"""

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor
from torch._guards import detect_fake_mode
from torch._ops import _len_torch_dispatch_stack_pre_dispatch
from torch._subclasses.fake_tensor import FakeTensor

__all__ = ["has_values", "in_fake_mode", "in_mode", "is_capturing"]


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
