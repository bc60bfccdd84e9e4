// Check of pieces/split.cuh: the parts into which shares of a line of key tiles cut query tiles, the numbers of partial results, and the
// rounds and clusters in which these are merged.
#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <random>
#include <vector>

#include "check.h"
#include "pieces/split.cuh"

using namespace flash;
using check::expect;

std::mt19937 numbers(1);
int below(int limit) { return int(numbers() % unsigned(limit)); }

long cut_tiles = 0, most_parts = 0;

// What a partial result holds: parts [begin, end) of a query tile of a head.
struct Held {
  int tile = -1, begin = 0, end = 0;
};

// DecodeEpilogue::finish with the parts' numbers in place of their results; the order of the calls is that of the arrivals.
class Merges {
 public:
  explicit Merges(int64_t partials)
      : partials_(partials),
        held_(partials),
        users_(kMergeRounds * partials),
        counters_(kMergeRounds * partials) {}

  // Whether this part wrote the query tile's result.
  bool finish(int tile, Parts const& parts) {
    Held mine{tile, parts.index, parts.index + 1};
    int index = parts.index, count = parts.count, spacing = 1;
    for (int round = 0; count > 1; ++round) {
      expect(round < kMergeRounds, "%d parts need more than %d rounds", parts.count, kMergeRounds);
      if (round >= kMergeRounds) return false;
      at(parts.partial(index * spacing)) = mine;
      int const first                    = index / kMergedParts * kMergedParts;
      int const met                      = min_of(kMergedParts, count - first);
      if (!is_last(round, parts.partial(first * spacing), {tile, first, first + met})) return false;
      mine = merged(parts, first * spacing, spacing, met);
      index /= kMergedParts, count = ceil_div(count, kMergedParts), spacing *= kMergedParts;
    }
    expect(mine.tile == tile && mine.begin == 0 && mine.end == parts.count,
           "out of tile %d has parts [%d, %d) of tile %d, not all %d", tile, mine.begin, mine.end,
           mine.tile, parts.count);
    return true;
  }

  void check_counters() const {
    for (int counter : counters_) expect(counter == 0, "a counter is left at %d", counter);
  }

 private:
  Held& at(int64_t partial) {
    bool const inside = 0 <= partial && partial < partials_;
    expect(inside, "partial result %lld of %lld", (long long)partial, (long long)partials_);
    return held_[inside ? partial : 0];
  }

  // met: what meets at the counter, parts by their index in this round.
  bool is_last(int round, int64_t partial, Held const& met) {
    Held& user = users_[round * partials_ + partial];
    expect(user.tile < 0 || (user.tile == met.tile && user.begin == met.begin),
           "round %d: tiles %d and %d meet at the counter of partial result %lld", round, user.tile,
           met.tile, (long long)partial);
    user         = met;
    int& counter = counters_[round * partials_ + partial];
    if (++counter < met.end - met.begin) return false;
    counter = 0;
    return true;
  }

  // Parts first, first + spacing, ... as PartSource finds them: the first lies apart.
  Held merged(Parts const& parts, int first, int spacing, int count) {
    Held all = at(parts.partial(first));
    for (int i = 1; i < count; ++i) {
      Held const& next = at(parts.base + int64_t(first) * parts.step + i * (spacing * parts.step));
      expect(next.tile == all.tile && next.begin == all.end,
             "parts [%d, %d) of tile %d come after [%d, %d) of tile %d", next.begin, next.end,
             next.tile, all.begin, all.end, all.tile);
      all.end = next.end;
    }
    return all;
  }

  int64_t partials_;
  std::vector<Held> held_, users_;
  std::vector<int> counters_;
};

// A worker's part of a query tile.  tile: of all heads.
struct Work {
  int tile;
  Parts parts;
};

void check_merges(std::vector<Work> works, int tiles, int64_t partials, int order) {
  if (order == 1) std::reverse(works.begin(), works.end());
  if (order == 2) std::shuffle(works.begin(), works.end(), numbers);
  Merges merges(partials);
  std::vector<int> written(tiles);
  for (Work const& work : works) written[work.tile] += merges.finish(work.tile, work.parts);
  for (int tile = 0; tile < tiles; ++tile)
    expect(written[tile] == 1, "tile %d of %d is written %d times", tile, tiles, written[tile]);
  merges.check_counters();
}

bool same(Parts const& a, Parts const& b) {
  return a.count == b.count && a.first_partial == b.first_partial && a.base == b.base &&
         a.step == b.step;
}

