#pragma once
// The seam: everything torch knows about the kernels and everything the kernels know about torch.
// Plain data without ownership.  Strides are in elements; the head dimension is contiguous.  A null pointer means "feature absent".
// A pass is fwd, decode, bwd or kv_update; an isa (sm80, sm90) is the least instruction set that a kernel needs.
// Invariant: no launch synchronises, prints or throws, and none allocates, but for the counters that a stream's first calls take.
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

// A side of a sliding window without a limit.
constexpr int kUnlimited = 1 << 30;

// Which of the 65536 values of a weight's 16 random bits keep it.  They are compared as fp16 numbers: an instruction compares two of
// these, and makes masks of the results.  Made by keep_rule (host/prepare.h).
struct KeepRule {
  unsigned below;     // a number, in both halves; kept are the smaller ones, and NaN
  unsigned inverted;  // all bits 1: kept are the others instead
};

// Scores are exponentiated in a unit of their own: softcap where there is one, otherwise softmax_scale (pieces/score.cuh).
// Made by score_unit (host/prepare.h).
struct ScoreUnit {
  float scale_log2;  // factor of a score in the exponent of 2: unit * log2(e)
  float inner;       // softmax_scale / softcap
  float per_unit;    // 1 / unit
};

// What every pass needs to know.
//
// Mask: with shift = seqlen_k - seqlen_q of the sequence, query i sees the keys j with
//   causal: j <= i + shift        local: i + shift - window_left <= j <= i + shift + window_right
// Scores: s = scale * q.k, then softcap * tanh(s / softcap) if softcap > 0, then - slope * |i + shift - j| with ALiBi.
//
// Sequences of their own lengths (cu_seqlens_q not null): tensors have batch stride 0; sequence b has the rows cu_seqlens_q[b] to
// cu_seqlens_q[b + 1] of q, and of k those from cu_seqlens_k[b] + leftpad_k[b] on, up to cu_seqlens_k[b + 1] or to
// cu_seqlens_k[b] + seqused_k[b].  Rows beyond the last sequence, up to total_q and total_k, are written as rows that see no key.
struct Problem {
  DType dtype;
  MaskKind mask;
  int batch, heads_q, heads_kv, head_dim, seqlen_q, seqlen_k;  // seqlen: the largest, of sequences
  int head_dim_v;                 // of v and out: head_dim, but for some forward passes
  int window_left, window_right;  // kLocal
  float scale;                    // softmax_scale, not negative
  float softcap;                  // 0: none
  ScoreUnit unit;                 // follows from these two
  float const* alibi_slopes;      // (heads_q) or (batch, heads_q)
  int64_t alibi_batch_stride;
  int const *cu_seqlens_q, *cu_seqlens_k, *seqused_k, *leftpad_k;  // device; int32
  int total_q, total_k;
  int64_t lse_batch_stride, lse_head_stride;
  int64_t const* rng_state;  // device: dropout's seed and offset; null: no dropout
  KeepRule keep;
  // 1 / (1 - p), its inverse and its logarithm in base 2; without dropout 1, 1 and 0.
  float keep_scale, keep_share, keep_log2;
};

struct FwdParams {
  Problem problem;
  TensorRef q, k, v, out;
  float* lse;  // natural log, +inf for a row that sees no key
};

struct BwdParams {
  Problem problem;
  TensorRef dout, q, k, v, out, dq, dk, dv;
  float const* lse;    // as written by the forward pass
  float const* dlse;   // gradient of lse, laid out like it, or null
  bool deterministic;  // dQ must be bitwise repeatable
};

// S_dmask: probs (batch, heads_q, rows, columns) of the problem's dtype, exp(s - its row's maximum), negative where dropped.
// What no query sees is not written.
struct ProbsParams {
  Problem problem;
  TensorRef q, k;
  void* probs;
  int64_t rows, columns;
};

// Where a random state comes from: values, or places that hold them when the kernel runs (then offset is added).
struct RngSource {
  uint64_t seed, offset;
  int64_t const *seed_place, *offset_place;
};

// A seqlen_new: each sequence gets as many new rows as it has queries.
constexpr int kAsQueries = -1;

// Keys and values of sequences that grow.  Sequence b has the rows 0 to its length - 1, of which the first leftpad_k[b] are not keys.
// Row r lies in row r of k's entry b or entries[b]; with a block table in row r % page_size of page block_table[b][r / page_size].
struct KvCache {
  TensorRef k, v;          // batch_stride: from one entry, or page, to the next
  int const* entries;      // (batch)
  int const* block_table;  // (batch, capacity / page_size)
  int64_t block_table_stride;
  int page_size, pages;
  int capacity;  // most rows that a sequence can have; longer ones end there
  int seqlen;  // length of every sequence, where the problem has neither seqused_k nor cu_seqlens_k
  int seqlen_new;  // rows added to each by launch_kv_update, which its length does not count yet; or kAsQueries
};

