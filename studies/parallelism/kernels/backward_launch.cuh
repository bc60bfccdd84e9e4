#pragma once
// The backward pass to take apart, from its launch to dQ: preparation, main kernel, conversion of dQ.
// Used by the units backward_*.
#include "backward.cuh"
#include "common/bwd_preprocess.h"

namespace parallelism {

// dQ from its sum: scaled, rounded, in rows again.  One thread block per slice of a query block.
template <class Traits>
__global__ void __launch_bounds__(Traits::kDqThreads)
    backward_finish_kernel(__grid_constant__ BwdKernelParams const params) {
  using Element          = typename Traits::Element;
  Problem const& problem = params.problem;
  constexpr int kRows = Traits::kDqRows, kHeadDim = Traits::kHeadDim;
  int const thread = threadIdx.x,
            slices = ceil_div(problem.seqlen_q, Traits::kBlockM) * Traits::kDqSlices;
  int const pair = int(blockIdx.x) / slices, row0 = int(blockIdx.x) % slices * kRows;
  auto tdQcdQ = typename Traits::MmaDq{}.get_slice(thread).partition_C(
      make_identity_tensor(Shape<Int<kRows>, Int<kHeadDim>>{}));
  float const* const sums =
      params.workspace.dq_accum + int64_t(blockIdx.x) * kRows * kHeadDim + thread * 4;
  Element* const dq = matrix_of<Element>(params.dq, pair / problem.heads_q, pair % problem.heads_q);
  CUTE_UNROLL
  for (int i = 0; i < size(tdQcdQ); ++i) {
    int const row = row0 + int(get<0>(tdQcdQ(i))), column = get<1>(tdQcdQ(i));
    float const sum = sums[i / 4 * Traits::kDqThreads * 4 + i % 4];
    if (row < problem.seqlen_q) {
      dq[row * params.dq.row_stride + column] = Element(sum * problem.scale);
    }
  }
}

template <class Traits>
cudaError_t run_backward(BackwardCall const& call, cudaStream_t stream) {
  BwdKernelParams const params = backward_params(call, Traits::kHeadDim);
  int const m_blocks           = ceil_div(call.seqlen, Traits::kBlockM);
  unsigned const batch = unsigned(call.batch), heads = unsigned(call.heads);
  cudaError_t status = cudaSuccess;
  if (call.parts & kPrepare) {
    status = launch_bwd_preprocess(params, Traits::kBlockM, Traits::kHeadDim, stream);
  }
  if (status == cudaSuccess && (call.parts & kMain)) {
    status = cudaFuncSetAttribute(&backward_kernel<Traits>,
                                  cudaFuncAttributeMaxDynamicSharedMemorySize, Traits::kSmemBytes);
    if (status != cudaSuccess) { return status; }
    int const n_blocks = call.key_parallel ? ceil_div(call.seqlen, Traits::kBlockN) : 1;
    backward_kernel<Traits>
        <<<dim3(unsigned(n_blocks), batch, heads), Traits::kThreads, Traits::kSmemBytes, stream>>>(
            params);
    status = cudaGetLastError();
  }
  if (status == cudaSuccess && (call.parts & kFinish)) {
    backward_finish_kernel<Traits>
        <<<batch * heads* unsigned(m_blocks * Traits::kDqSlices), Traits::kDqThreads, 0, stream>>>(
            params);
    status = cudaGetLastError();
  }
  return status;
}

template <class Traits>
cudaError_t backward_facts(KernelFacts* facts) {
  return read_facts(&backward_kernel<Traits>, Traits::kThreads, Traits::kSmemBytes, facts);
}

}  // namespace parallelism
