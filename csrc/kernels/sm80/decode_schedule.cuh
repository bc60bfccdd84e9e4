#pragma once
// Which query tiles and key tiles a thread block of the decoding kernel works on.
// Used by decode_kernel.  Kept in shared memory: in registers it would be spilled in the main loop.
#include "sm80/decode_mainloop.cuh"

namespace flash::sm80 {

// A run of key tiles of one query tile.
struct DecodeWork {
  DecodeTask task;
  Parts parts;  // count 1: the whole query tile; 0: nothing is left to do
};

// Where a thread block is on the line of its head's key tiles.
struct DecodeCursor {
  Shares shares;
  int worker, head;
  int position, end;
  // The sequence that holds position, or one before it; its first tile on the line.
  int batch, batch_begin;
  CacheSequence sequence;
};

// splits > 0: one run for each thread block.  Parts of a query tile are neighbours in the grid, then come the query tiles of a head from
// the last to the first, which has least to do.
//
// splits == 0: an equal share of all key tiles, one query tile after the other, for each worker and key head.  The line goes through the
// sequences and the query tiles of each.  The thread blocks of one worker's heads are neighbours in the grid: they read the same rows of the
// cache, which lie side by side, at the same time (benchmarks/README.md, "Decoding").
template <class Traits>
struct DecodeSchedule {
  DecodeParams const& params;
  DecodeCursor& cursor;  // shared memory, as is work
  DecodeWork& work;

  // All threads.  scratch: shared memory, one int for each warp.
  CUTE_DEVICE void start(int* scratch) const {
    if (threadIdx.x == 0) { cursor = {}; }
    if (params.plan.splits == 0) {
      find_share(scratch);
    } else if (threadIdx.x == 0) {
      cursor.end = 1;
    }
    __syncthreads();  // PROTECTS: the cursor is complete.
  }

  // One thread; the others may read work after a barrier.
  CUTE_DEVICE void next() const {
    work.parts.count = 0;
    if (cursor.position >= cursor.end) { return; }
    if (params.plan.splits == 0) {
      take_from_line();
    } else {
      take_part();
      cursor.position = 1;
    }
  }

 private:
  CUTE_DEVICE void take_part() const {
    Problem const& problem = params.problem;
    int const splits = params.plan.splits, item = blockIdx.x / splits;
    int const most = ceil_div(problem.seqlen_q * group(), Traits::kBlockM);
    int const pair = item / most, batch = pair / problem.heads_kv, part = blockIdx.x % splits;
    CacheSequence const sequence = sequence_of(batch);
    int const m_block            = query_tiles(sequence) - 1 - item % most;
    if (m_block < 0) { return; }
    KeyRange const range = range_of(sequence, m_block);
    int const count      = min_of(splits, range.tiles());
    if (part >= count) { return; }
    auto const cut = [&](int i) {
      return range.tile_begin + int(int64_t(range.tiles()) * i / count);
    };
    work.task  = {batch,        pair % problem.heads_kv, m_block, sequence, range, cut(part),
                  cut(part + 1)};
    work.parts = parts_of_item(item, splits, count, part);
  }

  CUTE_DEVICE void take_from_line() const {
    CacheSequence sequence = cursor.sequence;
    KeyRange range         = range_of(sequence, 0);
    int item = cursor.batch_begin, m_block = 0;
#pragma unroll 1
    while (cursor.position >= item + tiles_of(sequence, range)) {
      item += tiles_of(sequence, range);
      if (++m_block >= query_tiles(sequence)) {
        m_block = 0, cursor.batch_begin = item;
        sequence = cursor.sequence = sequence_of(++cursor.batch);
      }
      range = range_of(sequence, m_block);
    }
    int const skipped = cursor.position - item, begin = range.tile_begin + skipped;
    int const count = min_of(cursor.end - cursor.position, range.tiles() - skipped);
    work.task       = {cursor.batch, cursor.head, m_block, sequence, range, begin, begin + count};
    work.parts      = parts_in_line(cursor.shares, cursor.worker, item, range.tiles(),
                                    params.problem.heads_kv, cursor.head);
    cursor.position += count;
  }

