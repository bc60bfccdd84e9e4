#pragma once
// The backward algorithm for one key tile: dK and dV of its keys over all query blocks (and query heads) that see them, and
// its share of dQ.  Used by bwd_kernel.  No product is split between warps along its summation.
#include "pieces/copy.cuh"
#include "pieces/dq_accum.cuh"
#include "pieces/head.cuh"
#include "pieces/mask.cuh"
#include "pieces/softmax.cuh"
#include "pieces/store.cuh"
#include "sm80/bwd_traits.cuh"

namespace flash::sm80 {

template <class Traits, MaskKind kMask>
struct BwdMainloop {
  using Element = typename Traits::Element;
  using TileQ   = typename Traits::TileQ;
  using TileK   = typename Traits::TileK;
  using TileS   = typename Traits::TileS;
  using CopyQ   = TileCopy<Element, Traits::kBlockM, Traits::kHeadDim, Traits::kThreads>;
  using CopyK   = TileCopy<Element, Traits::kBlockN, Traits::kHeadDim, Traits::kThreads>;
  using TileSdp = Shape<Int<Traits::kBlockN>, Int<Traits::kSubM>>;
  static constexpr int kBlockM = Traits::kBlockM, kBlockN = Traits::kBlockN, kSubM = Traits::kSubM;
  static constexpr int kRowValues = 2 * kBlockM;  // LSE and delta of a query block

  // Matrices of the key head and of the first query head that shares it.
  struct Operands {
    Element const *q, *dout, *k, *v;
    int first_head;  // batch * heads_q + that query head: its place in the workspace
    int heads;       // query heads that share the key head
  };

