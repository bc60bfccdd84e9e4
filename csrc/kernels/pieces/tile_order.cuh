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
// index mirrors it.
struct TileOrder {
  int blocks, heads, pairs, heads_per_group;
  bool longest_first;

  FLASH_HD int64_t size() const { return int64_t(blocks) * pairs; }

  FLASH_HD TileCoord coord(int64_t linear) const {
    // size() < 2^31 in every launch: 32-bit division, once per thread block.
    uint32_t const index = uint32_t(linear);
    uint32_t block, pair;
    if (longest_first) {
      uint32_t const group_tiles = uint32_t(blocks) * uint32_t(heads_per_group);
      uint32_t const group = index / group_tiles, in_group = index - group * group_tiles;
      uint32_t const first_pair = group * uint32_t(heads_per_group),
                     left       = uint32_t(pairs) - first_pair;
      uint32_t const width = left < uint32_t(heads_per_group) ? left : uint32_t(heads_per_group);
      uint32_t const rank  = in_group / width;
      block                = uint32_t(blocks) - 1 - rank;
      pair                 = first_pair + (in_group - rank * width);
    } else {
      pair  = index / uint32_t(blocks);
      block = index - pair * uint32_t(blocks);
    }
    uint32_t const batch = pair / uint32_t(heads);
    return {int(block), int(pair - batch * uint32_t(heads)), int(batch)};
  }
};

inline TileOrder make_tile_order(int blocks, int batch, int heads, int heads_per_group,
                                 bool longest_first) {
  int const pairs = batch * heads;
  return {blocks, heads, pairs, max_of(1, min_of(heads_per_group, pairs)), longest_first};
}

// Heads whose working set (bytes_per_head each) stays in L2 together: about half of a 50 to 60 MB L2.
inline int heads_in_l2(int64_t bytes_per_head) {
  constexpr int64_t kL2Budget = int64_t(32) << 20;
  int64_t const fit           = kL2Budget / (bytes_per_head > 0 ? bytes_per_head : 1);
  return fit < 1 ? 1 : fit > 1024 ? 1024 : int(fit);
}

}  // namespace flash
