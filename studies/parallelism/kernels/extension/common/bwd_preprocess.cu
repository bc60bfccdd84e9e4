// Backward, first kernel: delta = rowsum(dO * O) - dLSE and LSE in base 2 per query, and the cleared dQ sum.
// With dropout such that exp2(S - LSE) is keep_scale times P, which is what multiplies dO, and P delta stays what it is.
// One thread block per (query block, query head, batch); eight lanes per row.  Memory's speed is the limit: all loads of a thread are
// under way before the first store.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "common/bwd_preprocess.h"
#include "pieces/approximations.cuh"
#include "pieces/dependent.cuh"
#include "pieces/integers.cuh"
#include "pieces/lanes.cuh"
#include "pieces/launch.cuh"
#include "pieces/sequence.cuh"

namespace flash {
namespace {

constexpr int kThreads = 256, kLanesPerRow = 8, kRowsPerPass = kThreads / kLanesPerRow, kVector = 8;
constexpr int kRows = 2, kMaxBlockM = kRows * kRowsPerPass;  // rows of a thread, of a query block

__device__ float2 to_float2(__half2 x) { return __half22float2(x); }
__device__ float2 to_float2(__nv_bfloat162 x) { return __bfloat1622float2(x); }

template <class Pair>
__device__ float dot(uint4 const& a, uint4 const& b) {
  Pair const *pa = reinterpret_cast<Pair const*>(&a), *pb = reinterpret_cast<Pair const*>(&b);
  float sum = 0.f;
#pragma unroll
  for (int i = 0; i < kVector / 2; ++i) {
    float2 const x = to_float2(pa[i]), y = to_float2(pb[i]);
    sum += x.x * y.x + x.y * y.y;
  }
  return sum;
}

// kChunks: parts of 64 columns in a row.
template <class Pair, class Element, int kChunks>
__global__ void __launch_bounds__(kThreads)
    bwd_preprocess_kernel(__grid_constant__ BwdKernelParams const params, int block_m,
                          int built_head_dim) {
  let_next_kernel_start();
  Problem const& problem = params.problem;
  QueryBlock const tile  = query_block(problem, blockIdx.x, block_m);
  Site const& site       = tile.site;
  int const row0         = site.block * block_m;
  if (row0 >= site.seqlen_q) { return; }

  auto matrix = [&](TensorRef const& t) {
    return static_cast<Element const*>(t.data) + site.batch * t.batch_stride +
           tile.head * t.head_stride + site.q_row0 * t.row_stride;
  };
  Element const *out = matrix(params.out), *dout = matrix(params.dout);
  int const lane = threadIdx.x % kLanesPerRow, first_row = threadIdx.x / kLanesPerRow;
  int64_t const rows_in =
      site.batch * problem.lse_batch_stride + tile.head * problem.lse_head_stride + site.q_row0;
  float* const rows = params.workspace.rows + int64_t(blockIdx.x) * 2 * block_m;
  uint4 dout_part[kRows][kChunks], out_part[kRows][kChunks];
  float lse[kRows], dlse[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    int const i = first_row + r * kRowsPerPass, row = row0 + i;
    bool const exists = i < block_m && row < site.seqlen_q;
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      int const column = lane * kVector + c * kLanesPerRow * kVector;
      auto const part  = [&](Element const* matrix, int64_t row_stride) {
        bool const is_there = exists && column < problem.head_dim;
        return is_there ? *reinterpret_cast<uint4 const*>(matrix + row * row_stride + column)
                        : make_uint4(0, 0, 0, 0);
      };
      dout_part[r][c] = part(dout, params.dout.row_stride);
      out_part[r][c]  = part(out, params.out.row_stride);
    }
    lse[r]  = exists ? params.lse[rows_in + row] : INFINITY;
    dlse[r] = exists && params.dlse ? params.dlse[rows_in + row] : 0.f;
  }
  float4* const dq = reinterpret_cast<float4*>(params.workspace.dq_accum) +
                     int64_t(blockIdx.x) * block_m * (built_head_dim / 4);
  for (int i = threadIdx.x; i < block_m * (built_head_dim / 4); i += kThreads) {
    dq[i] = make_float4(0.f, 0.f, 0.f, 0.f);
  }
  if (params.workspace.dq_turn && threadIdx.x == 0) { params.workspace.dq_turn[blockIdx.x] = 0; }
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    int const i = first_row + r * kRowsPerPass;
    float sum   = 0.f;
#pragma unroll
    for (int c = 0; c < kChunks; ++c) { sum += dot<Pair>(dout_part[r][c], out_part[r][c]); }
    sum = lanes_sum<kLanesPerRow>(sum);
    if (lane == 0 && i < block_m) {
      // P of a row that sees no key, or does not exist, is exp2(s - inf) = 0.
      bool const sees   = lse[r] != INFINITY;
      rows[i]           = sees ? lse[r] * kLog2E - problem.keep_log2 : INFINITY;
      rows[block_m + i] = sees ? (sum - dlse[r]) * problem.keep_share : 0.f;
    }
  }
}

template <class Pair, class Element>
auto kernel_for(int head_dim) {
  return head_dim <= 64    ? &bwd_preprocess_kernel<Pair, Element, 1>
         : head_dim <= 128 ? &bwd_preprocess_kernel<Pair, Element, 2>
                           : &bwd_preprocess_kernel<Pair, Element, 4>;
}

}  // namespace

cudaError_t launch_bwd_preprocess(BwdKernelParams const& params, int block_m, int built_head_dim,
                                  cudaStream_t stream) {
  if (block_m > kMaxBlockM) { return cudaErrorInvalidValue; }
  Problem const& problem = params.problem;
  int64_t const tiles    = query_block_count(problem, block_m);
  auto const kernel      = problem.dtype == DType::kFp16
                               ? kernel_for<__half2, __half>(built_head_dim)
                               : kernel_for<__nv_bfloat162, __nv_bfloat16>(built_head_dim);
  Launch const launch{tiles, kThreads, 0, stream};
  return launch_kernel(kernel, launch, params, block_m, built_head_dim);
}

}  // namespace flash
