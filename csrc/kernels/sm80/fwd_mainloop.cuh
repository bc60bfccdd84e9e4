#pragma once
// The forward algorithm for one query tile: O = softmax(scale Q K^T) V over the key blocks that the tile sees.
// Used by fwd_kernel.  Knows nothing of the grid.  Key blocks run right to left: the diagonal and the ragged end come first.
#include "pieces/copy.cuh"
#include "pieces/mask.cuh"
#include "pieces/softmax.cuh"
#include "sm80/fwd_traits.cuh"

namespace flash::sm80 {

template <class Traits, MaskKind kMask>
struct FwdMainloop {
  using Element = typename Traits::Element;
  using TileQ   = typename Traits::TileQ;
  using TileKV  = typename Traits::TileKV;
  using Copy    = TileCopy<Element, Traits::kBlockN, Traits::kHeadDim, Traits::kThreads>;
  using CopyQ   = TileCopy<Element, Traits::kBlockM, Traits::kHeadDim, Traits::kThreads>;
  static constexpr int kStages = Traits::kStages;

  // One head's matrices in global memory.
  struct Operands {
    Element const *q, *k, *v;
    int64_t q_row_stride, k_row_stride, v_row_stride;
  };

  // tOrO (MMA, MMA_M, MMA_N) must be zero on entry.  blocks must not be empty.
  //
  // Two schedules; in both, exponentials are issued while the tensor cores work on a product that does not need them yet.
  //   kOverlapNext   S(i) | P V(i-1) beside all of softmax(i)        P of one block more is alive: small head dimensions
  //   otherwise      S(i), maximum(i) | P V(i), its 16 keys k beside the exponentials of keys k + 16
  template <class TensorO, class Softmax_>
  CUTE_DEVICE static void run(Operands const& in, Visibility<kMask> const& see, BlockRange const& blocks, int m_block,
                              int head_dim, Element* smem, TensorO& tOrO, Softmax_& softmax) {
    int const thread = threadIdx.x, row0 = m_block * Traits::kBlockM;
    Element* const smem_k = smem + TileQ::kSize;
    Element* const smem_v = smem_k + kStages * TileKV::kSize;
    auto sQ               = TileQ::tensor(smem);

    // Loads, right to left.  V follows K by one step when it is used one step later.
    int64_t const last_row = int64_t(blocks.end - 1) * Traits::kBlockN;
    int const rows_left    = see.seqlen_k - int(last_row);  // of the only block that can be ragged
    Copy copy_k(in.k + last_row * in.k_row_stride, in.k_row_stride, head_dim, thread);
    Copy copy_v(in.v + last_row * in.v_row_stride, in.v_row_stride, head_dim, thread);
    auto start_k = [&](auto check_rows, int stage) {
      copy_k.template start<decltype(check_rows)::value>(TileKV::tensor(smem_k + stage * TileKV::kSize), rows_left, thread);
      copy_k.move(-Traits::kBlockN * in.k_row_stride);
    };
    auto start_v = [&](auto check_rows, int stage) {
      copy_v.template start<decltype(check_rows)::value>(TileKV::tensor(smem_v + stage * TileKV::kSize), rows_left, thread);
      copy_v.move(-Traits::kBlockN * in.v_row_stride);
    };
    CopyQ(in.q + row0 * in.q_row_stride, in.q_row_stride, head_dim, thread)
        .template start<true>(sQ, see.seqlen_q - row0, thread);
    start_k(true_type{}, 0);
    cp_async_commit();
    if constexpr (!kOverlapNext) { start_v(true_type{}, 0); }
    cp_async_commit();

    cp_async_wait<1>();
    __syncthreads();  // PROTECTS: every thread's part of Q and of the first K is in shared memory.
    auto tSrQ = Traits::OperandQ::fragments(sQ, thread);
    if constexpr (Traits::kQInRegs) { tSrQ = load_fragments<typename Traits::OperandQ>(sQ, thread); }

    typename Traits::TiledMma mma;
    auto o_rows = make_tensor(tOrO.data(), rows_columns(tOrO.layout()));
    auto tSrS   = partition_fragment_C(mma, TileS{});
    auto scores = make_tensor(tSrS.data(), rows_columns(tSrS.layout()));
    auto tSrP   = make_tensor<Element>(tSrS.layout());
    auto tOrP   = make_tensor(tSrP.data(), as_operand_a(tSrP.layout()));
    float shrink[Softmax_::kRowCount];
    int stage = 0;

    if constexpr (kOverlapNext) {
      // First block: S and its softmax, with nothing to overlap.
      if (blocks.end - 1 > blocks.first) { start_k(false_type{}, 1); }
      start_v(true_type{}, 0);
      cp_async_commit();
      multiply_scores(tSrS, tSrQ, sQ, smem_k, thread);
      mask(tSrS, see, row0, blocks.end - 1, thread);
      softmax.update(scores, shrink);
      exponentials(softmax, scores, 0, kColumns);
      round_into(tSrP, tSrS);
      stage = 1;
    }
    auto step = [&](auto masked, int n_block) {
      int const other = stage ^ 1;
      cp_async_wait<0>();
      __syncthreads();  // PROTECTS: this step's K and V have arrived, and no warp still reads the stages refilled next.
      if (n_block > blocks.first) { start_k(false_type{}, other); }
      if constexpr (kOverlapNext) {
        start_v(false_type{}, stage);
      } else {
        if (n_block > blocks.first) { start_v(false_type{}, other); }
      }
      cp_async_commit();

      multiply_scores(tSrS, tSrQ, sQ, smem_k + stage * TileKV::kSize, thread);
      if constexpr (decltype(masked)::value) { mask(tSrS, see, row0, n_block, thread); }
      bool const moved = softmax.update(scores, shrink);
      if constexpr (kOverlapNext) {
        multiply_values(tOrO, tOrP, smem_v + other * TileKV::kSize, thread, [&](int part) {
          exponentials(softmax, scores, part * kColumns / kPvParts, (part + 1) * kColumns / kPvParts);
        });
        if (moved) { softmax.rescale(o_rows, shrink); }
        round_into(tSrP, tSrS);
      } else {
        if (moved) { softmax.rescale(o_rows, shrink); }
        // Columns of a k-step: two n8 atoms, two columns each per thread.
        constexpr int kStepColumns = 4, kStepParts = Traits::kHeadDim / 16;
        exponentials(softmax, scores, 0, kStepColumns);
        round_step(tSrP, tSrS, 0);
        multiply_values(tOrO, tOrP, smem_v + stage * TileKV::kSize, thread, [&](int part) {
          int const k = part / kStepParts + 1, i = part % kStepParts;
          if (k * kStepColumns < kColumns) {
            exponentials(softmax, scores, k * kStepColumns + i * kStepColumns / kStepParts,
                         k * kStepColumns + (i + 1) * kStepColumns / kStepParts);
            if (i == kStepParts - 1) { round_step(tSrP, tSrS, k); }
          }
        });
      }
      stage = other;
    };
    int n_block = blocks.end - (kOverlapNext ? 2 : 1);
    for (; n_block >= max_of(blocks.right_begin, blocks.first); --n_block) { step(true_type{}, n_block); }
    for (; n_block >= blocks.left_end; --n_block) { step(false_type{}, n_block); }
    if constexpr (Visibility<kMask>::kHasLeft) {
      for (; n_block >= blocks.first; --n_block) { step(true_type{}, n_block); }
    }

    if constexpr (kOverlapNext) {
      cp_async_wait<0>();
      __syncthreads();  // PROTECTS: the last V has arrived.
      multiply_values(tOrO, tOrP, smem_v + (stage ^ 1) * TileKV::kSize, thread, [](int) {});
    }
  }

