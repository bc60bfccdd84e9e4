#pragma once
// Types of the forward kernel for one head dimension and dtype: MMA, shared memory layouts, operands.
// "sm80" is the minimum instruction set: mma.sync, ldmatrix, cp.async.
#include "sm80/instructions/gemm.cuh"
#include "sm80/instructions/mma_atom.cuh"
#include "sm80/instructions/smem_layout.cuh"
#include "sm80/tile_config.h"

namespace flash::sm80 {
using namespace cute;

// This thread's index.  The kernels ask Traits::Thread for it, so that a kernel of the study can have it read in another way.
struct ThreadIndex {
  CUTE_DEVICE static int index() { return int(threadIdx.x); }
};

// kSize: the largest with this tile.  kGeneral: with the general tile (fwd_is_general).
template <int kHeadDim_, class Element_, SmemSize kSize = SmemSize::k227, bool kGeneral = false>
struct FwdTraits {
  using Element                  = Element_;
  using Thread                   = ThreadIndex;
  static constexpr FwdTile kTile = fwd_tile(kHeadDim_, kSize, kGeneral);
  static constexpr int kHeadDim = kHeadDim_, kBlockM = kTile.block_m, kBlockN = kTile.block_n;
  static constexpr int kWarps = kTile.warps, kThreads = kWarps * 32, kStages = 2;
  static constexpr int kMinCtas  = kTile.ctas;
  static constexpr bool kQInRegs = kTile.q_in_regs;
  static_assert(kBlockM % (16 * kWarps) == 0,
                "each warp owns whole 16-row MMA tiles: a row's softmax stays in one warp");
  static_assert(kBlockN % 16 == 0, "P is the A operand of k16 MMAs");
  static_assert(16 * kTile.early <= kBlockN, "early counts the k-steps of one block");

  // Warps only along the rows: S and P never cross a warp.
  // General: a warp's two m16 tiles are a run of 32 rows, as the blocks of dropout are.
  static constexpr bool kWholeRuns = kGeneral && kBlockM == 32 * kWarps;
  using Runs                       = Layout<Shape<_16, Int<kWarps>, _2>, Stride<_1, _32, _16>>;
  using TileM                      = std::conditional_t<kWholeRuns, Runs, Int<16 * kWarps>>;
  using TiledMma =
      TiledMMA<MmaAtom<Element>, Layout<Shape<Int<kWarps>, _1, _1>>, Tile<TileM, _16, _16>>;

  using TileQ  = SmemTile<kBlockM, kHeadDim>;  // later O
  using TileKV = SmemTile<kBlockN, kHeadDim>;

  using OperandQ = SmemOperand<true, LdsmN, Element, TiledMma>;
  using OperandK = SmemOperand<false, LdsmN, Element, TiledMma>;
  using OperandV = SmemOperand<false, LdsmT, Element, TiledMma>;  // V^T (head_dim, keys)

  //   | Q, later O | K stage 0 | K stage 1 | V stage 0 | V stage 1 |
  static constexpr int kSmemBytes =
      (TileQ::kSize + 2 * kStages * TileKV::kSize) * int(sizeof(Element));
  static constexpr int kStaticSmemBytes = 2304;  // not more than this; fwd/kernel.cuh checks it
  static_assert(kSize == largest_with_tile_of(kSize, fwd_tiles(kHeadDim, kGeneral)),
                "sizes with the same tile share a kernel");
  static constexpr SmemSize kSmallestSize =
      smallest_with_tile_of(kSize, fwd_tiles(kHeadDim, kGeneral));
  static_assert(fits_just<kSmemBytes + kStaticSmemBytes>(kSmallestSize),
                "a thread block fits every size that it serves, and no other");
};

// The traits for one size of shared memory.
template <int kHeadDim, class Element, SmemSize kSize, bool kGeneral>
using FwdTraitsOf = FwdTraits<kHeadDim, Element,
                              largest_with_tile_of(kSize, fwd_tiles(kHeadDim, kGeneral)), kGeneral>;

}  // namespace flash::sm80
