#pragma once
// Launch of the backward's first kernel, shared by every head dimension.
#include "common/bwd_workspace.h"

namespace flash {

// Writes workspace.rows, clears dq_accum and dq_turn.  block_m, built_head_dim: of the main kernel that follows.
cudaError_t launch_bwd_preprocess(BwdKernelParams const& params, int block_m, int built_head_dim,
                                  cudaStream_t stream);

}  // namespace flash
