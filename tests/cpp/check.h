#pragma once
// Counts what a check expects, prints the first few failures, and makes the exit status.
#include <cstdarg>
#include <cstdio>

namespace check {

constexpr long kPrinted = 5;
inline long done = 0, wrong = 0;

__attribute__((format(printf, 2, 3))) inline void expect(bool ok, char const* format, ...) {
  ++done;
  if (ok || ++wrong > kPrinted) return;
  va_list arguments;
  va_start(arguments, format);
  std::fputs("wrong: ", stdout);
  std::vprintf(format, arguments);
  std::fputc('\n', stdout);
  va_end(arguments);
}

// Fails when nothing was checked, too.
inline int finish() {
  std::printf("%ld checks, %ld wrong\n", done, wrong);
  return wrong != 0 || done == 0;
}

}  // namespace check
