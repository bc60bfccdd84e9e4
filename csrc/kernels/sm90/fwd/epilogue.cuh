#pragma once
// Output of a consumer warpgroup: O / sum through the place of its Q, LSE straight from registers.
// Invariant: rows of other sequences and columns beyond head_dim_v are never written.
#include "pieces/address.cuh"
#include "pieces/softmax.cuh"
#include "sm90/fwd/traits.cuh"
#include "sm90/instructions/barrier.cuh"
#include "sm90/instructions/tma.cuh"
#include "sm90/instructions/wgmma.cuh"

namespace flash::sm90 {

// rows(r, c) *= factor[r].
template <class TensorR>
CUTE_DEVICE void multiply_rows(TensorR& rows, float const (&factor)[2]) {
  CUTE_UNROLL
  for (int r = 0; r < 2; ++r) {
    CUTE_UNROLL
    for (int c = 0; c < size<1>(rows); ++c) { rows(r, c) *= factor[r]; }
  }
}

template <class Traits>
struct FwdOutput {
  using Element = typename Traits::Element;

  FwdParams const& params;
  TmaTensor const& map;
  typename Traits::Shared& smem;
  int group, thread;
  int& stored_from;  // Q's buffer from which an output may still be read; -1: none

  // O: not yet divided by the rows' sums.  job: in shared memory, so that it takes no registers in the main loop.
  template <class TensorO>
  CUTE_DEVICE void store(Job<Traits::kGroups> const& job, int q_buffer, TensorO& tOrO,
                         Softmax<2>& softmax) {
    release();
    float lse[2];
    softmax.finish(lse);
    auto o_rows = rows_of(tOrO);
    CUTE_UNROLL
    for (int r = 0; r < 2; ++r) {
      float const factor = softmax.row_sum[r] * params.problem.keep_scale;
      CUTE_UNROLL
      for (int c = 0; c < size<1>(o_rows); ++c) {
        // Chosen, not multiplied: 0 * NaN of a hidden V must not reach a row that sees nothing.
        o_rows(r, c) = factor == 0.f ? 0.f : o_rows(r, c) * factor;
      }
    }
    auto const rounded = round_to<Element>(tOrO);
    int const row0 = job.row0 + group * kGroupRows, rows = job.site.seqlen_q - row0;
    store_lse(job, row0, rows, lse);
    sync_group();  // PROTECTS: no warp's product still reads Q.
    using TiledMma      = typename Traits::TiledMmaO;
    auto const copy_    = make_tiled_copy_C(Copy_Atom<SM90_U32x4_STSM_N, Element>{}, TiledMma{});
    auto const slice    = copy_.get_slice(thread);
    Element* const tile = smem.q[q_buffer][group];
    auto sO             = make_tensor(make_smem_ptr(tile), typename Traits::LayoutO{});
    copy(copy_, slice.retile_S(rounded), slice.partition_D(sO));
    stored_from = q_buffer;
    // TMA clips at the tensor's end, not at a sequence's.
    if (!params.problem.cu_seqlens_q || rows >= kGroupRows) {
      fence_for_async();
      sync_group();  // PROTECTS: O is complete, and TMA sees it.
      if (thread == 0) {
        store_tile<Traits::kHeadDimV, kGroupRows, Traits::kBoxColumns>(
            map, tile, job.site.q_row0 + row0, job.head, job.site.batch);
      }
    } else {
      __syncwarp();  // PROTECTS: this warp's rows of O are complete.
      store_rows(job, sO, row0, rows);
      fence_for_async();
      sync_group();  // PROTECTS: Q's next tile is not loaded over rows that a warp still copies.
    }
    if constexpr (Traits::kQBuffers == 1) { release(); }
  }

  // Gives the buffer of the last output back to the producer.
  CUTE_DEVICE void release() {
    if (stored_from >= 0 && thread == 0) {
      tma_store_wait<0>();
      arrive(smem.q_empty[stored_from][group]);
    }
    stored_from = -1;
  }

 private:
  CUTE_DEVICE void sync_group() const {
    constexpr int kFirstFree = 1;  // barrier 0 is __syncthreads'
    asm volatile("bar.sync %0, %1;" ::"r"(kFirstFree + group), "n"(Traits::kGroupThreads)
                 : "memory");
  }

  // The first of four lanes that share rows stores their LSE.
  CUTE_DEVICE void store_lse(Job<Traits::kGroups> const& job, int row0, int rows,
                             float const (&lse)[2]) const {
    Problem const& problem = params.problem;
    int const row          = first_row_of(thread);
    float* const place     = params.lse + job.site.batch * problem.lse_batch_stride +
                             job.head * problem.lse_head_stride + job.site.q_row0 + row0 + row;
    CUTE_UNROLL
    for (int r = 0; r < 2; ++r) {
      if (thread % 4 == 0 && row + kRowStep * r < rows) { place[kRowStep * r] = lse[r]; }
    }
  }

  // This warp's sixteen rows, as far as there are any.
  template <class TensorS>
  CUTE_DEVICE void store_rows(Job<Traits::kGroups> const& job, TensorS const& sO, int row0,
                              int rows) const {
    constexpr int kRowChunks = Traits::kHeadDimV / 8;
    Element* const matrix =
        row_of<Element>(params.out, job.site.batch, job.head, job.site.q_row0 + row0);
    for (int i = thread % 32; i < 16 * kRowChunks; i += 32) {
      int const row = thread / 32 * 16 + i / kRowChunks, column = i % kRowChunks * 8;
      if (row < rows && column < params.problem.head_dim_v) {
        *reinterpret_cast<uint4*>(matrix + row * params.out.row_stride + column) =
            *reinterpret_cast<uint4 const*>(&sO(row, column));
      }
    }
  }
};

}  // namespace flash::sm90
