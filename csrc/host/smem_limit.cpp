// Reads FLASH_ATTN_TEST_SMEM_KB once; tests and benchmarks change the limit by limit_smem_kb.
#include "host/smem_limit.h"

#include <atomic>
#include <cstdlib>
#include <string>

#include "host/failure.h"
#include "pieces/device_info.h"
#include "pieces/smem_size.h"

namespace flash {
namespace {

constexpr int kNoLimit = 0, kWrong = -1;

// As it was when the first call asked for it.
std::string const& limit_text() {
  static std::string const text = [] {
    char const* const found = std::getenv("FLASH_ATTN_TEST_SMEM_KB");
    return found ? found : "";
  }();
  return text;
}

// Nothing but the size's own digits is a size.
int limit_in(std::string const& text) {
  if (text.empty()) { return kNoLimit; }
  for (SmemSize size : kSmemSizes) {
    if (text == std::to_string(int(size))) { return int(size); }
  }
  return kWrong;
}

std::atomic<int>& limit() {
  static std::atomic<int> kb{limit_in(limit_text())};
  return kb;
}

int device_kb() { return smem_limit_bytes() / 1024; }

}  // namespace

int smem_limit_kb() {
  int const kb = limit().load(std::memory_order_relaxed), device = device_kb();
  return kb > 0 ? min_of(kb, device) : device;
}

bool is_smem_lowered() { return smem_limit_kb() < device_kb(); }

char const* wrong_smem_text() {
  return limit().load(std::memory_order_relaxed) == kWrong ? limit_text().c_str() : nullptr;
}

Status limit_smem_kb(int kb) {
  if (kb != kNoLimit && !is_smem_size(kb)) {
    return failure(cudaErrorInvalidValue, "kb must be 99, 163, 227 or 0 (no limit); got %d", kb);
  }
  limit().store(kb, std::memory_order_relaxed);
  return {cudaSuccess, nullptr};
}

}  // namespace flash
