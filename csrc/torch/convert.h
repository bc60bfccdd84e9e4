#pragma once
// at::Tensor to the seam's plain structs.
#include <ATen/ATen.h>

#include "flash.h"

namespace flash {

// The kernels read 16 bytes at a time: a tensor whose base or strides do not allow that is copied, never misread.
inline at::Tensor aligned(at::Tensor const& tensor) {
  int64_t const unit = 16 / int64_t(tensor.element_size());
  bool fits = tensor.stride(-1) == 1 && reinterpret_cast<uintptr_t>(tensor.data_ptr()) % 16 == 0;
  for (int64_t dim = 0; dim + 1 < tensor.dim(); ++dim) {
    fits &= tensor.size(dim) <= 1 || tensor.stride(dim) % unit == 0;
  }
  return fits ? tensor : tensor.clone(at::MemoryFormat::Contiguous);
}

inline TensorRef ref(at::Tensor const& tensor) {
  return {tensor.data_ptr(), tensor.stride(0), tensor.stride(1), tensor.stride(2)};
}

inline Problem make_problem(at::Tensor const& q, at::Tensor const& k, double softmax_scale,
                            bool causal) {
  Problem problem{};
  problem.dtype    = q.scalar_type() == at::kHalf ? DType::kFp16 : DType::kBf16;
  problem.mask     = causal ? MaskKind::kCausal : MaskKind::kNone;
  problem.batch    = int(q.size(0));
  problem.heads_q  = int(q.size(2));
  problem.heads_kv = int(k.size(2));
  problem.head_dim = int(q.size(3));
  problem.seqlen_q = int(q.size(1));
  problem.seqlen_k = int(k.size(1));
  problem.scale    = float(softmax_scale);
  return problem;
}

inline void check_status(Status const& status) {
  TORCH_CHECK(status.code == cudaSuccess, status.message);
}

}  // namespace flash
