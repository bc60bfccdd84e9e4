#pragma once
// One launch for every family: shared memory attribute, grid limit, error.
#include <cuda_runtime.h>

#include <cstdint>
#include <map>
#include <utility>

namespace flash {

// Whether the kernel may start while the one before it on the stream ends; it waits for that one's results by itself.
enum class Start { kAfter, kOverlapped };

struct Grid {
  int64_t x;
  int y = 1;
};

// Above 48 KB, static shared memory included, a kernel must ask for it.  That takes over a microsecond: each thread asks once.
template <class Kernel>
cudaError_t allow_smem(Kernel* kernel, int smem_bytes) {
  constexpr int kStaticBytes = 1024;  // more than any kernel has
  if (smem_bytes + kStaticBytes <= 48 * 1024) { return cudaSuccess; }
  thread_local std::map<std::pair<int, void const*>, int> allowed;
  int device         = 0;
  cudaError_t status = cudaGetDevice(&device);
  if (status != cudaSuccess) { return status; }
  int& bytes = allowed[{device, reinterpret_cast<void const*>(kernel)}];
  if (smem_bytes > bytes) {
    status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, smem_bytes);
    if (status != cudaSuccess) { return status; }
    bytes = smem_bytes;
  }
  return cudaSuccess;
}

template <class... Params>
cudaError_t launch_tiles(Start start, void (*kernel)(Params...), Grid grid, int threads,
                         int smem_bytes, cudaStream_t stream, Params const&... params) {
  if (grid.x == 0) { return cudaSuccess; }
  if (grid.x > INT32_MAX) { return cudaErrorInvalidConfiguration; }
  cudaError_t const status = allow_smem(kernel, smem_bytes);
  if (status != cudaSuccess) { return status; }
  dim3 const blocks(unsigned(grid.x), unsigned(grid.y));
  if (start == Start::kAfter) {
    kernel<<<blocks, threads, smem_bytes, stream>>>(params...);
    return cudaGetLastError();
  }
  cudaLaunchAttribute overlap{};
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = blocks, config.blockDim = dim3(unsigned(threads));
  config.dynamicSmemBytes = size_t(smem_bytes), config.stream = stream;
  config.attrs = &overlap, config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, kernel, params...);
}
template <class... Params>
cudaError_t launch_tiles(void (*kernel)(Params...), int64_t tiles, int threads, int smem_bytes,
                         cudaStream_t stream, Params const&... params) {
  return launch_tiles(Start::kAfter, kernel, Grid{tiles}, threads, smem_bytes, stream, params...);
}

}  // namespace flash
