#pragma once
// The forward algorithm for one query tile: O = softmax(scale Q K^T) V over the key blocks that the tile sees.
// Used by fwd_kernel.  Knows nothing of the grid.  Key blocks run right to left: the diagonal and the ragged end come first.
#include "pieces/copy.cuh"
#include "pieces/dropout.cuh"
#include "pieces/head.cuh"
#include "pieces/mask.cuh"
#include "pieces/score_mod.cuh"
#include "pieces/softmax.cuh"
#include "sm80/fwd_traits.cuh"

namespace flash::sm80 {

// A block's schedule.  The products are one run of tensor core instructions, long enough for another warp's softmax; the two
// thread blocks of an SM drift into opposite phases.
//
//   softmax n+1   S -> maxima, rescaling of O, exponentials (all or the first, rounded to P); loads of K(n-1), V(n) are started
//   products n    O += P(n+1) V(n+1), beside it the other exponentials; S(n) = Q K(n)^T
//   barrier       K(n), V(n+1) have been read by all warps; K(n-1), V(n) have arrived
//
template <class Traits, MaskKind kMask, Level kLevel>
struct FwdMainloop {
  using Element = typename Traits::Element;
  using TileQ   = typename Traits::TileQ;
  using TileKV  = typename Traits::TileKV;
  using Copy    = TileCopy<Element, Traits::kBlockN, Traits::kHeadDim, Traits::kThreads>;
  using CopyQ   = TileCopy<Element, Traits::kBlockM, Traits::kHeadDim, Traits::kThreads>;
  static constexpr int kStages   = Traits::kStages;
  static constexpr bool kHasLeft = Visibility<kMask>::kHasLeft;

  // One head's matrices in global memory.
  struct Operands {
    Element const *q, *k, *v;
    int64_t q_row_stride, k_row_stride, v_row_stride;
    SavedTile const* saved;  // in shared memory; read where kLevel needs it
    uint32_t keep_below;
  };

