#pragma once
// The forward algorithm for one query tile: O = softmax(scale Q K^T) V over the key blocks that the tile sees.
// Used by fwd_kernel.  Knows nothing of the grid.  Key blocks run right to left: the diagonal and the ragged end come first.
#include "pieces/compiler.cuh"
#include "pieces/mask.cuh"
#include "pieces/score_mod.cuh"
#include "pieces/softmax.cuh"
#include "sm80/fwd/loads.cuh"
#include "sm80/fwd/scores.cuh"
#include "sm80/fwd/weights.cuh"
#include "sm80/instructions/fragment.cuh"
#include "sm80/loop_forms.h"

namespace flash::sm80 {

// A block's schedule.  The products are one run of tensor core instructions, long enough for another warp's softmax; the two
// thread blocks of an SM drift into opposite phases.
//
//   softmax n+1   S -> maxima, rescaling of O, exponentials (all or the first, rounded to P); loads of K(n-1), V(n) are started
//   products n    O += P(n+1) V(n+1), beside it the other exponentials; S(n) = Q K(n)^T
//   barrier       K(n), V(n+1) have been read by all warps; K(n-1), V(n) have arrived
template <class Traits, MaskKind kMask, Level kLevel>
struct FwdMainloop {
  using Element                  = typename Traits::Element;
  using Loads                    = FwdLoads<Traits, kMask>;
  static constexpr bool kHasLeft = Visibility<kMask>::kHasLeft;
  static constexpr FwdForm kForm = fwd_form(Traits::kTile, Traits::kHeadDim, kMask, kLevel);
  // Rows of one of the MMA's row atoms.  Half steps (pieces/visibility.cuh) work on one of two.
  static constexpr int kAtomRows = 16 * Traits::kWarps, kAtoms = Traits::kBlockM / kAtomRows;
  static constexpr bool kHalves = kForm.half_steps, kSkips = kForm.skips;
  static_assert(kAtoms == 2 || !(kHalves || kSkips), "each row atom is a half of the tile's rows");
  static constexpr int kParked      = kForm.parks ? 2 * Traits::kThreads : 1;  // pointers
  static constexpr int kParkedBytes = kParked * int(sizeof(uint64_t));

  Loads const loads;