// Every part of every cut tile comes once, its fellows agree about it, and its partial result is nobody else's.
void check_parts(std::vector<Work> const& works, int tiles, int64_t partials) {
  std::vector<std::vector<Parts>> of(tiles);
  for (Work const& work : works) of[work.tile].push_back(work.parts);
  std::vector<char> taken(partials);
  for (int tile = 0; tile < tiles; ++tile) {
    int const count = int(of[tile].size());
    cut_tiles += count > 1, most_parts = std::max<long>(most_parts, count);
    for (int i = 0; i < count; ++i) {
      Parts const& parts = of[tile][i];
      expect(parts.count == count && parts.index == i && same(parts, of[tile][0]),
             "tile %d: part %d of %d comes as part %d of %d", tile, parts.index, parts.count, i,
             count);
      if (count == 1) continue;
      int64_t const partial = parts.partial(i);
      bool const inside     = 0 <= partial && partial < partials;
      expect(inside && !taken[partial], "tile %d: part %d has partial result %lld of %lld", tile, i,
             (long long)partial, (long long)partials);
      if (inside) taken[partial] = 1;
    }
  }
}

// Every worker walks its share as DecodeSchedule does, for each head.
void check_line(std::vector<int> const& lengths, int workers, int heads, int order) {
  int const items = int(lengths.size());
  int total       = 0;
  for (int length : lengths) total += length;
  Shares const shares    = Shares::of(total, workers);
  int64_t const partials = 2 * int64_t(workers) * heads;
  std::vector<Work> works;
  std::vector<int> visits(total);
  for (int head = 0; head < heads; ++head)
    for (int worker = 0; worker < shares.workers; ++worker) {
      int position = shares.begin(worker), cut = 0;
      for (int item = 0, begin = 0; item < items; begin += lengths[item++]) {
        int const end = begin + lengths[item];
        if (position >= end || position >= shares.end(worker)) continue;
        int const stop    = min_of(end, shares.end(worker));
        Parts const parts = parts_in_line(shares, worker, begin, lengths[item], heads, head);
        expect((parts.count == 1) == (position == begin && stop == end),
               "worker %d has [%d, %d) of [%d, %d) in %d parts", worker, position, stop, begin, end,
               parts.count);
        works.push_back({head * items + item, parts});
        cut += parts.count > 1;
        for (; position < stop; ++position) ++visits[position];
      }
      expect(position == shares.end(worker), "worker %d stops at %d", worker, position);
      expect(cut <= 2, "worker %d has %d partial results of a head", worker, cut);
    }
  for (int tile = 0; tile < total; ++tile)
    expect(visits[tile] == heads, "%d items, %d workers: key tile %d is visited %d times, not %d",
           items, workers, tile, visits[tile], heads);
  for (int head = 0; head < heads; ++head)  // those that no worker meets
    for (int item = 0; item < items; ++item)
      if (lengths[item] == 0) works.push_back({head * items + item, {1, 0, 0, 0, 0}});
  check_parts(works, heads * items, partials);
  check_merges(works, heads * items, partials, order);
}

// All lines of `items` query tiles with up to `most` key tiles.  None: a sequence without queries.
void check_all_lines(int items, int most) {
  std::vector<int> lengths(items, 0);
  while (true) {
    int total = 0;
    for (int length : lengths) total += length;
    for (int workers = 1; workers <= total + 1; ++workers)
      for (int heads : {1, 3}) check_line(lengths, workers, heads, (workers + heads) % 3);
    int i = 0;
    while (i < items && lengths[i] == most) lengths[i++] = 0;
    if (i == items) return;
    ++lengths[i];
  }
}

void check_random_lines(int lines, int most_items, int most_tiles, int most_workers) {
  for (int i = 0; i < lines; ++i) {
    std::vector<int> lengths(1 + below(most_items));
    for (int& length : lengths) length = below(8) ? 1 + below(most_tiles) : below(2);
    check_line(lengths, 1 + below(most_workers), 1 + below(4), i % 3);
  }
}

// One query tile in `count` parts, between two others on a line.
void check_count(int count) {
  int const length = 1 + count % 3;
  check_line({1 + count % 2, count * length, 1}, count, 1, count % 3);
  if (count > kMergedParts * kMergedParts && count % 16 > 1) return;
  check_line({count * length}, count, 2, (count + 1) % 3);
}

