#pragma once
// The decoding algorithm for one query tile and a run of its key tiles: O, and the state of each row's softmax.
// Used by decode_kernel.  Knows nothing of splits.  Narrow tiles: every warp is a group that goes through key tiles of its own
// without waiting for the others; wide tiles: the thread block is one group.
#include "pieces/address.cuh"
#include "pieces/compiler.cuh"
#include "pieces/dependent.cuh"
#include "pieces/mask.cuh"
#include "pieces/score.cuh"
#include "pieces/softmax.cuh"
#include "sm80/decode/plan.h"
#include "sm80/decode/traits.cuh"
#include "sm80/instructions/fragment.cuh"

namespace flash::sm80 {

// What one thread block works on.
struct DecodeTask {
  int batch, head_kv, m_block;
  CacheSequence sequence;
  KeyRange range;
  int tile_begin, tile_end;  // of range, this thread block's
};

template <class Traits>
struct DecodeMainloop {
  using Element                = typename Traits::Element;
  using TileQ                  = typename Traits::TileQ;
  using TileKV                 = typename Traits::TileKV;
  using Copy                   = typename Traits::Copy;
  using TiledMma               = typename Traits::TiledMma;
  using TileS                  = Shape<Int<Traits::kBlockM>, Int<Traits::kTileN>>;
  static constexpr int kStages = Traits::kStages, kTileN = Traits::kTileN;
  static constexpr int kRows = 2;  // per thread: one 16-row MMA tile per warp

  // What a row's scores need: the rows of the cache that its query sees, and ALiBi.  In shared memory, read where a tile needs it.
  struct __align__(16) Row {
    int first, end;
    float slope, position;  // of the query, in rows of the cache
  };

  // tOrO (MMA, 1, MMA_N) must be zero on entry.  thread: in the group.
  template <class TensorO, class Softmax_>
  CUTE_DEVICE static void run(DecodeKernelParams const& params, DecodeTask const& task,
                              Element* smem, Row* rows, int group, int thread, TensorO& tOrO,
                              Softmax_& softmax) {
    Problem const& problem = params.problem;
    int const head_dim     = problem.head_dim;
    Element* const stages  = smem + TileQ::kSize + group * Traits::kStages * Traits::kStageSize;
    Copy copy(params.cache, task.batch, task.head_kv, task.range.first, task.range.end,
              task.tile_begin * Traits::kBlockN + group * kTileN, thread);
    auto const load = [&](int stage) {
      Element* const smem_k = stages + stage * Traits::kStageSize;
      copy.template start<TileKV>(smem_k, smem_k + TileKV::kSize, head_dim, thread);
    };

    // New rows, and rotated queries, are there when kv_update has ended.
    int const count = task.tile_end - task.tile_begin;
    if ((task.tile_begin + 1) * Traits::kBlockN > first_new_row(params, task.sequence)) {
      wait_for_previous_kernel();
    }
    load(0);
    wait_for_previous_kernel();
    load_q(params, task, smem);
    cp_async_commit();
    CUTE_UNROLL
    for (int i = 1; i < kStages - 1; ++i) {
      if (i < count) { load(i); }
      cp_async_commit();
    }
    find_rows(params, task, rows);
    cp_async_wait<kStages - 2>();
    __syncthreads();  // PROTECTS: every thread's part of Q and rows is in shared memory.

    auto sQ   = TileQ::tensor(smem);
    auto tSrQ = Traits::OperandQ::fragments(sQ, thread);
    if constexpr (Traits::kQInRegs) {
      tSrQ = load_fragments<typename Traits::OperandQ>(sQ, thread);
    }
    TiledMma mma;
    auto o_rows = rows_of(tOrO);
    auto tSrS   = partition_fragment_C(mma, TileS{});
    auto scores = rows_of(tSrS);
    int stage   = 0;
    for (int n = task.tile_begin; n < task.tile_end; ++n) {
      cp_async_wait<kStages - 2>();
      sync_group();  // PROTECTS: tile n has arrived from all threads of the group, and none reads tile n - 1, whose stage is refilled.
      if (n + kStages - 1 < task.tile_end) { load(stage == 0 ? kStages - 1 : stage - 1); }
      cp_async_commit();

      Element* const smem_k = stages + stage * Traits::kStageSize;
      // Addresses that depend on the thread are computed in each round: kept, they were spilled.
      int const lane = opaque(thread);
      clear(tSrS);
      if constexpr (Traits::kQInRegs) {
        gemm_rs<typename Traits::OperandK>(mma, tSrS, tSrQ, TileKV::tensor(smem_k), lane);
      } else {
        gemm_ss<typename Traits::OperandQ, typename Traits::OperandK>(mma, tSrS, sQ,
                                                                      TileKV::tensor(smem_k), lane);
      }
      int const row0 = n * Traits::kBlockN + group * kTileN;
      modify(problem, rows, row0, lane, scores);
      if (row0 < task.range.all_first || row0 + kTileN > task.range.all_end) {
        mask(rows, row0, lane, scores);
      }
      softmax.update(scores, o_rows);
      CUTE_UNROLL
      for (int c = 0; c < size<1>(scores); ++c) { softmax.exponentials(scores, c); }
      auto tSrP = round_to<Element>(tSrS);
      auto tOrP = operand_a_of(tSrP);
      gemm_rs<typename Traits::OperandV>(mma, tOrO, tOrP,
                                         TileKV::transposed(smem_k + TileKV::kSize), lane);
      stage = stage + 1 == kStages ? 0 : stage + 1;
    }
    cp_async_wait<0>();
  }

