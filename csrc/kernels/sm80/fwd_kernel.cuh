#pragma once
// Forward kernel: one thread block per (query block, head, batch), in the order of TileOrder.
// Invariant: every row of out and lse below seqlen_q is written exactly once.
#include "pieces/head.cuh"
#include "pieces/store.cuh"
#include "pieces/tile_order.cuh"
#include "sm80/fwd_mainloop.cuh"

namespace flash::sm80 {

template <class Traits, MaskKind kMask>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kMinCtas)
    fwd_kernel(__grid_constant__ FwdParams const params, __grid_constant__ TileOrder const order) {
  using Element = typename Traits::Element;
  extern __shared__ __align__(128) unsigned char smem_bytes[];
  Element* const smem = reinterpret_cast<Element*>(smem_bytes);

  // Which tile, and what it sees
  Problem const& problem = params.problem;
  int const thread       = threadIdx.x;
  typename Traits::TiledMma mma;
  auto tOrO = partition_fragment_C(mma, Shape<Int<Traits::kBlockM>, Int<Traits::kHeadDim>>{});
  clear(tOrO);
  constexpr int kRows = 2 * decltype(size<1>(tOrO))::value;
  Softmax<kRows> softmax(problem.scale * kLog2E);
  {
    TileCoord const tile = order.coord(blockIdx.x);
    int const head_kv    = tile.head / (problem.heads_q / problem.heads_kv);
    Visibility<kMask> const see{problem.seqlen_q, problem.seqlen_k, 0, 0};
    BlockRange const blocks = key_blocks<Traits::kBlockM, Traits::kBlockN>(see, tile.block);
    typename FwdMainloop<Traits, kMask>::Operands const operands{
        matrix_of<Element>(params.q, tile.batch, tile.head),
        matrix_of<Element>(params.k, tile.batch, head_kv),
        matrix_of<Element>(params.v, tile.batch, head_kv),
        params.q.row_stride,
        params.k.row_stride,
        params.v.row_stride};
    if (blocks.first < blocks.end) {
      FwdMainloop<Traits, kMask>::run(operands, see, blocks, tile.block, problem.head_dim, smem,
                                      tOrO, softmax);
    }
  }

  // Epilogue: O / sum and LSE.  The tile's coordinates are computed anew: kept, they would cost registers in the loop.
  TileCoord const tile = order.coord(block_index_again());
  int const row0       = tile.block * Traits::kBlockM;
  float lse[kRows];
  softmax.finish(lse);
  auto o_rows = make_tensor(tOrO.data(), rows_columns(tOrO.layout()));
  CUTE_UNROLL
  for (int r = 0; r < kRows; ++r) {
    CUTE_UNROLL
    for (int c = 0; c < size<1>(o_rows); ++c) {
      // Chosen, not multiplied: 0 * NaN of a hidden V must not reach a row that sees nothing.
      o_rows(r, c) = softmax.row_sum[r] == 0.f ? 0.f : o_rows(r, c) * softmax.row_sum[r];
    }
  }
  // No barrier before: a warp's rows of O overwrite the rows of Q that only it reads.
  auto sO = Traits::TileQ::tensor(smem);
  fragment_to_smem<typename Traits::TiledMma>(round_to<Element>(tOrO), sO, thread);

  auto cO   = make_identity_tensor(Shape<Int<Traits::kBlockM>, Int<Traits::kHeadDim>>{});
  auto tOcO = mma.get_slice(thread).partition_C(cO);
  auto rows = make_tensor(tOcO.data(), rows_columns(tOcO.layout()));
  float* const lse_rows =
      params.lse + (int64_t(tile.batch) * problem.heads_q + tile.head) * problem.seqlen_q + row0;
  CUTE_UNROLL
  for (int r = 0; r < kRows; ++r) {
    int const row = get<0>(rows(r, 0));
    if (get<1>(rows(0, 0)) == 0 && row0 + row < problem.seqlen_q) { lse_rows[row] = lse[r]; }
  }
  __syncthreads();  // PROTECTS: all of O is in shared memory before other threads read it.
  smem_to_rows<Traits::kBlockM, Traits::kHeadDim, Traits::kThreads>(
      sO, matrix_of<Element>(params.out, tile.batch, tile.head) + row0 * params.out.row_stride,
      params.out.row_stride, problem.seqlen_q - row0, problem.head_dim, thread);
}

}  // namespace flash::sm80
