#pragma once
// Reductions over groups of kLanes neighbouring lanes; all of them get the result.  Used by: numeric.cuh and the small kernels.
#include <cute/config.hpp>

namespace flash {

template <int kLanes>
CUTE_DEVICE float lanes_max(float x) {
  CUTE_UNROLL
  for (int step = kLanes / 2; step > 0; step /= 2) { x = fmaxf(x, __shfl_xor_sync(~0u, x, step)); }
  return x;
}
template <int kLanes>
CUTE_DEVICE float lanes_sum(float x) {
  CUTE_UNROLL
  for (int step = kLanes / 2; step > 0; step /= 2) { x += __shfl_xor_sync(~0u, x, step); }
  return x;
}

CUTE_DEVICE float quad_max(float x) { return lanes_max<4>(x); }
CUTE_DEVICE float quad_sum(float x) { return lanes_sum<4>(x); }

}  // namespace flash
