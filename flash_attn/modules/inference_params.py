"""Where generation with a KV cache stands."""

from dataclasses import dataclass, field

from torch import Tensor

__all__ = ["InferenceParams"]


@dataclass
class InferenceParams:
    """Where generation stands.  ``MHA`` reads it and keeps its keys and values in it.

    ``MHA`` takes any object with these fields.
    """

    max_seqlen: int  # positions that a cache holds
    max_batch_size: int
    seqlen_offset: int = 0  # tokens in the cache already; the caller counts it up
    batch_size_offset: int = 0  # this call's batch starts at this entry of the cache
    key_value_memory_dict: dict[int, Tensor] = field(default_factory=dict)  # by layer_idx
    lengths_per_sample: Tensor | None = None  # (max_batch_size,), int32, where lengths differ

    def reset(self, max_seqlen: int, max_batch_size: int) -> None:
        """Starts new sequences in the same memory."""
        self.max_seqlen = max_seqlen
        self.max_batch_size = max_batch_size
        self.seqlen_offset = 0
        if self.lengths_per_sample is not None:
            self.lengths_per_sample.zero_()
