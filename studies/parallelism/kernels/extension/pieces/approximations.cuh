#pragma once
// Exponentials, logarithms and tanh by one instruction each.  Used by: numeric.cuh, score.cuh.
#include <cute/config.hpp>

namespace flash {

constexpr float kLog2E = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

CUTE_DEVICE float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
CUTE_DEVICE float log2_approx(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Largest relative error 2^-11 (PTX ISA).
CUTE_DEVICE float tanh_approx(float x) {
  float y;
  asm("tanh.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

}  // namespace flash
