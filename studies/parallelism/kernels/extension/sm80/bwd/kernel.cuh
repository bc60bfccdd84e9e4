#pragma once
// Backward kernel: one thread block per (key block, key head, batch), in the order of TileOrder.
// Invariant: every row of dk and dv below seqlen_k is written exactly once, summed over the query heads of its group.
#include "pieces/address.cuh"
#include "pieces/features.cuh"
#include "pieces/tile_order.cuh"
#include "sm80/bwd/mainloop.cuh"
#include "sm80/instructions/store.cuh"

namespace flash::sm80 {

// Key blocks are seen by fewer queries the further right they lie: the longest comes first as block 0.
CUTE_DEVICE TileCoord key_tile(TileOrder const& order, int index) {
  TileCoord tile = order.coord(index);
  if (order.longest_first) { tile.block = order.blocks - 1 - tile.block; }
  return tile;
}

template <class Traits, MaskKind kMask, Level kLevel>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kMinCtas)
    bwd_kernel(__grid_constant__ BwdKernelParams const params,
               __grid_constant__ TileOrder const order) {
  if (!kIsForThisArch<Traits>) { return __trap(); }
  using Element         = typename Traits::Element;
  using TileK           = typename Traits::TileK;
  constexpr int kBlockM = Traits::kBlockM, kBlockN = Traits::kBlockN;
  extern __shared__ __align__(128) unsigned char smem_bytes[];
  Element* const smem = reinterpret_cast<Element*>(smem_bytes);
  // What is needed again later: kept in registers it would be spilled in the loop.
  __shared__ SavedTile saved;
  static_assert(sizeof(saved) <= Traits::kStaticSmemBytes);
  Problem const& problem = params.problem;
  int const thread       = threadIdx.x;
  let_next_kernel_start();  // the conversion of dQ: its thread blocks take places when these have all begun

  typename Traits::MmaDkv mma;
  auto tdKrdK = partition_fragment_C(mma, Shape<Int<kBlockN>, Int<Traits::kHeadDim>>{});
  auto tdVrdV = partition_fragment_C(mma, Shape<Int<kBlockN>, Int<Traits::kHeadDim>>{});

  {
    TileCoord const tile = key_tile(order, blockIdx.x);
    bool const ragged    = problem.cu_seqlens_q != nullptr;
    Site const site      = ragged ? find_site<true>(problem, tile.block, kBlockN)
                                  : dense_site(problem, tile.batch, tile.block);
    // Every thread block waits, those without work too: when this kernel has ended, so has the one before.
    if (site.block * kBlockN >= site.k_rows) {
      wait_for_previous_kernel();
      return;
    }
    Visibility<kMask> const see{site.seqlen_q, site.seqlen_k, problem.window_left,
                                problem.window_right};
    BlockRange const blocks = query_blocks<kBlockM, kBlockN>(see, site.block);
    int const group = order.sharing, head = tile.head * group;
    int const slots       = ragged ? int(slot_count(problem.total_q, problem.batch, kBlockM))
                                   : ceil_div(problem.seqlen_q, kBlockM);
    int const first_index = ragged ? head * slots + first_slot(site.q_row0, site.batch, kBlockM)
                                   : (site.batch * problem.heads_q + head) * slots;
    if (thread == 0) {
      saved.head = tile.head, saved.site = site, saved.blocks = blocks;
      saved.group = group, saved.slots = slots, saved.first_index = first_index;
      saved.window_left = problem.window_left, saved.window_right = problem.window_right;
      saved.first_seeing = see.first_seeing();
      if constexpr (may_have(kLevel, Level::kDropout)) {
        saved.features = tile_features<kLevel>(problem, ScoreMod{}, site.batch, head);
      }
    }
    __syncthreads();  // PROTECTS: saved is complete.
    auto const first_row = [&](TensorRef const& tensor, int head, int row) {
      return row_of<Element>(tensor, site.batch, head, row);
    };
    typename BwdMainloop<Traits, kMask, kLevel>::Operands const operands{
        first_row(params.q, head, site.q_row0), first_row(params.dout, head, site.q_row0),
        first_row(params.k, tile.head, site.k_row0), first_row(params.v, tile.head, site.k_row0),
        &saved};
    if (blocks.first < blocks.end) {
      BwdMainloop<Traits, kMask, kLevel>::run(params, operands, see, blocks, site.block, smem,
                                              tdKrdK, tdVrdV);
    } else {
      wait_for_previous_kernel();
      clear(tdKrdK), clear(tdVrdV);
    }
  }

  // Epilogue: dK and dV take the places of K and V.
  CUTE_UNROLL
  for (int i = 0; i < size(tdKrdK); ++i) { tdKrdK(i) *= problem.scale; }
  __syncthreads();  // PROTECTS: all warps are done with K and V.
  auto sdK = TileK::tensor(smem);
  auto sdV = TileK::tensor(smem + TileK::kSize);
  fragment_to_smem<typename Traits::MmaDkv>(round_to<Element>(tdKrdK), sdK, thread);
  fragment_to_smem<typename Traits::MmaDkv>(round_to<Element>(tdVrdV), sdV, thread);
  __syncthreads();  // PROTECTS: all of dK and dV is in shared memory.
  Site const& site = saved.site;
  int const col0   = site.block * kBlockN;
  auto store       = [&](auto const& sTile, TensorRef const& target) {
    smem_to_rows<kBlockN, Traits::kHeadDim, Traits::kThreads>(
        sTile,
        matrix_of<Element>(target, site.batch, saved.head) +
            int64_t(site.k_row0 + col0) * target.row_stride,
        target.row_stride, site.k_rows - col0, problem.head_dim, thread);
  };
  store(sdK, params.dk);
  store(sdV, params.dv);
}

}  // namespace flash::sm80
