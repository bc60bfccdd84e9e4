#pragma once
// What a tile's kernel carries beside the plain product of softmax and V, and where it is kept.
// Used by: forward and backward kernels.
#include "pieces/compiler.cuh"
#include "pieces/dropout.cuh"
#include "pieces/level.h"
#include "pieces/score.cuh"
#include "pieces/sequence.cuh"
#include "pieces/visibility.cuh"

namespace flash {

struct TileFeatures {
  ScoreMod score_mod;
  DropoutBits dropout;
  bool drops;
};

CUTE_DEVICE DropoutBits read_now(DropoutBits const& bits) {
  return {read_now(bits.key0), read_now(bits.key1), read_now(bits.offset), read_now(bits.pair)};
}
CUTE_DEVICE BlockRange read_now(BlockRange const& range) {
  return {read_now(range.first), read_now(range.left_end), read_now(range.right_begin),
          read_now(range.end)};
}

// In shared memory: read again where it is needed instead of being kept in registers.
struct SavedTile {
  TileFeatures features;
  Site site;
  BlockRange blocks;  // of the other axis that the tile visits
  RowHalves halves;   // forward, as the next
  HalfSteps half_steps;
  int head;  // of q in the forward pass, of k in the backward pass
  int window_left, window_right;
  // Backward: query heads that share the key head; the first one's first query block in the workspace, and blocks from one to the next.
  int group, first_index, slots;
  int first_seeing;  // backward: the first query that sees a key

  // Of a query head in the key head's group.
  CUTE_DEVICE ScoreMod score_mod(Problem const& problem, int head_in_group) const {
    return flash::score_mod(problem, min_of(site.batch, problem.batch - 1),
                            head * group + head_in_group);
  }

  template <MaskKind kMask>
  CUTE_DEVICE Visibility<kMask> see() const {
    return {read_now(site.seqlen_q), read_now(site.seqlen_k),
            Visibility<kMask>::kHasLeft ? read_now(window_left) : 0,
            Visibility<kMask>::kHasLeft ? read_now(window_right) : 0};
  }
};

template <Level kLevel>
CUTE_DEVICE TileFeatures tile_features(Problem const& problem, ScoreMod const& mod, int batch,
                                       int head) {
  bool const drops = decided<kLevel>(Level::kDropout, problem.rng_state);
  uint64_t seed = 0, offset = 0;
  if (drops) { seed = uint64_t(problem.rng_state[0]), offset = uint64_t(problem.rng_state[1]); }
  return {mod, dropout_bits(seed, offset, batch * problem.heads_q + head), drops};
}

}  // namespace flash
