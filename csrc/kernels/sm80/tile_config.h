#pragma once
// The tile table of the sm80 kernels: one row per built head dimension.  Read by kernels, host code and tests; measurements in benchmarks/README.md.
#include "pieces/integers.cuh"
#include "pieces/level.h"

namespace flash {

// Head dimensions with kernels of their own; others run in the next larger one.
constexpr int kHeadDims[] = {32, 64, 96, 128, 192, 256};

constexpr int built_head_dim(int head_dim) {
  for (int built : kHeadDims) {
    if (head_dim <= built) { return built; }
  }
  return 0;
}

namespace sm80 {

struct FwdTile {
  int block_m, block_n, warps;
  bool
      q_in_regs;  // Q fragments stay in registers instead of being read from shared memory per block
  int ctas;       // thread blocks per SM that registers must allow
  int early;  // of a block's k-steps of P V (16 keys each): exponentials computed before the product; the others beside it
};

constexpr FwdTile fwd_tile(int head_dim) {
  switch (head_dim) {
    case 32:
      return {128, 64, 4, true, 2, 2};
    case 64:
      return {128, 64, 4, true, 2, 3};
    case 96:
      return {128, 64, 4, false, 2, 4};
    case 128:
      return {128, 64, 4, false, 2, 4};
    case 192:
      return {128, 64, 8, true, 1, 4};
    default:
      return {64, 32, 4, true, 2, 2};
  }
}

// For kernels that need registers for what they do to scores and weights.
constexpr FwdTile general_fwd_tile(int head_dim) {
  FwdTile tile = fwd_tile(head_dim);
  if (head_dim == 128) { tile.block_n = 48; }
  tile.early = tile.block_n / 16;
  return tile;
}
constexpr bool fwd_is_general(Level level) {
  return level == Level::kAll || level == Level::kDropout;
}
// The tile's early, but for kernels where fewer are better: tanh and exponentials use the same unit; with dropout, the last k-step's
// weights are made beside the product.
constexpr int early_steps(FwdTile const& tile, int head_dim, Level level) {
  if (head_dim == 64 && level == Level::kSoftcap) { return 1; }
  if ((head_dim == 64 || head_dim == 128) && level == Level::kDropout) { return tile.early - 1; }
  return tile.early;
}
// The k-steps of a block whose random numbers are drawn while the tensor cores compute its scores; the others' come with their
// exponentials.  All of them cost 16 to 20 registers, which head dimensions above 128 do not have.
constexpr int drawn_ahead(FwdTile const& tile, int head_dim, Level level) {
  return level == Level::kDropout && head_dim <= 128 ? tile.block_n / 16 : 0;
}

struct BwdTile {
  int block_m, block_n, warps, stages;  // a stage is one Q and one dO tile
  int sdp_keys;    // warps along the keys in S^T and dP^T (the others go along the queries)
  int dkv_keys;    // warps along the keys in dK and dV (the others go along the head dimension)
  int dq_queries;  // warps along the queries in dQ (the others go along the head dimension)
  int sub_m;       // queries whose S^T and dP^T are in registers at a time
  int ctas;
};

// sdp_keys == dkv_keys == warps keeps P^T and dS^T in registers as the A operand of dV and dK.
// small_smem: for thread blocks of at most 163 KB (sm_80) instead of 227 KB (sm_90).
constexpr BwdTile bwd_tile(int head_dim, bool small_smem) {
  switch (head_dim) {
    case 32:
      return {64, 128, 4, 2, 4, 4, 2, 32, 2};
    case 64:
      return {64, 128, 4, 2, 4, 4, 2, 32, 2};
    case 96:
      return {64, 64, 4, 2, 2, 2, 2, 64, 2};
    case 128:
      return {64, 128, 8, 2, 4, 2, 2, 64, 1};
    case 192:
      return small_smem ? BwdTile{64, 64, 8, 2, 2, 2, 2, 64, 1}
                        : BwdTile{64, 96, 8, 2, 2, 2, 2, 64, 1};
    default:
      return small_smem ? BwdTile{32, 64, 8, 2, 4, 2, 2, 32, 1}
                        : BwdTile{64, 64, 8, 2, 4, 2, 2, 64, 1};
  }
}

// As in the forward pass.
constexpr BwdTile general_bwd_tile(int head_dim, bool small_smem) {
  BwdTile tile = bwd_tile(head_dim, small_smem);
  if (head_dim <= 64) { tile.sub_m = 16; }
  if (head_dim == 128) { tile.sdp_keys = tile.dkv_keys = 8, tile.sub_m = 32; }
  if (head_dim > 192) { tile = {32, 64, 8, 2, 4, 2, 2, 32, 1}; }
  return tile;
}

constexpr bool bwd_is_general(int head_dim, Level level) {
  return level != Level::kPlain && !(level == Level::kAlibi && head_dim == 128);
}

// Decoding.  narrow: all rows fit one 16-row MMA tile and every warp has key tiles, a pipeline and a softmax of its own; otherwise warps go along
// the rows and share key tiles.  Rows are the queries of all heads that share a key head.
struct DecodeTile {
  int warps_m, warps_n;  // one of them is 1
  int tile_n;            // keys of one warp's (narrow) or the thread block's (wide) tile
  int stages, ctas;      // a stage is one K and one V tile
  bool q_in_regs;

  constexpr int block_m() const { return 16 * warps_m; }
  constexpr int block_n() const { return tile_n * warps_n; }
};

constexpr int kNarrowRows = 16;

constexpr DecodeTile decode_tile(int head_dim, bool narrow, bool small_smem) {
  if (narrow) {
    switch (head_dim) {
      case 32:
        return {1, 8, 16, 8, 1, true};
      case 64:
        return {1, 8, 16, small_smem ? 4 : 6, 1, true};
      case 96:
        return {1, 8, 16, small_smem ? 3 : 4, 1, true};
      case 128:
        return {1, 8, 16, small_smem ? 2 : 3, 1, true};
      case 192:
        return {1, 4, 16, small_smem ? 3 : 4, 1, true};
      default:
        return {1, 4, 16, small_smem ? 2 : 3, 1, false};
    }
  }
  switch (head_dim) {
    case 32:
    case 64:
      return {4, 1, 64, 3, 2, true};
    case 96:
    case 128:
      return {4, 1, 64, 2, 2, true};
    case 192:
      return {4, 1, 32, 2, small_smem ? 1 : 2, false};
    default:  // 32 keys: 116 bytes of spills
      return {4, 1, 16, 3, small_smem ? 1 : 2, false};
  }
}

constexpr bool has_small_bwd_tile(int head_dim) { return head_dim > 128; }

}  // namespace sm80
}  // namespace flash
