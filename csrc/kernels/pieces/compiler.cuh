#pragma once
// What talks the compiler into something: no function here computes anything that plain C++ would not.
// Used by: the main loops and what they call.  Each says what it prevents, and what that is worth ("Price"): figures from
// docs/tuning.md, or the words "no figure" and where it was noticed.  Without a price, try first whether it may go.
// Spills are what ptxas reports for sm_90a.
#include <cute/tensor.hpp>

namespace flash {
using namespace cute;

// --- Values ---------------------------------------------------------------------------------------

// The same value, of which the compiler knows nothing.
// Prevents: what follows from the value is computed once before a loop and kept in registers all through it.
// Price: no figure.  Addresses that depend on the thread were kept and spilled, in all three main loops.
CUTE_DEVICE int opaque(int value) {
  asm volatile("" : "+r"(value));
  return value;
}

// A thread's index, known not to be negative.
// Prevents: four instructions instead of one for each division by a power of two.
// Price: 37 of 583 instructions of a forward step; causal, d 64, 4 x 4096, 771 to 748 us (H100).  The backward has it not: 6 % of the
// instructions of a step at d 128, but its windows slower and four kernels with spills.
CUTE_DEVICE int as_index(int value) {
#ifdef __CUDACC__
  __builtin_assume(value >= 0 && value < 1024);
#endif
  return value;
}
CUTE_DEVICE int opaque_index(int value) { return as_index(opaque(value)); }

// This thread's index, read from its register where this stands.
// Prevents: the index is kept in a register from the kernel's beginning on.
// Price: no figure.  Came with park, whose addresses follow from it.
CUTE_DEVICE int thread_now() {
  int thread;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
  return as_index(thread);
}

// A lane's index as the shuffle returns it: `lane` itself.  Unlike opaque's result, the compiler cannot move it out of a loop.
// Prevents: coordinates of a mask are computed before the loop that is the mask, in every step, and spilled.
// Price: no figure.  Noticed in the forward's masks, which are loops.
CUTE_DEVICE int fixed_in_loop(int lane) { return as_index(__shfl_sync(~0u, lane, lane % 32)); }

// pointer += bytes, by an instruction that stands here.
// Prevents: a loop over rows, unrolled, keeps the offsets of all of them in registers.
// Price: copies of K and V row by row upwards, causal, d 64, 4 x 4096, 748 to 736 us; d 96 725 to 696, d 128 726 to 705, as_index
// included (H100).
template <class T>
CUTE_DEVICE void advance_now(T const*& pointer, int64_t bytes) {
  asm("add.s64 %0, %0, %1;" : "+l"(pointer) : "l"(bytes));
}

// Zeros; kNow: which have no registers before this.
// Prevents: an accumulator takes its registers long before its first product.
// Price: no figure by itself.  In the backward, part of 1242 to 1227 us (window, d 64, H100); in the forward, spills (FwdForm::late_o).
template <bool kNow, class TensorR>
CUTE_DEVICE void clear_now(TensorR& tensor) {
  CUTE_UNROLL
  for (int i = 0; i < size(tensor); ++i) {
    if constexpr (kNow) {
      asm volatile("mov.b32 %0, 0;" : "=f"(tensor(i)));
    } else {
      tensor(i) = 0.f;
    }
  }
}

// --- Shared memory instead of registers -----------------------------------------------------------

// A field in shared memory, read where this stands.
// Prevents: it is read once, early, and kept in a register, which was the reason to put it into shared memory.
// Price: no figure.  Without it, the kernels for windows and for features spill (SavedTile).
CUTE_DEVICE int read_now(int const& field) {
  int value;
  asm volatile("ld.shared.b32 %0, [%1];" : "=r"(value) : "r"(cast_smem_ptr_to_uint(&field)));
  return value;
}
CUTE_DEVICE uint32_t read_now(uint32_t const& field) {
  return uint32_t(read_now(reinterpret_cast<int const&>(field)));
}
CUTE_DEVICE float read_now(float const& field) {
  return __int_as_float(read_now(reinterpret_cast<int const&>(field)));
}

// A pointer that lies in shared memory for a while.
// Prevents: the compiler spills it, to local memory and in every step.
// Price: 8 bytes of spills, without which a window's blocks between the edges have a loop of their own: d 128, 425 to 398 us (H100).
template <class T>
CUTE_DEVICE void park(T* pointer, uint64_t& place) {
  asm volatile("st.shared.b64 [%0], %1;" ::"r"(cast_smem_ptr_to_uint(&place)), "l"(pointer));
}
template <class T>
CUTE_DEVICE void fetch(T*& pointer, uint64_t const& place) {
  asm volatile("ld.shared.b64 %0, [%1];" : "=l"(pointer) : "r"(cast_smem_ptr_to_uint(&place)));
}

// --- Branches and barriers ------------------------------------------------------------------------

// Rounds of a loop that stands for a branch, known to the compiler or only when the program runs.
// Prevents: a short branch becomes predicated instructions, which are issued in every step, needed or not.
// Price: no figure for masks.  For the rescaling of O, a branch instead of predicates is 10 % at d 64, 25 % at d 256 (H200).
CUTE_DEVICE constexpr int run_time_flag(true_type) { return 1; }
CUTE_DEVICE constexpr int run_time_flag(false_type) { return 0; }
CUTE_DEVICE int run_time_flag(bool flag) { return opaque(int(flag)); }

// A condition that is the same for all lanes; kVotes: voted on, so that the compiler knows it.
// Prevents: code for lanes that disagree.
// Price: no figure.  Came with half steps; some kernels spill with it (FwdForm::votes).
template <bool kVotes>
CUTE_DEVICE bool same_for_lanes(bool condition) {
  return kVotes ? bool(__any_sync(~0u, condition)) : condition;
}

// Accesses to memory before and after this stay on their side.
// Prevents: they are moved over a barrier that is written as an instruction without memory's clobber, as CUTLASS' mbarriers are.
// Price: none; the sm90 forward has the same instructions without it.
CUTE_DEVICE void keep_order() { asm volatile("" ::: "memory"); }

// __syncthreads() that waits for a score's bits: the barrier's number depends on them.  zero: 0, which the compiler must not know.
// Prevents: the compiler moves tensor core instructions across the barrier, others with each change of the code.
// Price: windows, d 64: 72 of a step's 128 before the barrier 468 us, 101 427; placed by this, 416 to 411, in masked steps too 410 (H100).
CUTE_DEVICE void barrier_after(int score, int zero) {
  asm volatile("bar.sync %0;" ::"r"(score & zero) : "memory");
}

// Reads a kernel's parameters, one word of each line of the constant cache.
// Prevents: nothing reads them before the kernel waits for the one before it, and then each line is waited for.
// Price: no figure.  Came with decoding, whose kernels begin while the one before ends.
template <class Params>
CUTE_DEVICE void touch(Params const& params) {
  constexpr int kLineInts = 16;
  int sum                 = 0;
  CUTE_UNROLL
  for (int i = 0; i < int(sizeof(Params) / sizeof(int)); i += kLineInts) {
    sum += reinterpret_cast<int const*>(&params)[i];
  }
  // An instruction that the assembler cannot leave out, unlike the sum alone.
  asm volatile("{ .reg .pred p; setp.eq.s32 p, %0, -1; @p nanosleep.u32 0; }" ::"r"(sum));
}

}  // namespace flash
