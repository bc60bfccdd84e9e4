#pragma once
// Types of the sm90 forward kernel for one head dimension and dtype: products, shared memory, barriers.
#include <cutlass/arch/barrier.h>

#include <cute/tensor.hpp>

#include "pieces/features.cuh"
#include "sm90/fwd/job.cuh"
#include "sm90/tile_config.h"

namespace flash::sm90 {
using namespace cute;

// kHeadDim: of Q and K; kHeadDimV: of V and O.
template <int kHeadDim_, int kHeadDimV_, class Element_, Level kLevel_>
struct FwdTraits {
  using Element                  = Element_;
  static constexpr Level kLevel  = kLevel_;
  static constexpr FwdTile kTile = fwd_tile(kHeadDim_, kLevel != Level::kPlain);
  static constexpr int kHeadDim = kHeadDim_, kHeadDimV = kHeadDimV_;
  static constexpr int kGroups = kTile.groups, kBlockN = kTile.block_n;
  static constexpr int kBlockM = kGroupRows * kGroups;
  static constexpr int kStages = kTile.stages, kQBuffers = kTile.q_buffers;
  static constexpr bool kQInRegisters = kTile.q_in_registers;
  static constexpr int kGroupThreads = 128, kThreads = kGroupThreads * (1 + kGroups);
  static constexpr int kGroupWarps = 4, kConsumerWarps = kGroupWarps * kGroups;

  // Columns of a TMA box: as many as a row of the widest swizzle that divides the head dimension.
  static constexpr int kBoxColumns = kHeadDim % 64 == 0 ? 64 : 32;
  static constexpr bool kWide      = kBoxColumns == 64;
  using AtomK                      = std::conditional_t<kWide, GMMA::Layout_K_SW128_Atom<Element>,
                                                        GMMA::Layout_K_SW64_Atom<Element>>;
  using AtomMn                     = std::conditional_t<kWide, GMMA::Layout_MN_SW128_Atom<Element>,
                                                        GMMA::Layout_MN_SW64_Atom<Element>>;

  // K and V blocks share a ring of stages: the same bytes, K-major as K, MN-major as V^T.  O is stored through the place of Q.
  using LayoutQ  = decltype(tile_to_shape(AtomK{}, Shape<Int<kGroupRows>, Int<kHeadDim>>{}));
  using LayoutQs = decltype(tile_to_shape(
      AtomK{}, Shape<Int<kGroupRows>, Int<kHeadDim>, Int<kGroups>, Int<kQBuffers>>{}));
  using LayoutK =
      decltype(tile_to_shape(AtomK{}, Shape<Int<kBlockN>, Int<kHeadDim>, Int<kStages>>{}));
  static constexpr int kQSize = kGroupRows * kHeadDim, kStageSize = kBlockN * kHeadDim;
  using LayoutVt = decltype(append<3>(
      tile_to_shape(AtomMn{}, Shape<Int<kHeadDimV>, Int<kBlockN>>{}, Step<_2, _1>{}),
      Layout<Int<kStages>, Int<kStageSize>>{}));
  using LayoutO  = decltype(tile_to_shape(AtomK{}, Shape<Int<kGroupRows>, Int<kHeadDimV>>{}));
  static_assert(kHeadDimV <= kHeadDim && kHeadDimV % kBoxColumns == 0);
  static_assert(cosize_v<LayoutQ> == kQSize && cosize_v<LayoutK> == kStages * kStageSize &&
                cosize_v<LayoutVt> <= kStages * kStageSize);

  // One warpgroup's products.  S: K, and Q as the table says, in shared memory; O: P in registers.
  using TileS             = Shape<Int<kGroupRows>, Int<kBlockN>>;
  using TileO             = Shape<Int<kGroupRows>, Int<kHeadDimV>>;
  using ProductS          = Shape<Int<kGroupRows>, Int<kBlockN>, _16>;
  using MmaSFromRegisters = decltype(GMMA::rs_op_selector<Element, Element, float, ProductS,
                                                          GMMA::Major::K, GMMA::Major::K>());
  using MmaSFromShared    = decltype(GMMA::ss_op_selector<Element, Element, float, ProductS,
                                                          GMMA::Major::K, GMMA::Major::K>());
  using TiledMmaS         = decltype(make_tiled_mma(
      std::conditional_t<kQInRegisters, MmaSFromRegisters, MmaSFromShared>{}));
  using TiledMmaO         = decltype(make_tiled_mma(
      GMMA::rs_op_selector<Element, Element, float, Shape<Int<kGroupRows>, Int<kHeadDimV>, _16>,
                           GMMA::Major::K, GMMA::Major::MN>()));

  // Tiles of which the producer has told: more than the other rings let it run ahead.
  static constexpr int kJobs = 4;

  struct alignas(1024) Shared {
    Element q[kQBuffers][kGroups][kQSize];  // later O
    Element stages[kStages][kStageSize];
    uint64_t q_full[kQBuffers][kGroups], q_empty[kQBuffers][kGroups];
    uint64_t stage_full[kStages], stage_empty[kStages];
    uint64_t job_full[kJobs], job_empty[kJobs];
    uint64_t landed;  // V blocks that the producer changes before it gives them on
    Job<kGroups> jobs[kJobs];
    TileFeatures features[kJobs];  // of kernels that do more than mask
    bool is_job[kJobs];            // false: there are no more
  };
  static_assert(sizeof(Shared) <= 227 * 1024);
};

}  // namespace flash::sm90
