"""Multi-head attention as a ready layer: projections, rotary embedding, attention, KV cache."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from flash_attn._checks_decode import CACHE_VECTOR
from flash_attn.bert_padding import pad_input, unpad_input
from flash_attn.flash_attn_interface import flash_attn_with_kvcache
from flash_attn.layers.rotary import RotaryEmbedding
from flash_attn.modules.attention import (
    CrossAttention,
    FlashCrossAttention,
    FlashSelfAttention,
    SelfAttention,
    get_alibi_slopes,
    shared_option,
)
from flash_attn.modules.inference_params import InferenceParams

__all__ = [
    "MHA",
    "CrossAttention",
    "FlashCrossAttention",
    "FlashSelfAttention",
    "InferenceParams",
    "SelfAttention",
    "get_alibi_slopes",
]


class MHA(nn.Module):
    """Multi-head self- or cross-attention with its projections.

    Parameters in the state dict: ``Wqkv`` (self-attention), or ``Wq`` and ``Wkv`` (cross-attention),
    and ``out_proj``; the output features of the first ones are the heads of queries, of keys, of
    values.  Attention always runs through flash_attn's functions: on CUDA in fp16 or bf16, as
    parameters or by autocast; on the CPU in fp32 and fp64 too.

    Args:
        embed_dim: features of input and output, a multiple of num_heads.
        num_heads: query heads; head_dim is embed_dim / num_heads.
        num_heads_kv: key and value heads, a divisor of num_heads.  Default: num_heads.
        cross_attn: keys and values come from an input of their own.
        qkv_proj_bias, out_proj_bias: whether the projections have a bias.
        dropout: of the attention weights, in training mode.
        softmax_scale: factor of q k^T.  Default: head_dim ** -0.5.
        causal: tokens do not see those after them.
        layer_idx: the layer's key in ``InferenceParams``; wanted for a KV cache.
        dwconv: not supported.
        rotary_emb_dim: dimensions of each head with a rotary embedding; 0: none.
        rotary_emb_base, rotary_emb_scale_base, rotary_emb_interleaved: as of ``RotaryEmbedding``.
        use_alibi: linear biases with the slopes of ``get_alibi_slopes``.
        window_size: (left, right) of a sliding window; -1: no limit.
        fused_bias_fc, use_flash_attn: taken for compatibility; they change nothing.  Attention is
            flash_attn's either way.
        return_residual: return the input too: (output, x).
        checkpointing: in training, compute attention again in the backward pass instead of keeping
            what it needs.
        device, dtype: of the parameters.

    Attributes:
        inner_attn, inner_cross_attn: ``FlashSelfAttention`` and ``FlashCrossAttention``: attention
            runs through them, to packed qkv, and to kv (grouped heads, a cache, cross-attention).
            causal, softmax_scale, window_size, alibi_slopes and dropout are those of both.

    Raises:
        ValueError: arguments that do not fit together.
    """

    dropout = shared_option("dropout", "Of the attention weights, in training mode.")
    causal = shared_option("causal", "Whether tokens do not see those after them.")
    softmax_scale = shared_option("softmax_scale", "Factor of q k^T; None: head_dim ** -0.5.")
    window_size = shared_option("window_size", "(left, right); -1: no limit.")
    alibi_slopes = shared_option("alibi_slopes", "(num_heads,), fp32, or None.  It is no buffer.")

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        num_heads_kv: int | None = None,
        cross_attn: bool = False,
        qkv_proj_bias: bool = True,
        out_proj_bias: bool = True,
        dropout: float = 0.0,
        softmax_scale: float | None = None,
        causal: bool = False,
        layer_idx: int | None = None,
        dwconv: bool = False,
        rotary_emb_dim: int = 0,
        rotary_emb_base: float = 10000.0,
        rotary_emb_scale_base: float | None = None,
        rotary_emb_interleaved: bool = False,
        use_alibi: bool = False,
        window_size: tuple[int, int] = (-1, -1),
        fused_bias_fc: bool = False,
        use_flash_attn: bool = False,
        return_residual: bool = False,
        checkpointing: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if dwconv:
            raise ValueError("dwconv=True is not supported: MHA has no depthwise convolution")
        num_heads_kv = num_heads if num_heads_kv is None else num_heads_kv
        if embed_dim % num_heads:
            raise ValueError(
                f"embed_dim must be a multiple of num_heads; got {embed_dim}, {num_heads}"
            )
        if num_heads_kv < 1 or num_heads % num_heads_kv:
            raise ValueError(
                f"num_heads_kv must divide num_heads; got {num_heads_kv}, num_heads = {num_heads}"
            )
        self.embed_dim = embed_dim
        self.num_heads = num_heads
        self.num_heads_kv = num_heads_kv
        self.head_dim = embed_dim // num_heads
        self.cross_attn = cross_attn
        self.layer_idx = layer_idx
        self.rotary_emb_dim = rotary_emb_dim
        self.use_alibi = use_alibi
        self.use_flash_attn = use_flash_attn
        self.return_residual = return_residual
        self.checkpointing = checkpointing
        if rotary_emb_dim > self.head_dim:
            raise ValueError(
                "rotary_emb_dim must be at most embed_dim / num_heads; got"
                f" {rotary_emb_dim} > {self.head_dim}"
            )

        factory = dict(device=device, dtype=dtype)
        kv_dim = 2 * num_heads_kv * self.head_dim
        if cross_attn:
            self.Wq = nn.Linear(embed_dim, embed_dim, bias=qkv_proj_bias, **factory)
            self.Wkv = nn.Linear(embed_dim, kv_dim, bias=qkv_proj_bias, **factory)
        else:
            self.Wqkv = nn.Linear(embed_dim, embed_dim + kv_dim, bias=qkv_proj_bias, **factory)
        self.out_proj = nn.Linear(embed_dim, embed_dim, bias=out_proj_bias, **factory)
        if rotary_emb_dim > 0:
            rotary = rotary_emb_base, rotary_emb_interleaved, rotary_emb_scale_base
            self.rotary_emb = RotaryEmbedding(rotary_emb_dim, *rotary, device=device)
        slopes = get_alibi_slopes(num_heads) if use_alibi else None
        options = causal, softmax_scale, dropout, window_size, slopes
        self.inner_attn = FlashSelfAttention(*options).to(device)
        self.inner_cross_attn = FlashCrossAttention(*options).to(device)

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype: torch.dtype | None = None
    ) -> Tensor:
        """An empty cache (batch_size, max_seqlen, 2, num_heads_kv, head_dim): keys, then values.

        head_dim is rounded up to a multiple of 8, as ``flash_attn_with_kvcache`` wants it.
        """
        weight = self.out_proj.weight
        head_dim = -(-self.head_dim // CACHE_VECTOR) * CACHE_VECTOR
        shape = batch_size, max_seqlen, 2, self.num_heads_kv, head_dim
        new = torch.empty if head_dim == self.head_dim else torch.zeros
        return new(shape, dtype=dtype or weight.dtype, device=weight.device)

    def forward(
        self,
        x: Tensor,
        x_kv: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        mixer_subset: Any = None,
        inference_params: InferenceParams | None = None,
        *,
        cu_seqlens_k: Tensor | None = None,
        max_seqlen_k: int | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Attention of x to itself, or to x_kv.

        Args:
            x: (batch, seqlen, embed_dim), or with cu_seqlens (total, embed_dim).
            x_kv: cross-attention: (batch, seqlen_k, embed_dim), or with cu_seqlens_k (total_k,
                embed_dim).  Default: x.
            key_padding_mask: (batch, seqlen_k), bool: True where there is a token.  Attention is as
                if the others were not there; in self-attention their own output is out_proj's bias.
                ALiBi, window and ``causal`` count the tokens that are there.
            cu_seqlens: (batch + 1,), int32: where each sequence begins in a ragged x.
            max_seqlen: length of the longest of them.
            mixer_subset: cross-attention: a slice or tensor of token indices; only x[:, mixer_subset] is computed.
            inference_params: self-attention with a KV cache.  seqlen_offset 0 (and no
                lengths_per_sample): x are the first tokens; later, x are the next ones, which go to
                the cache.
            cu_seqlens_k, max_seqlen_k: cross-attention: those of a ragged x_kv.

        Returns:
            (batch, seqlen, embed_dim) or (total, embed_dim); with ``return_residual`` a tuple of it
            and x (the subset of x, if one is asked for).

        Raises:
            ValueError: arguments that do not fit together.
            RuntimeError: as ``flash_attn_func``.
        """
        self._check_arguments(
            x, x_kv, key_padding_mask, cu_seqlens, max_seqlen, mixer_subset, inference_params
        )
        if self.cross_attn:
            if mixer_subset is not None:
                x_kv = x if x_kv is None else x_kv
                x = x[:, mixer_subset]
            out = self._cross_attention(
                x,
                x if x_kv is None else x_kv,
                key_padding_mask,
                (cu_seqlens, cu_seqlens_k, max_seqlen, max_seqlen_k),
            )
        else:
            out = self._self_attention(
                x, key_padding_mask, cu_seqlens, max_seqlen, inference_params
            )
        out = self.out_proj(out.flatten(-2))
        return (out, x) if self.return_residual else out

    def _check_arguments(
        self, x, x_kv, key_padding_mask, cu_seqlens, max_seqlen, mixer_subset, inference_params
    ) -> None:
        dims = 3 if cu_seqlens is None else 2
        if x.dim() != dims:
            layout = "(batch, seqlen, embed_dim)" if dims == 3 else "(total, embed_dim)"
            raise ValueError(f"x must have shape {layout}; got {tuple(x.shape)}")
        if cu_seqlens is not None:
            if max_seqlen is None:
                raise ValueError("cu_seqlens needs max_seqlen")
            if key_padding_mask is not None or inference_params is not None:
                raise ValueError(
                    "cu_seqlens goes with neither key_padding_mask nor inference_params"
                )
        if not self.cross_attn and (x_kv is not None or mixer_subset is not None):
            raise ValueError("x_kv and mixer_subset are for cross_attn=True")
        if inference_params is not None:
            if self.cross_attn or key_padding_mask is not None:
                raise ValueError("inference_params is for self-attention without key_padding_mask")
            if self.layer_idx is None:
                raise ValueError("inference_params needs layer_idx, given to MHA's constructor")

    def _self_attention(
        self,
        x: Tensor,
        key_padding_mask: Tensor | None,
        cu_seqlens: Tensor | None,
        max_seqlen: int | None,
        inference_params: InferenceParams | None,
    ) -> Tensor:
        """(..., num_heads, head_dim)"""
        qkv = self.Wqkv(x).unflatten(-1, (-1, self.head_dim))  # (..., heads of q, k, v, head_dim)
        if inference_params is not None:
            return self._cached_attention(qkv, inference_params)
        if self.rotary_emb_dim > 0:
            qkv = self.rotary_emb(
                qkv, max_seqlen=max_seqlen, num_heads_q=self.num_heads, cu_seqlens=cu_seqlens
            )
        if key_padding_mask is None:
            return self._checkpointed(self._attend_qkv, qkv, cu_seqlens, max_seqlen)
        batch, seqlen = x.shape[:2]
        qkv, indices, cu_seqlens, max_seqlen, _ = unpad_input(qkv, key_padding_mask)
        out = self._checkpointed(self._attend_qkv, qkv, cu_seqlens, max_seqlen)
        return pad_input(out, indices, batch, seqlen)

    def _cross_attention(
        self, x: Tensor, x_kv: Tensor, key_padding_mask: Tensor | None, lengths: tuple
    ) -> Tensor:
        """(..., num_heads, head_dim); lengths: cu_seqlens, cu_seqlens_k, max_seqlen, max_seqlen_k."""
        cu_seqlens, cu_seqlens_k, max_seqlen, max_seqlen_k = lengths
        q = self.Wq(x).unflatten(-1, (self.num_heads, self.head_dim))
        kv = self.Wkv(x_kv).unflatten(-1, (2, self.num_heads_kv, self.head_dim))
        if cu_seqlens is not None and cu_seqlens_k is None:
            if x_kv is not x:
                raise ValueError("x_kv with cu_seqlens needs cu_seqlens_k and max_seqlen_k")
            cu_seqlens_k, max_seqlen_k = cu_seqlens, max_seqlen
        if self.rotary_emb_dim > 0:
            longest = None if cu_seqlens is None else max(max_seqlen, max_seqlen_k)
            q, kv = self.rotary_emb(
                q, kv, max_seqlen=longest, cu_seqlens=cu_seqlens, cu_seqlens_k=cu_seqlens_k
            )
        attend = self.inner_cross_attn
        if key_padding_mask is not None:
            return self._checkpointed(attend.attend_to_padded, q, kv, key_padding_mask)
        lengths = cu_seqlens, max_seqlen, cu_seqlens_k, max_seqlen_k
        return self._checkpointed(attend, q, kv, None, *lengths)

    def _cached_attention(self, qkv: Tensor, inference_params: InferenceParams) -> Tensor:
        """(batch, seqlen, num_heads, head_dim); the keys and values of qkv go to the cache."""
        batch, seqlen = qkv.shape[:2]
        caches, layer = inference_params.key_value_memory_dict, self.layer_idx
        assert layer is not None  # _check_arguments has seen to it
        if layer not in caches:
            caches[layer] = self.allocate_inference_cache(
                inference_params.max_batch_size, inference_params.max_seqlen, qkv.dtype
            )
        entries = slice(
            inference_params.batch_size_offset, inference_params.batch_size_offset + batch
        )
        cache = caches[layer][entries]
        offset: int | Tensor = inference_params.seqlen_offset
        is_first = offset == 0 and inference_params.lengths_per_sample is None
        if inference_params.lengths_per_sample is not None:
            offset = inference_params.lengths_per_sample[entries]
        elif offset + seqlen > cache.shape[1] or cache.shape[0] < batch:
            raise ValueError(
                "inference_params: the cache is too small; got a cache of"
                f" {tuple(caches[layer].shape[:2])}, batch {batch} at"
                f" {inference_params.batch_size_offset}, {offset} + {seqlen} tokens"
            )

        if self.rotary_emb_dim > 0:
            positions = dict(seqlen_offset=offset, max_seqlen=cache.shape[1])
            qkv = self.rotary_emb(qkv, num_heads_q=self.num_heads, **positions)
        if is_first:
            q, kv = self._split(qkv)
            cache[:, :seqlen, ..., : self.head_dim] = kv.detach()
            return self.inner_cross_attn(q, kv)
        q, k, v = qkv.split((self.num_heads, self.num_heads_kv, self.num_heads_kv), dim=2)
        return flash_attn_with_kvcache(
            q,
            cache[:, :, 0],
            cache[:, :, 1],
            k,
            v,
            cache_seqlens=offset,
            softmax_scale=self.softmax_scale,
            causal=self.causal,
            window_size=self.window_size,
            alibi_slopes=self.inner_cross_attn._constant("alibi_slopes", q.device),
        )

    def _split(self, qkv: Tensor) -> tuple[Tensor, Tensor]:
        """q (..., num_heads, head_dim) and kv (..., 2, num_heads_kv, head_dim)."""
        q, kv = qkv.split((self.num_heads, 2 * self.num_heads_kv), dim=-2)
        return q, kv.unflatten(-2, (2, self.num_heads_kv))

    def _checkpointed(self, function, *arguments: Any) -> Tensor:
        if self.checkpointing and self.training:
            return checkpoint(function, *arguments, use_reentrant=False)
        return function(*arguments)

    def _attend_qkv(self, qkv: Tensor, cu_seqlens: Tensor | None, max_seqlen: int | None) -> Tensor:
        """qkv (batch, seqlen, heads of q, k, v, head_dim), or (total, ...) with cu_seqlens."""
        lengths = cu_seqlens, max_seqlen
        if self.num_heads_kv != self.num_heads:
            return self.inner_cross_attn(*self._split(qkv), None, *lengths, *lengths)
        return self.inner_attn(qkv.unflatten(-2, (3, self.num_heads)), None, *lengths)
