#pragma once
// Values in shared memory, read and written where this stands: the compiler would read them early and keep them in registers.
// Used by: the main loops.
#include <cute/tensor.hpp>

#include "pieces/head.cuh"

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

// A pointer that lies in shared memory for a while, instead of being spilled.
template <class T>
CUTE_DEVICE void park(T* pointer, uint64_t& place) {
  asm volatile("st.shared.b64 [%0], %1;" ::"r"(cast_smem_ptr_to_uint(&place)), "l"(pointer));
}
template <class T>
CUTE_DEVICE void fetch(T*& pointer, uint64_t const& place) {
  asm volatile("ld.shared.b64 %0, [%1];" : "=l"(pointer) : "r"(cast_smem_ptr_to_uint(&place)));
}

// This thread's index, read where this stands.
CUTE_DEVICE int thread_now() {
  int thread;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
  return as_index(thread);
}

}  // namespace flash
