#pragma once
// A consumer warpgroup: 64 query rows of each tile, their products, softmax and output.
//
//   begin    S of the tile's last key block; masked, exponentiated, rounded: P
//   step     for each block before it: S of this block and O += P V of the one after it are issued together; softmax beside the second
//   cross    the same at a tile's end: S is that of the next tile's last block; then this tile's O is stored
//   end      O += P V, O stored, where no tile follows that could have been begun
//
// Warpgroups are not kept in step: one's softmax fills the tensor cores' time with the other's products by itself.
#include "pieces/compiler.cuh"
#include "pieces/mask.cuh"
#include "pieces/softmax.cuh"
#include "sm90/fwd/epilogue.cuh"
#include "sm90/instructions/ring.cuh"

namespace flash::sm90 {

template <class Traits, MaskKind kMask>
struct Consumer {
  using Shared  = typename Traits::Shared;
  using Element = typename Traits::Element;
  using Barrier = cutlass::arch::ClusterBarrier;

  CUTE_DEVICE Consumer(FwdParams const& params_, TmaTensor const& out_map_, Shared& smem_,
                       int group_, int thread_)
      : params(params_),
        out_map(out_map_),
        smem(smem_),
        group(group_),
        thread(thread_),
        softmax(params_.problem.unit.scale_log2) {}

