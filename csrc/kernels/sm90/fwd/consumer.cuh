#pragma once
// A consumer warpgroup: 64 query rows of each tile, their products, softmax and output.
//
//   begin    S of the tile's last key block: masked, exponentiated, rounded: P
//   step     for each block before it: S of this block and O += P V of the one after it are issued together; softmax beside the second
//   end      O += P V of the first block
//
// A tile's first product beside the last one of the tile before was tried: 3 to 6 % slower (docs/hopper.md).
// Warpgroups are not kept in step: one's softmax fills the tensor cores' time with the other's products by itself.
#include "pieces/compiler.cuh"
#include "pieces/mask.cuh"
#include "pieces/softmax.cuh"
#include "sm90/fwd/epilogue.cuh"
#include "sm90/instructions/barrier.cuh"
#include "sm90/instructions/ring.cuh"

namespace flash::sm90 {

template <class Traits, MaskKind kMask>
struct Consumer {
  using Shared  = typename Traits::Shared;
  using Element = typename Traits::Element;

  CUTE_DEVICE Consumer(FwdParams const& params_, TmaTensor const& out_map_, Shared& smem_,
                       int group_, int thread_)
      : params(params_),
        out_map(out_map_),
        smem(smem_),
        group(group_),
        thread(thread_),
        softmax(params_.problem.unit.scale_log2) {}

  CUTE_DEVICE void run() {
    // Not while (take_job()): then ptxas takes the rings' places for numbers of a thread, and each product's address is moved to the
    // uniform registers by itself: 43 of 611 instructions of a step at head dimension 128.
    bool more = take_job();
    while (more) {
      clear(tOrO);
      softmax = Softmax<2>(params.problem.unit.scale_log2);
      wait(smem.q_full[q_place.index][group], q_place.full_parity());
      if (block >= first) {
        begin();
        walk();
        end();
      }
      store();
      more = take_job();
    }
    output().release();
  }

 private:
  using TiledMmaS = typename Traits::TiledMmaS;
  using TiledMmaO = typename Traits::TiledMmaO;
  using See       = Visibility<kMask>;
  using TensorS   = decltype(partition_fragment_C(TiledMmaS{}, typename Traits::TileS{}));
  using TensorO   = decltype(partition_fragment_C(TiledMmaO{}, typename Traits::TileO{}));
  using TensorP   = decltype(make_tensor<Element>(as_operand_a(TensorS{}.layout())));

  FwdParams const& params;
  TmaTensor const& out_map;
  Shared& smem;
  int group, thread;  // thread: in the warpgroup
  RingPlace<Traits::kQBuffers> q_ring{};
  RingPlace<Traits::kStages> stage_ring{};
  RingPlace<Traits::kJobs> job_ring{};
  int stored_from = -1;  // Q's buffer from which an output may still be read

  // The tile: where the producer has put it; its key blocks as in BlockRange, and the one that comes next.
  RingPlace<Traits::kJobs> job_place{};
  RingPlace<Traits::kQBuffers> q_place{};
  int first, left_end, right_begin, block;
  bool is_row[2];  // whether this thread's rows are the sequence's
  Softmax<2> softmax;
  TensorS tSrS;
  TensorP tOrP;
  TensorO tOrO;

  // --- The main loop ------------------------------------------------------------------------------

  CUTE_DEVICE void begin() {
    int const k_stage = issue_scores();
    wait_for_product<0>(tSrS);
    release_stage(k_stage);
    if (block < left_end || block >= right_begin) { hide(); }
    float shrink[2];
    weigh(shrink);  // O is zero
    output().release();
    round_into(tOrP, tSrS);
  }

  // The tile's other blocks, from right to left.
  CUTE_DEVICE void walk() {
    if constexpr (See::kHasRight) {
      int const masked_end = max_of(right_begin, first);
      while (block > masked_end) { step(true_type{}); }
    }
    int const plain_end = max_of(left_end, first);
    while (block > plain_end) { step(false_type{}); }
    if constexpr (See::kHasLeft) {
      while (block > first) { step(true_type{}); }
    }
  }

  template <class IsMasked>
  CUTE_DEVICE void step(IsMasked) {
    --block;
    int const k_stage = issue_scores();
    int const v_stage = issue_values();
    wait_for_product<1>(tSrS);
    release_stage(k_stage);
    if constexpr (IsMasked::value) { hide(); }
    float shrink[2];
    bool const moves = weigh(shrink);
    wait_for_product<0>(tOrO);
    release_stage(v_stage);
    if (moves) {
      auto o_rows = rows_of(tOrO);
      multiply_rows(o_rows, shrink);
    }
    round_into(tOrP, tSrS);
  }

