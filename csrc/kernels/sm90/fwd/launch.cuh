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
  TmaShape const k{.columns     = problem.head_dim,
                   .rows        = sizes.rows_k,
                   .heads       = problem.heads_kv,
                   .batch       = sizes.batch,
                   .box_rows    = Traits::kBlockN,
                   .box_columns = Traits::kBoxColumns};
  TmaShape v = k, out = q;
  v.columns = out.columns = problem.head_dim_v;
  cudaError_t status      = encode_tma(params.q, q, problem.dtype, maps.q);
  if (status == cudaSuccess) { status = encode_tma(params.out, out, problem.dtype, maps.out); }
  if (status == cudaSuccess) { status = encode_tma(params.k, k, problem.dtype, maps.k); }
  if (status == cudaSuccess) { status = encode_tma(params.v, v, problem.dtype, maps.v); }
  return status;
}

// Of the key heads that run together, each has 4 to 8 tiles on the way at once, which share what they read of K and V.  Causal at head
// dimensions 128 and 256, fewer heads were up to 12 % slower from 4k tokens on, and more up to 10 % at 512 tokens, where K and V come from
// memory again and again.  Groups of unequal size, 24 or 48 of 32 to 256 heads, were mostly 1 to 5 % slower: the most is lowered until groups
// are of about one size.
inline HeadBounds head_bounds(Problem const& problem) {
  int const heads = (problem.cu_seqlens_q ? 1 : problem.batch) * problem.heads_kv;
  int const most  = max_of(1, sm_count() / 4);
  return {sm_count() / 8, ceil_div(heads, ceil_div(heads, most))};
}

template <class Traits, class Kernel>
cudaError_t launch_fwd_kernel(FwdParams const& params, Kernel kernel, int* counter, int capability,
                              cudaStream_t stream) {
  FwdMaps maps;
  cudaError_t const status = make_maps<Traits>(params, maps);
  if (status != cudaSuccess) { return status; }
  TileOrder order;
  if (!make_query_order(params.problem, Traits::kBlockM, order, head_bounds(params.problem))) {
    return cudaErrorInvalidConfiguration;
  }
  // Thread blocks ask for numbers of tiles beyond the last one.
  if (order.size() > INT32_MAX - sm_count()) { return cudaErrorInvalidConfiguration; }
  int const blocks = min_of(int(order.size()), sm_count());
  Launch launch{blocks, Traits::kThreads, int(sizeof(typename Traits::Shared)), stream};
  launch.start = earliest_start(capability);
  return launch_kernel(kernel, launch, params, order, maps, counter);
}

// The functions of a unit.  Its one tile is for sm_90's shared memory.  kHeadDimV: of v and out.
template <int kHeadDim, class Element, class, int kHeadDimV = kHeadDim>
struct Fwd {
  static bool serves(FwdParams const& params) {
    Problem const& problem = params.problem;
    return serves_head_dims(problem) && problem.batch > 0 && fits_maps(params) &&
           tma_encode() != nullptr;
  }

  static void plan(FwdParams const&, Plan& plan) { plan.counters = 1; }

  static cudaError_t launch(FwdParams const& params, Plan const& plan, Scratch const& scratch,
                            cudaStream_t stream) {
    cudaError_t status = cudaSuccess;
    choose_kernel(params.problem, [&](auto mask, auto level) {
      using Traits = FwdTraits<kHeadDim, kHeadDimV, Element, level>;
      status       = launch_fwd_kernel<Traits>(params, &fwd_kernel<Traits, mask>, scratch.counters,
                                               plan.capability, stream);
    });
    return status;
  }

 private:
  // The unit of a pair leaves equal head dimensions to the others.
  static bool serves_head_dims(Problem const& problem) {
    if (kHeadDimV == kHeadDim) { return has_one_head_dim(problem); }
    return !has_one_head_dim(problem) && problem.head_dim_v <= kHeadDimV;
  }

  static bool fits_maps(FwdParams const& params) {
    Problem const& problem = params.problem;
    FwdSizes const sizes(problem);
    auto const fits_q = [&](TensorRef const& tensor, int columns) {
      return fits_tma(tensor, columns, sizes.rows_q, problem.heads_q, sizes.batch);
    };
    auto const fits_kv = [&](TensorRef const& tensor, int columns) {
      return fits_tma(tensor, columns, sizes.rows_k, problem.heads_kv, sizes.batch);
    };
    return sizes.rows_q > 0 && sizes.rows_k > 0 && fits_q(params.q, problem.head_dim) &&
           fits_q(params.out, problem.head_dim_v) && fits_kv(params.k, problem.head_dim) &&
           fits_kv(params.v, problem.head_dim_v);
  }
};

}  // namespace flash::sm90
