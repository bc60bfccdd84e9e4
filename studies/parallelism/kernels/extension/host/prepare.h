#pragma once
// Numbers of a Problem that follow from its others.
#include "flash.h"

namespace flash {

// The rule that keeps a weight for so many of the 65536 values, at most 65535: the first in the order NaN, -inf ... -0 = 0 ... inf;
// or the last, where that would divide the NaNs or the zeros.
inline KeepRule keep_rule(int kept) {
  constexpr int kNans = 2046, kNegatives = 31744, kNumbers = 65536 - kNans, kMinusInf = 0xfc00;
  bool const inverted = kept < kNans || kept == kNans + kNegatives + 1;
  int const smaller   = inverted ? kNumbers - kept : kept - kNans;  // numbers below the threshold
  int const beyond    = smaller - kNegatives - 1;                   // zero has two patterns
  unsigned const below =
      unsigned(smaller < kNegatives ? kMinusInf - smaller : (beyond < 0 ? 0 : beyond));
  return {below * 0x10001u, inverted ? ~0u : 0u};
}

inline ScoreUnit score_unit(float scale, float softcap) {
  constexpr float kLog2OfE = 1.4426950408889634f;
  // The smallest unit.  With 0, hidden scores of -inf would become NaN; ALiBi's part of a score, divided by it, stays above the
  // reference of a row without keys (-1e30).
  constexpr float kMinUnit = 1e-20f;
  float const wanted       = softcap > 0.f ? softcap : scale,
              unit         = wanted > kMinUnit ? wanted : kMinUnit;
  return {unit * kLog2OfE, softcap > 0.f ? scale / softcap : 0.f, 1.f / unit};
}

}  // namespace flash
