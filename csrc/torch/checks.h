#pragma once
// Checks of the operators' tensors: name, what was given, what is allowed.  The Python front end has checked its callers already;
// these stand guard for callers of torch.ops and of the extension module.
#include <ATen/ATen.h>

#include <string>

#include "kernels/head_dims.h"

namespace flash {

inline void check_device(at::Tensor const& tensor, char const* name, at::Tensor const& q) {
  TORCH_CHECK(tensor.device() == q.device(), name, ": must be on the device of q; got ",
              tensor.device(), ", q is on ", q.device());
}

inline void check_like(at::Tensor const& tensor, char const* name, at::Tensor const& q,
                       at::IntArrayRef shape) {
  check_device(tensor, name, q);
  TORCH_CHECK(tensor.scalar_type() == q.scalar_type(), name, ": must have the dtype of q; got ",
              tensor.scalar_type(), ", q has ", q.scalar_type());
  TORCH_CHECK(tensor.sizes() == shape, name, ": must have shape ", shape, "; got ", tensor.sizes());
}

// Whether the elements of each row are neighbours; a single one may have any stride.
inline bool has_contiguous_rows(at::Tensor const& tensor) {
  return tensor.size(-1) <= 1 || tensor.stride(-1) == 1;
}

// softmax_lse and its gradient.
inline void check_rows(at::Tensor const& tensor, char const* name, at::Tensor const& q) {
  check_device(tensor, name, q);
  TORCH_CHECK(tensor.scalar_type() == at::kFloat, name, ": must have dtype float32; got ",
              tensor.scalar_type());
  if (q.dim() == 3) {
    TORCH_CHECK(tensor.sizes() == at::IntArrayRef({q.size(1), q.size(0)}), name,
                ": must have shape (heads, total_q) = (", q.size(1), ", ", q.size(0), "); got ",
                tensor.sizes());
  } else {
    TORCH_CHECK(tensor.sizes() == at::IntArrayRef({q.size(0), q.size(2), q.size(1)}), name,
                ": must have shape (batch, heads, seqlen_q) = (", q.size(0), ", ", q.size(2), ", ",
                q.size(1), "); got ", tensor.sizes());
  }
}

inline void check_integers(at::Tensor const& tensor, char const* name, at::Tensor const& q,
                           int64_t count) {
  check_device(tensor, name, q);
  TORCH_CHECK(tensor.scalar_type() == at::kInt, name, " must have dtype int32; got ",
              tensor.scalar_type());
  TORCH_CHECK(tensor.is_contiguous(), name, " must be contiguous; got strides ", tensor.strides());
  TORCH_CHECK(tensor.dim() == 1 && tensor.size(0) == count, name, ": must have shape (", count,
              "); got ", tensor.sizes());
}

// dims: 4 for (batch, seqlen, heads, head_dim), 3 for (total, heads, head_dim).  v may have a head_dim of its own.
inline void check_qkv(at::Tensor const& q, at::Tensor const& k, at::Tensor const& v, int64_t dims) {
  TORCH_CHECK(q.is_cuda(), "q must be on CUDA; got ", q.device());
  TORCH_CHECK(q.scalar_type() == at::kHalf || q.scalar_type() == at::kBFloat16,
              "q: FlashAttention only support fp16 and bf16 data type; got ", q.scalar_type());
  TORCH_CHECK(q.dim() == dims && k.dim() == dims, "q and k must have shape ",
              dims == 4 ? "(batch, seqlen, heads, head_dim)" : "(total, heads, head_dim)", "; got ",
              q.sizes(), " and ", k.sizes());
  int64_t const heads_q = q.size(-2), heads_kv = k.size(-2), head_dim = q.size(-1);
  TORCH_CHECK(dims == 3 || q.size(0) > 0, "q: batch size must be positive; got ", q.sizes());
  TORCH_CHECK(head_dim <= kMaxHeadDim && head_dim % 8 == 0 && head_dim > 0,
              "q: head_dim must be a multiple of 8 from 8 to ", kMaxHeadDim, "; got ", head_dim);
  TORCH_CHECK(heads_kv > 0 && heads_q % heads_kv == 0,
              "k: Number of heads in key/value must divide number of heads in query; got ",
              heads_kv, " and ", heads_q);
  int64_t sizes[] = {q.size(0), k.size(dims - 3), heads_kv, head_dim};
  at::IntArrayRef const shape(sizes + 4 - dims, size_t(dims));
  check_like(k, "k", q, shape);
  int64_t const head_dim_v = v.dim() == dims ? v.size(-1) : head_dim;
  TORCH_CHECK(head_dim_v <= kMaxHeadDim && head_dim_v % 8 == 0 && head_dim_v > 0,
              "v: head_dim must be a multiple of 8 from 8 to ", kMaxHeadDim, "; got ", head_dim_v);
  sizes[3] = head_dim_v;
  check_like(v, "v", q, shape);
}

}  // namespace flash
