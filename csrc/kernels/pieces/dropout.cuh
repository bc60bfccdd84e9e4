#pragma once
// Which attention weights are dropped: Philox4x32-7 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3"), 16 bits per weight.
// Used by: fwd_mainloop, bwd_mainloop, attn_probs.cu and the tests.  The bits of a weight depend on (seed, offset) and on its absolute
// (batch, head, row, column): on no tile size and no warp layout.
//
//   key      (lo(seed), hi(seed) ^ hi(offset))
//   counter  (column / 16 * 32 + lane, row / 16, batch * heads + head, lo(offset))      lane = row % 8 * 4 + column % 8 / 2
//   word     row % 16 / 8 + 2 * (column % 16 / 8);   low half for even columns, high half for odd ones
//
// So one call per lane serves a 16 x 16 block, each lane the eight weights that m16n8 accumulators give it.
#include <cstdint>

#include "pieces/integers.cuh"

namespace flash {

struct Random4 {
  uint32_t word[4];
};

FLASH_HD uint32_t high_product(uint32_t a, uint32_t b) {
#ifdef __CUDA_ARCH__
  return __umulhi(a, b);
#else
  return uint32_t((uint64_t(a) * b) >> 32);
#endif
}

FLASH_HD Random4 philox(uint32_t key0, uint32_t key1, Random4 c) {
  constexpr int kRounds = 7;
#ifdef __CUDA_ARCH__
#pragma unroll
#endif
  for (int round = 0; round < kRounds; ++round) {
    uint32_t const high0 = high_product(0xD2511F53u, c.word[0]), low0 = 0xD2511F53u * c.word[0];
    uint32_t const high1 = high_product(0xCD9E8D57u, c.word[2]), low1 = 0xCD9E8D57u * c.word[2];
    c = {{high1 ^ c.word[1] ^ key0, low1, high0 ^ c.word[3] ^ key1, low0}};
    key0 += 0x9E3779B9u, key1 += 0xBB67AE85u;
  }
  return c;
}

// The random numbers of one head's weights.
struct DropoutBits {
  uint32_t key0, key1, offset, pair;  // pair = batch * heads + head

  // Of a lane's weights in the 16 x 16 block (row / 16, column / 16).
  FLASH_HD Random4 block(int row16, int column16, int lane) const {
    return philox(key0, key1,
                  {{uint32_t(column16) * 32 + uint32_t(lane), uint32_t(row16), pair, offset}});
  }
  // Of one weight.
  FLASH_HD uint32_t at(int row, int column) const {
    Random4 const r = block(row / 16, column / 16, row % 8 * 4 + column % 8 / 2);
    return r.word[row % 16 / 8 + 2 * (column % 16 / 8)] >> (column % 2 * 16) & 0xffffu;
  }
};

FLASH_HD DropoutBits dropout_bits(uint64_t seed, uint64_t offset, int pair) {
  return {uint32_t(seed), uint32_t(seed >> 32) ^ uint32_t(offset >> 32), uint32_t(offset),
          uint32_t(pair)};
}

// Whether the two weights of a word are kept; keep_below is at most 65535.
FLASH_HD bool keeps_low(uint32_t word, uint32_t keep_below) {
  return (word & 0xffffu) < keep_below;
}
FLASH_HD bool keeps_high(uint32_t word, uint32_t keep_below) { return word < keep_below << 16; }

}  // namespace flash
