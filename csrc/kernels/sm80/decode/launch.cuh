#pragma once
// Decoding launch: tile by the number of rows.
#include <algorithm>

#include "entry.h"
#include "pieces/device_info.h"
#include "pieces/launch.cuh"
#include "sm80/decode/kernel.cuh"

namespace flash::sm80 {

template <class Traits>
cudaError_t launch_decode_variant(DecodeKernelParams const& params, cudaStream_t stream) {
  auto const kernel = &decode_kernel<Traits>;
  Launch launch{params.plan.grid, Traits::kThreads, Traits::kSmemBytes, stream};
  launch.blocks_y = params.plan.workers, launch.start = earliest_start();
  if (params.plan.cluster_bits == 0) { return launch_kernel(kernel, launch, params); }
  // All clusters run at once, or there are none: one that waits for others takes longer than it saves, and so do far fewer workers.
  DecodeKernelParams chosen = params;
  int const cluster         = 1 << params.plan.cluster_bits;
  launch.cluster            = dim3(1, unsigned(cluster));
  int64_t const of_head     = clusters_at_once(kernel, launch) / launch.blocks;
  int const workers         = int(std::min<int64_t>(launch.blocks_y, of_head * cluster));
  if (4 * workers >= 3 * launch.blocks_y) {
    launch.blocks_y = chosen.plan.workers = workers;
  } else {
    launch.cluster = dim3(1), chosen.plan.cluster_bits = 0;
  }
  return launch_kernel(kernel, launch, chosen);
}

template <class Traits>
cudaError_t launch_if_it_fits(DecodeKernelParams const& params, int smem_kb, cudaStream_t stream) {
  return fits<Traits>(smem_kb) ? launch_decode_variant<Traits>(params, stream)
                               : cudaErrorInvalidConfiguration;
}

// The functions of a unit.  Sizes: BuiltSizes.
template <int kHeadDim, class Element, class Sizes>
struct Decode {
  static bool serves(DecodeParams const& params) { return has_one_head_dim(params.problem); }

  static void plan(DecodeParams const& params, Plan& plan) {
    DecodeDevice const device{sm_count(), size_within(Sizes{}, plan.smem_kb), has_clusters()};
    DecodePlan const decided = plan_decode(params, kHeadDim, device);
    plan.workspace_bytes     = workspace_bytes(decided);
    plan.counters            = uses_kept_counters(decided) ? decided.counters : 0;
    put_notes(plan, decided);
  }

  static cudaError_t launch(DecodeParams const& params, Plan const& plan, Scratch const& scratch,
                            cudaStream_t stream) {
    DecodeKernelParams const all = kernel_params(params, get_notes<DecodePlan>(plan), scratch);
    if (plan.counters == 0 && all.plan.counters > 0) {
      size_t const bytes       = size_t(all.plan.counters) * sizeof(int);
      cudaError_t const status = cudaMemsetAsync(all.workspace.counters, 0, bytes, stream);
      if (status != cudaSuccess) { return status; }
    }
    bool const narrow  = all.plan.block_m == kNarrowRows;
    cudaError_t status = cudaSuccess;
    choose_size(Sizes{}, plan.smem_kb, [&](auto size) {
      using Narrow = DecodeTraitsOf<kHeadDim, Element, true, size>;
      using Wide   = DecodeTraitsOf<kHeadDim, Element, false, size>;
      status       = narrow ? launch_if_it_fits<Narrow>(all, plan.smem_kb, stream)
                            : launch_if_it_fits<Wide>(all, plan.smem_kb, stream);
    });
    return status;
  }
};

}  // namespace flash::sm80
