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

// A side of a sliding window without a limit.
constexpr int kUnlimited = 1 << 30;

// Which of the 65536 values of a weight's 16 random bits keep it.  They are compared as fp16 numbers: an instruction compares two of
// these, and makes masks of the results.
struct KeepRule {
  unsigned below;     // a number, in both halves; kept are the smaller ones, and NaN
  unsigned inverted;  // all bits 1: kept are the others instead
};

// For the number of values that keep a weight, at most 65535: the first in the order NaN, -inf ... -0 = 0 ... inf; or the last,
// where that would divide the NaNs or the zeros.
inline KeepRule keep_rule(int kept) {
  constexpr int kNans = 2046, kNegatives = 31744, kNumbers = 65536 - kNans, kMinusInf = 0xfc00;
  bool const inverted = kept < kNans || kept == kNans + kNegatives + 1;
  int const smaller   = inverted ? kNumbers - kept : kept - kNans;  // numbers below the threshold
  int const beyond    = smaller - kNegatives - 1;                   // zero has two patterns
  unsigned const below =
      unsigned(smaller < kNegatives ? kMinusInf - smaller : (beyond < 0 ? 0 : beyond));
  return {below * 0x10001u, inverted ? ~0u : 0u};
}

// What every family needs to know.
//
// Mask: with shift = seqlen_k - seqlen_q of the sequence, query i sees the keys j with
//   causal: j <= i + shift        local: i + shift - window_left <= j <= i + shift + window_right
// Scores: s = scale * q.k, then softcap * tanh(s / softcap) if softcap > 0, then - slope * |i + shift - j| with ALiBi.
//
// Sequences of their own lengths (cu_seqlens_q not null): tensors have batch stride 0; sequence b has the rows cu_seqlens_q[b] to
// cu_seqlens_q[b + 1] of q, and of k those from cu_seqlens_k[b] + leftpad_k[b] on, up to cu_seqlens_k[b + 1] or to
// cu_seqlens_k[b] + seqused_k[b].  Rows beyond the last sequence, up to total_q and total_k, are written as rows that see no key.
// Scores are exponentiated in a unit of their own: softcap where there is one, otherwise softmax_scale (pieces/score_mod.cuh).
struct ScoreUnit {
  float scale_log2;  // factor of a score in the exponent of 2: unit * log2(e)
  float inner;       // softmax_scale / softcap
  float per_unit;    // 1 / unit
};

inline ScoreUnit score_unit(float scale, float softcap) {
  constexpr float kLog2OfE = 1.4426950408889634f;
  // The smallest unit.  With 0, hidden scores of -inf would become NaN; ALiBi's part of a score, divided by it, stays above the
  // reference of a row without keys (-1e30).
  constexpr float kMinUnit = 1e-20f;
  float const wanted       = softcap > 0.f ? softcap : scale,
              unit         = wanted > kMinUnit ? wanted : kMinUnit;
  return {unit * kLog2OfE, softcap > 0.f ? scale / softcap : 0.f, 1.f / unit};
}

struct Problem {
  DType dtype;
  MaskKind mask;
  int batch, heads_q, heads_kv, head_dim, seqlen_q, seqlen_k;  // seqlen: the largest, of sequences
  int window_left, window_right;                               // kLocal
  float scale;                                                 // softmax_scale, not negative
  float softcap;                                               // 0: none
  ScoreUnit unit;                                              // follows from these two
  float const* alibi_slopes;                                   // (heads_q) or (batch, heads_q)
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

// Scratch of the backward pass, allocated by the caller with the sizes of plan_bwd.  The backward clears what it needs.
struct BwdWorkspace {
  float* dq_accum;  // fp32 dQ in the main kernel's accumulator layout
  // Per query block: LSE in base 2 (+inf for rows that see no key or do not exist) less keep_log2, then
  // (rowsum(dO * O) - dLSE) * keep_share.
  float* rows;
  int*
      dq_turn;  // per query block: whose turn it is to add to dQ; null unless the sum must be bitwise repeatable
};

struct BwdParams {
  Problem problem;
  TensorRef dout, q, k, v, out, dq, dk, dv;
  float const* lse;   // as written by the forward pass
  float const* dlse;  // gradient of lse, laid out like it, or null
  BwdWorkspace workspace;
};

// Elements of each part of BwdWorkspace.
struct BwdPlan {
  int64_t dq_accum, rows, turns;
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
  int seqlen_new;  // rows added to each by launch_kv_update, which its length does not count yet; kAsQueries: as many as it has queries
};
constexpr int kAsQueries = -1;

// How the keys are divided among thread blocks, and the scratch that their partial results need.
//   splits > 0   the keys of every query tile are cut into so many equal parts, each a thread block's
//   splits == 0  all key tiles of a head's query tiles are one line, cut into equal shares, one for each thread block
struct DecodePlan {
  int group;  // query heads of a key head
  int block_m, splits;
  int64_t grid;  // thread blocks of a worker, one for each key head; with splits > 0 all
  int workers;
  // The workers of a single sequence's one query tile merge in clusters of 2^cluster_bits thread blocks; 0: no clusters.
  int cluster_bits;
  // Thread blocks guess their first work from the lengths that are there before the kernels before have ended, and bring its keys into L2.
  bool looks_ahead;
  int64_t partial_o, partial_rows, counters;  // elements
};

struct DecodeWorkspace {
  float* partial_o;     // (slots, block_m, built head_dim)
  float* partial_rows;  // (slots, block_m, 2): reference of the scores, sum
  int* counters;        // zeros; zeros again when the kernel ends
};

// Attention of few queries to a cache.  problem.seqlen_k: the capacity.  Without dropout.
struct DecodeParams {
  Problem problem;
  TensorRef q, out;
  KvCache cache;
  float* lse;
  DecodePlan plan;
  DecodeWorkspace workspace;
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

// What went wrong before or at a launch.  message: null when code is cudaSuccess, otherwise valid until this thread's next call.
struct Status {
  cudaError_t code;
  char const* message;
};

Status launch_fwd(FwdParams const& params, cudaStream_t stream);
BwdPlan plan_bwd(Problem const& problem);
Status launch_bwd(BwdParams const& params, cudaStream_t stream);
DecodePlan plan_decode(Problem const& problem, KvCache const& cache, int num_splits);
Status launch_decode(DecodeParams const& params, cudaStream_t stream);
Status launch_kv_update(KvUpdateParams const& params, cudaStream_t stream);
Status launch_merge_states(MergeParams const& params, cudaStream_t stream);
Status launch_attn_probs(ProbsParams const& params, cudaStream_t stream);
// state: seed, offset; device.
Status launch_write_rng_state(RngSource const& source, int64_t* state, cudaStream_t stream);

// What this build holds, as text for messages and reports: "90", "32,64,128", "fp16,bf16", "fwd,bwd".
struct BuildInfo {
  char const *archs, *head_dims, *dtypes, *families;
};
BuildInfo build_info();

}  // namespace flash
