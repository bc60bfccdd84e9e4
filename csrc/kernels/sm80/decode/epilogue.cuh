#pragma once
// Epilogue of the decoding kernel: results of parts of a query tile's keys are merged, in a thread block, in a cluster and over the grid.
// Used by decode_kernel.  Knows parts and partial results, not who works on what.
#include "pieces/address.cuh"
#include "pieces/cluster.cuh"
#include "pieces/coordinates.cuh"
#include "pieces/merge.cuh"
#include "sm80/decode/mainloop.cuh"
#include "sm80/instructions/fragment.cuh"

namespace flash::sm80 {

// Parts of a row on their way to a thread in the kernels for many queries, at most.  With four, that for head dimension 128 spilled 52 bytes
// for sm_120.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1200
constexpr int kMostWideAtOnce = 2;
#else
constexpr int kMostWideAtOnce = 4;
#endif

// Results of parts of a tile's keys: rows of unnormalised O, fp32, and their states.  Part 0 lies apart, the others `step` after each other.
struct PartSource {
  float const *o_first, *o_base;
  RowState const *state_first, *state_base;
  int64_t o_step, state_step;
  int o_pitch;  // from row to row
  int count;

  CUTE_DEVICE float4 o(int part, int row, int column) const {
    float const* const of_part = part == 0 ? o_first : o_base + part * o_step;
    return *reinterpret_cast<float4 const*>(of_part + row * o_pitch + column);
  }
  CUTE_DEVICE RowState state(int part, int row) const {
    return (part == 0 ? state_first : state_base + part * state_step)[row];
  }
};

// Where merged rows go: out and lse (o null), or rows of unnormalised O and their states.
struct MergeTarget {
  float* o         = nullptr;
  RowState* states = nullptr;
  int o_pitch      = 0;
};

// Rows that a thread block merges: first, first + step, ...
struct RowShare {
  int first, step;
};

// What follows the main loop: a query tile's results to out and lse, or to the workspace to be merged by the last part to finish.
// Written for few instructions: what is done once waits for each of them.
template <class Traits>
struct DecodeEpilogue {
  using Element                = typename Traits::Element;
  static constexpr int kBlockM = Traits::kBlockM, kHeadDim = Traits::kHeadDim;
  static constexpr int kPitchO = Traits::kPitchO, kThreads = Traits::kThreads;
  static constexpr int kChunks      = kHeadDim / 4;  // of four columns
  static constexpr int kStaticBytes = sizeof(int);   // shared memory beside the kernel's own

  DecodeKernelParams const& params;
  DecodeTask const& task;
  float scale_log2;
  float* smem_o;     // (kGroups, kBlockM, kPitchO)
  RowState* states;  // (kGroups, kBlockM)
  RowState* merged;  // (kBlockM)
  float* weights;    // (kBlockM, kMergedParts)
  int rows;          // of the tile that are rows of the sequence

  CUTE_DEVICE DecodeEpilogue(DecodeKernelParams const& params_, DecodeTask const& task_,
                             float scale, void* smem)
      : params(params_), task(task_), scale_log2(scale), smem_o(static_cast<float*>(smem)) {
    states  = reinterpret_cast<RowState*>(smem_o + Traits::kGroups * kBlockM * kPitchO);
    merged  = states + Traits::kGroups * kBlockM;
    weights = reinterpret_cast<float*>(merged + kBlockM);
    rows    = min_of(kBlockM, task.sequence.seqlen_q * group() - task.m_block * kBlockM);
  }

  // A group's results to shared memory.
  template <class TensorO, class Softmax_>
  CUTE_DEVICE void put(TensorO const& tOrO, Softmax_ const& softmax, int group, int thread) const {
    auto tOcO =
        tile_coordinates<typename Traits::TiledMma, Shape<Int<kBlockM>, Int<kHeadDim>>>(thread);
    auto o_rows = rows_of(tOrO);
    auto places = rows_of(tOcO);
    CUTE_UNROLL
    for (int r = 0; r < size<0>(o_rows); ++r) {
      int const row = int(get<0>(places(r, 0))), place = group * kBlockM + row;
      float const sum = quad_sum(softmax.row_sum[r]);
      if (row >= rows) { continue; }
      if (thread % 4 == 0) { states[place] = {softmax.row_ref[r], sum}; }
      CUTE_UNROLL
      for (int c = 0; c < size<1>(o_rows); c += 2) {
        *reinterpret_cast<float2*>(smem_o + place * kPitchO + int(get<1>(places(r, c)))) =
            make_float2(o_rows(r, c), o_rows(r, c + 1));
      }
    }
  }

