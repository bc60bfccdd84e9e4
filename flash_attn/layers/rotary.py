"""Rotary position embedding: functions with derivatives, and a module that keeps the tables."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from flash_attn._modes import in_mode, is_capturing
from flash_attn.layers._constants import ConstantsModule
from flash_attn.layers._rotary_functions import (
    ApplyRotaryEmb,
    apply_rotary_emb,
    apply_rotary_emb_func,
    apply_rotary_emb_kv_,
    apply_rotary_emb_qkv_,
    apply_rotary_emb_torch,
    rotate_half,
)

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


# cos and sin of queries, and with xPos the keys' own.
Tables = tuple[Tensor, Tensor, Tensor | None, Tensor | None]


def _no_tables() -> dict[str, Any]:
    """A module's attributes before its first call."""
    return dict(
        _seq_len_cached=0,  # positions in the tables; 0: they are of a mode, or there are none
        _cos_cached=None,
        _sin_cached=None,
        _cos_k_cached=None,  # the keys' own, with xPos
        _sin_k_cached=None,
        _captured_tables=[],  # those that a CUDA graph reads: they must live as long as the module
    )


class RotaryEmbedding(ConstantsModule):
    """Rotary position embedding of packed queries, keys and values, with the tables it needs.

    The angle of pair i at position p is p * base ** (-2 i / dim).  The tables grow with the longest
    sequence seen and are kept in the dtype of what they rotate.  There is nothing in the state dict.

    What follows from the arguments is right whatever was done to the module: casts, ``to_empty``,
    construction on the meta device, copies.  Tables that are made under torch.compile, torch.export,
    transforms, fake tensors or in a CUDA graph stay there: the next call outside does not see them.

    Args:
        dim: rotary_dim: how many dimensions of each head are rotated; even.
        base: see above.
        interleaved: pairs are neighbouring dimensions rather than dim / 2 apart.
        scale_base: of xPos (arXiv 2212.10554): queries grow and keys shrink with the position, so
            that their product fades with the distance; 512 is usual.  None: no xPos.
        device: of inv_freq and scale.
        pos_idx_in_fp32: compute angles in fp32 even where the module was converted to 16 bits, in
            which positions beyond 256 or 2048 are no longer told apart.  (Tables in fp64 are computed
            in fp64.)

    Attributes:
        inv_freq: (dim / 2,), fp32: base ** (-2 i / dim).  It is no buffer, and no cast changes it.
            Other frequencies may be assigned to it.
        scale: (dim / 2,), fp32: of xPos, or None.
    """

    _constants = ("inv_freq", "scale")
    _inv_freq: Tensor
    _scale: Tensor | None
    _seq_len_cached: int
    _cos_cached: Tensor | None
    _sin_cached: Tensor | None
    _cos_k_cached: Tensor | None
    _sin_k_cached: Tensor | None
    _captured_tables: list[Tables]

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
        self._dtype = torch.float32  # to which the module was cast last
        for name in self._constants:
            self._renew_constant(name, device)
        self.__dict__.update(_no_tables())

    @property
    def inv_freq(self) -> Tensor:
        return self._present_constant("inv_freq")

    @inv_freq.setter
    def inv_freq(self, value: Tensor) -> None:
        self._set_constant("inv_freq", value)
        self._seq_len_cached = 0

    @property
    def scale(self) -> Tensor | None:
        return self._constant("scale")

    @scale.setter
    def scale(self, value: Tensor | None) -> None:
        self._set_constant("scale", value)
        self._seq_len_cached = 0

    def _present_constant(self, name: str, device: torch.device | None = None) -> Tensor:
        constant = self._constant(name, device)
        assert constant is not None
        return constant

    def _compute_constant(self, name: str, device: torch.device | str | None) -> Tensor | None:
        if name == "inv_freq":
            return self._compute_inv_freq(device)
        return None if self.scale_base is None else self._compute_scale(device)

    def _compute_inv_freq(self, device: torch.device | str | None = None) -> Tensor:
        return self._exact_inv_freq(device).float()

    def _exact_inv_freq(self, device: torch.device | str | None) -> Tensor:
        pair = torch.arange(0, self.dim, 2, device=device, dtype=torch.float64)
        return self.base ** (-pair / self.dim)

    def _compute_scale(self, device: torch.device | str | None = None) -> Tensor:
        return self._exact_scale(device).float()

    def _exact_scale(self, device: torch.device | str | None) -> Tensor:
        pair = torch.arange(0, self.dim, 2, device=device, dtype=torch.float64)
        return (pair + 0.4 * self.dim) / (1.4 * self.dim)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "RotaryEmbedding":
        super()._apply(fn, recurse)
        self._dtype = fn(torch.empty(0, dtype=self._dtype, device=self._inv_freq.device)).dtype
        return self

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles: they make tables of their own."""
        return self.__dict__ | _no_tables()

    def _in_precision(
        self, name: str, exact: Callable[..., Tensor], device: torch.device, dtype: torch.dtype
    ) -> Tensor:
        """A constant for tables of this dtype: with more bits for fp64 where it is our own."""
        constant = self._present_constant(name, device)
        if dtype == torch.float64:
            wide = exact(device)
            return torch.where(wide.float() == constant, wide, constant.double())
        return constant if self.pos_idx_in_fp32 else constant.to(self._dtype)

    @torch.no_grad()
    def _make_tables(self, seqlen: int, device: torch.device, dtype: torch.dtype) -> Tables:
        """cos and sin of positions 0 to seqlen, and with xPos those of the keys."""
        inv_freq = self._in_precision("inv_freq", self._exact_inv_freq, device, dtype)
        position = torch.arange(seqlen, device=device, dtype=inv_freq.dtype)
        angles = position.unsqueeze(-1) * inv_freq
        cos, sin = angles.cos(), angles.sin()
        if self._scale is None:
            return cos.to(dtype), sin.to(dtype), None, None
        if self.scale_base is None:
            raise RuntimeError("scale needs scale_base, an argument of RotaryEmbedding; got None")
        # Only differences of positions count; the middle keeps both powers in range.
        power = (position - seqlen // 2) / self.scale_base
        scale = self._in_precision("scale", self._exact_scale, device, dtype)
        scale = scale ** power.unsqueeze(-1)
        tables = cos * scale, sin * scale, cos / scale, sin / scale
        cos, sin, cos_k, sin_k = (table.to(dtype) for table in tables)
        return cos, sin, cos_k, sin_k

    def _update_cos_sin_cache(
        self,
        seqlen: int,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Makes the tables hold at least seqlen positions, on device in dtype.

        What is made in a mode of torch holds until the next call.
        """
        device = self._inv_freq.device if device is None else torch.device(device)
        dtype = torch.float32 if dtype is None else dtype
        if in_mode():
            tables, holds = self._make_tables(seqlen, device, dtype), 0
        elif self._has_tables(seqlen, device, dtype):
            return
        else:
            # Autograd cannot keep tensors that were made under inference_mode.
            with torch.inference_mode(False):
                tables = self._make_tables(seqlen, device, dtype)
            # A graph's memory has no contents before the graph runs.
            holds = 0 if is_capturing(device) else seqlen
        self._cos_cached, self._sin_cached, self._cos_k_cached, self._sin_k_cached = tables
        self._seq_len_cached = holds

    def _has_tables(self, seqlen: int, device: torch.device, dtype: torch.dtype) -> bool:
        cached, positions = self._cos_cached, self._seq_len_cached
        if cached is None or positions == 0 or cached.device != device or cached.dtype != dtype:
            return False
        # With xPos, tables of another length have another middle.
        if seqlen > positions or (self._cos_k_cached is not None and seqlen != positions):
            return False
        if is_capturing(device) and all(cached is not kept[0] for kept in self._captured_tables):
            self._captured_tables.append(self._cached_tables())
        return True

    def _cached_tables(self) -> Tables:
        cos, sin = self._cos_cached, self._sin_cached
        assert cos is not None and sin is not None
        return cos, sin, self._cos_k_cached, self._sin_k_cached

    def _tables_for(self, qkv: Tensor, seqlen: int) -> Tables:
        """The tables of positions 0 to seqlen for qkv."""
        is_ours = type(self)._update_cos_sin_cache is RotaryEmbedding._update_cos_sin_cache
        if isinstance(qkv, FakeTensor):
            with qkv.fake_mode:
                return self._make_tables(seqlen, qkv.device, qkv.dtype)
        if in_mode() and is_ours:
            return self._make_tables(seqlen, qkv.device, qkv.dtype)
        self._update_cos_sin_cache(seqlen, qkv.device, qkv.dtype)
        return self._cached_tables()

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
        cos, sin, cos_k, sin_k = self._tables_for(qkv, max_seqlen)
        how = self.interleaved, seqlen_offset
        if kv is None:
            return apply_rotary_emb_qkv_(
                *(qkv, cos, sin, cos_k, sin_k, *how, num_heads_q),
                cu_seqlens=cu_seqlens,
                max_seqlen=max_seqlen,
            )
        q = apply_rotary_emb(
            qkv, cos, sin, self.interleaved, True, seqlen_offset, cu_seqlens, max_seqlen
        )
        if cos_k is None or sin_k is None:
            cos_k, sin_k = cos, sin
        if cu_seqlens_k is None:
            cu_seqlens_k = cu_seqlens
        return q, apply_rotary_emb_kv_(
            kv, cos_k, sin_k, *how, cu_seqlens=cu_seqlens_k, max_seqlen=max_seqlen
        )
