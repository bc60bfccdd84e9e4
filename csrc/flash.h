#pragma once
// The seam: everything torch knows about the kernels and everything the kernels know about torch.
// Plain data without ownership.  Strides are in elements; the head dimension is contiguous.  A null pointer means "feature absent".
// Invariant: no launch allocates, synchronises, prints or throws.
#include <cuda_runtime_api.h>

#include <cstdint>

namespace flash {

enum class DType : int { kFp16 = 0, kBf16 = 1 };
enum class MaskKind : int { kNone = 0, kCausal = 1, kLocal = 2 };

// A (batch, seqlen, heads, head_dim) tensor.
struct TensorRef {
  void* data;
  int64_t batch_stride, row_stride, head_stride;
};

// What every family needs to know.  Causal is aligned bottom-right: query i sees key j iff j <= i + seqlen_k - seqlen_q.
struct Problem {
  DType dtype;
  MaskKind mask;
  int batch, heads_q, heads_kv, head_dim, seqlen_q, seqlen_k;
  float scale;  // softmax_scale: multiplies Q K^T
};

struct FwdParams {
  Problem problem;
  TensorRef q, k, v, out;
  float* lse;  // (batch, heads_q, seqlen_q), natural log, +inf for a row that sees no key
};

// Scratch of the backward pass, allocated by the caller with the sizes of plan_bwd.  The backward clears what it needs.
struct BwdWorkspace {
  float* dq_accum;  // fp32 dQ in the main kernel's accumulator layout
  float*
      rows;  // per query block: LSE in base 2 (+inf for rows that see no key or do not exist), then rowsum(dO * O) - dLSE
  int*
      dq_turn;  // per query block: whose turn it is to add to dQ; null unless the sum must be bitwise repeatable
};

struct BwdParams {
  Problem problem;
  TensorRef dout, q, k, v, out, dq, dk, dv;
  float const* lse;   // as written by the forward pass
  float const* dlse;  // gradient of lse, (batch, heads_q, seqlen_q) contiguous, or null
  BwdWorkspace workspace;
};

// Elements of each part of BwdWorkspace.
struct BwdPlan {
  int64_t dq_accum, rows, turns;
};

// What went wrong before or at a launch.  message: null when code is cudaSuccess, otherwise valid until this thread's next call.
struct Status {
  cudaError_t code;
  char const* message;
};

Status launch_fwd(FwdParams const& params, cudaStream_t stream);
BwdPlan plan_bwd(Problem const& problem);
Status launch_bwd(BwdParams const& params, cudaStream_t stream);

// What this build holds, as text for messages and reports: "90", "32,64,128", "fp16,bf16", "fwd,bwd".
struct BuildInfo {
  char const *archs, *head_dims, *dtypes, *families;
};
BuildInfo build_info();

}  // namespace flash
