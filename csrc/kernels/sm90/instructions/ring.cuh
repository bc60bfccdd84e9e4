#pragma once
// Rings of buffers in shared memory between a producer and its consumers: mbarriers and who waits for which phase.
// Used by: the sm90 kernels.  Plain integers but for the waits: checked with random interleavings in tests/cpp/check_ring.cpp.
#include "pieces/integers.cuh"

namespace flash::sm90 {

// A place in a ring of kSize buffers, walked in order.  Producer and consumers each walk it, for all tiles of a thread block.
//
//   a buffer's i-th use    full: the consumer waits for parity i % 2     empty: the producer waits for the other one, which a
//                                                                         fresh barrier counts as passed
template <int kSize>
struct RingPlace {
  int index       = 0;
  uint32_t parity = 0;  // of the buffer's use

  FLASH_HD uint32_t full_parity() const { return parity; }
  FLASH_HD uint32_t empty_parity() const { return parity ^ 1; }

  // This place; the ring goes on to the next.
  FLASH_HD RingPlace take() {
    RingPlace const taken = *this;
    if (++index == kSize) { index = 0, parity ^= 1; }
    return taken;
  }
};

}  // namespace flash::sm90
