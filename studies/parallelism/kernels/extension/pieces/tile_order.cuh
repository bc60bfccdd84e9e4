#pragma once
// Which tile a thread block works on: a bijection from the linear block index to (block, head, batch).
// Used by: the forward and the backward kernels (device) and their launches (host).  Integers only.
// Invariant: tiles whose heads share L2 run together; among those, the ones with most work start first.
#include <cstdint>

#include "pieces/integers.cuh"

namespace flash {

struct TileCoord {
  int block, head, batch;
};

// Heads are numbered pair = batch * heads + head and cut into groups of heads_per_group.
//
//   longest_first:  group 0: [block B-1 of each head] [block B-2 of each head] ... [block 0 of each head], group 1: ...
//   otherwise:      head 0: blocks 0 .. B-1, head 1: ...      (neighbours share K and V)
//
// A block's work grows with its index where longest_first is used (causal forward); a caller whose work shrinks with the
// index mirrors it.  Where all but the first short_blocks have the same work (windows), these come last, of all groups together: they
// fill the multiprocessors that are done first.
struct TileOrder {
  int blocks, pairs, heads_per_group, short_blocks;
  bool longest_first;
  int sharing;  // query heads that share a key head
  Divider by_sharing, by_heads, by_blocks;
  // longest_first: tiles of a group, and heads in a group, in the last one, and in the part of the short blocks.
  Divider by_group_tiles, by_width, by_last_width, by_pairs;

  FLASH_HD int64_t size() const { return int64_t(blocks) * pairs; }

  // linear: below 2^31, as in every launch.
  FLASH_HD TileCoord coord(int64_t linear) const {
    uint32_t const index = uint32_t(linear);
    uint32_t block, pair;
    if (longest_first) {
      uint32_t const long_tiles = uint32_t(blocks - short_blocks) * uint32_t(pairs);
      uint32_t first_pair = 0, in_group = index - long_tiles, top = uint32_t(short_blocks);
      Divider by = by_pairs;
      if (index < long_tiles) {
        uint32_t const group = by_group_tiles.divide(index);
        first_pair           = group * uint32_t(heads_per_group);
        in_group             = index - group * by_group_tiles.divisor;
        top                  = uint32_t(blocks);
        by = first_pair + uint32_t(heads_per_group) > uint32_t(pairs) ? by_last_width : by_width;
      }
      uint32_t const rank = by.divide(in_group);
      block               = top - 1 - rank;
      pair                = first_pair + (in_group - rank * by.divisor);
    } else {
      pair  = by_blocks.divide(index);
      block = index - pair * uint32_t(blocks);
    }
    uint32_t const batch = by_heads.divide(pair);
    return {int(block), int(pair - batch * by_heads.divisor), int(batch)};
  }
};

inline TileOrder make_tile_order(int blocks, int batch, int heads, int heads_per_group,
                                 bool longest_first, int sharing = 1, int short_blocks = 0) {
  int const pairs = batch * heads, width = max_of(1, min_of(heads_per_group, pairs));
  int const last_width = pairs % width ? pairs % width : width;
  auto const by        = [](int64_t n) { return make_divider(n < 1 ? 1 : int(n)); };
  return {blocks,        pairs,
          width,         short_blocks,
          longest_first, sharing,
          by(sharing),   by(heads),
          by(blocks),    by(int64_t(blocks - short_blocks) * width),
          by(width),     by(last_width),
          by(pairs)};
}

// Blocks at one end of a sequence that a window of `reach` positions makes short; none where these are not a few among many, and the
// order would take heads apart that share L2.
inline int short_blocks(int reach, int block, int blocks) {
  int const count = ceil_div(max_of(0, reach), block);
  return 4 * int64_t(count) <= blocks ? count : 0;
}

// Heads whose working set (bytes_per_head each) stays in L2 together: about half of a 50 to 60 MB L2.
inline int heads_in_l2(int64_t bytes_per_head) {
  constexpr int64_t kL2Budget = int64_t(32) << 20;
  int64_t const fit           = kL2Budget / (bytes_per_head > 0 ? bytes_per_head : 1);
  return fit < 1 ? 1 : fit > 1024 ? 1024 : int(fit);
}

}  // namespace flash
