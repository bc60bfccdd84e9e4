// Check of pieces/mask.cuh: every thread of every MMA arrangement hides exactly the pairs that the definition hides.
#include <cmath>
#include <cute/atom/mma_atom.hpp>
#include <initializer_list>

#include "check.h"
#include "pieces/mask.cuh"

using namespace flash;
using check::expect;

using Atom = MMA_Atom<SM80_16x8x16_F32BF16BF16F32_TN>;

template <int kWarpsM, int kWarpsN>
using Mma = TiledMMA<Atom, Layout<Shape<Int<kWarpsM>, Int<kWarpsN>, _1>>,
                     Tile<Int<16 * kWarpsM>, Int<16 * kWarpsN>, _16>>;

template <MaskKind kMask>
bool sees(Visibility<kMask> const& m, int q, int k) {
  int const distance = k - q - (m.seqlen_k - m.seqlen_q);
  if (k >= m.seqlen_k) return false;
  if (kMask == MaskKind::kCausal) return distance <= 0;
  if (kMask == MaskKind::kLocal) return distance <= m.right && distance >= -m.left;
  return true;
}

// The edges that a tile crosses, one after the other, as the forward kernel masks windows.
template <class TiledMma, class Tile_, class TensorS, MaskKind kMask>
void mask_edges(TensorS& s, Visibility<kMask> const& m, int row0, int col0, int thread) {
  int const edges = m.crossed(row0, size<0>(Tile_{}), col0, size<1>(Tile_{}));
  if (edges & 1) mask_edge<TiledMma, Tile_>(s, m, false, row0, col0, thread);
  if (edges & 2) mask_edge<TiledMma, Tile_>(s, m, true, row0, col0, thread);
}

template <bool kTransposed, bool kByEdge, class TiledMma, class Tile_, MaskKind kMask>
void check_tile(Visibility<kMask> const& m, int row0, int col0) {
  for (int thread = 0; thread < int(size(TiledMma{})); ++thread) {
    Tensor s = partition_fragment_C(TiledMma{}, Tile_{});
    for (int i = 0; i < size(s); ++i) s(i) = float(i + 1);
    if constexpr (kByEdge) {
      mask_edges<TiledMma, Tile_>(s, m, row0, col0, thread);
    } else {
      mask_scores<kTransposed, TiledMma, Tile_>(s, m, row0, col0, thread);
    }
    Tensor c = TiledMma{}.get_slice(thread).partition_C(make_identity_tensor(Tile_{}));
    for (int i = 0; i < size(s); ++i) {
      int const down = get<0>(c(i)), across = get<1>(c(i));
      int const q = row0 + (kTransposed ? across : down), k = col0 + (kTransposed ? down : across);
      bool const kept = s(i) == float(i + 1), hidden = s(i) == -INFINITY, want = sees(m, q, k);
      expect(want ? kept : hidden,
             "mask %d, transposed %d, sq %d, sk %d, window %d %d: thread %d, query %d, key %d "
             "holds %g",
             int(kMask), int(kTransposed), m.seqlen_q, m.seqlen_k, m.left, m.right, thread, q, k,
             double(s(i)));
    }
  }
}

template <class TiledMma, class Tile_>
void check_masks(int sq, int sk, int row0, int col0) {
  auto both = [&](auto const& m) {
    check_tile<false, false, TiledMma, Tile_>(m, row0, col0);
    check_tile<true, false, TiledMma, Tile_>(m, row0, col0);
  };
  both(Visibility<MaskKind::kNone>{sq, sk, 0, 0});
  both(Visibility<MaskKind::kCausal>{sq, sk, 0, 0});
  for (int left : {0, 7, 64, kUnlimited})
    for (int right : {0, 3, kUnlimited}) {
      Visibility<MaskKind::kLocal> const window{sq, sk, left, right};
      both(window);
      check_tile<false, true, TiledMma, Tile_>(window, row0, col0);
    }
}

int main() {
  for (int sq : {1, 100, 128, 200})
    for (int sk : {1, 63, 64, 113, 200})
      for (int row0 : {0, 128})
        for (int col0 : {0, 64, 128}) {
          check_masks<Mma<4, 1>, Shape<_128, _64>>(sq, sk, row0, col0);
          check_masks<Mma<2, 2>, Shape<_64, _64>>(sq, sk, row0, col0);
        }
  for (int sk : {33, 100}) {
    check_masks<Mma<8, 1>, Shape<_128, _32>>(200, sk, 128, 32);
    check_masks<Mma<8, 1>, Shape<_128, _64>>(200, sk, 0, 64);
    check_masks<Mma<4, 2>, Shape<_128, _64>>(sk, 200, 64, 0);
  }
  return check::finish();
}
