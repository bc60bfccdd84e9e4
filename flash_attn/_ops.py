"""The operators: arguments, schemas, shape functions, and who implements them on which device.

Four operators have the names and the arguments of flash-attn 2.8, the package whose API this one has
("upstream"): code that is written for these names finds them in a profile, in a compiled graph and
in a checkpoint policy.  Ours follow upstream's arguments, with defaults.

The CPU implementation is ``cpu.register``.  The CUDA implementation comes with the compiled extension
``flash_attn_2_cuda``, which registers itself when it is imported.  Without it everything but a call
on CUDA tensors works.

``cpu.register`` is imported last, because it needs this file.  The files of checks and ``cpu.scores``
are imported before this file is complete: they import it for type checkers alone.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from flash_attn.cpu.scores import compute_dtype

__all__ = [
    "Cache",
    "Lengths",
    "Options",
    "backward",
    "backward_functional",
    "extension",
    "forward",
    "kvcache",
    "kvcache_append",
    "merge_states",
    "varlen_backward",
    "varlen_backward_functional",
    "varlen_forward",
]


# What the layers of this package hand on instead of long rows of arguments.


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


# Shapes.  Dense: q, dout, out (batch, seqlen_q, heads_q, head_dim); k, v (batch, seqlen_k, heads_k,
# head_dim); softmax_lse and its gradient dlse (batch, heads_q, seqlen_q).  varlen: q, dout, out
# (total_q, heads_q, head_dim); k, v (total_k, heads_k, head_dim), or paged (num_blocks, page_size,
# heads_k, head_dim) with block_table (batch, max_blocks); softmax_lse, dlse (heads_q, total_q);
# cu_seqlens (batch + 1,), seqused_k, leftpad_k (batch,).  Integers are int32.  softmax_lse is a natural
# logarithm, +inf for a row that sees no key; fp32, and fp64 for fp64 inputs.  v, dv, out and dout may
# have a head_dim of their own: on CUDA in the forward pass alone, and never in pages.
#
# Options.  shift = seqlen_k - seqlen_q of a sequence; query i sees key j if
# i + shift - left <= j <= i + shift + right; a negative number is no limit, and causal makes right 0.
# Scores are s = softmax_scale * q.k; softcap > 0: softcap * tanh(s / softcap); alibi_slopes (heads_q,)
# or (batch, heads_q), fp32: s - slope * |i + shift - j|.  softmax_scale_tensor and softcap_tensor, of
# one element on any device, take the place of the numbers: the operator reads them, and on CUDA it
# waits for the device to do so.
#
# Dropout.  dropout_p > 0 drops weights (not from softmax_lse) by a random state, int64 (2,), a seed and
# an offset: ``cpu.philox`` says which.  The forward pass draws it from torch's default generator of
# q's device and returns it; a given rng_state is used instead.  Without dropout it is empty, (0,).
#
# Keys.  seqused_k: how many of a sequence's rows of k count; leftpad_k: how many of these are skipped;
# seqlen_k is what remains.  num_splits: as of the cache, for paged keys; otherwise it changes nothing.
# zero_tensors changes nothing: rows of no sequence have out 0 and softmax_lse +inf in any case.
#
# S_dmask (batch, heads_q, max_seqlen_q, max_seqlen_k), both rounded up to S_DMASK_ROUND:
# exp(s - its row's maximum), the sign bit set where dropped, 0 where a query sees no key.  It is empty,
# (0,), unless return_softmax and dropout_p > 0.
#
# deterministic: of the forward operators, what their gradient hands to the backward ones.
#
# Inputs may have any strides with a contiguous last dimension, and so may the dq, dk and dv that the
# backward operators fill; outputs are contiguous.  A gradient that is None is not returned.  The form
# "functional" returns the gradients instead: it is for transforms that cannot follow a change in place.
# softmax_d is rowsum(dout * out), fp32: (batch, heads_q, seqlen_q rounded up to SOFTMAX_D_ROUND), varlen
# (heads_q, total_q + SOFTMAX_D_ROUND * batch), 0 in the padding, all of which comes last; without
# return_softmax_d it is empty, (0,).
#
# The cache: forward only.  q, out and softmax_lse as above, dense or, with cu_seqlens_q, varlen.
# k_cache, v_cache (batch_cache, seqlen_cache, heads_k, head_dim), or with block_table paged; capacity:
# seqlen_cache, or max_blocks * page_size.  Sequence b has the rows 0 to cache_seqlens[b] of its entry
# (cache_batch_idx) or pages, or 0 to cache_seqlen where cache_seqlens is None; its keys are those from
# cache_leftpad on.  The form "append" first writes k and v (batch, seqlen_new, heads_k, head_dim), or with
# cu_seqlens_q (total_q, heads_k, head_dim), behind the last row; those beyond the capacity are an error
# on the CPU and left out on CUDA.  rotary_cos, rotary_sin (seqlen_rotary, rotary_dim / 2): new key j is
# rotated by the position of the row it is written to, query i by cache_seqlens[b] + i, or without causal
# and window by cache_seqlens[b].  num_splits: n > 0 cuts every sequence's keys into n parts by its own
# length alone; 0 leaves it to the kernel; the CPU ignores it.
#
# merge_states: out, softmax_lse of attention to the keys of two parts, dense or varlen; an infinite
# softmax_lse, +inf or -inf, is that of a part without keys.
_QKV = "Tensor q, Tensor k, Tensor v"
_LENGTHS = "Tensor cu_seqlens_q, Tensor cu_seqlens_k, SymInt max_seqlen_q, SymInt max_seqlen_k"
_OPTIONS = (
    "float dropout_p, float softmax_scale, bool causal, SymInt window_size_left,"
    " SymInt window_size_right, float softcap, Tensor? alibi_slopes"
)
_NUMBERS = "Tensor? softmax_scale_tensor=None, Tensor? softcap_tensor=None"
_FORWARD_RESULT = "(Tensor out, Tensor softmax_lse, Tensor S_dmask, Tensor rng_state)"
_GRADIENTS_OF = f"Tensor dout, {_QKV}, Tensor out, Tensor softmax_lse"
_GRADIENTS = "Tensor(a!)? dq, Tensor(b!)? dk, Tensor(c!)? dv"
_BACKWARD_OPTIONS = f"{_OPTIONS}, bool deterministic, Tensor? rng_state=None"
_CACHE = (
    "Tensor? cu_seqlens_q, SymInt max_seqlen_q, Tensor? cache_seqlens, SymInt cache_seqlen,"
    " Tensor? cache_batch_idx, Tensor? cache_leftpad, Tensor? block_table, float softmax_scale,"
    " bool causal, SymInt window_size_left, SymInt window_size_right, float softcap,"
    " Tensor? alibi_slopes, SymInt num_splits"
)
_ROTARY = "Tensor? rotary_cos, Tensor? rotary_sin, bool rotary_interleaved"
SCHEMAS = {
    "_flash_attn_forward": (
        f"({_QKV}, {_OPTIONS}, bool return_softmax, Tensor? rng_state=None, {_NUMBERS},"
        f" bool deterministic=False) -> {_FORWARD_RESULT}"
    ),
    "_flash_attn_varlen_forward": (
        f"({_QKV}, {_LENGTHS}, float dropout_p, float softmax_scale, bool causal,"
        " SymInt window_size_left=-1, SymInt window_size_right=-1, float softcap=0.,"
        " Tensor? alibi_slopes=None, bool return_softmax=False, Tensor? block_table=None,"
        " Tensor? leftpad_k=None, Tensor? seqused_k=None, bool zero_tensors=False,"
        f" SymInt num_splits=0, Tensor? rng_state=None, {_NUMBERS}, bool deterministic=False)"
        f" -> {_FORWARD_RESULT}"
    ),
    "_flash_attn_backward": (
        f"({_GRADIENTS_OF}, {_GRADIENTS}, {_BACKWARD_OPTIONS}, *, Tensor? dlse=None,"
        f" bool return_softmax_d=True, {_NUMBERS}) -> Tensor softmax_d"
    ),
    "_flash_attn_backward.functional": (
        f"({_GRADIENTS_OF}, {_BACKWARD_OPTIONS}, Tensor? dlse=None, {_NUMBERS})"
        " -> (Tensor dq, Tensor dk, Tensor dv)"
    ),
    "_flash_attn_varlen_backward": (
        f"({_GRADIENTS_OF}, {_GRADIENTS}, {_LENGTHS}, {_BACKWARD_OPTIONS}, bool zero_tensors=False,"
        f" *, Tensor? dlse=None, bool return_softmax_d=True, {_NUMBERS}) -> Tensor softmax_d"
    ),
    "_flash_attn_varlen_backward.functional": (
        f"({_GRADIENTS_OF}, {_LENGTHS}, {_BACKWARD_OPTIONS}, Tensor? dlse=None, {_NUMBERS})"
        " -> (Tensor dq, Tensor dk, Tensor dv)"
    ),
    "_flash_attn_kvcache": (
        f"(Tensor q, Tensor k_cache, Tensor v_cache, {_CACHE}, *, {_NUMBERS})"
        " -> (Tensor out, Tensor softmax_lse)"
    ),
    "_flash_attn_kvcache.append": (
        "(Tensor q, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor k, Tensor v,"
        f" {_ROTARY}, {_CACHE}, *, {_NUMBERS}) -> (Tensor out, Tensor softmax_lse)"
    ),
    "merge_states": (
        "(Tensor out_a, Tensor lse_a, Tensor out_b, Tensor lse_b)"
        " -> (Tensor out, Tensor softmax_lse)"
    ),
}

S_DMASK_ROUND = 128
SOFTMAX_D_ROUND = 128


def _define() -> None:
    for name, schema in SCHEMAS.items():
        tags = [torch.Tag.pt2_compliant_tag]
        if name.endswith("forward"):  # it draws dropout's random state
            tags.append(torch.Tag.nondeterministic_seeded)
        torch.library.define(f"flash_attn::{name}", schema, tags=tuple(tags))


_define()

forward = torch.ops.flash_attn._flash_attn_forward.default
varlen_forward = torch.ops.flash_attn._flash_attn_varlen_forward.default
backward = torch.ops.flash_attn._flash_attn_backward.default
backward_functional = torch.ops.flash_attn._flash_attn_backward.functional
varlen_backward = torch.ops.flash_attn._flash_attn_varlen_backward.default
varlen_backward_functional = torch.ops.flash_attn._flash_attn_varlen_backward.functional
kvcache = torch.ops.flash_attn._flash_attn_kvcache.default
kvcache_append = torch.ops.flash_attn._flash_attn_kvcache.append
merge_states = torch.ops.flash_attn.merge_states.default


def round_up(x: int, multiple: int) -> int:
    return (x + multiple - 1) // multiple * multiple


def probabilities_shape(
    q: Tensor, batch: int, max_seqlen_q: int, max_seqlen_k: int
) -> tuple[int, int, int, int]:
    """The shape of S_dmask."""
    rows, cols = (round_up(n, S_DMASK_ROUND) for n in (max_seqlen_q, max_seqlen_k))
    return batch, q.shape[-2], rows, cols


def softmax_d_shape(q: Tensor, batch: int | None) -> tuple[int, ...]:
    """batch: None for q with a batch dimension."""
    if batch is not None:
        return q.shape[1], q.shape[0] + SOFTMAX_D_ROUND * batch
    return q.shape[0], q.shape[2], round_up(q.shape[1], SOFTMAX_D_ROUND)


# What the operators return, for FakeTensor, torch.compile and the meta device.


def out_shape(q: Tensor, v: Tensor) -> tuple[int, ...]:
    """The shape of out, which has v's head_dim."""
    return *q.shape[:-1], v.shape[-1]


