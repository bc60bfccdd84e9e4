#pragma once
// From a tile's coordinates to memory.  Used by every kernel.
#include <cute/config.hpp>

#include "flash.h"

namespace flash {

// Whether the code is for sm_90 or newer.  For sm_80 the compiler needs a few registers more.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr bool kHasSm90 = false;
#else
constexpr bool kHasSm90 = true;
#endif

// First element of one head's (seqlen, head_dim) matrix.
template <class Element>
CUTE_DEVICE Element* matrix_of(TensorRef const& tensor, int batch, int head) {
  return static_cast<Element*>(tensor.data) + batch * tensor.batch_stride +
         head * tensor.head_stride;
}

// The same value, of which the compiler knows nothing: what follows from it is computed where it is used.
CUTE_DEVICE int opaque(int value) {
  asm volatile("" : "+r"(value));
  return value;
}

// A thread's index.  Told that it is not negative, the compiler divides it by powers of two in one instruction instead of four.
CUTE_DEVICE int as_index(int value) {
#ifdef __CUDACC__
  __builtin_assume(value >= 0 && value < 1024);
#endif
  return value;
}
CUTE_DEVICE int opaque_index(int value) { return as_index(opaque(value)); }

}  // namespace flash
