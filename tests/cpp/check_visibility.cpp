// Exhaustive check of pieces/visibility.cuh over small problems: intervals, their inverses, the blocks of both passes, half
// steps, and the blocks of the groups of rows in a tile of sm90's forward.
#include <initializer_list>

#include "check.h"
#include "pieces/visibility.cuh"

using namespace flash;
using check::expect;

long visited = 0, empty = 0, unmasked = 0, could_be_unmasked = 0;

// The definition, written without intervals.
template <MaskKind kMask>
bool sees(Visibility<kMask> const& m, int q, int k) {
  if (q < 0 || k < 0 || q >= m.seqlen_q || k >= m.seqlen_k) return false;
  long const distance = long(k) - q - (long(m.seqlen_k) - m.seqlen_q);
  if (kMask == MaskKind::kCausal) return distance <= 0;
  if (kMask == MaskKind::kLocal) return distance <= m.right && distance >= -long(m.left);
  return true;
}

#define CASE "mask %d, sq %d, sk %d, window %d %d"
#define ARGS int(kMask), m.seqlen_q, m.seqlen_k, m.left, m.right

template <MaskKind kMask>
void check_intervals(Visibility<kMask> const& m) {
  for (int q = 0; q < m.seqlen_q; ++q)
    for (int k = 0; k < m.seqlen_k; ++k) {
      bool const want = sees(m, q, k);
      expect((k >= m.first_key(q) && k < m.end_key(q)) == want, CASE ": keys of query %d at %d",
             ARGS, q, k);
      expect((q >= m.first_query(k) && q < m.end_query(k)) == want,
             CASE ": queries of key %d at %d", ARGS, k, q);
    }
}

long blind_rows = 0, unseen_keys = 0;

// The queries that see a key, and the keys that are seen, are the last ones.  With blocks no larger
// than tiles, only the first tile's first block has others: of a key tile in the backward pass, of a
// query tile in the forward pass.
template <int kTile, int kBlock, MaskKind kMask>
void check_rows_without_partner(Visibility<kMask> const& m) {
  if (m.seqlen_q == 0 || m.seqlen_k == 0) return;
  for (int q = 0; q < m.seqlen_q; ++q) {
    bool any = false;
    for (int k = 0; k < m.seqlen_k; ++k) any |= sees(m, q, k);
    expect(any == (q >= m.first_seeing()), CASE ": whether query %d sees a key", ARGS, q);
    blind_rows += !any;
  }
  for (int k = 0; k < m.seqlen_k; ++k) {
    bool any = false;
    for (int q = 0; q < m.seqlen_q; ++q) any |= sees(m, q, k);
    expect(any == (k >= m.first_seen()), CASE ": whether key %d is seen", ARGS, k);
    unseen_keys += !any;
  }
  auto const check = [&](BlockRange const& blocks, int tile, int first) {
    if (blocks.first < blocks.end)
      expect(first <= (blocks.first + (tile == 0)) * kBlock, CASE ": first block %d of tile %d",
             ARGS, blocks.first, tile);
  };
  for (int n = 0; n * kTile < m.seqlen_k; ++n)
    check(query_blocks<kBlock, kTile>(m, n), n, m.first_seeing());
  for (int n = 0; n * kTile < m.seqlen_q; ++n)
    check(key_blocks<kTile, kBlock>(m, n), n, m.first_seen());
}

