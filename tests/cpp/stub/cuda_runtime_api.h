#pragma once
// The CUDA names that csrc/flash.h and csrc/host use, for host checks on machines without a CUDA toolkit.
enum cudaError_t {
  cudaSuccess                     = 0,
  cudaErrorInvalidValue           = 1,
  cudaErrorMemoryAllocation       = 2,
  cudaErrorInvalidConfiguration   = 9,
  cudaErrorNoKernelImageForDevice = 209
};
typedef struct CUstream_st* cudaStream_t;
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount          = 16,
  cudaDevAttrComputeCapabilityMajor       = 75,
  cudaDevAttrComputeCapabilityMinor       = 76,
  cudaDevAttrMaxSharedMemoryPerBlockOptin = 97
};
extern "C" {
cudaError_t cudaGetDevice(int* device);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);
char const* cudaGetErrorString(cudaError_t error);
}
