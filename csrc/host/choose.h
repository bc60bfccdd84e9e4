#pragma once
// Which entry of a table serves a call.  Plain logic over any table: checked with made-up entries in tests/cpp/check_choose.cpp.
#include "kernels/entry.h"

namespace flash {

// Isas that a call may use.
struct Allowed {
  int pinned;      // an Isa's number; 0: all
  int capability;  // of the GPU, for example 90; 0 where it cannot be asked
};

// sm80 kernels are for every newer GPU too; what a GPU has no code for, its launch reports.  Code with sm_90a's instructions runs on
// GPUs of compute capability 9.0 alone.
inline bool is_allowed(Isa isa, Allowed const& allowed) {
  if (allowed.pinned != 0 && allowed.pinned != int(isa)) { return false; }
  return isa == Isa::kSm80 || allowed.capability == int(isa);
}

template <class Params>
bool is_for(Entry<Params> const& entry, int built_head_dim, DType dtype) {
  return entry.head_dim == built_head_dim && entry.dtype == dtype;
}

// The first that serves; null if none does.
template <class Params>
Entry<Params> const* choose(Entry<Params> const* const* entries, Params const& params,
                            int built_head_dim, Allowed const& allowed) {
  for (; *entries; ++entries) {
    Entry<Params> const& entry = **entries;
    if (is_for(entry, built_head_dim, params.problem.dtype) && is_allowed(entry.isa, allowed) &&
        entry.serves(params)) {
      return &entry;
    }
  }
  return nullptr;
}

}  // namespace flash
