#pragma once
// Differentiable attention, called by flash_attn/_autograd.py outside of torch.compile.  Arguments as the operators take them.
#include <ATen/ATen.h>

#include <tuple>

#include "torch/arguments.h"

namespace flash {

// Both return out and softmax_lse; both have gradients in q, k and v.
std::tuple<at::Tensor, at::Tensor> attend(at::Tensor const& q, at::Tensor const& k,
                                          at::Tensor const& v, double softmax_scale, bool causal,
                                          int64_t window_left, int64_t window_right, double softcap,
                                          OptionalTensor const& alibi_slopes, double dropout_p,
                                          OptionalTensor const& rng_state, bool deterministic);

std::tuple<at::Tensor, at::Tensor> varlen_attend(
    at::Tensor const& q, at::Tensor const& k, at::Tensor const& v, at::Tensor const& cu_seqlens_q,
    at::Tensor const& cu_seqlens_k, int64_t max_seqlen_q, int64_t max_seqlen_k,
    double softmax_scale, bool causal, int64_t window_left, int64_t window_right, double softcap,
    OptionalTensor const& alibi_slopes, double dropout_p, OptionalTensor const& rng_state,
    bool deterministic);

}  // namespace flash
