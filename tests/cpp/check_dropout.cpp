// Check of pieces/dropout.cuh and KeepRule: the random words, a weight's bits, and how many values of them keep it.
#include <initializer_list>

#include "check.h"
#include "host/prepare.h"
#include "pieces/dropout.cuh"

using namespace flash;
using check::expect;

// PTX prmt: byte n of the result is the byte of (b, a) that nibble n of the selector names.
uint32_t byte_perm(uint32_t a, uint32_t b, uint32_t selector) {
  uint64_t const bytes = uint64_t(b) << 32 | a;
  uint32_t result      = 0;
  for (int n = 0; n < 4; ++n) {
    result |= uint32_t(bytes >> (selector >> 4 * n & 7) * 8 & 0xff) << 8 * n;
  }
  return result;
}

// Published test vectors of seven rounds.
void check_words() {
  struct {
    uint32_t key[2];
    Random4 counter, want;
  } const known[] = {
      {{0, 0}, {{0, 0, 0, 0}}, {{0x5f6fb709, 0x0d893f64, 0x4f121f81, 0x4f730a48}}},
      {{~0u, ~0u}, {{~0u, ~0u, ~0u, ~0u}}, {{0x5207ddc2, 0x45165e59, 0x4d8ee751, 0x8c52f662}}},
      {{0xa4093822, 0x299f31d0},
       {{0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344}},
       {{0x4dfccaba, 0x190a87f0, 0xc47362ba, 0xb6b5242a}}},
  };
  for (auto const& one : known) {
    Random4 const got = philox(one.key[0], one.key[1], one.counter).random;
    for (int i = 0; i < 4; ++i) {
      expect(got.word[i] == one.want.word[i], "word %d: %08x", i, got.word[i]);
    }
  }
}

void check_bits() {
  BlockBits const bits{{{0x03020100, 0x13121110, 0x23222120, 0x33323130}}, 0xd3d2d1d0};
  for (int i = 0; i < 4; ++i)
    for (int half = 0; half < 2; ++half) {
      uint32_t const pair = bits.pair(i, half);
      expect(byte_perm(bits.random.word[i], bits.tie, BlockBits::selector(i, half)) == pair,
             "word %d, half %d: %08x", i, half, pair);
      uint32_t const even = 0xd0u + i + (0x10u * i + half) * 256, odd = even + 2 * 256;
      expect(pair == (odd << 16 | even), "word %d, half %d: %08x", i, half, pair);
    }
  // Each weight of a few blocks is where the lane that draws it looks for it.
  DropoutBits const random = dropout_bits(uint64_t(5) << 40 | 77, uint64_t(3) << 33 | 64, 9);
  for (int row = 32; row < 96; ++row)
    for (int column = 16; column < 48; ++column) {
      int const lane = row % 8 * 4 + column % 8 / 2, word = row % 16 / 8 + column % 16 / 8 * 2;
      uint32_t const pair = random.block(row / 32, column / 16, lane).pair(word, row % 32 / 16);
      expect(random.at(row, column) == (pair >> column % 2 * 16 & 0xffff), "weight (%d, %d)", row,
             column);
    }
}

void check_rule() {
  constexpr int kValues = 65536;
  auto const check_one  = [](int kept) {
    KeepRule const rule = keep_rule(kept);
    int count           = 0;
    for (int bits = 0; bits < kValues; ++bits) { count += keeps(uint32_t(bits), rule); }
    expect(count == kept, "%d values keep, not %d", count, kept);
    expect(rule.below % kValues == rule.below / kValues, "halves of %08x", rule.below);
    expect(rule.inverted == 0 || rule.inverted == ~0u, "inverted: %08x", rule.inverted);
  };
  for (int kept = 0; kept < kValues; kept += 251) { check_one(kept); }
  // Where NaNs end, and around zero.
  for (int border : {0, 2046, 2046 + 31744, 32768, kValues - 1}) {
    for (int kept = border - 3; kept <= border + 3; ++kept) {
      if (kept >= 0 && kept < kValues) { check_one(kept); }
    }
  }
}

int main() {
  check_words();
  check_bits();
  check_rule();
  return check::finish();
}
