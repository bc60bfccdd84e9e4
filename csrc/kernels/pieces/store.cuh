#pragma once
// Accumulators to global memory through shared memory, 16 bytes per thread and store.
// Used by: the epilogues of forward and backward.  Invariant: rows >= rows and columns >= head_dim are never written.
#include <cute/tensor.hpp>

namespace flash {
using namespace cute;

// The accumulator of TiledMma, rounded to 16 bits, into a swizzled tile.
template <class TiledMma, class TensorR, class TensorS>
CUTE_DEVICE void fragment_to_smem(TensorR const& rounded, TensorS&& sTile, int thread) {
  using Element = typename TensorR::value_type;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  auto tiled_copy = make_tiled_copy_C(Copy_Atom<SM90_U32x4_STSM_N, Element>{}, TiledMma{});
#else
  auto tiled_copy = make_tiled_copy_C(Copy_Atom<AutoVectorizingCopy, Element>{}, TiledMma{});
#endif
  auto slice = tiled_copy.get_thread_slice(thread);
  copy(tiled_copy, slice.retile_S(rounded), slice.partition_D(sTile));
}

// Rows [0, rows) of the tile to a row-major matrix; a barrier must lie between this and fragment_to_smem.
template <int kRows, int kColumns, int kThreads, class Element, class TensorS>
CUTE_DEVICE void smem_to_rows(TensorS const& sTile, Element* matrix, int64_t row_stride, int rows,
                              int head_dim, int thread) {
  constexpr int kChunks = kColumns / 8;
  CUTE_UNROLL
  for (int i = 0; i < (kRows * kChunks + kThreads - 1) / kThreads; ++i) {
    int const chunk = thread + i * kThreads, row = chunk / kChunks, column = chunk % kChunks * 8;
    if (row < min(kRows, rows) && column < head_dim) {
      *reinterpret_cast<uint4*>(matrix + row * row_stride + column) =
          *reinterpret_cast<uint4 const*>(&sTile(row, column));
    }
  }
}

}  // namespace flash
