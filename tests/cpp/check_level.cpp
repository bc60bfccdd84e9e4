// Check of pieces/level.h and of ScoreUnit: which kernel serves a problem, and what its scores are multiplied by.
#include <cmath>
#include <initializer_list>

#include "check.h"
#include "host/prepare.h"
#include "pieces/level.h"

using namespace flash;
using check::expect;

struct Chosen {
  MaskKind mask;
  Level level;
};

Chosen chosen_for(Problem const& problem) {
  Chosen chosen{};
  int calls = 0;
  choose_kernel(problem, [&](auto mask, auto level) { chosen = {mask, level}, ++calls; });
  expect(calls == 1, "%d kernels chosen", calls);
  return chosen;
}

void check_choice() {
  float const slopes[1]   = {0.5f};
  int64_t const state[2]  = {7, 64};
  Level const alone[3]    = {Level::kSoftcap, Level::kAlibi, Level::kDropout};
  MaskKind const masks[3] = {MaskKind::kNone, MaskKind::kCausal, MaskKind::kLocal};
  for (MaskKind mask : masks)
    for (int bits = 0; bits < 8; ++bits) {
      Problem problem{};
      problem.mask = mask;
      if (bits & 1) problem.softcap = 5.f;
      if (bits & 2) problem.alibi_slopes = slopes;
      if (bits & 4) problem.rng_state = state;
      Level want = bits ? Level::kAll : Level::kPlain;
      for (int feature = 0; feature < 3; ++feature)
        if (bits == 1 << feature) want = alone[feature];
      Chosen const chosen = chosen_for(problem);
      expect(chosen.level == want && level_of(problem) == want, "features %d: level %d, not %d",
             bits, int(chosen.level), int(want));
      // Only the plain kernels are for one mask alone.
      MaskKind const kernel = want == Level::kPlain ? mask : MaskKind::kLocal;
      expect(chosen.mask == kernel, "features %d, mask %d: kernel for mask %d", bits, int(mask),
             int(chosen.mask));
      for (int feature = 0; feature < 3; ++feature)
        if (bits & 1 << feature)
          expect(may_have(chosen.level, alone[feature]), "features %d: level %d lacks %d", bits,
                 int(chosen.level), feature);
    }
}

void check_unit() {
  for (float scale : {0.f, 1e-30f, 0.01f, 0.125f, 3.f})
    for (float softcap : {0.f, 0.5f, 50.f}) {
      ScoreUnit const unit = score_unit(scale, softcap);
      float const wanted   = softcap > 0.f ? softcap : scale;
      expect(unit.scale_log2 > 0.f && std::isfinite(unit.per_unit), "scale %g, softcap %g: no unit",
             scale, softcap);
      expect(std::fabs(unit.per_unit * unit.scale_log2 - 1.44269504f) < 1e-6f,
             "scale %g, softcap %g: factors of different units", scale, softcap);
      if (wanted > 1e-10f)
        expect(std::fabs(unit.per_unit * wanted - 1.f) < 1e-6f, "scale %g, softcap %g: unit %g",
               scale, softcap, 1.f / unit.per_unit);
      expect(softcap > 0.f ? unit.inner == scale / softcap : unit.inner == 0.f,
             "scale %g, softcap %g: inner %g", scale, softcap, unit.inner);
      // A slope of 100 over a million keys stays above the reference of rows without keys.
      expect(100.f * 1e6f * unit.per_unit < 1e29f, "scale %g, softcap %g: ALiBi too large", scale,
             softcap);
    }
}

int main() {
  check_choice();
  check_unit();
  return check::finish();
}
