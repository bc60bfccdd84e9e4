"""Rotary position embedding: the public functions of ``layers.rotary``.

``ops.triton.rotary`` does the rotations, ``_rotary_autograd`` gives them derivatives.
"""

import torch
from torch import Tensor

from flash_attn import _transforms
from flash_attn._overlap import check_not_overlapping_itself
from flash_attn.layers._rotary_autograd import check_tables, packed_rotary_function, rotary_function

__all__ = [
    "ApplyRotaryEmb",
    "apply_rotary_emb",
    "apply_rotary_emb_func",
    "apply_rotary_emb_kv_",
    "apply_rotary_emb_qkv_",
    "apply_rotary_emb_torch",
    "rotate_half",
]


def rotate_half(x: Tensor, interleaved: bool = False) -> Tensor:
    """Each pair (a, b) of the last dimension turned by a quarter: (-b, a).

    Pairs are x[..., i] and x[..., i + n / 2], or with ``interleaved`` x[..., 2 i] and
    x[..., 2 i + 1], n being the (even) size of the last dimension.
    """
    if interleaved:
        return torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)
    a, b = x.chunk(2, dim=-1)
    return torch.cat((-b, a), dim=-1)


def apply_rotary_emb_torch(
    x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False
) -> Tensor:
    """``apply_rotary_emb`` in plain torch operations, differentiable in everything.

    Args:
        x: (batch, seqlen, heads, head_dim).
        cos, sin: (seqlen, rotary_dim / 2), or (batch, seqlen, rotary_dim / 2) with angles of their
            own for every batch entry; rotary_dim is at most head_dim.
        interleaved: as in ``rotate_half``.

    Returns:
        x's shape, in the dtype that x and the tables promote to.
    """
    rotary_dim = 2 * cos.shape[-1]
    if rotary_dim > x.shape[-1]:
        raise RuntimeError(
            f"cos: rotary_dim must be at most x's head_dim; got {rotary_dim} > {x.shape[-1]}"
        )

    def spread(table: Tensor) -> Tensor:  # (..., seqlen, 1, rotary_dim)
        both = table.repeat_interleave(2, -1) if interleaved else torch.cat((table, table), -1)
        return both.unsqueeze(-2)

    rotated, rest = x[..., :rotary_dim], x[..., rotary_dim:]
    rotated = rotated * spread(cos) + rotate_half(rotated, interleaved) * spread(sin)
    return torch.cat((rotated, rest), dim=-1)


def apply_rotary_emb(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool = False,
    inplace: bool = False,
    seqlen_offsets: int | Tensor = 0,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
) -> Tensor:
    """Rotates the first rotary_dim dimensions of every head by angles that grow with the position.

    Args:
        x: (batch, seqlen, heads, head_dim), or with cu_seqlens (total, heads, head_dim); any
            floating dtype and strides.
        cos, sin: (seqlen_rotary, rotary_dim / 2) with rotary_dim at most head_dim: row p belongs to
            position p.  They get no gradient: tables that require one are an error, where autograd
            is on.  ``apply_rotary_emb_torch`` gives them one.
        interleaved: the pairs are neighbours rather than half of rotary_dim apart: ``rotate_half``.
        inplace: change x and return it; x must not overlap itself in memory.
        seqlen_offsets: the position of each sequence's first token: one for all, or (batch,), int32
            or int64.
        cu_seqlens: (batch + 1,), int32: where each sequence begins in a ragged x.
        max_seqlen: length of the longest sequence of a ragged x.

    Returns:
        x's shape and dtype.  It has derivatives in x of any order, forward and backward, and under
        the transforms of torch.func.

    Raises:
        RuntimeError: a wrong shape, dtype or device, or a position beyond the tables: see
            ``ops.triton.rotary.apply_rotary``; a derivative with respect to cos or sin.
    """
    _transforms.refuse_compiled("apply_rotary_emb")
    check_tables("apply_rotary_emb", cos, sin)
    if inplace:
        check_not_overlapping_itself("x", x)
    copies = inplace and torch.compiler.is_compiling()  # it cannot trace what writes to its input
    out = rotary_function().apply(
        *(x, cos, sin, interleaved, inplace and not copies),
        *(seqlen_offsets, cu_seqlens, max_seqlen, False),
    )
    return x.copy_(out) if copies else out