template <int kM, int kN, bool kBackward, MaskKind kMask>
void check_blocks(Visibility<kMask> const& m) {
  constexpr int kOuter = kBackward ? kN : kM, kInner = kBackward ? kM : kN;
  int const outer_len = kBackward ? m.seqlen_k : m.seqlen_q;
  int const inner_len = kBackward ? m.seqlen_q : m.seqlen_k;
  for (int outer = 0; outer * kOuter < outer_len; ++outer) {
    BlockRange r;
    if constexpr (kBackward) {
      r = query_blocks<kM, kN>(m, outer);
    } else {
      r = key_blocks<kM, kN>(m, outer);
    }
    expect(0 <= r.first && r.first <= r.left_end && r.left_end <= r.right_begin &&
               r.right_begin <= r.end,
           CASE ": range %d %d %d %d of block %d", ARGS, r.first, r.left_end, r.right_begin, r.end,
           outer);
    expect(r.first == r.end || r.end <= ceil_div(inner_len, kInner), CASE ": block %d runs to %d",
           ARGS, outer, r.end);
    for (int inner = 0; inner * kInner < inner_len; ++inner) {
      bool any = false, all = true;
      for (int x = outer * kOuter; x < min_of((outer + 1) * kOuter, outer_len); ++x)
        for (int y = inner * kInner; y < (inner + 1) * kInner; ++y) {
          bool const seen = kBackward ? sees(m, y, x) : sees(m, x, y);
          any |= seen, all &= seen;
        }
      bool const in   = inner >= r.first && inner < r.end;
      bool const bare = in && inner >= r.left_end && inner < r.right_begin;
      expect(in || !any, CASE ": block %d misses %d", ARGS, outer, inner);
      expect(all || !bare, CASE ": block %d, %d needs a mask", ARGS, outer, inner);
      expect(!in || r.needs_mask(inner) != bare, CASE ": needs_mask(%d) of block %d", ARGS, inner,
             outer);
      visited += in, empty += in && !any, unmasked += bare, could_be_unmasked += all;
    }
  }
}

long half_steps_found = 0, hidden_halves = 0, left_out = 0;

// What half steps, and products that leave out a half, leave out is hidden; and its block is masked, if the half has rows.
template <int kM, int kN, MaskKind kMask>
void check_half_steps(Visibility<kMask> const& m) {
  constexpr int kHalf = kM / 2;
  for (int block = 0; block * kM < m.seqlen_q; ++block) {
    BlockRange const r = key_blocks<kM, kN>(m, block);
    if (r.first >= r.end) continue;
    int const row0         = block * kM;
    RowHalves const halves = row_halves<kN>(m, row0 + kHalf);
    HalfSteps const steps  = half_steps(halves, r);
    expect(steps.last_whole >= r.first && steps.last_whole <= r.end - 1 - steps.begins,
           CASE ": no whole step for block %d", ARGS, block);
    auto const sees_block = [&](int first_row, int n) {
      for (int q = first_row; q < first_row + kHalf; ++q)
        for (int k = n * kN; k < (n + 1) * kN; ++k)
          if (sees(m, q, k)) return true;
      return false;
    };
    expect(!steps.begins || !sees_block(row0, r.end - 1), CASE ": upper half of block %d", ARGS,
           block);
    for (int n = r.first; n < steps.last_whole; ++n)
      expect(!sees_block(row0 + kHalf, n), CASE ": lower half of block %d", ARGS, block);
    half_steps_found += steps.begins + steps.last_whole - r.first;
    for (int n = r.first; n < r.end; ++n) {
      bool const upper = n < halves.upper_end, lower = n >= halves.lower_first;
      bool const has_lower = row0 + kHalf < m.seqlen_q;
      expect(upper || (!sees_block(row0, n) && r.needs_mask(n)), CASE ": upper half, %d %d", ARGS,
             block, n);
      expect(lower || !has_lower || (!sees_block(row0 + kHalf, n) && r.needs_mask(n)),
             CASE ": lower half, %d %d", ARGS, block, n);
      hidden_halves += !sees_block(row0, n) + (has_lower && !sees_block(row0 + kHalf, n));
      left_out += !upper + (has_lower && !lower);
    }
  }
}

long passed_right = 0, passed_left = 0, blind_groups = 0, groups_without_rows = 0;

