#pragma once
// Views of an MMA accumulator (m16n8 atoms) without moving a register.
// Used by: the main loops and epilogues.  Knows shapes only.
#include <cute/tensor.hpp>

namespace flash::sm80 {
using namespace cute;

// Accumulator (4, MMA_M, MMA_N) -> (rows, columns) = ((2, MMA_M), (2, MMA_N)).
//
//   lane holds   (row g, cols 2t 2t+1)      values 0 1        g = lane / 4
//                (row g + 8, same cols)     values 2 3        t = lane % 4
template <class Layout_>
CUTE_HOST_DEVICE constexpr auto rows_columns(Layout_ const& layout) {
  auto split = logical_divide(layout, Shape<_2>{});  // ((2,2), MMA_M, MMA_N)
  return make_layout(make_layout(get<0, 1>(split), get<1>(split)),
                     make_layout(get<0, 0>(split), get<2>(split)));
}

// Accumulator (4, MMA_M, MMA_N) -> A operand of an m16n8k16 MMA ((4, 2), MMA_M, MMA_N / 2): two neighbouring n8 atoms of C
// are, value for value, one k16 atom of A.
template <class Layout_>
CUTE_HOST_DEVICE constexpr auto as_operand_a(Layout_ const& layout) {
  auto split =
      logical_divide(layout, Shape<Underscore, Underscore, _2>{});  // (4, MMA_M, (2, MMA_N / 2))
  return make_layout(make_layout(get<0>(split), get<2, 0>(split)), get<1>(split), get<2, 1>(split));
}

// The same registers as rows and columns.
template <class Tensor_>
CUTE_HOST_DEVICE auto rows_of(Tensor_& fragment) {
  return make_tensor(fragment.data(), rows_columns(fragment.layout()));
}

// The same registers as an A operand.
template <class Tensor_>
CUTE_HOST_DEVICE auto operand_a_of(Tensor_& fragment) {
  return make_tensor(fragment.data(), as_operand_a(fragment.layout()));
}

// Row atoms [kFirst_, kEnd) of a fragment (MMA, MMA_M, ...).
template <int kFirst_, int kEnd>
struct RowAtoms {
  static constexpr int kFirst = kFirst_, kCount = kEnd - kFirst_;

  template <class Tensor_>
  CUTE_HOST_DEVICE static auto of(Tensor_& fragment) {
    auto const layout = fragment.layout();
    return make_tensor(
        fragment.data() + kFirst * stride<1>(layout),
        make_layout(get<0>(layout), make_layout(Int<kCount>{}, stride<1>(layout)), get<2>(layout)));
  }
};

}  // namespace flash::sm80
