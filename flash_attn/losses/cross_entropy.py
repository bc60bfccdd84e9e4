"""Cross entropy as a module.  The work is done by ``ops.triton.cross_entropy``."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor, nn

from flash_attn.ops.triton.cross_entropy import cross_entropy_loss

__all__ = ["CrossEntropyLoss"]

REDUCTIONS = "mean", "sum", "none"


class CrossEntropyLoss(nn.Module):
    """``cross_entropy_loss`` with a reduction over the rows, in the place of nn.CrossEntropyLoss.

    Args:
        reduction: "mean", over the rows whose label is not ignore_index: NaN if there are none, as of
            nn.CrossEntropyLoss; "sum"; or "none", for (rows,).
        return_z_loss: return (loss, z loss), both reduced.  The loss contains the z loss, which alone
            carries no gradient.

    The other arguments are those of ``ops.triton.cross_entropy.cross_entropy_loss``.
    """

    def __init__(
        self,
        ignore_index: int = -100,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        logit_scale: float = 1.0,
        lse_square_scale: float = 0.0,
        inplace_backward: bool = False,
        process_group: dist.ProcessGroup | None = None,
        return_z_loss: bool = False,
    ) -> None:
        super().__init__()
        if reduction not in REDUCTIONS:
            raise NotImplementedError(f"reduction must be one of {REDUCTIONS}; got {reduction!r}")
        self.ignore_index = ignore_index
        self.reduction = reduction
        self.label_smoothing = label_smoothing
        self.logit_scale = logit_scale
        self.lse_square_scale = lse_square_scale
        self.inplace_backward = inplace_backward
        self.process_group = process_group
        self.return_z_loss = return_z_loss

    def forward(
        self, input: Tensor, target: Tensor, precomputed_lse: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """The loss, in fp32 (fp64 for fp64), or with return_z_loss (loss, z loss).

        Args:
            input: (rows, vocab), any floating dtype.
            target: (rows,), int32 or int64.
            precomputed_lse: (rows,): see ``cross_entropy_loss``.
        """
        loss, z_loss = cross_entropy_loss(
            input,
            target,
            precomputed_lse,
            self.label_smoothing,
            self.logit_scale,
            self.lse_square_scale,
            self.ignore_index,
            self.inplace_backward,
            self.process_group,
        )
        if self.reduction != "none":
            loss, z_loss = loss.sum(), z_loss.sum()
        if self.reduction == "mean":
            counted = (target != self.ignore_index).sum()
            loss, z_loss = loss / counted, z_loss / counted
        return (loss, z_loss) if self.return_z_loss else loss
