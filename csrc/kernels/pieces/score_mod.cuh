#pragma once
// What happens to scores before the softmax: softcap and ALiBi.
// Used by: the main loops (S, queries down; in the backward pass S^T, keys down).  Branches are the same for a whole tile.
//
// Scores q.k are scaled where they are exponentiated.  A changed score is in units of which the exponent knows the factor:
//
//   unit       softmax_scale, with softcap softcap
//   softcap    s = tanh(q.k softmax_scale / softcap), otherwise s = q.k
//   ALiBi      s - slope / unit * |i + shift - j|
//   softmax    2^(s unit log2(e))
#include <cute/tensor.hpp>

#include "flash.h"
#include "pieces/level.h"
#include "pieces/numeric.cuh"

namespace flash {
using namespace cute;

struct ScoreMod {
  float inner;  // softmax_scale / softcap
  float slope;  // in the scores' unit
  bool has_softcap, has_slope;

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

  template <Level kLevel, bool kTransposed, class TiledMma, class TileShape, class TensorS>
  CUTE_DEVICE void apply(TensorS& tSrS, int row0, int col0, int shift, int thread) const {
    if (decided<kLevel>(Level::kSoftcap, has_softcap)) {
      CUTE_UNROLL
      for (int i = 0; i < size(tSrS); ++i) { tSrS(i) = tanh_approx(tSrS(i) * inner); }
    }
    if (decided<kLevel>(Level::kAlibi, has_slope)) {
      for_distances<kTransposed, TiledMma, TileShape>(
          tSrS, row0, col0, shift, thread,
          [&](int i, float distance) { tSrS(i) -= slope * distance; });
    }
  }
};

CUTE_DEVICE ScoreMod score_mod(Problem const& problem, int batch, int head) {
  bool const has_slope = problem.alibi_slopes;
  float const slope =
      has_slope ? __ldg(problem.alibi_slopes + batch * problem.alibi_batch_stride + head) : 0.f;
  return {problem.unit.inner, slope * problem.unit.per_unit, problem.softcap > 0.f, has_slope};
}

}  // namespace flash
