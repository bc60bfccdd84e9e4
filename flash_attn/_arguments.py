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
