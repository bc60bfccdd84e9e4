#pragma once
// Key tiles from a cache, contiguous or paged, to shared memory: 16-byte cp.async with zeros for rows outside a range.
// Used by: decode/mainloop.  Knows pages, not attention.  Invariant: rows outside [first, end) arrive as zeros and are never read;
// a page number that does not exist counts as a row outside.
#include "pieces/kv_cache.cuh"
#include "sm80/instructions/copy.cuh"

namespace flash::sm80 {
using namespace cute;

// One thread's share of copying tiles of kRows rows of K and V, each tile kAdvance rows after the last.  Tiles begin at multiples of 16
// rows and pages hold multiples of 16, so that 16 rows never cross a page: their page is looked up once, one tile ahead of its use.
//
//   thread t copies column chunk t % kChunks and rows t / kChunks + i * kRowStep
template <class Element, int kRows, int kColumns, int kThreads, int kAdvance>
struct CacheCopy {
  static constexpr int kPageRows    = 16;
  static constexpr int kAtomColumns = atom_columns(kColumns);
  static constexpr int kChunks = kAtomColumns / 8, kAtoms = kColumns / kAtomColumns;
  static constexpr int kRowStep    = kThreads / kChunks;
  static constexpr int kLookupRows = kRowStep > kPageRows ? kRowStep : kPageRows;
  static constexpr int kLookups = kRows / kLookupRows, kPasses = kLookupRows / kRowStep;
  static_assert(kThreads % kChunks == 0 && kRows % kLookupRows == 0, "whole passes of all threads");
  static_assert(kRowStep % 8 == 0 || (kRowStep == 4 && kChunks == 8),
                "a pass covers whole swizzle periods, or half of one");

  Element const *k, *v;  // this thread's column of the head
  KvCache const* cache;
  int const* table;  // of the sequence; null: contiguous
  int first, end;
  int entry, offset;            // the lookup after the next: of the table or the cache; row in it
  int step_entries, step_rows;  // kAdvance in pages and rows
  int tile_row;                 // this thread's first row of the next tile
  int page[kLookups], row[kLookups];  // of the next tile

  CUTE_DEVICE CacheCopy(KvCache const& cache_, int batch, int head, int first_, int end_, int row0,
                        int thread)
      : cache(&cache_), first(first_ < end_ ? first_ : 0), end(first_ < end_ ? end_ : 0) {
    int const column = thread % kChunks * 8, own_row = thread / kChunks;
    k        = static_cast<Element const*>(cache->k.data) + head * cache->k.head_stride + column;
    v        = static_cast<Element const*>(cache->v.data) + head * cache->v.head_stride + column;
    tile_row = row0 + own_row;
    int const row = row0 + own_row / kPageRows * kPageRows;
    table = cache->block_table ? cache->block_table + batch * cache->block_table_stride : nullptr;
    if (table) {
      entry = row / cache->page_size, offset = row % cache->page_size;
      step_entries = kAdvance / cache->page_size, step_rows = kAdvance % cache->page_size;
    } else {
      entry = cache->entries ? __ldg(cache->entries + batch) : batch, offset = row;
      step_entries = 0, step_rows = kAdvance;
    }
    look_up(row);
  }

  // Starts the copy of the next tile into sK and sV, row-major swizzled tiles.
  template <class Tile>
  CUTE_DEVICE void start(Element* smem_k, Element* smem_v, int head_dim, int thread) {
    int const own_row = thread / kChunks, column = thread % kChunks * 8;
    uint32_t const k0 = cast_smem_ptr_to_uint(&Tile::tensor(smem_k)(own_row, column));
    uint32_t const v0 = cast_smem_ptr_to_uint(&Tile::tensor(smem_v)(own_row, column));
    CUTE_UNROLL
    for (int i = 0; i < kLookups; ++i) {
      bool const exists     = unsigned(page[i]) < unsigned(cache->pages);
      int const row0        = row[i] + own_row % kPageRows;
      Element const* line_k = k + page[i] * cache->k.batch_stride + row0 * cache->k.row_stride;
      Element const* line_v = v + page[i] * cache->v.batch_stride + row0 * cache->v.row_stride;
      CUTE_UNROLL
      for (int p = 0; p < kPasses; ++p) {
        int const down   = i * kLookupRows + p * kRowStep;
        bool const valid = exists && unsigned(tile_row + down - first) < unsigned(end - first);
        // Half a swizzle period down, the chunk's number differs in its highest bit.
        uint32_t const half = down % 8 ? 64 : 0;
        CUTE_UNROLL
        for (int j = 0; j < kAtoms; ++j) {
          uint32_t const to = (down * kAtomColumns + j * kRows * kAtomColumns) * sizeof(Element);
          bool const copies = valid && column + j * kAtomColumns < head_dim;
          cp_async_16((k0 ^ half) + to, line_k + j * kAtomColumns, copies);
          cp_async_16((v0 ^ half) + to, line_v + j * kAtomColumns, copies);
        }
        line_k += kRowStep * cache->k.row_stride;
        line_v += kRowStep * cache->v.row_stride;
      }
    }
    tile_row += kAdvance;
    entry += step_entries, offset += step_rows;
    if (table && offset >= cache->page_size) { offset -= cache->page_size, ++entry; }
    look_up(tile_row - own_row % kPageRows);
  }

 private:
  // Pages of the tile whose first row for this thread is in the 16 rows from `row` on.
  CUTE_DEVICE void look_up(int from) {
    int entry_i = entry, offset_i = offset;
    CUTE_UNROLL
    for (int i = 0; i < kLookups; ++i) {
      row[i] = offset_i;
      if (table) {
        page[i] = from + i * kLookupRows < end ? __ldg(table + entry_i) : -1;
        offset_i += kLookupRows;
        while (offset_i >= cache->page_size) { offset_i -= cache->page_size, ++entry_i; }
      } else {
        page[i] = entry_i;
        offset_i += kLookupRows;
      }
    }
  }
};

}  // namespace flash::sm80
