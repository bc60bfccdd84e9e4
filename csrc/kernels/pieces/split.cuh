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
// A worker has at most two partial results: number 2w for a query tile that began before its share, 2w + 1 for one that goes beyond it.
#include <cstdint>

#include "pieces/integers.cuh"

namespace flash {

// a / b for a >= 0, b > 0.  A division of integers is slow, and here loads wait for it.
// inverse: 1 / b, wrong by 2^-22 of itself at most.
FLASH_HD int quotient(int a, int b, float inverse) {
  // The first quotient is wrong by at most 2^-21 of itself, so that less than 2^10 + b is left; of that the second is wrong by at most 1.
  unsigned const first = unsigned(float(a) * inverse);
  int rest             = int(unsigned(a) - first * unsigned(b));  // may be negative
  int const second     = int(float(rest) * inverse);
  rest -= second * b;
  return int(first + unsigned(second + int(rest >= b) - int(rest < 0)));
}
FLASH_HD int quotient(int a, int b) { return quotient(a, b, 1.f / float(b)); }

// The first `longer` workers have one tile more than the others.
struct Shares {
  int length, longer, workers;

  // Fewer workers where there are fewer tiles: none has an empty share.
  FLASH_HD static Shares of(int tiles, int workers) {
    if (tiles <= workers) { return {int(tiles > 0), 0, tiles}; }
    int const length = quotient(tiles, workers);
    return {length, tiles - length * workers, workers};
  }
  // None fewer: shares may be empty.
  FLASH_HD static Shares of_all(int tiles, int workers) {
    int const length = tiles < workers ? 0 : quotient(tiles, workers);
    return {length, tiles - length * workers, workers};
  }
  FLASH_HD int begin(int worker) const { return worker * length + min_of(worker, longer); }
  FLASH_HD int end(int worker) const { return begin(worker + 1); }
  FLASH_HD int owner(int tile) const {
    if (tile < end(0)) { return 0; }  // divisions are slow
    if (tile >= begin(workers - 1)) { return workers - 1; }
    int const in_longer = longer * (length + 1);
    bool const is_long  = tile < in_longer;
    return (is_long ? 0 : longer) +
           quotient(is_long ? tile : tile - in_longer, is_long ? length + 1 : length);
  }
};

// The parts of a query tile, this one among them, and the numbers of their partial results.
struct Parts {
  int count, index;
  int64_t first_partial, base, step;

  FLASH_HD int64_t partial(int part) const {
    return part == 0 ? first_partial : base + part * step;
  }
};

// Parts of the query tile with tiles [item, item + tiles) of the line.  Every head has a line of its own with the same workers: partial
// results of the heads lie side by side.
FLASH_HD Parts parts_in_line(Shares const& shares, int worker, int item, int tiles, int heads,
                             int head) {
  if (item >= shares.begin(worker) && item + tiles <= shares.end(worker)) {
    return {1, 0, 0, 0, 0};
  }
  int const first = item >= shares.begin(worker) ? worker : shares.owner(item);
  int const last  = item + tiles <= shares.end(worker) ? worker : shares.owner(item + tiles - 1);
  int64_t const partial = 2 * int64_t(first) * heads + head;
  return {last - first + 1, worker - first, partial + heads, partial, 2 * int64_t(heads)};
}

// Parts of query tile number item when each is cut into `count` parts; at most `splits`.
FLASH_HD Parts parts_of_item(int64_t item, int splits, int count, int index) {
  return {count, index, item * splits, item * splits, 1};
}

// So many parts, neighbours, are merged into one; then so many of the results, until one is left.
constexpr int kMergedParts = 16, kMergeRounds = 3;
constexpr int kMostParts = kMergedParts * kMergedParts * kMergedParts;

// Workers for one query tile: no more than are merged at once, unless their shares are longer by so many tiles as a second merge costs
// (docs/tuning.md, "Decoding").
FLASH_HD int workers_for_one(int tiles, int workers) {
  constexpr int kTilesOfMerge = 4;
  if (workers <= kMergedParts) { return workers; }
  int const length = ceil_div(tiles, kMergedParts);
  bool const one_merge =
      length <= kTilesOfMerge || length <= quotient(tiles + workers - 1, workers) + kTilesOfMerge;
  return one_merge ? kMergedParts : workers;
}

// The same where clusters of 2^bits workers merge by themselves and their results, at most kMergedParts, are merged once more: whole
// clusters, no more than have a tile each.  One cluster, unless its shares are longer by so many tiles as that merge costs: a tile of
// 1x8k-16/1 takes 0.9 us longer than none, a merge about 2 us (docs/tuning.md, "Decoding").
FLASH_HD int workers_in_clusters(int tiles, int workers, int bits) {
  constexpr int kTilesOfMerge = 2;
  int const cluster = 1 << bits, length = (tiles + cluster - 1) >> bits;
  if (length <= 1 + kTilesOfMerge) { return cluster; }
  int const most = min_of(workers, length << bits);
  return length <= quotient(tiles + most - 1, most) + kTilesOfMerge ? cluster : most;
}

// Results of clusters as parts of the only query tile.
FLASH_HD Parts parts_of_clusters(int count, int index, int heads, int head) {
  return {count, index, heads + head, head, 2 * int64_t(heads)};
}

// Of at most `workers` thread blocks for a head, how many (as bits) make a cluster: as many as fit, unless an eighth would be lost.
FLASH_HD int cluster_bits_for(int workers) {
  constexpr int kMostBits = 3;  // what every GPU with clusters allows
  for (int bits = kMostBits; bits > 0; --bits) {
    int const lost = workers & ((1 << bits) - 1);
    if (lost < workers && 8 * lost <= workers) { return bits; }
  }
  return 0;
}

// So many sequences are a warp's work.
constexpr int kFewSequences = 32;

// Whether sequences of one length are not cut: they keep half of the workers busy, and half of the multiprocessors can read as fast
// as all.
FLASH_HD bool keeps_whole(int sequences, int workers) {
  return sequences <= workers && 2 * sequences >= workers;
}

}  // namespace flash
