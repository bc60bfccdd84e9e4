#pragma once
// Forward kernels that differ in which thread block takes which tiles, and in nothing else.
// Used by the units mapping_*.  The algorithm of a tile is the extension's own FwdMainloop.
#include "calls.h"
#include "pieces/tile_order.cuh"
#include "sm80/fwd_traits.cuh"
#include "thread_again.cuh"
// After thread_again.cuh.
#include "sm80/fwd_mainloop.cuh"

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
  int const pair = int(blockIdx.x) * order.heads + int(blockIdx.y);
  return {pair * order.blocks + int(blockIdx.z), (pair + 1) * order.blocks, int(gridDim.z)};
}

// O and LSE of one query block.  saved and smem must not be in use when it begins, and are when it ends.
template <class Traits, MaskKind kMask>
CUTE_DEVICE void forward_tile(FwdParams const& params, TileCoord const& tile, SavedTile& saved,
                              typename Traits::Element* smem) {
  using Element          = typename Traits::Element;
  using Mainloop         = FwdMainloop<Traits, kMask, Level::kPlain>;
  Problem const& problem = params.problem;
  int const thread       = threadIdx.x;
  typename Traits::TiledMma mma;
  auto tOrO = partition_fragment_C(mma, Shape<Int<Traits::kBlockM>, Int<Traits::kHeadDim>>{});
  clear(tOrO);
  constexpr int kRows = 2 * decltype(size<1>(tOrO))::value;
  Softmax<kRows> softmax(problem.unit.scale_log2);
  {
    Site const site = dense_site(problem, tile.batch, tile.block);
    Visibility<kMask> const see{site.seqlen_q, site.seqlen_k, 0, 0};
    BlockRange const blocks = key_blocks<Traits::kBlockM, Traits::kBlockN>(see, site.block);
    if (thread == 0) { saved.head = tile.head, saved.site = site, saved.blocks = blocks; }
    __syncthreads();  // PROTECTS: saved is complete.
    typename Mainloop::Operands const operands{matrix_of<Element>(params.q, tile.batch, tile.head),
                                               matrix_of<Element>(params.k, tile.batch, tile.head),
                                               matrix_of<Element>(params.v, tile.batch, tile.head),
                                               params.q.row_stride,
                                               params.k.row_stride,
                                               params.v.row_stride,
                                               &saved,
                                               0};
    Mainloop::run(operands, see, blocks, site.block, problem.head_dim, smem, tOrO, softmax);
  }

  // Epilogue: O / sum and LSE.  Every query sees a key.
  Site const& site = saved.site;
  int const row0 = site.block * Traits::kBlockM, head = saved.head;
  float lse[kRows];
  softmax.finish(lse);
  auto o_rows = make_tensor(tOrO.data(), rows_columns(tOrO.layout()));
  CUTE_UNROLL
  for (int r = 0; r < kRows; ++r) {
    CUTE_UNROLL
    for (int c = 0; c < size<1>(o_rows); ++c) { o_rows(r, c) *= softmax.row_sum[r]; }
  }
  // No barrier before: a warp's rows of O overwrite the rows of Q that only it reads.
  auto sO = Traits::TileQ::tensor(smem);
  fragment_to_smem<typename Traits::TiledMma>(round_to<Element>(tOrO), sO, thread);

  auto cO   = make_identity_tensor(Shape<Int<Traits::kBlockM>, Int<Traits::kHeadDim>>{});
  auto tOcO = mma.get_slice(thread).partition_C(cO);
  auto rows = make_tensor(tOcO.data(), rows_columns(tOcO.layout()));
  float* const lse_rows =
      params.lse + site.batch * problem.lse_batch_stride + head * problem.lse_head_stride + row0;
  CUTE_UNROLL
  for (int r = 0; r < kRows; ++r) {
    int const row = get<0>(rows(r, 0));
    if (get<1>(rows(0, 0)) == 0 && row0 + row < site.seqlen_q) { lse_rows[row] = lse[r]; }
  }
  __syncthreads();  // PROTECTS: all of O is in shared memory before other threads read it.
  smem_to_rows<Traits::kBlockM, Traits::kHeadDim, Traits::kThreads>(
      sO, matrix_of<Element>(params.out, site.batch, head) + int64_t(row0) * params.out.row_stride,
      params.out.row_stride, site.seqlen_q - row0, problem.head_dim, thread);
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

// Several tiles per thread block, one after the other.
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