 private:
  using TileS                        = Shape<Int<Traits::kBlockM>, Int<Traits::kBlockN>>;
  static constexpr bool kOverlapNext = Traits::kTile.overlap_next;
  static constexpr int kColumns      = Traits::kBlockN / 4;                                // score columns per thread
  static constexpr int kPvParts      = Traits::kBlockN / 16 * (Traits::kHeadDim / 16);  // ldmatrix.x4 of one P V per warp

  // S = Q K^T
  template <class TensorS, class TensorRQ, class TensorSQ>
  CUTE_DEVICE static void multiply_scores(TensorS& tSrS, TensorRQ& tSrQ, TensorSQ const& sQ, Element* stage_k, int thread) {
    typename Traits::TiledMma mma;
    clear(tSrS);
    if constexpr (Traits::kQInRegs) {
      gemm_rs<typename Traits::OperandK>(mma, tSrS, tSrQ, TileKV::tensor(stage_k), thread);
    } else {
      gemm_ss<typename Traits::OperandQ, typename Traits::OperandK>(mma, tSrS, sQ, TileKV::tensor(stage_k), thread);
    }
  }

  // O += P V
  template <class TensorO, class TensorP, class Beside>
  CUTE_DEVICE static void multiply_values(TensorO& tOrO, TensorP& tOrP, Element* stage_v, int thread, Beside beside) {
    typename Traits::TiledMma mma;
    gemm_rs<typename Traits::OperandV>(mma, tOrO, tOrP, TileKV::transposed(stage_v), thread, beside);
  }

  template <class TensorS>
  CUTE_DEVICE static void mask(TensorS& tSrS, Visibility<kMask> const& see, int row0, int n_block, int thread) {
    mask_scores<false, typename Traits::TiledMma, TileS>(tSrS, see, row0, n_block * Traits::kBlockN, thread);
  }

  template <class Softmax_, class TensorS>
  CUTE_DEVICE static void exponentials(Softmax_& softmax, TensorS& scores, int begin, int end) {
    CUTE_UNROLL
    for (int c = begin; c < end; ++c) { softmax.exponentials(scores, c); }
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
