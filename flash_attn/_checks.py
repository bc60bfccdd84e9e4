"""Checks of the public functions' arguments: errors name the argument, what it got and wants.

Used by ``flash_attn_interface`` and ``_upstream`` before anything is launched, alike on every device.
Errors are RuntimeError, as users of the CUDA package know them.  Only comparisons of sizes and
attributes: cheap, and traceable by torch.compile.

``_checks_decode`` has what only decoding needs, ``_checks_data`` what reads tensors of lengths and
pages.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from flash_attn._head_dims import MAX_HEAD_DIM

if TYPE_CHECKING:  # ``_ops`` imports this file
    from flash_attn._ops import Lengths

PAGE_SIZE_MULTIPLE = 16

CUDA_DTYPES = (torch.float16, torch.bfloat16)
CPU_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def check_qkv(q: Tensor, k: Tensor, v: Tensor) -> None:
    """q (batch, seqlen_q, heads_q, head_dim), k and v (batch, seqlen_k, heads_k, head_dim); v may have
    a head_dim of its own."""
    q_shape, k_shape, v_shape = q.shape, k.shape, v.shape
    if len(q_shape) != 4:
        raise RuntimeError(
            f"q must have shape (batch, seqlen_q, heads_q, head_dim); got {shape_text(q_shape)}"
        )
    if len(k_shape) != 4:
        raise RuntimeError(
            f"k must have shape (batch, seqlen_k, heads_k, head_dim); got {shape_text(k_shape)}"
        )
    if v_shape != k_shape:
        check_own_head_dim(v_shape, k_shape)

    if q_shape[0] == 0:
        raise RuntimeError(f"q: batch size must be positive; got q = {shape_text(q_shape)}")
    if k_shape[0] != q_shape[0]:
        raise RuntimeError(
            f"k: batch must equal q's; got k = {shape_text(k_shape)}, q = {shape_text(q_shape)}"
        )
    check_heads(q_shape, k_shape)
    check_dtype_and_device(q, k, v)


def check_own_head_dim(v_shape: torch.Size, k_shape: torch.Size) -> None:
    """v of k's shape, but for a head_dim of its own."""
    if v_shape[:-1] != k_shape[:-1] or len(v_shape) != len(k_shape):
        raise RuntimeError(
            "v must have the same shape as k, head_dim aside; got v ="
            f" {shape_text(v_shape)}, k = {shape_text(k_shape)}"
        )
    if v_shape[-1] == 0 or v_shape[-1] > MAX_HEAD_DIM:
        raise RuntimeError(
            f"v: FlashAttention only supports head dimension at most {MAX_HEAD_DIM}, and at"
            f" least 1; got head_dim = {v_shape[-1]} in v = {shape_text(v_shape)}"
        )


def check_heads(q_shape: torch.Size, k_shape: torch.Size) -> None:
    """q (..., heads_q, head_dim) and k (..., heads_k, head_dim)."""
    heads_q, heads_k, head_dim, head_dim_k = q_shape[-2], k_shape[-2], q_shape[-1], k_shape[-1]
    if head_dim_k != head_dim:
        raise RuntimeError(
            f"k: head_dim must equal q's; got k = {shape_text(k_shape)}, q = {shape_text(q_shape)}"
        )
    check_head_sizes(q_shape, heads_q, heads_k, head_dim, "k")


def check_head_sizes(
    q_shape: torch.Size, heads_q: int, heads_k: int, head_dim: int, name_k: str
) -> None:
    """A head_dim that has a kernel, and heads of q (q_shape) that share those of the keys, name_k."""
    if head_dim == 0 or head_dim > MAX_HEAD_DIM:
        raise RuntimeError(
            f"q: FlashAttention only supports head dimension at most {MAX_HEAD_DIM}, and at"
            f" least 1; got head_dim = {head_dim} in q = {shape_text(q_shape)}"
        )
    if heads_k == 0 or heads_q == 0 or heads_q % heads_k != 0:
        raise RuntimeError(
            f"{name_k}: Number of heads in key/value must divide number of heads in query, and be"
            f" positive; got heads_k = {heads_k}, heads_q = {heads_q}"
        )


def check_dtype_and_device(q: Tensor, k: Tensor, v: Tensor, suffix: str = "") -> None:
    """q, k and v of one supported dtype on one supported device; k and v have suffix in their names."""
    dtype, device = q.dtype, q.device
    if device.type == "cuda":
        if dtype not in CUDA_DTYPES:
            raise RuntimeError(
                f"q: FlashAttention only support fp16 and bf16 data type on CUDA; got {dtype}"
            )
    elif device.type != "cpu" and device.type != "meta":
        raise RuntimeError(f"q must be on CUDA or the CPU; got {device}")
    elif dtype not in CPU_DTYPES:
        raise RuntimeError(
            "q: FlashAttention only support fp16 and bf16 data type on CUDA, and fp32 and fp64"
            f" besides on the CPU; got {dtype}"
        )
    if k.dtype != dtype:
        got = f"got q {dtype}, k{suffix} {k.dtype}"
        raise RuntimeError(f"query and key must have the same dtype; {got}")
    if v.dtype != dtype:
        got = f"got q {dtype}, v{suffix} {v.dtype}"
        raise RuntimeError(f"query and value must have the same dtype; {got}")
    if k.device != device:
        got = f"got k{suffix} on {k.device}, q on {device}"
        raise RuntimeError(f"k{suffix} must be on the same device as q; {got}")
    if v.device != device:
        got = f"got v{suffix} on {v.device}, q on {device}"
        raise RuntimeError(f"v{suffix} must be on the same device as q; {got}")


