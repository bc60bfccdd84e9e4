#pragma once
// What happens to scores before the softmax: scale, softcap, ALiBi.
// Used by: fwd_mainloop (S, queries down) and bwd_mainloop (S^T, keys down).  Branches are the same for a whole tile.
#include <cute/tensor.hpp>

#include "flash.h"
#include "pieces/numeric.cuh"

namespace flash {
using namespace cute;

// Without softcap and ALiBi the softmax does the scaling.  The same for all tiles of a call.
CUTE_DEVICE bool has_score_mod(Problem const& problem) {
  return problem.softcap > 0.f || problem.alibi_slopes;
}
// Factor of the scores in the softmax's base-2 exponent, after ScoreMod::apply().
CUTE_DEVICE float scale_log2_of(Problem const& problem) {
  return (has_score_mod(problem) ? 1.f : problem.scale) * kLog2E;
}

struct ScoreMod {
  float scale, softcap, slope;
  bool has_slope;

  // Distances |i + shift - j| of a tile's queries i and keys j, for this thread: f(score index, distance).
  template <bool kTransposed, class TiledMma, class TileShape, class TensorS, class Function>
  CUTE_DEVICE static void for_distances(TensorS const& tSrS, int row0, int col0, int shift,
                                        int thread, Function f) {
    constexpr int kQ = kTransposed ? 1 : 0, kK = 1 - kQ;
    auto cS    = make_identity_tensor(TileShape{});
    auto tScS  = TiledMma{}.get_slice(thread).partition_C(cS);
    auto t0ScS = TiledMma{}.get_slice(_0{}).partition_C(cS);  // known at compile time
    // Integers below 2^24 times differ by exact floats.
    float const base =
        float(row0 + shift - col0 + int(get<kQ>(tScS(_0{}))) - int(get<kK>(tScS(_0{}))));
    CUTE_UNROLL
    for (int i = 0; i < size(tSrS); ++i) {
      f(i, fabsf(base + float(int(get<kQ>(t0ScS(i))) - int(get<kK>(t0ScS(i))))));
    }
  }

  template <bool kTransposed, class TiledMma, class TileShape, class TensorS>
  CUTE_DEVICE void apply(TensorS& tSrS, int row0, int col0, int shift, int thread) const {
    if (softcap > 0.f) {
      float const inner = scale / softcap;
      CUTE_UNROLL
      for (int i = 0; i < size(tSrS); ++i) { tSrS(i) = softcap * tanh_approx(tSrS(i) * inner); }
    } else if (has_slope) {
      CUTE_UNROLL
      for (int i = 0; i < size(tSrS); ++i) { tSrS(i) *= scale; }
    }
    if (has_slope) {
      for_distances<kTransposed, TiledMma, TileShape>(
          tSrS, row0, col0, shift, thread,
          [&](int i, float distance) { tSrS(i) -= slope * distance; });
    }
  }
};

CUTE_DEVICE ScoreMod score_mod(Problem const& problem, int batch, int head) {
  float const slope = problem.alibi_slopes
                          ? __ldg(problem.alibi_slopes + batch * problem.alibi_batch_stride + head)
                          : 0.f;
  return {problem.scale, problem.softcap, slope, problem.alibi_slopes != nullptr};
}

}  // namespace flash
