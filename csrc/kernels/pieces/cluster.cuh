#pragma once
// Thread block clusters: blocks that run at the same time and read each other's shared memory (sm_90; nothing before that).
// Used by: decode_kernel, whose launch says how many blocks a cluster has.
#include <cstdint>
#include <cute/config.hpp>

namespace flash {

// Thread blocks of a cluster, for a launch with 2^bits of them.  Code for GPUs without clusters sees one.
CUTE_DEVICE int cluster_blocks(int bits) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  return 1 << bits;
#else
  return 1;
#endif
}

// All threads of all thread blocks of the cluster arrive, and wait before they arrive again.  After the wait they see what the others
// wrote, in shared memory too, before they arrived.
CUTE_DEVICE void arrive_at_cluster() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  __syncwarp();  // PROTECTS: .aligned is for whole warps.
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
#endif
}
// The same where others need not see what this thread block wrote.
CUTE_DEVICE void arrive_at_cluster_without_results() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  __syncwarp();  // PROTECTS: .aligned is for whole warps.
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
#endif
}
CUTE_DEVICE void wait_for_cluster() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}

// The same place in the shared memory of another thread block of the cluster.
template <class T>
CUTE_DEVICE T const* in_block(T const* smem, int rank) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  uint64_t there;
  asm("mapa.u64 %0, %1, %2;" : "=l"(there) : "l"(smem), "r"(rank));
  return reinterpret_cast<T const*>(there);
#else
  return smem;
#endif
}

}  // namespace flash
