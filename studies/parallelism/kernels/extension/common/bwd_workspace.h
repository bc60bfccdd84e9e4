#pragma once
// Scratch of the backward pass, and the parameters of its kernels.  Used by: bwd_preprocess.cu and every isa's backward.
#include "flash.h"
#include "pieces/sequence.cuh"

namespace flash {

struct BwdWorkspace {
  float* dq_accum;  // fp32 dQ in the main kernel's accumulator layout
  // Per query block: LSE in base 2 (+inf for rows that see no key or do not exist) less keep_log2, then
  // (rowsum(dO * O) - dLSE) * keep_share.
  float* rows;
  int*
      dq_turn;  // per query block: whose turn it is to add to dQ; null unless the sum must be bitwise repeatable
};

// Elements of each part, one after the other.
struct BwdWorkspaceSizes {
  int64_t dq_accum, rows, dq_turn;

  int64_t bytes() const {
    return (dq_accum + rows) * int64_t(sizeof(float)) + dq_turn * int64_t(sizeof(int));
  }
};

// block_m: query rows of the main kernel's tile.
inline BwdWorkspaceSizes bwd_workspace_sizes(BwdParams const& params, int block_m,
                                             int built_head_dim) {
  int64_t const blocks = query_block_count(params.problem, block_m), rows = blocks * block_m;
  return {rows * built_head_dim, 2 * rows, params.deterministic ? blocks : 0};
}

// What the kernels get: a call with its workspace.
struct BwdKernelParams {
  Problem problem;
  TensorRef dout, q, k, v, out, dq, dk, dv;
  float const *lse, *dlse;
  BwdWorkspace workspace;
};

inline BwdKernelParams kernel_params(BwdParams const& params, BwdWorkspaceSizes const& sizes,
                                     void* workspace) {
  float* const dq_accum = static_cast<float*>(workspace);
  float* const rows     = dq_accum + sizes.dq_accum;
  int* const dq_turn    = sizes.dq_turn > 0 ? reinterpret_cast<int*>(rows + sizes.rows) : nullptr;
  return {params.problem, params.dout, params.q,    params.k,
          params.v,       params.out,  params.dq,   params.dk,
          params.dv,      params.lse,  params.dlse, {dq_accum, rows, dq_turn}};
}

}  // namespace flash
