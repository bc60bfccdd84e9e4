#pragma once
// Decoding kernel: attention of few queries to a cache, the keys divided among thread blocks.
// Invariant: every row of out and lse is written exactly once, by the thread block that has all of its query tile's keys or by the last
// one of those that share them to finish.
#include "pieces/dependent.cuh"
#include "pieces/merge.cuh"
#include "sm80/decode_schedule.cuh"

namespace flash::sm80 {

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

// What follows the main loop: a query tile's results to out and lse, or to the workspace to be merged by the last part to finish.
// Written for few instructions: what is done once waits for each of them.
template <class Traits>
struct DecodeEpilogue {
  using Element                = typename Traits::Element;
  static constexpr int kBlockM = Traits::kBlockM, kHeadDim = Traits::kHeadDim;
  static constexpr int kPitchO = Traits::kPitchO, kThreads = Traits::kThreads;
  static constexpr int kChunks = kHeadDim / 4;  // of four columns

  DecodeParams const& params;
  DecodeTask const& task;
  float scale_log2;
  float* smem_o;     // (kGroups, kBlockM, kPitchO)
  RowState* states;  // (kGroups, kBlockM)
  RowState* merged;  // (kBlockM)
  float* weights;    // (kBlockM, kMergedParts)
  int rows;          // of the tile that are rows of the sequence

  CUTE_DEVICE DecodeEpilogue(DecodeParams const& params_, DecodeTask const& task_, float scale,
                             void* smem)
      : params(params_), task(task_), scale_log2(scale), smem_o(static_cast<float*>(smem)) {
    states  = reinterpret_cast<RowState*>(smem_o + Traits::kGroups * kBlockM * kPitchO);
    merged  = states + Traits::kGroups * kBlockM;
    weights = reinterpret_cast<float*>(merged + kBlockM);
    rows    = min_of(kBlockM, task.sequence.seqlen_q * group() - task.m_block * kBlockM);
  }

