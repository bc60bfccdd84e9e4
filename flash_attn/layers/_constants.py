"""Tensors of a module that follow from its arguments.

Used by ``layers.rotary`` and ``modules.attention``.  A buffer with such values is lost where a
module is cast, or made on the meta device and filled later.  Here they are attributes: nothing but
their owner writes them.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from flash_attn._modes import has_values, in_fake_mode, in_mode

__all__ = ["ConstantsModule"]


class ConstantsModule(nn.Module):
    """A module whose constants keep dtype and values, and follow the module's device.

    A subclass names them in ``_constants`` and computes them in ``_compute_constant``.  Constant
    ``name`` is in the attribute ``_name``; a property of the subclass shows it.  Its owner may edit or
    assign it; on the meta device such values are lost.
    """

    _constants: tuple[str, ...] = ()

    def _compute_constant(self, name: str, device: torch.device | str | None) -> Tensor | None:
        """The constant by the module's arguments, fp32; None where the arguments want none."""
        raise NotImplementedError

    def _constant(self, name: str, device: torch.device | None = None) -> Tensor | None:
        """The constant on device, by default the module's, as the present mode can use it."""
        value = getattr(self, f"_{name}")
        if value is None:
            return None
        target = value.device if device is None else device
        needs_values = not has_values(value) and target.type != "meta"
        if in_mode():
            if in_fake_mode() or (needs_values and value.is_meta):
                return self._compute_constant(name, target)
        elif needs_values:
            value = self._renew_constant(name, target)
        return value.to(target)

    def _set_constant(self, name: str, value: Tensor | None) -> None:
        """The owner's own value."""
        if value is not None:
            if value.requires_grad:
                raise RuntimeError(f"{name} gets no gradient; assign {name}.detach()")
            value = value.detach().to(torch.float32)
        setattr(self, f"_{name}", value)

    def _renew_constant(self, name: str, device: torch.device | str | None = None) -> Tensor | None:
        """Computes the constant; it is an ordinary tensor even under inference_mode."""
        with torch.inference_mode(False), torch.no_grad():
            value = self._compute_constant(name, device)
        setattr(self, f"_{name}", value)
        return value

    def reset_parameters(self) -> None:
        """Computes the constants again, where they are: parameters are those of submodules.

        FSDP calls this after it gave a module memory.
        """
        for name in self._constants:
            value = getattr(self, f"_{name}")
            self._renew_constant(name, None if value is None else value.device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "ConstantsModule":
        super()._apply(fn, recurse)
        for name in self._constants:
            value = getattr(self, f"_{name}")
            if value is None:
                continue
            moved = _moved(value, fn)
            if moved is value:
                continue
            if has_values(value):
                setattr(self, f"_{name}", value.to(moved.device))
            else:
                self._renew_constant(name, moved.device)
        return self


def _moved(value: Tensor, fn: Callable[[Tensor], Tensor]) -> Tensor:
    """fn of value; its device counts, and where value has no values to copy, only that."""
    try:
        return fn(value)
    except NotImplementedError:
        return fn(torch.empty_like(value, device="cpu"))
