// Check of pieces/split.cuh: quotients, shares of a line of key tiles, and how many workers there are.
#include <algorithm>
#include <cmath>
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

// As a GPU divides, and with reciprocals that are less exact.
void check_quotient(int a, int b) {
  float const inverse = 1.f / float(b);
  expect(quotient(a, b) == a / b, "%d / %d is %d", a, b, quotient(a, b));
  for (float const other : {inverse * (1 - 0x1p-22f), inverse * (1 + 0x1p-22f)})
    expect(quotient(a, b, other) == a / b, "%d / %d is %d with %a", a, b, quotient(a, b, other),
           double(other));
}

void check_quotients() {
  for (int b = 1; b <= 300; ++b)
    for (int a = 0; a <= 3000; ++a) check_quotient(a, b);
  std::vector<int> ends;
  for (int bit = 0; bit < 31; ++bit)
    for (int by = -2; by <= 2; ++by) ends.push_back(std::abs((1 << bit) + by));
  for (int i = 0; i < 3; ++i) ends.push_back(INT32_MAX - i);
  for (int i = 0; i < 2000; ++i) ends.push_back(1 + int(numbers() >> (1 + below(31))));
  for (int b : ends) {
    if (b == 0) continue;
    for (int a : ends) check_quotient(a, b);
    int64_t const most = INT32_MAX / b;
    for (int64_t times : {most, most / 2, most / 3, int64_t(1)})  // around multiples
      for (int by = -1; by <= 1; ++by)
        if (times * b + by >= 0 && times * b + by <= INT32_MAX)
          check_quotient(int(times * b + by), b);
  }
}

void check_shares(int total, int workers) {
  Shares const shares = Shares::of(total, workers);
#define CASE "%d tiles, %d workers"
#define ARGS total, workers
  expect(shares.workers == min_of(workers, total), CASE ": %d have a share", ARGS, shares.workers);
  int next = 0;
  for (int w = 0; w < shares.workers; ++w) {
    int const begin = shares.begin(w), end = shares.end(w), length = total / shares.workers;
    expect(begin == next, CASE ": share %d begins at %d, not %d", ARGS, w, begin, next);
    expect(end > begin && end - begin >= length && end - begin <= length + 1,
           CASE ": share %d has %d tiles", ARGS, w, end - begin);
    for (int tile = begin; tile < end; ++tile)
      expect(shares.owner(tile) == w, CASE ": tile %d is of %d, not %d", ARGS, tile,
             shares.owner(tile), w);
    next = end;
  }
  expect(next == total, CASE ": shares end at %d", ARGS, next);
#undef CASE
#undef ARGS
}

// Lines so long that products of their sizes come near the largest int.
void check_long_shares(int total, int workers) {
  Shares const shares  = Shares::of(total, workers);
  int64_t const length = total / workers, longer = total % workers;
  for (int w : {0, 1, workers / 3, workers / 2, workers - 2, workers - 1}) {
    if (w < 0 || w >= workers) continue;
    int64_t const begin = w * length + std::min<int64_t>(w, longer);
    int64_t const end   = begin + length + (w < longer);
    expect(shares.begin(w) == begin && shares.end(w) == end, "%d tiles: share %d is [%d, %d)",
           total, w, shares.begin(w), shares.end(w));
    for (int64_t tile : {begin, (begin + end) / 2, end - 1})
      expect(shares.owner(int(tile)) == w, "%d tiles, %d workers: tile %lld is of %d, not %d",
             total, workers, (long long)tile, shares.owner(int(tile)), w);
    Parts const parts = parts_in_line(shares, w, 0, total, 1, 0);
    expect(parts.count == workers && parts.index == w, "%d tiles: part %d of %d, not %d of %d",
           total, parts.index, parts.count, w, workers);
  }
}

int main() {
  check_quotients();
  for (int total = 0; total <= 100; ++total)
    for (int workers = 1; workers <= 110; ++workers) check_shares(total, workers);
  for (int total : {1000, 4095, 4096, 4097, 12345})
    for (int workers : {1, 2, 16, 66, 132, 528, kMostParts}) check_shares(total, workers);
  for (int total : {INT32_MAX, INT32_MAX - 1, 1 << 30, (1 << 30) + 1})
    for (int workers : {1, 2, 3, 132, 1000, kMostParts - 1, kMostParts})
      check_long_shares(total, workers);

  for (int tiles = 0; tiles <= 1500; ++tiles)
    for (int workers = 1; workers <= 300; ++workers) {
      int const some = workers_for_one(tiles, workers);
      expect(some == workers || (some == kMergedParts && some < workers),
             "%d tiles: %d of %d workers", tiles, some, workers);
    }
  for (int workers = 1; workers <= 300; ++workers)
    for (int sequences = 1; sequences <= 300; ++sequences)
      expect(keeps_whole(sequences, workers) ==
                 (sequences <= workers && workers - sequences <= sequences),
             "%d sequences, %d workers", sequences, workers);
  expect(workers_for_one(INT32_MAX - kMostParts, kMostParts) == kMostParts,
         "a long line needs all");
  expect(workers_for_one(kMergedParts, kMostParts) == kMergedParts, "a short line is merged once");
  return check::finish();
}
