"""The operators: schemas, shape functions, and who implements them on which device.

Used by ``_autograd``, ``_decode`` and ``_compat``.  The CPU implementation is the package
``cpu``; the CUDA implementation comes with the compiled
extension ``flash_attn_2_cuda``, which registers itself when it is imported.  Without it everything
but a call on CUDA tensors works.
"""

import torch
from torch import Tensor

from flash_attn._arguments import Cache, Lengths, Options
from flash_attn._checks import check_lengths
from flash_attn._checks_decode import check_cache_contents
from flash_attn.cpu import attention as _reference
from flash_attn.cpu import decode as _reference_decode
from flash_attn.cpu import varlen as _reference_varlen
from flash_attn.cpu.scores import compute_dtype

__all__ = [
    "attn_probs",
    "bwd",
    "bwd_into",
    "decode",
    "decode_append",
    "draw_rng_state",
    "extension",
    "fwd",
    "merge_states",
    "varlen_bwd",
    "varlen_bwd_into",
    "varlen_fwd",
]

# Shapes.  Dense: q, dout, out (batch, seqlen_q, heads_q, head_dim); k, v (batch, seqlen_k, heads_k,
# head_dim); softmax_lse and its gradient dlse (batch, heads_q, seqlen_q).  varlen: q, dout, out
# (total_q, heads_q, head_dim); k, v (total_k, heads_k, head_dim), or paged (num_blocks, page_size,
# heads_k, head_dim) with block_table (batch, max_blocks); softmax_lse, dlse (heads_q, total_q);
# cu_seqlens (batch + 1,), seqused_k, leftpad_k (batch,).  Integers are int32.  softmax_lse is a natural
# logarithm, +inf for a row that sees no key; fp32, and fp64 for fp64 inputs.
#
# Options.  shift = seqlen_k - seqlen_q of a sequence; query i sees key j if
# i + shift - window_left <= j <= i + shift + window_right; a negative number is no limit, and causal
# makes window_right 0.  Scores are s = softmax_scale * q.k; softcap > 0: softcap * tanh(s / softcap);
# alibi_slopes (heads_q,) or (batch, heads_q), fp32: s - slope * |i + shift - j|.  dropout_p > 0 drops
# weights (not from softmax_lse) by rng_state, int64 (2,): ``cpu.philox`` says which.
#
# Keys.  seqused_k: how many of a sequence's rows of k count; leftpad_k: how many of these are skipped;
# seqlen_k is what remains.
#
# S_dmask of attn_probs (batch, heads_q, max_seqlen_q, max_seqlen_k), both rounded up to S_DMASK_ROUND:
# exp(s - its row's maximum), the sign bit set where dropped, 0 where a query sees no key.
#
# Inputs may have any strides with a contiguous last dimension, and so may the dq, dk and dv that bwd_into
# and varlen_bwd_into fill; outputs are contiguous.
#
# decode, decode_append: forward only.  q, out and softmax_lse as above, dense or, with cu_seqlens_q,
# varlen.  k_cache, v_cache (batch_cache, seqlen_cache, heads_k, head_dim), or with block_table paged;
# capacity: seqlen_cache, or max_blocks * page_size.  Sequence b has the rows 0 to cache_seqlens[b] of
# its entry (cache_batch_idx) or pages, or 0 to cache_seqlen where cache_seqlens is None; its keys are
# those from cache_leftpad on.  decode_append first writes k and v (batch, seqlen_new, heads_k, head_dim),
# or with cu_seqlens_q (total_q, heads_k, head_dim), behind the last row; those beyond the capacity are
# an error on the CPU and left out on CUDA.  rotary_cos, rotary_sin (seqlen_rotary, rotary_dim / 2):
# new key j is rotated by the position of the row it is written to, query i by cache_seqlens[b] + i, or
# without causal and window by cache_seqlens[b].  num_splits: n > 0 cuts every sequence's keys into n
# parts by its own length alone; 0 leaves it to the kernel; the CPU ignores it.
#
# merge_states: out, softmax_lse of attention to the keys of two parts, dense or varlen; an infinite
# softmax_lse, +inf or -inf, is that of a part without keys.
_OPTIONS = (
    "float softmax_scale, bool causal, SymInt window_left, SymInt window_right, float softcap,"
    " Tensor? alibi_slopes, float dropout_p, Tensor? rng_state"
)
_LENGTHS = "Tensor cu_seqlens_q, Tensor cu_seqlens_k, SymInt max_seqlen_q, SymInt max_seqlen_k,"
_GRADIENTS_OF = (
    "Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor softmax_lse, Tensor? dlse,"
)
_GRADIENTS = "Tensor dq, Tensor dk, Tensor dv"
_GRADIENTS_INTO = "Tensor(a!) dq, Tensor(b!) dk, Tensor(c!) dv"
_CACHE = (
    "Tensor? cu_seqlens_q, SymInt max_seqlen_q, Tensor? cache_seqlens, SymInt cache_seqlen,"
    " Tensor? cache_batch_idx, Tensor? cache_leftpad, Tensor? block_table, float softmax_scale,"
    " bool causal, SymInt window_left, SymInt window_right, float softcap, Tensor? alibi_slopes,"
    " SymInt num_splits"
)