  CUTE_DEVICE void end() {
    int const v_stage = issue_values();
    wait_for_product<0>(tOrO);
    release_stage(v_stage);
  }

  // --- Its parts ----------------------------------------------------------------------------------

  // S = Q K^T of the next stage, whose number is returned.
  CUTE_DEVICE int issue_scores() {
    TiledMmaS mma;
    auto const slice = mma.get_slice(thread);
    auto const sQs   = make_tensor(make_smem_ptr(smem.q[0][0]), typename Traits::LayoutQs{});
    auto const sK    = make_tensor(make_smem_ptr(smem.stages[0]), typename Traits::LayoutK{});
    auto const tSrQ  = slice.make_fragment_A(slice.partition_A(sQs(_, _, group, q_place.index)));
    auto const tSrK  = slice.make_fragment_B(slice.partition_B(sK));  // (.., stages)
    int const stage  = take_stage();
    issue(mma, tSrQ, tSrK(_, _, _, stage), tSrS, false);
    return stage;
  }

  // O += P V of the next stage, whose number is returned.
  CUTE_DEVICE int issue_values() {
    TiledMmaO mma;
    auto const slice = mma.get_slice(thread);
    auto const sVt   = make_tensor(make_smem_ptr(smem.stages[0]), typename Traits::LayoutVt{});
    auto const tOrV  = slice.make_fragment_B(slice.partition_B(sVt));  // (.., stages)
    int const stage  = take_stage();
    issue(mma, tOrP, tOrV(_, _, _, stage), tOrO, true);
    return stage;
  }

  CUTE_DEVICE void hide() {
    Job const& job = smem.jobs[job_place.index];
    mask_scores<false, TiledMmaS, typename Traits::TileS>(tSrS, job.see<kMask>(params.problem),
                                                          job.row0 + group * kGroupRows,
                                                          block * Traits::kBlockN, thread);
  }

  // S becomes P, in fp32; whether O must be multiplied by shrink.
  CUTE_DEVICE bool weigh(float (&shrink)[2]) {
    auto scores      = rows_of(tSrS);
    bool const moves = softmax.update_references(scores, is_row, shrink);
    softmax.exponentials(scores, 0, Traits::kBlockN / 4);
    return moves;
  }

  CUTE_DEVICE void store() {
    output().store(smem.jobs[job_place.index], q_place.index, tOrO, softmax);
    if (thread % 32 == 0) { arrive(smem.job_empty[job_place.index]); }
  }

  // Addresses that follow from the thread would be spilled in the main loop: the thread is opaque.
  CUTE_DEVICE FwdOutput<Traits> output() {
    return {params, out_map, smem, group, opaque_index(thread), stored_from};
  }

  // --- Rings --------------------------------------------------------------------------------------

  // The same number, known to be the same in all lanes.
  CUTE_DEVICE static int uniform(int number) { return __shfl_sync(~0u, number, 0); }

  // False if there are no more.
  CUTE_DEVICE bool take_job() {
    job_place = job_ring.take();
    wait(smem.job_full[job_place.index], job_place.full_parity());
    if (!uniform(smem.is_job[job_place.index])) { return false; }
    Job const& job           = smem.jobs[job_place.index];
    BlockRange const& blocks = job.blocks;
    first = uniform(blocks.first), left_end = uniform(blocks.left_end);
    right_begin = uniform(blocks.right_begin), block = uniform(blocks.end) - 1;
    q_place       = q_ring.take();
    int const row = job.row0 + group * kGroupRows + first_row_of(thread);
    is_row[0] = row < job.site.seqlen_q, is_row[1] = row + kRowStep < job.site.seqlen_q;
    return true;
  }

  // The next block of K or V, when it is there.
  CUTE_DEVICE int take_stage() {
    auto const stage = stage_ring.take();
    wait(smem.stage_full[stage.index], stage.full_parity());
    return stage.index;
  }

  // This warp has read it.
  CUTE_DEVICE void release_stage(int stage) {
    if (thread % 32 == 0) { arrive(smem.stage_empty[stage]); }
  }
};

}  // namespace flash::sm90
