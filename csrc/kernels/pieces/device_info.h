#pragma once
// What the launches ask of the current device.
#include <cuda_runtime_api.h>

namespace flash {

// Largest shared memory of a thread block on the current device, in bytes; 0 when it cannot be asked.
inline int smem_limit_bytes() {
  int device = 0, bytes = 0;
  if (cudaGetDevice(&device) != cudaSuccess) { return 0; }
  if (cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device) !=
      cudaSuccess) {
    return 0;
  }
  return bytes;
}

// Multiprocessors of the current device; 1 when it cannot be asked.
inline int sm_count() {
  int device = 0, count = 0;
  if (cudaGetDevice(&device) != cudaSuccess) { return 1; }
  if (cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device) != cudaSuccess) {
    return 1;
  }
  return count;
}

// Whether a kernel can wait for the one before it by itself (griddepcontrol, sm_90).
inline bool has_dependent_launch() {
  int device = 0, major = 0;
  return cudaGetDevice(&device) == cudaSuccess &&
         cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess &&
         major >= 9;
}

// Less than sm_90's 227 KB: the small tiles of tile_config.h.
inline bool has_small_smem() { return smem_limit_bytes() < 227 * 1024; }

}  // namespace flash
