#pragma once
// Sizes of shared memory that kernels have tiles for, and which of them a call gets.
// Used by: tile tables, traits, launches, host code.  Plain integers: compiles with g++.
#include "pieces/level.h"

namespace flash {

// Most KB (of 1024 bytes) that a thread block gets, by compute capability: 227 on 9.0, 10.x and 11.0, 163 on 8.0 and 8.7, 99 on 8.6,
// 8.9 and 12.x.  The same numbers as kernel_list.SMEM_KB.
enum class SmemSize : int { k227 = 227, k163 = 163, k99 = 99 };
constexpr SmemSize kSmemSizes[] = {SmemSize::k227, SmemSize::k163, SmemSize::k99};  // falling

constexpr int bytes_of(SmemSize size) { return int(size) * 1024; }

constexpr bool is_smem_size(int kb) {
  for (SmemSize size : kSmemSizes) {
    if (int(size) == kb) { return true; }
  }
  return false;
}

// The most that GPUs have which run this architecture's code: none of it is for larger tiles.
#if !defined(__CUDA_ARCH__)
constexpr int kArchSmemKb = 227;
#elif __CUDA_ARCH__ == 860 || __CUDA_ARCH__ == 890 || __CUDA_ARCH__ >= 1200
constexpr int kArchSmemKb = 99;
#else
constexpr int kArchSmemKb = __CUDA_ARCH__ < 900 ? 163 : 227;
#endif

// Whether kernels with these traits are for this architecture.  In its code the others are a trap and nothing else: a launch that
// chose one of them is an error, not results that nobody wrote.
template <class Traits>
constexpr bool kIsForThisArch = int(Traits::kSmallestSize) <= kArchSmemKb;

// The largest size whose tile, tile_of(size), is that of the given one: kernels are compiled once for all sizes that share a tile.
template <class TileOf>
constexpr SmemSize largest_with_tile_of(SmemSize given, TileOf tile_of) {
  for (SmemSize size : kSmemSizes) {
    if (tile_of(size) == tile_of(given)) { return size; }
  }
  return given;
}

// The smallest size with that tile, in which the kernel must fit.
template <class TileOf>
constexpr SmemSize smallest_with_tile_of(SmemSize given, TileOf tile_of) {
  SmemSize smallest = given;
  for (SmemSize size : kSmemSizes) {
    if (tile_of(size) == tile_of(given)) { smallest = size; }
  }
  return smallest;
}

// Whether a thread block with so many bytes fits a size but not the next smaller one.
template <int kBytes>
constexpr bool fits_just(SmemSize size) {
  bool fits_smaller = false;
  for (SmemSize smaller : kSmemSizes) {
    fits_smaller |= smaller < size && kBytes <= bytes_of(smaller);
  }
  return kBytes <= bytes_of(size) && !fits_smaller;
}

// The sizes that a build has tiles for, falling.
template <SmemSize... kSizes>
struct BuiltSizes {};

// The largest built size within a limit.  If there is none the smallest: some of its tiles take less than its size.
template <SmemSize... kBuilt>
constexpr SmemSize size_within(BuiltSizes<kBuilt...>, int limit_kb) {
  static_assert(sizeof...(kBuilt) > 0, "a build has tiles of some size");
  constexpr SmemSize kSizes[] = {kBuilt...};
  for (SmemSize size : kSizes) {
    if (int(size) <= limit_kb) { return size; }
  }
  return kSizes[sizeof...(kBuilt) - 1];
}

// Calls choose(Constant<size>) for the built size of a limit.
template <SmemSize... kBuilt, class Choose>
void choose_size(BuiltSizes<kBuilt...> built, int limit_kb, Choose choose) {
  SmemSize const size = size_within(built, limit_kb);
  ((size == kBuilt ? choose(Constant<kBuilt>{}) : void()), ...);
}

// Whether a thread block of these traits' kernels may have its shared memory under a limit.
template <class Traits>
constexpr bool fits(int limit_kb) {
  return Traits::kSmemBytes + Traits::kStaticSmemBytes <= limit_kb * 1024;
}

}  // namespace flash
