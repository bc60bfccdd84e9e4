#pragma once
// S = Q K^T of one key block, and what its masks' loops need.  Used by: fwd/mainloop.
#include "pieces/head.cuh"
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

// The shuffle returns the thread's own index.  Unlike the index it cannot be moved out of a loop, where what follows from it would
// be kept for the mask and spilled.
CUTE_DEVICE int fixed_in_loop(int lane) { return as_index(__shfl_sync(~0u, lane, lane % 32)); }

// __syncthreads() that waits for a score's bits: the barrier's number depends on them.  zero: 0, which the compiler must not know.
CUTE_DEVICE void barrier_after(int score, int zero) {
  asm volatile("bar.sync %0;" ::"r"(score & zero) : "memory");
}

// Rounds of a loop that is run or not: known to the compiler, or only when the program runs.
CUTE_DEVICE constexpr int run_time_flag(true_type) { return 1; }
CUTE_DEVICE constexpr int run_time_flag(false_type) { return 0; }
CUTE_DEVICE int run_time_flag(bool flag) { return opaque(int(flag)); }

}  // namespace flash::sm80
