"""Derivatives of the operators themselves, for whoever calls them without ``_autograd``'s functions.

torch.compile of a torch.func transform does: it traces past an autograd.Function and comes to the
operators.  So does code that calls torch.ops.flash_attn._flash_attn_forward on tensors that require
gradients.  They get the derivatives and vmap's rules of the public functions; a second derivative,
forward mode, and a derivative of softcap are errors.

The kernels below are registered for autograd's dispatch key.  torch.library.register_autograd would
do less: what it makes cannot be used inside of torch.func's transforms.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch
from torch._functorch.pyfunctorch import VmapInterpreter, retrieve_current_functorch_interpreter
from torch._functorch.utils import enable_single_level_autograd_function
from torch._ops import OpOverload

from flash_attn import _autograd, _ops, _transforms, _vmap
from flash_attn._vmap import Statics

# The tensors of a call in the order of ``FlashAttention`` and of ``FlashAttentionGradients``.
_FORWARD_TENSORS = (
    *("q", "k", "v", "softmax_scale_tensor", "softcap_tensor", "alibi_slopes", "rng_state"),
    *("cu_seqlens_q", "cu_seqlens_k", "block_table"),
)
_BACKWARD_TENSORS = (
    *("dout", "dlse", "q", "k", "v", "out", "softmax_lse", "softmax_scale_tensor"),
    *("softcap_tensor", "alibi_slopes", "rng_state", "cu_seqlens_q", "cu_seqlens_k"),
)
_WITHOUT_GRADIENT = "leftpad_k", "seqused_k"

_library = torch.library.Library("flash_attn", "IMPL")


class _Call:
    """An operator's arguments by name, with defaults for those that are left out."""

    def __init__(self, op: OpOverload, values: tuple) -> None:
        arguments = op._schema.arguments
        rest = tuple(a.default_value for a in arguments[len(values) :])
        self.given = {a.name: value for a, value in zip(arguments, (*values, *rest))}

    def values(self, names: tuple[str, ...]) -> tuple:
        return tuple(self.given.get(name) for name in names)

    @property
    def draws(self) -> bool:
        """Whether it is a forward pass that draws a random state."""
        return self.given["dropout_p"] > 0 and self.given["rng_state"] is None

    @property
    def without_gradient(self) -> str | None:
        """An argument with which the operator has no gradient."""
        given = (name for name in _WITHOUT_GRADIENT if self.given.get(name) is not None)
        return next(given, None)

    @property
    def statics(self) -> tuple:
        score = self.values(
            ("softmax_scale", "causal", "window_size_left", "window_size_right", "softcap")
        )
        return tuple(
            Statics(
                *(score, self.given["dropout_p"], self.given["deterministic"]),
                bool(self.given.get("return_softmax")),
                *self.values(("max_seqlen_q", "max_seqlen_k")),
            )
        )


class _NoGradient(torch.autograd.Function):
    """An operator whose results pass no gradient: whoever asks for one is told so."""

    @staticmethod
    def forward(op, reason, *values):
        return op(*values)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.reason = inputs[1]

    @staticmethod
    def backward(ctx, *grads):
        raise RuntimeError(ctx.reason)


class _OneLevel(torch.autograd.function._SingleLevelFunction):
    """``FlashAttention`` inside of the dispatcher, which has come to one of torch.func's transforms."""

    @staticmethod
    def forward(*arguments):
        with torch._C._AutoDispatchBelowAutograd():
            return _autograd.call_forward(*arguments)

    setup_context = staticmethod(_autograd.FlashAttention.setup_context)

    @staticmethod
    def backward(ctx, dout, dlse, _dprobabilities, _drng_state):
        # torch.compile may be running this, but is not tracing it.
        return _autograd.backward_of(ctx, dout, dlse, _autograd.FlashAttentionGradients.apply)

    @staticmethod
    def jvp(ctx, *tangents):
        _transforms.raise_no_forward_mode("flash_attn")


def _forward(op: OpOverload, values: tuple) -> tuple[Tensor, ...]:
    """The results with gradients."""
    call = _Call(op, values)
    if call.without_gradient is not None:
        reason = f"{op._schema.name} has no gradients with {call.without_gradient}"
        return _NoGradient.apply(op, reason, *values)
    if _transforms.asks_for_gradient(call.given["softcap_tensor"]):
        raise RuntimeError(f"{op._schema.name}: softcap_tensor has no gradient; detach() it")
    arguments = (*call.values(_FORWARD_TENSORS), call.statics)
    _autograd.refuse_gradient_of_own_head_dim(op._schema.name, *arguments[:4])
    if not _transforms.are_active():
        return _autograd.FlashAttention.apply(*arguments)
    with enable_single_level_autograd_function():
        return _OneLevel.apply(*arguments)  # type: ignore[attr-defined]  # of a base in C


