#pragma once
// C += A B^T for one tile, operands from swizzled shared memory (ldmatrix) or already in registers.
// Used by: every main loop.  Fragments of k-step k + 1 are loaded while the tensor cores work on k-step k.
#include <cute/tensor.hpp>

#include "sm80/instructions/mma_if.cuh"

namespace flash::sm80 {
using namespace cute;

using LdsmN = SM75_U32x4_LDSM_N;  // four 8x8 blocks as they lie in shared memory
using LdsmT = SM75_U16x8_LDSM_T;  // ... transposed

// One operand in shared memory and its fragments.  kIsA: the A operand, otherwise B.
template <bool kIsA, class Ldsm, class Element, class TiledMma>
struct SmemOperand {
  static auto make_copy() {
    if constexpr (kIsA) {
      return make_tiled_copy_A(Copy_Atom<Ldsm, Element>{}, TiledMma{});
    } else {
      return make_tiled_copy_B(Copy_Atom<Ldsm, Element>{}, TiledMma{});
    }
  }
  using TiledCopy_ = decltype(make_copy());

  // Source view (CPY, CPY_MN, CPY_K) of the tile for this thread.
  template <class TensorS>
  CUTE_DEVICE static auto source(TensorS const& sTile, int thread) {
    return TiledCopy_{}.get_thread_slice(thread).partition_S(sTile);
  }
  // Fragments (MMA, MMA_MN, MMA_K) for the whole tile; the compiler keeps alive only what is in flight.
  template <class TensorS>
  CUTE_DEVICE static auto fragments(TensorS const& sTile, int thread) {
    auto plain = make_tensor(static_cast<Element*>(nullptr), make_layout(shape(sTile)));
    if constexpr (kIsA) {
      return TiledMma{}.get_slice(thread).partition_fragment_A(plain);
    } else {
      return TiledMma{}.get_slice(thread).partition_fragment_B(plain);
    }
  }
  // Loads part j (one ldmatrix.x4) of k-step k.
  template <class TensorSource, class TensorFragment>
  CUTE_DEVICE static void load(TensorSource const& tCsX, TensorFragment& tCrX, int j, int k,
                               int thread) {
    auto view = TiledCopy_{}.get_thread_slice(thread).retile_D(tCrX);
    copy(TiledCopy_{}, tCsX(_, j, k), view(_, j, k));
  }
  template <class TensorSource, class TensorFragment>
  CUTE_DEVICE static void load(TensorSource const& tCsX, TensorFragment& tCrX, int k, int thread) {
    CUTE_UNROLL
    for (int j = 0; j < size<1>(tCsX); ++j) { load(tCsX, tCrX, j, k, thread); }
  }
};

// All of an operand's fragments into registers.
template <class Operand, class TensorS>
CUTE_DEVICE auto load_fragments(TensorS const& sTile, int thread) {
  auto tCsX = Operand::source(sTile, thread);
  auto tCrX = Operand::fragments(sTile, thread);
  CUTE_UNROLL
  for (int k = 0; k < size<2>(tCrX); ++k) { Operand::load(tCsX, tCrX, k, thread); }
  return tCrX;
}

// C += A B^T.  Each ldmatrix.x4 of B feeds 2 x MMA_M tensor core instructions; right after them the same part of the next k-step is
// loaded, so that one k-step of B and one load are alive at a time.  load_a(k) brings the A fragments of k-step k.  beside(i) is
// called after the i-th part of the product: work that does not depend on it, to be issued while the tensor cores are busy.
// rows: AllRows or ActiveRows.
template <class OperandB, class TiledMma, class TensorC, class TensorA, class TensorB, class LoadA,
          class Beside, class Rows = AllRows>
CUTE_DEVICE void gemm_pipelined(TiledMma mma, TensorC& tCrC, TensorA& tCrA, TensorB const& sB,
                                int thread, LoadA load_a, Beside beside, Rows rows = {}) {
  auto tCsB            = OperandB::source(sB, thread);
  auto tCrB            = OperandB::fragments(sB, thread);
  constexpr int kParts = decltype(size<1>(tCsB))::value, kSteps = decltype(size<2>(tCrA))::value;
  constexpr int kAtoms = decltype(size<1>(tCrB))::value / kParts;  // n8 atoms per part
  load_a(0);
  OperandB::load(tCsB, tCrB, 0, thread);
  CUTE_UNROLL
  for (int k = 0; k < kSteps; ++k) {
    if (k + 1 < kSteps) { load_a(k + 1); }
    CUTE_UNROLL
    for (int j = 0; j < kParts; ++j) {
      CUTE_UNROLL
      for (int n = j * kAtoms; n < (j + 1) * kAtoms; ++n) {
        CUTE_UNROLL
        for (int i = 0; i < size<1>(tCrC); ++i) {
          int const m =
              n % 2 ? size<1>(tCrC) - 1 - i : i;  // back and forth: neighbours share an operand
          if constexpr (std::is_same_v<Rows, AllRows>) {
            gemm(mma, tCrA(_, m, k), tCrB(_, n, k), tCrC(_, m, n));
          } else {
            mma_if(rows.atom[m], tCrC(_, m, n), tCrA(_, m, k), tCrB(_, n, k));
          }
        }
      }
      if (k + 1 < kSteps) { OperandB::load(tCsB, tCrB, j, k + 1, thread); }
      beside(k * kParts + j);
    }
  }
}

// A and B from shared memory.
template <class OperandA, class OperandB, class TiledMma, class TensorC, class TensorA,
          class TensorB, class Beside, class Rows = AllRows>
CUTE_DEVICE void gemm_ss(TiledMma mma, TensorC& tCrC, TensorA const& sA, TensorB const& sB,
                         int thread, Beside beside, Rows rows = {}) {
  auto tCsA = OperandA::source(sA, thread);
  auto tCrA = OperandA::fragments(sA, thread);
  gemm_pipelined<OperandB>(
      mma, tCrC, tCrA, sB, thread, [&](int k) { OperandA::load(tCsA, tCrA, k, thread); }, beside,
      rows);
}
template <class OperandA, class OperandB, class TiledMma, class TensorC, class TensorA,
          class TensorB>
CUTE_DEVICE void gemm_ss(TiledMma mma, TensorC& tCrC, TensorA const& sA, TensorB const& sB,
                         int thread) {
  gemm_ss<OperandA, OperandB>(mma, tCrC, sA, sB, thread, [](int) {});
}

// A in registers, B from shared memory.
template <class OperandB, class TiledMma, class TensorC, class TensorA, class TensorB, class Beside,
          class Rows = AllRows>
CUTE_DEVICE void gemm_rs(TiledMma mma, TensorC& tCrC, TensorA& tCrA, TensorB const& sB, int thread,
                         Beside beside, Rows rows = {}) {
  gemm_pipelined<OperandB>(mma, tCrC, tCrA, sB, thread, [](int) {}, beside, rows);
}
template <class OperandB, class TiledMma, class TensorC, class TensorA, class TensorB>
CUTE_DEVICE void gemm_rs(TiledMma mma, TensorC& tCrC, TensorA& tCrA, TensorB const& sB,
                         int thread) {
  gemm_rs<OperandB>(mma, tCrC, tCrA, sB, thread, [](int) {});
}

}  // namespace flash::sm80
