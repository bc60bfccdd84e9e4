#pragma once
// The sm90 forward launch: what it serves, tensor maps, grid.
#include "entry.h"
#include "pieces/launch.cuh"
#include "pieces/level.h"
#include "pieces/query_order.h"
#include "pieces/smem_size.h"
#include "sm90/fwd/kernel.cuh"

namespace flash::sm90 {

// Sizes of the tensors' maps: sequences of their own lengths lie one after another in one batch.
struct FwdSizes {
  int rows_q, rows_k, batch;

  explicit FwdSizes(Problem const& problem)
      : rows_q(problem.cu_seqlens_q ? problem.total_q : problem.seqlen_q),
        rows_k(problem.cu_seqlens_q ? problem.total_k : problem.seqlen_k),
        batch(problem.cu_seqlens_q ? 1 : problem.batch) {}
};

template <class Traits>
cudaError_t make_maps(FwdParams const& params, FwdMaps& maps) {
  Problem const& problem = params.problem;
  FwdSizes const sizes(problem);
  TmaShape const q{.columns     = problem.head_dim,
                   .rows        = sizes.rows_q,
                   .heads       = problem.heads_q,
                   .batch       = sizes.batch,
                   .box_rows    = kGroupRows,
                   .box_columns = Traits::kBoxColumns};
  TmaShape const kv{.columns     = problem.head_dim,
                    .rows        = sizes.rows_k,
                    .heads       = problem.heads_kv,
                    .batch       = sizes.batch,
                    .box_rows    = Traits::kBlockN,
                    .box_columns = Traits::kBoxColumns};
  cudaError_t status = encode_tma(params.q, q, problem.dtype, maps.q);
  if (status == cudaSuccess) { status = encode_tma(params.out, q, problem.dtype, maps.out); }
  if (status == cudaSuccess) { status = encode_tma(params.k, kv, problem.dtype, maps.k); }
  if (status == cudaSuccess) { status = encode_tma(params.v, kv, problem.dtype, maps.v); }
  return status;
}

template <class Traits, class Kernel>
cudaError_t launch_fwd_kernel(FwdParams const& params, Kernel kernel, int* counter,
                              cudaStream_t stream) {
  FwdMaps maps;
  cudaError_t const status = make_maps<Traits>(params, maps);
  if (status != cudaSuccess) { return status; }
  TileOrder order;
  if (!make_query_order(params.problem, Traits::kBlockM, order)) {
    return cudaErrorInvalidConfiguration;
  }
  // Thread blocks ask for numbers of tiles beyond the last one.
  if (order.size() > INT32_MAX - sm_count()) { return cudaErrorInvalidConfiguration; }
  int const blocks = min_of(int(order.size()), sm_count());
  Launch const launch{blocks, Traits::kThreads, int(sizeof(typename Traits::Shared)), stream};
  return launch_kernel(kernel, launch, params, order, maps, counter);
}

// The functions of a unit.  Its one tile is for sm_90's shared memory.
template <int kHeadDim, class Element, class>
struct Fwd {
  using Traits = FwdTraits<kHeadDim, Element>;

  // Plain attention of any mask, of tensors that TMA can address.
  static bool serves(FwdParams const& params) {
    Problem const& problem = params.problem;
    FwdSizes const sizes(problem);
    auto const fits_q = [&](TensorRef const& tensor) {
      return fits_tma(tensor, problem.head_dim, sizes.rows_q, problem.heads_q, sizes.batch);
    };
    auto const fits_kv = [&](TensorRef const& tensor) {
      return fits_tma(tensor, problem.head_dim, sizes.rows_k, problem.heads_kv, sizes.batch);
    };
    return level_of(problem) == Level::kPlain && sizes.rows_q > 0 && sizes.rows_k > 0 &&
           problem.batch > 0 && fits_q(params.q) && fits_q(params.out) && fits_kv(params.k) &&
           fits_kv(params.v) && tma_encode() != nullptr;
  }

  static void plan(FwdParams const&, Plan& plan) { plan.counters = 1; }

  static cudaError_t launch(FwdParams const& params, Plan const&, Scratch const& scratch,
                            cudaStream_t stream) {
    auto const run = [&](auto kernel) {
      return launch_fwd_kernel<Traits>(params, kernel, scratch.counters, stream);
    };
    switch (params.problem.mask) {
      case MaskKind::kNone:
        return run(&fwd_kernel<Traits, MaskKind::kNone>);
      case MaskKind::kCausal:
        return run(&fwd_kernel<Traits, MaskKind::kCausal>);
      case MaskKind::kLocal:
        return run(&fwd_kernel<Traits, MaskKind::kLocal>);
    }
    return cudaErrorInvalidValue;
  }
};

}  // namespace flash::sm90
