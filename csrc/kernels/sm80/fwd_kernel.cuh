#pragma once
// Forward kernel: one thread block per (query block, head, batch), in the order of TileOrder.
// Invariant: every row of out and lse below seqlen_q is written exactly once.
#include "pieces/features.cuh"
#include "pieces/head.cuh"
#include "pieces/sequence.cuh"
#include "pieces/store.cuh"
#include "pieces/tile_order.cuh"
#include "sm80/fwd_mainloop.cuh"

namespace flash::sm80 {

template <class Traits, MaskKind kMask, Level kLevel>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kMinCtas)
    fwd_kernel(__grid_constant__ FwdParams const params, __grid_constant__ TileOrder const order) {
  using Element = typename Traits::Element;
  extern __shared__ __align__(128) unsigned char smem_bytes[];
  Element* const smem = reinterpret_cast<Element*>(smem_bytes);
  // What the epilogue (and the general kernels' softmax) need again: kept in registers it would be spilled in the loop.
  __shared__ SavedTile saved;

  // Which tile, and what it sees
  Problem const& problem = params.problem;
  int const thread       = threadIdx.x;
  typename Traits::TiledMma mma;
  auto tOrO = partition_fragment_C(mma, Shape<Int<Traits::kBlockM>, Int<Traits::kHeadDim>>{});
  clear(tOrO);
  constexpr int kRows = 2 * decltype(size<1>(tOrO))::value;
  Softmax<kRows> softmax(problem.unit.scale_log2);
  {
    TileCoord const tile = order.coord(blockIdx.x);
    Site const site = problem.cu_seqlens_q ? find_site<false>(problem, tile.block, Traits::kBlockM)
                                           : dense_site(problem, tile.batch, tile.block);
    if (site.block * Traits::kBlockM >= site.seqlen_q) { return; }
    Visibility<kMask> const see{site.seqlen_q, site.seqlen_k, problem.window_left,
                                problem.window_right};
    BlockRange const blocks = key_blocks<Traits::kBlockM, Traits::kBlockN>(see, site.block);
    if constexpr (kLevel != Level::kPlain) {
      ScoreMod const mod = score_mod(problem, min_of(site.batch, problem.batch - 1), tile.head);
      if (thread == 0) {
        saved.features = tile_features<kLevel>(problem, mod, site.batch, tile.head);
      }
    }
    if (thread == 0) {
      saved.head = tile.head, saved.site = site, saved.blocks = blocks;
      saved.window_left = problem.window_left, saved.window_right = problem.window_right;
    }
    __syncthreads();  // PROTECTS: saved is complete.
    int const head_kv    = tile.head / (problem.heads_q / problem.heads_kv);
    auto const first_row = [&](TensorRef const& tensor, int head, int row) {
      return matrix_of<Element>(tensor, site.batch, head) + row * tensor.row_stride;
    };
    typename FwdMainloop<Traits, kMask, kLevel>::Operands const operands{
        first_row(params.q, tile.head, site.q_row0),
        first_row(params.k, head_kv, site.k_row0),
        first_row(params.v, head_kv, site.k_row0),
        params.q.row_stride,
        params.k.row_stride,
        params.v.row_stride,
        &saved,
        problem.keep_below};
    if (blocks.first < blocks.end) {
      FwdMainloop<Traits, kMask, kLevel>::run(operands, see, blocks, site.block, problem.head_dim,
                                              smem, tOrO, softmax);
    }
  }

  // Epilogue: O / sum and LSE
  Site const& site = saved.site;
  int const row0 = site.block * Traits::kBlockM, head = saved.head;
  float lse[kRows];
  softmax.finish(lse);
  auto o_rows = make_tensor(tOrO.data(), rows_columns(tOrO.layout()));
  CUTE_UNROLL
  for (int r = 0; r < kRows; ++r) {
    CUTE_UNROLL
    for (int c = 0; c < size<1>(o_rows); ++c) {
      // Chosen, not multiplied: 0 * NaN of a hidden V must not reach a row that sees nothing.
      o_rows(r, c) = softmax.row_sum[r] == 0.f ? 0.f : o_rows(r, c) * softmax.row_sum[r];
      if constexpr (may_have(kLevel, Level::kDropout)) { o_rows(r, c) *= problem.keep_scale; }
    }
  }
  // No barrier before: a warp's rows of O overwrite the rows of Q that only it reads.
  auto sO = Traits::TileQ::tensor(smem);
  fragment_to_smem<typename Traits::TiledMma>(round_to<Element>(tOrO), sO, thread);

  auto cO   = make_identity_tensor(Shape<Int<Traits::kBlockM>, Int<Traits::kHeadDim>>{});
  auto tOcO = mma.get_slice(thread).partition_C(cO);
  auto rows = make_tensor(tOcO.data(), rows_columns(tOcO.layout()));
  float* const lse_rows = params.lse + site.batch * problem.lse_batch_stride +
                          head * problem.lse_head_stride + site.q_row0 + row0;
  CUTE_UNROLL
  for (int r = 0; r < kRows; ++r) {
    int const row = get<0>(rows(r, 0));
    if (get<1>(rows(0, 0)) == 0 && row0 + row < site.seqlen_q) { lse_rows[row] = lse[r]; }
  }
  __syncthreads();  // PROTECTS: all of O is in shared memory before other threads read it.
  smem_to_rows<Traits::kBlockM, Traits::kHeadDim, Traits::kThreads>(
      sO,
      matrix_of<Element>(params.out, site.batch, head) +
          int64_t(site.q_row0 + row0) * params.out.row_stride,
      params.out.row_stride, site.seqlen_q - row0, problem.head_dim, thread);
}

}  // namespace flash::sm80
