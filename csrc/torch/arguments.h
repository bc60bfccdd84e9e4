#pragma once
// The operators' argument groups, in the order of the schemas (flash_attn/_ops.py).
#include <ATen/ATen.h>

#include <optional>

#include "flash.h"

namespace flash {

using OptionalTensor = std::optional<at::Tensor>;

// What happens between Q K^T and the product with V.
struct Options {
  double softmax_scale;
  bool causal;
  int64_t window_left, window_right;  // negative: no limit
  double softcap;
  OptionalTensor const& alibi_slopes;
  double dropout_p;
  OptionalTensor const& rng_state;
};

// A number, or that of a tensor with one element in its place.  Waits for the device of a tensor on CUDA.
double number(double given, OptionalTensor const& tensor, char const* name);

// Sequences of different lengths in one tensor.
struct Lengths {
  at::Tensor const &cu_seqlens_q, &cu_seqlens_k;
  OptionalTensor const &seqused_k, &leftpad_k;
  int64_t max_seqlen_q, max_seqlen_k;

  int64_t batch() const { return cu_seqlens_q.numel() - 1; }
};

// Sequences in a cache of keys and values.  Their lengths: seqlens, or the differences of cu_seqlens_k, or seqlen for all.
struct CacheArguments {
  OptionalTensor const &cu_seqlens_q, &cu_seqlens_k;
  int64_t max_seqlen_q;
  OptionalTensor const& seqlens;
  int64_t seqlen;
  OptionalTensor const &batch_idx, &leftpad, &block_table;
};

// Sizes of a problem; seqlen: the largest, of sequences of their own lengths.
struct ProblemShape {
  int64_t batch, heads_kv, seqlen_q, seqlen_k;
};

// Fills what every pass needs, for q (..., heads, head_dim); is_ragged: with rows of all sequences in one dimension.  v has the head
// dimension of q: where it may have another, the caller sets head_dim_v.
Problem make_problem(at::Tensor const& q, bool is_ragged, ProblemShape const& shape,
                     Options const& options);

// Fills what both passes need.  lengths: null for tensors with a batch dimension.  Checks what only this problem can say.
Problem make_problem(at::Tensor const& q, at::Tensor const& k, Lengths const* lengths,
                     Options const& options);

}  // namespace flash
