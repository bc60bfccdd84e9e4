#pragma once
// The tensor core instruction of the sm80 kernels: m16n8k16, fp32 accumulation.
#include <cutlass/numeric_types.h>

#include <cute/tensor.hpp>

namespace flash::sm80 {

template <class Element>
using MmaAtom = cute::MMA_Atom<
    std::conditional_t<std::is_same_v<Element, cutlass::half_t>, cute::SM80_16x8x16_F32F16F16F32_TN,
                       cute::SM80_16x8x16_F32BF16BF16F32_TN>>;

}  // namespace flash::sm80
