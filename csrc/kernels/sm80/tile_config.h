#pragma once
// The tile table of the sm80 kernels: tile sizes by head dimension, shared memory and level.  How loops are written stands in loop_forms.h.
// Read by kernels, host code and tests.  Main loops compare no head dimension: they ask one of these tables.
// Measurements: docs/tuning.md.  "Spills" are ptxas' reports for sm_90a.
// Designated initialisers are C++20; gcc, clang and nvcc take them in C++17.
#include "pieces/integers.cuh"
#include "pieces/level.h"
#include "pieces/smem_size.h"

namespace flash::sm80 {

// --- Forward -------------------------------------------------------------------------------------

struct FwdTile {
  int block_m, block_n, warps;
  bool q_in_regs;  // Q fragments stay in registers instead of being read again for each block
  int ctas;        // thread blocks per SM that registers must allow
  int early;       // k-steps of a block's P V (16 keys each) with exponentials before the product

  constexpr bool operator==(FwdTile const& other) const {
    return block_m == other.block_m && block_n == other.block_n && warps == other.warps &&
           q_in_regs == other.q_in_regs && ctas == other.ctas && early == other.early;
  }
};

constexpr FwdTile fwd_tile(int head_dim, SmemSize size) {
  switch (head_dim) {
    case 32:  // As 64.
      return {.block_m = 128, .block_n = 64, .warps = 4, .q_in_regs = true, .ctas = 2, .early = 2};
    case 64:  // 128 x 96 and 192 x 32 are 10 and 19 % slower; early 2 costs up to 7 %, 4 costs 3 %.
      return {.block_m = 128, .block_n = 64, .warps = 4, .q_in_regs = true, .ctas = 2, .early = 3};
    case 96:  // Q's 48 registers would not fit beside O's 96 and S's 64.
      return {.block_m = 128, .block_n = 64, .warps = 4, .q_in_regs = false, .ctas = 2, .early = 4};
    case 128:  // As 96: O takes 128 registers, Q would take 64.
      return {.block_m = 128, .block_n = 64, .warps = 4, .q_in_regs = false, .ctas = 2, .early = 4};
    case 192:  // O of 128 rows takes eight warps, and these all registers of an SM.  99 KB have room for 32 keys.
      if (size == SmemSize::k99) {
        return {
            .block_m = 128, .block_n = 32, .warps = 8, .q_in_regs = true, .ctas = 1, .early = 2};
      }
      return {.block_m = 128, .block_n = 64, .warps = 8, .q_in_regs = true, .ctas = 1, .early = 4};
    default:  // O takes 128 registers of a thread: half the rows, so that two thread blocks fit.
      return {.block_m = 64, .block_n = 32, .warps = 4, .q_in_regs = true, .ctas = 2, .early = 2};
  }
}

// For kernels that need registers for what they do to scores and weights.
constexpr FwdTile general_fwd_tile(int head_dim, SmemSize size) {
  FwdTile tile = fwd_tile(head_dim, size);
  if (head_dim == 128) { tile.block_n = 48; }  // S and P of 64 keys leave none
  tile.early = tile.block_n / 16;
  return tile;
}
constexpr bool fwd_is_general(Level level) {
  return level == Level::kAll || level == Level::kDropout;
}
constexpr FwdTile fwd_tile(int head_dim, SmemSize size, bool general) {
  return general ? general_fwd_tile(head_dim, size) : fwd_tile(head_dim, size);
}

// --- Backward ------------------------------------------------------------------------------------

struct BwdTile {
  int block_m, block_n, warps, stages;  // a stage is one Q and one dO tile
  int sdp_keys;    // warps along the keys in S^T and dP^T (the others go along the queries)
  int dkv_keys;    // warps along the keys in dK and dV (the others go along the head dimension)
  int dq_queries;  // warps along the queries in dQ (the others go along the head dimension)
  int sub_m;       // queries whose S^T and dP^T are in registers at a time
  int ctas;
  int dq_parts;  // of the head dimension, whose dQ is in registers at a time

