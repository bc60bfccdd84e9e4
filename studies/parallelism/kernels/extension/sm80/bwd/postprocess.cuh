#pragma once
// dQ from its fp32 sum: scaled, rounded, in rows again.  One thread block per (query block, query head, batch).
// It shares the main kernel's MmaDq, in whose coordinates the sum lies: that is why it is not a kernel of its own unit.
#include "common/bwd_workspace.h"
#include "pieces/address.cuh"
#include "pieces/coordinates.cuh"
#include "pieces/dependent.cuh"
#include "pieces/sequence.cuh"
#include "sm80/bwd/traits.cuh"
#include "sm80/instructions/fragment.cuh"
#include "sm80/instructions/store.cuh"

namespace flash::sm80 {

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads)
    bwd_postprocess_kernel(__grid_constant__ BwdKernelParams const params) {
  if (!kIsForThisArch<Traits>) { return __trap(); }
  using Element         = typename Traits::Element;
  constexpr int kBlockM = Traits::kBlockM, kHeadDim = Traits::kHeadDim;
  extern __shared__ __align__(128) unsigned char smem_bytes[];
  Problem const& problem = params.problem;
  int const thread       = threadIdx.x;
  QueryBlock const tile  = query_block(problem, blockIdx.x, kBlockM);
  Site const& site       = tile.site;
  int const row0         = site.block * kBlockM;
  wait_for_previous_kernel();
  if (row0 >= site.seqlen_q) { return; }

  typename Traits::MmaDq mma;
  auto tdQrdQ = partition_fragment_C(mma, Shape<Int<kBlockM>, Int<kHeadDim>>{});
  float const* const block =
      params.workspace.dq_accum + int64_t(blockIdx.x) * Traits::kDqElements + thread * 4;
  CUTE_UNROLL
  for (int i = 0; i < size(tdQrdQ) / 4; ++i) {
    float4 const sum  = *reinterpret_cast<float4 const*>(block + i * Traits::kThreads * 4);
    tdQrdQ(i * 4)     = sum.x * problem.scale;
    tdQrdQ(i * 4 + 1) = sum.y * problem.scale;
    tdQrdQ(i * 4 + 2) = sum.z * problem.scale;
    tdQrdQ(i * 4 + 3) = sum.w * problem.scale;
  }
  // A row that sees no key has gradient 0, whatever hidden keys hold (0 * NaN).
  auto tdQcdQ =
      tile_coordinates<typename Traits::MmaDq, Shape<Int<kBlockM>, Int<kHeadDim>>>(thread);
  auto rows              = rows_of(tdQrdQ);
  auto where             = rows_of(tdQcdQ);
  float const* const lse = params.workspace.rows + int64_t(blockIdx.x) * 2 * kBlockM;
  CUTE_UNROLL
  for (int r = 0; r < size<0>(rows); ++r) {
    if (lse[get<0>(where(r, 0))] == INFINITY) {
      CUTE_UNROLL
      for (int c = 0; c < size<1>(rows); ++c) { rows(r, c) = 0.f; }
    }
  }

  auto sdQ = Traits::TileQ::tensor(reinterpret_cast<Element*>(smem_bytes));
  fragment_to_smem<typename Traits::MmaDq>(round_to<Element>(tdQrdQ), sdQ, thread);
  __syncthreads();  // PROTECTS: all of dQ is in shared memory.
  smem_to_rows<kBlockM, kHeadDim, Traits::kThreads>(
      sdQ, row_of<Element>(params.dq, site.batch, tile.head, site.q_row0 + row0),
      params.dq.row_stride, site.seqlen_q - row0, problem.head_dim, thread);
}

}  // namespace flash::sm80
