#pragma once
// For kernels that run the extension's main loop several times: there threadIdx is read anew each time.
// Without this the compiler moves everything that depends on the thread out of the loop over the tiles, keeps it across the main loop
// and spills it (d 128: 204 bytes).  Includes all headers with a threadIdx of their own first; comes before fwd/mainloop.cuh.
#include "pieces/compiler.cuh"
#include "pieces/dropout.cuh"
#include "pieces/features.cuh"
#include "pieces/mask.cuh"
#include "pieces/score_mod.cuh"
#include "pieces/sequence.cuh"
#include "pieces/softmax.cuh"
#include "sm80/fwd/traits.cuh"
#include "sm80/instructions/copy.cuh"
#include "sm80/instructions/store.cuh"

namespace parallelism {

struct ThreadAgain {
  int x;
};

__device__ __forceinline__ ThreadAgain thread_again() {
  int thread;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
  return {thread};
}

}  // namespace parallelism

#define threadIdx parallelism::thread_again()