  // tdKrdK, tdVrdV must be zero on entry; dK is still to be multiplied by softmax_scale.  blocks must not be empty.
  template <class TensorK>
  CUTE_DEVICE static void run(BwdParams const& params, Operands const& in,
                              Visibility<kMask> const& see, BlockRange const& blocks, int n_block,
                              Element* smem, TensorK& tdKrdK, TensorK& tdVrdV) {
    int const thread = threadIdx.x, col0 = n_block * kBlockN, head_dim = params.problem.head_dim;
    int const m_blocks = ceil_div(see.seqlen_q, kBlockM), keys_left = see.seqlen_k - col0;
    float const scale_log2 = fmaxf(params.problem.scale * kLog2E, kMinScaleLog2);
    auto sK                = TileK::tensor(smem);
    auto sV                = TileK::tensor(smem + TileK::kSize);
    Element* const smem_q  = smem + 2 * TileK::kSize;
    Element* const smem_s  = smem_q + Traits::kStages * 2 * TileQ::kSize;
    auto sdS               = TileS::tensor(smem_s);
    auto sP                = TileS::tensor(smem_s + (Traits::kPInRegs ? 0 : TileS::kSize));
    float* const smem_rows = reinterpret_cast<float*>(smem + Traits::kTileElements);

    // Loads: K and V once, then a stage of Q, dO, LSE and delta per query block
    int64_t const q_stride = params.q.row_stride, dout_stride = params.dout.row_stride;
    CopyQ copy_q(in.q + blocks.first * kBlockM * q_stride, q_stride, head_dim, thread);
    CopyQ copy_dout(in.dout + blocks.first * kBlockM * dout_stride, dout_stride, head_dim, thread);
    // index: of the query block in the workspace; lane: the thread's index
    auto start_stage = [&](int stage, int index, int m_block, int lane) {
      Element* const stage_q = smem_q + stage * 2 * TileQ::kSize;
      int const rows_left    = see.seqlen_q - m_block * kBlockM;
      copy_q.template start<true>(TileQ::tensor(stage_q), rows_left, thread);
      copy_dout.template start<true>(TileQ::tensor(stage_q + TileQ::kSize), rows_left, thread);
      if (lane < kRowValues / 4) {
        cp_async_16(smem_rows + stage * kRowValues + lane * 4,
                    params.workspace.rows + int64_t(index) * kRowValues + lane * 4, true);
      }
    };
    CopyK(in.k + col0 * params.k.row_stride, params.k.row_stride, head_dim, thread)
        .template start<true>(sK, keys_left, thread);
    CopyK(in.v + col0 * params.v.row_stride, params.v.row_stride, head_dim, thread)
        .template start<true>(sV, keys_left, thread);
    // Query blocks left to right, then the next head that shares the keys.
    int m_block = blocks.first, heads_left = in.heads,
        index = in.first_head * m_blocks + blocks.first;
    start_stage(0, index, m_block, thread);
    cp_async_commit();

    for (int stage = 0; heads_left > 0; stage ^= 1) {
      // Shared memory addresses that depend on the thread are worth fewer registers than they would take across iterations.
      int const lane = opaque(thread);
      cp_async_wait<0>();
      __syncthreads();  // PROTECTS: this stage has arrived; all warps are done with the other stage and with dS^T, P^T.
      bool const new_head  = m_block + 1 == blocks.end;
      int const next_block = new_head ? blocks.first : m_block + 1;
      int const next_index = index + (new_head ? m_blocks : 0) + next_block - m_block;
      if (!(new_head && heads_left == 1)) {
        int64_t const rows = int64_t(next_block - m_block) * kBlockM;
        copy_q.move(rows * q_stride + (new_head ? params.q.head_stride : 0));
        copy_dout.move(rows * dout_stride + (new_head ? params.dout.head_stride : 0));
        start_stage(stage ^ 1, next_index, next_block, lane);
      }
      cp_async_commit();

      Element* const stage_q   = smem_q + stage * 2 * TileQ::kSize;
      float const* const sRows = smem_rows + stage * kRowValues;
      // Keys beyond seqlen_k are the mask's too: K is zero there, and exp2(0 - LSE) may overflow.
      int const first_key = opaque(col0);
      // Queries beyond seqlen_q need no mask, their LSE is +inf and P zero; head dimension 256 masks them all the same, because
      // the kernel without that test spills.
      constexpr bool kAskRange = kMask != MaskKind::kNone || Traits::kHeadDim == 256;
      bool const masked =
          (kAskRange && blocks.needs_mask(m_block)) || see.seqlen_k - first_key < kBlockN;
      typename Traits::MmaSdp mma_sdp;
      typename Traits::MmaDkv mma_dkv;
      CUTE_UNROLL
      for (int sub = 0; sub < kBlockM / kSubM; ++sub) {
        auto sQ  = local_tile(TileQ::tensor(stage_q), Shape<Int<kSubM>, Int<Traits::kHeadDim>>{},
                              make_coord(sub, _0{}));
        auto sdO = local_tile(TileQ::tensor(stage_q + TileQ::kSize),
                              Shape<Int<kSubM>, Int<Traits::kHeadDim>>{}, make_coord(sub, _0{}));

        // P^T
        auto tSrS = partition_fragment_C(mma_sdp, TileSdp{});
        clear(tSrS);
        gemm_ss<typename Traits::OperandK, typename Traits::OperandQ>(mma_sdp, tSrS, sK, sQ, lane);
        if (masked) {
          mask_scores<true, typename Traits::MmaSdp, TileSdp>(
              tSrS, see, m_block * kBlockM + sub * kSubM, first_key, lane);
        }
        auto scores            = make_tensor(tSrS.data(), rows_columns(tSrS.layout()));
        constexpr int kQueries = decltype(size<1>(scores))::value;  // of this thread
        float lse[kQueries];
        load_lse(scores, lse, sRows + sub * kSubM, scale_log2, lane);

        // dP^T, beside it the exponentials
        auto tSrdP = partition_fragment_C(mma_sdp, TileSdp{});
        clear(tSrdP);
        gemm_ss<typename Traits::OperandK, typename Traits::OperandQ>(
            mma_sdp, tSrdP, sV, sdO, lane, [&](int part) {
              exponentials(scores, lse, scale_log2, part * kQueries / kDpParts,
                           (part + 1) * kQueries / kDpParts);
            });
        auto tSrP = round_to<Element>(tSrS);
        if constexpr (!Traits::kPInRegs) {
          fragment_to_smem<typename Traits::MmaSdp>(tSrP, sP, lane);
        }

        // dS^T
        score_gradients(tSrdP, tSrS, sRows + kBlockM + sub * kSubM, lane);
        auto tSrdS = round_to<Element>(tSrdP);
        fragment_to_smem<typename Traits::MmaSdp>(
            tSrdS, local_tile(sdS, TileSdp{}, make_coord(_0{}, sub)), lane);

        if constexpr (Traits::kPInRegs) {  // dV += P^T dO, dK += dS^T Q without a barrier
          auto sdOt = local_tile(TileQ::transposed(stage_q + TileQ::kSize),
                                 Shape<Int<Traits::kHeadDim>, Int<kSubM>>{}, make_coord(_0{}, sub));
          auto sQt  = local_tile(TileQ::transposed(stage_q),
                                 Shape<Int<Traits::kHeadDim>, Int<kSubM>>{}, make_coord(_0{}, sub));
          auto tdVrP  = make_tensor(tSrP.data(), as_operand_a(tSrP.layout()));
          auto tdKrdS = make_tensor(tSrdS.data(), as_operand_a(tSrdS.layout()));
          gemm_rs<typename Traits::OperandQt>(mma_dkv, tdVrdV, tdVrP, sdOt, lane);
          gemm_rs<typename Traits::OperandQt>(mma_dkv, tdKrdK, tdKrdS, sQt, lane);
        }
      }
      __syncthreads();  // PROTECTS: dS^T (and P^T) of all warps are in shared memory.

      if constexpr (!Traits::kPInRegs) {  // dV += P^T dO
        gemm_ss<typename Traits::OperandPt, typename Traits::OperandQt>(
            mma_dkv, tdVrdV, sP, TileQ::transposed(stage_q + TileQ::kSize), lane);
      }
      // dQ += dS K
      auto tdQrdQ = partition_fragment_C(typename Traits::MmaDq{},
                                         Shape<Int<kBlockM>, Int<Traits::kHeadDim>>{});
      clear(tdQrdQ);
      gemm_ss<typename Traits::OperandDs, typename Traits::OperandKt>(
          typename Traits::MmaDq{}, tdQrdQ, TileS::transposed(smem_s), TileK::transposed(smem),
          lane);
      int* const turns = params.workspace.dq_turn;
      add_to_dq<Traits::kThreads>(
          params.workspace.dq_accum + int64_t(index) * Traits::kDqElements, tdQrdQ,
          turns ? turns + index : nullptr,
          first_key / kBlockN - key_blocks<kBlockM, kBlockN>(see, m_block).first, lane);
      if constexpr (!Traits::kPInRegs) {  // dK += dS^T Q
        gemm_ss<typename Traits::OperandPt, typename Traits::OperandQt>(
            mma_dkv, tdKrdK, sdS, TileQ::transposed(stage_q), lane);
      }
      heads_left -= new_head;
      m_block = next_block, index = next_index;
    }
  }

