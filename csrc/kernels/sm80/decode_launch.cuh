#pragma once
// Decoding launch: tile by the number of rows.
#include "pieces/device_info.h"
#include "pieces/launch.cuh"
#include "sm80/decode_kernel.cuh"

namespace flash::sm80 {

template <class Traits>
cudaError_t launch_decode_variant(DecodeParams const& params, cudaStream_t stream) {
  Start const start = has_dependent_launch() ? Start::kOverlapped : Start::kAfter;
  return launch_tiles(start, &decode_kernel<Traits>, Grid{params.plan.grid, params.plan.workers},
                      Traits::kThreads, Traits::kSmemBytes, stream, params);
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
