#pragma once
// Sequences in a cache: how many rows each has, which of them are keys, and which key tiles a query tile needs.
// Used by: decode_kernel, kv_update.  Plain integers but for the reads of a sequence's lengths.
#include "flash.h"
#include "pieces/visibility.cuh"

namespace flash {

// A sequence's queries and keys.  Keys are counted in rows of the cache: key j of the sequence is row pad + j.
struct CacheSequence {
  int q_row0, seqlen_q;
  int pad, seqlen_k;
};

// Rows of a query tile: row r of the sequence is query r / group with head r % group of the group's query heads.
//
//   group = 3, kBlockM = 16:   row      0 1 2 | 3 4 5 | 6 ...
//                              query    0     | 1     | 2
FLASH_HD int query_tile_count(CacheSequence const& sequence, int group, int block_m) {
  return ceil_div(sequence.seqlen_q * group, block_m);
}

// Query of a row.  Divisions are slow, and few queries need none.
FLASH_HD int row_query(int row, int group) { return row < group ? 0 : row / group; }

FLASH_HD int clamped(int value, int most) { return max_of(0, min_of(value, most)); }

// Rows of the cache, and the tiles of them, that a query tile visits.  At least one tile: a query tile that sees no key must be
// written too.
struct KeyRange {
  int first, end;            // rows that some query sees; none if end <= first
  int all_first, all_end;    // rows that every query sees
  int tile_begin, tile_end;  // tiles begin at multiples of their size

  FLASH_HD int tiles() const { return tile_end - tile_begin; }
};

FLASH_HD KeyRange key_range(CacheSequence const& sequence, Problem const& problem, int group,
                            int m_block, int block_m, int block_n) {
  Visibility<MaskKind::kLocal> const see{sequence.seqlen_q, sequence.seqlen_k, problem.window_left,
                                         problem.window_right};
  int const top     = row_query(m_block * block_m, group);
  int const end_row = m_block * block_m + block_m;
  int const pad = sequence.pad, last = end_row >= sequence.seqlen_q * group ? sequence.seqlen_q - 1
                                                                            : (end_row - 1) / group;
  KeyRange range;
  range.first = pad + see.first_key(top), range.end = pad + see.end_key(last);
  range.all_first = pad + see.first_key(last), range.all_end = pad + see.end_key(top);
  range.tile_begin = min_of(range.first, pad + sequence.seqlen_k) / block_n;
  range.tile_end   = max_of(range.tile_begin + 1, ceil_div(max_of(0, range.end), block_n));
  return range;
}

#ifdef __CUDACC__
// kEarly: a kernel before may still write the lengths that are read.  They are a guess, and none of them stays in L1.
enum class LengthsAre { kFinal, kEarly };

__device__ __forceinline__ int read_length(int const* place, LengthsAre lengths) {
  if (lengths == LengthsAre::kFinal) { return __ldg(place); }
  int value;
  asm volatile("ld.relaxed.gpu.global.b32 %0, [%1];" : "=r"(value) : "l"(place));
  return value;
}

// Rows before anything is added.
__device__ __forceinline__ int cached_rows(Problem const& problem, KvCache const& cache, int batch,
                                           LengthsAre lengths = LengthsAre::kFinal) {
  if (problem.seqused_k) { return read_length(problem.seqused_k + batch, lengths); }
  int const* const cu = problem.cu_seqlens_k;
  return cu ? read_length(cu + batch + 1, lengths) - read_length(cu + batch, lengths)
            : cache.seqlen;
}

__device__ __forceinline__ CacheSequence cache_sequence(Problem const& problem,
                                                        KvCache const& cache, int batch,
                                                        LengthsAre lengths = LengthsAre::kFinal) {
  CacheSequence sequence{0, problem.seqlen_q, 0, 0};
  if (int const* const cu = problem.cu_seqlens_q) {
    sequence.q_row0   = read_length(cu + batch, lengths);
    sequence.seqlen_q = read_length(cu + batch + 1, lengths) - sequence.q_row0;
  }
  int const added   = cache.seqlen_new == kAsQueries ? sequence.seqlen_q : cache.seqlen_new;
  int const rows    = clamped(cached_rows(problem, cache, batch, lengths), cache.capacity) + added;
  int const kept    = clamped(rows, cache.capacity);
  int const leftpad = problem.leftpad_k ? read_length(problem.leftpad_k + batch, lengths) : 0;
  sequence.pad      = clamped(leftpad, kept);
  sequence.seqlen_k = kept - sequence.pad;
  return sequence;
}
#endif

}  // namespace flash