S_DMASK_ROUND = 128


def _define(name: str, schema: str, *tags: torch.Tag) -> None:
    tags = (torch.Tag.pt2_compliant_tag, *tags)
    torch.library.define(f"flash_attn::{name}", schema, tags=tags)


_define("fwd", f"(Tensor q, Tensor k, Tensor v, {_OPTIONS}) -> (Tensor out, Tensor softmax_lse)")
_define("bwd", f"({_GRADIENTS_OF} {_OPTIONS}, bool deterministic) -> ({_GRADIENTS})")
_define("bwd_into", f"({_GRADIENTS_OF} {_OPTIONS}, bool deterministic, {_GRADIENTS_INTO}) -> ()")
_define(
    "varlen_fwd",
    "(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_k, Tensor? seqused_k,"
    " Tensor? leftpad_k, Tensor? block_table, SymInt max_seqlen_q, SymInt max_seqlen_k,"
    f" {_OPTIONS}) -> (Tensor out, Tensor softmax_lse)",
)
_define(
    "varlen_bwd",
    f"({_GRADIENTS_OF} {_LENGTHS} {_OPTIONS}, bool deterministic) -> ({_GRADIENTS})",
)
_define(
    "varlen_bwd_into",
    f"({_GRADIENTS_OF} {_LENGTHS} {_OPTIONS}, bool deterministic, {_GRADIENTS_INTO}) -> ()",
)
# The seed and offset of torch's generator of like's device, which advances by increment (on the CPU
# by two numbers).
_define(
    "draw_rng_state",
    "(Tensor like, SymInt increment) -> Tensor",
    torch.Tag.nondeterministic_seeded,
)
_define(
    "attn_probs",
    "(Tensor q, Tensor k, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, SymInt max_seqlen_q,"
    " SymInt max_seqlen_k, float softmax_scale, bool causal, SymInt window_left,"
    " SymInt window_right, float softcap, Tensor? alibi_slopes, float dropout_p, Tensor rng_state)"
    " -> Tensor",
)
_define(
    "decode",
    f"(Tensor q, Tensor k_cache, Tensor v_cache, {_CACHE}) -> (Tensor out, Tensor softmax_lse)",
)
_define(
    "decode_append",
    "(Tensor q, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor k, Tensor v, Tensor? rotary_cos,"
    f" Tensor? rotary_sin, bool rotary_interleaved, {_CACHE}) -> (Tensor out, Tensor softmax_lse)",
)
_define(
    "merge_states",
    "(Tensor out_a, Tensor lse_a, Tensor out_b, Tensor lse_b) -> (Tensor out, Tensor softmax_lse)",
)

