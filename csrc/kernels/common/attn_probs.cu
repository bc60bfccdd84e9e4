// S_dmask, for callers who ask for attention probabilities with dropout, and the random state of one call.
// Not fast: a warp per query, scores computed twice in fp32.  The attention kernels carry none of this.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "flash.h"
#include "head_dims.h"
#include "pieces/dropout.cuh"
#include "pieces/integers.cuh"
#include "pieces/lanes.cuh"
#include "pieces/launch.cuh"
#include "pieces/score.cuh"
#include "pieces/visibility.cuh"

namespace flash {
namespace {

constexpr int kWarps = 8;

__device__ float to_float(__half x) { return __half2float(x); }
__device__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ void from_float(__half& out, float x) { out = __float2half(x); }
__device__ void from_float(__nv_bfloat16& out, float x) { out = __float2bfloat16(x); }

template <class Element>
__global__ void __launch_bounds__(32 * kWarps)
    attn_probs_kernel(__grid_constant__ ProbsParams const params) {
  __shared__ float all_q[kWarps][kMaxHeadDim];
  Problem const& problem = params.problem;
  int const lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int64_t const query = int64_t(blockIdx.x) * kWarps + warp;
  int64_t const pair  = query / problem.seqlen_q;
  int const row = int(query % problem.seqlen_q), batch = int(pair / problem.heads_q),
            head = int(pair % problem.heads_q);
  if (batch >= problem.batch) { return; }
  int q_row0 = 0, k_row0 = 0, seqlen_q = problem.seqlen_q, seqlen_k = problem.seqlen_k;
  if (problem.cu_seqlens_q) {
    q_row0   = problem.cu_seqlens_q[batch];
    k_row0   = problem.cu_seqlens_k[batch];
    seqlen_q = problem.cu_seqlens_q[batch + 1] - q_row0;
    seqlen_k = problem.cu_seqlens_k[batch + 1] - k_row0;
  }
  if (row >= seqlen_q) { return; }

  auto const row_of = [&](TensorRef const& tensor, int head, int64_t row) {
    return static_cast<Element const*>(tensor.data) + batch * tensor.batch_stride +
           head * tensor.head_stride + row * tensor.row_stride;
  };
  Element const* const q_row = row_of(params.q, head, int64_t(q_row0) + row);
  float* const q             = all_q[warp];
  for (int d = lane; d < problem.head_dim; d += 32) { q[d] = to_float(q_row[d]); }
  __syncwarp();

  Visibility<MaskKind::kLocal> const see{seqlen_q, seqlen_k, problem.window_left,
                                         problem.window_right};
  int const first = see.first_key(row), end = see.end_key(row);
  // Scores are in natural units here: the softcap's part alone is multiplied by it.
  bool const capped = problem.softcap > 0.f;
  float const slope = problem.alibi_slopes ? alibi_slope(problem, batch, head) : 0.f;
  ScoreMod const mod{1.f / problem.softcap, slope, capped, true};
  int const head_kv = head / (problem.heads_q / problem.heads_kv);
  auto const score  = [&](int column) {
    Element const* const k = row_of(params.k, head_kv, int64_t(k_row0) + column);
    float sum              = 0.f;
    for (int d = 0; d < problem.head_dim; ++d) { sum += q[d] * to_float(k[d]); }
    sum *= problem.scale;
    if (capped) { sum = problem.softcap * mod.capped(sum); }
    return mod.biased(sum, fabsf(float(row + see.shift() - column)));
  };
  float largest = -INFINITY;
  for (int column = first + lane; column < end; column += 32) {
    largest = fmaxf(largest, score(column));
  }
  largest = lanes_max<32>(largest);
  DropoutBits bits{};
  bool const drops = problem.rng_state != nullptr;
  if (drops) {
    bits = dropout_bits(uint64_t(problem.rng_state[0]), uint64_t(problem.rng_state[1]), int(pair));
  }
  Element* const out =
      static_cast<Element*>(params.probs) + (pair * params.rows + row) * params.columns;
  for (int column = first + lane; column < end; column += 32) {
    float const p   = __expf(score(column) - largest);
    bool const keep = !drops || keeps(bits.at(row, column), problem.keep);
    from_float(out[column], keep ? p : -p);
  }
}

__global__ void write_rng_state_kernel(RngSource source, int64_t* state) {
  state[0] = source.seed_place ? *source.seed_place : int64_t(source.seed);
  state[1] = int64_t(source.offset) + (source.offset_place ? *source.offset_place : 0);
}

Status status_of(cudaError_t code) {
  return {code, code == cudaSuccess ? nullptr : cudaGetErrorString(code)};
}

}  // namespace

Status launch_attn_probs(ProbsParams const& params, cudaStream_t stream) {
  Problem const& problem = params.problem;
  int64_t const queries  = int64_t(problem.batch) * problem.heads_q * problem.seqlen_q,
                blocks   = (queries + kWarps - 1) / kWarps;
  auto const kernel      = problem.dtype == DType::kFp16 ? &attn_probs_kernel<__half>
                                                         : &attn_probs_kernel<__nv_bfloat16>;
  return status_of(launch_kernel(kernel, Launch{blocks, 32 * kWarps, 0, stream}, params));
}

Status launch_write_rng_state(RngSource const& source, int64_t* state, cudaStream_t stream) {
  return status_of(launch_kernel(&write_rng_state_kernel, Launch{1, 1, 0, stream}, source, state));
}

}  // namespace flash
