#pragma once
// Which attention weights are dropped: Philox4x32-7 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3"), 16 bits per weight.
// Used by: fwd/mainloop, bwd/mainloop, attn_probs.cu and the tests.  The bits of a weight depend on (seed, offset) and on its absolute
// (batch, head, row, column): on no tile size and no warp layout.
//
//   key      (lo(seed), hi(seed) ^ hi(offset))
//   counter  (column / 16 * 32 + lane, row / 32, batch * heads + head, lo(offset))      lane = row % 8 * 4 + column % 8 / 2
//   word     i = row % 16 / 8 + 2 * (column % 16 / 8)
//   byte     row % 32 / 16 + 2 * (column % 2)
//   bits     that byte of word i, and below it byte i of the tie word: word 2 after five rounds
//
// So one call per lane serves a block of 32 rows x 16 columns, each lane the sixteen weights that m16n8 accumulators give it.  The
// low eight bits decide only where the high eight are those of the threshold (or of the first NaN): the four weights of a word may
// share them.  Not every word would do: those after six rounds can be seen in the words after seven, and after five rounds word 1,
// unlike the others, is not uniform yet.
#include <cstdint>

#include "flash.h"
#include "pieces/integers.cuh"

namespace flash {

// A Philox state; after the last round: the random words.
struct Random4 {
  uint32_t word[4];
};

// The random numbers of a lane's weights in a 32 x 16 block.
struct BlockBits {
  Random4 random;
  uint32_t tie;

  // For pair(), which bytes of (tie, word i).
  FLASH_HD static constexpr uint32_t selector(int i, int half) {
    return uint32_t(0x2000 + half * 0x1010 + (4 + i) * 0x0101);
  }
  // 16 bits of each weight of word i in the block's upper (half 0) or lower sixteen rows; low half: the even column.
  FLASH_HD uint32_t pair(int i, int half) const {
    uint32_t const word = random.word[i];
#ifdef __CUDA_ARCH__
    return __byte_perm(word, tie, selector(i, half));
#else
    return (word >> half * 8 & 0x00ff00ffu) << 8 | (tie >> i * 8 & 0xffu) * 0x10001u;
#endif
  }
};

FLASH_HD uint32_t high_product(uint32_t a, uint32_t b) {
#ifdef __CUDA_ARCH__
  return __umulhi(a, b);
#else
  return uint32_t((uint64_t(a) * b) >> 32);
#endif
}

FLASH_HD Random4 philox_round(Random4 const& c, uint32_t key0, uint32_t key1) {
  uint32_t const high0 = high_product(0xD2511F53u, c.word[0]), low0 = 0xD2511F53u * c.word[0];
  uint32_t const high1 = high_product(0xCD9E8D57u, c.word[2]), low1 = 0xCD9E8D57u * c.word[2];
  return {{high1 ^ c.word[1] ^ key0, low1, high0 ^ c.word[3] ^ key1, low0}};
}

FLASH_HD BlockBits philox(uint32_t key0, uint32_t key1, Random4 c) {
  constexpr int kRounds = 7, kTieRounds = 5;
  uint32_t tie = 0;
#ifdef __CUDA_ARCH__
#pragma unroll
#endif
  for (int round = 0; round < kRounds; ++round) {
    if (round == kTieRounds) { tie = c.word[2]; }
    c = philox_round(c, key0, key1);
    key0 += 0x9E3779B9u, key1 += 0xBB67AE85u;
  }
  return {c, tie};
}

// The random numbers of one head's weights.
struct DropoutBits {
  uint32_t key0, key1, offset, pair;  // pair = batch * heads + head

  // Of a lane's weights in the 32 x 16 block (row / 32, column / 16).
  FLASH_HD BlockBits block(int row32, int column16, int lane) const {
    return philox(key0, key1,
                  {{uint32_t(column16) * 32 + uint32_t(lane), uint32_t(row32), pair, offset}});
  }
  // Of one weight.
  FLASH_HD uint32_t at(int row, int column) const {
    BlockBits const bits = block(row / 32, column / 16, row % 8 * 4 + column % 8 / 2);
    bool const lower = row % 16 >= 8, right = column % 16 >= 8;
    int const half = row % 32 / 16;
    // Chosen, not indexed: an index would put the words into local memory.
    uint32_t const both = right ? (lower ? bits.pair(3, half) : bits.pair(2, half))
                                : (lower ? bits.pair(1, half) : bits.pair(0, half));
    return both >> (column % 2 * 16) & 0xffffu;
  }
};

FLASH_HD DropoutBits dropout_bits(uint64_t seed, uint64_t offset, int pair) {
  return {uint32_t(seed), uint32_t(seed >> 32) ^ uint32_t(offset >> 32), uint32_t(offset),
          uint32_t(pair)};
}

// Whether a weight with these 16 bits is kept.
FLASH_HD bool keeps(uint32_t bits, KeepRule const& rule) {
  constexpr int kSign = 0x8000, kInf = 0x7c00;
  int const size = int(bits & 0x7fffu), limit = int(rule.below & 0x7fffu);
  int const number = bits & kSign ? -size : size, below = rule.below & kSign ? -limit : limit;
  bool const is_nan = size > kInf || limit > kInf;
  return (is_nan || number < below) != (rule.inverted != 0);
}

#ifdef __CUDACC__
// The same for the two weights of BlockBits::pair(), one instruction each.  As a mask: 0xffff where a weight is kept.
__device__ __forceinline__ uint32_t kept_mask(uint32_t pair, KeepRule const& rule) {
  uint32_t mask;
  asm("set.ltu.u32.f16x2 %0, %1, %2;" : "=r"(mask) : "r"(pair), "r"(rule.below));
  return mask ^ rule.inverted;
}

struct KeptPair {
  bool even, odd;
};
__device__ __forceinline__ KeptPair kept_pair(uint32_t pair, KeepRule const& rule) {
  uint32_t even, odd;
  asm("{\n\t"
      ".reg .pred inverted, even, odd;\n\t"
      "setp.ne.u32 inverted, %4, 0;\n\t"
      "setp.ltu.xor.f16x2 even|odd, %2, %3, inverted;\n\t"
      "selp.u32 %0, 1, 0, even;\n\t"
      "selp.u32 %1, 1, 0, odd;\n\t}"
      : "=r"(even), "=r"(odd)
      : "r"(pair), "r"(rule.below), "r"(rule.inverted));
  return {even != 0, odd != 0};
}
#endif

}  // namespace flash
