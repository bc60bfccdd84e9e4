#pragma once
// The extension's own kernels behind the study's seam.  Used by the units shipped_*.
#include "calls.h"
#include "common/bwd_preprocess.h"
#include "pieces/device_info.h"
#include "pieces/launch.cuh"
#include "sm80/bwd/kernel.cuh"
#include "sm80/bwd/postprocess.cuh"
#include "sm80/fwd/kernel.cuh"

namespace parallelism {
using namespace flash;
using namespace flash::sm80;

template <int kHeadDim>
cudaError_t run_shipped_forward(ForwardCall const& call, cudaStream_t stream) {
  using Traits           = FwdTraits<kHeadDim, cutlass::bfloat16_t>;
  FwdParams const params = forward_params(call, kHeadDim);
  TileOrder const order =
      shipped_order(params.problem, ceil_div(params.problem.seqlen_q, Traits::kBlockM));
  auto const kernel = call.causal ? &fwd_kernel<Traits, MaskKind::kCausal, Level::kPlain>
                                  : &fwd_kernel<Traits, MaskKind::kNone, Level::kPlain>;
  Launch const launch{order.size(), Traits::kThreads, Traits::kSmemBytes, stream};
  return launch_kernel(kernel, launch, params, order);
}

template <int kHeadDim>
cudaError_t shipped_forward_facts(bool causal, KernelFacts* facts) {
  using Traits = FwdTraits<kHeadDim, cutlass::bfloat16_t>;
  return read_facts(causal ? &fwd_kernel<Traits, MaskKind::kCausal, Level::kPlain>
                           : &fwd_kernel<Traits, MaskKind::kNone, Level::kPlain>,
                    Traits::kThreads, Traits::kSmemBytes, facts);
}

template <int kHeadDim>
cudaError_t run_shipped_backward(BackwardCall const& call, cudaStream_t stream) {
  using Traits                 = BwdTraits<kHeadDim, cutlass::bfloat16_t>;
  BwdKernelParams const params = backward_params(call, kHeadDim);
  Problem const& problem       = params.problem;
  cudaError_t status           = cudaSuccess;
  if (call.parts & kPrepare) {
    status = launch_bwd_preprocess(params, Traits::kBlockM, Traits::kHeadDim, stream);
  }
  if (status == cudaSuccess && (call.parts & kMain)) {
    // As launch_bwd orders its tiles: Q, dO and dQ of a group stay in L2.
    int64_t const query_bytes = int64_t(8) * problem.seqlen_q * problem.head_dim;
    TileOrder const order     = make_tile_order(
        ceil_div(problem.seqlen_k, Traits::kBlockN), problem.batch, problem.heads_kv,
        heads_in_l2(query_bytes), problem.mask != MaskKind::kNone);
    auto const kernel = call.causal ? &bwd_kernel<Traits, MaskKind::kCausal, Level::kPlain>
                                    : &bwd_kernel<Traits, MaskKind::kNone, Level::kPlain>;
    Launch const launch{order.size(), Traits::kThreads, Traits::kSmemBytes, stream};
    status = launch_kernel(kernel, launch, params, order);
  }
  if (status == cudaSuccess && (call.parts & kFinish)) {
    constexpr int kDqBytes = Traits::TileQ::kSize * int(sizeof(typename Traits::Element));
    Launch const launch{query_block_count(problem, Traits::kBlockM), Traits::kThreads, kDqBytes,
                        stream};
    status = launch_kernel(&bwd_postprocess_kernel<Traits>, launch, params);
  }
  return status;
}

template <int kHeadDim>
cudaError_t shipped_backward_facts(bool causal, KernelFacts* facts) {
  using Traits = BwdTraits<kHeadDim, cutlass::bfloat16_t>;
  return read_facts(causal ? &bwd_kernel<Traits, MaskKind::kCausal, Level::kPlain>
                           : &bwd_kernel<Traits, MaskKind::kNone, Level::kPlain>,
                    Traits::kThreads, Traits::kSmemBytes, facts);
}

}  // namespace parallelism
