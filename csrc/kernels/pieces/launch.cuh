#pragma once
// One launch for every pass: shared memory attribute, grid limit, error.
#include <cuda_runtime.h>

#include <cstdint>
#include <map>
#include <tuple>
#include <utility>
#include <vector>

namespace flash {

// Whether the kernel may start while the one before it on the stream ends; it waits for that one's results by itself.
enum class Start { kAfter, kOverlapped };

struct Grid {
  int64_t x;
  int y       = 1;
  int cluster = 1;  // thread blocks along y that are a cluster
};

inline cudaLaunchAttribute cluster_of(Grid const& grid) {
  cudaLaunchAttribute attribute{};
  attribute.id               = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = 1, attribute.val.clusterDim.y = unsigned(grid.cluster);
  attribute.val.clusterDim.z = 1;
  return attribute;
}

// What a kernel may use on a device.
struct SmemGrant {
  void const* kernel;
  int device, bytes;
};

// Above 48 KB, static shared memory included, a kernel must ask for it.  That takes over a microsecond: each thread asks once.
template <class Kernel>
cudaError_t allow_smem(Kernel* kernel, int smem_bytes) {
  constexpr int kStaticBytes = 3072;  // more than any kernel has
  if (smem_bytes + kStaticBytes <= 48 * 1024) { return cudaSuccess; }
  thread_local std::vector<SmemGrant> grants;  // of the kernels of this type that the thread uses
  int device         = 0;
  cudaError_t status = cudaGetDevice(&device);
  if (status != cudaSuccess) { return status; }
  auto const address = reinterpret_cast<void const*>(kernel);
  for (SmemGrant const& grant : grants) {
    if (grant.kernel == address && grant.device == device && grant.bytes >= smem_bytes) {
      return cudaSuccess;
    }
  }
  status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, smem_bytes);
  if (status == cudaSuccess) { grants.push_back({address, device, smem_bytes}); }
  return status;
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
  cudaLaunchAttribute attributes[2]{};
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[0].val.programmaticStreamSerializationAllowed = 1;
  attributes[1]                                            = cluster_of(grid);
  cudaLaunchConfig_t config{};
  config.gridDim = blocks, config.blockDim = dim3(unsigned(threads));
  config.dynamicSmemBytes = size_t(smem_bytes), config.stream = stream;
  config.attrs = attributes, config.numAttrs = grid.cluster > 1 ? 2 : 1;
  return cudaLaunchKernelEx(&config, kernel, params...);
}
template <class... Params>
cudaError_t launch_tiles(void (*kernel)(Params...), int64_t tiles, int threads, int smem_bytes,
                         cudaStream_t stream, Params const&... params) {
  return launch_tiles(Start::kAfter, kernel, Grid{tiles}, threads, smem_bytes, stream, params...);
}

// Clusters of the grid's size that can run at once, 0 where they cannot be asked for.  Each thread asks once.
template <class Kernel>
int clusters_at_once(Kernel* kernel, Grid grid, int threads, int smem_bytes) {
  thread_local std::map<std::tuple<int, int, void const*>, int> known;
  int device = 0;
  if (cudaGetDevice(&device) != cudaSuccess) { return 0; }
  auto const [place, is_new] =
      known.insert({{device, grid.cluster, reinterpret_cast<void const*>(kernel)}, 0});
  if (!is_new || allow_smem(kernel, smem_bytes) != cudaSuccess) { return place->second; }
  cudaLaunchAttribute attribute = cluster_of(grid);
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(1, unsigned(grid.cluster)), config.blockDim = dim3(unsigned(threads));
  config.dynamicSmemBytes = size_t(smem_bytes);
  config.attrs = &attribute, config.numAttrs = 1;
  if (cudaOccupancyMaxActiveClusters(&place->second, kernel, &config) != cudaSuccess) {
    cudaGetLastError();  // that there are none is not the launch's error
    place->second = 0;
  }
  return place->second;
}

}  // namespace flash
