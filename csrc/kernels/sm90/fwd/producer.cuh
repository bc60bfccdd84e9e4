#pragma once
// The warp that loads: for each of the thread block's tiles Q, then K and V from the last key block to the first, by TMA.
// It runs ahead of the consumers as far as the rings' buffers allow, into the next tiles too.
#include "sm90/fwd/traits.cuh"
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
  using Empty   = cutlass::arch::ClusterBarrier;
  using Full    = cutlass::arch::ClusterTransactionBarrier;

  Problem const& problem;
  TileOrder const& order;
  FwdMaps const& maps;
  Shared& smem;
  int*
      counter;  // of all thread blocks' tiles after their first ones; 0 before the launch and after it
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
      Job job;
      if (find_job<kMask, Traits::kBlockM, Traits::kBlockN>(problem, order, number, job)) {
        publish(job, true);
        load(job);
      }
      // Each tile takes one ticket: this is the last one.
      if (lane == 0 && ticket == tiles - 1) { *counter = 0; }
      number = int(gridDim.x) + __shfl_sync(~0u, ticket, 0);
    }
    publish({}, false);
  }

 private:
  // In the order in which the consumers need them.
  CUTE_DEVICE void load(Job const& job) {
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

  CUTE_DEVICE void load_q(Job const& job, RingPlace<Traits::kQBuffers> const& place, int group) {
    Empty::wait(&smem.q_empty[place.index][group], place.empty_parity());
    int const row0       = job.row0 + group * kGroupRows;
    uint64_t* const full = &smem.q_full[place.index][group];
    Element* const tile  = smem.q[place.index][group];
    // Rows of other sequences would decide with this one's when a warp's references move, and so change its last bits.
    int const rows  = problem.cu_seqlens_q ? job.site.seqlen_q - row0 : kGroupRows;
    bool const cuts = rows < kGroupRows;
    if (lane == 0) {
      uint64_t* const barrier = cuts ? &smem.landed : full;
      Full::arrive_and_expect_tx(barrier, Traits::kQSize * sizeof(Element));
      load_tile<Traits::kHeadDim, kGroupRows, Traits::kBoxColumns>(
          maps.q, barrier, tile, job.site.q_row0 + row0, job.head, job.site.batch);
    }
    if (cuts) { clear_and_pass_on<kGroupRows>(tile, 0, max_of(rows, 0), full); }
  }

  CUTE_DEVICE void load_k(Job const& job, int block) {
    auto const stage = free_stage();
    if (lane == 0) { load_block(maps.k, job, block, stage.index, &smem.stage_full[stage.index]); }
  }

  CUTE_DEVICE void load_v(Job const& job, int block) {
    auto const stage = free_stage();
    // Rows of other sequences, or that no query sees, would reach O as 0 * NaN.
    int const row0  = block * Traits::kBlockN;
    int const begin = kMask == MaskKind::kLocal ? job.see<kMask>(problem).first_seen() - row0 : 0;
    int const end   = problem.cu_seqlens_q ? job.site.seqlen_k - row0 : Traits::kBlockN;
    if (begin <= 0 && end >= Traits::kBlockN) {
      if (lane == 0) { load_block(maps.v, job, block, stage.index, &smem.stage_full[stage.index]); }
    } else {
      if (lane == 0) { load_block(maps.v, job, block, stage.index, &smem.landed); }
      clear_and_pass_on<Traits::kBlockN>(smem.stages[stage.index], begin, max_of(end, 0),
                                         &smem.stage_full[stage.index]);
    }
  }

  CUTE_DEVICE RingPlace<Traits::kStages> free_stage() {
    auto const stage = stage_ring.take();
    Empty::wait(&smem.stage_empty[stage.index], stage.empty_parity());
    return stage;
  }

  CUTE_DEVICE void load_block(TmaTensor const& tensor, Job const& job, int block, int stage,
                              uint64_t* full) {
    Full::arrive_and_expect_tx(full, Traits::kStageSize * sizeof(Element));
    load_tile<Traits::kHeadDim, Traits::kBlockN, Traits::kBoxColumns>(
        tensor, full, smem.stages[stage], job.site.k_row0 + block * Traits::kBlockN, job.head_kv,
        job.site.batch);
  }

  // A tile that has landed: rows [begin, end) stay, the others become zeros.
  template <int kRows>
  CUTE_DEVICE void clear_and_pass_on(Element* tile, int begin, int end, uint64_t* full) {
    Full::wait(&smem.landed, landed_parity);
    landed_parity ^= 1;
    clear_rows<kRows>(tile, 0, begin);
    clear_rows<kRows>(tile, end, kRows);
    cutlass::arch::fence_view_async_shared();  // PROTECTS: the products read the zeros.
    __syncwarp();
    if (lane == 0) { Full::arrive(full); }
  }

  // Rows [begin, end) of a tile: zeros.
  template <int kRows>
  CUTE_DEVICE void clear_rows(Element* tile, int begin, int end) {
    constexpr int kRowChunks = Traits::kBoxColumns / 8;
    auto* const chunks       = reinterpret_cast<uint4*>(tile);
    for (int slab = 0; slab < Traits::kHeadDim / Traits::kBoxColumns; ++slab) {
      int const first = slab * kRows * kRowChunks;
      for (int i = begin * kRowChunks + lane; i < end * kRowChunks; i += 32) {
        chunks[first + i] = uint4{};
      }
    }
  }

  CUTE_DEVICE void publish(Job const& job, bool is_job) {
    auto const place = job_ring.take();
    Empty::wait(&smem.job_empty[place.index], place.empty_parity());
    if (lane == 0) {
      smem.jobs[place.index] = job, smem.is_job[place.index] = is_job;
      Empty::arrive(&smem.job_full[place.index]);
    }
  }
};

}  // namespace flash::sm90
