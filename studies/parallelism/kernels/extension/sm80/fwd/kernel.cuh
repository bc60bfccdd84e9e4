#pragma once
// Forward kernel: one thread block per (query block, head, batch), in the order of TileOrder.
// Invariant: every row of out and lse below seqlen_q is written exactly once.
#include "pieces/address.cuh"
#include "pieces/compiler.cuh"
#include "pieces/coordinates.cuh"
#include "pieces/features.cuh"
#include "pieces/sequence.cuh"
#include "pieces/tile_order.cuh"
#include "sm80/fwd/mainloop.cuh"
#include "sm80/instructions/fragment.cuh"
#include "sm80/instructions/store.cuh"

namespace flash::sm80 {

// One query tile.  saved: in shared memory, what the epilogue (and some kernels' softmax) need again: in registers it would be spilled in
// the loop.
template <class Traits, MaskKind kMask, Level kLevel>
struct QueryTile {
  using Mainloop = FwdMainloop<Traits, kMask, kLevel>;
  using Loads    = typename Mainloop::Loads;
  using Element  = typename Traits::Element;

  FwdParams const& params;
  SavedTile& saved;

  // head_kv: the key head that coord.head shares.
  CUTE_DEVICE void work(TileCoord const& coord, int head_kv, Element* smem) const {
    SavedTile found;
    if (!find(coord, found)) { return; }
    bool const sees_keys = found.blocks.first < found.blocks.end;
    auto const tile      = operands(found, head_kv);
    Loads const loads{smem, int(reinterpret_cast<intptr_t>(params.problem.rng_state))};
    if (sees_keys) { loads.start(tile); }
    if (Traits::Thread::index() == 0) { saved = found; }

    auto tOrO = partition_fragment_C(typename Traits::TiledMma{},
                                     Shape<Int<Traits::kBlockM>, Int<Traits::kHeadDim>>{});
    Softmax<2 * decltype(size<1>(tOrO))::value> softmax(params.problem.unit.scale_log2);
    if (sees_keys) {
      Mainloop{loads}.run(tile, tOrO, softmax);
    } else {
      clear(tOrO);
      __syncthreads();  // PROTECTS: saved is complete.
    }
    store(tOrO, softmax, smem);
  }

 private:
  // False if the tile has no rows.
  CUTE_DEVICE bool find(TileCoord const& tile, SavedTile& found) const {
    Problem const& problem = params.problem;
    Site const site = problem.cu_seqlens_q ? find_site<false>(problem, tile.block, Traits::kBlockM)
                                           : dense_site(problem, tile.batch, tile.block);
    if (site.block * Traits::kBlockM >= site.seqlen_q) { return false; }
    found.head = tile.head, found.site = site;
    found.window_left = problem.window_left, found.window_right = problem.window_right;
    found.blocks = key_blocks<Traits::kBlockM, Traits::kBlockN>(see(found), site.block);
    if constexpr (Mainloop::kHalves || Mainloop::kSkips) {
      int const middle = site.block * Traits::kBlockM + Traits::kBlockM / 2;
      found.halves     = row_halves<Traits::kBlockN>(see(found), middle);
      found.half_steps = half_steps(found.halves, found.blocks);
    }
    if constexpr (kLevel != Level::kPlain) {
      ScoreMod const mod = score_mod(problem, min_of(site.batch, problem.batch - 1), tile.head);
      found.features     = tile_features<kLevel>(problem, mod, site.batch, tile.head);
    }
    return true;
  }

  CUTE_DEVICE static Visibility<kMask> see(SavedTile const& tile) {
    return {tile.site.seqlen_q, tile.site.seqlen_k, tile.window_left, tile.window_right};
  }

  CUTE_DEVICE typename Loads::Tile operands(SavedTile const& tile, int head_kv) const {
    Problem const& problem = params.problem;
    auto const first_row   = [&](TensorRef const& tensor, int head, int row) {
      return row_of<Element>(tensor, tile.site.batch, head, row);
    };
    return {first_row(params.q, tile.head, tile.site.q_row0),
            first_row(params.k, head_kv, tile.site.k_row0),
            first_row(params.v, head_kv, tile.site.k_row0),
            params.q.row_stride,
            params.k.row_stride,
            params.v.row_stride,
            problem.head_dim,
            tile.site.block,
            see(tile),
            tile.blocks,
            &saved,
            problem.keep};
  }

