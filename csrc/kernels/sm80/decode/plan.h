#pragma once
// How the keys of a decoding call are divided among thread blocks, the scratch that this takes, and the parameters of its kernels.
// Used by: decode launch and kernels.  Plain integers: compiles with g++.
#include <algorithm>

#include "entry.h"
#include "pieces/split.cuh"
#include "sm80/tile_config.h"

namespace flash::sm80 {

//   splits > 0   the keys of every query tile are cut into so many equal parts, each a thread block's
//   splits == 0  all key tiles of a head's query tiles are one line, cut into equal shares, one for each thread block
struct DecodePlan {
  int group;  // query heads of a key head
  int block_m, splits;
  int64_t grid;  // thread blocks of a worker, one for each key head; with splits > 0 all
  int workers;
  // The workers of a single sequence's one query tile merge in clusters of 2^cluster_bits thread blocks; 0: no clusters.
  int cluster_bits;
  // Thread blocks guess their first work from the lengths that are there before the kernels before have ended, and bring its keys into L2.
  bool looks_ahead;
  int64_t partial_o, partial_rows, counters;  // elements
};

struct DecodeWorkspace {
  float* partial_o;     // (partials, block_m, built head_dim)
  float* partial_rows;  // (partials, block_m, 2): reference of the scores, sum
  int* counters;        // zeros; zeros again when the kernel ends
};

// What the kernels get: a call with its plan and workspace.
struct DecodeKernelParams {
  Problem problem;
  TensorRef q, out;
  KvCache cache;
  float* lse;
  DecodePlan plan;
  DecodeWorkspace workspace;
};

// What a plan depends on beside the call.
struct DecodeDevice {
  int sms;
  SmemSize size;  // that the tiles are for
  bool clusters;
};

// A guess must not lead to memory that is not the cache's: what it comes from are lengths alone, and these end at the capacity.
inline bool can_look_ahead(DecodeParams const& params) {
  constexpr bool kLooksAhead = true;
  Problem const& problem     = params.problem;
  KvCache const& cache       = params.cache;
  return kLooksAhead && problem.batch == 1 && !problem.cu_seqlens_q && !problem.cu_seqlens_k &&
         !cache.block_table && !cache.entries && cache.seqlen_new == 0;
}

// Workers for the keys of every head in one line, clusters of them, and their partial results, whose number is returned.
inline int64_t share_line(DecodePlan& plan, DecodeParams const& params, bool narrow, int blocks,
                          int64_t most_tiles, bool has_clusters) {
  Problem const& problem = params.problem;
  plan.grid              = problem.heads_kv;
  plan.workers =
      int(std::min<int64_t>(min_of(kMostParts, max_of(1, blocks / problem.heads_kv)), most_tiles));
  // Not as a choice of each thread block, for equal lengths: those without work take a microsecond from the others.
  if (narrow && problem.batch > 1 && keeps_whole(problem.batch, plan.workers)) {
    plan.workers = problem.batch;
  }
  if (narrow && problem.batch == 1 && has_clusters) {
    plan.cluster_bits  = cluster_bits_for(plan.workers);
    int const clusters = min_of(plan.workers >> plan.cluster_bits, kMergedParts);
    if (plan.cluster_bits > 0) { plan.workers = clusters << plan.cluster_bits; }
  }
  plan.looks_ahead = narrow && can_look_ahead(params);
  return 2 * plan.grid * plan.workers;
}

inline DecodePlan plan_decode(DecodeParams const& params, int built_head_dim,
                              DecodeDevice const& device) {
  Problem const& problem = params.problem;
  int const group = problem.heads_q / problem.heads_kv, rows = problem.seqlen_q * group;
  bool const narrow     = rows <= kNarrowRows;
  DecodeTile const tile = decode_tile(built_head_dim, narrow, device.size);
  // At least one query tile: its thread block clears rows of q that belong to no sequence.
  int64_t const items =
      int64_t(problem.batch) * problem.heads_kv * ceil_div(max_of(rows, 1), tile.block_m());
  int const blocks = device.sms * tile.ctas;  // that run at once
  // Many query tiles keep every multiprocessor busy as they are, and those of a head that run together share its keys in L2.
  constexpr int kManyItems = 4;
  int splits               = params.num_splits;
  // Of one head, at most; numbers of tiles are ints.
  int64_t const most_tiles =
      items / problem.heads_kv * (ceil_div(params.cache.capacity, tile.block_n()) + 1);
  if (most_tiles > INT32_MAX) { splits = max_of(1, splits); }
  if (splits == 0 && !narrow && items >= kManyItems * int64_t(blocks)) { splits = 1; }

  DecodePlan plan{};
  plan.group = group, plan.block_m = tile.block_m(), plan.splits = splits;
  int64_t partials = 0;
  if (splits > 0) {
    plan.grid = items * splits, plan.workers = 1;
    partials = splits > 1 ? items * splits : 0;
  } else {
    partials = share_line(plan, params, narrow, blocks, most_tiles, device.clusters);
  }
  plan.partial_o    = partials * tile.block_m() * built_head_dim;
  plan.partial_rows = 2 * partials * tile.block_m();
  plan.counters     = kMergeRounds * partials;
  return plan;
}

// Workers' counters are as few as thread blocks that run at once: a stream keeps them.  There may be many of equal parts: these lie in
// the workspace and are cleared for each call.
inline bool uses_kept_counters(DecodePlan const& plan) { return plan.splits == 0; }

inline int64_t workspace_bytes(DecodePlan const& plan) {
  int64_t const counters = uses_kept_counters(plan) ? 0 : plan.counters;
  return (plan.partial_o + plan.partial_rows) * int64_t(sizeof(float)) +
         counters * int64_t(sizeof(int));
}

inline DecodeKernelParams kernel_params(DecodeParams const& params, DecodePlan const& plan,
                                        Scratch const& scratch) {
  DecodeWorkspace workspace{};
  if (plan.counters > 0) {
    workspace.partial_o    = static_cast<float*>(scratch.workspace);
    workspace.partial_rows = workspace.partial_o + plan.partial_o;
    workspace.counters = uses_kept_counters(plan)
                             ? scratch.counters
                             : reinterpret_cast<int*>(workspace.partial_rows + plan.partial_rows);
  }
  return {params.problem, params.q, params.out, params.cache, params.lse, plan, workspace};
}

}  // namespace flash::sm80
