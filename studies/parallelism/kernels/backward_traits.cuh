#pragma once
// Types of the backward kernel that is taken apart: tile shape, split of dQ between warps, kind of copies.
// Used by backward.cuh.  The products are those of sm80/bwd/traits.cuh; here warps lie along the keys in all but dQ, so that P^T and
// dS^T stay in registers for dV and dK whatever the tile.
#include "sm80/instructions/gemm.cuh"
#include "sm80/instructions/mma_atom.cuh"
#include "sm80/instructions/smem_layout.cuh"

namespace parallelism {
using namespace cute;
using namespace flash;
using namespace flash::sm80;

// kDqWarps: along the queries in dQ (the others go along the head dimension); unused with kSplitK.
template <int kHeadDim_, int kBlockM_, int kBlockN_, int kWarps_, int kDqWarps, bool kSplitK_,
          bool kAsync_>
struct BackwardTraits {
  using Element                 = cutlass::bfloat16_t;
  static constexpr int kHeadDim = kHeadDim_, kBlockM = kBlockM_, kBlockN = kBlockN_;
  static constexpr int kWarps = kWarps_, kThreads = kWarps * 32;
  static constexpr bool kSplitK = kSplitK_, kAsync = kAsync_;
  // cp.async: the next query block arrives while this one is in use.
  static constexpr int kStages = kAsync ? 2 : 1;
  // Queries whose S^T and dP^T are in registers at a time.
  static constexpr int kSubM = kBlockM < 32 ? kBlockM : 32;
  static_assert(kBlockN % (16 * kWarps) == 0, "each warp owns whole 16-key MMA tiles");
  static_assert(kBlockM % kSubM == 0 && kSubM % 16 == 0, "whole parts");

  template <int kWarpsM, int kWarpsN, int kTileN>
  using Mma     = TiledMMA<MmaAtom<Element>, Layout<Shape<Int<kWarpsM>, Int<kWarpsN>, _1>>,
                           Tile<Int<16 * kWarpsM>, Int<kTileN>, _16>>;
  using MmaKeys = Mma<kWarps, 1, 16>;  // S^T, dP^T, dV, dK

  // dQ: either the warps share its rows and columns, or each has all of its rows for its own keys.
  static constexpr int kDqColumnWarps = kSplitK ? 1 : kWarps / kDqWarps;
  static constexpr int kDqTileN   = 16 * kDqColumnWarps < kHeadDim ? 16 * kDqColumnWarps : kHeadDim;
  static constexpr int kDqRows    = kSplitK ? 16 : kBlockM < 64 ? kBlockM : 64;  // at a time
  static constexpr int kDqThreads = kSplitK ? 32 : kThreads;
  static constexpr int kDqSlices  = kBlockM / kDqRows;
  using MmaDq = std::conditional_t<kSplitK, Mma<1, 1, 16>, Mma<kDqWarps, kDqColumnWarps, kDqTileN>>;
  static_assert(kDqTileN / kDqColumnWarps >= 8 && kHeadDim % kDqTileN == 0, "whole dQ tiles");
  static_assert(kBlockM % kDqRows == 0 && kDqRows % (16 * (kSplitK ? 1 : kDqWarps)) == 0,
                "whole dQ tiles");

  static constexpr int kSColumns = kBlockM < 32 ? 32 : kBlockM;   // no smaller swizzle atom
  using TileQ                    = SmemTile<kBlockM, kHeadDim>;   // Q and dO
  using TileK                    = SmemTile<kBlockN, kHeadDim>;   // K and V, later dK and dV
  using TileS                    = SmemTile<kBlockN, kSColumns>;  // dS^T

  using OperandK  = SmemOperand<true, LdsmN, Element, MmaKeys>;   // also V
  using OperandQ  = SmemOperand<false, LdsmN, Element, MmaKeys>;  // also dO
  using OperandQt = SmemOperand<false, LdsmT, Element, MmaKeys>;  // Q^T and dO^T
  using OperandDs = SmemOperand<true, LdsmT, Element, MmaDq>;     // dS, read across dS^T
  using LdsmKt    = std::conditional_t<kDqTileN / kDqColumnWarps == 8, SM75_U16x4_LDSM_T, LdsmT>;
  using OperandKt = SmemOperand<false, LdsmKt, Element, MmaDq>;  // K^T

  //   | K | V | Q, dO per stage | dS^T | partial dQ of each warp (split) | LSE, delta per stage |
  static constexpr int kTileElements = 2 * TileK::kSize + kStages * 2 * TileQ::kSize + TileS::kSize;
  static constexpr int kPartialFloats = kSplitK ? kWarps * kDqRows * kHeadDim : 0;
  static constexpr int kSmemBytes =
      kTileElements * int(sizeof(Element)) + kPartialFloats * 4 + kStages * 2 * kBlockM * 4;
  static constexpr int kMaxSmemBytes = 227 * 1024;  // of a thread block on sm_90
  static_assert(kSmemBytes <= kMaxSmemBytes, "the tile does not fit into shared memory");
};

}  // namespace parallelism
