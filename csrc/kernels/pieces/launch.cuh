#pragma once
// One launch for every family: shared memory attribute, grid limit, error.
#include <cuda_runtime.h>

#include <cstdint>

namespace flash {

// Above 48 KB, static shared memory included, a kernel must ask for it; asking costs about a microsecond and needs no state.
template <class... Params>
cudaError_t launch_tiles(void (*kernel)(Params...), int64_t tiles, int threads, int smem_bytes,
                         cudaStream_t stream, Params const&... params) {
  if (tiles == 0) { return cudaSuccess; }
  if (tiles > INT32_MAX) { return cudaErrorInvalidConfiguration; }
  constexpr int kStaticBytes = 1024;  // more than any kernel has
  if (smem_bytes + kStaticBytes > 48 * 1024) {
    cudaError_t const status =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, smem_bytes);
    if (status != cudaSuccess) { return status; }
  }
  kernel<<<dim3(unsigned(tiles)), threads, smem_bytes, stream>>>(params...);
  return cudaGetLastError();
}

}  // namespace flash
