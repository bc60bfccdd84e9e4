#pragma once
// Counters for kernels that find them at zero and leave them at zero.
#include <cuda_runtime_api.h>

#include <cstdint>

namespace flash {

// `count` ints on the current device for a launch on the stream, null when there is no memory.  Launches on one stream run one after
// the other and share them.  A launch that is being captured gets its own, for good: a graph may be replayed on any stream.
int* zeroed_counters(int64_t count, cudaStream_t stream);

}  // namespace flash
