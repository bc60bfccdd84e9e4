#pragma once
// Tiles between global and shared memory: 16-byte cp.async with zero fill outside the matrix.
// Used by: every main loop.  Invariant: rows that do not exist and columns >= head_dim arrive as zeros
// and are never read.
#include <cute/tensor.hpp>

#include "pieces/compiler.cuh"
#include "sm80/instructions/smem_layout.cuh"

namespace flash::sm80 {
using namespace cute;

// 16 bytes from global to shared memory, bypassing L1; zeros when !valid (then the address is not touched).
template <class Element>
CUTE_DEVICE void cp_async_16(uint32_t smem, Element const* gmem, bool valid) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;\n" ::"r"(smem), "l"(gmem),
               "r"(valid ? 16 : 0));
}
template <class Element>
CUTE_DEVICE void cp_async_16(Element* smem, Element const* gmem, bool valid) {
  cp_async_16(cast_smem_ptr_to_uint(smem), gmem, valid);
}

CUTE_DEVICE void cp_async_commit() { asm volatile("cp.async.commit_group;\n"); }
template <int kPending>
CUTE_DEVICE void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(kPending));
}

// One thread's share of copying (kRows x kColumns) tiles of a row-major matrix, one tile after another.
//
//   thread t copies column chunk t % kChunks and rows t / kChunks + i * kRowStep, i = 0, 1, ...
//   (kChunks * 8 columns at a time: a row of the shared tile's swizzle atom)
template <class Element, int kRows, int kColumns, int kThreads>
struct TileCopy {
  static constexpr int kAtomColumns = atom_columns(kColumns);
  static constexpr int kChunks      = kAtomColumns / 8;  // 16-byte chunks in a row of the atom
  static constexpr int kRowStep = kThreads / kChunks;    // rows that one pass of all threads covers
  static constexpr int kSteps = kRows / kRowStep, kAtoms = kColumns / kAtomColumns;
  static_assert(kThreads % kChunks == 0 && kRows % kRowStep == 0, "whole passes of all threads");
  static_assert(kRowStep % 8 == 0, "a pass covers whole swizzle periods");

  Element const* next;  // this thread's first element of the tile to copy next
  int64_t row_stride;
  int head_dim;

  // matrix: first row of the first tile.
  CUTE_DEVICE TileCopy(Element const* matrix, int64_t row_stride_, int head_dim_, int thread)
      : row_stride(row_stride_), head_dim(head_dim_) {
    next = matrix + row(thread) * row_stride + column(thread);
  }
  CUTE_DEVICE static int row(int thread) { return thread / kChunks; }
  CUTE_DEVICE static int column(int thread) { return thread % kChunks * 8; }

  // One pointer per matrix moves along: recomputing it from the block index kept four more registers alive.
  CUTE_DEVICE void move(int64_t elements) { next += elements; }

  // Starts the copy of the tile above the last one, all rows of which exist.  kUpward: rows from the last to the first, so that one
  // addition leads from row to row and from tile to tile; next then is this thread's last row of the tile that it copies next, which
  // move_to_last_row() makes it.  It takes fewer registers in some kernels, more in others.
  CUTE_DEVICE void move_to_last_row() { next += (kRows - kRowStep) * row_stride; }
  template <bool kUpward, class TensorS>
  CUTE_DEVICE void start_above(TensorS const& sTile, int thread) {
    if constexpr (!kUpward) {
      move(-kRows * row_stride);
      start<false>(sTile, 0, thread);
    } else {
      Element* const target = &sTile(row(thread), column(thread));
      int const columns     = head_dim - column(opaque_index(thread));
      int64_t const step    = -kRowStep * row_stride * int64_t(sizeof(Element));
      CUTE_UNROLL
      for (int i = kSteps - 1; i >= 0; --i) {
        CUTE_UNROLL
        for (int j = 0; j < kAtoms; ++j) {
          cp_async_16(target + i * kRowStep * kAtomColumns + j * kRows * kAtomColumns,
                      next + j * kAtomColumns, j * kAtomColumns < columns);
        }
        advance_now(next, step);
      }
    }
  }

  // Starts the copy of the next tile into sTile.  Rows from rows_left on become zeros (kCheckRows; otherwise all exist).
  template <bool kCheckRows, class TensorS>
  CUTE_DEVICE void start(TensorS const& sTile, int rows_left, int thread) const {
    start_where(sTile, thread, [&](int row) { return !kCheckRows || row < rows_left; });
  }
  // Rows before first become zeros too (kHasFirst; otherwise there are none).
  template <bool kHasFirst, class TensorS>
  CUTE_DEVICE void start_between(TensorS const& sTile, int first, int end, int thread) const {
    start_where(sTile, thread, [&](int row) {
      return kHasFirst ? unsigned(row - first) < unsigned(end - first) : row < end;
    });
  }
  // Rows become zeros unless exists(row).
  template <class TensorS, class Exists>
  CUTE_DEVICE void start_where(TensorS const& sTile, int thread, Exists exists) const {
    // Steps are whole swizzle periods and atoms lie one after another: shared addresses differ by constants.
    Element* const target = &sTile(row(thread), column(thread));
    Element const* line   = next;
    int const columns =
        head_dim - column(opaque(thread));  // computed anew each time: kept, it was spilled
    CUTE_UNROLL
    for (int i = 0; i < kSteps; ++i) {
      bool const row_exists = exists(row(thread) + i * kRowStep);
      CUTE_UNROLL
      for (int j = 0; j < kAtoms; ++j) {
        cp_async_16(target + i * kRowStep * kAtomColumns + j * kRows * kAtomColumns,
                    line + j * kAtomColumns, row_exists && j * kAtomColumns < columns);
      }
      line += kRowStep * row_stride;
    }
  }
};

}  // namespace flash::sm80
