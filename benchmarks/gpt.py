"""A small byte-level GPT whose attention is a parameter: flash_attn_func, unfused or torch's SDPA.

Used by train.py and bench_train.py. Every attention function takes q, k, v of shape
(batch, seqlen, heads, head_dim), is causal, and returns the same shape.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VOCAB = 256
ROTARY_BASE = 10_000.0
INIT_STD = 0.02
MLP_RATIO = 4
ATTENTION_NAMES = ("flash", "unfused", "sdpa")

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Preset:
    """Model and training size. `context` and `batch` are the training step's defaults."""

    layers: int
    width: int
    heads: int
    context: int
    batch: int
    learning_rate: float
    max_steps: int

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.width // self.heads


PRESETS = {
    "small": Preset(3, 128, 4, 256, 4, 3e-3, 4000),
    "medium": Preset(6, 384, 6, 1024, 16, 1.5e-3, 4000),
    "large": Preset(12, 768, 12, 2048, 16, 8e-4, 6000),
}


def unfused_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(Q K^T) V with the score matrix in memory; the softmax runs in fp32."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
    scores = scores.masked_fill(hidden, -math.inf)
    return (scores.softmax(-1, dtype=torch.float32).to(v.dtype) @ v).transpose(1, 2)


def sdpa_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """torch.nn.functional.scaled_dot_product_attention with the backend that torch picks."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


def load_attention(name: str) -> Attention:
    """Return the attention function called `name`: flash, unfused or sdpa."""
    if name == "flash":
        from flash_attn import flash_attn_func

        return lambda q, k, v: flash_attn_func(q, k, v, causal=True)
    return {"unfused": unfused_attention, "sdpa": sdpa_attention}[name]


def rotary_table(context: int, head_dim: int) -> tuple[Tensor, Tensor]:
    """cos and sin of every position's angles, each (context, 1, head_dim / 2) fp32."""
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    position = torch.arange(context, dtype=torch.float32)
    angle = torch.outer(position, ROTARY_BASE**-exponent).unsqueeze(1)
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate (batch, seqlen, heads, head_dim): element i is paired with i + head_dim / 2."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


class Block(nn.Module):
    """Pre-norm transformer block: attention, then an MLP, each added to the residual stream."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_attention = nn.RMSNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.project = nn.Linear(width, width, bias=False)
        self.norm_mlp = nn.RMSNorm(width)
        self.expand = nn.Linear(width, MLP_RATIO * width, bias=False)
        self.contract = nn.Linear(MLP_RATIO * width, width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attention: Attention) -> Tensor:
        """x (batch, seqlen, width) -> the same shape; cos and sin (seqlen, 1, head_dim / 2)."""
        batch, seqlen, width = x.shape
        qkv = self.qkv(self.norm_attention(x))
        q, k, v = qkv.view(batch, seqlen, 3, self.heads, width // self.heads).unbind(2)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        x = x + self.project(attention(q, k, v).reshape(batch, seqlen, width))
        return x + self.contract(F.gelu(self.expand(self.norm_mlp(x))))


class GPT(nn.Module):
    """Byte-level language model with rotary positions, for windows of up to `context` bytes.

    `dtype` is the dtype in which attention runs: the parameters' own, or autocast's.
    """

    def __init__(
        self, preset: Preset, attention: Attention, context: int, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.attention = attention
        self.context = context
        self.embedding = nn.Embedding(VOCAB, preset.width)
        self.blocks = nn.ModuleList(Block(preset.width, preset.heads) for _ in range(preset.layers))
        self.norm = nn.RMSNorm(preset.width)
        self.head = nn.Linear(preset.width, VOCAB, bias=False)
        cos, sin = rotary_table(context, preset.head_dim)
        self.register_buffer("cos", cos.to(dtype), persistent=False)
        self.register_buffer("sin", sin.to(dtype), persistent=False)
        for name, weight in self.named_parameters():
            if weight.dim() == 2:
                into_residual = name.endswith(("project.weight", "contract.weight"))
                shrink = math.sqrt(2 * preset.layers) if into_residual else 1.0
                nn.init.normal_(weight, std=INIT_STD / shrink)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens (batch, seqlen) int64 -> logits (batch, seqlen, 256)."""
        seqlen = tokens.shape[1]
        cos, sin = self.cos[:seqlen], self.sin[:seqlen]
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x, cos, sin, self.attention)
        return self.head(self.norm(x))

    def loss(self, window: Tensor) -> Tensor:
        """window (batch, seqlen + 1) of bytes -> mean cross entropy in nats per byte."""
        window = window.long()
        logits = self(window[:, :-1])
        return F.cross_entropy(logits.float().flatten(0, 1), window[:, 1:].flatten())

    @property
    def parameter_count(self) -> int:
        """Number of trained values."""
        return sum(p.numel() for p in self.parameters())


def make_optimizer(model: GPT, learning_rate: float) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices only."""
    matrices = [p for p in model.parameters() if p.dim() == 2]
    vectors = [p for p in model.parameters() if p.dim() != 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.95), fused=True)
