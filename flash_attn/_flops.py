"""How many operations attention takes, for ``torch.utils.flop_counter.FlopCounterMode``.

A pair of a query and a key that it sees costs ``4 * head_dim`` operations for each query head forward
(the products Q K^T and P V) and 2.5 times that backward.  Where v has a head_dim of its own, head_dim_v,
these are ``2 * (head_dim + head_dim_v)``, and backward ``2 * (3 * head_dim + 2 * head_dim_v)``.  Pairs
that a mask hides are not counted, whatever a kernel computes of them.  Neither are softmax, rotary
embedding, ``S_dmask`` and ``merge_states``: torch counts products only.

Importing this file registers the formulas.
"""

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from flash_attn import _ops  # noqa: F401  (defines the operators)

OPERATORS = (
    "_flash_attn_forward",
    "_flash_attn_varlen_forward",
    "_flash_attn_backward",
    "_flash_attn_varlen_backward",
    "_flash_attn_kvcache",
)


def visible_pairs(
    seqlen_q: int, seqlen_k: int, causal: bool, window_left: int, window_right: int
) -> int:
    """How many pairs of a query and a key a mask lets through.

    Query i sees key j if i + shift - window_left <= j <= i + shift + window_right, with
    shift = seqlen_k - seqlen_q; a negative number is no limit, and causal makes window_right 0.
    """
    seqlen_q, seqlen_k = max(0, seqlen_q), max(0, seqlen_k)
    shift = seqlen_k - seqlen_q
    right = 0 if causal else window_right
    ends = seqlen_q * seqlen_k if right < 0 else _clamped(shift + right + 1, seqlen_q, seqlen_k)
    begins = 0 if window_left < 0 else _clamped(shift - window_left, seqlen_q, seqlen_k)
    return ends - begins


def _clamped(first: int, count: int, limit: int) -> int:
    """The sum of first, first + 1, ... (count numbers), each brought into 0 to limit."""

    def below(end: int) -> int:  # the sum of min(x, limit) for x in 0 to end, exclusive
        end = max(0, end)
        rising = min(end, limit)
        return rising * (rising - 1) // 2 + (end - rising) * limit

    return below(first + count) - below(first)


# --- The sequences of a call ----------------------------------------------------------------------
#
# ``arguments`` are those of an operator (``_ops``) by name, with the defaults of its schema.


def attention_flops(arguments: dict[str, Any]) -> int:
    """Operations of one call of an operator."""
    q = arguments["q"]
    left, right = arguments["window_size_left"], arguments["window_size_right"]
    mask = arguments["causal"], left, right
    if "k_cache" in arguments:
        pairs = sum(visible_pairs(*lengths, *mask) for lengths in cache_lengths(arguments))
    elif "cu_seqlens_q" in arguments:
        pairs = sum(visible_pairs(*lengths, *mask) for lengths in varlen_lengths(arguments))
    else:
        pairs = q.shape[0] * visible_pairs(q.shape[1], arguments["k"].shape[1], *mask)
    of_qk, of_v = (3, 2) if "dout" in arguments else (1, 1)  # products of each width
    head_dim = q.shape[-1]
    head_dim_v = arguments["v"].shape[-1] if arguments.get("v") is not None else head_dim
    return 2 * pairs * q.shape[-2] * (of_qk * head_dim + of_v * head_dim_v)


def varlen_lengths(arguments: dict[str, Any]) -> Iterator[tuple[int, int]]:
    """(seqlen_q, seqlen_k) of every sequence.

    Where the lengths cannot be read, as under FakeTensorMode, each is taken to be the longest: that
    is an upper bound.
    """
    cu_seqlens_q = arguments["cu_seqlens_q"]
    batch = cu_seqlens_q.shape[0] - 1
    seqlens_q = _differences(cu_seqlens_q, arguments["max_seqlen_q"])
    used = arguments.get("seqused_k")
    if used is None:
        seqlens_k = _differences(arguments["cu_seqlens_k"], arguments["max_seqlen_k"])
    else:
        seqlens_k = _values(used) or [arguments["max_seqlen_k"]] * batch
    skipped = _values(arguments.get("leftpad_k")) or [0] * batch
    return ((n, keys - pad) for n, keys, pad in zip(seqlens_q, seqlens_k, skipped))


