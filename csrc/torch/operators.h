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

at::Tensor draw_rng_state(at::Tensor const& like, int64_t increment);

at::Tensor attn_probs(at::Tensor const& q_in, at::Tensor const& k_in,
                      OptionalTensor const& cu_seqlens_q, OptionalTensor const& cu_seqlens_k,
                      int64_t max_seqlen_q, int64_t max_seqlen_k, double softmax_scale, bool causal,
                      int64_t window_left, int64_t window_right, double softcap,
                      OptionalTensor const& alibi_slopes, double dropout_p,
                      at::Tensor const& rng_state_in);

}  // namespace flash
