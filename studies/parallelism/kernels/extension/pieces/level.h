#pragma once
// What a kernel carries beside the plain product of softmax and V.  Used by: score_mod.cuh, forward and backward kernels.
#include "flash.h"
#include "pieces/integers.cuh"

namespace flash {

// kPlain: masks alone.  kSoftcap, kAlibi, kDropout: that, and masks.  kAll: whatever the problem asks for, decided at run time.
enum class Level { kPlain, kSoftcap, kAlibi, kDropout, kAll };

// Whether a kernel may have to do what feature says; whether it changes scores.
constexpr bool may_have(Level level, Level feature) {
  return level == feature || level == Level::kAll;
}
constexpr bool changes_scores(Level level) {
  return may_have(level, Level::kSoftcap) || may_have(level, Level::kAlibi);
}

// The kernel for a problem.
inline Level level_of(Problem const& problem) {
  bool const softcap = problem.softcap > 0.f, alibi = problem.alibi_slopes,
             drops = problem.rng_state;
  if (softcap + alibi + drops > 1) { return Level::kAll; }
  return softcap ? Level::kSoftcap
         : alibi ? Level::kAlibi
         : drops ? Level::kDropout
                 : Level::kPlain;
}

// A value that is known when the program is compiled, as an argument.
template <auto kValue>
struct Constant {
  constexpr operator decltype(kValue)() const { return kValue; }
};

// Calls choose(mask, level), both Constants, for the kernel that serves the problem; MaskKind::kLocal is any mask.
template <class Choose>
void choose_kernel(Problem const& problem, Choose choose) {
  Constant<MaskKind::kLocal> const any_mask;
  switch (level_of(problem)) {
    case Level::kPlain:
      return problem.mask == MaskKind::kNone
                 ? choose(Constant<MaskKind::kNone>{}, Constant<Level::kPlain>{})
             : problem.mask == MaskKind::kCausal
                 ? choose(Constant<MaskKind::kCausal>{}, Constant<Level::kPlain>{})
                 : choose(any_mask, Constant<Level::kPlain>{});
    case Level::kSoftcap:
      return choose(any_mask, Constant<Level::kSoftcap>{});
    case Level::kAlibi:
      return choose(any_mask, Constant<Level::kAlibi>{});
    case Level::kDropout:
      return choose(any_mask, Constant<Level::kDropout>{});
    case Level::kAll:
      return choose(any_mask, Constant<Level::kAll>{});
  }
}

// Whether feature is to be done: known when the kernel is compiled, or (kAll) asked for.
template <Level kLevel>
FLASH_HD bool decided(Level feature, bool asked) {
  return kLevel == feature || (kLevel == Level::kAll && asked);
}

}  // namespace flash
