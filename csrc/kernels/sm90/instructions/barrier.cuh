#pragma once
// mbarriers in shared memory, and what makes ordinary writes visible to TMA and wgmma.  Used by: the sm90 kernels.
// CUTLASS' functions do not tell the compiler that memory is touched: these keep accesses on their side.
#include <cutlass/arch/barrier.h>

#include "pieces/compiler.cuh"

namespace flash::sm90 {

// Until the phase of this parity is complete.
CUTE_DEVICE void wait(uint64_t& barrier, uint32_t parity) {
  cutlass::arch::ClusterBarrier::wait(&barrier, parity);
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
