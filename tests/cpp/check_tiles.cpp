// Check of sm80/tile_config.h and the traits: for every head dimension and size of shared memory each kernel fits, its warps own every
// value of their products once, and what loops and other kernels take for granted of a layout is so.
#include <cutlass/numeric_types.h>

#include <set>
#include <type_traits>
#include <utility>
#include <vector>

// Intrinsics that headers name and nothing here calls.
unsigned __shfl_sync(unsigned, unsigned, int);
int __any_sync(unsigned, int);
float __int_as_float(int);
template <class T>
T __ldg(T const*);

#include "check.h"
#include "head_dims.h"
#include "pieces/coordinates.cuh"
#include "sm80/bwd/traits.cuh"
#include "sm80/decode/traits.cuh"
#include "sm80/fwd/traits.cuh"
#include "sm80/instructions/copy.cuh"

using namespace flash;
using namespace flash::sm80;
using check::expect;
using Element = cutlass::bfloat16_t;

#define CASE "%s, head_dim %d, %d KB"
#define ARGS kind, Traits::kHeadDim, int(size)

// What the table says of shared memory, once more and from its arithmetic alone.
template <class Traits>
void check_bytes(char const* kind, SmemSize size, int bytes) {
  expect(Traits::kSmemBytes == bytes, CASE ": %d bytes, not %d", ARGS, Traits::kSmemBytes, bytes);
  expect(bytes + Traits::kStaticSmemBytes <= bytes_of(size), CASE ": %d bytes", ARGS, bytes);
  expect(fits<Traits>(int(size)) && !fits<Traits>(bytes / 1024), CASE ": fits", ARGS);
}

// Every value of a kM x kN product belongs to one thread.
template <class Traits, class TiledMma, int kM, int kN>
void check_product(char const* kind, SmemSize size, char const* product) {
  using Shape_ = Shape<Int<kM>, Int<kN>>;
  std::set<std::pair<int, int>> seen;
  int values = 0;
  expect(int(cute::size(TiledMma{})) == Traits::kThreads, CASE ": threads of %s", ARGS, product);
  for (int thread = 0; thread < Traits::kThreads; ++thread) {
    auto const where = tile_coordinates<TiledMma, Shape_>(thread);
    for (int i = 0; i < int(cute::size(where)); ++i, ++values) {
      int const row = get<0>(where(i)), column = get<1>(where(i));
      expect(row >= 0 && row < kM && column >= 0 && column < kN, CASE ": %s outside", ARGS,
             product);
      seen.insert({row, column});
    }
  }
  expect(values == kM * kN && int(seen.size()) == values, CASE ": %s has %d values, %d places",
         ARGS, product, values, int(seen.size()));
}

template <class Traits>
void check_forward(SmemSize size) {
  char const* const kind = "forward";
  int const tiles        = Traits::kBlockM + 4 * Traits::kBlockN;
  check_bytes<Traits>(kind, size, tiles * Traits::kHeadDim * 2);
  using TiledMma = typename Traits::TiledMma;
  check_product<Traits, TiledMma, Traits::kBlockM, Traits::kBlockN>(kind, size, "S");
  check_product<Traits, TiledMma, Traits::kBlockM, Traits::kHeadDim>(kind, size, "O");
  (void)sizeof(TileCopy<Element, Traits::kBlockN, Traits::kHeadDim, Traits::kThreads>);
}