def cache_lengths(arguments: dict[str, Any]) -> Iterator[tuple[int, int]]:
    """(seqlen_q, seqlen_k) of every sequence, what is appended included, at most the capacity.

    Lengths that cannot be read are taken to be the capacity, and max_seqlen_q: an upper bound.
    """
    q, pages = arguments["q"], arguments["block_table"]
    page_size = arguments["k_cache"].shape[1]
    capacity = page_size if pages is None else pages.shape[1] * page_size
    cu_seqlens_q = arguments["cu_seqlens_q"]
    if cu_seqlens_q is None:
        seqlens_q = [q.shape[1]] * q.shape[0]
    else:
        seqlens_q = _differences(cu_seqlens_q, arguments["max_seqlen_q"])
    batch = len(seqlens_q)
    seqlens = arguments["cache_seqlens"]
    if seqlens is None:
        cached = [arguments["cache_seqlen"]] * batch
    else:
        cached = _values(seqlens) or [capacity] * batch
    new = arguments.get("k")
    if new is None:
        seqlens_new = [0] * batch
    else:
        seqlens_new = seqlens_q if cu_seqlens_q is not None else [new.shape[1]] * batch
    skipped = _values(arguments["cache_leftpad"]) or [0] * batch
    return (
        (n, min(rows + added, capacity) - pad)
        for n, rows, added, pad in zip(seqlens_q, cached, seqlens_new, skipped)
    )


def _values(numbers: Tensor | None) -> list[int] | None:
    """What a tensor holds; None where that cannot be read.  Waits for the device."""
    from torch._subclasses.fake_tensor import FakeTensor
    from torch._subclasses.functional_tensor import FunctionalTensor

    if numbers is None or isinstance(numbers, FakeTensor | FunctionalTensor) or numbers.is_meta:
        return None
    if numbers.is_cuda and torch.cuda.is_current_stream_capturing():
        return None
    return numbers.tolist()


def _differences(cu_seqlens: Tensor, longest: int) -> list[int]:
    ends = _values(cu_seqlens)
    if ends is None:
        return [longest] * (cu_seqlens.shape[0] - 1)
    return [end - begin for begin, end in itertools.pairwise(ends)]


# --- torch's registry -----------------------------------------------------------------------------

_KINDS: dict[str, type | tuple[type, ...]] = {
    "Tensor": Tensor,
    "float": (float, int, torch.SymFloat, torch.SymInt),
    "int": (int, torch.SymInt),
    "SymInt": (int, torch.SymInt),
    "bool": bool,
}


def _takes(kind: torch.Type, value: Any) -> bool:
    """Whether an argument of a schema may have this value."""
    if isinstance(kind, torch.OptionalType):
        return value is None or _takes(kind.getElementType(), value)
    return isinstance(value, _KINDS[str(kind)])


def bind(operator: Any, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments by name, with defaults, of the overload of an operator that takes them."""
    for overload in operator.overloads():
        schema = getattr(operator, overload)._schema.arguments
        names = [argument.name for argument in schema]
        given = dict(zip(names, args)) | kwargs
        given |= {
            argument.name: argument.default_value
            for argument in schema
            if argument.has_default_value() and argument.name not in given
        }
        if len(args) <= len(names) and given.keys() == set(names):
            if all(_takes(argument.type, given[argument.name]) for argument in schema):
                return given
    raise RuntimeError(f"flop counter: no overload of {operator} takes these arguments")


def register(operator: Any) -> None:
    """Gives torch's counter the formula of an operator with all its overloads."""

    @register_flop_formula(operator, get_raw=True)
    def formula(*args: Any, out_val: Any = None, **kwargs: Any) -> int:
        return attention_flops(bind(operator, args, kwargs))


for _name in OPERATORS:
    register(getattr(torch.ops.flash_attn, _name))