# What the operators return, for FakeTensor, torch.compile and the meta device.


@torch.library.register_fake("flash_attn::fwd")
def fwd_shapes(q: Tensor, k: Tensor, v: Tensor, *options: object) -> tuple[Tensor, Tensor]:
    batch, seqlen_q, heads_q, _ = q.shape
    lse_shape = batch, heads_q, seqlen_q
    return q.new_empty(q.shape), q.new_empty(lse_shape, dtype=compute_dtype(q))


@torch.library.register_fake("flash_attn::varlen_fwd")
def varlen_fwd_shapes(q: Tensor, k: Tensor, v: Tensor, *others: object) -> tuple[Tensor, Tensor]:
    total_q, heads_q, _ = q.shape
    return q.new_empty(q.shape), q.new_empty((heads_q, total_q), dtype=compute_dtype(q))


@torch.library.register_fake("flash_attn::decode")
@torch.library.register_fake("flash_attn::decode_append")
def _decode_shapes(q: Tensor, *others: object) -> tuple[Tensor, Tensor]:
    return (fwd_shapes if q.dim() == 4 else varlen_fwd_shapes)(q, q, q)


@torch.library.register_fake("flash_attn::merge_states")
def _merge_states_shapes(
    out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor
) -> tuple[Tensor, Tensor]:
    return out_a.new_empty(out_a.shape), lse_a.new_empty(lse_a.shape)


