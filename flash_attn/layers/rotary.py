"""Rotary position embedding: functions with gradients, and a module that keeps the tables.

``ops.triton.rotary`` does the rotations; the gradient of a rotation is the rotation the other way.
Gradients are those of the rotated tensors; cos and sin get none.
"""

import torch
from torch import Tensor, nn

from flash_attn._overlap import check_not_overlapping_itself
from flash_attn.ops.triton.rotary import apply_rotary

__all__ = [
    "ApplyRotaryEmb",
    "RotaryEmbedding",
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


class ApplyRotaryEmb(torch.autograd.Function):
    """``apply_rotary`` with a gradient, which has one again."""

    @staticmethod
    def forward(
        ctx,
        x,
        cos,
        sin,
        interleaved=False,
        inplace=False,
        seqlen_offsets=0,
        cu_seqlens=None,
        max_seqlen=None,
        conjugate=False,
    ):
        out = apply_rotary(
            x, cos, sin, seqlen_offsets, cu_seqlens, max_seqlen, interleaved, inplace, conjugate
        )
        if inplace:
            ctx.mark_dirty(x)
        _save_tables(ctx, seqlen_offsets, cos, sin, cu_seqlens)
        ctx.options = interleaved, max_seqlen, conjugate
        return out

    @staticmethod
    def backward(ctx, dout):
        seqlen_offsets, (cos, sin, cu_seqlens) = _saved_tables(ctx)
        interleaved, max_seqlen, conjugate = ctx.options
        dx = ApplyRotaryEmb.apply(
            dout,
            cos,
            sin,
            interleaved,
            False,
            seqlen_offsets,
            cu_seqlens,
            max_seqlen,
            not conjugate,
        )
        return dx, None, None, None, None, None, None, None, None


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
            position p.  They get no gradient; ``apply_rotary_emb_torch`` gives one.
        interleaved: the pairs are neighbours rather than half of rotary_dim apart: ``rotate_half``.
        inplace: change x and return it; x must not overlap itself in memory.
        seqlen_offsets: the position of each sequence's first token: one for all, or (batch,), int32
            or int64.
        cu_seqlens: (batch + 1,), int32: where each sequence begins in a ragged x.
        max_seqlen: length of the longest sequence of a ragged x.

    Returns:
        x's shape and dtype.

    Raises:
        RuntimeError: a wrong shape, dtype or device, or a position beyond the tables: see
            ``ops.triton.rotary.apply_rotary``.
    """
    return ApplyRotaryEmb.apply(
        x, cos, sin, interleaved, inplace, seqlen_offsets, cu_seqlens, max_seqlen
    )


apply_rotary_emb_func = apply_rotary_emb


class _ApplyRotaryPacked(torch.autograd.Function):
    """Rotates the queries and keys of a packed tensor in place.

    packed: (..., 3 or 2, heads, head_dim), or with num_heads_q (..., heads, head_dim).
    """

    @staticmethod
    def forward(
        ctx, packed, cos, sin, cos_k, sin_k, cu_seqlens, num_heads_q, seqlen_offsets, *options
    ):
        interleaved, max_seqlen, conjugate = options
        tables = (cos, sin), (cos if cos_k is None else cos_k, sin if sin_k is None else sin_k)
        joint = cos_k is None and sin_k is None
        for heads, (c, s) in zip(_rotated_heads(packed, num_heads_q, joint), tables):
            apply_rotary(
                heads, c, s, seqlen_offsets, cu_seqlens, max_seqlen, interleaved, True, conjugate
            )
        ctx.mark_dirty(packed)
        _save_tables(ctx, seqlen_offsets, cos, sin, cos_k, sin_k, cu_seqlens)
        ctx.num_heads_q, ctx.options = num_heads_q, options
        return packed

    @staticmethod
    def backward(ctx, dpacked):
        seqlen_offsets, tensors = _saved_tables(ctx)
        interleaved, max_seqlen, conjugate = ctx.options
        # A copy: the gradient that arrives may be somebody else's too.
        grad = dpacked.clone(memory_format=torch.contiguous_format)
        options = interleaved, max_seqlen, not conjugate
        grad = _ApplyRotaryPacked.apply(grad, *tensors, ctx.num_heads_q, seqlen_offsets, *options)
        return grad, *[None] * 10


def _rotated_heads(packed: Tensor, num_heads_q: int | None, joint: bool) -> list[Tensor]:
    """Views (..., n, head_dim) of what is rotated: queries and keys, in one if they can be."""
    if num_heads_q is not None:
        num_heads_k = (packed.shape[-2] - num_heads_q) // 2
        if joint:
            return [packed.narrow(-2, 0, num_heads_q + num_heads_k)]
        return [
            packed.narrow(-2, 0, num_heads_q),
            packed.narrow(-2, num_heads_q, num_heads_k),
        ]
    if packed.shape[-3] == 2:
        return [packed.select(-3, 0)]
    if joint and packed.stride(-3) == packed.shape[-2] * packed.stride(-2):
        return [packed.narrow(-3, 0, 2).flatten(-3, -2)]
    return [packed.select(-3, 0), packed.select(-3, 1)]


def _save_tables(ctx, seqlen_offsets: int | Tensor, *tensors: Tensor | None) -> None:
    """Keeps the offsets and tensors for ``_saved_tables``."""
    ctx.int_offset = None if isinstance(seqlen_offsets, Tensor) else seqlen_offsets
    ctx.save_for_backward(seqlen_offsets if ctx.int_offset is None else None, *tensors)


def _saved_tables(ctx) -> tuple[int | Tensor, list[Tensor | None]]:
    tensor_offsets, *tensors = ctx.saved_tensors
    return tensor_offsets if ctx.int_offset is None else ctx.int_offset, tensors


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
    options = interleaved, max_seqlen, False
    return _ApplyRotaryPacked.apply(
        qkv, cos, sin, cos_k, sin_k, cu_seqlens, num_heads_q, seqlen_offsets, *options
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
    rows = "batch, seqlen" if cu_seqlens is None else "total"
    if kv.dim() + (cu_seqlens is not None) != 5 or kv.shape[-3] != 2:
        raise RuntimeError(
            f"kv must have shape ({rows}, 2, heads, head_dim); got {tuple(kv.shape)}"
        )
    check_not_overlapping_itself("kv", kv)
    options = interleaved, max_seqlen, False
    return _ApplyRotaryPacked.apply(
        kv, cos, sin, None, None, cu_seqlens, None, seqlen_offsets, *options
    )


class RotaryEmbedding(nn.Module):
    """Rotary position embedding of packed queries, keys and values, with the tables it needs.

    The angle of pair i at position p is p * base ** (-2 i / dim).  The tables grow with the longest
    sequence seen and are kept in the dtype of what they rotate.  There is nothing in the state dict.

    Args:
        dim: rotary_dim: how many dimensions of each head are rotated; even.
        base: see above.
        interleaved: pairs are neighbouring dimensions rather than dim / 2 apart.
        scale_base: of xPos (arXiv 2212.10554): queries grow and keys shrink with the position, so
            that their product fades with the distance; 512 is usual.  None: no xPos.
        device: of the buffers.
        pos_idx_in_fp32: compute angles in fp32 even where the module was converted to 16 bits, in
            which positions beyond 256 or 2048 are no longer told apart.
    """

    def __init__(
        self,
        dim: int,
        base: float = 10000.0,
        interleaved: bool = False,
        scale_base: float | None = None,
        device: torch.device | str | None = None,
        *,
        pos_idx_in_fp32: bool = True,
    ) -> None:
        super().__init__()
        if dim <= 0 or dim % 2:
            raise ValueError(f"dim must be even and positive; got {dim}")
        self.dim = dim
        self.base = float(base)
        self.interleaved = interleaved
        self.scale_base = scale_base
        self.pos_idx_in_fp32 = pos_idx_in_fp32
        self.register_buffer("inv_freq", self._compute_inv_freq(device), persistent=False)
        scale = None if scale_base is None else self._compute_scale(device)
        self.register_buffer("scale", scale, persistent=False)
        self._seq_len_cached = 0
        self._cos_cached: Tensor | None = None
        self._sin_cached: Tensor | None = None
        self._cos_k_cached: Tensor | None = None
        self._sin_k_cached: Tensor | None = None

    def _compute_inv_freq(self, device: torch.device | str | None = None) -> Tensor:
        pair = torch.arange(0, self.dim, 2, device=device, dtype=torch.float32)
        return self.base ** (-pair / self.dim)

    def _compute_scale(self, device: torch.device | str | None = None) -> Tensor:
        pair = torch.arange(0, self.dim, 2, device=device, dtype=torch.float32)
        return (pair + 0.4 * self.dim) / (1.4 * self.dim)

    def _update_cos_sin_cache(
        self,
        seqlen: int,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Makes the tables hold at least seqlen positions, on device in dtype."""
        cached = self._cos_cached
        if (
            cached is not None
            and seqlen <= self._seq_len_cached
            and cached.device == device
            and cached.dtype == dtype
            # Autograd cannot keep tensors that were made under inference_mode.
            and (not cached.is_inference() or torch.is_inference_mode_enabled())
        ):
            return
        self._seq_len_cached = seqlen
        inv_freq = self.inv_freq.to(device)
        was_rounded = self.pos_idx_in_fp32 and inv_freq.dtype != torch.float32
        if was_rounded:
            inv_freq = self._compute_inv_freq(device)
        position = torch.arange(seqlen, device=device, dtype=inv_freq.dtype)
        angles = torch.outer(position, inv_freq)
        cos, sin = angles.cos(), angles.sin()
        if self.scale is None:
            self._cos_cached, self._sin_cached = cos.to(dtype), sin.to(dtype)
            return
        # Only differences of positions count; the middle keeps both powers in range.
        power = (position - seqlen // 2) / self.scale_base
        scale = self._compute_scale(device) if was_rounded else self.scale.to(device)
        scale = scale ** power.unsqueeze(-1)
        self._cos_cached, self._sin_cached = (cos * scale).to(dtype), (sin * scale).to(dtype)
        self._cos_k_cached, self._sin_k_cached = (cos / scale).to(dtype), (sin / scale).to(dtype)

    def forward(
        self,
        qkv: Tensor,
        kv: Tensor | None = None,
        seqlen_offset: int | Tensor = 0,
        max_seqlen: int | None = None,
        num_heads_q: int | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        cu_seqlens_k: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Rotates queries and keys, in place.

        Args:
            qkv: (batch, seqlen, 3, heads, head_dim), or (batch, seqlen, num_heads_q +
                2 * num_heads_k, head_dim); with kv the queries alone: (batch, seqlen_q, heads,
                head_dim).  With cu_seqlens total takes the place of batch, seqlen.
            kv: (batch, seqlen_k, 2, heads_k, head_dim), or (total_k, 2, heads_k, head_dim).
            seqlen_offset: position of the first token of each sequence: one for all, or (batch,).
            max_seqlen: positions that the tables must hold.  Default: as many as this call needs,
                for which offsets in a tensor are read: that waits for the device.  With xPos and a
                cache of keys, give the cache's length at every step: its tables depend on it.
            num_heads_q: wanted for the second form of qkv.
            cu_seqlens: (batch + 1,), int32: where each sequence begins in a ragged qkv; then
                max_seqlen must be given.
            cu_seqlens_k: those of kv.  Default: cu_seqlens.

        Returns:
            qkv, or with kv the tuple (queries, kv).

        Raises:
            RuntimeError: as ``apply_rotary_emb``.
        """
        if max_seqlen is None:
            if cu_seqlens is not None:
                raise RuntimeError("max_seqlen must be given with cu_seqlens")
            offset = seqlen_offset
            if isinstance(offset, Tensor):
                offset = int(offset.max()) if offset.numel() else 0
            seqlen = qkv.shape[1] if kv is None else max(qkv.shape[1], kv.shape[1])
            max_seqlen = seqlen + offset
        self._update_cos_sin_cache(max_seqlen, qkv.device, qkv.dtype)
        tables = self._cos_cached, self._sin_cached
        tables_k = self._cos_k_cached, self._sin_k_cached  # None without xPos
        ragged = dict(cu_seqlens=cu_seqlens, max_seqlen=max_seqlen)
        if kv is None:
            return apply_rotary_emb_qkv_(
                qkv, *tables, *tables_k, self.interleaved, seqlen_offset, num_heads_q, **ragged
            )
        q = apply_rotary_emb(qkv, *tables, self.interleaved, True, seqlen_offset, **ragged)
        if cu_seqlens_k is not None:
            ragged["cu_seqlens"] = cu_seqlens_k
        if self.scale is None:
            tables_k = tables
        return q, apply_rotary_emb_kv_(kv, *tables_k, self.interleaved, seqlen_offset, **ragged)
