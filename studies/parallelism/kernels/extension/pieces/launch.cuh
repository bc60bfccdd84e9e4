#pragma once
// The one way in which kernels are launched: shared memory, grid, clusters, early start, error.
// Used by: every launch.  Knows no kernel.  Invariant: a launch gets all that it asks for, or it is an error.
#include <cuda_runtime.h>

#include <cstdint>
#include <map>
#include <tuple>
#include <vector>

#include "pieces/device_info.h"

namespace flash {

// Whether the kernel may start while the one before it on the stream ends; it waits for that one's results by itself.
enum class Start { kAfter, kOverlapped };

// For kernels that gain from an early start and work without: where GPUs of a compute capability have none, they start after the one
// before.
inline Start earliest_start(int capability) {
  return has_dependent_launch(capability) ? Start::kOverlapped : Start::kAfter;
}

struct Launch {
  int64_t blocks;  // along x; 0: nothing is launched
  int threads;
  int smem_bytes;  // dynamic
  cudaStream_t stream;
  int blocks_y = 1;
  Start start  = Start::kAfter;
  dim3 cluster = dim3(1, 1, 1);  // thread blocks; divides the grid

  bool wants_clusters() const { return cluster.x * cluster.y * cluster.z > 1; }
};

inline cudaLaunchAttribute early_start() {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  return attribute;
}
inline cudaLaunchAttribute clusters_of(dim3 const& cluster) {
  cudaLaunchAttribute attribute{};
  attribute.id             = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {cluster.x, cluster.y, cluster.z};
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
  status = cudaFuncSetAttribute(address, cudaFuncAttributeMaxDynamicSharedMemorySize, smem_bytes);
  if (status == cudaSuccess) { grants.push_back({address, device, smem_bytes}); }
  return status;
}

template <class... Params>
cudaError_t launch_kernel(void (*kernel)(Params...), Launch const& launch,
                          Params const&... params) {
  if (launch.blocks == 0) { return cudaSuccess; }
  if (launch.blocks > INT32_MAX) { return cudaErrorInvalidConfiguration; }
  cudaError_t const status = allow_smem(kernel, launch.smem_bytes);
  if (status != cudaSuccess) { return status; }
  cudaLaunchAttribute attributes[2];
  cudaLaunchConfig_t config{};
  if (launch.start == Start::kOverlapped) {
    if (!has_dependent_launch(compute_capability())) { return cudaErrorNotSupported; }
    attributes[config.numAttrs++] = early_start();
  }
  if (launch.wants_clusters()) {
    if (!has_clusters(compute_capability())) { return cudaErrorNotSupported; }
    attributes[config.numAttrs++] = clusters_of(launch.cluster);
  }
  config.attrs            = attributes;
  config.gridDim          = dim3(unsigned(launch.blocks), unsigned(launch.blocks_y));
  config.blockDim         = dim3(unsigned(launch.threads));
  config.dynamicSmemBytes = size_t(launch.smem_bytes), config.stream = launch.stream;
  void* arguments[] = {const_cast<Params*>(&params)...};
  return cudaLaunchKernelExC(&config, reinterpret_cast<void const*>(kernel), arguments);
}

// The launch's clusters that can run at once, 0 where they cannot be asked for.  Each thread asks once for each size.
template <class Kernel>
int clusters_at_once(Kernel* kernel, Launch const& launch) {
  thread_local std::map<std::tuple<int, unsigned, unsigned, unsigned, void const*>, int> known;
  auto const address  = reinterpret_cast<void const*>(kernel);
  dim3 const& cluster = launch.cluster;
  int device          = 0;
  if (!has_clusters(compute_capability()) || cudaGetDevice(&device) != cudaSuccess) { return 0; }
  auto const [place, is_new] =
      known.insert({{device, cluster.x, cluster.y, cluster.z, address}, 0});
  if (!is_new || allow_smem(kernel, launch.smem_bytes) != cudaSuccess) { return place->second; }
  cudaLaunchAttribute attribute = clusters_of(cluster);
  cudaLaunchConfig_t config{};
  config.gridDim = cluster, config.blockDim = dim3(unsigned(launch.threads));
  config.dynamicSmemBytes = size_t(launch.smem_bytes);
  config.attrs = &attribute, config.numAttrs = 1;
  if (cudaOccupancyMaxActiveClusters(&place->second, address, &config) != cudaSuccess) {
    cudaGetLastError();  // that there are none is not the launch's error
    place->second = 0;
  }
  return place->second;
}

}  // namespace flash
