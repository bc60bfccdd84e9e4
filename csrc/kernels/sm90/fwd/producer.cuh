#pragma once
// The warp that loads: for each of the thread block's tiles Q, then K and V from the last key block to the first, by TMA.
// It runs ahead of the consumers as far as the rings' buffers allow, into the next tiles too.
#include "pieces/dependent.cuh"
#include "sm90/fwd/traits.cuh"
#include "sm90/instructions/barrier.cuh"
#include "sm90/instructions/ring.cuh"
#include "sm90/instructions/tma.cuh"

namespace flash::sm90 {

struct FwdMaps {
  TmaTensor q, k, v, out;
};

template <class Traits, MaskKind kMask>
struct Producer {
  using Shared  = typename Traits::Shared;
  using Element = typename Traits::Element;
  using TileJob = Job<Traits::kGroups>;

  Problem const& problem;
  TileOrder const& order;
  FwdMaps const& maps;
  Shared& smem;
  int* counter;  // of the tiles that thread blocks have taken; 0 before the launch and after it
  int lane;
  RingPlace<Traits::kQBuffers> q_ring{};
  RingPlace<Traits::kStages> stage_ring{};
  RingPlace<Traits::kJobs> job_ring{};
  uint32_t landed_parity = 0;

  CUTE_DEVICE void run() {
    int const tiles = int(order.size());
    for (int number = int(blockIdx.x); number < tiles;) {
      // Asked for now, needed when this tile has been loaded.
      int const ticket = lane == 0 ? atomicAdd(counter, 1) : 0;
      TileJob job;
      if (find_job<kMask, Traits::kBlockN>(problem, order, number, job)) {
        publish(job, true);
        load(job);
      }
      // Each tile takes one ticket: this is the last one.
      if (lane == 0 && ticket == tiles - 1) { *counter = 0; }
      number = int(gridDim.x) + __shfl_sync(~0u, ticket, 0);
    }
    publish({}, false);
    let_next_kernel_start();  // it waits by itself for what the consumers have yet to store
  }

 private:
  // A lane that fell behind the others by two phases would wait for one that has passed: each wait is the whole warp's.
  CUTE_DEVICE static void wait_together(uint64_t& barrier, uint32_t parity) {
    wait(barrier, parity);
    __syncwarp();
  }

  // In the order in which the consumers need them.
  CUTE_DEVICE void load(TileJob const& job) {
    auto const q   = q_ring.take();
    int const last = job.blocks.end - 1;
    load_q(job, q, 0);
    if (job.sees_keys()) { load_k(job, last); }
    CUTE_UNROLL
    for (int group = 1; group < Traits::kGroups; ++group) { load_q(job, q, group); }
    for (int block = last; block > job.blocks.first; --block) {
      load_k(job, block - 1);
      load_v(job, block);
    }
    if (job.sees_keys()) { load_v(job, job.blocks.first); }
  }

  CUTE_DEVICE void load_q(TileJob const& job, RingPlace<Traits::kQBuffers> const& place,
                          int group) {
    // PROTECTS: O was stored from it.
    wait_together(smem.q_empty[place.index][group], place.empty_parity());
    if (lane == 0) {
      uint64_t& full = smem.q_full[place.index][group];
      arrive_expecting(full, Traits::kQSize * sizeof(Element));
      int const row = job.site.q_row0 + job.row0 + group * kGroupRows;
      load_tile<Traits::kHeadDim, kGroupRows, Traits::kBoxColumns>(
          maps.q, &full, smem.q[place.index][group], row, job.head, job.site.batch);
    }
  }

  CUTE_DEVICE void load_k(TileJob const& job, int block) {
    auto const stage = free_stage();
    if (lane == 0) {
      load_block<Traits::kHeadDim>(maps.k, job, block, stage.index, smem.stage_full[stage.index]);
    }
  }

  CUTE_DEVICE void load_v(TileJob const& job, int block) {
    auto const stage = free_stage();
    // Rows of other sequences, or that no query sees, would reach O as 0 * NaN.  A block that is visited has others, too: it begins
    // before seqlen_k and ends behind first_seen.
    int const row0 = block * Traits::kBlockN;
    int const begin =
        kMask == MaskKind::kLocal ? job.template see<kMask>(problem).first_seen() - row0 : 0;
    int const end = problem.cu_seqlens_q ? job.site.seqlen_k - row0 : Traits::kBlockN;
    if (begin <= 0 && end >= Traits::kBlockN) {
      if (lane == 0) {
        load_block<Traits::kHeadDimV>(maps.v, job, block, stage.index,
                                      smem.stage_full[stage.index]);
      }
    } else {
      if (lane == 0) {
        load_block<Traits::kHeadDimV>(maps.v, job, block, stage.index, smem.landed);
      }
      wait(smem.landed, landed_parity);
      landed_parity ^= 1;
      clear_rows(smem.stages[stage.index], 0, begin);
      clear_rows(smem.stages[stage.index], end, Traits::kBlockN);
      fence_for_async();  // PROTECTS: the products read the zeros.
      __syncwarp();
      if (lane == 0) { arrive(smem.stage_full[stage.index]); }
    }
  }

  CUTE_DEVICE RingPlace<Traits::kStages> free_stage() {
    auto const stage = stage_ring.take();
    // PROTECTS: its last block was read.
    wait_together(smem.stage_empty[stage.index], stage.empty_parity());
    return stage;
  }

  template <int kColumns>
  CUTE_DEVICE void load_block(TmaTensor const& tensor, TileJob const& job, int block, int stage,
                              uint64_t& full) {
    arrive_expecting(full, Traits::kBlockN * kColumns * sizeof(Element));
    load_tile<kColumns, Traits::kBlockN, Traits::kBoxColumns>(
        tensor, &full, smem.stages[stage], job.site.k_row0 + block * Traits::kBlockN, job.head_kv,
        job.site.batch);
  }

  // Rows [begin, end) of a block of V: zeros.
  CUTE_DEVICE void clear_rows(Element* tile, int begin, int end) {
    constexpr int kRowChunks = Traits::kBoxColumns / 8;
    auto* const chunks       = reinterpret_cast<uint4*>(tile);
    for (int slab = 0; slab < Traits::kHeadDimV / Traits::kBoxColumns; ++slab) {
      int const first = slab * Traits::kBlockN * kRowChunks;
      CUTE_NO_UNROLL  // the offsets of several turns would be kept in registers that the producer does not have
          for (int i = begin * kRowChunks + lane; i < end * kRowChunks; i += 32) {
        chunks[first + i] = uint4{};
      }
    }
  }

  CUTE_DEVICE TileFeatures features_of(TileJob const& job) {
    int const batch = min_of(job.site.batch, problem.batch - 1);  // rows beyond the last sequence
    return tile_features<Traits::kLevel>(problem, score_mod(problem, batch, job.head), batch,
                                         job.head);
  }

  CUTE_DEVICE void publish(TileJob const& job, bool is_job) {
    auto const place = job_ring.take();
    // PROTECTS: its last job was stored.
    wait_together(smem.job_empty[place.index], place.empty_parity());
    if (lane == 0) {
      smem.jobs[place.index] = job, smem.is_job[place.index] = is_job;
      if constexpr (Traits::kLevel != Level::kPlain) {
        if (is_job) { smem.features[place.index] = features_of(job); }
      }
      arrive(smem.job_full[place.index]);
    }
  }
};

}  // namespace flash::sm90
