#pragma once
// The isa that calls are limited to.
namespace flash {

constexpr int kAnyIsa = 0, kNoIsa = -1;

// An Isa's number, kAnyIsa, or kNoIsa if FLASH_ATTN_ISA names none.  As cheap as reading a number.
int pinned_number();

}  // namespace flash
