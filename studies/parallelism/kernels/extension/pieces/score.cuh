#pragma once
// What happens to a score before the softmax, softcap and ALiBi: the formula, for one score.
// Used by: score_mod.cuh (forward, backward), the decoding main loop, common/attn_probs.cu.  Knows no tile.
//
// Scores q.k are scaled where they are exponentiated.  A changed score is in units of which the exponent knows the factor:
//
//   unit       softmax_scale, with softcap softcap
//   softcap    s = tanh(q.k softmax_scale / softcap), otherwise s = q.k
//   ALiBi      s - slope / unit * |i + shift - j|        i a query, j a key, shift = seqlen_k - seqlen_q
//   softmax    2^(s unit log2(e))
#include "flash.h"
#include "pieces/approximations.cuh"

namespace flash {

struct ScoreMod {
  float inner;  // softmax_scale / softcap
  float slope;  // in the scores' unit
  bool has_softcap, has_slope;

  CUTE_DEVICE float capped(float score) const { return tanh_approx(score * inner); }
  // distance: |i + shift - j|
  CUTE_DEVICE float biased(float score, float distance) const { return score - slope * distance; }
  CUTE_DEVICE float unbiased(float score, float distance) const { return score + slope * distance; }
  // Both, as far as there are any.
  CUTE_DEVICE float changed(float score, float distance) const {
    if (has_softcap) { score = capped(score); }
    return has_slope ? biased(score, distance) : score;
  }
  // Of capped(), by its result: 1 - tanh^2.
  CUTE_DEVICE static float cap_derivative(float capped_score) {
    return fmaf(-capped_score, capped_score, 1.f);
  }
};

// A head's slope as the caller gave it, where there is ALiBi.
CUTE_DEVICE float alibi_slope(Problem const& problem, int batch, int head) {
  return __ldg(problem.alibi_slopes + batch * problem.alibi_batch_stride + head);
}

CUTE_DEVICE ScoreMod score_mod(Problem const& problem, int batch, int head) {
  bool const has_slope = problem.alibi_slopes;
  float const slope    = has_slope ? alibi_slope(problem, batch, head) : 0.f;
  return {problem.unit.inner, slope * problem.unit.per_unit, problem.softcap > 0.f, has_slope};
}

}  // namespace flash