class _OneLevelNoGradient(torch.autograd.function._SingleLevelFunction):
    """``_NoGradient`` inside of the dispatcher, which has come to one of torch.func's transforms."""

    @staticmethod
    def forward(op, reason, *values):
        with torch._C._AutoDispatchBelowAutograd():
            return op(*values)

    setup_context = staticmethod(_NoGradient.setup_context)
    backward = staticmethod(_NoGradient.backward)


def _backward(op: OpOverload, values: tuple) -> tuple[Tensor, ...]:
    if not _transforms.are_active():
        return _NoGradient.apply(op, _autograd.ONCE, *values)
    with enable_single_level_autograd_function():
        return _OneLevelNoGradient.apply(op, _autograd.ONCE, *values)  # type: ignore[attr-defined]


def _forward_rule(op: OpOverload, info: Any, in_dims: tuple, values: tuple) -> tuple:
    call, dims = _Call(op, values), _Call(op, in_dims)
    if call.draws and info.randomness == "error":
        _transforms.raise_no_randomness(op._schema.name)
    if call.without_gradient is not None:
        raise NotImplementedError(f"{op._schema.name}: no vmap with {call.without_gradient}")
    arguments = (*call.values(_FORWARD_TENSORS), call.statics)
    return _vmap.forward_rule(
        _autograd.call_forward, info, (*dims.values(_FORWARD_TENSORS), None), arguments
    )


def _backward_rule(op: OpOverload, info: Any, in_dims: tuple, values: tuple) -> tuple:
    call, dims = _Call(op, values), _Call(op, in_dims)
    arguments = (*call.values(_BACKWARD_TENSORS), call.statics)

    def apply(*arguments: Any) -> tuple[Tensor, ...]:
        dout, dlse, q, k, v, out, lse, scale, softcap, slopes, state, cu_q, cu_k, statics = (
            arguments
        )
        score, dropout_p, deterministic, _, *longest = statics
        lengths = () if cu_q is None else (cu_q, cu_k, *longest)
        options = dropout_p, *score, slopes, deterministic, state, dlse, scale, softcap
        return op(dout, q, k, v, out, lse, *lengths, *options)

    return _vmap.backward_rule(apply, info, (*dims.values(_BACKWARD_TENSORS), None), arguments)


def _register(op: OpOverload, record: Callable, rule: Callable) -> None:
    def kernel(*values: Any) -> Any:
        tensors = [x for x in values if isinstance(x, Tensor)]
        if torch._C._is_fwd_grad_enabled() and _transforms.are_active():
            _transforms.refuse_tangents_now(op._schema.name, *tensors)
        else:
            _transforms.refuse_tangents(op._schema.name, *tensors)
        if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
            return record(op, values)
        with torch._C._AutoDispatchBelowAutograd():
            return op(*values)

    name = op._schema.name.removeprefix("flash_attn::")
    overload = op._schema.overload_name
    _library.impl(f"{name}.{overload}" if overload else name, kernel, "Autograd")
    torch.library.register_vmap(
        op, lambda info, in_dims, *values: rule(op, info, in_dims, values), lib=_library
    )


_VMAP_MODE = torch._C.DispatchKeySet(torch._C.DispatchKey.FuncTorchVmapMode)


def _draw_as_vmap_says(op: OpOverload, values: tuple) -> tuple:
    """values; where vmap maps none of them, but masks are to differ, q gets vmap's dimension."""
    vmap, name = retrieve_current_functorch_interpreter(), op._schema.name
    assert isinstance(vmap, VmapInterpreter)
    is_mapped = any(
        isinstance(x, Tensor)
        and _functorch.is_batchedtensor(x)
        and _functorch.maybe_get_level(x) == vmap.level()
        for x in values
    )
    if is_mapped or vmap.randomness() == "same":
        return values
    if vmap.randomness() == "error":
        _transforms.raise_no_randomness(name)
    q, *others = values
    q = q.expand(vmap.batch_size(), *q.shape)
    return _functorch._add_batch_dim(q, 0, vmap.level()), *others


def _register_randomness(op: OpOverload) -> None:
    """Where vmap maps none of an operator's tensors, it does not ask the rule that is registered."""

    def kernel(*values: Any) -> Any:
        if _Call(op, values).draws:
            values = _draw_as_vmap_says(op, values)
        with torch._C._ExcludeDispatchKeyGuard(_VMAP_MODE):
            return op(*values)

    _library.impl(op._schema.name.removeprefix("flash_attn::"), kernel, "FuncTorchVmapMode")


for _op in (_ops.forward, _ops.varlen_forward):
    _register(_op, _forward, _forward_rule)
    _register_randomness(_op)
for _op in (_ops.backward_functional, _ops.varlen_backward_functional):
    _register(_op, _backward, _backward_rule)
