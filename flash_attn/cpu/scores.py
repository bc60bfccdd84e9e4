"""What the CPU backend knows of masks, softcap, ALiBi and dropout: the scores of one tile.

Used by ``attention``, which walks over the tiles.  Query i of a sequence stands at the key position
i + shift, shift = seqlen_k - seqlen_q: the last query at the last key.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from flash_attn.cpu import philox

if TYPE_CHECKING:  # ``_ops`` imports this file
    from flash_attn._ops import Options

# Large enough that a tile's matrix products outweigh the cost of calling torch, small enough that a
# tile of a few heads stays in the cache.
BLOCK_M = 256
BLOCK_N = 512


@dataclass(frozen=True)
class Visibility:
    """Query i sees the keys j with i + shift - left <= j <= i + shift + right; None: unlimited."""

    seqlen_q: int
    seqlen_k: int
    left: int | None
    right: int | None

    @classmethod
    def of(cls, seqlen_q: int, seqlen_k: int, options: Options) -> Visibility:
        left = options.window_left if options.window_left >= 0 else None
        right = options.window_right if options.window_right >= 0 else None
        return cls(seqlen_q, seqlen_k, left, 0 if options.causal else right)

    @property
    def shift(self) -> int:
        return self.seqlen_k - self.seqlen_q

    @property
    def is_full(self) -> bool:
        """Whether every query sees every key."""
        return not self._hides(slice(0, self.seqlen_q), slice(0, self.seqlen_k))

    @property
    def is_square_causal(self) -> bool:
        """Whether query i of as many sees exactly the keys 0 to i."""
        left_hides = self.left is not None and self.left < self.seqlen_k - 1
        return self.shift == 0 and self.right == 0 and not left_hides

    def keys(self, rows: slice) -> slice:
        """The keys that any of the rows sees, from a multiple of the dropout block on."""
        begin, end = 0, self.seqlen_k
        if self.left is not None:
            begin = max(begin, rows.start + self.shift - self.left)
        if self.right is not None:
            end = min(end, rows.stop + self.shift + self.right)
        return _aligned(begin, end, philox.COLS)

    def queries(self, cols: slice) -> slice:
        """The queries that see any of the cols, from a multiple of the dropout block on."""
        begin, end = 0, self.seqlen_q
        if self.right is not None:
            begin = max(begin, cols.start - self.shift - self.right)
        if self.left is not None:
            end = min(end, cols.stop - self.shift + self.left)
        return _aligned(begin, end, philox.ROWS)

    def hidden(self, rows: slice, cols: slice) -> Tensor | None:
        """Which of the cols each of the rows does not see, bool; None if it sees all of them."""
        if not self._hides(rows, cols):
            return None
        distance = self.distance(rows, cols)
        hidden = torch.zeros_like(distance, dtype=torch.bool)
        if self.left is not None:
            hidden |= distance < -self.left
        if self.right is not None:
            hidden |= distance > self.right
        return hidden

    def distance(self, rows: slice, cols: slice) -> Tensor:
        """j - (i + shift), int64 (rows, cols): 0 where a query stands."""
        i = arange(rows.start, rows.stop).unsqueeze(-1)
        return arange(cols.start, cols.stop) - (i + self.shift)

    def _hides(self, rows: slice, cols: slice) -> bool:
        least = cols.start - (rows.stop - 1 + self.shift)
        most = cols.stop - 1 - (rows.start + self.shift)
        left_hides = self.left is not None and least < -self.left
        return left_hides or (self.right is not None and most > self.right)


@dataclass(frozen=True)
class Scores:
    """How the scores of one part of the heads come from q k^T, and which weights dropout keeps.

    A part has n key heads (of all sequences), each with the ``group`` query heads that share it.
    """

    see: Visibility
    softmax_scale: float
    softcap: float
    slopes: Tensor | None  # (n, group, 1, 1)
    dropout_p: float
    rng_state: Tensor | None
    heads: Tensor  # (n, group): sequence * heads_q + head_q

    @classmethod
    def of(cls, q: Tensor, k: Tensor, options: Options, sequences: Tensor | None) -> Scores:
        """For all heads of q (batch, seqlen_q, heads_q, d) and k (batch, seqlen_k, heads_k, d).

        sequences: (batch,), the number of each batch entry among all sequences; None: 0, 1, ...
        """
        batch, _, heads_q, _ = q.shape
        by_key_head = batch * k.shape[2], heads_q // k.shape[2]
        if sequences is None:
            sequences = arange(batch)
        slopes = options.alibi_slopes
        if slopes is not None:
            slopes = slopes.expand(heads_q) if slopes.dim() == 1 else slopes[sequences]
            slopes = slopes.expand(batch, heads_q).to(compute_dtype(q))
            slopes = slopes.reshape(*by_key_head, 1, 1)
        if options.dropout_p > 0 and options.rng_state is None:
            raise RuntimeError(
                f"rng_state: dropout_p = {options.dropout_p} needs the (seed, offset) that the"
                " forward pass used; got None"
            )
        return cls(
            Visibility.of(q.shape[1], k.shape[1], options),
            options.softmax_scale,
            options.softcap,
            slopes,
            0.0 if keeps_all(options) else options.dropout_p,
            options.rng_state,
            (sequences[:, None] * heads_q + arange(heads_q)).view(by_key_head),
        )

    def part(self, part: slice | Tensor) -> Scores:
        """The same for some of the key heads, which may be given by their numbers."""
        slopes = None if self.slopes is None else self.slopes[part]
        return replace(self, slopes=slopes, heads=self.heads[part])

    @property
    def dropout_scale(self) -> float:
        """The factor of the weights that are kept."""
        return 1 / (1 - self.dropout_p)

    def tile(
        self, q_tile: Tensor, k_tile: Tensor, rows: slice, cols: slice
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The scores of a tile, -inf where hidden; what is hidden; the tanh of softcap.

        q_tile (n, group * rows, d), scaled; k_tile (n, cols, d); results (n, group * rows, cols),
        hidden (group * rows, cols).  No hidden keys: None; no softcap: None.
        """
        s, tanh = q_tile @ k_tile.mT, None
        if self.softcap > 0:
            tanh = s.mul_(1 / self.softcap).tanh_()
            s = tanh * self.softcap
        if self.slopes is not None:
            distance = self.see.distance(rows, cols).abs_().to(s.dtype)
            by_head = s.view(*self.heads.shape, *distance.shape)
            by_head.addcmul_(self.slopes, distance, value=-1)
        hidden = self.see.hidden(rows, cols)
        if hidden is not None:
            hidden = hidden.repeat(self.heads.shape[1], 1)
            s.masked_fill_(hidden, -math.inf)
        return s, hidden, tanh

    def keep(self, rows: slice, cols: slice) -> Tensor | None:
        """Which weights of a tile dropout keeps, bool (n, group * rows, cols); None: all."""
        if self.dropout_p == 0:
            return None
        assert self.rng_state is not None  # ``of`` has seen to it
        keep = philox.keep_mask(self.rng_state, self.dropout_p, self.heads.flatten(), rows, cols)
        return keep.unflatten(0, self.heads.shape).flatten(1, 2)


def keeps_all(options: Options) -> bool:
    """Whether dropout keeps every weight."""
    return philox.kept_values(options.dropout_p) == philox.ALL_KEPT


def are_plain(options: Options) -> bool:
    """Whether scores are q k^T as it is, and all weights are kept."""
    return options.softcap == 0 and options.alibi_slopes is None and keeps_all(options)


def arange(*bounds: int) -> Tensor:
    """torch.arange, int64 on the CPU whatever the defaults are."""
    return torch.arange(*bounds, dtype=torch.int64, device="cpu")


def compute_dtype(x: Tensor) -> torch.dtype:
    """fp64 for fp64, else fp32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def own(x: Tensor) -> Tensor:
    """Contiguous x, no copy, but no view to autograd: callers may change a result in place."""
    return torch.ops.aten._unsafe_view(x, x.shape)


def blocks(whole: slice, size: int) -> list[slice]:
    """whole in blocks of at most size."""
    starts = range(whole.start, whole.stop, size)
    return [slice(start, min(start + size, whole.stop)) for start in starts]


def _aligned(begin: int, end: int, block: int) -> slice:
    if begin >= end:
        return slice(0, 0)
    return slice(begin // block * block, end)