// As find_job of sm90/fwd/job.cuh: the key blocks that each of a tile's groups of rows sees.
template <int kGroups, int kRows, int kN, MaskKind kMask>
void check_groups(Visibility<kMask> const& m) {
  constexpr int kM = kGroups * kRows;
  for (int tile = 0; tile * kM < m.seqlen_q; ++tile) {
    BlockRange const blocks = key_blocks<kM, kN>(m, tile);
    int first = blocks.end, end = blocks.first;  // of all groups' ranges together
    for (int g = 0; g < kGroups; ++g) {
      int const row0 = tile * kM + g * kRows;
      if (row0 >= m.seqlen_q) {
        ++groups_without_rows;
        continue;
      }
      BlockRange const seen = key_blocks<kRows, kN>(m, tile * kGroups + g);
      expect(blocks.first <= seen.first && seen.first <= seen.end && seen.end <= blocks.end,
             CASE ": group %d of tile %d sees blocks %d to %d beside the tile's", ARGS, g, tile,
             seen.first, seen.end);
      // A group that sees nothing passes over as many blocks as lie behind its end: all of them.
      expect(seen.first < seen.end || seen.end == blocks.first,
             CASE ": group %d of tile %d sees nothing, at block %d", ARGS, g, tile, seen.end);
      if (seen.first < seen.end) { first = min_of(first, seen.first), end = max_of(end, seen.end); }
      for (int q = row0; q < min_of(row0 + kRows, m.seqlen_q); ++q)
        expect(m.first_key(q) >= m.end_key(q) ||
                   (seen.first * kN <= m.first_key(q) && m.end_key(q) <= seen.end * kN),
               CASE ": group %d of tile %d misses keys of row %d", ARGS, g, tile, q);
      passed_right += blocks.end - seen.end, passed_left += seen.first - blocks.first;
      blind_groups += seen.first == seen.end && blocks.first < blocks.end;
    }
    expect(first >= end ? blocks.first == blocks.end : first == blocks.first && end == blocks.end,
           CASE ": blocks of tile %d that no group sees", ARGS, tile);
  }
}

template <int kM, int kN, MaskKind kMask>
void check_both(Visibility<kMask> const& m) {
  check_blocks<kM, kN, false>(m);
  check_blocks<kM, kN, true>(m);
  check_half_steps<kM, kN>(m);
}

template <int kM, int kN>
void check_masks(int sq, int sk) {
  check_both<kM, kN>(Visibility<MaskKind::kNone>{sq, sk, 0, 0});
  check_both<kM, kN>(Visibility<MaskKind::kCausal>{sq, sk, 0, 0});
  for (int left : {0, 1, 3, kN, 2 * kN + 1, 1000})
    for (int right : {0, 1, kN, 11, 1000})
      check_both<kM, kN>(Visibility<MaskKind::kLocal>{sq, sk, left, right});
}

