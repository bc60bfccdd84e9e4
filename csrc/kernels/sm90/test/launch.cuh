#pragma once
// A unit for tests of the build alone (FLASH_ATTN_TEST_UNITS=1): its kernel compiles for sm_90a only, is listed and never chosen.
#include <cutlass/numeric_types.h>

#include "entry.h"
#include "pieces/launch.cuh"

namespace flash::sm90 {

__global__ void test_kernel(__grid_constant__ FwdParams const params) {
  asm volatile("wgmma.fence.sync.aligned;");  // no other target has it
  if (threadIdx.x == 0) { *params.lse = 0.f; }
}

template <int kHeadDim, class Element, class Sizes>
struct TestFwd {
  static bool serves(FwdParams const&) { return false; }

  static void plan(FwdParams const&, Plan&) {}

  static cudaError_t launch(FwdParams const& params, Plan const&, Scratch const&,
                            cudaStream_t stream) {
    constexpr int kThreads = 128;  // a warp group
    return launch_kernel(&test_kernel, Launch{1, kThreads, 0, stream}, params);
  }
};

}  // namespace flash::sm90
