#pragma once
// Running softmax of one query tile: reference maximum and sum per row, in base 2 with the scale folded into the exponent.
// Used by: the forward main loops of sm80 and sm90.  Knows nothing of masks: hidden scores arrive as -inf.
// Invariant: O and row_sum are relative to the same row_ref, once O has followed.
#include "pieces/integers.cuh"
#include "pieces/merge.cuh"
#include "pieces/numeric.cuh"

namespace flash {

// The reference is the row maximum, or an older maximum that is smaller by at most this many powers of two: O is rescaled
// only when the maximum outgrows it.  P <= 2^8 then, far inside fp16, and no bit of precision is lost.
constexpr float kLazyRescaleLog2 = 8.f;
// Beyond this size of the scaled reference, one FFMA for (s - ref) * scale loses more than 2^-8 to the rounding of
// ref * scale.
constexpr float kLargeLog2 = 65536.f;

// Reference of a row that has seen no key: finite, so that exp2((-inf - it) * scale) is 0 and not NaN.
constexpr float kNoReference = -1e30f;

template <int kRows>
struct Softmax {
  float row_ref[kRows];  // unscaled
  float row_sum[kRows];  // this lane's part until finish()
  float offset
      [kRows];  // from update() to the last exponentials(): what is subtracted from the scaled scores
  float scale_log2;  // of the scores: ScoreUnit::scale_log2

  CUTE_DEVICE explicit Softmax(float scale_log2_) : scale_log2(scale_log2_) {
    CUTE_UNROLL
    for (int r = 0; r < kRows; ++r) { row_ref[r] = kNoReference, row_sum[r] = 0.f; }
  }

  // The references of this block of scores (rows, columns), of rows kFirst and following.  Where some reference of the warp's rows moves,
  // O (rows, columns), which holds all earlier blocks, follows.
  template <int kFirst = 0, class TensorS, class TensorO>
  CUTE_DEVICE void update(TensorS& scores, TensorO& o_rows) {
    constexpr int kCount = decltype(size<0>(scores))::value;
    float row_max[kCount], largest = 0.f;
    bool moves = false;
    CUTE_UNROLL
    for (int i = 0; i < kCount; ++i) {
      int const r = kFirst + i;
      row_max[i]  = scores(i, 0);
      CUTE_UNROLL
      for (int c = 1; c < size<1>(scores); ++c) { row_max[i] = fmaxf(row_max[i], scores(i, c)); }
      row_max[i] = quad_max(row_max[i]);
      offset[r]  = row_ref[r] * scale_log2;
      largest    = fmaxf(largest, fabsf(offset[r]));
      moves |= fmaf(row_max[i], scale_log2, -offset[r]) > kLazyRescaleLog2;
    }
    // One block: a second branch for O was turned into predicated instructions, issued in every step.
    if (__any_sync(~0u, moves | (largest > kLargeLog2))) {
      float shrink[kCount];
      move_references<kFirst>(scores, row_max, shrink);
      CUTE_UNROLL
      for (int i = 0; i < kCount; ++i) {
        CUTE_UNROLL
        for (int c = 0; c < size<1>(o_rows); ++c) { o_rows(i, c) *= shrink[i]; }
      }
    }
  }

  // The same while O is still being added to: whether O must follow, by the factors shrink, which are set then alone.
  // is_row: rows that are the sequence's; the others move with them, but no reference moves for their sake.
  template <class TensorS>
  CUTE_DEVICE bool update_references(TensorS& scores, bool const (&is_row)[kRows],
                                     float (&shrink)[kRows]) {
    float row_max[kRows];
    bool moves = false;
    CUTE_UNROLL
    for (int r = 0; r < kRows; ++r) {
      row_max[r] = scores(r, 0);
      CUTE_UNROLL
      for (int c = 1; c < size<1>(scores); ++c) { row_max[r] = fmaxf(row_max[r], scores(r, c)); }
      row_max[r] = quad_max(row_max[r]);
      offset[r]  = row_ref[r] * scale_log2;
      moves |= is_row[r] & ((fmaf(row_max[r], scale_log2, -offset[r]) > kLazyRescaleLog2) |
                            (fabsf(offset[r]) > kLargeLog2));
    }
    bool const any_moves = __any_sync(~0u, moves);
    if (any_moves) { move_references<0>(scores, row_max, shrink); }
    return any_moves;
  }

  // Column c of the scores of rows kFirst and following becomes P.
  template <int kFirst = 0, class TensorS>
  CUTE_DEVICE void exponentials(TensorS& scores, int c) {
    CUTE_UNROLL
    for (int i = 0; i < size<0>(scores); ++i) {
      scores(i, c) = exp2_approx(fmaf(scores(i, c), scale_log2, -offset[kFirst + i]));
      row_sum[kFirst + i] += scores(i, c);
    }
  }

  // Columns [begin, end).
  template <int kFirst = 0, class TensorS>
  CUTE_DEVICE void exponentials(TensorS& scores, int begin, int end) {
    CUTE_UNROLL
    for (int c = begin; c < end; ++c) { exponentials<kFirst>(scores, c); }
  }

  // All columns, kGroup of a row after another.  Rows in turn, column by column, take twice the register reads where ptxas gives the rows'
  // offsets registers of one bank: 1 to 2 % of sm90's forward at head dimension 128.
  template <class TensorS>
  CUTE_DEVICE void exponentials(TensorS& scores) {
    constexpr int kGroup = 16, kColumns = decltype(size<1>(scores))::value;
    CUTE_UNROLL
    for (int begin = 0; begin < kColumns; begin += kGroup) {
      CUTE_UNROLL
      for (int r = 0; r < kRows; ++r) {
        CUTE_UNROLL
        for (int c = begin; c < min_of(begin + kGroup, kColumns); ++c) {
          scores(r, c) = exp2_approx(fmaf(scores(r, c), scale_log2, -offset[r]));
          row_sum[r] += scores(r, c);
        }
      }
    }
  }

  // After the last block: LSE (natural log, +inf where no key was seen), and row_sum becomes 1 / sum (0 there).
  CUTE_DEVICE void finish(float (&lse)[kRows]) {
    CUTE_UNROLL
    for (int r = 0; r < kRows; ++r) {
      RowState const row{row_ref[r], quad_sum(row_sum[r])};
      lse[r]     = row_lse(row, scale_log2);
      row_sum[r] = row_norm(row);
    }
  }

 private:
  // Rare: after the first blocks of a row its maximum seldom grows by kLazyRescaleLog2.  Always taken where a reference is so
  // large that scores must be shifted before they are scaled.
  template <int kFirst, class TensorS, int kCount>
  CUTE_DEVICE void move_references(TensorS& scores, float const (&row_max)[kCount],
                                   float (&shrink)[kCount]) {
    CUTE_UNROLL
    for (int i = 0; i < kCount; ++i) {
      int const r      = kFirst + i;
      float const ref  = fmaxf(row_ref[r], row_max[i]);
      bool const large = ref != kNoReference && fabsf(ref) * scale_log2 > kLargeLog2;
      shrink[i]        = exp2_approx((row_ref[r] - ref) * scale_log2);
      row_ref[r]       = ref;
      offset[r]        = large ? 0.f : ref * scale_log2;
      row_sum[r] *= shrink[i];
      if (large) {
        CUTE_UNROLL
        for (int c = 0; c < size<1>(scores); ++c) { scores(i, c) -= ref; }
      }
    }
  }
};

}  // namespace flash
