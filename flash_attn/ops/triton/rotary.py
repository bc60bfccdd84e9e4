"""Rotary position embedding of one tensor: a Triton kernel on CUDA, torch elsewhere.

Used by ``layers.rotary``, which adds the gradients.  Both paths compute in fp32 (fp64 for fp64) and
round once.
"""

import os
from contextlib import nullcontext

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from flash_attn._checks import resolve_integer
from flash_attn._modes import can_launch_on
from flash_attn._overlap import check_not_overlapping_itself

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

__all__ = ["apply_rotary"]

MAX_HEAD_DIM = 256
# One program rotates a tile of rows with one reading of the tables, for a few heads.
TILE_ELEMENTS = 1024
HEADS_PER_PROGRAM = 4


@torch.no_grad()
def apply_rotary(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    seqlen_offsets: int | Tensor = 0,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    interleaved: bool = False,
    inplace: bool = False,
    conjugate: bool = False,
) -> Tensor:
    """Rotates the first rotary_dim dimensions of every head by angles that grow with the position.

    The pair (a, b) at position p becomes (a cos[p] - b sin[p], a sin[p] + b cos[p]); the other
    dimensions stay.  The token at index i of sequence n has the position seqlen_offsets[n] + i.
    The result carries no gradient: ``flash_attn.layers.rotary.apply_rotary_emb`` is this operation
    with one.

    Args:
        x: (batch, seqlen, heads, head_dim), or with cu_seqlens (total, heads, head_dim); any
            floating dtype and strides.
        cos, sin: (seqlen_rotary, rotary_dim / 2), floating dtype, on x's device; rotary_dim is at
            most head_dim.
        seqlen_offsets: the position of each sequence's first token: one for all, or (batch,), int32
            or int64.
        cu_seqlens: (batch + 1,), int32: where each sequence begins in a ragged x.  Rows beyond the
            last entry stay.
        max_seqlen: length of the longest sequence of a ragged x; it only divides the work.
        interleaved: the pairs are dimensions (0, 1), (2, 3), ... rather than (0, rotary_dim / 2),
            (1, rotary_dim / 2 + 1), ...
        inplace: change x and return it; x must not overlap itself in memory.
        conjugate: rotate the other way.

    Returns:
        x's shape and dtype.

    Raises:
        RuntimeError: a wrong shape, dtype or device, or a position outside the tables.  Positions
            that a tensor gives are looked at on the CPU, and elsewhere with
            FLASH_ATTN_CHECK_DEVICE_DATA=1 in the environment; unchecked, a token beyond the tables
            stays as it is.
    """
    if not isinstance(seqlen_offsets, Tensor):
        seqlen_offsets = resolve_integer("seqlen_offsets", seqlen_offsets)
    _check(x, cos, sin, seqlen_offsets, cu_seqlens)
    if inplace:
        check_not_overlapping_itself("x", x)
    rotary_dim = 2 * cos.shape[1]
    out = x if inplace else torch.empty_like(x)
    if not inplace and rotary_dim < x.shape[-1]:
        out[..., rotary_dim:].copy_(x[..., rotary_dim:])
    if x.numel() > 0 and rotary_dim > 0:
        has_kernel = x.is_cuda and triton is not None and can_launch_on(x)
        rotate = _rotate_triton if has_kernel else _rotate_torch
        rotate(
            out, x, cos, sin, seqlen_offsets, cu_seqlens, max_seqlen, bool(interleaved), conjugate
        )
    return out


def _rotate_torch(
    out: Tensor,
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    seqlen_offsets: int | Tensor,
    cu_seqlens: Tensor | None,
    max_seqlen: int | None,
    interleaved: bool,
    conjugate: bool,
) -> None:
    """Writes the rotated dimensions to out, which may be x."""
    wide = torch.promote_types(x.dtype, torch.float32)
    tables = (cos.to(wide), -sin.to(wide) if conjugate else sin.to(wide))
    if cu_seqlens is None and not isinstance(seqlen_offsets, Tensor):
        c, s = (table[seqlen_offsets : seqlen_offsets + x.shape[1]] for table in tables)
    else:
        positions = _positions(x, seqlen_offsets, cu_seqlens)
        inside = ((positions >= 0) & (positions < cos.shape[0])).unsqueeze(-1)
        c, s = (table[positions.clamp(0, cos.shape[0] - 1)] for table in tables)
        c, s = torch.where(inside, c, 1.0), torch.where(inside, s, 0.0)
    c, s = c.unsqueeze(-2), s.unsqueeze(-2)  # (..., seqlen, 1, rotary_dim / 2)

    half = cos.shape[1]
    if interleaved:
        first, second = slice(0, 2 * half, 2), slice(1, 2 * half, 2)
    else:
        first, second = slice(0, half), slice(half, 2 * half)
    a, b = x[..., first].to(wide), x[..., second].to(wide)
    rotated = a * c - b * s, a * s + b * c  # both are read before either is written
    out[..., first].copy_(rotated[0])
    out[..., second].copy_(rotated[1])


