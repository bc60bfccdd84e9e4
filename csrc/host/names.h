#pragma once
// Names of dtypes and isas, as messages, reports and variables have them.
#include "kernels/entry.h"

namespace flash {

constexpr Isa kIsas[] = {Isa::kSm90, Isa::kSm80};

constexpr char const* name_of(DType dtype) { return dtype == DType::kFp16 ? "fp16" : "bf16"; }
constexpr char const* name_of(Isa isa) { return isa == Isa::kSm80 ? "sm80" : "sm90"; }

}  // namespace flash
