#pragma once
// Which query tiles and key tiles a thread block of the decoding kernel works on.
// Used by decode_kernel.  Kept in shared memory: in registers it would be spilled in the main loop.
#include "pieces/cluster.cuh"
#include "sm80/decode/mainloop.cuh"

namespace flash::sm80 {

// A run of key tiles of one query tile.
struct DecodeWork {
  DecodeTask task;
  Parts parts;  // count 1: the whole query tile; 0: nothing is left to do
};

// Where a thread block is on the line of its head's key tiles.
struct DecodeCursor {
  Shares shares;
  int position, end;
  int item;  // where on the line work.task's query tile begins, which holds position or lies before it
};

// splits > 0: one run for each thread block.  Parts of a query tile are neighbours in the grid, then come the query tiles of a head from
// the last to the first, which has least to do.
//
// splits == 0: an equal share of all key tiles, one query tile after the other, for each worker and key head.  The line goes through the
// sequences and the query tiles of each.  The thread blocks of one worker's heads are neighbours in the grid: they read the same rows of the
// cache, which lie side by side, at the same time (docs/tuning.md, "Decoding").
template <class Traits>
struct DecodeSchedule {
  DecodeKernelParams const& params;
  DecodeCursor& cursor;  // shared memory, as is work
  DecodeWork& work;

  // All threads: the first work, which they may read after a barrier.  scratch: shared memory, one int for each warp.
  CUTE_DEVICE void start(int* scratch, LengthsAre lengths) const {
    if (threadIdx.x == 0) { cursor = {}, work.parts.count = 0; }
    if (params.plan.splits > 0) {
      if (threadIdx.x == 0) { take_part(); }
    } else if (params.problem.batch > kLanes) {
      find_share(scratch);
      if (threadIdx.x == 0) { next(); }
    } else if (kOneTile && cluster_blocks(params.plan.cluster_bits) > 1) {
      if (threadIdx.x == 0) { take_in_cluster(lengths); }
    } else if (threadIdx.x < kLanes) {
      __syncwarp();  // PROTECTS: the share's finder writes the cursor and work after thread 0.
      find_share_of_few(lengths);
    }
  }

