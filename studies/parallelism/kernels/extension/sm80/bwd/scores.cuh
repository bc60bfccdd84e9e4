#pragma once
// From the scores S^T to the weights P^T and the gradients dS^T, in the registers of a thread.
// Used by: bwd/mainloop.
#include "pieces/coordinates.cuh"
#include "pieces/numeric.cuh"
#include "pieces/score_mod.cuh"
#include "pieces/softmax.cuh"
#include "sm80/bwd/traits.cuh"
#include "sm80/instructions/fragment.cuh"

namespace flash::sm80 {

template <class Traits, Level kLevel>
struct BwdScores {
  using Element = typename Traits::Element;
  using TileSdp = Shape<Int<Traits::kBlockN>, Int<Traits::kSubM>>;

  // LSE of this thread's queries, in base 2 and less by keep_log2: with dropout P^T is keep_scale times the weights.  Returns whether some
  // of the warp's are so large that scores must be limited.
  template <int kQueries>
  CUTE_DEVICE static bool load_lse(float (&lse)[kQueries], float const* sLse, int thread) {
    auto where    = coordinates(thread);
    float largest = 0.f;
    CUTE_UNROLL
    for (int c = 0; c < kQueries; ++c) {
      lse[c]  = sLse[get<1>(where(0, c))];
      largest = fmaxf(largest, fabsf(lse[c]));
    }
    return __any_sync(~0u, largest > kLargeLog2);
  }

  // Where LSE is rounded so coarsely that exp2 could overflow where P is 1.
  template <class TensorS, int kQueries>
  CUTE_DEVICE static void limit_scores(TensorS& scores, float const (&lse)[kQueries],
                                       float scale_log2, float keep_log2) {
    CUTE_UNROLL
    for (int c = 0; c < kQueries; ++c) {
      CUTE_UNROLL
      for (int r = 0; r < size<0>(scores); ++r) {
        float const real = may_have(kLevel, Level::kDropout) ? lse[c] + keep_log2 : lse[c];
        scores(r, c)     = fminf(scores(r, c), real / scale_log2);
      }
    }
  }

  // Queries [begin, end) of S^T become P^T = exp2(S^T scale_log2 - LSE).
  template <class TensorS, int kQueries>
  CUTE_DEVICE static void exponentials(TensorS& scores, float const (&lse)[kQueries],
                                       float scale_log2, int begin, int end) {
    CUTE_UNROLL
    for (int c = begin; c < end; ++c) {
      CUTE_UNROLL
      for (int r = 0; r < size<0>(scores); ++r) {
        scores(r, c) = exp2_approx(fmaf(scores(r, c), scale_log2, -lse[c]));
      }
    }
  }

  // P^T, rounded, without its dropped weights.
  template <class TensorS>
  CUTE_DEVICE static auto round_kept(TensorS const& tSrS) {
    if constexpr (may_have(kLevel, Level::kDropout)) {
      return round_positive<Element>(tSrS);
    } else {
      return round_to<Element>(tSrS);
    }
  }

  // dP^T becomes dS^T = P^T (dP^T - delta), with dropout dP^T for kept weights alone.  The gradient then goes through
  // inner(row, column, gradient, P).
  template <class TensorS, class Inner>
  CUTE_DEVICE static void score_gradients(TensorS& tSrdP, TensorS const& tSrP, float const* sDelta,
                                          int thread, Inner inner) {
    auto gradients = rows_of(tSrdP);
    auto p         = rows_of(tSrP);
    auto where     = coordinates(thread);
    CUTE_UNROLL
    for (int c = 0; c < size<1>(gradients); ++c) {
      float const delta = sDelta[get<1>(where(0, c))];
      CUTE_UNROLL
      for (int r = 0; r < size<0>(gradients); ++r) {
        if constexpr (may_have(kLevel, Level::kDropout)) {
          float const kept = fmaxf(p(r, c), 0.f), weight = fabsf(p(r, c));
          gradients(r, c) = inner(r, c, fmaf(kept, gradients(r, c), -weight * delta), weight);
        } else {
          gradients(r, c) = inner(r, c, p(r, c) * (gradients(r, c) - delta), p(r, c));
        }
      }
    }
  }

  // Through tanh: times its derivative.  The score s after tanh and ALiBi comes back from P = exp2(s scale_log2 - LSE), where P is not 0.
  // offset: of query i from key j in positions, where both are the tile's first.
  CUTE_DEVICE static auto softcap_gradient(Problem const& problem, ScoreMod const& mod,
                                           float const* sLse, int offset, int thread) {
    auto where          = coordinates(thread);
    auto where0         = coordinates(0);  // known at compile time
    float const inverse = kLn2 * problem.unit.per_unit;
    TileDistances<true, typename Traits::MmaSdp, TileSdp> const distances(offset, thread);
    return [=](int r, int c, float gradient, float weight) {
      // Finite where P, and so the gradient, is 0: hidden keys, and queries without keys, whose LSE is +inf.
      constexpr float kLeastLog2 = -150.f, kLargest = 1e18f;
      float const lse = fminf(sLse[get<1>(where(0, c))] * inverse, kLargest);
      float capped    = fmaf(fmaxf(log2_approx(weight), kLeastLog2), inverse, lse);
      if constexpr (kLevel == Level::kAll) {
        if (problem.softcap == 0.f) { return gradient; }
        capped = mod.unbiased(capped, distances.of(where0(r, c)));
      }
      return gradient * ScoreMod::cap_derivative(capped);
    };
  }

 private:
  // Queries (columns) of this thread's scores, for reading per-query values.
  CUTE_DEVICE static auto coordinates(int thread) {
    auto tScS = tile_coordinates<typename Traits::MmaSdp, TileSdp>(thread);
    return rows_of(tScS);
  }
};

}  // namespace flash::sm80