  // A group's results to shared memory.
  template <class TensorO, class Softmax_>
  CUTE_DEVICE void put(TensorO const& tOrO, Softmax_ const& softmax, int group, int thread) const {
    auto cO     = make_identity_tensor(Shape<Int<kBlockM>, Int<kHeadDim>>{});
    auto tOcO   = typename Traits::TiledMma{}.get_slice(thread).partition_C(cO);
    auto o_rows = make_tensor(tOrO.data(), rows_columns(tOrO.layout()));
    auto places = make_tensor(tOcO.data(), rows_columns(tOcO.layout()));
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

  // The groups' results, complete in shared memory, to out; or to this part's slot, and the last part to come merges, level by level.
  CUTE_DEVICE void finish(Parts const& parts) const {
    PartSource source{smem_o,  smem_o,  states,         states, kBlockM * kPitchO,
                      kBlockM, kPitchO, Traits::kGroups};
    int index = parts.index, count = parts.count, spacing = 1;  // of what is merged now
    int* counters = params.workspace.counters;
#pragma unroll 1
    while (true) {
      int64_t const slot = count == 1 ? -1 : parts.slot(index * spacing);
      merge(source, slot);
      if (slot < 0) { return; }
      int const first = index / kMergedParts * kMergedParts;
      source          = slots(parts, first * spacing, spacing, min_of(kMergedParts, count - first));
      if (!is_last(counters + parts.slot(first * spacing), source.count)) { return; }
      index = index / kMergedParts, count = ceil_div(count, kMergedParts);
      spacing *= kMergedParts;
      counters += params.plan.counters / kMergeLevels;
    }
  }

 private:
  CUTE_DEVICE int group() const { return params.plan.group; }

  CUTE_DEVICE float* slot_o(int64_t slot) const {
    return params.workspace.partial_o + slot * kBlockM * kHeadDim;
  }
  CUTE_DEVICE RowState* slot_states(int64_t slot) const {
    return reinterpret_cast<RowState*>(params.workspace.partial_rows) + slot * kBlockM;
  }
  // Parts first, first + spacing, ...
  CUTE_DEVICE PartSource slots(Parts const& parts, int first, int spacing, int count) const {
    int64_t const slot0 = parts.slot(first), base = parts.base + first * parts.step;
    int64_t const step = spacing * parts.step;
    return {slot_o(slot0),
            slot_o(base),
            slot_states(slot0),
            slot_states(base),
            step * kBlockM * kHeadDim,
            step * kBlockM,
            kHeadDim,
            count};
  }

  // Merges the parts of every row, to out (slot < 0) or to a slot, which may be one of theirs.
  CUTE_DEVICE void merge(PartSource const& source, int64_t slot) const {
    // Parts on their way together.
    constexpr int kAtOnce = Traits::kNarrow && kHeadDim <= 128 ? 16 : 4;
    int const lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    float4 x[kAtOnce];
    auto const load = [&](int first, int row, int chunk) {
      CUTE_UNROLL
      for (int i = 0; i < kAtOnce; ++i) {
        if (first + i < source.count) { x[i] = source.o(first + i, row, chunk * 4); }
      }
    };
    if (warp < rows && lane < kChunks) { load(0, warp, lane); }
    weigh(source);
#pragma unroll 1
    for (int row = warp; row < rows; row += kThreads / 32) {
#pragma unroll 1
      for (int chunk = lane; chunk < kChunks; chunk += 32) {
        if (row != warp || chunk != lane) { load(0, row, chunk); }
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
        if (slot < 0) {
          to_out(row, chunk * 4, sum);
        } else {
          *reinterpret_cast<float4*>(slot_o(slot) + row * kHeadDim + chunk * 4) = sum;
          if (chunk == 0) { slot_states(slot)[row] = merged[row]; }
        }
      }
    }
  }

  // Weights of the parts, and the merged rows' states.  Sixteen lanes for a row, one for each part.
  CUTE_DEVICE void weigh(PartSource const& source) const {
    static_assert(kMergedParts == 16 && Traits::kGroups <= kMergedParts, "a lane for each part");
    int const part = threadIdx.x % kMergedParts;
#pragma unroll 1
    for (int first = 0; first < rows;
         first += kThreads / kMergedParts) {  // shuffles need all lanes
      int const row        = first + threadIdx.x / kMergedParts;
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

  // A merged row's columns to out, and its lse.
  CUTE_DEVICE void to_out(int row, int column, float4 const& x) const {
    Problem const& problem = params.problem;
    int const packed = task.m_block * kBlockM + row, query = row_query(packed, group());
    int const head       = task.head_kv * group() + packed - query * group();
    int64_t const q_row  = task.sequence.q_row0 + query;
    RowState const state = merged[row];
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

// Rows of q beyond the last sequence: rows that see no key.
template <class Traits>
CUTE_DEVICE void clear_tail(DecodeParams const& params) {
  using Element          = typename Traits::Element;
  Problem const& problem = params.problem;
  if (!problem.cu_seqlens_q) { return; }
  int const first = __ldg(problem.cu_seqlens_q + problem.batch);
  for (int row = first + blockIdx.x; row < problem.total_q; row += gridDim.x) {
    for (int i = threadIdx.x; i < problem.heads_q * problem.head_dim; i += Traits::kThreads) {
      matrix_of<Element>(params.out, 0,
                         i / problem.head_dim)[row * params.out.row_stride + i % problem.head_dim] =
          Element(0);
    }
    for (int head = threadIdx.x; head < problem.heads_q; head += Traits::kThreads) {
      params.lse[head * problem.lse_head_stride + row] = INFINITY;
    }
  }
}

// Brings the parameters into the constant cache while the kernel before ends.
template <class Params>
CUTE_DEVICE void touch(Params const& params) {
  constexpr int kLineInts = 16;
  int sum                 = 0;
  CUTE_UNROLL
  for (int i = 0; i < int(sizeof(Params) / sizeof(int)); i += kLineInts) {
    sum += reinterpret_cast<int const*>(&params)[i];
  }
  asm volatile("" ::"r"(sum));
}

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kMinCtas)
    decode_kernel(__grid_constant__ DecodeParams const params) {
  using Element = typename Traits::Element;
  extern __shared__ __align__(1024) unsigned char smem_bytes[];
  __shared__ int scratch[Traits::kThreads / 32];
  __shared__ DecodeCursor cursor;
  __shared__ DecodeWork work;
  __shared__ typename DecodeMainloop<Traits>::Row rows[Traits::kBlockM];

  let_next_kernel_start();
  touch(params);
  // Right after kv_update only what it writes must wait: it lets this kernel start when the kernels before it have ended.
  if (params.cache.seqlen_new == 0) { wait_for_previous_kernel(); }
  clear_tail<Traits>(params);
  int const group  = threadIdx.x / Traits::kGroupThreads;
  int const thread = threadIdx.x % Traits::kGroupThreads;
  typename Traits::TiledMma mma;
  DecodeSchedule<Traits> const schedule{params, cursor, work};
  schedule.start(scratch);
  while (true) {
    if (threadIdx.x == 0) { schedule.next(); }
    __syncthreads();  // PROTECTS: work is complete, and the last results have been read: key tiles may be loaded over them.
    if (work.parts.count == 0) { return; }
    auto tOrO = partition_fragment_C(mma, Shape<Int<Traits::kBlockM>, Int<Traits::kHeadDim>>{});
    clear(tOrO);
    Softmax<2> softmax(params.problem.unit.scale_log2);
    DecodeMainloop<Traits>::run(params, work.task, reinterpret_cast<Element*>(smem_bytes), rows,
                                group, thread, tOrO, softmax);
    DecodeEpilogue<Traits> const epilogue(params, work.task, softmax.scale_log2, smem_bytes);
    __syncthreads();  // PROTECTS: no group reads its key tiles, over which results are written.
    epilogue.put(tOrO, softmax, group, thread);
    __syncthreads();  // PROTECTS: all groups' results are complete.
    epilogue.finish(work.parts);
    __syncthreads();  // PROTECTS: work has been read.
  }
}

}  // namespace flash::sm80
