#pragma once
// Writes -inf over the scores that a query may not see.
// Used by: the main loops of forward (S, queries down), backward (S^T, keys down) and decoding.  Knows nothing about softmax.
#include <cute/tensor.hpp>

#include "pieces/coordinates.cuh"
#include "pieces/visibility.cuh"

namespace flash {
using namespace cute;

// Hides a score whose key is outside [first, end), of which only the ends asked for are looked at.
template <bool kFirst, bool kEnd>
CUTE_HOST_DEVICE void hide_outside(float& score, int key, int first, int end) {
  bool hidden = false;
  if constexpr (kEnd) { hidden = key >= end; }
  if constexpr (kFirst) { hidden |= key < first; }  // not ||: its branch costs 127 more adds
  if (hidden) { score = -INFINITY; }
}

// Edges of a row's keys that a tile may cross.
enum class Edges { kBoth, kLeft, kRight };

// row0, col0: first query and first key of this tile.  kTransposed: the accumulator holds S^T.
template <bool kTransposed, class TiledMma, class TileShape, Edges kEdges = Edges::kBoth,
          class TensorS, MaskKind kMask>
CUTE_HOST_DEVICE void mask_scores(TensorS& tSrS, Visibility<kMask> const& see, int row0, int col0,
                                  int thread) {
  constexpr int kQ = kTransposed ? 1 : 0, kK = 1 - kQ;
  Tensor tScS  = tile_coordinates<TiledMma, TileShape>(thread);
  Tensor t0ScS = tile_coordinates<TiledMma, TileShape>(_0{});
  // Moving the thread's constant pair to the bounds leaves one register-against-immediate compare per score (PTX, causal 128x64 tile,
  // 64 scores: 64 setp, 19 add).
  int const thread_q = row0 + int(get<kQ>(tScS(_0{}))), thread_k = col0 + int(get<kK>(tScS(_0{})));
  CUTE_UNROLL
  for (int i = 0; i < size(tSrS); ++i) {
    int const q = thread_q + int(get<kQ>(t0ScS(i))), k = get<kK>(t0ScS(i));
    int const end = see.end_key(q) - thread_k, first = see.first_key(q) - thread_k;
    hide_outside<see.kHasLeft && kEdges != Edges::kRight, kEdges != Edges::kLeft>(tSrS(i), k, first,
                                                                                  end);
  }
}

// The same for one edge of the rows' keys: hides keys from the end on, or (is_left) those before the first.  S, queries down.
template <class TiledMma, class TileShape, class TensorS, MaskKind kMask>
CUTE_HOST_DEVICE void mask_edge(TensorS& tSrS, Visibility<kMask> const& see, bool is_left, int row0,
                                int col0, int thread) {
  Tensor tScS        = tile_coordinates<TiledMma, TileShape>(thread);
  Tensor t0ScS       = tile_coordinates<TiledMma, TileShape>(_0{});
  int const thread_k = col0 + int(get<1>(tScS(_0{})));
  int const edge_0 =
      row0 + int(get<0>(tScS(_0{}))) + (is_left ? see.first_offset() : see.end_offset());
  CUTE_UNROLL
  for (int i = 0; i < size(tSrS); ++i) {
    // No first key is beyond seqlen_k without its row's end being there too: one bound serves both.
    int const edge = min_of(see.seqlen_k, edge_0 + int(get<0>(t0ScS(i)))) - thread_k;
    if ((int(get<1>(t0ScS(i))) >= edge) != is_left) { tSrS(i) = -INFINITY; }
  }
}

}  // namespace flash
