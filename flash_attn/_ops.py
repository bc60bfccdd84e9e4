"""The operators: schemas, shape functions, and who implements them on which device.

Used by ``_autograd``.  The CPU implementation is ``_reference``; the CUDA implementation comes with
the compiled extension ``flash_attn_2_cuda``, which registers itself when it is imported.  Without
it everything but a call on CUDA tensors works.
"""

import torch
from torch import Tensor

from flash_attn import _reference

__all__ = ["bwd", "extension", "fwd"]

# q, dout, out: (batch, seqlen_q, heads_q, head_dim).  k, v: (batch, seqlen_k, heads_k, head_dim).
# softmax_lse and its gradient dlse: (batch, heads_q, seqlen_q), natural logarithm, +inf for a row
# that sees no key; fp32, and fp64 for fp64 inputs.
# Causal: query i sees key j if j <= i + seqlen_k - seqlen_q.
# Inputs may have any strides with a contiguous last dimension; outputs are contiguous.
torch.library.define(
    "flash_attn::fwd",
    "(Tensor q, Tensor k, Tensor v, float softmax_scale, bool causal)"
    " -> (Tensor out, Tensor softmax_lse)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
torch.library.define(
    "flash_attn::bwd",
    "(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor softmax_lse, Tensor? dlse,"
    " float softmax_scale, bool causal, bool deterministic) -> (Tensor dq, Tensor dk, Tensor dv)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


@torch.library.register_fake("flash_attn::fwd")
def _fwd_fake(
    q: Tensor, k: Tensor, v: Tensor, softmax_scale: float, causal: bool
) -> tuple[Tensor, Tensor]:
    batch, seqlen_q, heads_q, _ = q.shape
    lse_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty(q.shape), q.new_empty((batch, heads_q, seqlen_q), dtype=lse_dtype)


@torch.library.register_fake("flash_attn::bwd")
def _bwd_fake(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    dlse: Tensor | None,
    softmax_scale: float,
    causal: bool,
    deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


torch.library.impl("flash_attn::fwd", "CPU", _reference.attention_forward)
torch.library.impl("flash_attn::bwd", "CPU", _reference.attention_backward)

try:
    import flash_attn_2_cuda as extension
except ImportError as error:
    extension = None
    _not_built = (
        "flash_attn on CUDA tensors needs the compiled extension flash_attn_2_cuda, which could not"
        f" be imported ({error}). Build it where a CUDA toolkit and a CUDA build of torch are"
        " installed, in the source directory: pip install . --no-build-isolation."
        " `python3 -m flash_attn` reports what is installed."
    )

    def _raise_not_built(*args: object, **kwargs: object) -> None:
        raise RuntimeError(_not_built)

    torch.library.impl("flash_attn::fwd", "CUDA", _raise_not_built)
    torch.library.impl("flash_attn::bwd", "CUDA", _raise_not_built)

fwd = torch.ops.flash_attn.fwd.default
bwd = torch.ops.flash_attn.bwd.default