  constexpr bool operator==(BwdTile const& other) const {
    return block_m == other.block_m && block_n == other.block_n && warps == other.warps &&
           stages == other.stages && sdp_keys == other.sdp_keys && dkv_keys == other.dkv_keys &&
           dq_queries == other.dq_queries && sub_m == other.sub_m && ctas == other.ctas &&
           dq_parts == other.dq_parts;
  }
};

// sdp_keys == dkv_keys == warps keeps P^T and dS^T in registers as the A operand of dV and dK.
constexpr BwdTile bwd_tile(int head_dim, SmemSize size) {
  bool const at_least_163 = size != SmemSize::k99, at_least_227 = size == SmemSize::k227;
  switch (head_dim) {
    case 32:
    case 64:  // P^T in registers is worth 30 %: 128 x 128 through shared memory 279 TFLOP/s, this 368.
      return {.block_m    = 64,
              .block_n    = 128,
              .warps      = 4,
              .stages     = 2,
              .sdp_keys   = 4,
              .dkv_keys   = 4,
              .dq_queries = 2,
              .sub_m      = 32,
              .ctas       = 2,
              .dq_parts   = 1};
    case 96:  // Two thread blocks with 128 keys would need 258 KB of shared memory.
      return {.block_m    = 64,
              .block_n    = 64,
              .warps      = 4,
              .stages     = 2,
              .sdp_keys   = 2,
              .dkv_keys   = 2,
              .dq_queries = 2,
              .sub_m      = 64,
              .ctas       = 2,
              .dq_parts   = 1};
    case 128:  // 32 x 32 parts of S^T per warp: 327 TFLOP/s; P in registers with 16 keys per warp 300.
      if (at_least_163) {
        return {.block_m    = 64,
                .block_n    = 128,
                .warps      = 8,
                .stages     = 2,
                .sdp_keys   = 4,
                .dkv_keys   = 2,
                .dq_queries = 2,
                .sub_m      = 64,
                .ctas       = 1,
                .dq_parts   = 1};
      }
      // The same parts of S^T.  With two stages 304.
      return {.block_m    = 64,
              .block_n    = 64,
              .warps      = 4,
              .stages     = 1,
              .sdp_keys   = 2,
              .dkv_keys   = 2,
              .dq_queries = 2,
              .sub_m      = 64,
              .ctas       = 2,
              .dq_parts   = 1};
    case 192:  // 96 keys 296 TFLOP/s, 64 keys 252; 163 KB have room for 64.
      if (at_least_163) {
        return {.block_m    = 64,
                .block_n    = at_least_227 ? 96 : 64,
                .warps      = 8,
                .stages     = 2,
                .sdp_keys   = 2,
                .dkv_keys   = 2,
                .dq_queries = 2,
                .sub_m      = 64,
                .ctas       = 1,
                .dq_parts   = 1};
      }
      // dK and dV of 48 keys take 144 registers of a thread, dQ 96 if it is not in parts.
      return {.block_m    = 64,
              .block_n    = 48,
              .warps      = 4,
              .stages     = 1,
              .sdp_keys   = 1,
              .dkv_keys   = 1,
              .dq_queries = 2,
              .sub_m      = 64,
              .ctas       = 2,
              .dq_parts   = 3};
    default:  // 16 x 32 parts of S^T per warp; 163 KB have room for 32 queries.
      if (at_least_163) {
        int const queries = at_least_227 ? 64 : 32;
        return {.block_m    = queries,
                .block_n    = 64,
                .warps      = 8,
                .stages     = 2,
                .sdp_keys   = 4,
                .dkv_keys   = 2,
                .dq_queries = 2,
                .sub_m      = queries,
                .ctas       = 1,
                .dq_parts   = 1};
      }
      // 32 x 64 parts of dQ and dK per warp.  99 KB have room for neither 64 keys nor a second stage.
      return {.block_m    = 32,
              .block_n    = 32,
              .warps      = 4,
              .stages     = 1,
              .sdp_keys   = 2,
              .dkv_keys   = 1,
              .dq_queries = 1,
              .sub_m      = 32,
              .ctas       = 2,
              .dq_parts   = 1};
  }
}

// As in the forward pass: with these parts of S^T, the kernels have the registers.
constexpr BwdTile general_bwd_tile(int head_dim, SmemSize size) {
  BwdTile tile = bwd_tile(head_dim, size);
  if (head_dim <= 64) { tile.sub_m = 16; }
  if (head_dim == 128) { tile.sdp_keys = tile.dkv_keys = tile.warps, tile.sub_m = 32; }
  if (head_dim == 192 && size == SmemSize::k99) { tile.block_n = 32, tile.sdp_keys = 2; }
  if (head_dim > 192 && size == SmemSize::k227) { tile = bwd_tile(head_dim, SmemSize::k163); }
  return tile;
}
constexpr BwdTile bwd_tile(int head_dim, SmemSize size, bool general) {
  return general ? general_bwd_tile(head_dim, size) : bwd_tile(head_dim, size);
}

constexpr bool bwd_is_general(int head_dim, Level level) {
  return level != Level::kPlain && !(level == Level::kAlibi && head_dim == 128);
}

// --- Decoding ------------------------------------------------------------------------------------

// narrow: all rows fit one 16-row MMA tile and every warp has key tiles, a pipeline and a softmax of its own; otherwise warps go along
// the rows and share key tiles.  Rows are the queries of all heads that share a key head.
struct DecodeTile {
  int warps_m, warps_n;  // one of them is 1
  int tile_n;            // keys of one warp's (narrow) or the thread block's (wide) tile
  int stages;            // a stage is one K and one V tile
  int ctas;              // thread blocks that run on a multiprocessor at once, for the plan
  bool q_in_regs;
  int at_once;  // parts of a row that a thread has on their way to it when it merges them