def check_varlen(q: Tensor, k: Tensor, v: Tensor, lengths: Lengths) -> None:
    """q (total_q, heads_q, head_dim), k and v (total_k, heads_k, head_dim) or, with a block_table,
    (num_blocks, page_size, heads_k, head_dim).  v may have a head_dim of its own, but not in pages."""
    table = lengths.block_table
    if len(q.shape) != 3:
        raise RuntimeError(
            f"q must have shape (total_q, heads_q, head_dim); got {shape_text(q.shape)}"
        )
    if len(k.shape) != (3 if table is None else 4):
        layout = "(total_k, heads_k, head_dim), or with block_table (num_blocks, page_size, ...)"
        raise RuntimeError(f"k must have shape {layout}; got {shape_text(k.shape)}")
    if v.shape != k.shape:
        check_own_head_dim(v.shape, k.shape)
        if table is not None:
            raise RuntimeError(
                "v must have the head_dim of k with a block_table: paged keys and values of different"
                f" head_dims are not supported; got v = {shape_text(v.shape)}, k ="
                f" {shape_text(k.shape)}"
            )
    check_heads(q.shape, k.shape)
    check_dtype_and_device(q, k, v)

    device, batch = q.device, lengths.cu_seqlens_q.numel() - 1
    if batch < 1:
        raise RuntimeError(
            "cu_seqlens_q must have shape (batch_size + 1), and batch size must be positive; got"
            f" {shape_text(lengths.cu_seqlens_q.shape)}"
        )
    check_integers("cu_seqlens_q", lengths.cu_seqlens_q, device, (batch + 1,), "batch_size + 1")
    check_integers("cu_seqlens_k", lengths.cu_seqlens_k, device, (batch + 1,), "batch_size + 1")
    if lengths.seqused_k is not None:
        check_integers("seqused_k", lengths.seqused_k, device, (batch,), "batch_size")
    if lengths.leftpad_k is not None:
        check_integers("leftpad_k", lengths.leftpad_k, device, (batch,), "batch_size")
    if table is not None:
        check_block_table(table, device, batch, "k", k)


def check_block_table(
    table: Tensor, device: torch.device, batch: int, name: str, k: Tensor
) -> None:
    """table (batch, max_blocks); k (num_blocks, page_size, heads_k, head_dim), called name."""
    shape = (batch, table.shape[1] if len(table.shape) == 2 else 1)
    check_integers("block_table", table, device, shape, "batch_size, max_blocks")
    page_size = k.shape[1]
    if page_size == 0 or page_size % PAGE_SIZE_MULTIPLE != 0:
        raise RuntimeError(
            f"{name}: Paged KV cache block size must be divisible by {PAGE_SIZE_MULTIPLE}; got"
            f" page_size = {page_size} in {name} = {shape_text(k.shape)}"
        )


def check_no_dropout_of_pages(block_table: Tensor | None, dropout_p: float) -> None:
    """Paged k and v are for inference."""
    if block_table is not None and dropout_p > 0:
        raise RuntimeError(
            "dropout_p must be 0 with a block_table: paged k and v are for inference and have no"
            f" gradients; got dropout_p = {dropout_p}"
        )


def check_integers(
    name: str, x: Tensor, device: torch.device, shape: tuple[int, ...], meaning: str
) -> None:
    """x int32 of that shape on q's device, its last dimension contiguous."""
    if x.dtype != torch.int32:
        raise RuntimeError(f"{name} must have dtype int32 (torch.int32); got {x.dtype}")
    if x.device != device:
        raise RuntimeError(
            f"{name} must be on CUDA if q is, on q's device; got {name} on {x.device}, q on {device}"
        )
    got = x.shape
    if len(got) != len(shape) or got != shape:
        raise RuntimeError(f"{name} must have shape ({meaning}) = {shape}; got {shape_text(got)}")
    if x.stride()[-1] != 1 and got[-1] > 1:
        raise RuntimeError(f"{name} must be contiguous; got strides {x.stride()}")


def check_packed(name: str, x: Tensor, count: int, layout: str) -> None:
    """x (..., count, heads, head_dim), with as many dimensions as layout says."""
    if len(x.shape) != layout.count(",") + 1 or x.shape[-3] != count:
        raise RuntimeError(f"{name} must have shape {layout}; got {shape_text(x.shape)}")


