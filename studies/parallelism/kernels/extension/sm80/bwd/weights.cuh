#pragma once
// Which weights of P^T are dropped.  Used by: bwd/mainloop.
#include "pieces/coordinates.cuh"
#include "pieces/dropout.cuh"
#include "sm80/bwd/traits.cuh"

namespace flash::sm80 {

CUTE_DEVICE uint32_t transpose_8x8(uint32_t pair) {
  uint32_t result;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(result) : "r"(pair));
  return result;
}

// Dropped weights of P^T become negative: the sign is where both gradients look for them.  A warp with 32 queries has whole
// 32 x 16 blocks of random numbers, others half of each.
template <class Traits, class TensorS>
CUTE_DEVICE void mark_dropped(TensorS& tSrS, DropoutBits random, int head, KeepRule const& keep,
                              int row0, int col0, int thread) {
  constexpr int kHalves = Traits::kSdpQueries == 1 && Traits::kSubM % 32 == 0 ? 2 : 1;
  using TileSdp         = Shape<Int<Traits::kBlockN>, Int<Traits::kSubM>>;
  random.pair += head;
  // Coordinates of the warp's first lane: corners of 16 x 16 blocks.
  auto corner = tile_coordinates<typename Traits::MmaSdp, TileSdp>(thread / 32 * 32);
  CUTE_UNROLL
  for (int m = 0; m < size<1>(tSrS); ++m) {
    CUTE_UNROLL
    for (int n = 0; n < size<2>(tSrS); n += 2 * kHalves) {
      int const row16      = (row0 + int(get<1>(corner(0, m, n)))) / 16,
                col16      = (col0 + int(get<0>(corner(0, m, n)))) / 16;
      BlockBits const bits = random.block(row16 / 2, col16, thread % 32);
      CUTE_UNROLL
      for (int j = 0; j < 4 * kHalves; ++j) {
        // Word i: query half i % 2, key half i / 2; across: keys down.
        int const i = j % 4, half = kHalves == 1 ? row16 % 2 : j / 4,
                  query8    = n + j / 4 * 2 + i % 2;
        KeptPair const kept = kept_pair(transpose_8x8(bits.pair(i, half)), keep);
        float& even         = tSrS(i / 2 * 2, m, query8);
        float& odd          = tSrS(i / 2 * 2 + 1, m, query8);
        even                = kept.even ? even : -even;
        odd                 = kept.odd ? odd : -odd;
      }
    }
  }
}

}  // namespace flash::sm80
