#pragma once
// at::Tensor to the seam's plain structs.
#include <ATen/ATen.h>
#include <ATen/core/DimVector.h>
#include <ATen/cuda/EmptyTensor.h>

#include "flash.h"

namespace flash {

// Whether the kernels can read and write the tensor as it lies: 16 bytes at a time.
inline bool is_aligned(at::Tensor const& tensor) {
  int64_t const unit = 16 / int64_t(tensor.element_size());
  bool fits = tensor.stride(-1) == 1 && reinterpret_cast<uintptr_t>(tensor.data_ptr()) % 16 == 0;
  for (int64_t dim = 0; dim + 1 < tensor.dim(); ++dim) {
    fits &= tensor.size(dim) <= 1 || tensor.stride(dim) % unit == 0;
  }
  return fits;
}
// A tensor that does not fit is copied, never misread.
inline at::Tensor aligned(at::Tensor const& tensor) {
  return is_aligned(tensor) ? tensor : tensor.clone(at::MemoryFormat::Contiguous);
}

// Rows that are the same or overlap (expanded, as_strided) are copied.
inline at::Tensor with_rows_apart(at::Tensor const& tensor) {
  bool const overlap = tensor.size(-3) > 1 && tensor.stride(-3) < tensor.size(-1);
  return overlap ? tensor.clone(at::MemoryFormat::Contiguous) : tensor;
}

// On like's device, contiguous.  Without the dispatcher, and not filled even where torch.utils.deterministic asks for it: every
// element is written.
inline at::Tensor new_tensor(at::IntArrayRef shape, at::ScalarType dtype, at::Tensor const& like) {
  return at::Tensor(at::detail::empty_cuda(shape, dtype, like.device(), std::nullopt));
}
inline at::Tensor new_like(at::Tensor const& tensor) {
  return new_tensor(tensor.sizes(), tensor.scalar_type(), tensor);
}
// An out for q and v, with the head dimension of v.
inline at::Tensor new_out(at::Tensor const& q, at::Tensor const& v) {
  at::DimVector shape(q.sizes());
  shape.back() = v.size(-1);
  return new_tensor(shape, q.scalar_type(), q);
}
// A softmax_lse for q.
inline at::Tensor new_lse(at::Tensor const& q) {
  return q.dim() == 3 ? new_tensor({q.size(1), q.size(0)}, at::kFloat, q)
                      : new_tensor({q.size(0), q.size(2), q.size(1)}, at::kFloat, q);
}

// (batch, seqlen, heads, head_dim), or (rows, heads, head_dim) with the batch stride that shared rows have.
inline TensorRef ref(at::Tensor const& tensor) {
  if (tensor.dim() == 3) { return {tensor.data_ptr(), 0, tensor.stride(0), tensor.stride(1)}; }
  return {tensor.data_ptr(), tensor.stride(0), tensor.stride(1), tensor.stride(2)};
}

inline void check_status(Status const& status) {
  TORCH_CHECK(status.code == cudaSuccess, status.message);
}

}  // namespace flash
