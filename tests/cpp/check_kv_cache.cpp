// Check of pieces/kv_cache.cuh: rows of query tiles, and the rows and tiles of the cache that they need, against a visibility per query.
#include <algorithm>
#include <initializer_list>
#include <vector>

#include "check.h"
#include "pieces/kv_cache.cuh"

using namespace flash;
using check::expect;

constexpr int kNone = kUnlimited;  // no limit

long tiles_checked = 0, without_keys = 0, with_common_keys = 0;

struct Window {
  int left, right;
};

// Keys that a query sees; none if end <= first.
struct Keys {
  int first = 1 << 30, end = 0;
};

// The definition, key by key.
std::vector<Keys> keys_of_queries(int seqlen_q, int seqlen_k, Window const& window) {
  std::vector<Keys> keys(seqlen_q);
  for (int q = 0; q < seqlen_q; ++q)
    for (int k = 0; k < seqlen_k; ++k) {
      long const distance = long(k) - q - (long(seqlen_k) - seqlen_q);
      if (distance > window.right || distance < -long(window.left)) continue;
      keys[q].first = min_of(keys[q].first, k), keys[q].end = k + 1;
    }
  return keys;
}

#define CASE "sq %d, sk %d, pad %d, window %d %d, group %d, tile %d of %d x %d"
#define ARGS                                                                                     \
  sequence.seqlen_q, sequence.seqlen_k, sequence.pad, window.left, window.right, group, m_block, \
      block_m, block_n

void check_tile(CacheSequence const& sequence, Window const& window, std::vector<Keys> const& keys,
                int group, int m_block, int block_m, int block_n) {
  Problem problem{};
  problem.window_left = window.left, problem.window_right = window.right;
  KeyRange const range = key_range(sequence, problem, group, m_block, block_m, block_n);

  Keys some, all{0, 1 << 30};
  int const rows = sequence.seqlen_q * group;
  for (int row = m_block * block_m; row < min_of(rows, (m_block + 1) * block_m); ++row) {
    expect(row_query(row, group) == row / group, "row %d, group %d", row, group);
    Keys const& seen = keys[row / group];
    if (seen.first < seen.end) {
      some.first = min_of(some.first, seen.first), some.end = max_of(some.end, seen.end);
    }
    all.first = max_of(all.first, seen.first), all.end = min_of(all.end, seen.end);
  }
  int const pad = sequence.pad, last_row = pad + sequence.seqlen_k;
  bool const any = some.first < some.end, common = all.first < all.end;
  ++tiles_checked, without_keys += !any, with_common_keys += common;

  if (any) {
    expect(range.first == pad + some.first && range.end == pad + some.end,
           CASE ": rows [%d, %d), not [%d, %d)", ARGS, range.first, range.end, pad + some.first,
           pad + some.end);
    expect(
        range.tile_begin == range.first / block_n && range.tile_end == ceil_div(range.end, block_n),
        CASE ": tiles [%d, %d)", ARGS, range.tile_begin, range.tile_end);
  } else {
    expect(range.end <= range.first, CASE ": rows [%d, %d), not none", ARGS, range.first,
           range.end);
    expect(range.tiles() == 1, CASE ": %d tiles without a key", ARGS, range.tiles());
  }
  if (common) {
    expect(range.all_first == pad + all.first && range.all_end == pad + all.end,
           CASE ": all see [%d, %d), not [%d, %d)", ARGS, range.all_first, range.all_end,
           pad + all.first, pad + all.end);
  } else {
    expect(range.all_end <= range.all_first, CASE ": all see [%d, %d), not none", ARGS,
           range.all_first, range.all_end);
  }
  // So many tiles the plan counts for a query tile.
  expect(range.tiles() >= 1 && range.tile_begin >= 0 &&
             range.tile_end <= ceil_div(last_row, block_n) + 1,
         CASE ": tiles [%d, %d)", ARGS, range.tile_begin, range.tile_end);
}

void check_sequence(int seqlen_q, int seqlen_k, Window const& window) {
  std::vector<Keys> const keys = keys_of_queries(seqlen_q, seqlen_k, window);
  for (int pad : {0, 1, 15, 16, 17, 63, 64, 100}) {
    CacheSequence const sequence{0, seqlen_q, pad, seqlen_k};
    for (int group = 1; group <= 4; ++group)
      for (int block_m : {16, 64}) {
        int const count = query_tile_count(sequence, group, block_m), rows = seqlen_q * group;
        expect(count * block_m >= rows && (count - 1) * block_m < rows, "%d rows in %d tiles of %d",
               rows, count, block_m);
        for (int m = 0; m < count; ++m)
          for (int block_n : {16, 64, 128})
            check_tile(sequence, window, keys, group, m, block_m, block_n);
      }
  }
}

// Caches and windows as long as they may be: nothing overflows.
void check_long() {
  constexpr int kLong = kUnlimited - 1;
  Problem problem{};
  problem.window_left = problem.window_right = kNone;
  KeyRange const all                         = key_range({0, 1, 0, kLong}, problem, 8, 0, 16, 128);
  expect(all.first == 0 && all.end == kLong && all.all_first == 0 && all.all_end == kLong &&
             all.tile_begin == 0 && all.tile_end == ceil_div(kLong, 128),
         "one query sees [%d, %d) of the longest cache", all.first, all.end);
  problem.window_right   = 0;
  KeyRange const shifted = key_range({0, 4, 100, kLong - 100}, problem, 4, 0, 16, 64);
  expect(shifted.first == 100 && shifted.end == kLong && shifted.all_end == kLong - 3,
         "causal: [%d, %d), all [%d, %d)", shifted.first, shifted.end, shifted.all_first,
         shifted.all_end);
  problem.window_left   = 1000;
  KeyRange const window = key_range({0, 2, kLong - 5000, 5000}, problem, 1, 0, 16, 16);
  expect(window.first == kLong - 1002 && window.end == kLong && window.all_first == kLong - 1001,
         "window at the end: [%d, %d)", window.first, window.end);
}

int main() {
  Window const windows[] = {{kNone, kNone}, {kNone, 0}, {0, 0},   {3, 0},  {7, 5},     {0, 3},
                            {20, kNone},    {64, 0},    {40, 40}, {0, 90}, {kNone, 11}};
  for (Window const& window : windows) {
    for (int seqlen_q = 0; seqlen_q <= 18; ++seqlen_q)
      for (int seqlen_k = 0; seqlen_k <= 35; ++seqlen_k) check_sequence(seqlen_q, seqlen_k, window);
    for (int seqlen_q : {1, 2, 16, 17, 33, 64, 65, 100, 130})
      for (int seqlen_k : {0, 1, 15, 47, 63, 64, 65, 127, 128, 129, 200, 300})
        check_sequence(seqlen_q, seqlen_k, window);
  }
  check_long();
  for (int value = -3; value <= 9; ++value)
    for (int most = 0; most <= 5; ++most)
      expect(clamped(value, most) == std::clamp(value, 0, most), "clamped(%d, %d)", value, most);

  std::printf("%ld query tiles, %ld without keys, %ld with keys that all queries see\n",
              tiles_checked, without_keys, with_common_keys);
  expect(without_keys > 0 && with_common_keys > 0, "cases of every kind");
  return check::finish();
}
