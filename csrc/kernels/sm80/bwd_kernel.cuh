#pragma once
// Backward kernel: one thread block per (key block, key head, batch), in the order of TileOrder.
// Invariant: every row of dk and dv below seqlen_k is written exactly once, summed over the query heads of its group.
#include "pieces/head.cuh"
#include "pieces/store.cuh"
#include "pieces/tile_order.cuh"
#include "sm80/bwd_mainloop.cuh"

namespace flash::sm80 {

// Key blocks are seen by fewer queries the further right they lie: the longest comes first as block 0.
CUTE_DEVICE TileCoord key_tile(TileOrder const& order, int index) {
  TileCoord tile = order.coord(index);
  if (order.longest_first) { tile.block = order.blocks - 1 - tile.block; }
  return tile;
}

template <class Traits, MaskKind kMask>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kMinCtas)
    bwd_kernel(__grid_constant__ BwdParams const params, __grid_constant__ TileOrder const order) {
  using Element         = typename Traits::Element;
  using TileK           = typename Traits::TileK;
  constexpr int kBlockM = Traits::kBlockM, kBlockN = Traits::kBlockN;
  extern __shared__ __align__(128) unsigned char smem_bytes[];
  Element* const smem    = reinterpret_cast<Element*>(smem_bytes);
  Problem const& problem = params.problem;
  int const thread       = threadIdx.x;

  typename Traits::MmaDkv mma;
  auto tdKrdK = partition_fragment_C(mma, Shape<Int<kBlockN>, Int<Traits::kHeadDim>>{});
  auto tdVrdV = partition_fragment_C(mma, Shape<Int<kBlockN>, Int<Traits::kHeadDim>>{});
  clear(tdKrdK), clear(tdVrdV);

  {
    TileCoord const tile = key_tile(order, blockIdx.x);
    Visibility<kMask> const see{problem.seqlen_q, problem.seqlen_k, 0, 0};
    BlockRange const blocks = query_blocks<kBlockM, kBlockN>(see, tile.block);
    int const group = problem.heads_q / problem.heads_kv, head = tile.head * group;
    typename BwdMainloop<Traits, kMask>::Operands const operands{
        matrix_of<Element>(params.q, tile.batch, head),
        matrix_of<Element>(params.dout, tile.batch, head),
        matrix_of<Element>(params.k, tile.batch, tile.head),
        matrix_of<Element>(params.v, tile.batch, tile.head),
        tile.batch * problem.heads_q + head,
        group};
    if (blocks.first < blocks.end) {
      BwdMainloop<Traits, kMask>::run(params, operands, see, blocks, tile.block, smem, tdKrdK,
                                      tdVrdV);
    }
  }

  // Epilogue: dK and dV take the places of K and V.  Coordinates are computed anew: kept, they would cost registers.
  TileCoord const tile = key_tile(order, block_index_again());
  CUTE_UNROLL
  for (int i = 0; i < size(tdKrdK); ++i) { tdKrdK(i) *= problem.scale; }
  __syncthreads();  // PROTECTS: all warps are done with K and V.
  auto sdK = TileK::tensor(smem);
  auto sdV = TileK::tensor(smem + TileK::kSize);
  fragment_to_smem<typename Traits::MmaDkv>(round_to<Element>(tdKrdK), sdK, thread);
  fragment_to_smem<typename Traits::MmaDkv>(round_to<Element>(tdVrdV), sdV, thread);
  __syncthreads();  // PROTECTS: all of dK and dV is in shared memory.
  int const col0 = tile.block * kBlockN;
  auto store     = [&](auto const& sTile, TensorRef const& target) {
    smem_to_rows<kBlockN, Traits::kHeadDim, Traits::kThreads>(
        sTile, matrix_of<Element>(target, tile.batch, tile.head) + col0 * target.row_stride,
        target.row_stride, problem.seqlen_k - col0, problem.head_dim, thread);
  };
  store(sdK, params.dk);
  store(sdV, params.dv);
}

}  // namespace flash::sm80
