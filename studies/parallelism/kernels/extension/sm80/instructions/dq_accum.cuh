#pragma once
// dQ in fp32 between the key tiles that add to it.
// Used by: bwd/mainloop (adds) and bwd/postprocess (reads).
// Layout: one query block after another; inside, value j of thread t's atom i lies at (i * threads + t) * 4 + j, so that a warp
// adds 512 contiguous bytes per instruction.  Rows and columns exist only in the MMA's own coordinates.  Parts of the head dimension
// are runs of atoms: they lie one after another, as if the block had been added at once.
#include <cute/tensor.hpp>

namespace flash::sm80 {
using namespace cute;

CUTE_DEVICE void red_add_4(float* address, float a, float b, float c, float d) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("red.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(address), "f"(a), "f"(b),
               "f"(c), "f"(d)
               : "memory");
#else
  atomicAdd(address, a), atomicAdd(address + 1, b), atomicAdd(address + 2, c),
      atomicAdd(address + 3, d);
#endif
}

// Which of a tile's parts of dQ is added: a turn is that of all parts.
struct DqPart {
  bool is_first, is_last;
};

// turn_counter (null: any order): the tiles that add to a block do so in the order of their turn, which makes the sum bitwise
// repeatable.  Tiles with a smaller turn have a smaller block index, so they run or have run: the wait ends.
template <int kThreads, class TensorR>
CUTE_DEVICE void add_to_dq(float* block, TensorR const& tdQrdQ, int* turn_counter, int turn,
                           int thread, DqPart part = {true, true}) {
  if (turn_counter && part.is_first) {
    if (thread == 0) {
      int now;
      do {
        asm volatile("ld.acquire.gpu.global.b32 %0, [%1];"
                     : "=r"(now)
                     : "l"(turn_counter)
                     : "memory");
      } while (now != turn);
    }
    __syncthreads();  // PROTECTS: no thread adds before thread 0 has seen the turn.
  }
  float* const mine = block + thread * 4;
  CUTE_UNROLL
  for (int i = 0; i < size(tdQrdQ) / 4; ++i) {
    red_add_4(mine + i * kThreads * 4, tdQrdQ(i * 4), tdQrdQ(i * 4 + 1), tdQrdQ(i * 4 + 2),
              tdQrdQ(i * 4 + 3));
  }
  if (turn_counter && part.is_last) {
    __threadfence();
    __syncthreads();  // PROTECTS: every thread's sums are visible before the next tile's turn begins.
    if (thread == 0) { atomicExch(turn_counter, turn + 1); }
  }
}

}  // namespace flash::sm80
