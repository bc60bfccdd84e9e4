"""Attention as modules without parameters: what is fixed is kept, tensors are given.

``modules.mha`` uses them, and gives them to its users.
"""

import math
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch._guards import detect_fake_mode

from flash_attn._modes import in_fake_mode
from flash_attn.bert_padding import pad_input, unpad_input
from flash_attn.flash_attn_interface import (
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
)
from flash_attn.layers._constants import ConstantsModule

__all__ = [
    "CrossAttention",
    "FlashCrossAttention",
    "FlashSelfAttention",
    "SelfAttention",
    "get_alibi_slopes",
    "shared_option",
]

T = TypeVar("T")


def get_alibi_slopes(nheads: int) -> list[float]:
    """The slopes of ALiBi (arXiv 2108.12409) for nheads heads, a power of two or not."""
    power = 2 ** int(math.log2(nheads))
    slopes = [2 ** (-8 * (i + 1) / power) for i in range(power)]
    # The others lie between those of a power of two, as every second one of twice as many heads.
    return slopes + [2 ** (-4 * (2 * i + 1) / power) for i in range(nheads - power)]


def shared_option(name: str, doc: str) -> property:
    """An attribute of a layer that is one of its inner_attn and inner_cross_attn."""

    def get(layer: nn.Module) -> Any:
        return getattr(layer.inner_cross_attn, name)

    def set_both(layer: nn.Module, value: Any) -> None:
        setattr(layer.inner_attn, name, value)
        setattr(layer.inner_cross_attn, name, value)

    return property(get, set_both, doc=doc)


class _Attention(ConstantsModule):
    """The options of attention: see ``FlashSelfAttention``."""

    _constants = ("alibi_slopes",)
    _alibi_slopes: Tensor | None

    def __init__(
        self,
        causal: bool = False,
        softmax_scale: float | None = None,
        attention_dropout: float = 0.0,
        window_size: tuple[int, int] = (-1, -1),
        alibi_slopes: Tensor | Sequence[float] | None = None,
        deterministic: bool = False,
    ) -> None:
        super().__init__()
        self.causal = causal
        self.softmax_scale = softmax_scale
        self.drop = nn.Dropout(attention_dropout)  # holds the probability; it is never called
        self.window_size = window_size
        self.deterministic = deterministic
        self._slopes_given: Tensor | Sequence[float] | None = None
        if isinstance(alibi_slopes, Tensor):
            self._give_slopes(alibi_slopes)
        else:
            self._slopes_given = alibi_slopes
            self._renew_constant("alibi_slopes")

    @property
    def dropout(self) -> float:
        return self.drop.p

    @dropout.setter
    def dropout(self, value: float) -> None:
        self.drop.p = value

    @property
    def alibi_slopes(self) -> Tensor | None:
        return self._constant("alibi_slopes")

    @alibi_slopes.setter
    def alibi_slopes(self, value: Tensor | None) -> None:
        self._give_slopes(value)

    def _give_slopes(self, value: Tensor | None) -> None:
        self._set_constant("alibi_slopes", value)
        self._slopes_given = self._alibi_slopes

    def _compute_constant(self, name: str, device: torch.device | str | None) -> Tensor | None:
        given = self._slopes_given
        is_without_values = isinstance(given, Tensor) and given.is_meta
        if is_without_values and device is not None and torch.device(device).type != "meta":
            raise RuntimeError(
                f"{name} has no values: the tensor given is on the meta device; give numbers, or"
                f" assign {name}"
            )
        if isinstance(given, Tensor) and in_fake_mode():
            mode = detect_fake_mode()
            assert mode is not None  # in_fake_mode has found it
            given = mode.from_tensor(given)
        return None if given is None else torch.as_tensor(given, device=device, dtype=torch.float32)

    def _options(self, causal: bool | None, device: torch.device) -> dict[str, Any]:
        return dict(
            dropout_p=self.dropout if self.training else 0.0,
            softmax_scale=self.softmax_scale,
            causal=self.causal if causal is None else causal,
            window_size=self.window_size,
            alibi_slopes=self._constant("alibi_slopes", device),
            deterministic=self.deterministic,
        )


class FlashSelfAttention(_Attention):
    """Attention of packed queries, keys and values.

    Args:
        causal: tokens do not see those after them.
        softmax_scale: factor of q k^T.  Default: head_dim ** -0.5.
        attention_dropout: of the attention weights, in training mode.
        window_size: (left, right) of a sliding window; -1: no limit.
        alibi_slopes: (heads,) or (batch, heads): a tensor, or numbers such as those of
            ``get_alibi_slopes``.  They stay in fp32 and keep their values whatever the module is
            cast to; there is nothing in the state dict.
        deterministic: make the gradient of q bitwise repeatable, at some cost in time.
    """

    def forward(
        self,
        qkv: Tensor,
        causal: bool | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
    ) -> Tensor:
        """Attention.

        Args:
            qkv: (batch, seqlen, 3, heads, head_dim), or with cu_seqlens (total, 3, heads, head_dim).
            causal: takes the place of the module's.
            cu_seqlens: (batch + 1,), int32: where each sequence begins in a ragged qkv.
            max_seqlen: length of the longest of them.

        Returns:
            (batch, seqlen, heads, head_dim) or (total, heads, head_dim).

        Raises:
            RuntimeError: as ``flash_attn_qkvpacked_func``.
        """
        options = self._options(causal, qkv.device)
        if cu_seqlens is None:
            return flash_attn_qkvpacked_func(qkv, **options)
        max_seqlen = _given("max_seqlen", max_seqlen)
        return flash_attn_varlen_qkvpacked_func(qkv, cu_seqlens, max_seqlen, **options)


