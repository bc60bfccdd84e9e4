#pragma once
// Forward launch: variant by mask, grid, shared memory.
#include "pieces/launch.cuh"
#include "sm80/fwd_kernel.cuh"

namespace flash::sm80 {

template <int kHeadDim, class Element>
cudaError_t launch_fwd(FwdParams const& params, cudaStream_t stream) {
  using Traits  = FwdTraits<kHeadDim, Element>;
  using General = FwdTraits<kHeadDim, Element, true>;
  static_assert(Traits::kBlockM == General::kBlockM && Traits::kThreads == General::kThreads,
                "one grid");
  Problem const& problem = params.problem;
  bool const ragged      = problem.cu_seqlens_q != nullptr;
  int64_t const blocks   = ragged ? slot_count(problem.total_q, problem.batch, Traits::kBlockM)
                                  : ceil_div(problem.seqlen_q, Traits::kBlockM);
  if (blocks * problem.heads_q > INT32_MAX) { return cudaErrorInvalidConfiguration; }
  // K and V of a group stay in L2 while its query blocks run.
  int64_t const kv_bytes =
      int64_t(2) * problem.seqlen_k * problem.head_dim * int64_t(sizeof(Element));
  int const sharing = problem.heads_q / problem.heads_kv;
  TileOrder const order =
      make_tile_order(int(blocks), ragged ? 1 : problem.batch, problem.heads_q,
                      heads_in_l2(kv_bytes) * sharing, ragged || problem.mask != MaskKind::kNone);
  auto kernel    = problem.mask == MaskKind::kCausal
                       ? &fwd_kernel<Traits, MaskKind::kCausal, Level::kPlain>
                       : &fwd_kernel<Traits, MaskKind::kNone, Level::kPlain>;
  int smem_bytes = Traits::kSmemBytes;
  if (is_general(problem)) {
    kernel     = problem.rng_state ? &fwd_kernel<General, MaskKind::kLocal, Level::kDropout>
                                   : &fwd_kernel<General, MaskKind::kLocal, Level::kScores>;
    smem_bytes = General::kSmemBytes;
  }
  return launch_tiles(kernel, order.size(), Traits::kThreads, smem_bytes, stream, params, order);
}

}  // namespace flash::sm80
