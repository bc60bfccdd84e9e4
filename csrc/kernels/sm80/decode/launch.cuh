#pragma once
// Decoding launch: tile by the number of rows.
#include <algorithm>

#include "entry.h"
#include "pieces/device_info.h"
#include "pieces/launch.cuh"
#include "sm80/decode/kernel.cuh"

namespace flash::sm80 {

template <class Traits>
cudaError_t launch_decode_variant(DecodeKernelParams const& params, int capability,
                                  cudaStream_t stream) {
  auto const kernel = &decode_kernel<Traits>;
  Launch launch{params.plan.grid, Traits::kThreads, Traits::kSmemBytes, stream};
  launch.blocks_y = params.plan.workers, launch.start = earliest_start(capability);
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

// The functions of a unit.  Sizes: BuiltSizes.
template <int kHeadDim, class Element, class Sizes>
struct Decode {
  // Calls choose(size, narrow), both Constants, for the kernel of a plan.
  template <class Choose>
  static void choose_traits(DecodePlan const& decided, int smem_kb, Choose choose) {
    choose_size(Sizes{}, smem_kb, [&](auto size) {
      decided.block_m == kNarrowRows ? choose(size, Constant<true>{})
                                     : choose(size, Constant<false>{});
    });
  }

  static bool serves(DecodeParams const& params) { return has_one_head_dim(params.problem); }

  static void plan(DecodeParams const& params, Plan& plan) {
    DecodeDevice const device{sm_count(), size_within(Sizes{}, plan.smem_kb),
                              has_clusters(plan.capability)};
    DecodePlan const decided = plan_decode(params, kHeadDim, device);
    plan.workspace_bytes     = workspace_bytes(decided);
    plan.counters            = uses_kept_counters(decided) ? decided.counters : 0;
    put_notes(plan, decided);
    choose_traits(decided, plan.smem_kb, [&](auto size, auto narrow) {
      bool const can_run = fits<DecodeTraitsOf<kHeadDim, Element, narrow, size>>(plan.smem_kb) &&
                           decided.grid <= INT32_MAX;
      if (!can_run) { plan.refused = cudaErrorInvalidConfiguration; }
    });
  }

  static cudaError_t launch(DecodeParams const& params, Plan const& plan, Scratch const& scratch,
                            cudaStream_t stream) {
    DecodeKernelParams const all = kernel_params(params, get_notes<DecodePlan>(plan), scratch);
    if (plan.counters == 0 && all.plan.counters > 0) {
      size_t const bytes       = size_t(all.plan.counters) * sizeof(int);
      cudaError_t const status = cudaMemsetAsync(all.workspace.counters, 0, bytes, stream);
      if (status != cudaSuccess) { return status; }
    }
    cudaError_t status = cudaSuccess;
    choose_traits(all.plan, plan.smem_kb, [&](auto size, auto narrow) {
      using Traits = DecodeTraitsOf<kHeadDim, Element, narrow, size>;
      status       = launch_decode_variant<Traits>(all, plan.capability, stream);
    });
    return status;
  }
};

}  // namespace flash::sm80
