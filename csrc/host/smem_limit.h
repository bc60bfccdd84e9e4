#pragma once
// How much shared memory thread blocks may have: the device's limit, or less in tests.
namespace flash {

// KB per thread block on the current device, lowered to the tests' limit; 0 where the device cannot be asked.
int smem_limit_kb();

// Whether tests have lowered it: the call then stands for one on a GPU with less shared memory.
bool is_smem_lowered();

// The text of FLASH_ATTN_TEST_SMEM_KB if it is no size, otherwise null.
char const* wrong_smem_text();

}  // namespace flash
