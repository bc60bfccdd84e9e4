#pragma once
// The order of a forward pass's query tiles.  Used by: the forward launches.
#include "flash.h"
#include "pieces/sequence.cuh"
#include "pieces/tile_order.cuh"

namespace flash {

// Bounds of the key heads that run together, which otherwise are as many as share L2.
struct HeadBounds {
  int least = 1, most = 1024;
};

// False if there are more tiles than a launch can have.
inline bool make_query_order(Problem const& problem, int block_m, TileOrder& order,
                             HeadBounds const& bounds = {}) {
  constexpr int kElementBytes = 2;
  bool const ragged           = problem.cu_seqlens_q != nullptr;
  int64_t const blocks        = ragged ? slot_count(problem.total_q, problem.batch, block_m)
                                       : ceil_div(problem.seqlen_q, block_m);
  int64_t const pairs         = int64_t(ragged ? 1 : problem.batch) * problem.heads_q;
  if (pairs > INT32_MAX || blocks * pairs > INT32_MAX) { return false; }
  int const sharing = problem.heads_q / problem.heads_kv;
  bool const window = !ragged && problem.mask == MaskKind::kLocal;
  // K and V of a group stay in L2 while its query blocks run; of a window, what a few neighbouring blocks see.
  int64_t const seen       = int64_t(problem.window_left) + problem.window_right + 8 * block_m;
  int64_t const keys       = window && seen < problem.seqlen_k ? seen : problem.seqlen_k;
  int64_t const kv_bytes   = 2 * keys * problem.head_dim * kElementBytes;
  int const heads_together = min_of(max_of(heads_in_l2(kv_bytes), bounds.least), bounds.most);
  int const reach          = problem.window_left - (problem.seqlen_k - problem.seqlen_q);
  order = make_tile_order(int(blocks), ragged ? 1 : problem.batch, problem.heads_q,
                          heads_together * sharing, ragged || problem.mask != MaskKind::kNone,
                          sharing, window ? short_blocks(reach, block_m, int(blocks)) : 0);
  return true;
}

}  // namespace flash