  // One thread; the others may read work after a barrier.
  CUTE_DEVICE void next() const {
    if (cursor.position >= cursor.end) {
      work.parts.count = 0;
      return;
    }
    DecodeTask task = work.task;
    int const item  = item_at(cursor.position, task, cursor.item);
    take(cursor.shares, cursor.position, cursor.end, task, item);
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

  // The only query tile of the only sequence.  Thread blocks of a cluster all have a part of it, which may be empty, or none has.
  CUTE_DEVICE void take_in_cluster(LengthsAre lengths) const {
    CacheSequence const sequence = sequence_of(0, lengths);
    KeyRange const range         = range_of(sequence, 0);
    int const tiles = tiles_of(sequence, range), bits = params.plan.cluster_bits;
    int const worker = blockIdx.y, workers = workers_in_clusters(tiles, params.plan.workers, bits);
    if (tiles == 0 || worker >= workers) { return; }
    Shares const shares = Shares::of_all(tiles, workers);
    int const begin     = range.tile_begin + shares.begin(worker);
    work.task           = {
        0, int(blockIdx.x), 0, sequence, range, begin, range.tile_begin + shares.end(worker)};
    work.parts =
        parts_of_clusters(workers >> bits, worker >> bits, params.problem.heads_kv, blockIdx.x);
  }

  // Goes on from the query tile that begins at `item` to the one that holds position; returns where that begins.
  CUTE_DEVICE int item_at(int position, DecodeTask& task, int item) const {
#pragma unroll 1
    while (position >= item + tiles_of(task.sequence, task.range)) {
      item += tiles_of(task.sequence, task.range);
      if (++task.m_block >= query_tiles(task.sequence)) {
        task.m_block = 0, task.sequence = sequence_of(++task.batch);
      }
      task.range = range_of(task.sequence, task.m_block);
    }
    return item;
  }

  // The part of task's query tile from position on.
  CUTE_DEVICE void take(Shares const& shares, int position, int end, DecodeTask& task,
                        int item) const {
    int const skipped = position - item, tiles = task.range.tiles();
    int const count = min_of(end - position, tiles - skipped);
    task.tile_begin = task.range.tile_begin + skipped, task.tile_end = task.tile_begin + count;
    work.task = task;
    work.parts =
        parts_in_line(shares, blockIdx.y, item, tiles, params.problem.heads_kv, blockIdx.x);
    cursor = {shares, position + count, end, item};
  }

  // One warp, a sequence for each lane.  Nothing but the lengths is waited for, and no other warp.
  CUTE_DEVICE void find_share_of_few(LengthsAre lengths) const {
    int const sequences = params.problem.batch, lane = threadIdx.x;
    CacheSequence sequence{};
    if (lane < sequences) { sequence = sequence_of(lane, lengths); }
    KeyRange const range = range_of(sequence, 0);
    int const tiles      = kOneTile ? tiles_of(sequence, range) : tiles_of(sequence);
    int before = 0, total = tiles, workers = params.plan.workers;
    if (sequences == 1) {
      workers = workers_for_one(tiles, workers);
    } else {
      int const of_first = __shfl_sync(~0u, tiles, 0);
      if (__all_sync(~0u, lane >= sequences || tiles == of_first)) {
        before = lane * of_first, total = sequences * of_first;
        if (keeps_whole(sequences, workers)) { workers = sequences; }
      } else {
        int const sum = sum_over_lanes(tiles);  // inclusive
        before = sum - tiles, total = __shfl_sync(~0u, sum, kLanes - 1);
      }
    }
    Shares const shares = Shares::of(total, workers);
    int const worker = blockIdx.y, position = shares.begin(worker);
    if (worker >= shares.workers || position < before || position >= before + tiles) { return; }
    DecodeTask task{lane, int(blockIdx.x), 0, sequence, range, 0, 0};
    int const item = kOneTile ? before : item_at(position, task, before);
    take(shares, position, shares.end(worker), task, item);
  }

  CUTE_DEVICE static int sum_over_lanes(int sum) {
    CUTE_UNROLL
    for (int distance = 1; distance < kLanes; distance *= 2) {
      int const other = __shfl_up_sync(~0u, sum, distance);
      if (int(threadIdx.x % kLanes) >= distance) { sum += other; }
    }
    return sum;
  }

  // Any number of sequences.  Each thread adds up the tiles of some.
  CUTE_DEVICE void find_share(int* scratch) const {
    int const thread = threadIdx.x, warp = thread / kLanes;
    int const sequences = params.problem.batch;
    int const own = ceil_div(sequences, Traits::kThreads), from = min_of(sequences, thread * own);
    int const to = min_of(sequences, from + own);
    int sum      = 0;
#pragma unroll 1
    for (int b = from; b < to; ++b) { sum += tiles_of(sequence_of(b)); }
    int const tiles = sum;
    int before      = sum_over_lanes(tiles);  // inclusive
    if (thread % kLanes == kLanes - 1) { scratch[warp] = before; }
    __syncthreads();  // PROTECTS: the warps' sums are complete; the finder writes after thread 0.
    int total = 0;
    CUTE_UNROLL
    for (int w = 0; w < Traits::kThreads / kLanes; ++w) {
      before += w < warp ? scratch[w] : 0;
      total += scratch[w];
    }
    before -= tiles;
    int const workers   = params.plan.workers;
    bool const is_equal = keeps_whole(sequences, workers) && own == 1 &&
                          __syncthreads_and(thread >= sequences || tiles * sequences == total);
    Shares const shares = Shares::of(total, is_equal ? sequences : workers);
    int const worker = blockIdx.y, position = shares.begin(worker);
    if (worker < shares.workers && position >= before && position < before + tiles) {
      int b = from;
#pragma unroll 1
      for (int of_b; own > 1 && position >= before + (of_b = tiles_of(sequence_of(b))); ++b) {
        before += of_b;
      }
      CacheSequence const sequence = sequence_of(b);
      work.task                    = {b, int(blockIdx.x), 0, sequence, range_of(sequence, 0), 0, 0};
      cursor                       = {shares, position, shares.end(worker), before};
    }
    __syncthreads();  // PROTECTS: the cursor is complete.
  }

  // Narrow tiles hold all rows of a sequence.
  static constexpr bool kOneTile = Traits::kNarrow;
  static constexpr int kLanes    = kFewSequences;

  CUTE_DEVICE int group() const { return params.plan.group; }
  CUTE_DEVICE CacheSequence sequence_of(int batch, LengthsAre lengths = LengthsAre::kFinal) const {
    return cache_sequence(params.problem, params.cache, batch, lengths);
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
  CUTE_DEVICE int tiles_of(CacheSequence const& sequence) const {
    int tiles       = 0;
    int const count = query_tiles(sequence);
#pragma unroll 1
    for (int m = 0; m < count; ++m) { tiles += range_of(sequence, m).tiles(); }
    return tiles;
  }
};

}  // namespace flash::sm80