  constexpr int block_m() const { return 16 * warps_m; }
  constexpr int block_n() const { return tile_n * warps_n; }
  // Whether one kernel serves both: it knows nothing of ctas.
  constexpr bool operator==(DecodeTile const& other) const {
    return warps_m == other.warps_m && warps_n == other.warps_n && tile_n == other.tile_n &&
           stages == other.stages && q_in_regs == other.q_in_regs && at_once == other.at_once;
  }
};

constexpr int kNarrowRows = 16;

// Warps with as many stages as shared memory has room for: what is under way hides the memory's latency.  Eight warps, or fewer where
// eight would have less than two stages.
constexpr DecodeTile narrow_decode_tile(int head_dim, SmemSize size) {
  bool const is_163 = size == SmemSize::k163, is_99 = size == SmemSize::k99;
  DecodeTile tile{.warps_m   = 1,
                  .warps_n   = 8,
                  .tile_n    = 16,
                  .stages    = 8,
                  .ctas      = 1,
                  .q_in_regs = true,
                  .at_once   = 16};
  switch (head_dim) {
    case 32:  // more stages are not needed
      if (is_99) { tile.stages = 5; }
      break;
    case 64:
      tile.stages = is_99 ? 3 : is_163 ? 4 : 6;
      break;
    case 96:
      tile.warps_n = is_99 ? 4 : 8, tile.stages = is_99 || is_163 ? 3 : 4;
      break;
    case 128:
      tile.warps_n = is_99 ? 4 : 8, tile.stages = is_99 || is_163 ? 2 : 3;
      break;
    case 192:  // eight warps would have room for two stages
      tile.warps_n = is_99 ? 2 : 4, tile.stages = is_99 || is_163 ? 3 : 4, tile.at_once = 4;
      break;
    default:  // as 192; Q takes 64 registers of a thread
      tile.warps_n = is_99 ? 2 : 4, tile.stages = is_99 || is_163 ? 2 : 3;
      tile.at_once   = tile.stages == 2 ? 2 : 4;  // with 4, two stages spilled for sm_90
      tile.q_in_regs = false;
  }
  return tile;
}

constexpr DecodeTile wide_decode_tile(int head_dim, SmemSize size) {
  bool const at_least_227 = size == SmemSize::k227;
  DecodeTile tile{.warps_m   = 4,
                  .warps_n   = 1,
                  .tile_n    = 64,
                  .stages    = 3,
                  .ctas      = 2,
                  .q_in_regs = true,
                  .at_once   = 4};
  switch (head_dim) {
    case 32:
    case 64:
      break;
    case 96:
    case 128:  // a third stage is a thread block less
      tile.stages = 2;
      break;
    case 192:  // Q and 64 keys have no registers beside O
      tile.tile_n = 32, tile.stages = 2, tile.ctas = at_least_227 ? 2 : 1, tile.q_in_regs = false;
      break;
    default:  // 32 keys: 116 bytes of spills
      tile.tile_n = 16, tile.ctas = at_least_227 ? 2 : 1, tile.q_in_regs = false;
  }
  // Of a multiprocessor's 100 KB.
  if (size == SmemSize::k99 && head_dim > 32) { tile.ctas = 1; }
  return tile;
}

constexpr DecodeTile decode_tile(int head_dim, bool narrow, SmemSize size) {
  return narrow ? narrow_decode_tile(head_dim, size) : wide_decode_tile(head_dim, size);
}

// --- Sizes that share a tile ---------------------------------------------------------------------

// tile_of(size) for one head dimension and kind of kernel, as arguments of largest_with_tile_of and smallest_with_tile_of.
constexpr auto fwd_tiles(int head_dim, bool general) {
  return [=](SmemSize size) { return fwd_tile(head_dim, size, general); };
}
constexpr auto bwd_tiles(int head_dim, bool general) {
  return [=](SmemSize size) { return bwd_tile(head_dim, size, general); };
}
constexpr auto decode_tiles(int head_dim, bool narrow) {
  return [=](SmemSize size) { return decode_tile(head_dim, narrow, size); };
}

}  // namespace flash::sm80
