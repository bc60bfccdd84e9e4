#pragma once
// The tile table of the sm90 kernels.  Read by kernels, host code and tests.  Measurements: docs/hopper.md, "Tiles".
// Designated initialisers are C++20; gcc, clang and nvcc take them in C++17.
#include "pieces/integers.cuh"

namespace flash::sm90 {

// Rows of a tile that one warpgroup owns: those of one wgmma instruction.
constexpr int kGroupRows = 64;

struct FwdTile {
  int groups;           // consumer warpgroups
  int block_n;          // keys of a block
  int stages;           // of the ring that K and V blocks share
  int q_buffers;        // 2: the next tile's Q is loaded, and this one's O stored, beside products
  bool q_in_registers;  // Q is read from shared memory once a tile, not once a block
};

// is_general: for kernels that do more than mask (pieces/level.h), which need registers for it.
constexpr FwdTile fwd_tile(int head_dim, bool is_general) {
  switch (head_dim) {
    case 64:  // Three warpgroups: their softmax and their products fill each other's gaps.  General ones spill with 128 keys.
      return {.groups         = 3,
              .block_n        = is_general ? 96 : 128,
              .stages         = 8,
              .q_buffers      = 2,
              .q_in_registers = false};
    case 96:  // As many stages as there is room for.
      return {
          .groups = 2, .block_n = 128, .stages = 7, .q_buffers = 2, .q_in_registers = !is_general};
    case 128:  // Q in registers: 1 to 2 % faster.
      return {
          .groups = 2, .block_n = 128, .stages = 5, .q_buffers = 2, .q_in_registers = !is_general};
    case 192:  // O takes 96 registers of a thread, S of 96 keys 48.  Not tuned.
      return {.groups = 2, .block_n = 96, .stages = 4, .q_buffers = 1, .q_in_registers = false};
    default:  // O takes 128 registers of a thread.
      return {.groups = 2, .block_n = 64, .stages = 5, .q_buffers = 1, .q_in_registers = false};
  }
}

// 64 K registers for 128 threads of the producer's warpgroup and of each consumer.
struct Registers {
  int producer, consumer;
};
constexpr Registers registers(int groups) {
  return groups == 3 ? Registers{.producer = 32, .consumer = 160}
                     : Registers{.producer = 40, .consumer = 232};
}

}  // namespace flash::sm90
