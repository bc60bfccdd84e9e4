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

// Less than sm_90's 227 KB: the small tiles of tile_config.h.
inline bool has_small_smem() { return smem_limit_bytes() < 227 * 1024; }

}  // namespace flash
