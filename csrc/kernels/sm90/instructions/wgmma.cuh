#pragma once
// Products of a warpgroup (wgmma): issuing them, and views of their accumulators.  Used by: the sm90 main loops.
// Invariant: between issue() and the wait for it, nobody touches the accumulator or an operand.
#include <cute/tensor.hpp>

namespace flash::sm90 {
using namespace cute;

// C = A B^T or, with adds, C += A B^T: issued and committed, not waited for.
template <class Mma, class TensorA, class TensorB, class TensorC>
CUTE_DEVICE void issue(Mma mma, TensorA const& a, TensorB const& b, TensorC& c, bool adds) {
  warpgroup_fence_operand(c);
  warpgroup_arrive();
  mma.accumulate_ = adds ? GMMA::ScaleOut::One : GMMA::ScaleOut::Zero;
  CUTE_UNROLL
  for (int k = 0; k < size<2>(a); ++k) {
    gemm(mma, a(_, _, k), b(_, _, k), c);
    mma.accumulate_ = GMMA::ScaleOut::One;
  }
  warpgroup_commit_batch();
  warpgroup_fence_operand(c);
}

// Until at most kPending groups of products, the youngest, are under way; c is the accumulator of the ones that ended.
template <int kPending, class TensorC>
CUTE_DEVICE void wait_for_product(TensorC& c) {
  warpgroup_wait<kPending>();
  warpgroup_fence_operand(c);
}

// Accumulator ((2, 2, n), 1, 1) -> (rows, columns) = (2, (2, n)): a lane holds rows g and g + 8 of its warp's sixteen, g = lane / 4.
template <class Layout_>
CUTE_HOST_DEVICE constexpr auto rows_columns(Layout_ const& layout) {
  static_assert(decltype(size<1>(layout))::value == 1 && decltype(size<2>(layout))::value == 1,
                "the product's width is one instruction");
  return make_layout(get<0, 1>(layout), make_layout(get<0, 0>(layout), get<0, 2>(layout)));
}

// The first of the two rows of an accumulator that a thread of the warpgroup holds; the other one is kRowStep below.
constexpr int kRowStep = 8;
CUTE_DEVICE int first_row_of(int thread) { return thread / 32 * 16 + thread % 32 / 4; }

// Accumulator ((2, 2, n), 1, 1) -> A operand ((2, 2, 2), 1, n / 2) of a product over its columns: two neighbouring n8 blocks are, value for
// value, one k16 block.
template <class Layout_>
CUTE_HOST_DEVICE constexpr auto as_operand_a(Layout_ const& layout) {
  auto pairs = logical_divide(get<0, 2>(layout), Int<2>{});  // (2, n / 2)
  return make_layout(make_layout(get<0, 0>(layout), get<0, 1>(layout), get<0>(pairs)),
                     get<1>(layout), get<1>(pairs));
}

// A operand ((2, 2, 2), 1, n) of a product over kDepth columns.
template <int kDepth>
CUTE_HOST_DEVICE constexpr auto operand_a() {
  return make_layout(Shape<Shape<_2, _2, _2>, _1, Int<kDepth / 16>>{});
}

// The same registers as rows and columns.
template <class Tensor_>
CUTE_HOST_DEVICE auto rows_of(Tensor_& fragment) {
  return make_tensor(fragment.data(), rows_columns(fragment.layout()));
}

}  // namespace flash::sm90
