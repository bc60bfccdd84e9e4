#pragma once
// The scores of a tile before the softmax: score.cuh's formula for all that a thread holds of it.
// Used by: the main loops of forward (S, queries down) and backward (S^T, keys down).  Branches are the same for a whole tile.
#include <cute/tensor.hpp>

#include "pieces/coordinates.cuh"
#include "pieces/level.h"
#include "pieces/score.cuh"

namespace flash {
using namespace cute;

// Distances |i + shift - j| of a tile's queries i and keys j, for one thread.  kTransposed: the accumulator holds S^T.
template <bool kTransposed, class TiledMma, class TileShape>
struct TileDistances {
  static constexpr int kQ = kTransposed ? 1 : 0, kK = 1 - kQ;
  float base;

  // offset: of the tile's first query from its first key, in positions.
  CUTE_DEVICE TileDistances(int offset, int thread) {
    auto const first = tile_coordinates<TiledMma, TileShape>(thread)(_0{});
    base             = float(offset + int(get<kQ>(first)) - int(get<kK>(first)));
  }
  // coordinate: thread 0's, known at compile time.  Integers below 2^24 times differ by exact floats.
  template <class Coordinate>
  CUTE_DEVICE float of(Coordinate const& coordinate) const {
    return fabsf(base + float(int(get<kQ>(coordinate)) - int(get<kK>(coordinate))));
  }
};

// row0, col0: first query and first key of the tile.
template <Level kLevel, bool kTransposed, class TiledMma, class TileShape, class TensorS>
CUTE_DEVICE void modify_scores(ScoreMod const& mod, TensorS& tSrS, int row0, int col0, int shift,
                               int thread) {
  if (decided<kLevel>(Level::kSoftcap, mod.has_softcap)) {
    CUTE_UNROLL
    for (int i = 0; i < size(tSrS); ++i) { tSrS(i) = mod.capped(tSrS(i)); }
  }
  if (decided<kLevel>(Level::kAlibi, mod.has_slope)) {
    TileDistances<kTransposed, TiledMma, TileShape> const distances(row0 + shift - col0, thread);
    auto const t0ScS = tile_coordinates<TiledMma, TileShape>(_0{});
    CUTE_UNROLL
    for (int i = 0; i < size(tSrS); ++i) { tSrS(i) = mod.biased(tSrS(i), distances.of(t0ScS(i))); }
  }
}

}  // namespace flash