def _results_like(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """out and softmax_lse."""
    lse_shape = (q.shape[0], q.shape[2], q.shape[1]) if q.dim() == 4 else (q.shape[1], q.shape[0])
    return q.new_empty(out_shape(q, v)), q.new_empty(lse_shape, dtype=compute_dtype(q))


@torch.library.register_fake("flash_attn::_flash_attn_forward")
def _forward_shapes(
    q, k, v, dropout_p, scale, causal, left, right, cap, slopes, return_softmax, *_, **__
):
    shape = probabilities_shape(q, q.shape[0], q.shape[1], k.shape[1])
    return _forward_results(q, v, dropout_p, return_softmax, shape)


@torch.library.register_fake("flash_attn::_flash_attn_varlen_forward")
def _varlen_forward_shapes(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale,
    causal, left=-1, right=-1, softcap=0.0, alibi_slopes=None, return_softmax=False, *_, **__
):  # fmt: skip
    shape = probabilities_shape(q, cu_seqlens_q.shape[0] - 1, max_seqlen_q, max_seqlen_k)
    return _forward_results(q, v, dropout_p, return_softmax, shape)


def _forward_results(
    q: Tensor, v: Tensor, dropout_p: float, return_softmax: bool, shape: tuple[int, ...]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    has_dropout = dropout_p > 0
    probabilities = q.new_empty(shape if return_softmax and has_dropout else (0,))
    return *_results_like(q, v), probabilities, q.new_empty(2 * has_dropout, dtype=torch.int64)


@torch.library.register_fake("flash_attn::_flash_attn_backward")
def _backward_shapes(dout, q, *_, return_softmax_d=True, **__):
    shape = softmax_d_shape(q, None) if return_softmax_d else (0,)
    return q.new_empty(shape, dtype=compute_dtype(q))


@torch.library.register_fake("flash_attn::_flash_attn_varlen_backward")
def _varlen_backward_shapes(
    dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, *_, return_softmax_d=True, **__
):
    shape = softmax_d_shape(q, cu_seqlens_q.shape[0] - 1) if return_softmax_d else (0,)
    return q.new_empty(shape, dtype=compute_dtype(q))


@torch.library.register_fake("flash_attn::_flash_attn_backward.functional")
@torch.library.register_fake("flash_attn::_flash_attn_varlen_backward.functional")
def _gradient_shapes(dout, q, k, v, *_, **__):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


@torch.library.register_fake("flash_attn::_flash_attn_kvcache")
@torch.library.register_fake("flash_attn::_flash_attn_kvcache.append")
def _kvcache_shapes(q, *_, **__):
    return _results_like(q, q)


@torch.library.register_fake("flash_attn::merge_states")
def _merge_states_shapes(out_a, lse_a, out_b, lse_b):
    return out_a.new_empty(out_a.shape), lse_a.new_empty(lse_a.shape)


import flash_attn.cpu.register  # noqa: E402, F401

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

    for _name in SCHEMAS:
        torch.library.impl(f"flash_attn::{_name}", "CUDA", _raise_not_built)
