// What the registry holds, for reports.
#include <vector>

#include "host/names.h"
#include "host/registry.h"

namespace flash {
namespace {

template <class EntryType>
void list(EntryType const* const* entries, char const* pass, std::vector<KernelInfo>& kernels) {
  for (; *entries; ++entries) {
    EntryType const& entry = **entries;
    kernels.push_back(
        {name_of(entry.isa), pass, entry.head_dim, entry.head_dim_v, name_of(entry.dtype)});
  }
}

std::vector<KernelInfo> list_all() {
  std::vector<KernelInfo> kernels;
  list(kFwdEntries, "fwd", kernels);
  list(kBwdEntries, "bwd", kernels);
  list(kDecodeEntries, "decode", kernels);
  return kernels;
}

}  // namespace

BuildInfo build_info() {
  static std::vector<KernelInfo> const kernels = list_all();
  return {kBuiltArchs, kBuiltSmemKb, kernels.data(), int(kernels.size())};
}

}  // namespace flash
