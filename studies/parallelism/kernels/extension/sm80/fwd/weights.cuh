#pragma once
// What becomes of a k-step's weights before their product with V: rounded, some of them dropped.
// Used by: fwd/mainloop.
#include "pieces/dropout.cuh"
#include "pieces/numeric.cuh"
#include "sm80/fwd/traits.cuh"

namespace flash::sm80 {

// The random numbers of a warp's weights for k-step k: 16 keys.  A warp with two m16 tiles has whole 32 x 16 blocks of them, one with
// a single tile half of each.
template <class Traits>
CUTE_DEVICE BlockBits draw(DropoutBits const& random, int row0, int col0, int k, int thread) {
  constexpr int kTiles = Traits::kBlockM / (16 * Traits::kWarps);
  static_assert(kTiles == 1 || Traits::kWholeRuns, "two m16 tiles are a run of 32 rows");
  return random.block((row0 / 16 + thread / 32 * kTiles) / 2, col0 / 16 + k, thread % 32);
}

// Drops weights of k-step k.
template <class Traits, class TensorP>
CUTE_DEVICE void drop(TensorP& tSrP, BlockBits const& bits, KeepRule const& keep, int row0, int k,
                      int thread) {
  constexpr int kTiles = decltype(size<1>(tSrP))::value;
  auto pairs           = recast<uint32_t>(tSrP);  // (2, MMA_M, MMA_N)
  int const row16      = row0 / 16 + thread / 32 * kTiles;
  CUTE_UNROLL
  for (int m = 0; m < kTiles; ++m) {
    int const half = kTiles == 1 ? row16 % 2 : m;
    CUTE_UNROLL
    for (int i = 0; i < 4; ++i) {  // word i: row half i % 2, column half i / 2
      pairs(i % 2, m, 2 * k + i / 2) &= kept_mask(bits.pair(i, half), keep);
    }
  }
}

// Rounds the scores of k-step k: n8 atoms 2k and 2k + 1.
template <class TensorP, class TensorS>
CUTE_DEVICE void round_step(TensorP& tSrP, TensorS const& tSrS, int k) {
  CUTE_UNROLL
  for (int n = 2 * k; n < 2 * k + 2; ++n) {
    CUTE_UNROLL
    for (int m = 0; m < size<1>(tSrS); ++m) {
      auto target = tSrP(_, m, n);
      round_into(target, tSrS(_, m, n));
    }
  }
}

}  // namespace flash::sm80