  // The groups' results, complete in shared memory, to out; or to scratch memory as this part's result, and the last part to come merges,
  // round by round.  In a cluster each thread block merges its groups, and then some rows of all thread blocks.  A cluster is one part,
  // which arrives for these rows alone.
  CUTE_DEVICE void finish(Parts const& parts) const {
    PartSource source{smem_o,  smem_o,  states,         states, kBlockM * kPitchO,
                      kBlockM, kPitchO, Traits::kGroups};
    RowShare share{0, 1};
    bool in_cluster = blocks() > 1;
    int index = parts.index, count = parts.count, spacing = 1;  // of what is merged now
    int* counters = params.workspace.counters;
#pragma unroll 1
    while (true) {
      MergeTarget target;
      if (count > 1) { target = in_workspace(parts.partial(index * spacing)); }
      merge(source, share, in_cluster ? MergeTarget{smem_o, states, kPitchO} : target);
      if (in_cluster) {
        in_cluster = false, share = {int(blockIdx.y) & (blocks() - 1), blocks()};
        arrive_at_cluster();
        wait_for_cluster();  // PROTECTS: the groups of all thread blocks are merged.
        merge_blocks(share, target);
        arrive_at_cluster_without_results();
      }
      if (count == 1 || share.first >= rows) { return; }
      int const first   = index / kMergedParts * kMergedParts;
      int const counted = share.step > 1 ? share.first : first * spacing;
      source = source_of(parts, first * spacing, spacing, min_of(kMergedParts, count - first));
      if (!is_last(counters + parts.partial(counted), source.count)) { return; }
      index = index / kMergedParts, count = ceil_div(count, kMergedParts);
      spacing *= kMergedParts;
      counters += params.plan.counters / kMergeRounds;
    }
  }

  // Thread blocks of a cluster.
  CUTE_DEVICE int blocks() const {
    return Traits::kNarrow ? cluster_blocks(params.plan.cluster_bits) : 1;
  }

 private:
  CUTE_DEVICE int group() const { return params.plan.group; }

  CUTE_DEVICE MergeTarget in_workspace(int64_t partial) const {
    return {o_of(partial), states_of(partial), kHeadDim};
  }
  CUTE_DEVICE float* o_of(int64_t partial) const {
    return params.workspace.partial_o + partial * kBlockM * kHeadDim;
  }
  CUTE_DEVICE RowState* states_of(int64_t partial) const {
    return reinterpret_cast<RowState*>(params.workspace.partial_rows) + partial * kBlockM;
  }
  // Parts first, first + spacing, ...
  CUTE_DEVICE PartSource source_of(Parts const& parts, int first, int spacing, int count) const {
    int64_t const first_partial = parts.partial(first), base = parts.base + first * parts.step;
    int64_t const step = spacing * parts.step;
    return {o_of(first_partial),
            o_of(base),
            states_of(first_partial),
            states_of(base),
            step * kBlockM * kHeadDim,
            step * kBlockM,
            kHeadDim,
            count};
  }

  // Merges the parts of the share's rows.  The target may be where one of the parts lies.
  CUTE_DEVICE void merge(PartSource const& source, RowShare share, MergeTarget target) const {
    constexpr int kTileAtOnce = Traits::kTile.at_once;
    constexpr int kAtOnce = Traits::kNarrow ? kTileAtOnce : min_of(kTileAtOnce, kMostWideAtOnce);
    int const lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    float4 x[kAtOnce];
    auto const load = [&](int first, int row, int chunk) {
      CUTE_UNROLL
      for (int i = 0; i < kAtOnce; ++i) {
        if (first + i < source.count) { x[i] = source.o(first + i, row, chunk * 4); }
      }
    };
    int const row0 = share.first + warp * share.step;
    if (row0 < rows && lane < kChunks) { load(0, row0, lane); }
    weigh(source, share);
#pragma unroll 1
    for (int row = row0; row < rows; row += kThreads / 32 * share.step) {
#pragma unroll 1
      for (int chunk = lane; chunk < kChunks; chunk += 32) {
        if (row != row0 || chunk != lane) { load(0, row, chunk); }
        float4 sum = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll 1
        for (int first = 0; true; load(first, row, chunk)) {
          CUTE_UNROLL
          for (int i = 0; i < kAtOnce; ++i) {
            if (first + i < source.count) {
              add_scaled(sum, weights[row * kMergedParts + first + i], x[i]);
            }
          }
          first += kAtOnce;
          if (first >= source.count) { break; }
        }
        write(target, row, chunk * 4, sum, merged[row]);
      }
    }
  }

