#pragma once
// Kernels that begin while the one before them on the stream ends (programmatic dependent launch, sm_90; nothing before that).
// Used by: kv_update, decode_kernel, sm90's forward, and the backward's kernels after the first: their launches say Start::kOverlapped.
#include <cute/config.hpp>

namespace flash {

// Before this nothing may be read that the kernels before have written, and nothing written that they read.
CUTE_DEVICE void wait_for_previous_kernel() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Whether code before the wait runs while the kernels before do.
CUTE_DEVICE constexpr bool starts_early() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  return true;
#else
  return false;
#endif
}

// The next kernel may take its place beside this one if it waits by itself.
CUTE_DEVICE void let_next_kernel_start() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}

}  // namespace flash