  // Brings the task's first key tiles into L2.  Only for a cache without pages and entries.
  CUTE_DEVICE static void prefetch(DecodeKernelParams const& params, DecodeTask const& task) {
    constexpr int kLine = 128 / sizeof(Element), kLines = ceil_div(Traits::kHeadDim, kLine);
    KvCache const& cache = params.cache;
    int const row0       = task.tile_begin * Traits::kBlockN;
    int const end        = min_of(task.range.end, task.tile_end * Traits::kBlockN);
    int const rows       = min_of(end - row0, (kStages - 1) * Traits::kBlockN);
#pragma unroll 1
    for (int i = opaque(threadIdx.x); i < rows * kLines; i += Traits::kThreads) {
      int64_t const row = row0 + i / kLines;
      int const column  = i % kLines * kLine;
      if (row < task.range.first || column >= params.problem.head_dim) { continue; }
      prefetch_l2(matrix_of<Element const>(cache.k, task.batch, task.head_kv) +
                  row * cache.k.row_stride + column);
      prefetch_l2(matrix_of<Element const>(cache.v, task.batch, task.head_kv) +
                  row * cache.v.row_stride + column);
    }
  }

  // First row of this thread's fragments in the tile; the second is 8 below.
  CUTE_DEVICE static int fragment_row(int thread) { return thread / 32 * 16 + thread % 32 / 4; }

 private:
  CUTE_DEVICE static void prefetch_l2(Element const* address) {
    asm volatile("prefetch.global.L2 [%0];" ::"l"(address));
  }

  CUTE_DEVICE static void sync_group() {
    if constexpr (Traits::kGroupWarps == 1) {
      __syncwarp();
    } else {
      static_assert(Traits::kGroups == 1, "one barrier for the thread block");
      __syncthreads();
    }
  }

  // Row of the cache from which on kv_update may have written.
  CUTE_DEVICE static int first_new_row(DecodeKernelParams const& params,
                                       CacheSequence const& sequence) {
    int const added = params.cache.seqlen_new;
    return sequence.pad + sequence.seqlen_k - (added == kAsQueries ? sequence.seqlen_q : added);
  }

