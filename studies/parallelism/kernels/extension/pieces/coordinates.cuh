#pragma once
// Where in a tile the values of an accumulator lie.  Used by: masks, score changes, epilogues.  Knows no instruction: the MMA says it.
#include <cute/tensor.hpp>

namespace flash {
using namespace cute;

// Coordinates (row, column) of what a thread holds of the accumulator (MMA, MMA_M, MMA_N).  Those of thread _0{} are known at compile
// time; all other threads hold them plus one constant pair.
template <class TiledMma, class TileShape, class Thread>
CUTE_HOST_DEVICE auto tile_coordinates(Thread const& thread) {
  return TiledMma{}.get_slice(thread).partition_C(make_identity_tensor(TileShape{}));
}

}  // namespace flash