  CUTE_DEVICE void run() {
    Tile next;
    bool more = take_job(next);
    while (more) {
      tile = next;
      clear(tOrO);
      softmax = Softmax<2>(params.problem.unit.scale_log2);
      if (tile.sees_keys()) {
        begin();
        while (true) {
          walk();
          more = take_job(next);
          if (!(Traits::kTilesOverlap && more && next.sees_keys())) { break; }
          cross(next);
        }
        end();
      } else {
        wait_for_q(tile);
        store();
        more = take_job(next);
      }
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

  // A job as this warpgroup sees it, and where the producer has put it.
  struct Tile {
    RingPlace<Traits::kJobs> job;
    RingPlace<Traits::kQBuffers> q;
    int first, left_end, right_begin, block;  // of the job's key blocks; the one whose S comes next

    CUTE_DEVICE bool sees_keys() const { return block >= first; }
    CUTE_DEVICE bool needs_mask() const { return block < left_end || block >= right_begin; }
  };

  FwdParams const& params;
  TmaTensor const& out_map;
  Shared& smem;
  int group, thread;  // thread: in the warpgroup
  RingPlace<Traits::kQBuffers> q_ring{};
  RingPlace<Traits::kSlots> slot_ring{};
  RingPlace<Traits::kJobs> job_ring{};
  int stored_from = -1;  // Q's buffer from which an output may still be read

  Tile tile;
  Softmax<2> softmax;
  TensorS tSrS;
  TensorP tOrP;
  TensorO tOrO;

  // --- The main loop ------------------------------------------------------------------------------

  CUTE_DEVICE void begin() {
    wait_for_q(tile);
    int const k_slot = issue_scores(tile);
    wait_for_product<0>(tSrS);
    release_slot(k_slot);
    if (tile.needs_mask()) { hide(tile); }
    float shrink[2];
    weigh(softmax, shrink);  // O is zero
    output().release();
    round_into(tOrP, tSrS);
  }

  // The tile's other blocks, from right to left.
  CUTE_DEVICE void walk() {
    if constexpr (See::kHasRight) {
      int const masked_end = max_of(tile.right_begin, tile.first);
      while (tile.block > masked_end) { step(true_type{}); }
    }
    int const plain_end = max_of(tile.left_end, tile.first);
    while (tile.block > plain_end) { step(false_type{}); }
    if constexpr (See::kHasLeft) {
      while (tile.block > tile.first) { step(true_type{}); }
    }
  }

  template <class IsMasked>
  CUTE_DEVICE void step(IsMasked) {
    --tile.block;
    int const k_slot = issue_scores(tile);
    int const v_slot = issue_values();
    wait_for_product<1>(tSrS);
    release_slot(k_slot);
    if constexpr (IsMasked::value) { hide(tile); }
    float shrink[2];
    bool const moves = weigh(softmax, shrink);
    if constexpr (Traits::kTilesOverlap) { output().release(); }
    wait_for_product<0>(tOrO);
    release_slot(v_slot);
    if (moves) {
      auto o_rows = rows_of(tOrO);
      multiply_rows(o_rows, shrink);
    }
    round_into(tOrP, tSrS);
  }

  // From the tile's last product to the first one of the next tile.
  CUTE_DEVICE void cross(Tile const& next) {
    output().release();  // A tile of one block has had no step: the next tile's Q may wait for the place.
    wait_for_q(next);
    int const k_slot = issue_scores(next);
    int const v_slot = issue_values();
    wait_for_product<1>(tSrS);
    release_slot(k_slot);
    if (next.needs_mask()) { hide(next); }
    Softmax<2> next_softmax(params.problem.unit.scale_log2);
    float shrink[2];
    weigh(next_softmax, shrink);  // O of the next tile is zero
    wait_for_product<0>(tOrO);
    release_slot(v_slot);
    round_into(tOrP, tSrS);
    store();
    clear(tOrO);
    tile = next, softmax = next_softmax;
  }

  CUTE_DEVICE void end() {
    output().release();
    int const v_slot = issue_values();
    wait_for_product<0>(tOrO);
    release_slot(v_slot);
    store();
  }

  // --- Its parts ----------------------------------------------------------------------------------

  // S = Q K^T of the tile's block, from the next slot, which is returned.
  CUTE_DEVICE int issue_scores(Tile const& of) {
    TiledMmaS mma;
    auto const slice = mma.get_slice(thread);
    auto const sQ =
        make_tensor(make_smem_ptr(smem.q[0][0]), typename Traits::LayoutQs{})(_, _, group, uniform(of.q.index));
    auto const sK   = make_tensor(make_smem_ptr(smem.slots[0]), typename Traits::LayoutK{});
    auto const tSrQ = slice.make_fragment_A(slice.partition_A(sQ));
    auto const tSrK = slice.make_fragment_B(slice.partition_B(sK));  // (.., slots)
    int const slot = take_slot();
    issue(mma, tSrQ, tSrK(_, _, _, slot), tSrS, false);
    return slot;
  }

  // O += P V, of the next slot, which is returned.
  CUTE_DEVICE int issue_values() {
    TiledMmaO mma;
    auto const slice = mma.get_slice(thread);
    auto const sVt   = make_tensor(make_smem_ptr(smem.slots[0]), typename Traits::LayoutVt{});
    auto const tOrV  = slice.make_fragment_B(slice.partition_B(sVt));  // (.., slots)
    int const slot   = take_slot();
    issue(mma, tOrP, tOrV(_, _, _, slot), tOrO, true);
    return slot;
  }

  CUTE_DEVICE void hide(Tile const& of) {
    Job const& job = smem.jobs[of.job.index];
    mask_scores<false, TiledMmaS, typename Traits::TileS>(
        tSrS, job.see<kMask>(params.problem), job.row0 + group * kGroupRows,
        of.block * Traits::kBlockN, thread);
  }

  // S becomes P, in fp32; whether O must be multiplied by shrink.
  CUTE_DEVICE bool weigh(Softmax<2>& of, float (&shrink)[2]) {
    auto scores      = rows_of(tSrS);
    bool const moves = of.update_references(scores, shrink);
    of.exponentials(scores, 0, Traits::kBlockN / 4);
    return moves;
  }

  CUTE_DEVICE void store() {
    output().store(smem.jobs[tile.job.index], tile.q.index, tOrO, softmax);
    if (thread % 32 == 0) { Barrier::arrive(&smem.job_empty[tile.job.index]); }
  }

  // Addresses that follow from the thread would be spilled in the main loop: the thread is opaque.
  CUTE_DEVICE FwdOutput<Traits> output() {
    return {params, out_map, smem, group, opaque_index(thread), stored_from};
  }

  // --- Rings --------------------------------------------------------------------------------------

  // The same number, known to be the same in all lanes.
  CUTE_DEVICE static int uniform(int x) { return __shfl_sync(~0u, x, 0); }

  // False if there are no more.
  CUTE_DEVICE bool take_job(Tile& taken) {
    auto const place = job_ring.take();
    Barrier::wait(&smem.job_full[place.index], place.full_parity());
    if (!uniform(smem.is_job[place.index])) { return false; }
    BlockRange const& blocks = smem.jobs[place.index].blocks;
    taken = {place, q_ring.take(),  uniform(blocks.first), uniform(blocks.left_end),
             uniform(blocks.right_begin), uniform(blocks.end) - 1};
    return true;
  }

  CUTE_DEVICE void wait_for_q(Tile const& of) {
    Barrier::wait(&smem.q_full[of.q.index][group], of.q.full_parity());
  }

  // The next block of K or V, when it is there.
  CUTE_DEVICE int take_slot() {
    auto const slot = slot_ring.take();
    int const index = uniform(slot.index);
    Barrier::wait(&smem.slot_full[index], slot.full_parity());
    return index;
  }

  // This warp has read it.
  CUTE_DEVICE void release_slot(int slot) {
    if (thread % 32 == 0) { Barrier::arrive(&smem.slot_empty[slot]); }
  }
};

}  // namespace flash::sm90