  // Rows of the tile that are not rows of the sequence become zeros.
  CUTE_DEVICE static void load_q(DecodeKernelParams const& params, DecodeTask const& task,
                                 Element* smem) {
    Problem const& problem = params.problem;
    int const group        = params.plan.group;
    int const rows         = task.sequence.seqlen_q * group - task.m_block * Traits::kBlockM;
    Element const* const q = matrix_of<Element const>(params.q, task.batch, task.head_kv * group) +
                             task.sequence.q_row0 * params.q.row_stride;
    auto sQ                = TileQ::tensor(smem);
    constexpr int kChunks  = Traits::kHeadDim / 8;
    for (int i = threadIdx.x; i < Traits::kBlockM * kChunks; i += Traits::kThreads) {
      int const row = i / kChunks, column = i % kChunks * 8;
      int const packed  = task.m_block * Traits::kBlockM + row;
      bool const exists = row < rows && column < problem.head_dim;
      int const query   = exists ? row_query(packed, group) : 0;
      int const head    = exists ? packed - query * group : 0;
      cp_async_16(
          &sQ(row, column),
          q + query * params.q.row_stride + head * params.q.head_stride + (exists ? column : 0),
          exists);
    }
  }

  CUTE_DEVICE static void find_rows(DecodeKernelParams const& params, DecodeTask const& task,
                                    Row* rows) {
    Problem const& problem        = params.problem;
    CacheSequence const& sequence = task.sequence;
    Visibility<MaskKind::kLocal> const see{sequence.seqlen_q, sequence.seqlen_k,
                                           problem.window_left, problem.window_right};
    int const group = params.plan.group, row = threadIdx.x;
    if (row >= Traits::kBlockM) { return; }
    // Rows beyond the last are like it.
    int const packed = min_of(task.m_block * Traits::kBlockM + row, sequence.seqlen_q * group - 1);
    int const query  = row_query(packed, group),
              head   = task.head_kv * group + packed - query * group;
    rows[row]        = {sequence.pad + see.first_key(query), sequence.pad + see.end_key(query),
                        score_mod(problem, task.batch, head).slope,
                        float(sequence.pad + query + see.shift())};
  }
  CUTE_DEVICE static Row row_now(Row const* rows, int thread, int r) {
    Row const& row = rows[fragment_row(thread) + 8 * r];
    return {read_now(row.first), read_now(row.end), read_now(row.slope), read_now(row.position)};
  }

  // f(row, its score, row of the cache)
  template <class TensorS, class Function>
  CUTE_DEVICE static void for_scores(Row const* rows, int row0, int thread, TensorS& scores,
                                     Function f) {
    auto tScS         = tile_coordinates<TiledMma, TileS>(thread);
    auto t0ScS        = tile_coordinates<TiledMma, TileS>(_0{});
    auto columns      = rows_of(t0ScS);
    int const column0 = row0 + int(get<1>(tScS(_0{})));
    CUTE_UNROLL
    for (int r = 0; r < kRows; ++r) {
      Row const row = row_now(rows, thread, r);
      CUTE_UNROLL
      for (int c = 0; c < size<1>(scores); ++c) {
        f(row, scores(r, c), column0 + int(get<1>(columns(r, c))));
      }
    }
  }

  template <class TensorS>
  CUTE_DEVICE static void modify(Problem const& problem, Row const* rows, int row0, int thread,
                                 TensorS& scores) {
    bool const capped = problem.softcap > 0.f;
    if (!capped && !problem.alibi_slopes) { return; }
    for_scores(rows, row0, thread, scores, [&](Row const& row, float& score, int key) {
      ScoreMod const mod{problem.unit.inner, row.slope, capped, true};
      score = mod.changed(score, fabsf(row.position - float(key)));
    });
  }

  template <class TensorS>
  CUTE_DEVICE static void mask(Row const* rows, int row0, int thread, TensorS& scores) {
    for_scores(rows, row0, thread, scores, [](Row const& row, float& score, int key) {
      hide_outside<true, true>(score, key, row.first, row.end);
    });
  }
};

}  // namespace flash::sm80