  // The tile whose loads have been started, to tOrO (MMA, MMA_M, MMA_N).
  template <class TensorO, class Softmax_>
  CUTE_DEVICE void run(typename Loads::Tile const& in, TensorO& tOrO, Softmax_& softmax) const {
    int const thread = opaque_index(Traits::Thread::index()), row0 = in.m_block * Traits::kBlockM;
    Visibility<kMask> const& see = in.see;
    BlockRange const& blocks     = in.blocks;
    auto sQ                      = loads.q();
    int n_block = blocks.end - 1, stage = 0;  // of the K and V that are used next
    // Where start() ended.
    auto copy_k = loads.copy_of(in.k, in.k_row_stride, n_block - 1 - kUpward, in.head_dim, thread);
    auto copy_v = loads.copy_of(in.v, in.v_row_stride, n_block - kUpward, in.head_dim, thread);
    if (kUpward) { copy_k.move_to_last_row(), copy_v.move_to_last_row(); }
    constexpr bool kKeep = kForm.keeps_first;
    auto const first     = [&] {  // known without windows
      if (!kHasLeft) { return 0; }
      return kKeep ? blocks.first : read_now(in.saved->blocks.first);
    };
    auto load_next_k = [&](int n_block, int stage, int lane) {
      if (n_block >= first()) { copy_k.template start_above<kUpward>(loads.k(stage), lane); }
    };
    auto load_next_v = [&](int n_block, int stage, int lane) {
      if (n_block >= first()) { copy_v.template start_above<kUpward>(loads.v(stage), lane); }
    };
    cp_async_wait<1>();
    __syncthreads();  // PROTECTS: every thread's part of Q and the first K is in shared memory, and what in.saved holds.
    auto tSrQ = Traits::OperandQ::fragments(sQ, thread);
    if constexpr (Traits::kQInRegs) {
      tSrQ = load_fragments<typename Traits::OperandQ>(sQ, thread);
    }
    typename Traits::TiledMma mma;
    auto tSrS = partition_fragment_C(mma, TileS{});
    auto tSrP = make_tensor<Element>(tSrS.layout());
    auto tOrP = operand_a_of(tSrP);
    // PROTECTS: the loads started in the last softmax have arrived; no warp reads the stages refilled next.
    auto end_products = [&](auto... score) {  // of no or one that the barrier waits for
      cp_async_wait<0>();
      if constexpr (sizeof...(score) == 1) {
        barrier_after(score..., loads.zero);
      } else {
        __syncthreads();
      }
    };
    auto const first_row = [&] {
      return !kHasLeft || kKeep ? opaque(row0) : read_now(in.saved->site.block) * Traits::kBlockM;
    };
    auto const see_now = [&] { return kHasLeft ? in.saved->template see<kMask>() : see; };
    // The row atoms that see this block.  Those that do not are masked.
    auto const active = [&] {
      if constexpr (kSkips) {
        RowHalves const& halves = in.saved->halves;
        return ActiveRows<2>{n_block < read_now(halves.upper_end),
                             n_block >= read_now(halves.lower_first)};
      } else {
        return AllRows{};
      }
    };
    // Random numbers of k-step k of block n_block.
    auto const draw_now = [&](auto k, int lane) {
      return draw<Traits>(read_now(in.saved->features.dropout),
                          read_now(in.saved->site.block) * Traits::kBlockM,
                          n_block * Traits::kBlockN, k, lane);
    };
    BlockBits ahead[kAhead > 0 ? kAhead : 1];
    auto const beside_scores = [&](int part) {
      if constexpr (kAhead > 0) {
        constexpr int kEvery = Traits::kHeadDim / 16 * (Traits::kBlockN / 16) / kAhead;
        if (part % kEvery == 0) {
          ahead[part / kEvery] = draw_now(part / kEvery, opaque_index(thread));
        }
      }
    };
    // P of k-step k.  atoms: the rows that a step is about.
    auto finish_step = [&](auto atoms, int k, int lane) {
      auto tSrP_part = atoms.of(tSrP);
      round_step(tSrP_part, atoms.of(tSrS), k);
      if constexpr (may_have(kLevel, Level::kDropout)) {
        if (decided<kLevel>(Level::kDropout, in.saved->features.drops)) {
          auto const drop_by = [&](BlockBits const& bits) {
            drop<Traits>(tSrP, bits, in.keep, read_now(in.saved->site.block) * Traits::kBlockM, k,
                         lane);
          };
          if constexpr (kAhead > 0) {  // all k-steps
            drop_by(ahead[k]);
          } else {
            drop_by(draw_now(k, lane));
          }
        }
      }
    };
    auto const top_of   = [&](auto atoms) { return first_row() + atoms.kFirst * kAtomRows; };
    auto const edges_of = [&](auto atoms, int col0) {  // that these rows cross in this block
      return see_now().crossed(top_of(atoms), atoms.kCount * kAtomRows, col0, Traits::kBlockN);
    };
    // Masks decided at run time are loops, mostly of no or one round: a branch would become predicated instructions, issued in every
    // step.  By edge: a round for each that is left to do (1 right, 2 left, 3 both); known_edges: where there are half steps.
    auto hide = [&](auto masked, auto atoms, int known_edges, int lane) {
      using Tile_     = Shape<Int<atoms.kCount * kAtomRows>, Int<Traits::kBlockN>>;
      auto tSrS_part  = atoms.of(tSrS);
      auto const col0 = [&] { return n_block * Traits::kBlockN; };  // kept for the loops it spilled
      if constexpr (kByEdge) {
        int const edges = kHalves ? known_edges : run_time_flag(masked) * edges_of(atoms, col0());
        for (int left = opaque(edges); left > 0; left = left > 2 ? 2 : 0) {
          mask_edge<typename Traits::TiledMma, Tile_>(tSrS_part, see_now(), left == 2,
                                                      top_of(atoms), col0(), fixed_in_loop(lane));
        }
      } else {
        for (int round = run_time_flag(masked); round > 0; --round) {
          mask_scores<false, typename Traits::TiledMma, Tile_>(tSrS_part, see_now(), top_of(atoms),
                                                               col0(), fixed_in_loop(lane));
        }
      }
    };
    // Edges that the upper and the lower row atom cross in a block; those of a single atom are in upper.  Looked up before the products
    // that lead to the block: after their barrier, it would be waited for.
    struct AtomEdges {
      int upper = 0, lower = 0;
    };
    auto const look_up = [&](auto atoms, int block) {
      AtomEdges found;
      if constexpr (kHalves && kByEdge) {
        constexpr bool kBoth = atoms.kCount == 2;
        int const col0       = block * Traits::kBlockN;
        found.upper          = edges_of(std::conditional_t<kBoth, Upper, decltype(atoms)>{}, col0);
        if (kBoth) { found.lower = edges_of(Lower{}, col0); }
      }
      return found;
    };
    auto softmax_phase = [&](auto masked, auto atoms, AtomEdges edges) {
      // Addresses that depend on the thread are worth fewer registers than they would take across steps.
      int const lane = opaque_index(thread);
      load_next_k(n_block - 2, stage, lane);
      load_next_v(n_block - 1, stage ^ 1, lane);
      cp_async_commit();
      if constexpr (changes_scores(kLevel)) {
        ScoreMod const mod = in.saved->features.score_mod;
        modify_scores<kLevel, false, typename Traits::TiledMma, TileS>(
            mod, tSrS, in.saved->site.block * Traits::kBlockM, n_block * Traits::kBlockN,
            see_now().shift(), lane);
      }
      if constexpr (kHalves && kByEdge && atoms.kCount == 2) {  // seldom do both cross an edge
        hide(masked, Upper{}, edges.upper, lane);
        hide(masked, Lower{}, edges.lower, lane);
      } else {
        hide(masked, atoms, edges.upper, lane);
      }
      auto tSrS_part     = atoms.of(tSrS);
      auto scores        = rows_of(tSrS_part);
      auto tOrO_part     = atoms.of(tOrO);
      auto o_rows        = rows_of(tOrO_part);
      constexpr int kRow = 2 * atoms.kFirst;
      softmax.template update<kRow>(scores, o_rows);
      CUTE_UNROLL
      for (int k = 0; k < kEarly; ++k) {
        softmax.template exponentials<kRow>(scores, k * kStepColumns, (k + 1) * kStepColumns);
        finish_step(atoms, k, lane);
      }
    };
    auto multiply_values = [&](int lane, auto atoms, auto rows) {
      auto tSrS_part    = atoms.of(tSrS);
      auto scores       = rows_of(tSrS_part);
      auto const beside = [&](int part) {
        int const k = part / kStepParts + kEarly, j = part % kStepParts;
        if (k * kStepColumns < kColumns) {
          softmax.template exponentials<2 * atoms.kFirst>(
              scores, k * kStepColumns + j * kStepColumns / kStepParts,
              k * kStepColumns + (j + 1) * kStepColumns / kStepParts);
          if (j == kStepParts - 1) { finish_step(atoms, k, lane); }
        }
      };
      auto tOrO_part = atoms.of(tOrO);
      auto tOrP_part = atoms.of(tOrP);
      gemm_rs<typename Traits::OperandV>(mma, tOrO_part, tOrP_part, loads.v_transposed(stage), lane,
                                         beside, rows);
    };
    // Of the first block, before its product: values of keys that no query sees.  0 * NaN is NaN.
    auto const hide_unseen_values = [&] {
      if constexpr (kHasLeft) {
        int const rows = see_now().first_seen() - n_block * Traits::kBlockN;
        if (rows > 0) {
          Loads::clear_rows(loads.v(stage), rows);
          __syncthreads();  // PROTECTS: the zeros are in shared memory.
        }
      }
    };
    __shared__ uint64_t parked[kParked];
    auto const place = [&](int i) -> uint64_t& {
      return parked[i * Traits::kThreads + thread_now()];
    };
    auto const all_rows = [] { return AllRows{}; };
    // O += P V of this block, then S of the next one.  rows: active, or all_rows where that is known to be the same.
    // last_part: of Q K^T, before the barrier (kPlainPart); kAnyPart leaves that to the compiler.
    auto product_phase = [&](auto atoms, auto next_atoms, auto rows, auto last_part) {
      constexpr bool kParksNow =
          kParks && std::is_same_v<decltype(rows), std::decay_t<decltype(active)>>;
      if constexpr (kParksNow) { park(copy_v.next, place(0)), park(copy_k.next, place(1)); }
      int const lane = opaque_index(thread), other = stage ^ 1;
      multiply_values(lane, atoms, rows());
      --n_block;
      if constexpr (last_part.value < 0) {
        multiply_scores<Traits>(next_atoms, tSrS, tSrQ, sQ, loads.k(other), lane, rows(),
                                beside_scores);
        end_products();
      } else {
        end_products(multiply_scores_watched<Traits, last_part.value>(
            next_atoms, tSrS, tSrQ, sQ, loads.k(other), lane, rows()));
      }
      if constexpr (kParksNow) { fetch(copy_v.next, place(0)), fetch(copy_k.next, place(1)); }
      stage = other;
    };
    auto const masked_step = [&] {
      AtomEdges const edges = look_up(All{}, n_block - 1);
      product_phase(All{}, All{}, active, Int<kMaskedPart>{});
      softmax_phase(true_type{}, All{}, edges);
    };
    auto const plain_step = [&] {
      product_phase(All{}, All{}, all_rows, Int<kPlainPart>{});
      softmax_phase(false_type{}, All{}, {});
    };
    // Of the blocks, in windows.  Read anew: kept, they were spilled.
    SavedTile const& now = *in.saved;
    auto const last      = [&] { return kHalves ? read_now(now.half_steps.last_whole) : first(); };
    auto const left_end  = [&] { return read_now(now.blocks.left_end); };
    auto const right_end = [&] { return max_of(last(), read_now(now.blocks.right_begin)); };
    // The compiler moves arithmetic across barriers but not across the ends of a loop's body: each body ends with the softmax.
    AtomEdges edges;
    if (kHalves && same_for_lanes<kForm.votes>(read_now(in.saved->half_steps.begins))) {
      edges = look_up(Lower{}, n_block);
      multiply_scores<Traits>(Lower{}, tSrS, tSrQ, sQ, loads.k(stage), thread, active(),
                              beside_scores);
      clear_now<kLateO>(tOrO);
      end_products();
      softmax_phase(true_type{}, Lower{}, edges);
      edges = look_up(All{}, n_block - 1);
      product_phase(Lower{}, All{}, active, kAnyPart);
    } else {
      edges = look_up(All{}, n_block);
      multiply_scores<Traits>(All{}, tSrS, tSrQ, sQ, loads.k(stage), thread, active(),
                              beside_scores);
      clear_now<kLateO>(tOrO);
      end_products();
    }
    if constexpr (kOneBody) {
      while (true) {
        softmax_phase(in.saved->blocks.needs_mask(n_block), All{}, edges);
        if (n_block == first()) { break; }
        multiply_values(opaque_index(thread), All{}, active());
        stage ^= 1;
        --n_block;
        multiply_scores<Traits>(All{}, tSrS, tSrQ, sQ, loads.k(stage), opaque_index(thread),
                                active(), beside_scores);
        end_products();
      }
    } else if constexpr (kHalves && kHasLeft) {
      softmax_phase(true_type{}, All{}, edges);
      // Right edge, then the blocks between; left edge, then none.
      for (int edge = 0; edge < 2; ++edge) {
        while (n_block > (edge ? last() : right_end())) { masked_step(); }
        while (n_block > max_of(last(), left_end())) { plain_step(); }
      }
    } else if constexpr (kParks) {  // the same; written as above, it spilled
      softmax_phase(true_type{}, All{}, edges);
      do {
        while (n_block > (n_block > left_end() ? right_end() : last())) { masked_step(); }
        while (n_block > max_of(last(), left_end())) { plain_step(); }
      } while (n_block > last());
    } else if constexpr (kHasLeft) {  // masked at both ends
      if constexpr (!kFirstInLoop) { softmax_phase(true_type{}, All{}, edges); }
      while (kFirstInLoop || n_block > first()) {
        if constexpr (!kFirstInLoop) { product_phase(All{}, All{}, active, kAnyPart); }
        if (same_for_lanes<kForm.votes>(read_now(in.saved->blocks).needs_mask(n_block))) {
          softmax_phase(true_type{}, All{}, edges);
        } else {
          softmax_phase(false_type{}, All{}, edges);
        }
        if constexpr (kFirstInLoop) {
          if (n_block == first()) { break; }
          product_phase(All{}, All{}, active, kAnyPart);
        }
      }
    } else {
      softmax_phase(true_type{}, All{}, edges);
      constexpr bool kHasRight = Visibility<kMask>::kHasRight;
      while (kHasRight && n_block > max_of(blocks.right_begin, first())) { masked_step(); }
      while (n_block > first()) { plain_step(); }
    }
    if (kHalves && kHasLeft && n_block > first()) {
      edges = look_up(Upper{}, n_block - 1);
      product_phase(All{}, Upper{}, active, kAnyPart);
      softmax_phase(true_type{}, Upper{}, edges);
      hide_unseen_values();
      multiply_values(opaque_index(thread), Upper{}, active());
    } else {
      hide_unseen_values();
      multiply_values(opaque_index(thread), All{}, active());
    }
  }

