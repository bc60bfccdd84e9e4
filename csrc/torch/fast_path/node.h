#pragma once
// Attention that records itself for autograd in C++.  Used by attend.cpp.
#include <ATen/ATen.h>

#include "torch/arguments.h"

namespace flash {

// out, with gradients in q, k and v.  lengths: null for tensors with a batch dimension.  Options without a random state: the
// operator draws it.
at::Tensor attend_recorded(at::Tensor const& q, at::Tensor const& k, at::Tensor const& v,
                           Lengths const* lengths, Options const& options, bool deterministic);

}  // namespace flash