  // tOrO (MMA, MMA_M, MMA_N) must be zero on entry.  blocks must not be empty.
  template <class TensorO, class Softmax_>
  CUTE_DEVICE static void run(Operands const& in, Visibility<kMask> const& see,
                              BlockRange const& blocks, int m_block, int head_dim, Element* smem,
                              TensorO& tOrO, Softmax_& softmax) {
    int const thread = threadIdx.x, row0 = m_block * Traits::kBlockM;
    Element* const smem_k = smem + TileQ::kSize;
    Element* const smem_v = smem_k + kStages * TileKV::kSize;
    auto sQ               = TileQ::tensor(smem);

    // Loads, right to left.  The first K and V may be ragged.
    int n_block            = blocks.end - 1;
    int64_t const last_row = int64_t(n_block) * Traits::kBlockN;
    int const rows_left    = see.seqlen_k - int(last_row);
    Copy copy_k(in.k + last_row * in.k_row_stride, in.k_row_stride, head_dim, thread);
    Copy copy_v(in.v + last_row * in.v_row_stride, in.v_row_stride, head_dim, thread);
    // Without windows known: costs no register.  With them kept where there is a register for it.
    constexpr bool kKeep = Traits::kHeadDim <= 96;
    auto const first     = [&] {
      if (!kHasLeft) { return 0; }
      return kKeep ? blocks.first : read_now(in.saved->blocks.first);
    };
    auto load_next_k = [&](int n_block, int stage, int lane) {
      if (n_block >= first()) {
        copy_k.move(-Traits::kBlockN * in.k_row_stride);
        copy_k.template start<false>(TileKV::tensor(smem_k + stage * TileKV::kSize), 0, lane);
      }
    };
    auto load_next_v = [&](int n_block, int stage, int lane) {
      if (n_block >= first()) {
        copy_v.move(-Traits::kBlockN * in.v_row_stride);
        copy_v.template start<false>(TileKV::tensor(smem_v + stage * TileKV::kSize), 0, lane);
      }
    };
    CopyQ(in.q + row0 * in.q_row_stride, in.q_row_stride, head_dim, thread)
        .template start<true>(sQ, see.seqlen_q - row0, thread);
    copy_k.template start<true>(TileKV::tensor(smem_k), rows_left, thread);
    cp_async_commit();
    copy_v.template start<true>(TileKV::tensor(smem_v), rows_left, thread);
    load_next_k(blocks.end - 2, 1, thread);
    cp_async_commit();
    cp_async_wait<1>();
    __syncthreads();  // PROTECTS: every thread's part of Q and the first K is in shared memory.

    auto tSrQ = Traits::OperandQ::fragments(sQ, thread);
    if constexpr (Traits::kQInRegs) {
      tSrQ = load_fragments<typename Traits::OperandQ>(sQ, thread);
    }
    typename Traits::TiledMma mma;
    auto o_rows       = make_tensor(tOrO.data(), rows_columns(tOrO.layout()));
    auto tSrS         = partition_fragment_C(mma, TileS{});
    auto scores       = make_tensor(tSrS.data(), rows_columns(tSrS.layout()));
    auto tSrP         = make_tensor<Element>(tSrS.layout());
    auto tOrP         = make_tensor(tSrP.data(), as_operand_a(tSrP.layout()));
    int stage         = 0;
    auto end_products = [&]() {
      cp_async_wait<0>();
      __syncthreads();  // PROTECTS: the loads started in the last softmax have arrived; no warp reads the stages refilled next.
    };
    // P of k-step k.
    auto finish_step = [&](int k, int lane) {
      if constexpr (may_have(kLevel, Level::kDropout)) {
        if (decided<kLevel>(Level::kDropout, in.saved->features.drops)) {
          drop(tSrS, kKeep ? in.saved->features.dropout : read_now(in.saved->features.dropout),
               in.keep_below, read_now(in.saved->site.block) * Traits::kBlockM,
               n_block * Traits::kBlockN, k, lane);
        }
      }
      round_step(tSrP, tSrS, k);
    };
    auto softmax_phase = [&](auto masked) {
      // Shared memory addresses that depend on the thread are worth fewer registers than they would take across steps.
      int const lane = opaque(thread);
      load_next_k(n_block - 2, stage, lane);
      load_next_v(n_block - 1, stage ^ 1, lane);
      cp_async_commit();
      auto const first_row = [&] {
        return !kHasLeft || kKeep ? opaque(row0) : read_now(in.saved->site.block) * Traits::kBlockM;
      };
      auto const see_now = [&] { return kHasLeft ? in.saved->template see<kMask>() : see; };
      if constexpr (changes_scores(kLevel)) {
        ScoreMod const mod = in.saved->features.score_mod;
        mod.template apply<kLevel, false, typename Traits::TiledMma, TileS>(
            tSrS, in.saved->site.block * Traits::kBlockM, n_block * Traits::kBlockN,
            see_now().shift(), lane);
      }
      // With kAll, where it is decided at run time, a loop of at most one round: a branch would become predicated instructions,
      // issued in every step.
      for (int round = run_time_flag(masked); round > 0; --round) {
        // The shuffle returns the thread's own index.  Unlike the index it cannot be moved out of the loop, where what follows
        // from it would be kept for the mask and spilled.
        mask_scores<false, typename Traits::TiledMma, TileS>(tSrS, see_now(), first_row(),
                                                             n_block * Traits::kBlockN,
                                                             __shfl_sync(~0u, lane, lane % 32));
      }
      // Scores after tanh may be small enough to be exponentiated as they are.
      if (!(kBounded && softmax.is_bounded())) { softmax.update(scores, o_rows); }
      CUTE_UNROLL
      for (int k = 0; k < kEarly; ++k) {
        exponentials(softmax, scores, k * kStepColumns, (k + 1) * kStepColumns);
        finish_step(k, lane);
      }
    };
    auto multiply_values = [&](int lane) {
      auto const beside = [&](int part) {
        int const k = part / kStepParts + kEarly, j = part % kStepParts;
        if (k * kStepColumns < kColumns) {
          exponentials(softmax, scores, k * kStepColumns + j * kStepColumns / kStepParts,
                       k * kStepColumns + (j + 1) * kStepColumns / kStepParts);
          if (j == kStepParts - 1) { finish_step(k, lane); }
        }
      };
      gemm_rs<typename Traits::OperandV>(
          mma, tOrO, tOrP, TileKV::transposed(smem_v + stage * TileKV::kSize), lane, beside);
    };
    // O += P V of this block, then S of the next one.
    auto product_phase = [&]() {
      int const lane = opaque(thread), other = stage ^ 1;
      multiply_values(lane);
      --n_block;
      multiply_scores(tSrS, tSrQ, sQ, smem_k + other * TileKV::kSize, lane);
      end_products();
      stage = other;
    };
    if (kBounded && softmax.is_bounded()) { softmax.start_bounded(); }
    // The compiler moves arithmetic across barriers but not across the ends of a loop's body: each body ends with the softmax.
    multiply_scores(tSrS, tSrQ, sQ, smem_k, thread);
    end_products();
    if constexpr (kOneBody) {
      while (true) {
        softmax_phase(in.saved->blocks.needs_mask(n_block));
        multiply_values(opaque(thread));
        if (n_block == first()) { return; }
        stage ^= 1;
        --n_block;
        multiply_scores(tSrS, tSrQ, sQ, smem_k + stage * TileKV::kSize, opaque(thread));
        end_products();
      }
    } else {
      if constexpr (kHasLeft) {  // masked at both ends
        if constexpr (!kFirstInLoop) { softmax_phase(true_type{}); }
        while (kFirstInLoop || n_block > first()) {
          if constexpr (!kFirstInLoop) { product_phase(); }
          if (read_now(in.saved->blocks).needs_mask(n_block)) {
            softmax_phase(true_type{});
          } else {
            softmax_phase(false_type{});
          }
          if constexpr (kFirstInLoop) {
            if (n_block == first()) { break; }
            product_phase();
          }
        }
      } else {
        softmax_phase(true_type{});
        if constexpr (Visibility<kMask>::kHasRight) {
          while (n_block > max_of(blocks.right_begin, first())) {
            product_phase();
            softmax_phase(true_type{});
          }
        }
        while (n_block > first()) {
          product_phase();
          softmax_phase(false_type{});
        }
      }
    }
    multiply_values(opaque(thread));
  }

