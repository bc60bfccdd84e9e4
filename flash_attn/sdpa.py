"""torch's own attention on our kernels: opt-in, for models that only know torch's functions.

    import flash_attn.sdpa

    flash_attn.sdpa.activate()
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # runs flash_attn's kernels
    torch.nn.attention.restore_flash_attention_impl()  # torch's again

It replaces the kernels behind torch's FLASH_ATTENTION backend on CUDA, which serve

- ``F.scaled_dot_product_attention`` in fp16 and bf16 with head dimensions up to 256, with
  ``is_causal``, ``dropout_p``, ``scale`` and ``enable_gqa``, for dense and for nested (jagged)
  tensors, forward and backward;
- ``torch.nn.attention.varlen.varlen_attn``, with its window.

torch goes on choosing the backend of a call: one with an ``attn_mask``, with ``is_causal`` for
different numbers of queries and keys, in fp32, or with a head dimension of the values of its own
still takes another.  On GPUs where torch prefers cuDNN to FLASH_ATTENTION, cuDNN's backend is off
while ours is active; ``torch.nn.attention.sdpa_kernel`` overrides this as ever.
"""

import torch
import torch.nn.attention
from torch import Tensor

from flash_attn import _ops
from flash_attn._autograd import maybe_contiguous

__all__ = ["NAME", "activate", "register"]

# The name in torch.nn.attention.list_flash_attention_impls().
NAME = "flash_attn"


def register() -> None:
    """Makes torch know the implementation, without using it.

    ``torch.nn.attention.activate_flash_attention_impl("flash_attn")`` does, later.

    Raises:
        RuntimeError: this torch has no register_flash_attention_impl (torch 2.11 has).
    """
    add = getattr(torch.nn.attention, "register_flash_attention_impl", None)
    if add is None:
        raise RuntimeError(
            "flash_attn.sdpa needs torch.nn.attention.register_flash_attention_impl, which torch"
            f" {torch.__version__} lacks"
        )
    add(NAME, register_fn=_Active)


def activate() -> None:
    """Makes torch's FLASH_ATTENTION backend run on our kernels, in this process.

    Raises:
        RuntimeError: as ``register``, or the CUDA extension is not built.
    """
    register()
    torch.nn.attention.activate_flash_attention_impl(NAME)


class _Active:
    """What torch holds while the implementation is active, and removes to restore its own."""

    def __init__(self, dispatch_key: str = "CUDA") -> None:
        if dispatch_key == "CUDA" and _ops.extension is None:
            raise RuntimeError(
                "flash_attn.sdpa needs the compiled extension flash_attn_2_cuda:"
                " `python3 -m flash_attn` reports what is missing"
            )
        # All of torch's entries, dense and nested, come down to these two operators.
        library = torch.library.Library("aten", "IMPL", dispatch_key)
        library.impl("_flash_attention_forward", _forward)
        library.impl("_flash_attention_backward", _backward)
        self._library: torch.library.Library | None = library
        self._cudnn_was_enabled = torch.backends.cuda.cudnn_sdp_enabled()
        torch.backends.cuda.enable_cudnn_sdp(False)

    def remove(self) -> None:
        """Gives torch its kernels back."""
        if self._library is not None:
            self._library = None  # unregisters
            torch.backends.cuda.enable_cudnn_sdp(self._cudnn_was_enabled)


def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cum_seq_q: Tensor | None,
    cum_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    return_debug_mask: bool,
    *,
    scale: float | None = None,
    window_size_left: int | None = None,
    window_size_right: int | None = None,
    seqused_k: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    block_table: Tensor | None = None,
    num_splits: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """aten::_flash_attention_forward -> (out, logsumexp, rng_state, unused, debug_attn_mask).

    Dense: (batch, seqlen, heads, head_dim); with cum_seq (total, heads, head_dim).
    """
    ragged = cum_seq_q is not None
    if return_debug_mask:
        raise RuntimeError("flash_attn.sdpa: return_debug_mask is not supported")
    if value.shape[-1] != query.shape[-1]:
        raise RuntimeError(
            "flash_attn.sdpa: value must have the head_dim of query, which torch takes for out's;"
            f" got {value.shape[-1]} and {query.shape[-1]}. flash_attn_func has no such limit"
        )
    if ragged != (cum_seq_k is not None):
        raise RuntimeError("flash_attn.sdpa: cum_seq_q and cum_seq_k must be given together")
    if not ragged and (seqused_k is not None or block_table is not None):
        raise RuntimeError("flash_attn.sdpa: seqused_k and block_table need cum_seq_q")

    options = (
        dropout_p,
        query.shape[-1] ** -0.5 if scale is None else scale,
        is_causal,
        -1 if window_size_left is None else window_size_left,
        -1 if window_size_right is None else window_size_right,
        0.0,
        alibi_slopes,
        False,
    )
    if ragged:
        lengths = cum_seq_q, cum_seq_k, max_q, max_k
        keys = block_table, None, seqused_k
        results = _ops.varlen_forward(query, key, value, *lengths, *options, *keys)
    else:
        results = _ops.forward(query, key, value, *options)
    out, logsumexp, _, rng_state = results

    # torch.compile counts on the layout of the query.
    result = torch.empty_like(query)
    if result.stride() == out.stride():
        result = out
    else:
        result.copy_(out)
    unused = query.new_empty((), dtype=torch.uint64)
    state = rng_state.view(torch.uint64) if dropout_p > 0.0 else unused.new_empty(2)
    return result, logsumexp, state, unused, query.new_empty(0)


def _backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    cum_seq_q: Tensor | None,
    cum_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    rng_state: Tensor,
    unused: Tensor,
    *,
    scale: float | None = None,
    window_size_left: int | None = None,
    window_size_right: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """aten::_flash_attention_backward -> gradients of query, key, value in their layouts."""
    grads = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
    saved = maybe_contiguous(grad_out), query, key, value, out, logsumexp, *grads
    options = (
        dropout_p,
        query.shape[-1] ** -0.5 if scale is None else scale,
        is_causal,
        -1 if window_size_left is None else window_size_left,
        -1 if window_size_right is None else window_size_right,
        0.0,
        None,
        torch.are_deterministic_algorithms_enabled(),
        rng_state.view(torch.int64) if dropout_p > 0.0 else None,
    )
    if cum_seq_q is None:
        _ops.backward(*saved, *options, return_softmax_d=False)
    else:
        lengths = cum_seq_q, cum_seq_k, max_q, max_k
        _ops.varlen_backward(*saved, *lengths, *options, return_softmax_d=False)
    return grads
