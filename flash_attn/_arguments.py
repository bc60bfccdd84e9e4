"""Arguments that the operators take together, in the order of their schemas (``_ops``)."""

from typing import NamedTuple

from torch import Tensor


class Options(NamedTuple):
    """What attention is, beside its tensors."""

    softmax_scale: float
    causal: bool
    window_left: int
    window_right: int
    softcap: float
    alibi_slopes: Tensor | None
    dropout_p: float
    rng_state: Tensor | None


class Lengths(NamedTuple):
    """The sequences in packed rows.  Tensors are int32."""

    cu_seqlens_q: Tensor  # (batch + 1,)
    cu_seqlens_k: Tensor  # (batch + 1,)
    seqused_k: Tensor | None  # (batch,): how many of a sequence's rows of k count
    leftpad_k: Tensor | None  # (batch,): how many of these are skipped
    block_table: Tensor | None  # (batch, max_blocks): the pages of k and v
    max_seqlen_q: int
    max_seqlen_k: int

    @property
    def seqlens_k(self) -> Tensor:
        """(batch,): the number of keys that queries may see."""
        used = self.cu_seqlens_k.diff() if self.seqused_k is None else self.seqused_k
        return used if self.leftpad_k is None else used - self.leftpad_k


class Cache(NamedTuple):
    """Queries and the cached keys that they attend to.  Tensors are int32."""

    cu_seqlens_q: Tensor | None  # (batch + 1,); None: every sequence has as many queries
    max_seqlen_q: int
    cache_seqlens: Tensor | None  # (batch,): how many rows of a sequence are in the cache
    cache_seqlen: int  # the same for all sequences, where cache_seqlens is None
    cache_batch_idx: Tensor | None  # (batch,): a sequence's entry of the cache
    cache_leftpad: Tensor | None  # (batch,): how many of a sequence's first rows are skipped
    block_table: Tensor | None  # (batch, max_blocks): the pages of a sequence
