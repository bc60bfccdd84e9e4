#pragma once
// S = Q K^T of one key block, for its own sake or watched.  Used by: fwd/mainloop.
#include "pieces/compiler.cuh"
#include "sm80/fwd/traits.cuh"
#include "sm80/instructions/gemm.cuh"

namespace flash::sm80 {

// The rows of atoms; tSrQ or sQ holds Q, by Traits::kQInRegs.  beside, rows: see gemm_pipelined.
template <class Traits, class Atoms, class TensorS, class TensorRQ, class TensorSQ, class TensorSK,
          class Rows, class Beside>
CUTE_DEVICE void multiply_scores(Atoms atoms, TensorS& tSrS, TensorRQ& tSrQ, TensorSQ const& sQ,
                                 TensorSK const& sK, int thread, Rows rows, Beside beside) {
  typename Traits::TiledMma mma;
  auto tSrS_part = atoms.of(tSrS);
  clear(tSrS_part);
  if constexpr (Traits::kQInRegs) {
    auto tSrQ_part = atoms.of(tSrQ);
    gemm_rs<typename Traits::OperandK>(mma, tSrS_part, tSrQ_part, sK, thread, beside, rows);
  } else {
    constexpr int kRows = Atoms::kCount * 16 * Traits::kWarps;
    auto const sQ_part  = local_tile(sQ, Shape<Int<kRows>, Int<Traits::kHeadDim>>{},
                                     make_coord(Int<Atoms::kFirst / Atoms::kCount>{}, _0{}));
    gemm_ss<typename Traits::OperandQ, typename Traits::OperandK>(mma, tSrS_part, sQ_part, sK,
                                                                  thread, beside, rows);
  }
}

// The same; returns the bits of one score as it was after part kPart (gemm_pipelined), for barrier_after.
template <class Traits, int kPart, class Atoms, class TensorS, class TensorRQ, class TensorSQ,
          class TensorSK, class Rows>
CUTE_DEVICE int multiply_scores_watched(Atoms atoms, TensorS& tSrS, TensorRQ& tSrQ,
                                        TensorSQ const& sQ, TensorSK const& sK, int thread,
                                        Rows rows) {
  constexpr int kColumn = kPart % (Traits::kBlockN / 16) * 2 + 1;  // n8 atom
  int bits              = 0;
  multiply_scores<Traits>(atoms, tSrS, tSrQ, sQ, sK, thread, rows, [&](int part) {
    if (part == kPart) { bits = __float_as_int(tSrS(0, Int<Atoms::kFirst>{}, Int<kColumn>{})); }
  });
  return bits;
}

}  // namespace flash::sm80
