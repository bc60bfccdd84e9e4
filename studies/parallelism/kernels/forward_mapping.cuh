#pragma once
// Forward kernels that differ in which thread block takes which tiles, and in nothing else.
// Used by the units mapping_*.  What they do for a tile is the extension's own QueryTile.
#include "calls.h"
#include "pieces/compiler.cuh"
#include "pieces/tile_order.cuh"
#include "sm80/fwd/kernel.cuh"

namespace parallelism {
using namespace flash;
using namespace flash::sm80;

// Tiles of one thread block: first, first + stride, ... below end, numbered by TileOrder.
struct Walk {
  int first, end, stride;
};

CUTE_DEVICE Walk walk_of_block(TileOrder const& order, Mapping mapping) {
  if (mapping == Mapping::kPersistent) {
    return {int(blockIdx.x), int(order.size()), int(gridDim.x)};
  }
  int const pair = int(blockIdx.x) * int(order.by_heads.divisor) + int(blockIdx.y);
  return {pair * order.blocks + int(blockIdx.z), (pair + 1) * order.blocks, int(gridDim.z)};
}

// O and LSE of one query block, by the extension's own kernel.  saved and smem must not be in use when it begins, and are when it ends.
template <class Traits, MaskKind kMask>
CUTE_DEVICE void forward_tile(FwdParams const& params, TileCoord const& tile, SavedTile& saved,
                              typename Traits::Element* smem) {
  QueryTile<Traits, kMask, Level::kPlain>{params, saved}.work(tile, tile.head, smem);
}

// One tile per thread block.
template <class Traits, MaskKind kMask>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kMinCtas)
    forward_grid_kernel(__grid_constant__ FwdParams const params) {
  extern __shared__ __align__(128) unsigned char smem_bytes[];
  __shared__ SavedTile saved;
  forward_tile<Traits, kMask>(params, {int(blockIdx.x), int(blockIdx.z), int(blockIdx.y)}, saved,
                              reinterpret_cast<typename Traits::Element*>(smem_bytes));
}

// Several tiles per thread block, one after the other.  What depends on the thread is not kept across the main loop, as the main loop
// makes the thread's index opaque (opaque_index).
template <class Traits, MaskKind kMask>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kMinCtas)
    forward_walk_kernel(__grid_constant__ FwdParams const params,
                        __grid_constant__ TileOrder const order, Mapping mapping) {
  extern __shared__ __align__(128) unsigned char smem_bytes[];
  __shared__ SavedTile saved;
  __shared__ Walk walk;  // in registers it would be spilled in the main loop
  if (threadIdx.x == 0) { walk = walk_of_block(order, mapping); }
  __syncthreads();  // PROTECTS: walk is complete.
  while (read_now(walk.first) < read_now(walk.end)) {
    forward_tile<Traits, kMask>(params, order.coord(read_now(walk.first)), saved,
                                reinterpret_cast<typename Traits::Element*>(smem_bytes));
    __syncthreads();  // PROTECTS: no thread reads O, saved or walk any more.
    if (threadIdx.x == 0) { walk.first += walk.stride; }
    __syncthreads();  // PROTECTS: walk is the next tile's.
  }
}

template <class Traits, MaskKind kMask>
cudaError_t launch_mapping(FwdParams const& params, Mapping mapping, int splits,
                           cudaStream_t stream) {
  Problem const& problem = params.problem;
  int const blocks       = ceil_div(problem.seqlen_q, Traits::kBlockM);
  unsigned const batch = unsigned(problem.batch), heads = unsigned(problem.heads_q);
  bool const one_tile = mapping == Mapping::kTileGrid;
  auto const kernel = one_tile ? reinterpret_cast<void const*>(&forward_grid_kernel<Traits, kMask>)
                               : reinterpret_cast<void const*>(&forward_walk_kernel<Traits, kMask>);
  cudaError_t const status =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Traits::kSmemBytes);
  if (status != cudaSuccess) { return status; }
  if (one_tile) {
    forward_grid_kernel<Traits, kMask>
        <<<dim3(unsigned(blocks), batch, heads), Traits::kThreads, Traits::kSmemBytes, stream>>>(
            params);
    return cudaGetLastError();
  }
  bool const persistent = mapping == Mapping::kPersistent;
  dim3 const grid = persistent ? dim3(unsigned(splits)) : dim3(batch, heads, unsigned(splits));
  forward_walk_kernel<Traits, kMask><<<grid, Traits::kThreads, Traits::kSmemBytes, stream>>>(
      params, persistent ? shipped_order(problem, blocks) : head_by_head(problem, blocks), mapping);
  return cudaGetLastError();
}

template <int kHeadDim>
cudaError_t run_mapping(Mapping mapping, ForwardCall const& call, cudaStream_t stream) {
  using Traits           = FwdTraits<kHeadDim, cutlass::bfloat16_t>;
  FwdParams const params = forward_params(call, kHeadDim);
  return call.causal
             ? launch_mapping<Traits, MaskKind::kCausal>(params, mapping, call.splits, stream)
             : launch_mapping<Traits, MaskKind::kNone>(params, mapping, call.splits, stream);
}

template <int kHeadDim>
cudaError_t mapping_facts(Mapping mapping, bool causal, KernelFacts* facts) {
  using Traits        = FwdTraits<kHeadDim, cutlass::bfloat16_t>;
  auto const facts_of = [&](auto kernel) {
    return read_facts(kernel, Traits::kThreads, Traits::kSmemBytes, facts);
  };
  if (mapping == Mapping::kTileGrid) {
    return causal ? facts_of(&forward_grid_kernel<Traits, MaskKind::kCausal>)
                  : facts_of(&forward_grid_kernel<Traits, MaskKind::kNone>);
  }
  return causal ? facts_of(&forward_walk_kernel<Traits, MaskKind::kCausal>)
                : facts_of(&forward_walk_kernel<Traits, MaskKind::kNone>);
}

}  // namespace parallelism