apply_rotary_emb_func = apply_rotary_emb


class ApplyRotaryEmb:
    """``apply``: apply_rotary_emb, by position: upstream's autograd Function, for its callers."""

    apply = staticmethod(apply_rotary_emb)


def apply_rotary_emb_qkv_(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    cos_k: Tensor | None = None,
    sin_k: Tensor | None = None,
    interleaved: bool = False,
    seqlen_offsets: int | Tensor = 0,
    num_heads_q: int | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
) -> Tensor:
    """Rotates queries and keys of one packed tensor, in place.

    Args:
        qkv: (batch, seqlen, 3, heads, head_dim), or (batch, seqlen, num_heads_q + 2 * num_heads_k,
            head_dim): the heads of queries, of keys, of values.  With cu_seqlens total takes the
            place of batch, seqlen.  It must not overlap itself in memory.
        cos, sin: (seqlen_rotary, rotary_dim / 2), of queries and keys.
        cos_k, sin_k: the keys' own, such as those of xPos.
        num_heads_q: wanted for the second form of qkv, and only for it.

    The other arguments are those of ``apply_rotary_emb``.

    Returns:
        qkv.

    Raises:
        RuntimeError: as ``apply_rotary_emb``.
    """
    _transforms.refuse_compiled("apply_rotary_emb_qkv_")
    rows = "batch, seqlen" if cu_seqlens is None else "total"
    dims = qkv.dim() + (cu_seqlens is not None)
    if dims not in (4, 5) or (dims == 5 and qkv.shape[-3] != 3):
        raise RuntimeError(
            f"qkv must have shape ({rows}, 3, heads, head_dim) or ({rows}, num_heads_q +"
            f" 2 * num_heads_k, head_dim); got {tuple(qkv.shape)}"
        )
    if dims == 5:
        num_heads_q = None
    elif num_heads_q is None:
        raise RuntimeError(
            f"num_heads_q must be given for qkv ({rows}, heads, head_dim); got {tuple(qkv.shape)}"
        )
    elif not 0 < num_heads_q < qkv.shape[-2] or (qkv.shape[-2] - num_heads_q) % 2:
        raise RuntimeError(
            "qkv must have num_heads_q + 2 * num_heads_k heads; got"
            f" {qkv.shape[-2]} heads, num_heads_q = {num_heads_q}"
        )
    check_not_overlapping_itself("qkv", qkv)
    options = seqlen_offsets, cu_seqlens, max_seqlen, interleaved
    return _rotate_packed(
        "apply_rotary_emb_qkv_", qkv, (cos, sin, cos_k, sin_k), num_heads_q, options
    )


def apply_rotary_emb_kv_(
    kv: Tensor,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool = False,
    seqlen_offsets: int | Tensor = 0,
    *,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
) -> Tensor:
    """Rotates the keys of one packed tensor, in place.

    Args:
        kv: (batch, seqlen, 2, heads, head_dim), with cu_seqlens (total, 2, heads, head_dim): keys,
            then values.  It must not overlap itself in memory.
        cos, sin: (seqlen_rotary, rotary_dim / 2).

    The other arguments are those of ``apply_rotary_emb``.

    Returns:
        kv.

    Raises:
        RuntimeError: as ``apply_rotary_emb``.
    """
    _transforms.refuse_compiled("apply_rotary_emb_kv_")
    rows = "batch, seqlen" if cu_seqlens is None else "total"
    if kv.dim() + (cu_seqlens is not None) != 5 or kv.shape[-3] != 2:
        raise RuntimeError(
            f"kv must have shape ({rows}, 2, heads, head_dim); got {tuple(kv.shape)}"
        )
    check_not_overlapping_itself("kv", kv)
    options = seqlen_offsets, cu_seqlens, max_seqlen, interleaved
    return _rotate_packed("apply_rotary_emb_kv_", kv, (cos, sin, None, None), None, options)


def _rotate_packed(
    function: str, packed: Tensor, tables: tuple, num_heads_q: int | None, options: tuple
) -> Tensor:
    """Rotates packed in place, for the function of this name."""
    check_tables(function, *tables)
    copies = torch.compiler.is_compiling()  # it cannot trace what writes to its input
    out = packed_rotary_function().apply(packed, *tables, num_heads_q, not copies, *options, False)
    return packed.copy_(out) if copies else out