// The parts of dQ lie in its sum as the whole does.
template <class Traits>
void check_parts_of_dq(SmemSize size) {
  char const* const kind = "backward";
  using Whole            = Shape<Int<Traits::kBlockM>, Int<Traits::kHeadDim>>;
  using Part             = Shape<Int<Traits::kBlockM>, Int<Traits::kDqColumns>>;
  for (int thread = 0; thread < Traits::kThreads; ++thread) {
    auto const whole = tile_coordinates<typename Traits::MmaDq, Whole>(thread);
    auto const part  = tile_coordinates<typename Traits::MmaDq, Part>(thread);
    int const values = cute::size(part);
    expect(values * Traits::kDqParts == int(cute::size(whole)), CASE ": parts of dQ", ARGS);
    for (int i = 0; i < int(cute::size(whole)); ++i) {
      int const column = int(get<1>(part(i % values))) + i / values * Traits::kDqColumns;
      expect(get<0>(whole(i)) == get<0>(part(i % values)) && int(get<1>(whole(i))) == column,
             CASE ": thread %d, value %d of dQ", ARGS, thread, i);
    }
  }
}

// What mark_dropped takes for granted: a warp's columns are whole halves of the 32 x 16 blocks of random numbers, or whole blocks.
template <class Traits>
void check_random_blocks(SmemSize size) {
  char const* const kind = "backward";
  constexpr int kHalves  = Traits::kSdpQueries == 1 && Traits::kSubM % 32 == 0 ? 2 : 1;
  using TileSdp          = Shape<Int<Traits::kBlockN>, Int<Traits::kSubM>>;
  using Mma              = typename Traits::MmaSdp;
  auto const scores      = partition_fragment_C(Mma{}, TileSdp{});
  expect(int(cute::size<2>(scores)) % (2 * kHalves) == 0, CASE ": columns of a warp", ARGS);
  for (int thread = 0; thread < Traits::kThreads; ++thread) {
    int const lane    = thread % 32;
    auto const corner = tile_coordinates<Mma, TileSdp>(thread - lane);
    auto const mine   = tile_coordinates<Mma, TileSdp>(thread);
    for (int m = 0; m < int(cute::size<1>(scores)); ++m) {
      for (int n = 0; n < int(cute::size<2>(scores)); n += 2 * kHalves) {
        int const key = get<0>(corner(0, m, n)), query = get<1>(corner(0, m, n));
        expect(key % 16 == 0 && query % (16 * kHalves) == 0, CASE ": corner %d, %d", ARGS, key,
               query);
        for (int j = 0; j < 4 * kHalves; ++j) {
          int const i = j % 4, query8 = n + j / 4 * 2 + i % 2;
          for (int odd = 0; odd < 2; ++odd) {
            auto const place = mine(i / 2 * 2 + odd, m, query8);
            expect(int(get<0>(place)) == key + i / 2 * 8 + lane / 4 &&
                       int(get<1>(place)) == query + j / 4 * 16 + i % 2 * 8 + lane % 4 * 2 + odd,
                   CASE ": thread %d, word %d", ARGS, thread, j);
          }
        }
      }
    }
  }
}

template <class Traits>
void check_backward(SmemSize size) {
  char const* const kind = "backward";
  constexpr int kM = Traits::kBlockM, kN = Traits::kBlockN, kD = Traits::kHeadDim;
  int const tiles =
      2 * kN * kD + Traits::kStages * 2 * kM * kD + (Traits::kPInRegs ? 1 : 2) * kM * kN;
  check_bytes<Traits>(kind, size, 2 * tiles + Traits::kStages * 2 * kM * 4);
  check_product<Traits, typename Traits::MmaSdp, kN, Traits::kSubM>(kind, size, "S^T");
  check_product<Traits, typename Traits::MmaDkv, kN, kD>(kind, size, "dK");
  check_product<Traits, typename Traits::MmaDq, kM, kD>(kind, size, "dQ");
  check_parts_of_dq<Traits>(size);
  (void)sizeof(TileCopy<Element, kM, kD, Traits::kThreads>);
  (void)sizeof(TileCopy<Element, kN, kD, Traits::kThreads>);
  // LSE and delta of a query block are copied by one instruction; the preprocess' thread blocks have at most 64 rows.
  expect(2 * kM / 4 <= Traits::kThreads && kM <= 64, CASE ": %d queries", ARGS, kM);
}

