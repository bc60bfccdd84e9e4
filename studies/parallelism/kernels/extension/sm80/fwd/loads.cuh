#pragma once
// A query tile's Q, K and V: where they lie in global and in shared memory, and the start of their loads.
// Used by: fwd_kernel and fwd/mainloop.
#include "pieces/compiler.cuh"
#include "pieces/features.cuh"
#include "sm80/fwd/traits.cuh"
#include "sm80/instructions/copy.cuh"

namespace flash::sm80 {

template <class Traits, MaskKind kMask>
struct FwdLoads {
  using Element = typename Traits::Element;
  using TileQ   = typename Traits::TileQ;
  using TileKV  = typename Traits::TileKV;
  using Copy    = TileCopy<Element, Traits::kBlockN, Traits::kHeadDim, Traits::kThreads>;
  using CopyQ   = TileCopy<Element, Traits::kBlockM, Traits::kHeadDim, Traits::kThreads>;
  // One query tile's matrices in global memory, from its first rows of Q and its sequence's first rows of K and V on.
  struct Tile {
    Element const *q, *k, *v;
    int64_t q_row_stride, k_row_stride, v_row_stride;
    int head_dim, m_block;
    Visibility<kMask> see;
    BlockRange blocks;       // not empty
    SavedTile const* saved;  // in shared memory; read where the kernel's level needs it
    KeepRule keep;
  };

  Element* const smem;
  int zero;  // 0 without dropout, which the compiler must not know (barrier_after).  In Tile, it made other kernels spill.

  // Starts the loads of a tile's Q, last two K and last V.
  CUTE_DEVICE void start(Tile const& tile) const {
    int const lane = opaque_index(Traits::Thread::index()), n_block = tile.blocks.end - 1;
    int const row0      = tile.m_block * Traits::kBlockM;
    int const rows_left = tile.see.seqlen_k - n_block * Traits::kBlockN;
    CopyQ(tile.q + row0 * tile.q_row_stride, tile.q_row_stride, tile.head_dim, lane)
        .template start<true>(q(), tile.see.seqlen_q - row0, lane);
    Copy copy_k = copy_of(tile.k, tile.k_row_stride, n_block, tile.head_dim, lane);
    copy_k.template start<true>(k(0), rows_left, lane);
    cp_async_commit();
    copy_of(tile.v, tile.v_row_stride, n_block, tile.head_dim, lane)
        .template start<true>(v(0), rows_left, lane);
    if (n_block > tile.blocks.first) {
      copy_k.move(-Traits::kBlockN * tile.k_row_stride);
      copy_k.template start<false>(k(1), 0, lane);
    }
    cp_async_commit();
  }

  CUTE_DEVICE static Copy copy_of(Element const* rows, int64_t row_stride, int n_block,
                                  int head_dim, int thread) {
    return Copy(rows + int64_t(n_block) * Traits::kBlockN * row_stride, row_stride, head_dim,
                thread);
  }

  // The thread block makes a tile's first rows zeros.
  template <class TensorS>
  CUTE_DEVICE static void clear_rows(TensorS const& sTile, int rows) {
    constexpr int kChunks = Traits::kHeadDim / 8;  // of 16 bytes
#pragma unroll 1
    for (int i = thread_now(); i < rows * kChunks; i += Traits::kThreads) {
      *reinterpret_cast<uint4*>(&sTile(i / kChunks, i % kChunks * 8)) = make_uint4(0, 0, 0, 0);
    }
  }

  // Tiles in shared memory, K and V by stage.
  CUTE_DEVICE auto q() const { return TileQ::tensor(smem); }
  CUTE_DEVICE auto k(int stage) const {
    return TileKV::tensor(smem + TileQ::kSize + stage * TileKV::kSize);
  }
  CUTE_DEVICE auto v(int stage) const { return TileKV::tensor(smem_v(stage)); }
  CUTE_DEVICE auto v_transposed(int stage) const { return TileKV::transposed(smem_v(stage)); }

 private:
  CUTE_DEVICE Element* smem_v(int stage) const {
    return smem + TileQ::kSize + Traits::kStages * TileKV::kSize + stage * TileKV::kSize;
  }
};

}  // namespace flash::sm80
