#pragma once
// Values in shared memory, read where this stands: the compiler would read them early and keep them in registers.
// Used by: the main loops.
#include <cute/tensor.hpp>

namespace flash {
using namespace cute;

CUTE_DEVICE int read_now(int const& field) {
  int value;
  asm volatile("ld.shared.b32 %0, [%1];" : "=r"(value) : "r"(cast_smem_ptr_to_uint(&field)));
  return value;
}
CUTE_DEVICE uint32_t read_now(uint32_t const& field) {
  return uint32_t(read_now(reinterpret_cast<int const&>(field)));
}

}  // namespace flash
