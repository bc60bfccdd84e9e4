#pragma once
// Backward launch: preprocess, main kernel by mask, conversion of dQ.
#include "common/bwd_preprocess.h"
#include "pieces/device_info.h"
#include "pieces/launch.cuh"
#include "sm80/bwd_kernel.cuh"
#include "sm80/bwd_postprocess.cuh"

namespace flash::sm80 {

template <class Traits>
cudaError_t launch_bwd_kernels(BwdParams const& params, cudaStream_t stream) {
  using Element          = typename Traits::Element;
  Problem const& problem = params.problem;
  cudaError_t status     = launch_bwd_preprocess(params, Traits::kBlockM, Traits::kHeadDim, stream);
  if (status != cudaSuccess) { return status; }

  bool const causal = problem.mask == MaskKind::kCausal;
  int const blocks  = ceil_div(problem.seqlen_k, Traits::kBlockN),
            group   = problem.heads_q / problem.heads_kv;
  // Q, dO (16 bits) and dQ (fp32) of a group's query heads stay in L2 while its key blocks run.
  int64_t const query_bytes = int64_t(8) * problem.seqlen_q * problem.head_dim * group;
  TileOrder const order =
      make_tile_order(blocks, problem.batch, problem.heads_kv, heads_in_l2(query_bytes), causal);
  auto const kernel =
      causal ? &bwd_kernel<Traits, MaskKind::kCausal> : &bwd_kernel<Traits, MaskKind::kNone>;
  status = launch_tiles(kernel, order.size(), Traits::kThreads, Traits::kSmemBytes, stream, params,
                        order);
  if (status != cudaSuccess) { return status; }

  int64_t const query_tiles =
      int64_t(ceil_div(problem.seqlen_q, Traits::kBlockM)) * problem.batch * problem.heads_q;
  constexpr int kDqBytes = Traits::TileQ::kSize * int(sizeof(Element));
  return launch_tiles(&bwd_postprocess_kernel<Traits>, query_tiles, Traits::kThreads, kDqBytes,
                      stream, params);
}

// kSmallTiles: this build is also for GPUs whose thread blocks get less shared memory than sm_90's.
template <int kHeadDim, class Element, bool kSmallTiles>
cudaError_t launch_bwd(BwdParams const& params, cudaStream_t stream) {
  if constexpr (kSmallTiles && has_small_bwd_tile(kHeadDim)) {
    if (has_small_smem()) {
      return launch_bwd_kernels<BwdTraits<kHeadDim, Element, true>>(params, stream);
    }
  }
  return launch_bwd_kernels<BwdTraits<kHeadDim, Element>>(params, stream);
}

}  // namespace flash::sm80
