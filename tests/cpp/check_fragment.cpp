// Check of sm80/instructions/fragment.cuh: the (rows, columns) view of an accumulator, and accumulators reused as A operands.
#include <cute/atom/mma_atom.hpp>
#include <cute/tensor.hpp>

#include "check.h"
#include "sm80/instructions/fragment.cuh"

using namespace flash::sm80;
using check::expect;

using Atom = MMA_Atom<SM80_16x8x16_F32BF16BF16F32_TN>;

template <int kWarps>
using Mma = TiledMMA<Atom, Layout<Shape<Int<kWarps>, _1, _1>>, Tile<Int<16 * kWarps>, _16, _16>>;

// A warp's two m16 tiles are neighbours, as in the forward kernels with dropout.
template <int kWarps>
using RunMma = TiledMMA<Atom, Layout<Shape<Int<kWarps>, _1, _1>>,
                        Tile<Layout<Shape<_16, Int<kWarps>, _2>, Stride<_1, _32, _16>>, _16, _16>>;

// Value (i, m, n) of a warp is in row half i / 2 of the m-th sixteen of its 32 rows, and in the n-th eight columns.
void check_runs() {
  using TiledMma = RunMma<4>;
  for (int thread = 0; thread < int(size(TiledMma{})); ++thread) {
    auto const slice = TiledMma{}.get_slice(thread);
    Tensor c         = slice.partition_C(make_identity_tensor(Shape<_128, _64>{}));
    Tensor fragment  = partition_fragment_C(TiledMma{}, Shape<_128, _64>{});
    int const lane   = thread % 32;
    expect(size<0>(fragment) == 4 && size<1>(fragment) == 2 && size<2>(fragment) == 8,
           "modes of the fragment");
    for (int i = 0; i < 4; ++i)
      for (int m = 0; m < 2; ++m)
        for (int n = 0; n < 8; ++n) {
          int const row    = thread / 32 * 32 + m * 16 + i / 2 * 8 + lane / 4,
                    column = n * 8 + lane % 4 * 2 + i % 2;
          expect(int(get<0>(c(i, m, n))) == row && int(get<1>(c(i, m, n))) == column,
                 "thread %d: value (%d, %d, %d)", thread, i, m, n);
        }
  }
}

// fragment(i) = i, so that a view of it tells which register it reads.
template <class TiledMma, class Shape_>
auto numbered(Shape_ const& shape) {
  Tensor fragment = partition_fragment_C(TiledMma{}, shape);
  for (int i = 0; i < size(fragment); ++i) fragment(i) = float(i);
  return fragment;
}

template <class TiledMma, int kM, int kN>
void check_views() {
  using Tile_ = Shape<Int<kM>, Int<kN>>;
  for (int thread = 0; thread < int(size(TiledMma{})); ++thread) {
    auto const slice = TiledMma{}.get_slice(thread);
    Tensor c         = slice.partition_C(make_identity_tensor(Tile_{}));
    Tensor fragment  = numbered<TiledMma>(Tile_{});

    Tensor view = make_tensor(fragment.data(), rows_columns(fragment.layout()));
    expect(size(view) == size(fragment), "the view has %d of %d values", int(size(view)),
           int(size(fragment)));
    for (int row = 0; row < size<0>(view); ++row)
      for (int column = 0; column < size<1>(view); ++column) {
        auto const here = c(int(view(row, column)));
        expect(int(get<0>(here)) == int(get<0>(c(int(view(row, 0))))),
               "thread %d: row %d at column %d", thread, row, column);
        expect(int(get<1>(here)) == int(get<1>(c(int(view(0, column))))),
               "thread %d: column %d at row %d", thread, column, row);
      }

    Tensor a    = slice.partition_A(make_identity_tensor(Tile_{}));
    Tensor as_a = make_tensor(fragment.data(), as_operand_a(fragment.layout()));
    expect(size(as_a) == size(a), "A operand has %d values, not %d", int(size(as_a)), int(size(a)));
    expect(size<1>(as_a) == size<1>(a) && size<2>(as_a) == size<2>(a), "A operand's modes");
    for (int i = 0; i < size(a); ++i) {
      auto const have = c(int(as_a(i))), want = a(i);
      expect(int(get<0>(have)) == int(get<0>(want)) && int(get<1>(have)) == int(get<1>(want)),
             "thread %d: A value %d is (%d, %d), not (%d, %d)", thread, i, int(get<0>(have)),
             int(get<1>(have)), int(get<0>(want)), int(get<1>(want)));
    }
  }
}

int main() {
  check_runs();
  check_views<RunMma<4>, 128, 64>();
  check_views<Mma<4>, 64, 64>();
  check_views<Mma<4>, 128, 64>();
  check_views<Mma<4>, 128, 128>();
  check_views<Mma<8>, 128, 32>();
  check_views<Mma<8>, 128, 64>();
  return check::finish();
}
