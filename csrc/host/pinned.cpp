// Reads FLASH_ATTN_ISA once; tests change the isa by pin_isa.
#include "host/pinned.h"

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <string>

#include "host/failure.h"
#include "host/names.h"

namespace flash {
namespace {

int number_of(char const* name) {
  if (!name || !*name) { return kAnyIsa; }
  for (Isa isa : kIsas) {
    if (std::strcmp(name, name_of(isa)) == 0) { return int(isa); }
  }
  return kNoIsa;
}

// FLASH_ATTN_ISA as it was when the first call asked for it.
char const* environment() {
  static std::string const text = [] {
    char const* const found = std::getenv("FLASH_ATTN_ISA");
    return found ? found : "";
  }();
  return text.c_str();
}

std::atomic<int>& pinned() {
  static std::atomic<int> number{number_of(environment())};
  return number;
}

}  // namespace

int pinned_number() { return pinned().load(std::memory_order_relaxed); }

Status pin_isa(char const* isa) {
  int const number = number_of(isa);
  if (number == kNoIsa) {
    return failure(cudaErrorInvalidValue, "isa must be 'sm90', 'sm80' or '' (all); got '%.64s'",
                   isa);
  }
  pinned().store(number, std::memory_order_relaxed);
  return {cudaSuccess, nullptr};
}

char const* pinned_isa() {
  int const number = pinned_number();
  return number == kAnyIsa ? "" : number == kNoIsa ? environment() : name_of(Isa(number));
}

}  // namespace flash
