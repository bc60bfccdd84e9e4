#pragma once
// The entries of this build, newest isa first; tables end with null.
// Defined in the generated registry.cpp; read by dispatch.cpp and build_info.cpp only.
#include "kernels/entry.h"

namespace flash {

extern FwdEntry const* const kFwdEntries[];
extern BwdEntry const* const kBwdEntries[];
extern DecodeEntry const* const kDecodeEntries[];
extern char const* const kBuiltArchs;   // "80,90"
extern char const* const kBuiltSmemKb;  // "227,163": what there are tiles for

}  // namespace flash
