#pragma once
// Forward launch: variant by mask, grid, shared memory.
#include "entry.h"
#include "pieces/launch.cuh"
#include "sm80/fwd/kernel.cuh"

namespace flash::sm80 {

template <class Traits, class Kernel>
cudaError_t launch_fwd_kernel(FwdParams const& params, Kernel kernel, cudaStream_t stream) {
  Problem const& problem = params.problem;
  bool const ragged      = problem.cu_seqlens_q != nullptr;
  int64_t const blocks   = ragged ? slot_count(problem.total_q, problem.batch, Traits::kBlockM)
                                  : ceil_div(problem.seqlen_q, Traits::kBlockM);
  if (blocks * problem.heads_q > INT32_MAX) { return cudaErrorInvalidConfiguration; }
  int const sharing = problem.heads_q / problem.heads_kv;
  bool const window = !ragged && problem.mask == MaskKind::kLocal;
  // K and V of a group stay in L2 while its query blocks run; of a window, what a few neighbouring blocks see.
  int64_t const seen = int64_t(problem.window_left) + problem.window_right + 8 * Traits::kBlockM;
  int64_t const keys = window && seen < problem.seqlen_k ? seen : problem.seqlen_k;
  int64_t const kv_bytes = 2 * keys * problem.head_dim * int64_t(sizeof(typename Traits::Element));
  int const reach        = problem.window_left - (problem.seqlen_k - problem.seqlen_q);
  TileOrder const order =
      make_tile_order(int(blocks), ragged ? 1 : problem.batch, problem.heads_q,
                      heads_in_l2(kv_bytes) * sharing, ragged || problem.mask != MaskKind::kNone,
                      sharing, window ? short_blocks(reach, Traits::kBlockM, int(blocks)) : 0);
  Launch const launch{order.size(), Traits::kThreads, Traits::kSmemBytes, stream};
  return launch_kernel(kernel, launch, params, order);
}

// The functions of a unit.  Sizes: BuiltSizes.
template <int kHeadDim, class Element, class Sizes>
struct Fwd {
  static bool serves(FwdParams const&) { return true; }

  static void plan(FwdParams const&, Plan&) {}

  static cudaError_t launch(FwdParams const& params, Plan const& plan, Scratch const&,
                            cudaStream_t stream) {
    cudaError_t status = cudaSuccess;
    choose_size(Sizes{}, plan.smem_kb, [&](auto size) {
      choose_kernel(params.problem, [&](auto mask, auto level) {
        using Traits = FwdTraitsOf<kHeadDim, Element, size, fwd_is_general(level)>;
        status = fits<Traits>(plan.smem_kb)
                     ? launch_fwd_kernel<Traits>(params, &fwd_kernel<Traits, mask, level>, stream)
                     : cudaErrorInvalidConfiguration;
      });
    });
    return status;
  }
};

}  // namespace flash::sm80
