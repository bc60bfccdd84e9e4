#pragma once
// What the launches ask of the current device.  Each device is asked once.
#include <cuda_runtime_api.h>

#include <atomic>

namespace flash {

// Of the current device; otherwise, when it cannot be asked.
template <cudaDeviceAttr kAttribute>
int device_attribute(int otherwise) {
  constexpr int kDevices = 64;              // those above are asked every time
  static std::atomic<int> known[kDevices];  // value + 1; 0: not asked yet
  int device = 0, value = 0;
  if (cudaGetDevice(&device) != cudaSuccess) { return otherwise; }
  bool const is_kept = device < kDevices;
  int const kept     = is_kept ? known[device].load(std::memory_order_relaxed) : 0;
  if (kept > 0) { return kept - 1; }
  if (cudaDeviceGetAttribute(&value, kAttribute, device) != cudaSuccess) { return otherwise; }
  if (is_kept) { known[device].store(value + 1, std::memory_order_relaxed); }
  return value;
}

// Largest shared memory of a thread block on the current device, in bytes; 0 when it cannot be asked.
inline int smem_limit_bytes() {
  return device_attribute<cudaDevAttrMaxSharedMemoryPerBlockOptin>(0);
}

// Multiprocessors of the current device; 1 when it cannot be asked.
inline int sm_count() { return device_attribute<cudaDevAttrMultiProcessorCount>(1); }

// Of the current device, for example 90; 0 when it cannot be asked.
inline int compute_capability() {
  return 10 * device_attribute<cudaDevAttrComputeCapabilityMajor>(0) +
         device_attribute<cudaDevAttrComputeCapabilityMinor>(0);
}

// Whether a kernel can wait for the one before it by itself (griddepcontrol), and thread blocks can be clusters, on GPUs of a compute
// capability.  Code for sm_90 works without either: such a wait is over at once, and a cluster has as many thread blocks as an
// argument says.
constexpr bool has_dependent_launch(int capability) { return capability >= 90; }
constexpr bool has_clusters(int capability) { return has_dependent_launch(capability); }

}  // namespace flash
