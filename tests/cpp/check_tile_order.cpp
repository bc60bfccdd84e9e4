// Check of pieces/tile_order.cuh and of the division in pieces/integers.cuh: a bijection for every small shape, longest tiles first inside
// a group, short ones last of all, large sizes.
#include <cstdint>
#include <initializer_list>
#include <vector>

#include "check.h"
#include "flash.h"
#include "pieces/tile_order.cuh"

using namespace flash;
using check::expect;

#define CASE "blocks %d, batch %d, heads %d, group %d, longest_first %d, short %d"
#define ARGS blocks, batch, heads, group, int(longest_first), few

// few: short blocks.
void check_small(int blocks, int batch, int heads, int group, bool longest_first, int few = 0) {
  TileOrder const order    = make_tile_order(blocks, batch, heads, group, longest_first, 1, few);
  int64_t const tiles      = int64_t(blocks) * batch * heads;
  int64_t const long_tiles = int64_t(blocks - few) * batch * heads;
  expect(order.size() == tiles, CASE ": size %lld", ARGS, (long long)order.size());
  std::vector<char> seen(tiles, 0);
  int64_t const group_tiles = int64_t(blocks - few) * min_of(group, batch * heads);
  int last_block            = blocks;
  for (int64_t i = 0; i < tiles; ++i) {
    TileCoord const c = order.coord(i);
    bool const inside = 0 <= c.block && c.block < blocks && 0 <= c.head && c.head < heads &&
                        0 <= c.batch && c.batch < batch;
    expect(inside, CASE ": tile %lld is (%d, %d, %d)", ARGS, (long long)i, c.block, c.head,
           c.batch);
    if (!inside) continue;
    int64_t const pair = int64_t(c.batch) * heads + c.head;
    char& mark         = seen[pair * blocks + c.block];
    expect(!mark, CASE ": (%d, %d, %d) comes twice", ARGS, c.block, c.head, c.batch);
    mark = 1;
    if (!longest_first) continue;
    if (i >= long_tiles) {
      expect(c.block < few, CASE ": tile %lld is not short", ARGS, (long long)i);
      if (i == long_tiles) last_block = few - 1;
      expect(c.block <= last_block, CASE ": block %d after %d", ARGS, c.block, last_block);
      last_block = c.block;
      continue;
    }
    expect(c.block >= few, CASE ": tile %lld is short", ARGS, (long long)i);
    expect(pair / group == i / group_tiles, CASE ": tile %lld leaves its group", ARGS,
           (long long)i);
    if (i % group_tiles == 0) last_block = blocks - 1;
    expect(c.block <= last_block, CASE ": block %d after %d", ARGS, c.block, last_block);
    last_block = c.block;
  }
}

// Sizes up to the largest grid: ends, group borders and a few tiles between.
void check_large(int blocks, int batch, int heads, int group, bool longest_first) {
  int const few         = 0;
  TileOrder const order = make_tile_order(blocks, batch, heads, group, longest_first);
  int64_t const pairs = int64_t(batch) * heads, tiles = blocks * pairs;
  int64_t const width_limit = group < pairs ? group : pairs;
  expect(order.size() == tiles, CASE ": size %lld", ARGS, (long long)order.size());
  for (int64_t i : {int64_t(0), tiles / 3, tiles / 2, tiles - tiles / 7, tiles - 2, tiles - 1}) {
    if (i < 0) continue;
    int64_t pair = i / blocks, block = i % blocks;
    if (longest_first) {  // the same in 64 bits
      int64_t const first = i / (blocks * width_limit) * width_limit,
                    rest  = i % (blocks * width_limit);
      int64_t const width = pairs - first < width_limit ? pairs - first : width_limit;
      block               = blocks - 1 - rest / width;
      pair                = first + rest % width;
    }
    TileCoord const c = order.coord(i);
    expect(c.block == block && c.head == pair % heads && c.batch == pair / heads,
           CASE ": tile %lld is (%d, %d, %d)", ARGS, (long long)i, c.block, c.head, c.batch);
  }
}

// What a reach of so many positions makes short of so many blocks of 64: none where it would be more than a quarter.
void check_short(int reach, int blocks, int wanted) {
  int const count = short_blocks(reach, 64, blocks);
  expect(count == wanted, "reach %d of %d blocks: %d short, not %d", reach, blocks, count, wanted);
}

void check_division(uint32_t n, int divisor) {
  uint32_t const quotient = make_divider(divisor).divide(n);
  expect(quotient == n / uint32_t(divisor), "%u / %d is not %u", n, divisor, quotient);
}

int main() {
  constexpr uint32_t kMost = 2147483647;
  for (int divisor = 1; divisor <= 1000; ++divisor) {
    for (uint32_t n = 0; n <= 3000; ++n) check_division(n, divisor);
    for (uint32_t k = kMost / divisor; k + 3 > kMost / divisor && k > 0; --k)
      for (uint32_t n : {k * divisor - 1, k * divisor}) check_division(n, divisor);
    check_division(kMost, divisor);
  }
  for (int bits = 10; bits < 31; ++bits)
    for (int divisor : {(1 << bits) - 1, 1 << bits, (1 << bits) + 1, int(kMost)})
      for (uint32_t n : {0u, 1u, uint32_t(divisor) - 1, uint32_t(divisor), kMost - 1, kMost})
        check_division(n, divisor);
  check_short(1023, 256, 16), check_short(1024, 256, 16), check_short(1025, 256, 17);
  check_short(1023, 64, 16), check_short(1023, 63, 0), check_short(kUnlimited, 256, 0);
  check_short(0, 256, 0), check_short(-5, 256, 0), check_short(-(1 << 30), 4, 0);
  for (int few = 1; few <= 7; ++few)
    for (int blocks = few; blocks <= 8; ++blocks)
      for (int heads = 1; heads <= 5; ++heads)
        for (int group : {1, 2, 3, 1000}) check_small(blocks, 2, heads, group, true, few);
  for (bool longest_first : {false, true}) {
    for (int blocks = 1; blocks <= 7; ++blocks)
      for (int batch = 1; batch <= 5; ++batch)
        for (int heads = 1; heads <= 7; ++heads)
          for (int group : {1, 2, 3, 4, 5, 8, 35, 1000})
            check_small(blocks, batch, heads, group, longest_first);
    check_small(129, 3, 11, 7, longest_first);
    for (int group : {1, 3, 64, 1000, 1 << 20}) {
      check_large(1, 70000, 1, group, longest_first);
      check_large(1, 1, 70000, group, longest_first);
      check_large(8192, 2, 128, group, longest_first);
      check_large(1 << 20, 1, 32, group, longest_first);
      check_large(2, 32767, 32767, group, longest_first);   // 2^31 - 131070 tiles
      check_large(2147483647, 1, 1, group, longest_first);  // the largest grid
      check_large(1, 2147483647, 1, group, longest_first);
      check_large(32767, 1, 65536, group, longest_first);
      check_large(3, 1 << 29, 1, group, longest_first);
    }
  }
  for (int64_t bytes : {int64_t(0), int64_t(1), int64_t(1) << 20, int64_t(1) << 40}) {
    int const heads = heads_in_l2(bytes);
    expect(heads >= 1 && heads <= 1 << 16, "heads_in_l2(%lld) is %d", (long long)bytes, heads);
  }
  expect(heads_in_l2(1 << 20) >= heads_in_l2(1 << 24), "larger heads, smaller groups");
  return check::finish();
}
