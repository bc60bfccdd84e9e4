#pragma once
// The operators' C++ functions: registered by bindings.cpp.  Schemas and their documentation are in flash_attn/_ops.py.
#include <ATen/ATen.h>

#include <optional>
#include <tuple>

namespace flash {

std::tuple<at::Tensor, at::Tensor> fwd(at::Tensor const& q, at::Tensor const& k,
                                       at::Tensor const& v, double softmax_scale, bool causal);

std::tuple<at::Tensor, at::Tensor, at::Tensor> bwd(
    at::Tensor const& dout, at::Tensor const& q, at::Tensor const& k, at::Tensor const& v,
    at::Tensor const& out, at::Tensor const& softmax_lse, std::optional<at::Tensor> const& dlse,
    double softmax_scale, bool causal, bool deterministic);

}  // namespace flash
