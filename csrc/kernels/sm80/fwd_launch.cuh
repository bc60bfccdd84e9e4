#pragma once
// Forward launch: variant by mask, grid, shared memory.
#include "pieces/launch.cuh"
#include "sm80/fwd_kernel.cuh"

namespace flash::sm80 {

template <int kHeadDim, class Element>
cudaError_t launch_fwd(FwdParams const& params, cudaStream_t stream) {
  using Traits           = FwdTraits<kHeadDim, Element>;
  Problem const& problem = params.problem;
  int const blocks       = ceil_div(problem.seqlen_q, Traits::kBlockM);
  bool const causal      = problem.mask == MaskKind::kCausal;
  // K and V of a group stay in L2 while its query blocks run.
  int64_t const kv_bytes =
      int64_t(2) * problem.seqlen_k * problem.head_dim * int64_t(sizeof(Element));
  int const sharing     = problem.heads_q / problem.heads_kv;
  TileOrder const order = make_tile_order(blocks, problem.batch, problem.heads_q,
                                          heads_in_l2(kv_bytes) * sharing, causal);
  auto const kernel =
      causal ? &fwd_kernel<Traits, MaskKind::kCausal> : &fwd_kernel<Traits, MaskKind::kNone>;
  return launch_tiles(kernel, order.size(), Traits::kThreads, Traits::kSmemBytes, stream, params,
                      order);
}

}  // namespace flash::sm80
