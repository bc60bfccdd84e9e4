#pragma once
// Accumulators to global memory, 16 bytes per thread and store: through shared memory, or with trades between lanes.
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

// The lanes of a quad trade: before, word i of lane t is word t of block i; after, word i of block t.
CUTE_DEVICE void transpose_quad(uint32_t (&words)[4], int lane) {
  CUTE_UNROLL
  for (int bit = 1; bit < 4; bit *= 2) {
    bool const upper = lane & bit;
    CUTE_UNROLL
    for (int i = 0; i < 4; ++i) {
      if (i & bit) { continue; }
      uint32_t const mine = upper ? words[i] : words[i | bit];
      uint32_t const got  = __shfl_xor_sync(~0u, mine, bit);
      words[i]            = upper ? got : words[i];
      words[i | bit]      = upper ? words[i | bit] : got;
    }
  }
}

// The accumulator of m16n8 atoms, rounded to 16 bits, straight to rows [0, rows) of a row-major matrix.  coordinates: its partition of the
// tile's (row, column).  A lane holds two of an atom's eight columns; of four atoms a quad makes 16 bytes for each of its lanes.
template <class TensorR, class TensorC, class Element>
CUTE_DEVICE void fragment_to_rows(TensorR const& rounded, TensorC const& coordinates,
                                  Element* matrix, int64_t row_stride, int rows, int head_dim,
                                  int thread) {
  constexpr int kAtomsM = decltype(size<1>(rounded))::value,
                kAtomsN = decltype(size<2>(rounded))::value;
  static_assert(kAtomsN % 4 == 0, "four atoms give every lane of a quad 16 bytes");
  auto const* const pairs = reinterpret_cast<uint32_t const*>(rounded.data());
  int const t             = thread % 4;
  CUTE_UNROLL
  for (int m = 0; m < kAtomsM; ++m) {
    CUTE_UNROLL
    for (int half = 0; half < 2; ++half) {
      int const row = get<0>(coordinates(2 * half, m, 0));
      CUTE_UNROLL
      for (int n = 0; n < kAtomsN; n += 4) {
        uint32_t words[4];
        CUTE_UNROLL
        for (int i = 0; i < 4; ++i) { words[i] = pairs[half + 2 * (m + kAtomsM * (n + i))]; }
        transpose_quad(words, thread);
        int const column = int(get<1>(coordinates(0, m, n))) + 6 * t;  // 8 t instead of 2 t
        if (row < rows && column < head_dim) {
          *reinterpret_cast<uint4*>(matrix + row * row_stride + column) =
              make_uint4(words[0], words[1], words[2], words[3]);
        }
      }
    }
  }
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