 private:
  using TileS                   = Shape<Int<Traits::kBlockM>, Int<Traits::kBlockN>>;
  static constexpr int kColumns = Traits::kBlockN / 4;  // score columns per thread
  // A k-step of P V: 16 keys, that is two n8 atoms of S with two columns each per thread; one ldmatrix.x4 per 16 of head_dim.
  static constexpr int kStepColumns = 4, kStepParts = Traits::kHeadDim / 16;
  static constexpr int kEarly = early_steps(Traits::kTile, Traits::kHeadDim, kLevel);
  // Whether the first block's softmax shares the loop's instructions: with it head dimensions 96 and 128 need fewer registers, 64
  // and 256 more.
  static constexpr bool kFirstInLoop = Traits::kHeadDim == 96 || Traits::kHeadDim == 128;
  // Steps with and without mask share their instructions.
  static constexpr bool kOneBody = kLevel == Level::kAll;
  static constexpr bool kBounded = kLevel == Level::kSoftcap && Traits::kHeadDim <= 64 &&
                                   std::is_same_v<Element, cutlass::bfloat16_t>;

  CUTE_DEVICE static constexpr int run_time_flag(true_type) { return 1; }
  CUTE_DEVICE static constexpr int run_time_flag(false_type) { return 0; }
  CUTE_DEVICE static int run_time_flag(bool flag) { return opaque(int(flag)); }

  template <class Softmax_, class TensorS>
  CUTE_DEVICE static void exponentials(Softmax_& softmax, TensorS& scores, int begin, int end) {
    CUTE_UNROLL
    for (int c = begin; c < end; ++c) { softmax.exponentials(scores, c); }
  }

  // S = Q K^T
  template <class TensorS, class TensorRQ, class TensorSQ>
  CUTE_DEVICE static void multiply_scores(TensorS& tSrS, TensorRQ& tSrQ, TensorSQ const& sQ,
                                          Element* stage_k, int thread) {
    typename Traits::TiledMma mma;
    clear(tSrS);
    if constexpr (Traits::kQInRegs) {
      gemm_rs<typename Traits::OperandK>(mma, tSrS, tSrQ, TileKV::tensor(stage_k), thread);
    } else {
      gemm_ss<typename Traits::OperandQ, typename Traits::OperandK>(
          mma, tSrS, sQ, TileKV::tensor(stage_k), thread);
    }
  }

  // Drops weights of k-step k: 16 keys, in 16 x 16 blocks of which this lane holds eight weights.
  template <class TensorS>
  CUTE_DEVICE static void drop(TensorS& tSrS, DropoutBits const& bits, uint32_t keep_below,
                               int row0, int col0, int k, int thread) {
    CUTE_UNROLL
    for (int m = 0; m < size<1>(tSrS); ++m) {
      int const row16 = (row0 + m * 16 * Traits::kWarps) / 16 + thread / 32;
      Random4 const r = bits.block(row16, col0 / 16 + k, thread % 32);
      CUTE_UNROLL
      for (int i = 0; i < 4; ++i) {  // word i: row half i % 2, column half i / 2
        float& low  = tSrS(i % 2 * 2, m, 2 * k + i / 2);
        float& high = tSrS(i % 2 * 2 + 1, m, 2 * k + i / 2);
        low         = keeps_low(r.word[i], keep_below) ? low : 0.f;
        high        = keeps_high(r.word[i], keep_below) ? high : 0.f;
      }
    }
  }

  // Rounds the scores of k-step k: n8 atoms 2k and 2k + 1.
  template <class TensorP, class TensorS>
  CUTE_DEVICE static void round_step(TensorP& tSrP, TensorS const& tSrS, int k) {
    CUTE_UNROLL
    for (int n = 2 * k; n < 2 * k + 2; ++n) {
      CUTE_UNROLL
      for (int m = 0; m < size<1>(tSrS); ++m) {
        auto target = tSrP(_, m, n);
        round_into(target, tSrS(_, m, n));
      }
    }
  }
};

}  // namespace flash::sm80
