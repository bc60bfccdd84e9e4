#pragma once
// mbarriers in shared memory, and what makes ordinary writes visible to TMA and wgmma.  Used by: the sm90 kernels.
// CUTLASS' functions do not tell the compiler that memory is touched: these keep accesses on their side.
#include <cutlass/arch/barrier.h>

#include "pieces/compiler.cuh"

namespace flash::sm90 {

// Compiled with FLASH_SM90_SHAKE, each warp sleeps now and then, for a time of its own, before it waits, and a wait that has not ended after
// some seconds ends the kernel with an error.  So the tests find a wait that is missing, or one that never ends.
#ifdef FLASH_SM90_SHAKE
constexpr bool kShakes = true;
#else
constexpr bool kShakes = false;
#endif

// Called by a whole warp.
CUTE_DEVICE void shake() {
  constexpr uint32_t kMostNs = 4095, kOneIn = 4;
  uint32_t const draw = (uint32_t(clock()) ^ blockIdx.x * 7919u ^ threadIdx.x / 32 * 104729u) *
                        2654435761u;  // a warp's own, by multiplicative hashing
  if ((draw >> 8) % kOneIn == 0) { __nanosleep(draw >> 16 & kMostNs); }
  __syncwarp();
}

CUTE_DEVICE void wait_or_trap(uint64_t& barrier, uint32_t parity) {
  constexpr long long kMostCycles = 8'000'000'000;
  long long const begin           = clock64();
  while (!cutlass::arch::ClusterBarrier::try_wait(&barrier, parity)) {
    if (clock64() - begin > kMostCycles) { __trap(); }
  }
  __syncwarp();
}

// Until the phase of this parity is complete.
CUTE_DEVICE void wait(uint64_t& barrier, uint32_t parity) {
  if constexpr (kShakes) {
    shake();
    wait_or_trap(barrier, parity);
  } else {
    cutlass::arch::ClusterBarrier::wait(&barrier, parity);
  }
  keep_order();
}

CUTE_DEVICE void arrive(uint64_t& barrier) {
  keep_order();
  cutlass::arch::ClusterBarrier::arrive(&barrier);
}

// Arrives; the phase is complete when so many bytes have come, too.
CUTE_DEVICE void arrive_expecting(uint64_t& barrier, int bytes) {
  keep_order();
  cutlass::arch::ClusterTransactionBarrier::arrive_and_expect_tx(&barrier, uint32_t(bytes));
}

// What this thread has written to shared memory, for TMA and wgmma to read, or to write over, after the next barrier.
CUTE_DEVICE void fence_for_async() {
  keep_order();
  cutlass::arch::fence_view_async_shared();
  keep_order();
}

}  // namespace flash::sm90