  // O / sum and LSE to memory.
  template <class TensorO, class Softmax_>
  CUTE_DEVICE void store(TensorO& tOrO, Softmax_& softmax, Element* smem) const {
    constexpr int kRows    = 2 * decltype(size<1>(tOrO))::value;
    Problem const& problem = params.problem;
    Site const& site       = saved.site;
    int const thread = opaque_index(Traits::Thread::index()), row0 = site.block * Traits::kBlockM;
    float lse[kRows];
    softmax.finish(lse);
    auto o_rows = rows_of(tOrO);
    bool empty  = false;  // a row that sees nothing
    CUTE_UNROLL
    for (int r = 0; r < kRows; ++r) {
      float const scale = may_have(kLevel, Level::kDropout)
                              ? softmax.row_sum[r] * problem.keep_scale
                              : softmax.row_sum[r];
      empty |= scale == 0.f;
      CUTE_UNROLL
      for (int c = 0; c < size<1>(o_rows); ++c) { o_rows(r, c) *= scale; }
    }
    // Chosen, not multiplied: 0 * NaN of a hidden V must not reach such a row.
    if (!Mainloop::kForm.asks_empty || __any_sync(~0u, empty)) {
      CUTE_UNROLL
      for (int r = 0; r < kRows; ++r) {
        CUTE_UNROLL
        for (int c = 0; c < size<1>(o_rows); ++c) {
          o_rows(r, c) = softmax.row_sum[r] == 0.f ? 0.f : o_rows(r, c);
        }
      }
    }
    // The first of four lanes that share rows stores their LSE: before O, so that nothing waits for it at the end.
    using Shape_         = Shape<Int<Traits::kBlockM>, Int<Traits::kHeadDim>>;
    auto const mine      = tile_coordinates<typename Traits::TiledMma, Shape_>(thread);
    auto const first     = tile_coordinates<typename Traits::TiledMma, Shape_>(_0{});
    auto const rows      = rows_of(first);
    int const row        = row0 + int(get<0>(mine(_0{})));
    int const rows_left  = thread % 4 ? 0 : site.seqlen_q - row;
    float* const lse_row = params.lse + site.batch * problem.lse_batch_stride +
                           saved.head * problem.lse_head_stride + site.q_row0 + row;
    CUTE_UNROLL
    for (int r = 0; r < kRows; ++r) {
      int const down = get<0>(rows(r, 0));
      if (down < rows_left) { lse_row[down] = lse[r]; }
    }
    // Q's place: only this warp has read its rows.
    fragment_to_rows<typename Traits::TiledMma, Traits::kHeadDim>(
        round_to<Element>(tOrO), Traits::TileQ::tensor(smem),
        row_of<Element>(params.out, site.batch, saved.head, site.q_row0 + row0),
        params.out.row_stride, site.seqlen_q - row0, problem.head_dim, thread);
  }
};

template <class Traits, MaskKind kMask, Level kLevel>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kMinCtas)
    fwd_kernel(__grid_constant__ FwdParams const params, __grid_constant__ TileOrder const order) {
  if (!kIsForThisArch<Traits>) { return __trap(); }
  extern __shared__ __align__(128) unsigned char smem_bytes[];
  __shared__ SavedTile saved;
  using Mainloop = FwdMainloop<Traits, kMask, kLevel>;
  static_assert(sizeof(saved) + Mainloop::kParkedBytes <= Traits::kStaticSmemBytes);
  TileCoord const coord = order.coord(blockIdx.x);
  QueryTile<Traits, kMask, kLevel>{params, saved}.work(
      coord, int(order.by_sharing.divide(uint32_t(coord.head))),
      reinterpret_cast<typename Traits::Element*>(smem_bytes));
}

}  // namespace flash::sm80