 private:
  // Queries (columns) of this thread's scores, for reading per-query values.
  CUTE_DEVICE static auto coordinates(int thread) {
    auto tScS =
        typename Traits::MmaSdp{}.get_slice(thread).partition_C(make_identity_tensor(TileSdp{}));
    return make_tensor(tScS.data(), rows_columns(tScS.layout()));
  }

  // ldmatrix.x4 of Q (or dO) in one S^T (or dP^T) per warp.
  static constexpr int kDpParts =
      kSubM / (16 * (Traits::kWarps / Traits::kTile.sdp_keys)) * (Traits::kHeadDim / 16);

  // LSE of this thread's queries, in base 2.
  template <class TensorS, int kQueries>
  CUTE_DEVICE static void load_lse(TensorS& scores, float (&lse)[kQueries], float const* sLse,
                                   float scale_log2, int thread) {
    auto where    = coordinates(thread);
    float largest = 0.f;
    CUTE_UNROLL
    for (int c = 0; c < kQueries; ++c) {
      lse[c]  = sLse[get<1>(where(0, c))];
      largest = fmaxf(largest, fabsf(lse[c]));
    }
    if (__any_sync(~0u, largest > kLargeLog2)) {
      // LSE is rounded so coarsely that exp2 could overflow where P is 1.
      CUTE_UNROLL
      for (int c = 0; c < kQueries; ++c) {
        CUTE_UNROLL
        for (int r = 0; r < size<0>(scores); ++r) {
          scores(r, c) = fminf(scores(r, c), lse[c] / scale_log2);
        }
      }
    }
  }

  // Queries [begin, end) of S^T become P^T = exp2(S^T scale_log2 - LSE).
  template <class TensorS, int kQueries>
  CUTE_DEVICE static void exponentials(TensorS& scores, float const (&lse)[kQueries],
                                       float scale_log2, int begin, int end) {
    CUTE_UNROLL
    for (int c = begin; c < end; ++c) {
      CUTE_UNROLL
      for (int r = 0; r < size<0>(scores); ++r) {
        scores(r, c) = exp2_approx(fmaf(scores(r, c), scale_log2, -lse[c]));
      }
    }
  }

  // dP^T becomes dS^T = P^T (dP^T - delta).
  template <class TensorS>
  CUTE_DEVICE static void score_gradients(TensorS& tSrdP, TensorS const& tSrP, float const* sDelta,
                                          int thread) {
    auto gradients = make_tensor(tSrdP.data(), rows_columns(tSrdP.layout()));
    auto p         = make_tensor(tSrP.data(), rows_columns(tSrP.layout()));
    auto where     = coordinates(thread);
    CUTE_UNROLL
    for (int c = 0; c < size<1>(gradients); ++c) {
      float const delta = sDelta[get<1>(where(0, c))];
      CUTE_UNROLL
      for (int r = 0; r < size<0>(gradients); ++r) {
        gradients(r, c) = p(r, c) * (gradients(r, c) - delta);
      }
    }
  }
};

}  // namespace flash::sm80