class FlashCrossAttention(_Attention):
    """Attention of queries to packed keys and values.

    Args: those of ``FlashSelfAttention``.
    """

    def forward(
        self,
        q: Tensor,
        kv: Tensor,
        causal: bool | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        cu_seqlens_k: Tensor | None = None,
        max_seqlen_k: int | None = None,
    ) -> Tensor:
        """Attention.

        Args:
            q: (batch, seqlen_q, heads, head_dim), or with cu_seqlens (total_q, heads, head_dim).
            kv: (batch, seqlen_k, 2, heads_k, head_dim), or (total_k, 2, heads_k, head_dim); heads is
                a multiple of heads_k.
            causal: takes the place of the module's.
            cu_seqlens, cu_seqlens_k: (batch + 1,), int32: where each sequence begins in q and in kv.
            max_seqlen, max_seqlen_k: lengths of the longest of them.

        Returns:
            q's shape.

        Raises:
            RuntimeError: as ``flash_attn_kvpacked_func``.
        """
        options = self._options(causal, q.device)
        if cu_seqlens is None:
            return flash_attn_kvpacked_func(q, kv, **options)
        max_seqlen = _given("max_seqlen", max_seqlen)
        cu_seqlens_k = _given("cu_seqlens_k", cu_seqlens_k)
        max_seqlen_k = _given("max_seqlen_k", max_seqlen_k)
        return flash_attn_varlen_kvpacked_func(
            q, kv, cu_seqlens, cu_seqlens_k, max_seqlen, max_seqlen_k, **options
        )

    def attend_to_padded(
        self, q: Tensor, kv: Tensor, key_padding_mask: Tensor, causal: bool | None = None
    ) -> Tensor:
        """As if the tokens of kv where key_padding_mask (batch, seqlen_k) is False were not there."""
        batch, seqlen = q.shape[:2]
        cu_seqlens = seqlen * torch.arange(batch + 1, dtype=torch.int32, device=q.device)
        kv, _, cu_seqlens_k, max_seqlen_k, _ = unpad_input(kv, key_padding_mask)
        out = FlashCrossAttention.forward(
            self, q.flatten(0, 1), kv, causal, cu_seqlens, seqlen, cu_seqlens_k, max_seqlen_k
        )
        return out.unflatten(0, (batch, seqlen))


class SelfAttention(FlashSelfAttention):
    """``FlashSelfAttention`` of padded sequences, by the same kernels.

    Args:
        causal, softmax_scale, attention_dropout: as of ``FlashSelfAttention``.
    """

    def __init__(
        self,
        causal: bool = False,
        softmax_scale: float | None = None,
        attention_dropout: float = 0.0,
    ) -> None:
        super().__init__(causal, softmax_scale, attention_dropout)

    def forward(  # type: ignore[override]  # upstream's: a mask in the place of lengths
        self, qkv: Tensor, causal: bool | None = None, key_padding_mask: Tensor | None = None
    ) -> Tensor:
        """Attention.

        Args:
            qkv: (batch, seqlen, 3, heads, head_dim).
            causal: takes the place of the module's.
            key_padding_mask: (batch, seqlen), bool: True where there is a token.  Attention is as if
                the others were not there, and their own output is 0.

        Returns:
            (batch, seqlen, heads, head_dim).

        Raises:
            RuntimeError: as ``flash_attn_qkvpacked_func``.
        """
        if key_padding_mask is None:
            return super().forward(qkv, causal)
        batch, seqlen = qkv.shape[:2]
        qkv, indices, cu_seqlens, max_seqlen, _ = unpad_input(qkv, key_padding_mask)
        out = super().forward(qkv, causal, cu_seqlens, max_seqlen)
        return pad_input(out, indices, batch, seqlen)


class CrossAttention(FlashCrossAttention):
    """``FlashCrossAttention`` to padded sequences, by the same kernels.

    Args:
        causal, softmax_scale, attention_dropout: as of ``FlashSelfAttention``.
    """

    def __init__(
        self,
        causal: bool = False,
        softmax_scale: float | None = None,
        attention_dropout: float = 0.0,
    ) -> None:
        super().__init__(causal, softmax_scale, attention_dropout)

    def forward(  # type: ignore[override]  # upstream's: a mask in the place of lengths
        self,
        q: Tensor,
        kv: Tensor,
        causal: bool | None = None,
        key_padding_mask: Tensor | None = None,
    ) -> Tensor:
        """Attention.

        Args:
            q: (batch, seqlen_q, heads, head_dim).
            kv: (batch, seqlen_k, 2, heads_k, head_dim); heads is a multiple of heads_k.
            causal: takes the place of the module's; the last query sees the last token.
            key_padding_mask: (batch, seqlen_k), bool: True where kv has a token.  Attention is as if
                the others were not there.

        Returns:
            q's shape.

        Raises:
            RuntimeError: as ``flash_attn_kvpacked_func``.
        """
        if key_padding_mask is None:
            return super().forward(q, kv, causal)
        return self.attend_to_padded(q, kv, key_padding_mask, causal)


def _given(name: str, value: T | None) -> T:
    """value, which cu_seqlens needs."""
    if value is None:
        raise RuntimeError(f"{name} must be given with cu_seqlens; got None")
    return value
