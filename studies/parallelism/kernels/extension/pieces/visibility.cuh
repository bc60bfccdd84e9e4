#pragma once
// Who sees whom: which keys a query row may read, which queries a key reaches, and which blocks that makes.
// Used by: the forward kernel (key_blocks, row_halves, half_steps), the backward kernel (query_blocks), mask.cuh.
// Plain integers, no CuTe: compiles with g++ and is checked exhaustively on the CPU.
#include "flash.h"
#include "pieces/integers.cuh"

namespace flash {

// Every mask is one half-open key interval per query row q, with shift = seqlen_k - seqlen_q (the last query is aligned
// with the last key):
//
//   none     [0,                         seqlen_k)
//   causal   [0,                         min(seqlen_k, q + shift + 1))
//   local    [max(0, q + shift - left),  min(seqlen_k, q + shift + right + 1))
//
// The inverse (which queries reach key k) is an interval too, so forward and backward share this struct.
template <MaskKind kMask>
struct Visibility {
  int seqlen_q, seqlen_k, left, right;
  static constexpr bool kHasLeft = kMask == MaskKind::kLocal, kHasRight = kMask != MaskKind::kNone;

  FLASH_HD int shift() const { return seqlen_k - seqlen_q; }
  FLASH_HD int reach() const { return kMask == MaskKind::kLocal ? right : 0; }

  FLASH_HD int first_key(int q) const { return kHasLeft ? max_of(0, q + shift() - left) : 0; }
  FLASH_HD int end_key(int q) const {
    return kHasRight ? min_of(seqlen_k, q + shift() + reach() + 1) : seqlen_k;
  }
  // From a query to its keys' ends, where the sequence does not cut them off.
  FLASH_HD int first_offset() const { return shift() - left; }
  FLASH_HD int end_offset() const { return shift() + reach() + 1; }
  FLASH_HD int first_query(int k) const { return kHasRight ? max_of(0, k - shift() - reach()) : 0; }
  FLASH_HD int end_query(int k) const {
    return kHasLeft ? min_of(seqlen_q, k - shift() + left + 1) : seqlen_q;
  }
  // Where there are queries and keys: this query and all later ones see a key, the others see none;
  // this key and all later ones are seen, the others by no query.
  FLASH_HD int first_seeing() const { return first_query(0); }
  FLASH_HD int first_seen() const { return first_key(0); }
  // Edges that a tile of queries and keys crosses: 1 the right one (or the sequence's end), 2 the left one, 3 both.
  FLASH_HD int crossed(int q0, int queries, int k0, int keys) const {
    return int(k0 + keys > end_key(q0)) + 2 * int(q0 + queries - 1 + first_offset() > k0);
  }
};

// Blocks of one pass, in order.  Invariant: first <= left_end <= right_begin <= end.
//
//   [first, left_end)        mask needed (left window edge)
//   [left_end, right_begin)  every pair visible: no mask
//   [right_begin, end)       mask needed (diagonal, or ragged end)
struct BlockRange {
  int first, left_end, right_begin, end;

  FLASH_HD bool needs_mask(int block) const { return block < left_end || block >= right_begin; }
};

FLASH_HD BlockRange make_range(int first_any, int first_all, int end_all, int end_any, int block) {
  int const first       = first_any / block;
  int const end         = max_of(first, ceil_div(max_of(0, end_any), block));
  int const left_end    = min_of(end, ceil_div(first_all, block));
  int const right_begin = max_of(left_end, min_of(end, max_of(0, end_all) / block));
  return {first, left_end, right_begin, end};
}

// Key blocks that query block m_block visits (forward).
template <int kBlockM, int kBlockN, MaskKind kMask>
FLASH_HD BlockRange key_blocks(Visibility<kMask> const& see, int m_block) {
  int const top = m_block * kBlockM, bottom = min_of(top + kBlockM, see.seqlen_q) - 1;
  return make_range(see.first_key(top), see.first_key(bottom), see.end_key(top),
                    see.end_key(bottom), kBlockN);
}

// Query blocks that key block n_block visits (backward).  Keys beyond seqlen_k in a ragged last key block are the
// caller's to mask: the range speaks of existing keys.
template <int kBlockM, int kBlockN, MaskKind kMask>
FLASH_HD BlockRange query_blocks(Visibility<kMask> const& see, int n_block) {
  int const top = n_block * kBlockN, bottom = min_of(top + kBlockN, see.seqlen_k) - 1;
  return make_range(see.first_query(top), see.first_query(bottom), see.end_query(top),
                    see.end_query(bottom), kBlockM);
}

// The halves of a query tile's rows: the upper one is hidden from key blocks from upper_end on, the lower one from those before
// lower_first.
struct RowHalves {
  int upper_end, lower_first;
};

// middle: the lower half's first row.
template <int kBlockN, MaskKind kMask>
FLASH_HD RowHalves row_halves(Visibility<kMask> const& see, int middle) {
  return {ceil_div(see.end_key(middle - 1), kBlockN), see.first_key(middle) / kBlockN};
}

// Half steps: blocks that only half of a query tile's rows see, so that only these work on them.  Blocks are visited right to left.
//
//   begins       the last block (end - 1) is hidden from the upper half
//   last_whole   the blocks left of it (at most one) are hidden from the lower half
//
// One block at least is left for all rows.
struct HalfSteps {
  int begins, last_whole;
};

// blocks must not be empty.
FLASH_HD HalfSteps half_steps(RowHalves const& halves, BlockRange const& blocks) {
  int const last    = blocks.end - 1;
  bool const begins = last > blocks.first && halves.upper_end <= last;
  bool const ends   = last - begins > blocks.first && halves.lower_first > blocks.first;
  return {begins, blocks.first + ends};
}

}  // namespace flash
