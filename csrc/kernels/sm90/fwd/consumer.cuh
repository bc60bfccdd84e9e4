#pragma once
// A consumer warpgroup: 64 query rows of each tile, their products, softmax and output.
//
//   begin    S of the last key block that the rows see: masked, exponentiated, rounded: P
//   step     for each block before it: S of this block and O += P V of the one after it are issued together; softmax beside the second
//   end      O += P V of the first block
//
// Blocks that only the tile's other rows see pass by.
//
// A tile's first product beside the last one of the tile before was tried: no faster (docs/hopper.md).
// Warpgroups are not kept in step: one's softmax fills the tensor cores' time with the other's products by itself.
#include "pieces/compiler.cuh"
#include "pieces/mask.cuh"
#include "pieces/score_mod.cuh"
#include "pieces/softmax.cuh"
#include "sm90/fwd/epilogue.cuh"
#include "sm90/fwd/weights.cuh"
#include "sm90/instructions/barrier.cuh"
#include "sm90/instructions/ring.cuh"

namespace flash::sm90 {

// Which ends of a row's keys a block may cross.
enum class Hidden { kNothing, kRight, kBoth };

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
    // take_job() stands at the loop's end.  In the loop's condition, it hid from ptxas that the rings' places are the same in all
    // lanes.  Each product's address was then moved to a uniform register by an instruction of its own: 43 of a step's 611 at head
    // dimension 128.
    bool more = take_job();
    while (more) {
      clear(tOrO);
      softmax = Softmax<2>(params.problem.unit.scale_log2);
      wait(smem.q_full[q_place.index][group], q_place.full_parity());
      read_queries();
      pass(2 * hidden_right() - int(sees_keys()));
      if (sees_keys()) {
        begin();
        walk();
        end();
        pass(2 * hidden_left() - 1);
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
  using Stage     = RingPlace<Traits::kStages>;
  using TileJob   = Job<Traits::kGroups>;
  using TensorS   = decltype(partition_fragment_C(TiledMmaS{}, typename Traits::TileS{}));
  using TensorO   = decltype(partition_fragment_C(TiledMmaO{}, typename Traits::TileO{}));
  using TensorP   = decltype(make_tensor<Element>(as_operand_a(TensorS{}.layout())));
  using TensorQ   = decltype(make_tensor<Element>(operand_a<Traits::kHeadDim>()));

  FwdParams const& params;
  TmaTensor const& out_map;
  Shared& smem;
  int group, thread;  // thread: in the warpgroup
  RingPlace<Traits::kQBuffers> q_ring{};
  Stage stage_ring{};
  RingPlace<Traits::kJobs> job_ring{};
  int stored_from = -1;  // Q's buffer from which an output may still be read

  // The tile: where the producer has put it; the key blocks that this group sees, as in BlockRange, and the one that comes next.
  RingPlace<Traits::kJobs> job_place{};
  RingPlace<Traits::kQBuffers> q_place{};
  int first, left_end, right_begin, block;
  bool is_row[2];  // whether this thread's rows are the sequence's
  Softmax<2> softmax;
  TensorQ tSrQ;  // where Q is kept in registers
  TensorS tSrS;
  TensorP tOrP;
  TensorO tOrO;

  // --- The main loop ------------------------------------------------------------------------------

  CUTE_DEVICE void begin() {
    auto const k_stage = stage_ring.take();
    issue_scores(k_stage);
    pass(uniform(min_of(hidden_right(), 1)));
    wait_for_product<0>(tSrS);
    release(k_stage);
    change_scores();
    if (block < left_end || block >= right_begin) { hide<Hidden::kBoth>(); }
    float shrink[2];
    weigh(shrink);  // not used: O is zero
    output().release();
    round_weights();
  }

  // The tile's other blocks, from right to left.
  CUTE_DEVICE void walk() {
    if constexpr (See::kHasRight) {
      int const masked_end = max_of(right_begin, first);
      while (block > masked_end) { step<Hidden::kRight>(); }
    }
    int const plain_end = max_of(left_end, first);
    while (block > plain_end) { step<Hidden::kNothing>(); }
    if constexpr (See::kHasLeft) {
      while (block > first) { step<Hidden::kBoth>(); }
    }
  }

  template <Hidden kHidden>
  CUTE_DEVICE void step() {
    --block;
    auto const k_stage = stage_ring.take();
    auto const v_stage = stage_ring.take();  // of the block after it
    issue_scores(k_stage);
    issue_values(v_stage);
    wait_for_product<1>(tSrS);
    release(k_stage);
    change_scores();
    hide<kHidden>();
    float shrink[2];
    bool const moves = weigh(shrink);
    wait_for_product<0>(tOrO);
    release(v_stage);
    if (moves) {
      auto o_rows = rows_of(tOrO);
      multiply_rows(o_rows, shrink);
    }
    round_weights();
  }

  CUTE_DEVICE void end() {
    pass(uniform(min_of(hidden_left(), 1)));
    auto const v_stage = stage_ring.take();
    issue_values(v_stage);
    wait_for_product<0>(tOrO);
    release(v_stage);
  }

  // --- Its parts ----------------------------------------------------------------------------------

  // S = Q K^T.
  CUTE_DEVICE void issue_scores(Stage const& stage) {
    TiledMmaS mma;
    auto const slice = mma.get_slice(thread);
    auto const sK    = make_tensor(make_smem_ptr(smem.stages[0]), typename Traits::LayoutK{});
    auto const tSrK  = slice.make_fragment_B(slice.partition_B(sK));  // (.., stages)
    wait_for(stage);
    if constexpr (Traits::kQInRegisters) {
      issue(mma, tSrQ, tSrK(_, _, _, stage.index), tSrS, false);
    } else {
      auto const tSsQ = slice.make_fragment_A(slice.partition_A(queries()));
      issue(mma, tSsQ, tSrK(_, _, _, stage.index), tSrS, false);
    }
  }

  // O += P V.
  CUTE_DEVICE void issue_values(Stage const& stage) {
    TiledMmaO mma;
    auto const slice = mma.get_slice(thread);
    auto const sVt   = make_tensor(make_smem_ptr(smem.stages[0]), typename Traits::LayoutVt{});
    auto const tOrV  = slice.make_fragment_B(slice.partition_B(sVt));  // (.., stages)
    wait_for(stage);
    issue(mma, tOrP, tOrV(_, _, _, stage.index), tOrO, true);
  }

  // The group's rows of Q in shared memory.
  CUTE_DEVICE auto queries() {
    auto const sQs = make_tensor(make_smem_ptr(smem.q[0][0]), typename Traits::LayoutQs{});
    return sQs(_, _, group, q_place.index);
  }

  CUTE_DEVICE void read_queries() {
    if constexpr (Traits::kQInRegisters) {
      auto const copy_ = make_tiled_copy_A(Copy_Atom<SM75_U32x4_LDSM_N, Element>{}, TiledMmaS{});
      auto const slice = copy_.get_slice(opaque_index(thread));
      copy(copy_, slice.partition_S(queries()), slice.retile_D(tSrQ));
    }
  }

  // Softcap and ALiBi.
  CUTE_DEVICE void change_scores() {
    if constexpr (changes_scores(Traits::kLevel)) {
      TileJob const& job = this->job();
      modify_scores<Traits::kLevel, false, TiledMmaS, typename Traits::TileS>(
          features().score_mod, tSrS, job.row0 + group * kGroupRows, block * Traits::kBlockN,
          job.template see<kMask>(params.problem).shift(), opaque_index(thread));
    }
  }

  template <Hidden kHidden>
  CUTE_DEVICE void hide() {
    if constexpr (kHidden != Hidden::kNothing) {
      constexpr Edges kEdges = kHidden == Hidden::kRight ? Edges::kRight : Edges::kBoth;
      TileJob const& job     = this->job();
      mask_scores<false, TiledMmaS, typename Traits::TileS, kEdges>(
          tSrS, job.template see<kMask>(params.problem), job.row0 + group * kGroupRows,
          block * Traits::kBlockN, opaque_index(thread));
    }
  }

  // S becomes P, in fp32; whether O must be multiplied by shrink.
  CUTE_DEVICE bool weigh(float (&shrink)[2]) {
    auto scores      = rows_of(tSrS);
    bool const moves = softmax.update_references(scores, is_row, shrink);
    softmax.exponentials(scores);
    return moves;
  }

  CUTE_DEVICE void round_weights() {
    round_into(tOrP, tSrS);
    if constexpr (may_have(Traits::kLevel, Level::kDropout)) {
      if (decided<Traits::kLevel>(Level::kDropout, features().drops)) {
        drop(tOrP, features().dropout, params.problem.keep, job().row0 + group * kGroupRows,
             block * Traits::kBlockN, thread);
      }
    }
  }

  CUTE_DEVICE void store() {
    output().store(job(), q_place.index, tOrO, softmax);
    if (thread % 32 == 0) { arrive(smem.job_empty[job_place.index]); }
  }

  // Addresses that follow from the thread would be spilled in the main loop: the thread is opaque.
  CUTE_DEVICE FwdOutput<Traits> output() {
    return {params, out_map, smem, group, opaque_index(thread), stored_from};
  }

  // --- The tile -----------------------------------------------------------------------------------

  // The same number, known to be the same in all lanes.
  CUTE_DEVICE static int uniform(int number) { return __shfl_sync(~0u, number, 0); }

  CUTE_DEVICE TileJob const& job() const { return smem.jobs[job_place.index]; }
  CUTE_DEVICE TileFeatures const& features() const { return smem.features[job_place.index]; }

  // False if there are no more.
  CUTE_DEVICE bool take_job() {
    job_place = job_ring.take();
    wait(smem.job_full[job_place.index], job_place.full_parity());
    if (!uniform(smem.is_job[job_place.index])) { return false; }
    BlockRange const& seen = job().seen[group];
    first = uniform(seen.first), left_end = uniform(seen.left_end);
    right_begin = uniform(seen.right_begin), block = uniform(seen.end) - 1;
    q_place       = q_ring.take();
    int const row = job().row0 + group * kGroupRows + first_row_of(thread);
    is_row[0] = row < job().site.seqlen_q, is_row[1] = row + kRowStep < job().site.seqlen_q;
    return true;
  }

  CUTE_DEVICE bool sees_keys() const { return block >= first; }

  // Blocks of the tile to the right, and to the left, of those that this group sees.
  CUTE_DEVICE int hidden_right() const { return uniform(job().blocks.end - job().seen[group].end); }
  CUTE_DEVICE int hidden_left() const {
    if constexpr (!See::kHasLeft) { return 0; }
    return uniform(job().seen[group].first - job().blocks.first);
  }

  // --- Stages -------------------------------------------------------------------------------------

  // So many stages, with blocks that this group does not see.  The ring has K of a block before V of the one after it: K, K V, K V, ..., V.
  // Of n hidden blocks on the right, 2 n - 1 stages lie before the first K that is needed and one behind it; on the left it is the other
  // way around.
  CUTE_DEVICE void pass(int stages) {
    CUTE_NO_UNROLL  // unrolled, the ring's place would be taken for a number of a thread (see run)
        for (int i = 0; i < stages; ++i) {
      auto const stage = stage_ring.take();
      wait_for(stage);  // PROTECTS: each use of a stage is released once.
      __syncwarp();     // PROTECTS: no lane still waits for a use that this warp has released.
      release(stage);
    }
  }

  // Until the stage's block of K or V is there.
  CUTE_DEVICE void wait_for(Stage const& stage) {
    wait(smem.stage_full[stage.index], stage.full_parity());
  }

  // This warp has read it.
  CUTE_DEVICE void release(Stage const& stage) {
    if (thread % 32 == 0) { arrive(smem.stage_empty[stage.index]); }
  }
};

}  // namespace flash::sm90
