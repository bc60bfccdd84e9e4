// Check of host/choose.h: the first entry that is for a call, allowed and serves, over tables of made-up entries.
#include <initializer_list>

#include "check.h"
#include "head_dims.h"
#include "host/choose.h"

using namespace flash;
using check::expect;

int asked = 0;  // calls of serves
bool serves_all(FwdParams const&) { return ++asked > 0; }
bool serves_none(FwdParams const&) { return ++asked < 0; }
bool serves_causal(FwdParams const& params) {
  ++asked;
  return params.problem.mask == MaskKind::kCausal;
}

FwdEntry entry(Isa isa, int head_dim, DType dtype, bool (*serves)(FwdParams const&)) {
  return {isa, head_dim, head_dim, dtype, serves, nullptr, nullptr};
}
FwdEntry const new_causal    = entry(Isa::kSm90, 64, DType::kBf16, &serves_causal);
FwdEntry const new_never     = entry(Isa::kSm90, 128, DType::kBf16, &serves_none);
FwdEntry const old_64        = entry(Isa::kSm80, 64, DType::kBf16, &serves_all);
FwdEntry const old_64_fp16   = entry(Isa::kSm80, 64, DType::kFp16, &serves_all);
FwdEntry const old_128       = entry(Isa::kSm80, 128, DType::kBf16, &serves_all);
FwdEntry const* const both[] = {&new_causal, &new_never, &old_64, &old_64_fp16, &old_128, nullptr};
FwdEntry const* const only_new[] = {&new_causal, &new_never, nullptr};
FwdEntry const* const nothing[]  = {nullptr};

FwdParams call(int head_dim, DType dtype = DType::kBf16, MaskKind mask = MaskKind::kCausal) {
  FwdParams params{};
  params.problem.head_dim = params.problem.head_dim_v = head_dim;
  params.problem.dtype = dtype, params.problem.mask = mask;
  return params;
}

Allowed const on_80{0, 80}, on_90{0, 90};
Allowed const on_100{0, 100}, unknown{0, 0};
Allowed const old_on_90{int(Isa::kSm80), 90};
Allowed const new_on_90{int(Isa::kSm90), 90};
Allowed const no_isa{-1, 90};

void expect_choice(char const* what, FwdEntry const* const* table, FwdParams const& params,
                   Allowed const& allowed, FwdEntry const* want) {
  FwdEntry const* const got =
      choose(table, params, built_head_dim(params.problem.head_dim), allowed);
  auto const name = [](FwdEntry const* entry) { return entry ? int(entry->isa) : 0; };
  expect(got == want, "%s: got isa %d, want %d", what, name(got), name(want));
}

int main() {
  expect_choice("newest that serves", both, call(64), on_90, &new_causal);
  expect_choice("what it does not serve falls to the next", both,
                call(64, DType::kBf16, MaskKind::kLocal), on_90, &old_64);
  expect_choice("one that never serves", both, call(128), on_90, &old_128);
  expect_choice("other dtype", both, call(64, DType::kFp16), on_90, &old_64_fp16);
  expect_choice("next larger head dimension", both, call(40), on_90, &new_causal);
  expect_choice("head dimension that is not built", both, call(72), on_90, nullptr);
  expect_choice("older GPU", both, call(64), on_80, &old_64);
  expect_choice("newer GPU does not run sm_90a", both, call(64), on_100, &old_64);
  expect_choice("GPU that cannot be asked", both, call(64), unknown, &old_64);
  expect_choice("pinned to the older isa", both, call(64), old_on_90, &old_64);
  expect_choice("pinned to the newer isa", both, call(64), new_on_90, &new_causal);
  expect_choice("pinned to an isa that does not serve", both, call(128), new_on_90, nullptr);
  expect_choice("pinned to no isa", both, call(64), no_isa, nullptr);
  expect_choice("not built", only_new, call(64, DType::kFp16), on_90, nullptr);
  expect_choice("built, and not for this GPU", only_new, call(64), on_80, nullptr);
  expect_choice("empty table", nothing, call(64), on_90, nullptr);

  asked = 0;
  expect_choice("asks only entries for the call", both, call(64), old_on_90, &old_64);
  expect(asked == 1, "%d entries were asked, not 1", asked);

  Plan plan{};
  struct Notes {
    int64_t a[9];
    int b;
  } notes{{1, 2, 3, 4, 5, 6, 7, 8, 9}, 10};
  put_notes(plan, notes);
  Notes const read = get_notes<Notes>(plan);
  expect(read.a[8] == 9 && read.b == 10, "notes of a plan: %lld, %d", (long long)read.a[8], read.b);
  expect(built_head_dim(1) == kHeadDims[0] && built_head_dim(kMaxHeadDim) == kMaxHeadDim &&
             built_head_dim(kMaxHeadDim + 1) == 0,
         "built_head_dim at the ends: %d", built_head_dim(kMaxHeadDim));
  return check::finish();
}
