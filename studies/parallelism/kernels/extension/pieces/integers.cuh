#pragma once
// Integer helpers for host and device.  Used by every other piece and by the host code.

#include <cstdint>

#ifdef __CUDACC__
#define FLASH_HD __host__ __device__ __forceinline__
#else
#define FLASH_HD inline
#endif

namespace flash {

// Division by a number that the host knows, as one multiplication: exact for n below 2^31 (Granlund and Montgomery, "Division by
// Invariant Integers using Multiplication", 1994).
struct Divider {
  uint32_t divisor, factor;
  int shift;  // of the product's upper half; unused for divisor 1

  FLASH_HD uint32_t divide(uint32_t n) const {
    uint32_t const high = uint32_t(uint64_t(n) * factor >> 32);
    return divisor == 1 ? n : high >> shift;
  }
};

inline Divider make_divider(int divisor) {
  int bits = 0;  // the least with divisor <= 2^bits
  while ((int64_t(1) << bits) < divisor) { ++bits; }
  uint64_t const power = uint64_t(1) << (31 + bits);
  return {uint32_t(divisor), uint32_t((power + divisor - 1) / divisor), bits - 1};
}

FLASH_HD constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }
FLASH_HD constexpr int min_of(int a, int b) { return a < b ? a : b; }
FLASH_HD constexpr int max_of(int a, int b) { return a > b ? a : b; }

}  // namespace flash
