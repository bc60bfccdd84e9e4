#pragma once
// A Status with a message that outlives the call: each thread keeps its last one.
#include <cstdio>

#include "flash.h"

namespace flash {

template <class... Args>
Status failure(cudaError_t code, char const* format, Args... args) {
  thread_local char message[512];
  std::snprintf(message, sizeof(message), format, args...);
  return {code, message};
}

}  // namespace flash
