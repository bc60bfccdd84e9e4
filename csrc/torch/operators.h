#pragma once
// The operators' C++ functions: registered by bindings.cpp.  Schemas and their documentation are in flash_attn/_ops.py.
#include <ATen/ATen.h>

#include <optional>
#include <tuple>

#include "torch/arguments.h"

namespace flash {

std::tuple<at::Tensor, at::Tensor> fwd(at::Tensor const& q, at::Tensor const& k,
                                       at::Tensor const& v, double softmax_scale, bool causal,
                                       int64_t window_left, int64_t window_right, double softcap,
                                       OptionalTensor const& alibi_slopes, double dropout_p,
                                       OptionalTensor const& rng_state);

std::tuple<at::Tensor, at::Tensor> varlen_fwd(
    at::Tensor const& q, at::Tensor const& k, at::Tensor const& v, at::Tensor const& cu_seqlens_q,
    at::Tensor const& cu_seqlens_k, OptionalTensor const& seqused_k,
    OptionalTensor const& leftpad_k, OptionalTensor const& block_table, int64_t max_seqlen_q,
    int64_t max_seqlen_k, double softmax_scale, bool causal, int64_t window_left,
    int64_t window_right, double softcap, OptionalTensor const& alibi_slopes, double dropout_p,
    OptionalTensor const& rng_state);

void bwd_into(at::Tensor const& dout, at::Tensor const& q, at::Tensor const& k, at::Tensor const& v,
              at::Tensor const& out, at::Tensor const& softmax_lse, OptionalTensor const& dlse,
              double softmax_scale, bool causal, int64_t window_left, int64_t window_right,
              double softcap, OptionalTensor const& alibi_slopes, double dropout_p,
              OptionalTensor const& rng_state, bool deterministic, at::Tensor dq, at::Tensor dk,
              at::Tensor dv);

std::tuple<at::Tensor, at::Tensor, at::Tensor> bwd(
    at::Tensor const& dout, at::Tensor const& q, at::Tensor const& k, at::Tensor const& v,
    at::Tensor const& out, at::Tensor const& softmax_lse, OptionalTensor const& dlse,
    double softmax_scale, bool causal, int64_t window_left, int64_t window_right, double softcap,
    OptionalTensor const& alibi_slopes, double dropout_p, OptionalTensor const& rng_state,
    bool deterministic);

void varlen_bwd_into(at::Tensor const& dout, at::Tensor const& q, at::Tensor const& k,
                     at::Tensor const& v, at::Tensor const& out, at::Tensor const& softmax_lse,
                     OptionalTensor const& dlse, at::Tensor const& cu_seqlens_q,
                     at::Tensor const& cu_seqlens_k, int64_t max_seqlen_q, int64_t max_seqlen_k,
                     double softmax_scale, bool causal, int64_t window_left, int64_t window_right,
                     double softcap, OptionalTensor const& alibi_slopes, double dropout_p,
                     OptionalTensor const& rng_state, bool deterministic, at::Tensor dq,
                     at::Tensor dk, at::Tensor dv);

std::tuple<at::Tensor, at::Tensor, at::Tensor> varlen_bwd(
    at::Tensor const& dout, at::Tensor const& q, at::Tensor const& k, at::Tensor const& v,
    at::Tensor const& out, at::Tensor const& softmax_lse, OptionalTensor const& dlse,
    at::Tensor const& cu_seqlens_q, at::Tensor const& cu_seqlens_k, int64_t max_seqlen_q,
    int64_t max_seqlen_k, double softmax_scale, bool causal, int64_t window_left,
    int64_t window_right, double softcap, OptionalTensor const& alibi_slopes, double dropout_p,
    OptionalTensor const& rng_state, bool deterministic);

std::tuple<at::Tensor, at::Tensor> decode(
    at::Tensor const& q, at::Tensor const& k_cache, at::Tensor const& v_cache,
    OptionalTensor const& cu_seqlens_q, int64_t max_seqlen_q, OptionalTensor const& cache_seqlens,
    int64_t cache_seqlen, OptionalTensor const& cache_batch_idx,
    OptionalTensor const& cache_leftpad, OptionalTensor const& block_table, double softmax_scale,
    bool causal, int64_t window_left, int64_t window_right, double softcap,
    OptionalTensor const& alibi_slopes, int64_t num_splits);

std::tuple<at::Tensor, at::Tensor> decode_append(
    at::Tensor const& q, at::Tensor k_cache, at::Tensor v_cache, at::Tensor const& k,
    at::Tensor const& v, OptionalTensor const& rotary_cos, OptionalTensor const& rotary_sin,
    bool rotary_interleaved, OptionalTensor const& cu_seqlens_q, int64_t max_seqlen_q,
    OptionalTensor const& cache_seqlens, int64_t cache_seqlen,
    OptionalTensor const& cache_batch_idx, OptionalTensor const& cache_leftpad,
    OptionalTensor const& block_table, double softmax_scale, bool causal, int64_t window_left,
    int64_t window_right, double softcap, OptionalTensor const& alibi_slopes, int64_t num_splits);

// varlen_fwd's part with pages.
std::tuple<at::Tensor, at::Tensor> attend_pages(at::Tensor const& q, at::Tensor const& k,
                                                at::Tensor const& v,
                                                CacheArguments const& arguments,
                                                Options const& options);

std::tuple<at::Tensor, at::Tensor> merge_states(at::Tensor const& out_a, at::Tensor const& lse_a,
                                                at::Tensor const& out_b, at::Tensor const& lse_b);

at::Tensor draw_rng_state(at::Tensor const& like, int64_t increment);

at::Tensor attn_probs(at::Tensor const& q_in, at::Tensor const& k_in,
                      OptionalTensor const& cu_seqlens_q, OptionalTensor const& cu_seqlens_k,
                      int64_t max_seqlen_q, int64_t max_seqlen_k, double softmax_scale, bool causal,
                      int64_t window_left, int64_t window_right, double softcap,
                      OptionalTensor const& alibi_slopes, double dropout_p,
                      at::Tensor const& rng_state_in);

}  // namespace flash