template <class Traits>
void check_decoding(SmemSize size) {
  char const* const kind = Traits::kNarrow ? "decoding, narrow" : "decoding, wide";
  int const stage        = 2 * Traits::kTileN * Traits::kHeadDim;
  int const loads =
      2 * (Traits::kBlockM * Traits::kHeadDim + Traits::kGroups * Traits::kStages * stage);
  int const bytes = loads > Traits::kMergeBytes ? loads : Traits::kMergeBytes;
  check_bytes<Traits>(kind, size, bytes);
  expect(Traits::kBlockM == kNarrowRows || !Traits::kNarrow, CASE ": rows", ARGS);
}

template <int kHeadDim, SmemSize kSize>
void check_head_dim() {
  check_forward<FwdTraitsOf<kHeadDim, Element, kSize, false>>(kSize);
  check_forward<FwdTraitsOf<kHeadDim, Element, kSize, true>>(kSize);
  check_backward<BwdTraitsOf<kHeadDim, Element, kSize, false>>(kSize);
  check_backward<BwdTraitsOf<kHeadDim, Element, kSize, true>>(kSize);
  check_random_blocks<BwdTraitsOf<kHeadDim, Element, kSize, true>>(kSize);
  check_decoding<DecodeTraitsOf<kHeadDim, Element, true, kSize>>(kSize);
  check_decoding<DecodeTraitsOf<kHeadDim, Element, false, kSize>>(kSize);
}

template <int kHeadDim>
void check_sizes() {
  check_head_dim<kHeadDim, SmemSize::k227>();
  check_head_dim<kHeadDim, SmemSize::k163>();
  check_head_dim<kHeadDim, SmemSize::k99>();
}

// Kernels of sizes that share a tile are one.
template <int kHeadDim, SmemSize kSize, bool kGeneral>
constexpr bool kSharesBwd =
    std::is_same_v<BwdTraitsOf<kHeadDim, Element, kSize, kGeneral>,
                   BwdTraitsOf<kHeadDim, Element, SmemSize::k227, kGeneral>>;
static_assert(kSharesBwd<32, SmemSize::k99, false> && kSharesBwd<64, SmemSize::k99, true> &&
              kSharesBwd<96, SmemSize::k99, true> && kSharesBwd<128, SmemSize::k163, false>);
static_assert(kSharesBwd<256, SmemSize::k163, true> && !kSharesBwd<256, SmemSize::k163, false>);
static_assert(!kSharesBwd<128, SmemSize::k99, false> && !kSharesBwd<192, SmemSize::k163, false>);

// The largest size within a limit; below all of them the smallest.
void check_choice() {
  using All  = BuiltSizes<SmemSize::k227, SmemSize::k163, SmemSize::k99>;
  using Some = BuiltSizes<SmemSize::k227, SmemSize::k99>;
  std::vector<std::pair<int, int>> const all{{300, 227}, {227, 227}, {226, 163}, {163, 163},
                                             {162, 99},  {99, 99},   {98, 99},   {0, 99}};
  for (auto [limit, want] : all) {
    expect(int(size_within(All{}, limit)) == want, "%d KB: %d", limit, want);
    int const without_163 = want == 163 ? 99 : want;
    expect(int(size_within(Some{}, limit)) == without_163, "%d KB: %d", limit, without_163);
    int chosen = 0, calls = 0;
    choose_size(Some{}, limit, [&](auto size) { chosen = int(SmemSize(size)), ++calls; });
    expect(chosen == without_163 && calls == 1, "%d KB: %d chosen in %d calls", limit, chosen,
           calls);
  }
}

int main() {
  check_sizes<32>(), check_sizes<64>(), check_sizes<96>();
  check_sizes<128>(), check_sizes<192>(), check_sizes<256>();
  static_assert(sizeof(kHeadDims) / sizeof(int) == 6, "all head dimensions are above");
  check_choice();
  return check::finish();
}
