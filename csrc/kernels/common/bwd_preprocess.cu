// Backward, first kernel: delta = rowsum(dO * O) - dLSE and LSE in base 2 per query, and the cleared dQ sum.
// With dropout such that exp2(S - LSE) is keep_scale times P, which is what multiplies dO, and P delta stays what it is.
// One thread block per (query block, query head, batch); eight lanes per row.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "common/bwd_preprocess.h"
#include "pieces/integers.cuh"
#include "pieces/launch.cuh"
#include "pieces/sequence.cuh"

namespace flash {
namespace {

constexpr int kThreads = 256, kLanesPerRow = 8, kRowsPerPass = kThreads / kLanesPerRow, kVector = 8;
constexpr float kLog2E = 1.4426950408889634f;

__device__ float2 to_float2(__half2 x) { return __half22float2(x); }
__device__ float2 to_float2(__nv_bfloat162 x) { return __bfloat1622float2(x); }

template <class Pair, class Element>
__device__ float dot_rows(Element const* a, Element const* b, int head_dim, int lane) {
  float sum = 0.f;
  for (int column = lane * kVector; column < head_dim; column += kLanesPerRow * kVector) {
    uint4 const va = *reinterpret_cast<uint4 const*>(a + column),
                vb = *reinterpret_cast<uint4 const*>(b + column);
    Pair const *pa = reinterpret_cast<Pair const*>(&va), *pb = reinterpret_cast<Pair const*>(&vb);
#pragma unroll
    for (int i = 0; i < kVector / 2; ++i) {
      float2 const x = to_float2(pa[i]), y = to_float2(pb[i]);
      sum += x.x * y.x + x.y * y.y;
    }
  }
#pragma unroll
  for (int step = kLanesPerRow / 2; step > 0; step /= 2) { sum += __shfl_xor_sync(~0u, sum, step); }
  return sum;
}

template <class Pair, class Element>
__global__ void __launch_bounds__(kThreads)
    bwd_preprocess_kernel(__grid_constant__ BwdParams const params, int block_m,
                          int built_head_dim) {
  Problem const& problem = params.problem;
  QueryBlock const tile  = query_block(problem, blockIdx.x, block_m);
  Site const& site       = tile.site;
  int const row0         = site.block * block_m;
  if (row0 >= site.seqlen_q) { return; }

  float4* const dq = reinterpret_cast<float4*>(params.workspace.dq_accum) +
                     int64_t(blockIdx.x) * block_m * (built_head_dim / 4);
  for (int i = threadIdx.x; i < block_m * (built_head_dim / 4); i += kThreads) {
    dq[i] = make_float4(0.f, 0.f, 0.f, 0.f);
  }
  if (params.workspace.dq_turn && threadIdx.x == 0) { params.workspace.dq_turn[blockIdx.x] = 0; }

  auto matrix = [&](TensorRef const& t) {
    return static_cast<Element const*>(t.data) + site.batch * t.batch_stride +
           tile.head * t.head_stride + site.q_row0 * t.row_stride;
  };
  Element const *out = matrix(params.out), *dout = matrix(params.dout);
  int const lane = threadIdx.x % kLanesPerRow;
  int64_t const rows_in =
      site.batch * problem.lse_batch_stride + tile.head * problem.lse_head_stride + site.q_row0;
  float* const rows = params.workspace.rows + int64_t(blockIdx.x) * 2 * block_m;
  for (int i = threadIdx.x / kLanesPerRow; i < block_m; i += kRowsPerPass) {
    int const row     = row0 + i;
    bool const exists = row < site.seqlen_q;
    float sum = 0.f, lse = INFINITY;
    if (exists) { lse = params.lse[rows_in + row]; }
    // The eight lanes of a row agree, and a shuffle inside dot_rows needs all 32: rows that do not exist read row 0.
    int const safe = exists ? row : 0;
    sum = dot_rows<Pair>(dout + safe * params.dout.row_stride, out + safe * params.out.row_stride,
                         problem.head_dim, lane);
    if (exists && params.dlse) { sum -= params.dlse[rows_in + row]; }
    if (lane == 0) {
      // P of a row that sees no key, or does not exist, is exp2(s - inf) = 0.
      rows[i]           = lse == INFINITY ? INFINITY : lse * kLog2E - problem.keep_log2;
      rows[block_m + i] = lse == INFINITY ? 0.f : sum * problem.keep_share;
    }
  }
}

}  // namespace

cudaError_t launch_bwd_preprocess(BwdParams const& params, int block_m, int built_head_dim,
                                  cudaStream_t stream) {
  Problem const& problem = params.problem;
  int64_t const tiles    = query_block_count(problem, block_m);
  auto const kernel      = problem.dtype == DType::kFp16
                               ? &bwd_preprocess_kernel<__half2, __half>
                               : &bwd_preprocess_kernel<__nv_bfloat162, __nv_bfloat16>;
  return launch_tiles(kernel, tiles, kThreads, 0, stream, params, block_m, built_head_dim);
}

}  // namespace flash
