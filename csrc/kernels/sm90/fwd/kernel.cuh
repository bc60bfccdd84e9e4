#pragma once
// The sm90 forward kernel: thread blocks stay and take tiles from a counter; one warp loads, two or three warpgroups compute.
// Invariant: every row of out and lse is written exactly once, those beyond the last sequence too.
#include <cutlass/arch/reg_reconfig.h>

#include "pieces/dependent.cuh"
#include "sm90/fwd/consumer.cuh"
#include "sm90/fwd/producer.cuh"

namespace flash::sm90 {

template <class Traits>
CUTE_DEVICE void init_barriers(typename Traits::Shared& smem) {
  using cutlass::arch::ClusterBarrier;
  for (int b = 0; b < Traits::kQBuffers; ++b) {
    for (int g = 0; g < Traits::kGroups; ++g) {
      ClusterBarrier::init(&smem.q_full[b][g], 1), ClusterBarrier::init(&smem.q_empty[b][g], 1);
    }
  }
  for (int s = 0; s < Traits::kStages; ++s) {
    ClusterBarrier::init(&smem.stage_full[s], 1);
    ClusterBarrier::init(&smem.stage_empty[s], Traits::kConsumerWarps);
  }
  for (int j = 0; j < Traits::kJobs; ++j) {
    ClusterBarrier::init(&smem.job_full[j], 1);
    ClusterBarrier::init(&smem.job_empty[j], Traits::kConsumerWarps);
  }
  ClusterBarrier::init(&smem.landed, 1);
  cutlass::arch::fence_barrier_init();
}

template <class Traits, MaskKind kMask>
__global__ void __launch_bounds__(Traits::kThreads, 1)
    fwd_kernel(__grid_constant__ FwdParams const params, __grid_constant__ TileOrder const order,
               __grid_constant__ FwdMaps const maps, int* counter) {
  extern __shared__ __align__(1024) unsigned char smem_bytes[];
  auto& smem                     = *reinterpret_cast<typename Traits::Shared*>(smem_bytes);
  constexpr Registers kRegisters = registers(Traits::kGroups);
  int const warp = __shfl_sync(~0u, int(threadIdx.x) / 32, 0);  // known to be the same in all lanes
  if (threadIdx.x == 0) { init_barriers<Traits>(smem); }
  __syncthreads();             // PROTECTS: the barriers are initialised.
  wait_for_previous_kernel();  // PROTECTS: tensors and counter are as that one leaves them.
  if (warp < Traits::kGroupWarps) {
    cutlass::arch::warpgroup_reg_dealloc<kRegisters.producer>();
    if (warp == 0) {  // the other warps have only given registers away
      Producer<Traits, kMask>{params.problem, order, maps, smem, counter, int(threadIdx.x)}.run();
    }
  } else {
    cutlass::arch::warpgroup_reg_alloc<kRegisters.consumer>();
    Consumer<Traits, kMask>(params, maps.out, smem, warp / Traits::kGroupWarps - 1,
                            int(threadIdx.x) % Traits::kGroupThreads)
        .run();
  }
}

}  // namespace flash::sm90
