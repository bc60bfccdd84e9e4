#pragma once
// The seam of the study: what Python fills in and the units read.  Used by every unit; mirrored by library.py.
// Tensors are (batch, seqlen, heads, head_dim) of bf16, contiguous; queries and keys are equally many.
#include <cuda_runtime_api.h>

#include "common/bwd_workspace.h"
#include "flash.h"
#include "host/prepare.h"
#include "pieces/tile_order.cuh"

// Every unit exports <unit>_run(variant, call, stream) and <unit>_facts(variant, causal, facts); both return a cudaError_t.
#define PARALLELISM_EXPORT extern "C" __attribute__((visibility("default")))

namespace parallelism {

// How the tiles of a forward pass are dealt to thread blocks.
enum class Mapping : int {
  kRowSplits =
      0,  // grid (batch, heads, splits): block s takes the query blocks s, s + splits, ...; one split: the whole head
  kTileGrid = 1,  // grid (query blocks, batch, heads)
  kPersistent =
      2,  // grid (splits): block i takes the tiles i, i + splits, ... of the extension's order
};

struct ForwardCall {
  void *q, *k, *v, *out;
  float *lse, *o_partial, *row_partial;  // partial results: keys outside only
  int batch, seqlen, heads, causal, splits;
  float scale;
};

struct BackwardCall {
  void *dout, *q, *k, *v, *out, *dq, *dk, *dv;
  float *lse, *dq_accum, *rows;
  int batch, seqlen, heads, causal;
  int key_parallel;  // 1: grid (key blocks, batch, heads); 0: grid (1, batch, heads), a block loops over the key blocks
  int parts;  // sum of Part
  float scale;
};

// What a call of a backward unit runs.
enum Part : int { kPrepare = 1, kMain = 2, kFinish = 4 };

// Of one kernel, as the driver reports them.
struct KernelFacts {
  int registers, local_bytes, smem_bytes, threads, blocks_per_sm;
};

inline flash::TensorRef tensor_ref(void* data, int seqlen, int heads, int head_dim) {
  int64_t const row = int64_t(heads) * head_dim;
  return {data, seqlen * row, row, head_dim};
}

inline flash::Problem dense_problem(int batch, int seqlen, int heads, int head_dim, bool causal,
                                    float scale) {
  flash::Problem problem{};
  problem.dtype = flash::DType::kBf16;
  problem.mask  = causal ? flash::MaskKind::kCausal : flash::MaskKind::kNone;
  problem.batch = batch, problem.heads_q = problem.heads_kv = heads;
  problem.head_dim = problem.head_dim_v = head_dim;
  problem.seqlen_q = problem.seqlen_k = seqlen;
  problem.window_left = problem.window_right = flash::kUnlimited;
  problem.scale                              = scale;
  problem.unit                               = flash::score_unit(scale, 0.f);
  problem.lse_head_stride = seqlen, problem.lse_batch_stride = int64_t(seqlen) * heads;
  return problem;
}

inline flash::FwdParams forward_params(ForwardCall const& call, int head_dim) {
  auto const ref = [&](void* data) { return tensor_ref(data, call.seqlen, call.heads, head_dim); };
  return {dense_problem(call.batch, call.seqlen, call.heads, head_dim, call.causal, call.scale),
          ref(call.q),
          ref(call.k),
          ref(call.v),
          ref(call.out),
          call.lse};
}

inline flash::BwdKernelParams backward_params(BackwardCall const& call, int head_dim) {
  auto const ref = [&](void* data) { return tensor_ref(data, call.seqlen, call.heads, head_dim); };
  flash::BwdKernelParams params{};
  params.problem =
      dense_problem(call.batch, call.seqlen, call.heads, head_dim, call.causal, call.scale);
  params.dout = ref(call.dout), params.q = ref(call.q), params.k = ref(call.k);
  params.v = ref(call.v), params.out = ref(call.out);
  params.dq = ref(call.dq), params.dk = ref(call.dk), params.dv = ref(call.dv);
  params.lse                = call.lse;
  params.workspace.dq_accum = call.dq_accum, params.workspace.rows = call.rows;
  return params;
}

// The order in which the extension's forward pass numbers its tiles.
inline flash::TileOrder shipped_order(flash::Problem const& problem, int blocks) {
  constexpr int kElementBytes = 2;
  int64_t const kv_bytes      = int64_t(2) * problem.seqlen_k * problem.head_dim * kElementBytes;
  return flash::make_tile_order(blocks, problem.batch, problem.heads_q,
                                flash::heads_in_l2(kv_bytes),
                                problem.mask != flash::MaskKind::kNone);
}

inline flash::TileOrder head_by_head(flash::Problem const& problem, int blocks) {
  return flash::make_tile_order(blocks, problem.batch, problem.heads_q, 1,
                                /*longest_first=*/false);
}

template <class Kernel>
cudaError_t read_facts(Kernel kernel, int threads, int smem_bytes, KernelFacts* facts) {
  auto const* const address = reinterpret_cast<void const*>(kernel);
  cudaFuncAttributes attributes;
  cudaError_t status = cudaFuncGetAttributes(&attributes, address);
  if (status != cudaSuccess) { return status; }
  status = cudaFuncSetAttribute(address, cudaFuncAttributeMaxDynamicSharedMemorySize, smem_bytes);
  if (status != cudaSuccess) { return status; }
  *facts = {attributes.numRegs, int(attributes.localSizeBytes),
            smem_bytes + int(attributes.sharedSizeBytes), threads, 0};
  return cudaOccupancyMaxActiveBlocksPerMultiprocessor(&facts->blocks_per_sm, address, threads,
                                                       size_t(smem_bytes));
}

}  // namespace parallelism
