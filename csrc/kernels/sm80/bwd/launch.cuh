#pragma once
// Backward launch: preprocess, main kernel by mask, conversion of dQ.
#include "common/bwd_preprocess.h"
#include "entry.h"
#include "pieces/launch.cuh"
#include "sm80/bwd/kernel.cuh"
#include "sm80/bwd/postprocess.cuh"

namespace flash::sm80 {

// Traits of the kernel that converts dQ: the general one's only where its workspace lies differently.
template <class Traits, class General>
constexpr bool kSameDq =
    Traits::kBlockM == General::kBlockM && Traits::kThreads == General::kThreads &&
    std::is_same_v<typename Traits::MmaDq, typename General::MmaDq>;

template <class Traits, class DqTraits, class Kernel>
cudaError_t launch_bwd_kernels(BwdKernelParams const& params, Kernel kernel, Start start,
                               cudaStream_t stream) {
  using Element          = typename Traits::Element;
  Problem const& problem = params.problem;
  bool const ragged      = problem.cu_seqlens_q != nullptr;
  cudaError_t status     = launch_bwd_preprocess(params, Traits::kBlockM, Traits::kHeadDim, stream);
  if (status != cudaSuccess) { return status; }

  int64_t const blocks = ragged ? slot_count(problem.total_k, problem.batch, Traits::kBlockN)
                                : ceil_div(problem.seqlen_k, Traits::kBlockN);
  if (blocks * problem.heads_kv > INT32_MAX) { return cudaErrorInvalidConfiguration; }
  int const group   = problem.heads_q / problem.heads_kv;
  bool const window = !ragged && problem.mask == MaskKind::kLocal;
  // Q, dO (16 bits) and dQ (fp32) of a group's query heads stay in L2 while its key blocks run.
  int64_t const query_bytes = int64_t(8) * problem.seqlen_q * problem.head_dim * group;
  TileOrder const order =
      make_tile_order(int(blocks), ragged ? 1 : problem.batch, problem.heads_kv,
                      heads_in_l2(query_bytes), ragged || problem.mask != MaskKind::kNone, group,
                      window ? short_blocks(problem.window_left, Traits::kBlockN, int(blocks)) : 0);
  // Inputs may be read before the wait: the preprocess, an ordinary launch, began after the kernels that made them had ended.
  Launch main{order.size(), Traits::kThreads, Traits::kSmemBytes, stream};
  main.start = start;
  status     = launch_kernel(kernel, main, params, order);
  if (status != cudaSuccess) { return status; }

  constexpr int kDqBytes = Traits::TileQ::kSize * int(sizeof(Element));
  Launch last{query_block_count(problem, Traits::kBlockM), Traits::kThreads, kDqBytes, stream};
  last.start = start;
  return launch_kernel(&bwd_postprocess_kernel<DqTraits>, last, params);
}

template <class Traits, class General>
cudaError_t launch_bwd_variant(BwdKernelParams const& params, Start start, cudaStream_t stream) {
  using GeneralDq    = std::conditional_t<kSameDq<Traits, General>, Traits, General>;
  cudaError_t status = cudaSuccess;
  choose_kernel(params.problem, [&](auto mask, auto level) {
    constexpr bool kGeneral = bwd_is_general(Traits::kHeadDim, level);
    using Chosen            = std::conditional_t<kGeneral, General, Traits>;
    using ChosenDq          = std::conditional_t<kGeneral, GeneralDq, Traits>;
    static_assert(ChosenDq::kSmallestSize <= Chosen::kSmallestSize,
                  "where the main kernel runs, so does the conversion of dQ");
    status = launch_bwd_kernels<Chosen, ChosenDq>(params, &bwd_kernel<Chosen, mask, level>, start,
                                                  stream);
  });
  return status;
}

// The functions of a unit.  Sizes: BuiltSizes.
template <int kHeadDim, class Element, class Sizes>
struct Bwd {
  static bool serves(BwdParams const& params) { return has_one_head_dim(params.problem); }

  static void plan(BwdParams const& params, Plan& plan) {
    bool const general            = bwd_is_general(kHeadDim, level_of(params.problem));
    BwdTile const tile            = bwd_tile(kHeadDim, size_within(Sizes{}, plan.smem_kb), general);
    BwdWorkspaceSizes const sizes = bwd_workspace_sizes(params, tile.block_m, kHeadDim);
    plan.workspace_bytes          = sizes.bytes();
    put_notes(plan, sizes);
    choose_size(Sizes{}, plan.smem_kb, [&](auto size) {
      bool const can_run = general
                               ? fits<BwdTraitsOf<kHeadDim, Element, size, true>>(plan.smem_kb)
                               : fits<BwdTraitsOf<kHeadDim, Element, size, false>>(plan.smem_kb);
      if (!can_run) { plan.refused = cudaErrorInvalidConfiguration; }
    });
  }

  static cudaError_t launch(BwdParams const& params, Plan const& plan, Scratch const& scratch,
                            cudaStream_t stream) {
    BwdKernelParams const all =
        kernel_params(params, get_notes<BwdWorkspaceSizes>(plan), scratch.workspace);
    cudaError_t status = cudaSuccess;
    choose_size(Sizes{}, plan.smem_kb, [&](auto size) {
      status = launch_bwd_variant<BwdTraitsOf<kHeadDim, Element, size, false>,
                                  BwdTraitsOf<kHeadDim, Element, size, true>>(
          all, earliest_start(plan.capability), stream);
    });
    return status;
  }
};

}  // namespace flash::sm80
