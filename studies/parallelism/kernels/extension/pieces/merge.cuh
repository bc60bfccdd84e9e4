#pragma once
// The state of a row's softmax, what it ends in, and merging the states of parts of a row's keys.
// Used by: softmax.cuh, decode_kernel (warps of a thread block, splits of the keys) and common/merge_states.cu.
//
//   O = sum_p w_p O_p     sum = sum_p w_p sum_p     w_p = 2^((ref_p - ref) scale_log2)     ref = max_p ref_p
//
// where O_p = sum_j 2^((s_j - ref_p) scale_log2) v_j over the part's keys, and sum_p the same without v.  References are unscaled scores, so
// that their differences are exact where scores are large.
#include <cute/tensor.hpp>

#include "pieces/numeric.cuh"

namespace flash {
using namespace cute;

struct alignas(8) RowState {
  // No key seen: sum 0, and ref without meaning.  A row of NaN has no reference either, and its sum is NaN: it stays NaN.
  float ref, sum;
};

CUTE_DEVICE float merged_ref(float ref, RowState const& part) {
  return part.sum == 0.f ? ref : fmaxf(ref, part.ref);
}

// w_p.  A part that saw no key has none; NaN stays NaN.
CUTE_DEVICE float merge_weight(RowState const& part, float ref, float scale_log2) {
  return part.sum == 0.f ? 0.f : exp2_approx((part.ref - ref) * scale_log2);
}

// Natural log-sum-exp, +inf where no key was seen.
CUTE_DEVICE float row_lse(RowState const& row, float scale_log2) {
  return row.sum == 0.f ? INFINITY : (row.ref * scale_log2 + log2_approx(row.sum)) * kLn2;
}

CUTE_DEVICE float row_norm(RowState const& row) { return row.sum == 0.f ? 0.f : 1.f / row.sum; }

CUTE_DEVICE void add_scaled(float4& sum, float weight, float4 const& x) {
  sum.x = fmaf(weight, x.x, sum.x), sum.y = fmaf(weight, x.y, sum.y);
  sum.z = fmaf(weight, x.z, sum.z), sum.w = fmaf(weight, x.w, sum.w);
}

}  // namespace flash
