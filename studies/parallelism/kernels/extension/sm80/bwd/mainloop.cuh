#pragma once
// The backward algorithm for one key tile: dK and dV of its keys over all query blocks (and query heads) that see them, and
// its share of dQ.  Used by bwd_kernel.  No product is split between warps along its summation.
#include "common/bwd_workspace.h"
#include "pieces/address.cuh"
#include "pieces/compiler.cuh"
#include "pieces/dependent.cuh"
#include "pieces/features.cuh"
#include "pieces/mask.cuh"
#include "pieces/score_mod.cuh"
#include "pieces/softmax.cuh"
#include "sm80/bwd/scores.cuh"
#include "sm80/bwd/weights.cuh"
#include "sm80/instructions/copy.cuh"
#include "sm80/instructions/dq_accum.cuh"
#include "sm80/instructions/fragment.cuh"
#include "sm80/instructions/store.cuh"
#include "sm80/loop_forms.h"

namespace flash::sm80 {

template <class Traits, MaskKind kMask, Level kLevel>
struct BwdMainloop {
  using Element = typename Traits::Element;
  using TileQ   = typename Traits::TileQ;
  using TileK   = typename Traits::TileK;
  using TileS   = typename Traits::TileS;
  using CopyQ   = TileCopy<Element, Traits::kBlockM, Traits::kHeadDim, Traits::kThreads>;
  using CopyK   = TileCopy<Element, Traits::kBlockN, Traits::kHeadDim, Traits::kThreads>;
  using Scores  = BwdScores<Traits, kLevel>;
  using TileSdp = typename Scores::TileSdp;
  static constexpr int kBlockM = Traits::kBlockM, kBlockN = Traits::kBlockN, kSubM = Traits::kSubM;
  static constexpr int kRowValues = 2 * kBlockM;  // LSE and delta of a query block
  static constexpr BwdForm kForm  = bwd_form(Traits::kHeadDim, kMask, kLevel);
  // Blocks that cross a window's edge seldom cross both: each is masked by itself, and LSE is read before.
  static constexpr bool kByEdge = kForm.by_edge;
  // The next Q and dO arrive where this block's are, beside its dQ; otherwise in the other stage, beside the whole step.
  static constexpr bool kOneStage = Traits::kStages == 1;

  // Matrices of the key head and of the first query head that shares it.
  struct Operands {
    Element const *q, *dout, *k, *v;
    SavedTile const* saved;  // in shared memory; its random bits are the first query head's
  };