int main() {
  for (int sq = 0; sq <= 26; ++sq)
    for (int sk = 0; sk <= 26; ++sk) {
      check_intervals(Visibility<MaskKind::kNone>{sq, sk, 0, 0});
      check_intervals(Visibility<MaskKind::kCausal>{sq, sk, 0, 0});
      for (int left : {0, 1, 3, 9, 30})
        for (int right : {0, 1, 4, 11, 30})
          check_intervals(Visibility<MaskKind::kLocal>{sq, sk, left, right});
      auto const check_rows = [](auto const& m) {
        check_rows_without_partner<8, 4>(m);
        check_rows_without_partner<4, 4>(m);
      };
      check_rows(Visibility<MaskKind::kNone>{sq, sk, 0, 0});
      check_rows(Visibility<MaskKind::kCausal>{sq, sk, 0, 0});
      for (int left : {0, 1, 3, 9, 30, kUnlimited})
        for (int right : {0, 1, 4, 11, 30, kUnlimited})
          check_rows(Visibility<MaskKind::kLocal>{sq, sk, left, right});
      auto const check_tiles = [](auto const& m) {
        check_groups<3, 4, 8>(m);
        check_groups<2, 4, 8>(m);
        check_groups<2, 4, 6>(m);
        check_groups<2, 4, 4>(m);
      };
      check_tiles(Visibility<MaskKind::kNone>{sq, sk, 0, 0});
      check_tiles(Visibility<MaskKind::kCausal>{sq, sk, 0, 0});
      for (int left : {0, 1, 3, 9, 30, kUnlimited})
        for (int right : {0, 1, 4, 11, 30, kUnlimited})
          check_tiles(Visibility<MaskKind::kLocal>{sq, sk, left, right});
      check_masks<8, 4>(sq, sk);
      check_masks<4, 8>(sq, sk);
      check_masks<4, 4>(sq, sk);
    }
  long const small_empty = empty, small_unmasked = unmasked, small_possible = could_be_unmasked;
  // Real block sizes at their borders.
  for (int sq : {1, 63, 64, 65, 127, 128, 129, 200, 257})
    for (int sk : {1, 31, 32, 33, 64, 65, 113, 128, 129, 200, 300}) {
      check_both<128, 64>(Visibility<MaskKind::kCausal>{sq, sk, 0, 0});
      check_both<64, 128>(Visibility<MaskKind::kCausal>{sq, sk, 0, 0});
      check_both<128, 32>(Visibility<MaskKind::kNone>{sq, sk, 0, 0});
      check_groups<3, 64, 128>(Visibility<MaskKind::kCausal>{sq, sk, 0, 0});
      check_groups<2, 64, 96>(Visibility<MaskKind::kLocal>{sq, sk, 30, 9});
      check_groups<2, 64, 64>(Visibility<MaskKind::kLocal>{sq, sk, 0, 0});
    }
  // Lengths near 2^30: nothing overflows, and the first and last blocks are what they are for short ones.
  constexpr int kLong = 1 << 30;
  Visibility<MaskKind::kCausal> const square{kLong, kLong, 0, 0}, few{128, kLong, 0, 0},
      tall{kLong, 64, 0, 0};
  expect(key_blocks<128, 64>(square, kLong / 128 - 1).end == kLong / 64,
         "last block of a long square");
  expect(key_blocks<128, 64>(square, 0).end == 2, "first block of a long square");
  expect(key_blocks<128, 64>(few, 0).right_begin == kLong / 64 - 2, "128 queries of 2^30 keys");
  BlockRange const first = key_blocks<128, 64>(tall, 0);
  expect(first.first == first.end, "the first of 2^30 queries sees none of 64 keys");
  expect(query_blocks<64, 128>(tall, 0).first == kLong / 64 - 1,
         "64 keys are seen by the last queries");

  std::printf("%ld blind rows, %ld unseen keys\n", blind_rows, unseen_keys);
  expect(blind_rows > 0 && unseen_keys > 0, "no row without a partner was found");
  std::printf("%ld half steps\n", half_steps_found);
  expect(half_steps_found > 0, "no half step was found");
  std::printf("%ld of %ld hidden halves of visited blocks left out\n", left_out, hidden_halves);
  expect(left_out > 0 && left_out <= hidden_halves, "no hidden half is left out");
  std::printf(
      "groups pass over %ld blocks on the right, %ld on the left; %ld are blind, %ld empty\n",
      passed_right, passed_left, blind_groups, groups_without_rows);
  expect(passed_right > 0 && passed_left > 0 && blind_groups > 0 && groups_without_rows > 0,
         "some group's blocks are never fewer than its tile's");
  std::printf("visited %ld blocks, %ld without a visible pair, %ld unmasked of %ld possible\n",
              visited, empty, unmasked, could_be_unmasked);
  expect(small_empty == 0, "%ld blocks visited for nothing", small_empty);
  expect(small_unmasked == small_possible, "%ld of %ld blocks unmasked", small_unmasked,
         small_possible);
  return check::finish();
}
