#pragma once
// What a unit offers to the registry: the kernels of one (isa, pass, head dimensions, dtype), as functions.
// Used by: every generated unit; host/registry.h.
#include <cstring>
#include <type_traits>

#include "flash.h"
#include "pieces/smem_size.h"

namespace flash {

enum class Isa : int { kSm80 = 80, kSm90 = 90 };

// Whether v and out have the head dimension of q and k.
inline bool has_one_head_dim(Problem const& problem) {
  return problem.head_dim_v == problem.head_dim;
}

// Memory that a plan asked for.
struct Scratch {
  void* workspace;  // the caller's
  int* counters;    // zeros, and zeros again when the kernels end
};

// serves: whether the kernels can do this call, on a GPU that has the isa.  It asks for what they cannot do, never whether they are
// fast.  plan: called for what they serve; sets what the launch needs, or refused.  launch: gets a plan of these params that was not
// refused.
template <class ParamsOfPass>
struct Entry {
  using Params = ParamsOfPass;

  Isa isa;
  int head_dim, head_dim_v;  // of q and k, of v and out
  DType dtype;
  bool (*serves)(Params const&);
  void (*plan)(Params const&, Plan&);
  cudaError_t (*launch)(Params const&, Plan const&, Scratch const&, cudaStream_t);
};
using FwdEntry    = Entry<FwdParams>;
using BwdEntry    = Entry<BwdParams>;
using DecodeEntry = Entry<DecodeParams>;

// Writes into a plan what its maker decided, and reads it again.
template <class Notes>
void put_notes(Plan& plan, Notes const& notes) {
  static_assert(std::is_trivially_copyable_v<Notes> && sizeof(Notes) <= sizeof(plan.notes));
  std::memcpy(plan.notes, &notes, sizeof(Notes));
}
template <class Notes>
Notes get_notes(Plan const& plan) {
  static_assert(std::is_trivially_copyable_v<Notes> && sizeof(Notes) <= sizeof(plan.notes));
  Notes notes;
  std::memcpy(&notes, plan.notes, sizeof(Notes));
  return notes;
}

}  // namespace flash
