#pragma once
// Types of the decoding kernels for one head dimension and dtype: MMA, shared memory layouts, operands.
#include "pieces/split.cuh"
#include "sm80/instructions/cache_copy.cuh"
#include "sm80/instructions/gemm.cuh"
#include "sm80/instructions/mma_atom.cuh"
#include "sm80/instructions/smem_layout.cuh"
#include "sm80/tile_config.h"

namespace flash::sm80 {
using namespace cute;

// kSize: the largest with this tile.
template <int kHeadDim_, class Element_, bool kNarrow_, SmemSize kSize>
struct DecodeTraits {
  using Element                     = Element_;
  static constexpr DecodeTile kTile = decode_tile(kHeadDim_, kNarrow_, kSize);
  static constexpr bool kNarrow     = kNarrow_;
  static constexpr int kHeadDim = kHeadDim_, kBlockM = kTile.block_m(), kBlockN = kTile.block_n();
  static constexpr int kTileN = kTile.tile_n, kStages = kTile.stages, kMinCtas = kTile.ctas;
  static constexpr int kGroups       = kTile.warps_n;  // each with key tiles of its own
  static constexpr int kGroupWarps   = kTile.warps_m;  // warps that share key tiles
  static constexpr int kGroupThreads = kGroupWarps * 32, kThreads = kGroups * kGroupThreads;
  static constexpr bool kQInRegs = kTile.q_in_regs;
  static_assert(kTile.warps_m == 1 || kTile.warps_n == 1, "warps go one way");
  static_assert(kTileN % 16 == 0, "P is the A operand of k16 MMAs");
  static_assert(kStages >= 2, "the next tile is loaded while this one is in use");

  // Of one group.
  using TiledMma = TiledMMA<MmaAtom<Element>, Layout<Shape<Int<kGroupWarps>, _1, _1>>,
                            Tile<Int<kBlockM>, _16, _16>>;
  using TileQ    = SmemTile<kBlockM, kHeadDim>;
  using TileKV   = SmemTile<kTileN, kHeadDim>;
  using Copy     = CacheCopy<Element, kTileN, kHeadDim, kGroupThreads, kBlockN>;
  using OperandQ = SmemOperand<true, LdsmN, Element, TiledMma>;
  using OperandK = SmemOperand<false, LdsmN, Element, TiledMma>;
  using OperandV = SmemOperand<false, LdsmT, Element, TiledMma>;  // V^T (head_dim, keys)

  //   | Q | group 0: K 0, V 0, K 1, V 1, ... | group 1 ... |
  //   and when a query tile's keys have been seen
  //   | O of group 0, fp32 | O of group 1 | ... | states of the groups | merged states | weights of the parts |
  static constexpr int kStageSize = 2 * TileKV::kSize;
  static constexpr int kPitchO    = kHeadDim + 8;  // eight rows of O begin in different banks
  static constexpr int kLoadBytes =
      (TileQ::kSize + kGroups * kStages * kStageSize) * int(sizeof(Element));
  static constexpr int kMergeBytes =
      (kGroups * kBlockM * (kPitchO + 2) + kBlockM * (2 + kMergedParts)) * int(sizeof(float));
  static constexpr int kSmemBytes = kLoadBytes > kMergeBytes ? kLoadBytes : kMergeBytes;
  // Not more than this; decode/kernel.cuh checks it.  The dynamic part begins at a multiple of 1024.
  static constexpr int kStaticSmemBytes = kNarrow ? 1024 : 2048;
  static_assert(kSize == largest_with_tile_of(kSize, decode_tiles(kHeadDim, kNarrow)),
                "sizes with the same tile share a kernel");
  static constexpr SmemSize kSmallestSize =
      smallest_with_tile_of(kSize, decode_tiles(kHeadDim, kNarrow));
  static_assert(fits_just<kSmemBytes + kStaticSmemBytes>(kSmallestSize),
                "a thread block fits every size that it serves, and no other");
};

// The traits for one size of shared memory.
template <int kHeadDim, class Element, bool kNarrow, SmemSize kSize>
using DecodeTraitsOf = DecodeTraits<kHeadDim, Element, kNarrow,
                                    largest_with_tile_of(kSize, decode_tiles(kHeadDim, kNarrow))>;

}  // namespace flash::sm80