  // Each thread adds up the tiles of some sequences; the one that meets the share's begin writes the cursor.
  CUTE_DEVICE void find_share(int* scratch) const {
    int const thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
    int const sequences = params.problem.batch;
    if (sequences == 1) {
      if (thread == 0) {
        int const tiles = tiles_of(0);
        begin_share(Shares::of(tiles, workers_for_one(tiles, params.plan.workers)), 0, 0);
      }
      return;
    }
    int const own = ceil_div(sequences, Traits::kThreads), from = min_of(sequences, thread * own);
    int const to = min_of(sequences, from + own);
    int work     = 0;
#pragma unroll 1
    for (int b = from; b < to; ++b) { work += tiles_of(b); }
    int before = work;  // inclusive sum over the threads
    CUTE_UNROLL
    for (int distance = 1; distance < 32; distance *= 2) {
      int const other = __shfl_up_sync(~0u, before, distance);
      if (lane >= distance) { before += other; }
    }
    if (lane == 31) { scratch[warp] = before; }
    __syncthreads();  // PROTECTS: the warps' sums are complete.
    int total = 0;
    CUTE_UNROLL
    for (int w = 0; w < Traits::kThreads / 32; ++w) {
      before += w < warp ? scratch[w] : 0;
      total += scratch[w];
    }
    before -= work;
    // Sequences of one length that keep half of the workers busy are not cut: half of the multiprocessors can read as fast as all.
    int workers = params.plan.workers;
    if (sequences <= workers && 2 * sequences >= workers && own == 1 &&
        __syncthreads_and(thread >= sequences || work * sequences == total)) {
      workers = sequences;
    }
    Shares const shares = Shares::of(total, workers);
    int const position  = shares.begin(blockIdx.y);
    if (position < before || position >= before + work) { return; }
    int b = from;
#pragma unroll 1
    for (int tiles = 0; own > 1 && position >= before + (tiles = tiles_of(b)); ++b) {
      before += tiles;
    }
    begin_share(shares, b, before);
  }

  CUTE_DEVICE void begin_share(Shares const& shares, int batch, int batch_begin) const {
    int const worker = blockIdx.y;
    if (worker >= shares.workers) { return; }
    cursor = {shares, worker,      int(blockIdx.x),   shares.begin(worker), shares.end(worker),
              batch,  batch_begin, sequence_of(batch)};
  }

  // Narrow tiles hold all rows of a sequence.
  static constexpr bool kOneTile = Traits::kNarrow;

  CUTE_DEVICE int group() const { return params.plan.group; }
  CUTE_DEVICE CacheSequence sequence_of(int batch) const {
    return cache_sequence(params.problem, params.cache, batch);
  }
  CUTE_DEVICE KeyRange range_of(CacheSequence const& sequence, int m_block) const {
    return key_range(sequence, params.problem, group(), kOneTile ? 0 : m_block, Traits::kBlockM,
                     Traits::kBlockN);
  }
  CUTE_DEVICE int query_tiles(CacheSequence const& sequence) const {
    return kOneTile ? int(sequence.seqlen_q > 0)
                    : query_tile_count(sequence, group(), Traits::kBlockM);
  }
  // A sequence without queries has no tiles.
  CUTE_DEVICE static int tiles_of(CacheSequence const& sequence, KeyRange const& range) {
    return sequence.seqlen_q > 0 ? range.tiles() : 0;
  }
  CUTE_DEVICE int tiles_of(int batch) const {
    CacheSequence const sequence = sequence_of(batch);
    int tiles                    = 0;
    int const count              = query_tiles(sequence);
#pragma unroll 1
    for (int m = 0; m < count; ++m) { tiles += range_of(sequence, m).tiles(); }
    return tiles;
  }
};

}  // namespace flash::sm80
