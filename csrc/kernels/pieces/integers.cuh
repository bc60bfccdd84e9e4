#pragma once
// Integer helpers for host and device.  Used by every other piece and by the host code.

#ifdef __CUDACC__
#define FLASH_HD __host__ __device__ __forceinline__
#else
#define FLASH_HD inline
#endif

namespace flash {

FLASH_HD constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }
FLASH_HD constexpr int min_of(int a, int b) { return a < b ? a : b; }
FLASH_HD constexpr int max_of(int a, int b) { return a > b ? a : b; }

}  // namespace flash