def check_gradient(name: str, gradient: Tensor, x: Tensor) -> None:
    """A tensor for the gradient of x to be written to."""
    got = gradient.dtype, gradient.device, gradient.shape
    if got != (x.dtype, x.device, x.shape):
        raise RuntimeError(
            f"{name} must have the dtype, device and shape of {name[1:]}: {x.dtype}, {x.device},"
            f" {shape_text(x.shape)}; got {gradient.dtype}, {gradient.device}, {shape_text(gradient.shape)}"
        )
    if gradient.shape[-1] > 1 and gradient.stride(-1) != 1:
        raise RuntimeError(
            f"{name} must have a contiguous last dimension; got strides {gradient.stride()}"
        )


def check_options(
    q: Tensor,
    batch: int,
    dropout_p: float,
    softmax_scale: float | Tensor | None,
    causal: bool,
    window_size: tuple[int, int],
    softcap: float | Tensor,
    alibi_slopes: Tensor | None,
) -> tuple[float | Tensor, bool, int, int, float | Tensor]:
    """(softmax_scale, causal, window_left, window_right, softcap) as the operators take them.

    softmax_scale and softcap that are tensors stay tensors.

    q: any tensor (..., heads_q, head_dim).
    """
    if not 0.0 <= dropout_p < 1.0:
        raise RuntimeError(f"dropout_p must be in [0, 1): Expected p_dropout < 1; got {dropout_p}")
    if isinstance(softcap, Tensor):
        check_number("softcap", softcap)
    else:
        check_softcap(softcap)
    if isinstance(softmax_scale, Tensor):
        check_number("softmax_scale", softmax_scale)
    if alibi_slopes is not None:
        check_alibi_slopes(alibi_slopes, q, batch)
    if len(window_size) != 2:
        raise RuntimeError(f"window_size must be (left, right); got {window_size}")
    left, right = window_size
    if type(left) is not int or type(right) is not int:
        left, right = resolve_integer("window_size", left), resolve_integer("window_size", right)
    if softmax_scale is None:
        softmax_scale = q.shape[-1] ** -0.5
    return softmax_scale, bool(causal), left, right, softcap


def check_number(name: str, x: Tensor) -> None:
    """A tensor that stands for a number."""
    if x.numel() != 1 or x.is_complex() or x.dtype == torch.bool:
        raise RuntimeError(
            f"{name} must be a number, or a tensor of one; got a {x.dtype} {shape_text(x.shape)} tensor"
        )


def check_softcap(softcap: float) -> float:
    """softcap, in range."""
    if not 0.0 <= softcap < math.inf:
        raise RuntimeError(f"softcap must be 0 (off) or positive and finite; got {softcap}")
    return softcap


def read_number(x: float | Tensor) -> float:
    """x, which may be a tensor of one element (on CUDA this waits for the device)."""
    return x.item() if isinstance(x, Tensor) else x


def check_alibi_slopes(alibi_slopes: Tensor, q: Tensor, batch: int) -> None:
    """alibi_slopes (heads_q,) or (batch, heads_q)."""
    heads_q = q.shape[-2]
    if alibi_slopes.dtype != torch.float32:
        raise RuntimeError(
            f"alibi_slopes: ALiBi slopes must have dtype fp32; got {alibi_slopes.dtype}"
        )
    if alibi_slopes.device != q.device:
        raise RuntimeError(
            "alibi_slopes must be on the same device as q; got alibi_slopes on"
            f" {alibi_slopes.device}, q on {q.device}"
        )
    shape = alibi_slopes.shape
    if len(shape) not in (1, 2) or shape not in ((heads_q,), (batch, heads_q)):
        raise RuntimeError(
            f"alibi_slopes must have shape (heads_q,) = ({heads_q},) or (batch, heads_q) ="
            f" ({batch}, {heads_q}); got {shape_text(shape)}"
        )
    if alibi_slopes.stride(-1) != 1 and heads_q > 1:
        raise RuntimeError(
            "alibi_slopes: ALiBi slopes tensor must have contiguous last dimension; got strides"
            f" {alibi_slopes.stride()}"
        )


def resolve_integer(name: str, x: int | Tensor) -> int:
    """x, which may be a 0-dim tensor (on CUDA this waits for the device) or a numpy integer."""
    if isinstance(x, (int, torch.SymInt)):
        return x
    if isinstance(x, Tensor):
        if x.numel() != 1 or x.is_floating_point() or x.is_complex():
            raise RuntimeError(
                f"{name} must be an integer; got a {x.dtype} {shape_text(x.shape)} tensor"
            )
        number: Any = x.item()  # an int, or under torch.compile a SymInt
        return number
    try:
        return operator.index(x)
    except TypeError:
        raise RuntimeError(f"{name} must be an integer; got {x!r}") from None


def shape_text(shape: Sequence[int | str]) -> str:
    return str(tuple(shape))
