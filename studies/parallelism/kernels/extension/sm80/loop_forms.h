#pragma once
// How the loops of the sm80 kernels are written: every choice by head dimension, mask and level beside the tiles (tile_config.h).
// Used by: the main loops of forward and backward.
// Measurements: docs/tuning.md.  "Spills" are ptxas' reports for sm_90a, and for sm_80 where that is said.
#include "sm80/tile_config.h"

namespace flash::sm80 {

// Whether the code is for sm_90 or newer: that of 10.x, 11.0 and 12.x too.  For sm_80, 86 and 89 the compiler needs a few registers
// more, and the backward keeps fewer values.  A GPU of compute capability 9.0 never runs that code, whatever its shared memory is
// limited to: it takes no SASS of 8.x.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr bool kIsSm90OrNewer = false;
#else
constexpr bool kIsSm90OrNewer = true;
#endif

// --- Forward -------------------------------------------------------------------------------------

// How a forward kernel's loop is written.
struct FwdForm {
  int early;  // as FwdTile::early, of this kernel
  int ahead;  // k-steps whose random numbers are drawn beside the block's Q K^T
  bool
      half_steps;  // blocks that only half of the rows see are steps for that half (visibility.cuh)
  bool skips;      // masked steps leave out the products of a half that sees nothing
  bool by_edge;    // masks hide one edge of the rows' keys at a time
  bool parks;      // the moving pointers lie in shared memory during masked products
  bool upward;     // K and V are copied from the last row of a block to the first
  bool keeps_first;    // the first block's number stays in a register
  bool first_in_loop;  // the first block's softmax is done by the loop's instructions
  bool late_o;         // O gets its registers after the first product
  bool votes;          // a condition that is the same for all lanes is voted on
  bool one_body;       // steps with and without mask share their instructions
  bool asks_empty;     // the epilogue asks whether a row has seen nothing
  int plain_part,
      masked_part;  // of Q K^T, which the barrier waits for; kAnyPart: the compiler's choice

  static constexpr int kAnyPart = -1;
};

constexpr FwdForm fwd_form(FwdTile const& tile, int head_dim, MaskKind mask, Level level) {
  bool const plain = level == Level::kPlain, windows = mask == MaskKind::kLocal;
  bool const plain_window = plain && windows;
  FwdForm form{
      .early = tile.early,
      .ahead = 0,
      // Causal 1 to 5 % faster; from head dimension 96 on they spill.
      .half_steps = plain && mask != MaskKind::kNone && head_dim <= 64,
      // 7 % faster; 96 lost 5 %, 64 (in place of half steps) 8 %, other levels 7 to 66 %.
      .skips = plain_window && head_dim == 128,
      // Blocks that cross a window's edge seldom cross both: 2 % faster at 128.  For sm_80 256 spills.
      .by_edge = plain_window && (kIsSm90OrNewer || head_dim != 256),
      // Without it the loop of the steps that skip spills 8 bytes; with it, 6 % faster.
      .parks = plain_window && head_dim == 128,
      // 2 % faster at 64; the others spill, for sm_80 also 256.
      .upward = plain && !(windows && head_dim == 128) && (kIsSm90OrNewer || head_dim != 256),
      // From 128 on there is no register for it.
      .keeps_first = head_dim <= 96,
      // 96 and 128 need fewer registers with it, 256 more, as does ALiBi at 128 for sm_80.
      .first_in_loop =
          head_dim == 96 || (head_dim == 128 && (kIsSm90OrNewer || level != Level::kAlibi)),
      // 256 needs fewer registers when the compiler decides.
      .late_o = head_dim != 256 || !windows || changes_scores(level),
      // A vote tells the compiler that lanes agree.  The others spill with it.
      .votes = head_dim <= 128 && !changes_scores(level),
      // Each feature's instructions stand in the loop once instead of twice.
      .one_body = level == Level::kAll,
      // A softcap kernel spilled.
      .asks_empty  = level != Level::kSoftcap,
      .plain_part  = FwdForm::kAnyPart,
      .masked_part = FwdForm::kAnyPart,
  };
  // For sm_80 it spilled.
  if (!kIsSm90OrNewer && head_dim == 128 && level == Level::kAll) { form.early = tile.early - 1; }
  // tanh and exponentials use the same unit: fewer of them before the product.
  if (head_dim == 64 && level == Level::kSoftcap) { form.early = 1; }
  if (level == Level::kDropout) {
    // The last k-step's weights are dropped beside the product: 1.23 to 1.09 ms at 64, 850 to 845 us at 128.
    if (head_dim == 64 || head_dim == 128) { form.early = tile.early - 1; }
    // 5 % faster at 32 and 64, 1 % at 128.  It takes 16 to 20 registers: 192 and 256 spilled 4 and 12 bytes.
    if (head_dim <= 128) { form.ahead = tile.block_n / 16; }
  }
  // The compiler put 70 to 128 of a step's 128 tensor core instructions before the barrier, another number with each change of the
  // code, which made windows up to 8 % slower.  These parts leave about 106 before it in plain steps, and 124 in masked ones.
  if (plain_window && head_dim == 64) { form.plain_part = 5, form.masked_part = 11; }
  return form;
}

// --- Backward ------------------------------------------------------------------------------------

// How a backward kernel's loop is written.
struct BwdForm {
  bool by_edge;        // masks hide one edge of the rows' keys at a time; LSE is read before them
  bool keeps_tile;     // what the loop asks of its tile stays in registers
  bool asks_range;     // whether a query block needs the mask is asked, also where none does
  bool loops_on_mask;  // the mask is a loop of at most one round
};

constexpr BwdForm bwd_form(int head_dim, MaskKind mask, Level level) {
  bool const plain = level == Level::kPlain;
  return {
      // 3 % faster; 64 spilled, others were not tried.
      .by_edge = plain && mask == MaskKind::kLocal && head_dim == 128,
      // The others spilled.
      .keeps_tile = !bwd_is_general(head_dim, level) && head_dim <= 128,
      // The kernel for 256 spills without the test.
      .asks_range = mask != MaskKind::kNone || head_dim == 256,
      // A branch would become predicated instructions, issued in every step.
      .loops_on_mask = level == Level::kAll,
  };
}

}  // namespace flash::sm80
