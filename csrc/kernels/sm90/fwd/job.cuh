#pragma once
// A tile of the forward pass as the producer tells the consumers of it: its rows, its head, the key blocks that it visits.
// Used by: fwd/producer, fwd/consumer, fwd/epilogue.
#include "pieces/sequence.cuh"
#include "pieces/tile_order.cuh"
#include "pieces/visibility.cuh"
#include "sm90/tile_config.h"

namespace flash::sm90 {

template <int kGroups>
struct Job {
  Site site;
  int head, head_kv;
  int row0;           // of the sequence: the tile's first one
  BlockRange blocks;  // that some group's rows see: they are loaded
  // By each group's rows: a part of blocks.  A group that has no rows, or whose rows see no key, has an empty one at blocks.first: all
  // blocks lie to its right, and it passes over them there.
  BlockRange seen[kGroups];

  FLASH_HD bool sees_keys() const { return blocks.first < blocks.end; }
  template <MaskKind kMask>
  FLASH_HD Visibility<kMask> see(Problem const& problem) const {
    return {site.seqlen_q, site.seqlen_k, problem.window_left, problem.window_right};
  }
};

#ifdef __CUDACC__
// False if the tile has no rows.  Called by a whole warp.
template <MaskKind kMask, int kBlockN, int kGroups>
__device__ __forceinline__ bool find_job(Problem const& problem, TileOrder const& order, int number,
                                         Job<kGroups>& job) {
  constexpr int kBlockM = kGroups * kGroupRows;
  TileCoord const tile  = order.coord(number);
  job.site              = problem.cu_seqlens_q ? find_site<false>(problem, tile.block, kBlockM)
                                               : dense_site(problem, tile.batch, tile.block);
  job.row0              = job.site.block * kBlockM;
  if (job.row0 >= job.site.seqlen_q) { return false; }
  job.head       = tile.head;
  job.head_kv    = int(order.by_sharing.divide(uint32_t(tile.head)));
  auto const see = job.template see<kMask>(problem);
  job.blocks     = key_blocks<kBlockM, kBlockN>(see, job.site.block);
#pragma unroll
  for (int g = 0; g < kGroups; ++g) {
    int const first = job.blocks.first;
    job.seen[g]     = BlockRange{first, first, first, first};
    if (job.row0 + g * kGroupRows < job.site.seqlen_q) {
      job.seen[g] = key_blocks<kGroupRows, kBlockN>(see, job.site.block * kGroups + g);
    }
  }
  return true;
}
#endif

}  // namespace flash::sm90
