// Check of pieces/launch.cuh against a runtime of its own that notes what it is asked for: device 0 is an sm_90, device 1 an sm_80.
#include "check.h"
#include "pieces/launch.cuh"

using namespace flash;
using check::expect;

namespace {

struct Parameters {
  int first, second;
};
void kernel(Parameters, int) {}

struct Asked {
  int launches = 0, grants = 0, granted_bytes = 0, cleared = 0;
  cudaLaunchConfig_t config{};
  bool overlaps = false;
  dim3 cluster{0, 0, 0};
  int first = 0, second = 0, third = 0;
};
Asked asked;
int current_device   = 0;
bool refuses_smem    = false;
bool refuses_cluster = false;

Launch small(int64_t blocks) { return Launch{blocks, 64, 1024, nullptr}; }

}  // namespace

extern "C" {
cudaError_t cudaGetDevice(int* device) {
  *device = current_device;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int device) {
  *value = device == 0 ? 9 : 8;
  return cudaSuccess;
}
cudaError_t cudaFuncSetAttribute(void const*, cudaFuncAttribute, int bytes) {
  ++asked.grants, asked.granted_bytes = bytes;
  return refuses_smem ? cudaErrorInvalidValue : cudaSuccess;
}
cudaError_t cudaLaunchKernelExC(cudaLaunchConfig_t const* config, void const*, void** arguments) {
  ++asked.launches, asked.config = *config;
  asked.overlaps = false, asked.cluster = {0, 0, 0};
  for (unsigned i = 0; i < config->numAttrs; ++i) {
    cudaLaunchAttribute const& attribute = config->attrs[i];
    if (attribute.id == cudaLaunchAttributeProgrammaticStreamSerialization) {
      asked.overlaps = attribute.val.programmaticStreamSerializationAllowed == 1;
    }
    if (attribute.id == cudaLaunchAttributeClusterDimension) {
      auto const& size = attribute.val.clusterDim;
      asked.cluster    = {size.x, size.y, size.z};
    }
  }
  auto const& parameters = *static_cast<Parameters const*>(arguments[0]);
  asked.first = parameters.first, asked.second = parameters.second;
  asked.third = *static_cast<int const*>(arguments[1]);
  return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, void const*,
                                           cudaLaunchConfig_t const* config) {
  *clusters = int(config->gridDim.x * config->gridDim.y * config->gridDim.z);
  return refuses_cluster ? cudaErrorInvalidValue : cudaSuccess;
}
cudaError_t cudaGetLastError() {
  ++asked.cleared;
  return cudaSuccess;
}
}

int main() {
  auto const run = [](Launch const& launch) {
    return launch_kernel(&kernel, launch, Parameters{3, 4}, 5);
  };
  // What is asked for arrives.
  Launch plain   = small(7);
  plain.blocks_y = 2;
  expect(run(plain) == cudaSuccess && asked.launches == 1, "a launch");
  expect(asked.config.gridDim.x == 7 && asked.config.gridDim.y == 2, "its grid");
  expect(asked.config.blockDim.x == 64 && asked.config.dynamicSmemBytes == 1024, "its block");
  expect(asked.config.numAttrs == 0, "no attribute that was not asked for");
  expect(asked.first == 3 && asked.second == 4 && asked.third == 5, "its parameters");
  expect(run(small(0)) == cudaSuccess && asked.launches == 1, "nothing to do is no launch");
  expect(run(small(int64_t(1) << 31)) == cudaErrorInvalidConfiguration && asked.launches == 1,
         "too many blocks");

  // Early start and clusters, alone and together, on a device that has them.
  Launch early = small(8);
  early.start  = Start::kOverlapped;
  expect(earliest_start(90) == Start::kOverlapped && has_clusters(90), "sm_90 has both");
  expect(run(early) == cudaSuccess && asked.overlaps && asked.cluster.x == 0, "early start");
  Launch clusters  = small(8);
  clusters.cluster = dim3(2, 4, 1);
  expect(run(clusters) == cudaSuccess && !asked.overlaps, "clusters alone");
  expect(asked.cluster.x == 2 && asked.cluster.y == 4 && asked.cluster.z == 1, "their size");
  clusters.start = Start::kOverlapped;
  expect(run(clusters) == cudaSuccess && asked.overlaps && asked.cluster.y == 4, "both");
  int const launches = asked.launches;

  // On one that has not, they are errors, and the caller's choice by earliest_start is not.
  current_device = 1;
  expect(run(early) == cudaErrorNotSupported, "no early start before sm_90");
  clusters.start = Start::kAfter;
  expect(run(clusters) == cudaErrorNotSupported, "no clusters before sm_90");
  expect(asked.launches == launches, "an error is no launch");
  expect(clusters_at_once(&kernel, clusters) == 0, "no clusters at once");
  early.start = earliest_start(89);
  expect(!has_clusters(89), "clusters of sm_89");
  expect(run(early) == cudaSuccess && !asked.overlaps, "after the one before");
  current_device = 0;

  // Clusters at once, asked once for each size.
  expect(clusters_at_once(&kernel, clusters) == 8, "clusters at once");
  refuses_cluster = true;
  expect(clusters_at_once(&kernel, clusters) == 8, "known");
  clusters.cluster = dim3(1, 4, 1);
  expect(clusters_at_once(&kernel, clusters) == 0 && asked.cleared == 1, "an error is none");

  // Shared memory above 48 KB is asked for once per device and size.
  Launch large     = small(1);
  large.smem_bytes = 200 * 1024;
  expect(asked.grants == 0, "little shared memory needs no grant");
  expect(run(large) == cudaSuccess && asked.grants == 1, "a grant");
  expect(asked.granted_bytes == 200 * 1024, "of so many bytes");
  expect(run(large) == cudaSuccess && asked.grants == 1, "it is kept");
  refuses_smem       = true;
  large.smem_bytes   = 300 * 1024;
  int const in_total = asked.launches;
  expect(run(large) == cudaErrorInvalidValue && asked.launches == in_total, "too much of it");
  return check::finish();
}