  // Merges the share's rows of all thread blocks of the cluster, each its first group's.  A warp for a row, and in it first a lane for a
  // block.
  CUTE_DEVICE void merge_blocks(RowShare share, MergeTarget target) const {
    constexpr int kMostBlocks = 8;
    int const lane = threadIdx.x % 32, warp = threadIdx.x / 32, block = lane % kMostBlocks;
#pragma unroll 1
    for (int row = share.first + warp * share.step; row < rows; row += kThreads / 32 * share.step) {
#pragma unroll 1
      for (int chunk = lane; chunk - lane < kChunks; chunk += 32) {  // shuffles need all lanes
        RowState state{kNoReference, 0.f};
        if (block < share.step) { state = *in_block(states + row, block); }
        float4 x[kMostBlocks];
        CUTE_UNROLL
        for (int i = 0; i < kMostBlocks; ++i) {
          x[i]                 = make_float4(0.f, 0.f, 0.f, 0.f);
          float const* const o = smem_o + row * kPitchO + chunk * 4;
          if (i < share.step && chunk < kChunks) {
            x[i] = *reinterpret_cast<float4 const*>(in_block(o, i));
          }
        }
        float const ref    = lanes_max<kMostBlocks>(merged_ref(kNoReference, state));
        float const weight = merge_weight(state, ref, scale_log2);
        RowState const all{ref, lanes_sum<kMostBlocks>(weight * state.sum)};
        float4 sum = make_float4(0.f, 0.f, 0.f, 0.f);
        CUTE_UNROLL
        for (int i = 0; i < kMostBlocks; ++i) {
          add_scaled(sum, __shfl_sync(~0u, weight, i), x[i]);
        }
        if (chunk < kChunks) { write(target, row, chunk * 4, sum, all); }
      }
    }
  }

  // Weights of the parts, and the merged rows' states.  Sixteen lanes for a row, one for each part.
  CUTE_DEVICE void weigh(PartSource const& source, RowShare share) const {
    static_assert(kMergedParts == 16 && Traits::kGroups <= kMergedParts, "a lane for each part");
    int const part = threadIdx.x % kMergedParts;
#pragma unroll 1
    for (int first = share.first; first < rows;
         first += kThreads / kMergedParts * share.step) {  // shuffles need all lanes
      int const row        = first + threadIdx.x / kMergedParts * share.step;
      bool const exists    = part < source.count && row < rows;
      RowState const state = exists ? source.state(part, row) : RowState{kNoReference, 0.f};
      float const ref      = lanes_max<kMergedParts>(merged_ref(kNoReference, state));
      float const weight   = merge_weight(state, ref, scale_log2);
      float const sum      = lanes_sum<kMergedParts>(weight * state.sum);
      if (exists) { weights[row * kMergedParts + part] = weight; }
      if (part == 0 && exists) { merged[row] = {ref, sum}; }
    }
    __syncthreads();  // PROTECTS: weights and merged are complete.
  }

  // A merged row's columns, the first ones with its state.
  CUTE_DEVICE void write(MergeTarget const& target, int row, int column, float4 const& x,
                         RowState const& state) const {
    if (!target.o) {
      to_out(row, column, x, state);
      return;
    }
    *reinterpret_cast<float4*>(target.o + row * target.o_pitch + column) = x;
    if (column == 0) { target.states[row] = state; }
  }

  // To out and lse.
  CUTE_DEVICE void to_out(int row, int column, float4 const& x, RowState const& state) const {
    Problem const& problem = params.problem;
    int const packed = task.m_block * kBlockM + row, query = row_query(packed, group());
    int const head      = task.head_kv * group() + packed - query * group();
    int64_t const q_row = task.sequence.q_row0 + query;
    if (column == 0) {
      params.lse[task.batch * problem.lse_batch_stride + head * problem.lse_head_stride + q_row] =
          row_lse(state, scale_log2);
    }
    if (column >= problem.head_dim) { return; }
    float const norm = row_norm(state);
    cutlass::NumericArrayConverter<Element, float, 4> round;
    cutlass::Array<float, 4> const values{x.x * norm, x.y * norm, x.z * norm, x.w * norm};
    *reinterpret_cast<cutlass::Array<Element, 4>*>(
        matrix_of<Element>(params.out, task.batch, head) + q_row * params.out.row_stride + column) =
        round(values);
  }

  // Whether this thread block is the last of `count` to come here; then it sees what the others wrote before they came.
  // The counter is 0 again after the last.
  CUTE_DEVICE bool is_last(int* counter, int count) const {
    __shared__ int arrived;
    __syncthreads();  // PROTECTS: all threads' results are written before the arrival is counted.
    if (threadIdx.x == 0) {
      // After the barrier this thread's release is the release of all threads' writes.
      int before;
      asm volatile("atom.acq_rel.gpu.global.inc.u32 %0, [%1], %2;"
                   : "=r"(before)
                   : "l"(counter), "r"(count - 1)
                   : "memory");
      arrived = before;
    }
    __syncthreads();  // PROTECTS: arrived is complete.
    return arrived == count - 1;
  }
};

}  // namespace flash::sm80
