#pragma once
// fp32 accumulators rounded to 16 bits.  Includes the other pieces about numbers.
// Used by: the main loops and epilogues.
#include <cutlass/numeric_conversion.h>
#include <cutlass/numeric_types.h>

#include <cute/tensor.hpp>

#include "pieces/approximations.cuh"
#include "pieces/lanes.cuh"

namespace flash {
using namespace cute;

// out = in rounded to out's type, two values per instruction.
template <class TensorOut, class TensorIn>
CUTE_DEVICE void round_into(TensorOut& out, TensorIn const& in) {
  constexpr int kSize = decltype(size(in))::value;
  static_assert(kSize % 2 == 0, "values are rounded in pairs");
  using Element = typename TensorOut::value_type;
  cutlass::NumericArrayConverter<Element, float, 2> round_pair;
  auto const* source = reinterpret_cast<cutlass::Array<float, 2> const*>(in.data());
  auto* target       = reinterpret_cast<cutlass::Array<Element, 2>*>(out.data());
  CUTE_UNROLL
  for (int i = 0; i < kSize / 2; ++i) { target[i] = round_pair(source[i]); }
}

// A rounded copy of a register tensor.
template <class Element, class TensorIn>
CUTE_DEVICE auto round_to(TensorIn const& in) {
  Tensor out = make_tensor<Element>(in.layout());
  round_into(out, in);
  return out;
}

// The same with 0 for negative numbers.
template <class Element, class TensorIn>
CUTE_DEVICE auto round_positive(TensorIn const& in) {
  Tensor out = make_tensor<Element>(in.layout());
  auto pairs = recast<uint32_t>(out);
  CUTE_UNROLL
  for (int i = 0; i < size(pairs); ++i) {
    if constexpr (std::is_same_v<Element, cutlass::half_t>) {
      asm("cvt.rn.relu.f16x2.f32 %0, %1, %2;"
          : "=r"(pairs(i))
          : "f"(in(2 * i + 1)), "f"(in(2 * i)));
    } else {
      asm("cvt.rn.relu.bf16x2.f32 %0, %1, %2;"
          : "=r"(pairs(i))
          : "f"(in(2 * i + 1)), "f"(in(2 * i)));
    }
  }
  return out;
}

}  // namespace flash
