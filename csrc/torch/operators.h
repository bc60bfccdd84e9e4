#pragma once
// The operators' C++ functions: registered by bindings.cpp.  Schemas and their documentation are in flash_attn/_ops.py.
// Dense tensors and sequences of their own lengths share forward() and backward().
#include <ATen/ATen.h>

#include <optional>
#include <tuple>

#include "torch/arguments.h"

namespace flash {

using ForwardResults = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;
using Gradients      = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

ForwardResults flash_attn_forward(at::Tensor const& q, at::Tensor const& k, at::Tensor const& v,
                                  double dropout_p, double softmax_scale, bool causal,
                                  int64_t window_left, int64_t window_right, double softcap,
                                  OptionalTensor const& alibi_slopes, bool return_softmax,
                                  OptionalTensor const& rng_state,
                                  OptionalTensor const& softmax_scale_tensor,
                                  OptionalTensor const& softcap_tensor, bool deterministic);

ForwardResults flash_attn_varlen_forward(
    at::Tensor const& q, at::Tensor const& k, at::Tensor const& v, at::Tensor const& cu_seqlens_q,
    at::Tensor const& cu_seqlens_k, int64_t max_seqlen_q, int64_t max_seqlen_k, double dropout_p,
    double softmax_scale, bool causal, int64_t window_left, int64_t window_right, double softcap,
    OptionalTensor const& alibi_slopes, bool return_softmax, OptionalTensor const& block_table,
    OptionalTensor const& leftpad_k, OptionalTensor const& seqused_k, bool zero_tensors,
    int64_t num_splits, OptionalTensor const& rng_state, OptionalTensor const& softmax_scale_tensor,
    OptionalTensor const& softcap_tensor, bool deterministic);

at::Tensor flash_attn_backward(
    at::Tensor const& dout, at::Tensor const& q, at::Tensor const& k, at::Tensor const& v,
    at::Tensor const& out, at::Tensor const& softmax_lse, OptionalTensor dq, OptionalTensor dk,
    OptionalTensor dv, double dropout_p, double softmax_scale, bool causal, int64_t window_left,
    int64_t window_right, double softcap, OptionalTensor const& alibi_slopes, bool deterministic,
    OptionalTensor const& rng_state, OptionalTensor const& dlse, bool return_softmax_d,
    OptionalTensor const& softmax_scale_tensor, OptionalTensor const& softcap_tensor);

Gradients flash_attn_backward_functional(
    at::Tensor const& dout, at::Tensor const& q, at::Tensor const& k, at::Tensor const& v,
    at::Tensor const& out, at::Tensor const& softmax_lse, double dropout_p, double softmax_scale,
    bool causal, int64_t window_left, int64_t window_right, double softcap,
    OptionalTensor const& alibi_slopes, bool deterministic, OptionalTensor const& rng_state,
    OptionalTensor const& dlse, OptionalTensor const& softmax_scale_tensor,
    OptionalTensor const& softcap_tensor);

at::Tensor flash_attn_varlen_backward(
    at::Tensor const& dout, at::Tensor const& q, at::Tensor const& k, at::Tensor const& v,
    at::Tensor const& out, at::Tensor const& softmax_lse, OptionalTensor dq, OptionalTensor dk,
    OptionalTensor dv, at::Tensor const& cu_seqlens_q, at::Tensor const& cu_seqlens_k,
    int64_t max_seqlen_q, int64_t max_seqlen_k, double dropout_p, double softmax_scale, bool causal,
    int64_t window_left, int64_t window_right, double softcap, OptionalTensor const& alibi_slopes,
    bool deterministic, OptionalTensor const& rng_state, bool zero_tensors,
    OptionalTensor const& dlse, bool return_softmax_d, OptionalTensor const& softmax_scale_tensor,
    OptionalTensor const& softcap_tensor);

Gradients flash_attn_varlen_backward_functional(
    at::Tensor const& dout, at::Tensor const& q, at::Tensor const& k, at::Tensor const& v,
    at::Tensor const& out, at::Tensor const& softmax_lse, at::Tensor const& cu_seqlens_q,
    at::Tensor const& cu_seqlens_k, int64_t max_seqlen_q, int64_t max_seqlen_k, double dropout_p,
    double softmax_scale, bool causal, int64_t window_left, int64_t window_right, double softcap,
    OptionalTensor const& alibi_slopes, bool deterministic, OptionalTensor const& rng_state,
    OptionalTensor const& dlse, OptionalTensor const& softmax_scale_tensor,
    OptionalTensor const& softcap_tensor);

std::tuple<at::Tensor, at::Tensor> flash_attn_kvcache(
    at::Tensor const& q, at::Tensor const& k_cache, at::Tensor const& v_cache,
    OptionalTensor const& cu_seqlens_q, int64_t max_seqlen_q, OptionalTensor const& cache_seqlens,
    int64_t cache_seqlen, OptionalTensor const& cache_batch_idx,
    OptionalTensor const& cache_leftpad, OptionalTensor const& block_table, double softmax_scale,
    bool causal, int64_t window_left, int64_t window_right, double softcap,
    OptionalTensor const& alibi_slopes, int64_t num_splits,
    OptionalTensor const& softmax_scale_tensor, OptionalTensor const& softcap_tensor);

std::tuple<at::Tensor, at::Tensor> flash_attn_kvcache_append(
    at::Tensor const& q, at::Tensor k_cache, at::Tensor v_cache, at::Tensor const& k,
    at::Tensor const& v, OptionalTensor const& rotary_cos, OptionalTensor const& rotary_sin,
    bool rotary_interleaved, OptionalTensor const& cu_seqlens_q, int64_t max_seqlen_q,
    OptionalTensor const& cache_seqlens, int64_t cache_seqlen,
    OptionalTensor const& cache_batch_idx, OptionalTensor const& cache_leftpad,
    OptionalTensor const& block_table, double softmax_scale, bool causal, int64_t window_left,
    int64_t window_right, double softcap, OptionalTensor const& alibi_slopes, int64_t num_splits,
    OptionalTensor const& softmax_scale_tensor, OptionalTensor const& softcap_tensor);

std::tuple<at::Tensor, at::Tensor> merge_states(at::Tensor const& out_a, at::Tensor const& lse_a,
                                                at::Tensor const& out_b, at::Tensor const& lse_b);

// Not operators: parts of the forward pass.

// The part with pages.
std::tuple<at::Tensor, at::Tensor> attend_pages(at::Tensor const& q, at::Tensor const& k,
                                                at::Tensor const& v,
                                                CacheArguments const& arguments,
                                                Options const& options, int64_t num_splits);

// Dropout's seed and offset from torch's generator of q's device.  sequences: of q.
at::Tensor draw_rng_state(at::Tensor const& q, int64_t sequences);

// S_dmask.  lengths: null for tensors with a batch dimension.
at::Tensor attn_probs(at::Tensor const& q, at::Tensor const& k, Lengths const* lengths,
                      Options const& options);

}  // namespace flash
