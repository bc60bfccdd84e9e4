#pragma once
// Dropout of the weights that are the first operand of a product with V.  Used by: fwd/consumer.
#include "pieces/dropout.cuh"
#include "sm90/instructions/wgmma.cuh"

namespace flash::sm90 {

// Drops weights of a warpgroup's 64 rows from row0 on, and of the keys from col0 on.  A warp has sixteen rows: half of each block of 32 x 16
// random numbers.
template <class TensorP>
CUTE_DEVICE void drop(TensorP& tOrP, DropoutBits const& random, KeepRule const& keep, int row0,
                      int col0, int thread) {
  auto pairs      = recast<uint32_t>(tOrP);  // (4, 1, k16 blocks): two neighbouring weights each
  int const row16 = row0 / 16 + thread / 32;
  CUTE_UNROLL
  for (int k = 0; k < size<2>(pairs); ++k) {
    BlockBits const bits = random.block(row16 / 2, col0 / 16 + k, thread % 32);
    CUTE_UNROLL
    for (int i = 0; i < 4; ++i) {  // word i: row half i % 2, column half i / 2
      pairs(i, 0, k) &= kept_mask(bits.pair(i, row16 % 2), keep);
    }
  }
}

}  // namespace flash::sm90
