#pragma once
// Forward launch: variant by mask, grid, shared memory.
#include "entry.h"
#include "pieces/launch.cuh"
#include "pieces/query_order.h"
#include "sm80/fwd/kernel.cuh"

namespace flash::sm80 {

template <class Traits, class Kernel>
cudaError_t launch_fwd_kernel(FwdParams const& params, Kernel kernel, cudaStream_t stream) {
  TileOrder order;
  if (!make_query_order(params.problem, Traits::kBlockM, order)) {
    return cudaErrorInvalidConfiguration;
  }
  Launch const launch{order.size(), Traits::kThreads, Traits::kSmemBytes, stream};
  return launch_kernel(kernel, launch, params, order);
}

// The functions of a unit.  Sizes: BuiltSizes.
template <int kHeadDim, class Element, class Sizes>
struct Fwd {
  static bool serves(FwdParams const& params) { return has_one_head_dim(params.problem); }

  static void plan(FwdParams const& params, Plan& plan) {
    bool const general = fwd_is_general(level_of(params.problem));
    choose_size(Sizes{}, plan.smem_kb, [&](auto size) {
      bool const can_run = general
                               ? fits<FwdTraitsOf<kHeadDim, Element, size, true>>(plan.smem_kb)
                               : fits<FwdTraitsOf<kHeadDim, Element, size, false>>(plan.smem_kb);
      if (!can_run) { plan.refused = cudaErrorInvalidConfiguration; }
    });
  }

  static cudaError_t launch(FwdParams const& params, Plan const& plan, Scratch const&,
                            cudaStream_t stream) {
    cudaError_t status = cudaSuccess;
    choose_size(Sizes{}, plan.smem_kb, [&](auto size) {
      choose_kernel(params.problem, [&](auto mask, auto level) {
        using Traits = FwdTraitsOf<kHeadDim, Element, size, fwd_is_general(level)>;
        status       = launch_fwd_kernel<Traits>(params, &fwd_kernel<Traits, mask, level>, stream);
      });
    });
    return status;
  }
};

}  // namespace flash::sm80