  // dK is still to be multiplied by softmax_scale.  blocks must not be empty.
  template <class TensorK>
  CUTE_DEVICE static void run(BwdKernelParams const& params, Operands const& in,
                              Visibility<kMask> const& see, BlockRange const& blocks, int n_block,
                              Element* smem, TensorK& tdKrdK, TensorK& tdVrdV) {
    int const thread = threadIdx.x, col0 = n_block * kBlockN, head_dim = params.problem.head_dim;
    int const keys_left = see.seqlen_k - col0, unseen = see.first_seen() - col0;
    auto sK                = TileK::tensor(smem);
    auto sV                = TileK::tensor(smem + TileK::kSize);
    Element* const smem_q  = smem + 2 * TileK::kSize;
    Element* const smem_s  = smem_q + Traits::kStages * 2 * TileQ::kSize;
    auto sdS               = TileS::tensor(smem_s);
    auto sP                = TileS::tensor(smem_s + (Traits::kPInRegs ? 0 : TileS::kSize));
    float* const smem_rows = reinterpret_cast<float*>(smem + Traits::kTileElements);

    // Per tile, of the loop: in registers where there are enough, otherwise read from shared memory where it is needed.
    constexpr bool kKeep   = kIsSm90OrNewer && kForm.keeps_tile;
    SavedTile const& saved = *in.saved;
    auto const range       = [&] { return kKeep ? blocks : read_now(saved.blocks); };
    auto const see_now     = [&] { return kKeep ? see : saved.template see<kMask>(); };
    // Queries that see no key, and keys that no query sees, are loaded as zeros: 0 * NaN is NaN.
    constexpr bool kHasBlind  = Visibility<kMask>::kHasRight;
    constexpr bool kHasUnseen = Visibility<kMask>::kHasLeft;
    auto const first_seeing   = [&] {
      return !kHasBlind ? 0 : kKeep ? see.first_seeing() : read_now(saved.first_seeing);
    };

    // Loads: K and V once, then a stage of Q, dO, LSE and delta per query block
    int64_t const q_stride = params.q.row_stride, dout_stride = params.dout.row_stride;
    CopyQ copy_q(in.q + blocks.first * kBlockM * q_stride, q_stride, head_dim, thread);
    CopyQ copy_dout(in.dout + blocks.first * kBlockM * dout_stride, dout_stride, head_dim, thread);
    // Of a query block in the workspace.
    auto const index = [&](int head, int m_block) {
      return read_now(saved.first_index) + head * read_now(saved.slots) + m_block;
    };
    // lane: the thread's index
    auto start_rows = [&](int stage, int head, int m_block, int lane) {
      if (lane < kRowValues / 4) {
        cp_async_16(smem_rows + stage * kRowValues + lane * 4,
                    params.workspace.rows + int64_t(index(head, m_block)) * kRowValues + lane * 4,
                    true);
      }
    };
    auto start_tiles = [&](int stage, int head, int m_block, int lane) {
      Element* const stage_q = smem_q + stage * 2 * TileQ::kSize;
      int const rows_left =
          (kKeep ? see.seqlen_q : read_now(in.saved->site.seqlen_q)) - m_block * kBlockM;
      int const blind = first_seeing() - m_block * kBlockM;
      if constexpr (!kKeep) {
        int const query_head = read_now(saved.head) * read_now(saved.group) + head;
        int64_t const row    = read_now(saved.site.q_row0) + m_block * kBlockM;
        int const batch      = read_now(saved.site.batch);
        copy_q.next = CopyQ(matrix_of<Element>(params.q, batch, query_head) + row * q_stride,
                            q_stride, head_dim, lane)
                          .next;
        copy_dout.next =
            CopyQ(matrix_of<Element>(params.dout, batch, query_head) + row * dout_stride,
                  dout_stride, head_dim, lane)
                .next;
      }
      int const at = kKeep ? thread : lane;
      copy_q.template start_between<kHasBlind>(TileQ::tensor(stage_q), blind, rows_left, at);
      copy_dout.template start_between<kHasBlind>(TileQ::tensor(stage_q + TileQ::kSize), blind,
                                                  rows_left, at);
    };
    CopyK(in.k + col0 * params.k.row_stride, params.k.row_stride, head_dim, thread)
        .template start_between<kHasUnseen>(sK, unseen, keys_left, thread);
    CopyK(in.v + col0 * params.v.row_stride, params.v.row_stride, head_dim, thread)
        .template start_between<kHasUnseen>(sV, unseen, keys_left, thread);
    // Query blocks left to right, then the next head that shares the keys.
    int m_block = blocks.first, head = 0;
    start_tiles(0, head, m_block, thread);
    wait_for_previous_kernel();
    start_rows(0, head, m_block, thread);
    cp_async_commit();
    clear_now<true>(tdKrdK), clear_now<true>(tdVrdV);  // while the loads are under way

    for (int stage = 0; head < read_now(saved.group); stage ^= Traits::kStages - 1) {
      // Shared memory addresses that depend on the thread are worth fewer registers than they would take across iterations.
      int const lane = kIsSm90OrNewer ? opaque(thread) : thread_now();
      cp_async_wait<0>();
      __syncthreads();  // PROTECTS: this stage has arrived; all warps are done with the other stage and with dS^T, P^T.
      auto const ends_head = [&] { return m_block + 1 == range().end; };
      bool const new_head  = ends_head();
      int const next_block = new_head ? range().first : m_block + 1;
      if constexpr (!kOneStage) {
        if (!(new_head && head + 1 == read_now(saved.group))) {
          int64_t const rows = int64_t(next_block - m_block) * kBlockM;  // without kKeep unused
          copy_q.move(rows * q_stride + (new_head ? params.q.head_stride : 0));
          copy_dout.move(rows * dout_stride + (new_head ? params.dout.head_stride : 0));
          start_tiles(stage ^ 1, head + new_head, next_block, lane);
          start_rows(stage ^ 1, head + new_head, next_block, lane);
        }
        cp_async_commit();
      }

      Element* const stage_q   = smem_q + stage * 2 * TileQ::kSize;
      float const* const sRows = smem_rows + stage * kRowValues;
      // Keys beyond seqlen_k are the mask's too: K is zero there, and exp2(0 - LSE) may overflow.
      int const first_key = kKeep ? opaque(col0) : read_now(saved.site.block) * kBlockN;
      // Queries beyond seqlen_q need no mask: their LSE is +inf and P zero.
      bool const masked      = (kForm.asks_range && range().needs_mask(m_block)) ||
                               see_now().seqlen_k - first_key < kBlockN;
      auto const mod_of_head = [&] { return saved.score_mod(params.problem, head); };
      float const scale_log2 = params.problem.unit.scale_log2;
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
        int const row0 = m_block * kBlockM + sub * kSubM;
        if constexpr (changes_scores(kLevel)) {
          ScoreMod const mod = mod_of_head();
          modify_scores<kLevel, true, typename Traits::MmaSdp, TileSdp>(mod, tSrS, row0, first_key,
                                                                        see_now().shift(), lane);
        }
        auto scores            = rows_of(tSrS);
        constexpr int kQueries = decltype(size<1>(scores))::value;  // of this thread
        float lse[kQueries];
        bool any_large = false;
        if constexpr (kByEdge) { any_large = Scores::load_lse(lse, sRows + sub * kSubM, lane); }
        auto const mask = [&](auto edges) {
          mask_scores<true, typename Traits::MmaSdp, TileSdp, edges>(tSrS, see_now(), row0,
                                                                     first_key, lane);
        };
        if constexpr (kByEdge) {
          if (masked) {
            auto const look = see_now();
            if (first_key + kBlockN > look.end_key(row0)) { mask(Constant<Edges::kRight>{}); }
            if (look.first_key(row0 + kSubM - 1) > first_key) { mask(Constant<Edges::kLeft>{}); }
          }
        } else if constexpr (!kForm.loops_on_mask) {
          if (masked) { mask(Constant<Edges::kBoth>{}); }
        } else {  // a loop, as in the forward pass
          for (int round = opaque(int(masked)); round > 0; --round) {
            mask(Constant<Edges::kBoth>{});
          }
        }
        if constexpr (!kByEdge) { any_large = Scores::load_lse(lse, sRows + sub * kSubM, lane); }
        if (any_large) { Scores::limit_scores(scores, lse, scale_log2, params.problem.keep_log2); }

        // dP^T, beside it the exponentials
        auto tSrdP = partition_fragment_C(mma_sdp, TileSdp{});
        clear(tSrdP);
        gemm_ss<typename Traits::OperandK, typename Traits::OperandQ>(
            mma_sdp, tSrdP, sV, sdO, lane, [&](int part) {
              Scores::exponentials(scores, lse, scale_log2, part * kQueries / kDpParts,
                                   (part + 1) * kQueries / kDpParts);
            });
        if constexpr (may_have(kLevel, Level::kDropout)) {
          if (decided<kLevel>(Level::kDropout, saved.features.drops)) {
            mark_dropped<Traits>(tSrS, saved.features.dropout, head, params.problem.keep, row0,
                                 first_key, lane);
          }
        }
        auto tSrP = Scores::round_kept(tSrS);
        if constexpr (!Traits::kPInRegs) {
          fragment_to_smem<typename Traits::MmaSdp>(tSrP, sP, lane);
        }

        // dS^T
        float const* const sLse = sRows + sub * kSubM;
        if constexpr (may_have(kLevel, Level::kSoftcap)) {
          Scores::score_gradients(
              tSrdP, tSrS, sLse + kBlockM, lane,
              Scores::softcap_gradient(params.problem, mod_of_head(), sLse,
                                       row0 + see_now().shift() - first_key, lane));
        } else {
          Scores::score_gradients(tSrdP, tSrS, sLse + kBlockM, lane,
                                  [](int, int, float gradient, float) { return gradient; });
        }
        auto tSrdS = round_to<Element>(tSrdP);
        fragment_to_smem<typename Traits::MmaSdp>(
            tSrdS, local_tile(sdS, TileSdp{}, make_coord(_0{}, sub)), lane);

        if constexpr (Traits::kPInRegs) {  // dV += P^T dO, dK += dS^T Q without a barrier
          auto sdOt = local_tile(TileQ::transposed(stage_q + TileQ::kSize),
                                 Shape<Int<Traits::kHeadDim>, Int<kSubM>>{}, make_coord(_0{}, sub));
          auto sQt  = local_tile(TileQ::transposed(stage_q),
                                 Shape<Int<Traits::kHeadDim>, Int<kSubM>>{}, make_coord(_0{}, sub));
          auto tdVrP  = operand_a_of(tSrP);
          auto tdKrdS = operand_a_of(tSrdS);
          gemm_rs<typename Traits::OperandQt>(mma_dkv, tdVrdV, tdVrP, sdOt, lane);
          gemm_rs<typename Traits::OperandQt>(mma_dkv, tdKrdK, tdKrdS, sQt, lane);
        }
      }
      // PROTECTS: dS^T (and P^T) of all warps are in shared memory.  With P^T in registers, Q and dO have been read by all warps.
      __syncthreads();

      auto const add_to_dv = [&] {  // dV += P^T dO
        gemm_ss<typename Traits::OperandPt, typename Traits::OperandQt>(
            mma_dkv, tdVrdV, sP, TileQ::transposed(stage_q + TileQ::kSize), lane);
      };
      auto const add_to_dk = [&] {  // dK += dS^T Q
        gemm_ss<typename Traits::OperandPt, typename Traits::OperandQt>(
            mma_dkv, tdKrdK, sdS, TileQ::transposed(stage_q), lane);
      };
      if constexpr (!Traits::kPInRegs) { add_to_dv(); }
      if constexpr (kOneStage) {
        if constexpr (!Traits::kPInRegs) {
          add_to_dk();
          __syncthreads();  // PROTECTS: all warps are done with Q and dO, which the next ones replace.
        }
        // The loads of above, here.  As a function of both places they cost two stages their schedule; for sm_80 ends is found anew.
        bool const ends = kIsSm90OrNewer ? new_head : ends_head();
        int const next  = kIsSm90OrNewer ? next_block : ends ? range().first : m_block + 1;
        if (!(ends && head + 1 == read_now(saved.group))) {
          int64_t const rows = int64_t(next - m_block) * kBlockM;  // without kKeep unused
          copy_q.move(rows * q_stride + (ends ? params.q.head_stride : 0));
          copy_dout.move(rows * dout_stride + (ends ? params.dout.head_stride : 0));
          start_tiles(0, head + ends, next, lane);
          start_rows(0, head + ends, next, lane);
        }
        cp_async_commit();
      }
      // dQ += dS K.  For sm_80 the parts are a loop: unrolled, they spilled.
      constexpr int kUnroll = kIsSm90OrNewer ? Traits::kDqParts : 1;
#pragma unroll kUnroll
      for (int part = 0; part < Traits::kDqParts; ++part) {
        auto tdQrdQ = partition_fragment_C(typename Traits::MmaDq{},
                                           Shape<Int<kBlockM>, Int<Traits::kDqColumns>>{});
        clear(tdQrdQ);
        gemm_ss<typename Traits::OperandDs, typename Traits::OperandKt>(
            typename Traits::MmaDq{}, tdQrdQ, TileS::transposed(smem_s), columns_of_k(smem, part),
            lane);
        int const place  = index(head, m_block);
        int* const turns = params.workspace.dq_turn;
        add_to_dq<Traits::kThreads>(
            params.workspace.dq_accum + int64_t(place) * Traits::kDqElements +
                part * (kBlockM * Traits::kDqColumns),
            tdQrdQ, turns ? turns + place : nullptr,
            first_key / kBlockN - key_blocks<kBlockM, kBlockN>(see_now(), m_block).first, lane,
            {part == 0, part + 1 == Traits::kDqParts});
      }
      if constexpr (!Traits::kPInRegs && !kOneStage) { add_to_dk(); }
      // For sm_80 computed again: kept, they were spilled.
      bool const ends = kIsSm90OrNewer ? new_head : ends_head();
      m_block         = kIsSm90OrNewer ? next_block : ends ? range().first : m_block + 1;
      head += ends;
    }
  }

 private:
  // K^T (head_dim, keys) of one of the parts of dQ.
  CUTE_DEVICE static auto columns_of_k(Element* smem, int part) {
    if constexpr (Traits::kDqParts == 1) {
      return TileK::transposed(smem);
    } else {
      return local_tile(TileK::transposed(smem), Shape<Int<Traits::kDqColumns>, Int<kBlockN>>{},
                        make_coord(part, _0{}));
    }
  }

  // ldmatrix.x4 of Q (or dO) in one S^T (or dP^T) per warp.
  static constexpr int kDpParts =
      kSubM / (16 * (Traits::kWarps / Traits::kTile.sdp_keys)) * (Traits::kHeadDim / 16);
};

}  // namespace flash::sm80
