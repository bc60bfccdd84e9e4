// out, lse of all keys from those of two parts of them.  One thread for eight columns of a row.
#include <cutlass/numeric_conversion.h>
#include <cutlass/numeric_types.h>

#include "pieces/address.cuh"
#include "pieces/launch.cuh"
#include "pieces/merge.cuh"

namespace flash {
namespace {

constexpr int kThreads = 128, kVector = 8;

// A part's lse as the state of a row whose O is normalised.
__device__ RowState state_of(float lse) { return {lse, isinf(lse) ? 0.f : 1.f}; }

template <class Element>
__global__ void __launch_bounds__(kThreads)
    merge_states_kernel(__grid_constant__ MergeParams const params) {
  Problem const& problem = params.problem;
  int const chunks       = problem.head_dim / kVector;
  int64_t const item     = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  int64_t const row      = item / chunks;  // (batch, row, head)
  int const column = int(item % chunks) * kVector, head = int(row % problem.heads_q);
  int const index = int(row / problem.heads_q % problem.seqlen_q);
  int const batch = int(row / problem.heads_q / problem.seqlen_q);
  if (batch >= problem.batch) { return; }

  int64_t const lse_place =
      batch * problem.lse_batch_stride + head * problem.lse_head_stride + index;
  RowState const a = state_of(params.lse_a[lse_place]), b = state_of(params.lse_b[lse_place]);
  float const ref      = merged_ref(merged_ref(-INFINITY, a), b);
  float const weight_a = merge_weight(a, ref, kLog2E), weight_b = merge_weight(b, ref, kLog2E);
  RowState const merged{ref, weight_a * a.sum + weight_b * b.sum};
  if (column == 0) { params.lse[lse_place] = row_lse(merged, kLog2E); }

  auto const place = [&](TensorRef const& tensor) {
    return row_of<Element>(tensor, batch, head, index) + column;
  };
  using Vector      = cutlass::AlignedArray<Element, kVector>;
  Vector const in_a = *reinterpret_cast<Vector const*>(place(params.out_a));
  Vector const in_b = *reinterpret_cast<Vector const*>(place(params.out_b));
  float const norm  = row_norm(merged);
  Vector out;
  CUTE_UNROLL
  for (int i = 0; i < kVector; ++i) {
    // A part of weight 0 saw no key: what its O holds does not count.
    float const from_a = a.sum == 0.f ? 0.f : weight_a * float(in_a[i]);
    float const from_b = b.sum == 0.f ? 0.f : weight_b * float(in_b[i]);
    out[i]             = Element((from_a + from_b) * norm);
  }
  *reinterpret_cast<Vector*>(place(params.out)) = out;
}

}  // namespace

Status launch_merge_states(MergeParams const& params, cudaStream_t stream) {
  Problem const& problem = params.problem;
  int64_t const items =
      int64_t(problem.batch) * problem.seqlen_q * problem.heads_q * (problem.head_dim / kVector);
  auto const kernel = problem.dtype == DType::kFp16 ? &merge_states_kernel<cutlass::half_t>
                                                    : &merge_states_kernel<cutlass::bfloat16_t>;
  Launch const launch{(items + kThreads - 1) / kThreads, kThreads, 0, stream};
  cudaError_t const code = launch_kernel(kernel, launch, params);
  return {code,
          code == cudaSuccess ? nullptr : "launch of the kernel that merges two parts failed"};
}

}  // namespace flash
