#pragma once
// Decoding launch: tile by the number of rows.
#include <algorithm>

#include "pieces/device_info.h"
#include "pieces/launch.cuh"
#include "sm80/decode/kernel.cuh"

namespace flash::sm80 {

template <class Traits>
cudaError_t launch_decode_variant(DecodeParams const& params, cudaStream_t stream) {
  auto const kernel = &decode_kernel<Traits>;
  Launch launch{params.plan.grid, Traits::kThreads, Traits::kSmemBytes, stream};
  launch.blocks_y = params.plan.workers, launch.start = earliest_start();
  if (params.plan.cluster_bits == 0) { return launch_kernel(kernel, launch, params); }
  // All clusters run at once, or there are none: one that waits for others takes longer than it saves, and so do far fewer workers.
  DecodeParams chosen   = params;
  int const cluster     = 1 << params.plan.cluster_bits;
  launch.cluster        = dim3(1, unsigned(cluster));
  int64_t const of_head = clusters_at_once(kernel, launch) / launch.blocks;
  int const workers     = int(std::min<int64_t>(launch.blocks_y, of_head * cluster));
  if (4 * workers >= 3 * launch.blocks_y) {
    launch.blocks_y = chosen.plan.workers = workers;
  } else {
    launch.cluster = dim3(1), chosen.plan.cluster_bits = 0;
  }
  return launch_kernel(kernel, launch, chosen);
}

template <int kHeadDim, class Element, bool kSmallSmem>
cudaError_t launch_decode_tile(DecodeParams const& params, cudaStream_t stream) {
  if (params.plan.block_m == kNarrowRows) {
    return launch_decode_variant<DecodeTraits<kHeadDim, Element, true, kSmallSmem>>(params, stream);
  }
  return launch_decode_variant<DecodeTraits<kHeadDim, Element, false, kSmallSmem>>(params, stream);
}

// kSmallTiles: this build is also for GPUs whose thread blocks get less shared memory than sm_90's.
template <int kHeadDim, class Element, bool kSmallTiles>
cudaError_t launch_decode(DecodeParams const& params, cudaStream_t stream) {
  if constexpr (kSmallTiles) {
    if (has_small_smem()) { return launch_decode_tile<kHeadDim, Element, true>(params, stream); }
  }
  return launch_decode_tile<kHeadDim, Element, false>(params, stream);
}

}  // namespace flash::sm80
