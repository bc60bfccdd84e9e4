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

template <int kHeadDim, class Element, bool kSmallSmem>
cudaError_t launch_decode_tile(DecodeKernelParams const& params, cudaStream_t stream) {
  if (params.plan.block_m == kNarrowRows) {
    return launch_decode_variant<DecodeTraits<kHeadDim, Element, true, kSmallSmem>>(params, stream);
  }
  return launch_decode_variant<DecodeTraits<kHeadDim, Element, false, kSmallSmem>>(params, stream);
}

// The functions of a unit.  kSmallTiles: this build is also for GPUs whose thread blocks get less shared memory than sm_90's.
template <int kHeadDim, class Element, bool kSmallTiles>
struct Decode {
  static bool serves(DecodeParams const&) { return true; }

  static void plan(DecodeParams const& params, Plan& plan) {
    DecodeDevice const device{sm_count(), kSmallTiles && has_small_smem(), has_clusters()};
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
    if constexpr (kSmallTiles) {
      if (has_small_smem()) { return launch_decode_tile<kHeadDim, Element, true>(all, stream); }
    }
    return launch_decode_tile<kHeadDim, Element, false>(all, stream);
  }
};

}  // namespace flash::sm80
