#pragma once
// The tensor core instruction m16n8k16, issued or not: rows that a product does not concern cost issue slots alone.
// Used by: gemm.cuh.
#include <cutlass/numeric_types.h>

#include <cute/tensor.hpp>

namespace flash::sm80 {
using namespace cute;

// The row atoms of a product that are worked on; the others keep what they hold.  The same for all lanes of a warp.
template <int kAtoms>
struct ActiveRows {
  bool atom[kAtoms];
};
struct AllRows {};

// c += a b where issued; it must be the same for all lanes.
template <class TensorC, class TensorA, class TensorB>
CUTE_DEVICE void mma_if(bool issued, TensorC&& c, TensorA const& a, TensorB const& b) {
  auto const x = recast<uint32_t const>(a);
  auto const y = recast<uint32_t const>(b);
#define FLASH_MMA_IF(type)                                                        \
  asm volatile(                                                                   \
      "{\n\t.reg .pred issued;\n\tsetp.ne.b32 issued, %10, 0;\n\t"                \
      "@issued mma.sync.aligned.m16n8k16.row.col.f32." type "." type              \
      ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};\n\t}" \
      : "+f"(c(0)), "+f"(c(1)), "+f"(c(2)), "+f"(c(3))                            \
      : "r"(x(0)), "r"(x(1)), "r"(x(2)), "r"(x(3)), "r"(y(0)), "r"(y(1)), "r"(int(issued)))
  if constexpr (std::is_same_v<typename TensorA::value_type, cutlass::half_t>) {
    FLASH_MMA_IF("f16");
  } else {
    FLASH_MMA_IF("bf16");
  }
#undef FLASH_MMA_IF
}

}  // namespace flash::sm80
