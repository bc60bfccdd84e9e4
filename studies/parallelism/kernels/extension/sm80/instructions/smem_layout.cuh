#pragma once
// Swizzled shared memory tiles of 16-bit elements, row-major, and their transposed views.
// Used by: the traits of every pass.  Invariant: ldmatrix (both directions), 16-byte copies and accumulator stores are free
// of bank conflicts.
#include <cute/tensor.hpp>

namespace flash::sm80 {
using namespace cute;

// Columns of a tile's swizzle atom.
constexpr int atom_columns(int columns) { return columns % 64 == 0 ? 64 : 32; }

//   columns % 64 == 0:  8 x 64 atom (rows of 128 bytes), row r keeps 16-byte chunk c at c ^ r
//   otherwise:          8 x 32 atom (rows of 64 bytes, two per bank line), chunk c at c ^ (r / 2)
template <int kRows, int kColumns>
struct SmemTile {
  static constexpr int kAtomColumns = atom_columns(kColumns);
  static_assert(kColumns % kAtomColumns == 0 && kRows % 8 == 0,
                "a tile is made of whole swizzle atoms");
  using Atom =
      decltype(composition(Swizzle<kAtomColumns == 64 ? 3 : 2, 3, 3>{},
                           Layout<Shape<_8, Int<kAtomColumns>>, Stride<Int<kAtomColumns>, _1>>{}));
  using Layout_              = decltype(tile_to_shape(Atom{}, Shape<Int<kRows>, Int<kColumns>>{}));
  using Transposed           = decltype(composition(
      Layout_{}, Layout<Shape<Int<kColumns>, Int<kRows>>, Stride<Int<kRows>, _1>>{}));
  static constexpr int kSize = kRows * kColumns;

  template <class Element>
  CUTE_DEVICE static auto tensor(Element* smem) {
    return make_tensor(make_smem_ptr(smem), Layout_{});
  }
  template <class Element>
  CUTE_DEVICE static auto transposed(Element* smem) {
    return make_tensor(make_smem_ptr(smem), Transposed{});
  }
};

}  // namespace flash::sm80
