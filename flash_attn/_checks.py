"""Checks of the public functions' arguments: errors name the argument, what it got and wants.

Used by ``flash_attn_interface`` before anything is launched, alike on every device.  Errors are
RuntimeError, as users of the CUDA package know them.  Only comparisons of sizes and attributes:
cheap, and traceable by torch.compile.
"""

import operator

import torch
from torch import Tensor

MAX_HEAD_DIM = 256

_CUDA_DTYPES = (torch.float16, torch.bfloat16)
_CPU_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def check_qkv(q: Tensor, k: Tensor, v: Tensor) -> None:
    """q (batch, seqlen_q, heads_q, head_dim), k and v (batch, seqlen_k, heads_k, head_dim)."""
    q_shape, k_shape, v_shape = q.shape, k.shape, v.shape
    if len(q_shape) != 4:
        raise RuntimeError(
            f"q must have shape (batch, seqlen_q, heads_q, head_dim); got {_text(q_shape)}"
        )
    if len(k_shape) != 4:
        raise RuntimeError(
            f"k must have shape (batch, seqlen_k, heads_k, head_dim); got {_text(k_shape)}"
        )
    if v_shape != k_shape:
        raise RuntimeError(
            f"v must have the same shape as k; got v = {_text(v_shape)}, k = {_text(k_shape)}"
        )

    batch, _, heads_q, head_dim = q_shape
    batch_k, _, heads_k, head_dim_k = k_shape
    if batch == 0:
        raise RuntimeError(f"q: batch size must be positive; got q = {_text(q_shape)}")
    if batch_k != batch:
        raise RuntimeError(
            f"k: batch must equal q's; got k = {_text(k_shape)}, q = {_text(q_shape)}"
        )
    if head_dim_k != head_dim:
        raise RuntimeError(
            f"k: head_dim must equal q's; got k = {_text(k_shape)}, q = {_text(q_shape)}"
        )
    if head_dim == 0 or head_dim > MAX_HEAD_DIM:
        raise RuntimeError(
            f"q: FlashAttention only supports head dimension at most {MAX_HEAD_DIM}, and at"
            f" least 1; got head_dim = {head_dim} in q = {_text(q_shape)}"
        )
    if heads_k == 0 or heads_q == 0 or heads_q % heads_k != 0:
        raise RuntimeError(
            "k: Number of heads in key/value must divide number of heads in query, and be positive;"
            f" got heads_k = {heads_k}, heads_q = {heads_q}"
        )
    check_dtype_and_device(q, k, v)


def check_dtype_and_device(q: Tensor, k: Tensor, v: Tensor) -> None:
    """q, k and v of one supported dtype on one supported device."""
    dtype, device = q.dtype, q.device
    if device.type == "cuda":
        if dtype not in _CUDA_DTYPES:
            raise RuntimeError(
                f"q: FlashAttention only support fp16 and bf16 data type on CUDA; got {dtype}"
            )
    elif device.type != "cpu" and device.type != "meta":
        raise RuntimeError(f"q must be on CUDA or the CPU; got {device}")
    elif dtype not in _CPU_DTYPES:
        raise RuntimeError(
            "q: FlashAttention only support fp16 and bf16 data type on CUDA, and fp32 and fp64"
            f" besides on the CPU; got {dtype}"
        )
    if k.dtype != dtype:
        raise RuntimeError(f"query and key must have the same dtype; got q {dtype}, k {k.dtype}")
    if v.dtype != dtype:
        raise RuntimeError(f"query and value must have the same dtype; got q {dtype}, v {v.dtype}")
    if k.device != device:
        raise RuntimeError(f"k must be on the same device as q; got k on {k.device}, q on {device}")
    if v.device != device:
        raise RuntimeError(f"v must be on the same device as q; got v on {v.device}, q on {device}")


def check_packed(name: str, x: Tensor, count: int, layout: str) -> None:
    """x (batch, seqlen, count, heads, head_dim)."""
    if len(x.shape) != 5 or x.shape[2] != count:
        raise RuntimeError(f"{name} must have shape {layout}; got {_text(x.shape)}")


def resolve_options(
    dropout_p: float,
    causal: bool,
    window_size: tuple[int, int],
    softcap: float,
    alibi_slopes: Tensor | None,
    seqlen_q: int,
    seqlen_k: int,
) -> bool:
    """Whether the mask is causal; NotImplementedError for an option that a later release brings."""
    if dropout_p != 0.0:
        if not 0.0 <= dropout_p < 1.0:
            raise RuntimeError(
                f"dropout_p must be in [0, 1): Expected p_dropout < 1; got {dropout_p}"
            )
        raise NotImplementedError(_planned("dropout_p > 0", dropout_p))
    if softcap != 0.0:
        if not softcap > 0.0:
            raise RuntimeError(f"softcap must be 0 (off) or positive; got {softcap}")
        raise NotImplementedError(_planned("softcap > 0", softcap))
    if alibi_slopes is not None:
        raise NotImplementedError(_planned("alibi_slopes", "a tensor"))
    if len(window_size) != 2:
        raise RuntimeError(f"window_size must be (left, right); got {window_size}")
    if window_size[0] == -1 and window_size[1] == -1:
        return bool(causal)
    return _resolve_window(causal, window_size, seqlen_q, seqlen_k)


def _resolve_window(
    causal: bool, window_size: tuple[int, int], seqlen_q: int, seqlen_k: int
) -> bool:
    left, right = operator.index(window_size[0]), operator.index(window_size[1])
    # Query i sees keys i + seqlen_k - seqlen_q - left .. i + seqlen_k - seqlen_q + right; negative
    # means unlimited.
    left_is_unlimited = left < 0 or left >= seqlen_k - 1
    right_is_unlimited = not causal and (right < 0 or right >= seqlen_q - 1)
    right_is_causal = causal or right == 0
    if left_is_unlimited and right_is_unlimited:
        return False
    if left_is_unlimited and right_is_causal:
        return True
    raise NotImplementedError(_planned("window_size (sliding window)", (left, right)))


def _planned(argument: str, value: object) -> str:
    return f"{argument} is planned for a later release (the complete training API); got {value}"


def _text(shape: torch.Size) -> str:
    return str(tuple(shape))