@torch.library.register_fake("flash_attn::bwd")
@torch.library.register_fake("flash_attn::varlen_bwd")
def _bwd_shapes(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, *others: object
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


@torch.library.register_fake("flash_attn::bwd_into")
@torch.library.register_fake("flash_attn::varlen_bwd_into")
def _bwd_into_shapes(*arguments: object) -> None:
    return None


@torch.library.register_fake("flash_attn::draw_rng_state")
def draw_rng_state_shapes(like: Tensor, increment: int) -> Tensor:
    return like.new_empty(2, dtype=torch.int64)


@torch.library.register_fake("flash_attn::attn_probs")
def attn_probs_shapes(
    q: Tensor,
    k: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *options: object,
) -> Tensor:
    return q.new_empty(_probs_shape(q, cu_seqlens_q, max_seqlen_q, max_seqlen_k))


def _probs_shape(
    q: Tensor, cu_seqlens_q: Tensor | None, max_seqlen_q: int, max_seqlen_k: int
) -> tuple[int, int, int, int]:
    batch = q.shape[0] if cu_seqlens_q is None else cu_seqlens_q.shape[0] - 1
    rows, cols = (-(-n // S_DMASK_ROUND) * S_DMASK_ROUND for n in (max_seqlen_q, max_seqlen_k))
    return batch, q.shape[-2], rows, cols


# The CPU.  Arguments come in the order of the schemas.


def _fwd(q: Tensor, k: Tensor, v: Tensor, *options: object) -> tuple[Tensor, Tensor]:
    return _reference.attention_forward(q, k, v, Options(*options))


def _bwd(*arguments: object) -> tuple[Tensor, Tensor, Tensor]:
    *tensors_and_options, _deterministic = arguments  # it always is
    tensors, options = tensors_and_options[:7], tensors_and_options[7:]
    return _reference.attention_backward(*tensors, Options(*options))


def _varlen_fwd(q: Tensor, k: Tensor, v: Tensor, *arguments: object) -> tuple[Tensor, Tensor]:
    lengths, options = Lengths(*arguments[:7]), Options(*arguments[7:])
    check_lengths(q, k, lengths)
    return _reference_varlen.varlen_forward(q, k, v, lengths, options)


def _varlen_bwd(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    dlse: Tensor | None,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *options_and_deterministic: object,
) -> tuple[Tensor, Tensor, Tensor]:
    options = Options(*options_and_deterministic[:-1])
    lengths = Lengths(cu_seqlens_q, cu_seqlens_k, None, None, None, max_seqlen_q, max_seqlen_k)
    check_lengths(q, k, lengths)
    return _reference_varlen.varlen_backward(
        dout, q, k, v, out, softmax_lse, dlse, lengths, options
    )


def _bwd_into(*arguments: object) -> None:
    *inputs, dq, dk, dv = arguments
    for gradient, value in zip((dq, dk, dv), _bwd(*inputs)):
        gradient.copy_(value)


def _varlen_bwd_into(*arguments: object) -> None:
    *inputs, dq, dk, dv = arguments
    for gradient, value in zip((dq, dk, dv), _varlen_bwd(*inputs)):
        gradient.copy_(value)


def _draw_rng_state(like: Tensor, increment: int) -> Tensor:
    return torch.empty(2, dtype=torch.int64).random_()


def _attn_probs(
    q: Tensor,
    k: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *options: object,
) -> Tensor:
    probs = q.new_zeros(_probs_shape(q, cu_seqlens_q, max_seqlen_q, max_seqlen_k))
    if cu_seqlens_q is None or cu_seqlens_k is None:
        _reference.write_probabilities(q, k, Options(*options), probs)
    else:
        lengths = Lengths(cu_seqlens_q, cu_seqlens_k, None, None, None, max_seqlen_q, max_seqlen_k)
        check_lengths(q, k, lengths)
        _reference_varlen.varlen_probabilities(q, k, lengths, Options(*options), probs)
    return probs


def _decode(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, *arguments: object
) -> tuple[Tensor, Tensor]:
    cache, options = Cache(*arguments[:7]), Options(*arguments[7:13], 0.0, None)
    check_cache_contents(q, k_cache, None, None, cache, options)
    return _reference_decode.decode_forward(q, k_cache, v_cache, cache, options)


def _decode_append(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor,
    v: Tensor,
    rotary_cos: Tensor | None,
    rotary_sin: Tensor | None,
    rotary_interleaved: bool,
    *arguments: object,
) -> tuple[Tensor, Tensor]:
    cache, options = Cache(*arguments[:7]), Options(*arguments[7:13], 0.0, None)
    check_cache_contents(q, k_cache, k, rotary_cos, cache, options)
    rotary = None if rotary_cos is None else (rotary_cos, rotary_sin, rotary_interleaved)
    return _reference_decode.decode_append_forward(
        q, k_cache, v_cache, k, v, rotary, cache, options
    )


_ON_CPU = {
    "fwd": _fwd,
    "bwd": _bwd,
    "bwd_into": _bwd_into,
    "varlen_fwd": _varlen_fwd,
    "varlen_bwd": _varlen_bwd,
    "varlen_bwd_into": _varlen_bwd_into,
    "draw_rng_state": _draw_rng_state,
    "attn_probs": _attn_probs,
    "decode": _decode,
    "decode_append": _decode_append,
    "merge_states": _reference_decode.merge_states,
}
for _name, _function in _ON_CPU.items():
    torch.library.impl(f"flash_attn::{_name}", "CPU", _function)

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

    for _name in _ON_CPU:
        torch.library.impl(f"flash_attn::{_name}", "CUDA", _raise_not_built)

fwd = torch.ops.flash_attn.fwd.default
bwd = torch.ops.flash_attn.bwd.default
bwd_into = torch.ops.flash_attn.bwd_into.default
varlen_fwd = torch.ops.flash_attn.varlen_fwd.default
varlen_bwd = torch.ops.flash_attn.varlen_bwd.default
varlen_bwd_into = torch.ops.flash_attn.varlen_bwd_into.default
draw_rng_state = torch.ops.flash_attn.draw_rng_state.default
attn_probs = torch.ops.flash_attn.attn_probs.default
decode = torch.ops.flash_attn.decode.default
decode_append = torch.ops.flash_attn.decode_append.default
merge_states = torch.ops.flash_attn.merge_states.default
