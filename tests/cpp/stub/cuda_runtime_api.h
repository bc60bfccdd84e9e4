#pragma once
// The two CUDA names that csrc/flash.h uses, for host checks on machines without a CUDA toolkit.
enum cudaError_t { cudaSuccess = 0 };
typedef struct CUstream_st* cudaStream_t;
