#pragma once
// Types of the backward kernel for one head dimension and dtype: three warp layouts for five products, shared memory tiles.
//
//   S^T  = K Q^T        (keys x queries)   MmaSdp      P^T  = exp2(S^T scale - LSE)
//   dP^T = V dO^T       (keys x queries)   MmaSdp      dS^T = P^T (dP^T - delta)
//   dV  += P^T dO       (keys x head_dim)  MmaDkv
//   dK  += dS^T Q       (keys x head_dim)  MmaDkv
//   dQ   = dS K         (queries x head_dim) MmaDq, added to fp32 in global memory
//
// Scores are held transposed, keys down, so that P^T and dS^T are A operands of dV and dK as they leave the MMA.
#include "sm80/instructions/gemm.cuh"
#include "sm80/instructions/mma_atom.cuh"
#include "sm80/instructions/smem_layout.cuh"
#include "sm80/tile_config.h"

namespace flash::sm80 {
using namespace cute;

// kSize: the largest with this tile.  kGeneral: with the general tile (bwd_is_general).
template <int kHeadDim_, class Element_, SmemSize kSize = SmemSize::k227, bool kGeneral = false>
struct BwdTraits {
  using Element                  = Element_;
  static constexpr BwdTile kTile = bwd_tile(kHeadDim_, kSize, kGeneral);
  static constexpr int kHeadDim = kHeadDim_, kBlockM = kTile.block_m, kBlockN = kTile.block_n;
  static constexpr int kWarps = kTile.warps, kThreads = kWarps * 32, kStages = kTile.stages,
                       kMinCtas = kTile.ctas;
  static_assert(
      kStages == 1 || kStages == 2,
      "the next query block is loaded while this one is in use, or when it has been used");

  template <int kWarpsM>
  using WarpMma = TiledMMA<MmaAtom<Element>, Layout<Shape<Int<kWarpsM>, Int<kWarps / kWarpsM>, _1>>,
                           Tile<Int<16 * kWarpsM>, Int<16 * (kWarps / kWarpsM)>, _16>>;
  // General: a warp's columns are whole runs of 16 queries, as the halves of dropout's blocks are.
  static constexpr int kSdpQueries = kWarps / kTile.sdp_keys;
  using SdpColumns                 = Layout<Shape<_8, Int<kSdpQueries>, _2>, Stride<_1, _16, _8>>;
  using GeneralSdp =
      TiledMMA<MmaAtom<Element>, Layout<Shape<Int<kTile.sdp_keys>, Int<kSdpQueries>, _1>>,
               Tile<Int<16 * kTile.sdp_keys>, SdpColumns, _16>>;
  using MmaSdp =
      std::conditional_t<kGeneral && (kSdpQueries > 1), GeneralSdp, WarpMma<kTile.sdp_keys>>;
  using MmaDkv = WarpMma<kTile.dkv_keys>;
  using MmaDq  = WarpMma<kTile.dq_queries>;
  // A warp that owns all queries of its keys feeds P^T and dS^T to dV and dK without leaving its registers.
  static constexpr bool kPInRegs = kTile.sdp_keys == kWarps && kTile.dkv_keys == kWarps;
  // Such a warp takes the queries in parts: S^T and dP^T of all of them would not fit beside dK and dV.
  static constexpr int kSubM = kTile.sub_m;
  static_assert(kPInRegs ? kBlockM % kSubM == 0 && kSubM % 16 == 0 : kSubM == kBlockM,
                "whole parts");
  static_assert(kBlockN % (16 * kTile.sdp_keys) == 0 &&
                    kSubM % (16 * (kWarps / kTile.sdp_keys)) == 0,
                "whole S^T tiles");
  static_assert(kBlockN % (16 * kTile.dkv_keys) == 0 &&
                    kHeadDim % (16 * (kWarps / kTile.dkv_keys)) == 0,
                "whole dK tiles");
  static_assert(kBlockM % (16 * kTile.dq_queries) == 0 &&
                    kHeadDim % (16 * (kWarps / kTile.dq_queries)) == 0,
                "whole dQ tiles");
  // Parts of the head dimension, one after the other: their atoms are the runs of atoms of the whole dQ's accumulator.
  static constexpr int kDqParts = kTile.dq_parts, kDqColumns = kHeadDim / kDqParts;
  static_assert(kHeadDim % (kDqParts * 16 * (kWarps / kTile.dq_queries)) == 0 &&
                    kDqColumns % atom_columns(kHeadDim) == 0,
                "whole parts of dQ");

  using TileQ = SmemTile<kBlockM, kHeadDim>;  // Q and dO
  using TileK = SmemTile<kBlockN, kHeadDim>;  // K and V, later dK and dV
  using TileS = SmemTile<kBlockN, kBlockM>;   // P^T and dS^T

  using OperandK  = SmemOperand<true, LdsmN, Element, MmaSdp>;   // also V
  using OperandQ  = SmemOperand<false, LdsmN, Element, MmaSdp>;  // also dO
  using OperandPt = SmemOperand<true, LdsmN, Element, MmaDkv>;   // also dS^T
  using OperandQt = SmemOperand<false, LdsmT, Element, MmaDkv>;  // Q^T and dO^T (head_dim, queries)
  using OperandDs =
      SmemOperand<true, LdsmT, Element, MmaDq>;  // dS (queries, keys), read across sdS
  using OperandKt = SmemOperand<false, LdsmT, Element, MmaDq>;  // K^T (head_dim, keys)

  //   | K | V | Q, dO stage 0 | Q, dO stage 1 | dS^T | P^T unless in registers | LSE, delta stage 0 | LSE, delta stage 1 |
  //   (without the second stages where kStages is 1)
  static constexpr int kTileElements =
      2 * TileK::kSize + kStages * 2 * TileQ::kSize + (kPInRegs ? 1 : 2) * TileS::kSize;
  static constexpr int kSmemBytes =
      kTileElements * int(sizeof(Element)) + kStages * 2 * kBlockM * int(sizeof(float));
  static constexpr int kDqElements =
      kBlockM * kHeadDim;                       // fp32 values of one query block in dq_accum
  static constexpr int kStaticSmemBytes = 256;  // not more than this; bwd/kernel.cuh checks it
  static_assert(kSize == largest_with_tile_of(kSize, bwd_tiles(kHeadDim, kGeneral)),
                "sizes with the same tile share a kernel");
  static constexpr SmemSize kSmallestSize =
      smallest_with_tile_of(kSize, bwd_tiles(kHeadDim, kGeneral));
  static_assert(fits_just<kSmemBytes + kStaticSmemBytes>(kSmallestSize),
                "a thread block fits every size that it serves, and no other");
};

// The traits for one size of shared memory.
template <int kHeadDim, class Element, SmemSize kSize, bool kGeneral>
using BwdTraitsOf = BwdTraits<kHeadDim, Element,
                              largest_with_tile_of(kSize, bwd_tiles(kHeadDim, kGeneral)), kGeneral>;

}  // namespace flash::sm80
