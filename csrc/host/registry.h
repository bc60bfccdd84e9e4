#pragma once
// The kernels of this build, one entry per (architecture family, head dimension, dtype).  Tables end with a null launch.
// Defined in the generated registry.cpp; read by dispatch.cpp only.
#include "flash.h"

namespace flash {

template <class Params>
struct Entry {
  int family, head_dim;
  DType dtype;
  cudaError_t (*launch)(Params const&, cudaStream_t);
};
using FwdEntry    = Entry<FwdParams>;
using BwdEntry    = Entry<BwdParams>;
using DecodeEntry = Entry<DecodeParams>;

extern FwdEntry const kFwdEntries[];
extern BwdEntry const kBwdEntries[];
extern DecodeEntry const kDecodeEntries[];
extern char const* const kBuiltArchs;
extern bool const kSmallTiles;  // whether there are tiles for less shared memory

}  // namespace flash