def _positions(x: Tensor, seqlen_offsets: int | Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """(batch, seqlen) or (total,): each token's position; -1 beyond the sequences of a ragged x."""
    if cu_seqlens is None:
        assert isinstance(seqlen_offsets, Tensor)  # one for all needs no positions
        index = torch.arange(x.shape[1], device=x.device)
        return seqlen_offsets[:, None] + index
    index = torch.arange(x.shape[0], device=x.device)
    sequences = cu_seqlens.numel() - 1
    sequence = torch.searchsorted(cu_seqlens, index, right=True) - 1
    inside = (sequence >= 0) & (sequence < sequences)
    sequence = sequence.clamp(0, max(sequences - 1, 0))
    position = index - cu_seqlens[sequence]
    if not isinstance(seqlen_offsets, Tensor):
        position = position + seqlen_offsets
    elif sequences > 0:
        position = position + seqlen_offsets[sequence]
    return torch.where(inside, position, -1)


def _rotate_triton(
    out: Tensor,
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    seqlen_offsets: int | Tensor,
    cu_seqlens: Tensor | None,
    max_seqlen: int | None,
    interleaved: bool,
    conjugate: bool,
) -> None:
    """``_rotate_torch`` in one launch."""
    ragged = cu_seqlens is not None
    heads, half = x.shape[-2], cos.shape[1]
    sequences = x.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1
    rows = x.shape[0] if ragged else x.shape[1]
    longest = rows
    if ragged and max_seqlen is not None:
        longest = resolve_integer("max_seqlen", max_seqlen)
    elif ragged:
        longest = triton.cdiv(rows, max(sequences, 1))
    # In a ragged x, what follows the last sequence is one more, which is copied.
    groups = sequences + 1 if ragged and out is not x else sequences
    block_k = triton.next_power_of_2(half)
    block_m = min(128, max(1, TILE_ELEMENTS // block_k))
    blocks_m = max(1, triton.cdiv(longest, block_m))
    blocks_h = triton.cdiv(heads, HEADS_PER_PROGRAM)
    cos = cos if cos.stride(1) == 1 else cos.contiguous()
    sin = sin if sin.stride(1) == 1 else sin.contiguous()
    has_offsets = isinstance(seqlen_offsets, Tensor)
    with torch.cuda.device(x.device) if x.is_cuda else nullcontext():
        _rotary_kernel[(blocks_m * blocks_h * groups,)](
            out,
            x,
            cos,
            sin,
            cu_seqlens,
            seqlen_offsets if has_offsets else None,
            0 if has_offsets else seqlen_offsets,
            rows,
            heads,
            sequences,
            half,
            cos.shape[0],
            blocks_m,
            blocks_h,
            *((0, *out.stride()) if ragged else out.stride()),
            *((0, *x.stride()) if ragged else x.stride()),
            cos.stride(0),
            sin.stride(0),
            IS_RAGGED=ragged,
            HAS_OFFSETS=has_offsets,
            INTERLEAVED=interleaved,
            CONJUGATE=bool(conjugate),
            WIDE=tl.float64 if x.dtype == torch.float64 else tl.float32,
            BLOCK_M=block_m,
            BLOCK_K=block_k,
            BLOCK_H=HEADS_PER_PROGRAM,
        )


if triton is not None:

    @triton.jit(do_not_specialize=["offset", "rows", "sequences", "seqlen_rotary", "blocks_m"])
    def _rotary_kernel(
        OUT,  # like X
        X,  # (batch, rows, heads, head_dim); ragged: (rows, heads, head_dim)
        COS,  # (seqlen_rotary, half)
        SIN,  # (seqlen_rotary, half)
        CU_SEQLENS,  # (sequences + 1,)
        OFFSETS,  # (sequences,)
        offset,
        rows,
        heads,
        sequences,
        half,
        seqlen_rotary,
        blocks_m,
        blocks_h,
        out_batch,
        out_row,
        out_head,
        out_dim,
        x_batch,
        x_row,
        x_head,
        x_dim,
        cos_row,
        sin_row,
        IS_RAGGED: tl.constexpr,
        HAS_OFFSETS: tl.constexpr,
        INTERLEAVED: tl.constexpr,
        CONJUGATE: tl.constexpr,
        WIDE: tl.constexpr,
        BLOCK_M: tl.constexpr,
        BLOCK_K: tl.constexpr,
        BLOCK_H: tl.constexpr,
    ):
        # One axis of the grid holds all: the others end at 65535.
        program = tl.program_id(0)
        block_m = program % blocks_m
        block_h = (program // blocks_m) % blocks_h
        sequence = program // (blocks_m * blocks_h)

        begin = 0
        length = rows
        table_rows = seqlen_rotary
        if IS_RAGGED:
            is_sequence = sequence < sequences
            begin = tl.load(CU_SEQLENS + sequence)
            end = tl.load(CU_SEQLENS + sequence + 1, mask=is_sequence, other=rows)
            length = tl.minimum(end, rows) - begin
            # Beyond the last sequence every token is outside the tables, and stays.
            table_rows = tl.where(is_sequence, seqlen_rotary, 0)
        if HAS_OFFSETS:
            first = tl.load(OFFSETS + sequence, mask=sequence < sequences, other=0).to(tl.int32)
        else:
            first = offset

        k = tl.arange(0, BLOCK_K)
        kk = tl.arange(0, 2 * BLOCK_K)
        x_base = X + sequence.to(tl.int64) * x_batch
        out_base = OUT + sequence.to(tl.int64) * out_batch
        last_head = tl.minimum((block_h + 1) * BLOCK_H, heads)

        # Dense: one pass.  Ragged: more where a sequence is longer than max_seqlen says.
        for m in range(block_m * BLOCK_M, length, blocks_m * BLOCK_M):
            index = m + tl.arange(0, BLOCK_M)
            inside = (index < length)[:, None]
            position = index + first
            in_table = inside & ((position >= 0) & (position < table_rows))[:, None]
            in_table = in_table & (k < half)[None, :]
            cos_at = COS + position.to(tl.int64)[:, None] * cos_row + k[None, :]
            sin_at = SIN + position.to(tl.int64)[:, None] * sin_row + k[None, :]
            c = tl.load(cos_at, mask=in_table, other=1.0).to(WIDE)
            s = tl.load(sin_at, mask=in_table, other=0.0).to(WIDE)
            if CONJUGATE:
                s = -s

            row = (begin + index).to(tl.int64)[:, None]
            for head in range(block_h * BLOCK_H, last_head):
                x_at = x_base + row * x_row + tl.cast(head, tl.int64) * x_head
                out_at = out_base + row * out_row + tl.cast(head, tl.int64) * out_head
                if INTERLEAVED:
                    # Whole vectors are read; the pairs are told apart in registers.
                    valid = inside & (kk < 2 * half)[None, :]
                    pairs = tl.load(x_at + kk[None, :] * x_dim, mask=valid, other=0.0).to(WIDE)
                    a, b = tl.split(tl.reshape(pairs, (BLOCK_M, BLOCK_K, 2)))
                    rotated = tl.join(a * c - b * s, a * s + b * c)
                    rotated = tl.reshape(rotated, (BLOCK_M, 2 * BLOCK_K))
                    tl.store(out_at + kk[None, :] * out_dim, rotated, mask=valid)
                else:
                    valid = inside & (k < half)[None, :]
                    a_at = x_at + k[None, :] * x_dim
                    b_at = x_at + (k + half)[None, :] * x_dim
                    a = tl.load(a_at, mask=valid, other=0.0).to(WIDE)
                    b = tl.load(b_at, mask=valid, other=0.0).to(WIDE)
                    tl.store(out_at + k[None, :] * out_dim, a * c - b * s, mask=valid)
                    tl.store(out_at + (k + half)[None, :] * out_dim, a * s + b * c, mask=valid)


def _check(
    x: Tensor, cos: Tensor, sin: Tensor, seqlen_offsets: int | Tensor, cu_seqlens: Tensor | None
) -> None:
    if cu_seqlens is None and x.dim() != 4:
        raise RuntimeError(
            f"x must have shape (batch, seqlen, heads, head_dim); got {tuple(x.shape)}"
        )
    if cu_seqlens is not None and x.dim() != 3:
        raise RuntimeError(
            f"x must have shape (total, heads, head_dim) with cu_seqlens; got {tuple(x.shape)}"
        )
    if cos.dim() != 2 or cos.shape != sin.shape:
        raise RuntimeError(
            "cos and sin must have one shape (seqlen_rotary, rotary_dim / 2); got"
            f" cos = {tuple(cos.shape)}, sin = {tuple(sin.shape)}"
        )
    if 2 * cos.shape[1] > x.shape[-1]:
        raise RuntimeError(
            f"cos: rotary_dim must be at most x's head_dim; got rotary_dim = {2 * cos.shape[1]},"
            f" head_dim = {x.shape[-1]}"
        )
    if x.shape[-1] > MAX_HEAD_DIM:
        raise RuntimeError(f"x: head_dim must be at most {MAX_HEAD_DIM}; got {x.shape[-1]}")
    for name, tensor in (("x", x), ("cos", cos), ("sin", sin)):
        if not tensor.is_floating_point():
            raise RuntimeError(f"{name} must have a floating dtype; got {tensor.dtype}")
    others = {"cos": cos, "sin": sin}
    if cu_seqlens is not None:
        others["cu_seqlens"] = cu_seqlens
    if isinstance(seqlen_offsets, Tensor):
        others["seqlen_offsets"] = seqlen_offsets
    for name, tensor in others.items():
        if tensor.device != x.device:
            raise RuntimeError(f"{name} must be on x's device {x.device}; got {tensor.device}")
    if cu_seqlens is not None and (
        cu_seqlens.dtype != torch.int32 or cu_seqlens.dim() != 1 or cu_seqlens.numel() == 0
    ):
        raise RuntimeError(
            "cu_seqlens must have shape (batch + 1,) and dtype int32; got"
            f" {tuple(cu_seqlens.shape)}, {cu_seqlens.dtype}"
        )
    if cu_seqlens is not None and not cu_seqlens.is_contiguous():
        raise RuntimeError("cu_seqlens must be contiguous")
    _check_positions(x, cos.shape[0], seqlen_offsets, cu_seqlens)


def _check_positions(
    x: Tensor, seqlen_rotary: int, seqlen_offsets: int | Tensor, cu_seqlens: Tensor | None
) -> None:
    batch = x.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1
    if isinstance(seqlen_offsets, Tensor):
        if seqlen_offsets.shape != (batch,) or seqlen_offsets.dtype not in (
            torch.int32,
            torch.int64,
        ):
            raise RuntimeError(
                f"seqlen_offsets must have shape (batch,) = ({batch},) and dtype int32 or int64;"
                f" got {tuple(seqlen_offsets.shape)}, {seqlen_offsets.dtype}"
            )
    elif cu_seqlens is None and not 0 <= seqlen_offsets <= seqlen_rotary - x.shape[1]:
        raise RuntimeError(
            "cos and sin are too short, or seqlen_offsets is negative: got"
            f" seqlen_rotary = {seqlen_rotary}, seqlen_offsets = {seqlen_offsets},"
            f" seqlen = {x.shape[1]}"
        )

    if batch == 0 or not _may_look_at_data(x):
        return
    lengths: int | Tensor = x.shape[1]
    if cu_seqlens is not None:
        lengths = cu_seqlens.diff()
        if int(cu_seqlens[0]) != 0 or bool((lengths < 0).any()) or int(cu_seqlens[-1]) > x.shape[0]:
            raise RuntimeError(
                "cu_seqlens must begin with 0, never decrease and end within x; got"
                f" {cu_seqlens.tolist()} for {x.shape[0]} rows"
            )
    elif not isinstance(seqlen_offsets, Tensor):
        return
    starts = torch.as_tensor(seqlen_offsets, device=x.device)
    if bool((starts < 0).any()) or int((starts + lengths).max()) > seqlen_rotary:
        raise RuntimeError(
            "seqlen_offsets: a position is outside cos and sin; got seqlen_rotary ="
            f" {seqlen_rotary}, seqlen_offsets = {seqlen_offsets}"
        )


def _may_look_at_data(x: Tensor) -> bool:
    if torch.compiler.is_compiling() or isinstance(x, FakeTensor):
        return False
    asked = os.environ.get("FLASH_ATTN_CHECK_DEVICE_DATA", "0") not in ("", "0")
    return x.device.type == "cpu" or (x.is_cuda and asked)
