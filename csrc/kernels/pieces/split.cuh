#pragma once
// Equal shares of a line of key tiles: who works on what, and where partial results lie.
// Used by: decode_kernel.  Plain integers: compiles with g++ and is checked exhaustively on the CPU.
//
// The key tiles of all query tiles lie on one line, one query tile after the other; worker w takes tiles [begin(w), end(w)).  A
// query tile may be cut by shares: its parts are of one worker each, in the order of the workers.
//
//   query tiles     |    A    |  B  |        C          |   D   |
//   workers         |   0  |   1   |   2  |   3  |   4  |   5   |       parts of A: 0 1;  B: 1 alone (no partial result);  C: 1 2 3 4 ...
//
// A worker has at most two partial results: slot 2w for a query tile that began before its share, 2w + 1 for one that goes beyond it.
#include <cstdint>

#include "pieces/integers.cuh"

namespace flash {

// The first `longer` workers have one tile more than the others.
struct Shares {
  int length, longer, workers;

  // Fewer workers where there are fewer tiles: none has an empty share.
  FLASH_HD static Shares of(int tiles, int workers) {
    workers          = min_of(workers, tiles);
    int const length = workers > 0 ? tiles / workers : 0;
    return {length, tiles - length * workers, workers};
  }
  FLASH_HD int begin(int worker) const { return worker * length + min_of(worker, longer); }
  FLASH_HD int end(int worker) const { return begin(worker + 1); }
  FLASH_HD int owner(int tile) const {
    if (tile < end(0)) { return 0; }  // divisions are slow
    if (tile >= begin(workers - 1)) { return workers - 1; }
    int const in_longer = longer * (length + 1);
    return tile < in_longer ? tile / (length + 1) : longer + (tile - in_longer) / length;
  }
};

// The parts of a query tile, this one among them, and their slots.
struct Parts {
  int count, index;
  int64_t first_slot, base, step;

  FLASH_HD int64_t slot(int part) const { return part == 0 ? first_slot : base + part * step; }
};

// Parts of the query tile with tiles [item, item + tiles) of the line.  Every head has a line of its own with the same workers: slots of the
// heads lie side by side.
FLASH_HD Parts parts_in_line(Shares const& shares, int worker, int item, int tiles, int heads,
                             int head) {
  if (item >= shares.begin(worker) && item + tiles <= shares.end(worker)) {
    return {1, 0, 0, 0, 0};
  }
  int const first    = item >= shares.begin(worker) ? worker : shares.owner(item);
  int const last     = item + tiles <= shares.end(worker) ? worker : shares.owner(item + tiles - 1);
  int64_t const slot = 2 * int64_t(first) * heads + head;
  return {last - first + 1, worker - first, slot + heads, slot, 2 * int64_t(heads)};
}

// Parts of query tile number item when each is cut into `count` parts; at most `splits`.
FLASH_HD Parts parts_of_item(int64_t item, int splits, int count, int index) {
  return {count, index, item * splits, item * splits, 1};
}

// So many parts, neighbours, are merged into one; then so many of the results, until one is left.
constexpr int kMergedParts = 16, kMergeLevels = 3;
constexpr int kMostParts = kMergedParts * kMergedParts * kMergedParts;

// Workers for one query tile: no more than are merged at once, unless their shares are longer by so many tiles as a second merge costs
// (benchmarks/README.md, "Decoding").
FLASH_HD int workers_for_one(int tiles, int workers) {
  constexpr int kTilesOfMerge = 4;
  bool const one_merge = ceil_div(tiles, kMergedParts) <= ceil_div(tiles, workers) + kTilesOfMerge;
  return workers > kMergedParts && one_merge ? kMergedParts : workers;
}

}  // namespace flash