// A single query tile whose workers merge in clusters: each thread block of a cluster merges rows of its own, and the clusters' results
// of these rows meet at a counter of theirs.
void check_clusters(int tiles, int workers, int bits, int heads, int order) {
#define CASE "%d tiles, %d workers in clusters of %d"
#define ARGS tiles, workers, 1 << bits
  int const used = workers_in_clusters(tiles, workers, bits), blocks = 1 << bits;
  expect(used >= blocks && used <= workers && used % blocks == 0, CASE ": %d used", ARGS, used);
  int const count     = used >> bits;
  Shares const shares = Shares::of_all(tiles, used);
  expect(shares.workers == used && shares.end(used - 1) == tiles, CASE ": %d visited", ARGS,
         shares.end(used - 1));
  int longest = 0;
  for (int w = 0; w < used; ++w) {
    int const begin = shares.begin(w), end = shares.end(w);
    expect(begin == (w == 0 ? 0 : shares.end(w - 1)) && end >= begin, CASE ": share %d is [%d, %d)",
           ARGS, w, begin, end);
    longest = std::max(longest, end - begin);
  }
  expect(longest == (tiles + used - 1) / used, CASE ": a share has %d", ARGS, longest);
  for (int i = 0; i < count; ++i)
    expect(shares.end((i + 1) * blocks - 1) > shares.begin(i * blocks),
           CASE ": none for cluster %d", ARGS, i);
  // Rows of different thread blocks are merged apart: as query tiles that share partial results, but not counters.
  int64_t const partials = 2 * int64_t(workers) * heads;
  std::vector<Work> works;
  std::vector<char> counters(partials);
  for (int head = 0; head < heads; ++head) {
    for (int i = 0; i < count; ++i)
      works.push_back({head, parts_of_clusters(count, i, heads, head)});
    for (int rank = 0; count > 1 && rank < blocks; ++rank) {
      int64_t const partial = works.back().parts.partial(rank);
      expect(partial >= 0 && partial < partials && !counters[partial], CASE ": counter %lld", ARGS,
             (long long)partial);
      if (partial >= 0 && partial < partials) counters[partial] = 1;
    }
  }
  check_parts(works, heads, partials);
  check_merges(works, heads, partials, order);
#undef CASE
#undef ARGS
}

void check_all_clusters() {
  for (int blocks = 1; blocks <= 300; ++blocks) {
    int const bits = cluster_bits_for(blocks), clusters = min_of(blocks >> bits, kMergedParts);
    expect(bits >= 0 && bits <= 3 && (blocks >> bits) > 0, "%d blocks: clusters of %d", blocks,
           1 << bits);
    expect(8 * (blocks & ((1 << bits) - 1)) <= blocks, "%d blocks: clusters of %d lose too many",
           blocks, 1 << bits);
    if (bits == 0) continue;
    for (int tiles = 1; tiles <= 400; ++tiles)
      check_clusters(tiles, clusters << bits, bits, 1 + tiles % 3, tiles % 3);
  }
  for (int bits = 1; bits <= 3; ++bits)  // a launch may have fewer clusters than planned
    for (int clusters = 1; clusters <= kMergedParts; ++clusters)
      for (int tiles : {1, 7, 8, 9, 64, 1000, 8192, 1 << 20, 1 << 26})
        check_clusters(tiles, clusters << bits, bits, 2, tiles % 3);
  expect(workers_in_clusters(8, 128, 3) == 8, "a tile for each of a cluster");
  expect(workers_in_clusters(64, 128, 3) == 64, "a tile for each of eight clusters");
  expect(workers_in_clusters(1024, 128, 3) == 128, "a long line needs all");
}

// Query tiles in up to `splits` parts each.
void check_splits(int items, int splits, int order) {
  std::vector<Work> works;
  for (int item = 0; item < items; ++item) {
    int const count = item == 0 ? splits : 1 + below(splits);
    for (int i = 0; i < count; ++i) works.push_back({item, parts_of_item(item, splits, count, i)});
  }
  check_parts(works, items, int64_t(items) * splits);
  check_merges(works, items, int64_t(items) * splits, order);
}

int main() {
  check_all_lines(1, 40);
  check_all_lines(2, 12);
  check_all_lines(4, 4);
  check_all_lines(6, 2);
  check_random_lines(300, 40, 300, 528);
  check_random_lines(100, 300, 6, 200);
  check_random_lines(50, 4, 3000, kMostParts);
  for (int count = 1; count <= kMostParts; ++count) check_count(count);

  for (int items = 1; items <= 12; ++items)
    for (int splits = 1; splits <= 128; ++splits) check_splits(items, splits, splits % 3);
  for (int splits : {255, 256, 257, 1000, kMostParts - 1, kMostParts}) check_splits(3, splits, 2);
  check_all_clusters();
  Parts const far = parts_of_item(int64_t(1) << 31, 128, 100, 7);
  expect(far.partial(7) == (int64_t(128) << 31) + 7, "partial results beyond 2^32");

  std::printf("%ld query tiles cut, into up to %ld parts\n", cut_tiles, most_parts);
  expect(most_parts == kMostParts, "no tile in %d parts", kMostParts);
  return check::finish();
}