// Attention of few queries to a cache.  problem.seqlen_k: the capacity.  Without dropout.
struct DecodeParams {
  Problem problem;
  TensorRef q, out;
  KvCache cache;
  float* lse;
  int num_splits;  // most parts into which a query tile's keys are cut; 0: as many as are good for speed
};

// New rows k, v of each sequence into the cache, k rotated; q rotated into q_out.  cos, sin (positions, rotary_dim / 2) of the
// problem's dtype; null: no rotation, and q is not touched.  Position of a new row: its row in the cache; of query i: that of the
// first new row, and with advance_q + i.
struct KvUpdateParams {
  Problem problem;
  KvCache cache;
  TensorRef k, v, q, q_out;
  void const *cos, *sin;
  int64_t cos_stride, sin_stride;
  int rotary_dim, positions;
  bool interleaved, advance_q;
};

// Merged parts of attention: out, lse of all keys from those of keys a and b.  Rows are (batch, head, row) with lse strides of the
// problem.  A part with an infinite lse saw no key.
struct MergeParams {
  Problem problem;
  TensorRef out_a, out_b, out;
  float const *lse_a, *lse_b;
  float* lse;
};

// How a kernel will serve a call.  A caller reads workspace_bytes; the rest is for the kernel that made the plan.
struct Plan {
  // What the call may use, decided by who asks for the plan and kept for its launch: KB of shared memory of a thread block, and what
  // a GPU of this compute capability has.
  int smem_kb, capability;
  cudaError_t
      refused;  // why the kernel cannot be launched; cudaSuccess: nothing is known against it
  int64_t workspace_bytes;  // device memory that the launch needs, aligned to 16 bytes, not cleared
  int64_t counters;         // zeroed ints that the launch needs; host/ has them
  void const* entry;  // of the registry; null: no kernel serves the call, and the launch says why
  int64_t notes[10];  // what the kernel's own code decided (kernels/entry.h)
};

// What went wrong before or at a launch.  message: null when code is cudaSuccess, otherwise valid until this thread's next call.
struct Status {
  cudaError_t code;
  char const* message;
};

// Plans are for these params alone, and for the current device.  check_plan: the error that the launch would be, known before anything
// is launched; for calls that write to the caller's memory before their attention.
Plan plan_fwd(FwdParams const& params);
Status check_plan(FwdParams const& params, Plan const& plan);
Status launch_fwd(FwdParams const& params, Plan const& plan, cudaStream_t stream);
Status launch_fwd(FwdParams const& params, cudaStream_t stream);  // planned and launched at once

Plan plan_bwd(BwdParams const& params);
Status launch_bwd(BwdParams const& params, Plan const& plan, void* workspace, cudaStream_t stream);
Plan plan_decode(DecodeParams const& params);
Status check_plan(DecodeParams const& params, Plan const& plan);
Status launch_decode(DecodeParams const& params, Plan const& plan, void* workspace,
                     cudaStream_t stream);

// capability: as in a plan.
Status launch_kv_update(KvUpdateParams const& params, int capability, cudaStream_t stream);
Status launch_merge_states(MergeParams const& params, cudaStream_t stream);
Status launch_attn_probs(ProbsParams const& params, cudaStream_t stream);
// state: seed, offset; device.
Status launch_write_rng_state(RngSource const& source, int64_t* state, cudaStream_t stream);

// Limits calls to kernels of one isa: "sm80", "sm90"; "" allows all, as does null.  At the start it is the environment's FLASH_ATTN_ISA.
Status pin_isa(char const* isa);
// The isa that calls are limited to, "" for all, and FLASH_ATTN_ISA's text if it names none.
char const* pinned_isa();

// Tests only: thread blocks get no more than so many KB of shared memory, 99, 163 or 227; 0: what the device allows.  A smaller limit
// than the device's makes it a GPU of compute capability 8.0 for all that is decided on the host: calls take sm80's kernels, without
// clusters and without early starts.  At the start it is the environment's FLASH_ATTN_TEST_SMEM_KB.
Status limit_smem_kb(int kb);

// What calls are planned for: the current device's compute capability, for example 90, or 80 under a smaller limit.
int planned_capability();

// What one unit of the build serves.
struct KernelInfo {
  char const *isa, *pass;    // "sm80"; "fwd"
  int head_dim, head_dim_v;  // of q and k, of v
  char const* dtype;         // "bf16"
};

// What this build holds.  As text: archs, "80,90"; the sizes of shared memory that there are tiles for, "227,163".
struct BuildInfo {
  char const *archs, *smem_kb;
  KernelInfo const* kernels;
  int kernel_count;
};
BuildInfo build_info();

}  // namespace flash
