#pragma once
// Which sequence a tile belongs to, and where its rows lie.
// Used by: every kernel.  Dense batches are sequences of one length; sequences of their own lengths share one axis of slots.
#include "flash.h"
#include "pieces/integers.cuh"

namespace flash {

// Sequences of different lengths are cut into blocks without a list of them: sequence b begins at slot cu[b] / kBlock + b, which
// leaves it at least as many slots as blocks, and at most one to spare.
//
//   cu = 0, 100, 110, 300;  kBlock = 64:   slots 0 1 | 2 | 3 4 5 | 6 ...     sequence 2 begins at 110 / 64 + 2 = 3
//   blocks:                                      0 1 | 0 | 0 1 2 |
//
// The rows beyond the last sequence are one more sequence, without a partner.
FLASH_HD int first_slot(int first_row, int sequence, int block) {
  return first_row / block + sequence;
}
FLASH_HD int64_t slot_count(int total, int batch, int block) {
  return int64_t(total) / block + batch + 1;
}

// One tile's sequence.
struct Site {
  int batch;           // number of the sequence
  int block;           // the tile's block in it; beyond its end: nothing to do
  int q_row0, k_row0;  // first rows of the sequence in q and k
  int seqlen_q, seqlen_k;
  int k_rows;  // rows of k and v that belong to the sequence: from k_row0 on
  int slot0;   // slot of block 0
};

FLASH_HD Site dense_site(Problem const& problem, int batch, int block) {
  return {batch, block, 0, 0, problem.seqlen_q, problem.seqlen_k, problem.seqlen_k, 0};
}

FLASH_HD int64_t query_block_count(Problem const& problem, int block) {
  return problem.cu_seqlens_q
             ? slot_count(problem.total_q, problem.batch, block) * problem.heads_q
             : int64_t(ceil_div(problem.seqlen_q, block)) * problem.batch * problem.heads_q;
}

#ifdef __CUDACC__
// The sequence of a slot; the same for all lanes.  along: cu_seqlens of the axis that is cut, of length total.  32 probes at a time.
__device__ __forceinline__ int find_sequence(int const* along, int batch, int slot, int block) {
  int const lane = threadIdx.x % 32;
  int low = 0, count = batch + 1;  // the answer is in [low, low + count)
  while (count > 1) {
    int const step = (count + 31) / 32, probe = low + lane * step;
    bool const before =
        lane * step < count && first_slot(__ldg(along + probe), probe, block) <= slot;
    int const passed = __popc(__ballot_sync(~0u, before)) - 1;
    count            = min_of(step, count - passed * step);
    low += passed * step;
  }
  return low;
}

// Site of a slot.  kCutsK: the slots are of k (backward), otherwise of q.
template <bool kCutsK>
__device__ __forceinline__ Site find_site(Problem const& problem, int slot, int block) {
  int const* const along = kCutsK ? problem.cu_seqlens_k : problem.cu_seqlens_q;
  int const b = find_sequence(along, problem.batch, slot, block), end = problem.batch;
  auto const bound = [&](int const* cu, int i, int total) {
    return i <= end ? __ldg(cu + i) : total;
  };
  Site site;
  site.batch    = b;
  site.q_row0   = bound(problem.cu_seqlens_q, b, problem.total_q);
  site.k_row0   = bound(problem.cu_seqlens_k, b, problem.total_k);
  site.seqlen_q = bound(problem.cu_seqlens_q, b + 1, problem.total_q) - site.q_row0;
  site.k_rows   = bound(problem.cu_seqlens_k, b + 1, problem.total_k) - site.k_row0;
  site.slot0    = first_slot(kCutsK ? site.k_row0 : site.q_row0, b, block);
  site.block    = slot - site.slot0;
  site.seqlen_k = site.k_rows;
  if (b == end) {  // beyond the last sequence: rows that see nothing and are seen by nothing
    (kCutsK ? site.seqlen_q : site.seqlen_k) = 0;
  } else {
    if (problem.seqused_k) { site.seqlen_k = __ldg(problem.seqused_k + b); }
    if (problem.leftpad_k) {
      int const pad = __ldg(problem.leftpad_k + b);
      site.k_row0 += pad, site.seqlen_k -= pad;
    }
  }
  return site;
}

// Query blocks in the order of the backward's workspace: one (batch, head) after the other, or one head of all slots after the other.
struct QueryBlock {
  Site site;
  int head;
};
__device__ __forceinline__ QueryBlock query_block(Problem const& problem, int index, int block) {
  if (problem.cu_seqlens_q) {
    int const slots = int(slot_count(problem.total_q, problem.batch, block));
    return {find_site<false>(problem, index % slots, block), index / slots};
  }
  int const blocks = ceil_div(problem.seqlen_q, block), pair = index / blocks;
  return {dense_site(problem, pair / problem.heads_q, index % blocks), pair % problem.heads_q};
}
#endif

}  // namespace flash