 private:
  using TileS                   = Shape<Int<Traits::kBlockM>, Int<Traits::kBlockN>>;
  using All                     = RowAtoms<0, kAtoms>;
  using Upper                   = RowAtoms<0, 1>;
  using Lower                   = RowAtoms<kAtoms - 1, kAtoms>;
  static constexpr int kColumns = Traits::kBlockN / 4;  // score columns per thread
  // A k-step of P V: 16 keys, that is two n8 atoms of S with two columns each per thread; one ldmatrix.x4 per 16 of head_dim.
  static constexpr int kStepColumns = 4, kStepParts = Traits::kHeadDim / 16;
  static constexpr int kEarly = kForm.early, kAhead = kForm.ahead;
  static constexpr bool kFirstInLoop = kForm.first_in_loop, kLateO = kForm.late_o;
  static constexpr bool kByEdge = kForm.by_edge, kParks = kForm.parks, kUpward = kForm.upward;
  static constexpr bool kOneBody  = kForm.one_body;
  static constexpr int kPlainPart = kForm.plain_part, kMaskedPart = kForm.masked_part;
  static constexpr Int<FwdForm::kAnyPart> kAnyPart{};
  static_assert(kPlainPart < 0 || kAhead == 0, "multiply_scores_watched has nothing beside it");
  static_assert(!kParks || kSkips, "the steps that skip are those that park");
  static_assert(kAhead == 0 || kAhead == Traits::kBlockN / 16, "all k-steps or none");
};

}  // namespace flash::sm80
