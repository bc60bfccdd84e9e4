#pragma once
// Accumulators to global memory, through shared memory, 16 bytes per thread and store.
// Used by: the epilogues of forward and backward.  Invariant: rows >= rows and columns >= head_dim are never written.
#include <cute/tensor.hpp>

#include "pieces/coordinates.cuh"
#include "sm80/instructions/smem_layout.cuh"

namespace flash::sm80 {
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

// The accumulator of TiledMma, whose warps lie along the rows, rounded to 16 bits, to rows [0, rows) of a row-major matrix.  sTile: memory that
// no other warp uses where this warp's rows lie in it.
template <class TiledMma, int kColumns, class TensorR, class TensorS, class Element>
CUTE_DEVICE void fragment_to_rows(TensorR const& rounded, TensorS&& sTile, Element* matrix,
                                  int64_t row_stride, int rows, int head_dim, int thread) {
  constexpr int kAtomColumns = atom_columns(kColumns);
  constexpr int kChunks = kAtomColumns / 8, kRowStep = 32 / kChunks,
                kRows = decltype(size<0>(sTile))::value;
  fragment_to_smem<TiledMma>(rounded, sTile, thread);
  __syncwarp();
  using TileShape  = decltype(make_shape(size<0>(sTile), size<1>(sTile)));
  auto const warp  = tile_coordinates<TiledMma, TileShape>(thread / 32 * 32);
  auto const first = tile_coordinates<TiledMma, TileShape>(_0{});
  int const row = int(get<0>(warp(0, 0, 0))) + thread % 32 / kChunks, column = thread % kChunks * 8;
  auto const* chunk = &sTile(row, column);
  // The swizzle inverts bit 2 of a chunk's number with bit 2 of its row.
  int const odd_step       = kRowStep < 8 ? (column & 32 ? -32 : 32) : 0;
  int const rows_left      = rows - row;
  int64_t const step       = kRowStep * row_stride;
  Element* const first_row = matrix + row * row_stride + column;
  CUTE_UNROLL
  for (int m = 0; m < size<1>(first); ++m) {
    int const top   = int(get<0>(first(0, m, 0)));
    Element* target = first_row + top * row_stride;
    CUTE_UNROLL
    for (int i = 0; i < 16 / kRowStep; ++i) {
      int const down = top + i * kRowStep;
      CUTE_UNROLL
      for (int c = 0; c < kColumns; c += kAtomColumns) {
        uint4 const words = *reinterpret_cast<uint4 const*>(
            chunk + (down * kAtomColumns + c * kRows) + (i % 2 ? odd_step : 0));
        if (down < rows_left && column + c < head_dim) {
          *reinterpret_cast<uint4*>(target + c) = words;
        }
      }
      target += step;
    }
  }
}

// Rows [0, rows) of the tile to a row-major matrix; a barrier must lie between this and fragment_to_smem.
template <int kRows, int kColumns, int kThreads, class Element, class TensorS>
CUTE_DEVICE void smem_to_rows(TensorS const& sTile, Element* matrix, int64_t row_stride, int rows,
                              int head_dim, int thread) {
  constexpr int kAtomColumns = atom_columns(kColumns);
  constexpr int kChunks = kAtomColumns / 8, kRowStep = kThreads / kChunks;
  static_assert(kRowStep % 8 == 0 && kRows % kRowStep == 0,
                "passes cover whole swizzle periods: shared addresses differ by constants");
  int const row = thread / kChunks, column = thread % kChunks * 8;
  Element const* const source = &sTile(row, column);
  Element* target             = matrix + row * row_stride + column;
  CUTE_UNROLL
  for (int down = 0; down < kRows; down += kRowStep) {
    CUTE_UNROLL
    for (int c = 0; c < kColumns; c += kAtomColumns) {
      if (row + down < rows && column + c < head_dim) {
        *reinterpret_cast<uint4*>(target + c) =
            *reinterpret_cast<uint4 const*>(source + down * kAtomColumns + c * kRows);
      }
    }
    target += kRowStep * row_stride;
  }
}

}  // namespace flash::sm80
