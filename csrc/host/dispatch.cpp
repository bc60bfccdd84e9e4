// From a call to its kernel: the first entry of the registry that serves it plans and launches, or a message says what is built.
#include <cstdlib>
#include <cstring>
#include <string>

#include "flash.h"
#include "host/choose.h"
#include "host/counters.h"
#include "host/failure.h"
#include "host/names.h"
#include "host/pinned.h"
#include "host/registry.h"
#include "host/smem_limit.h"
#include "kernels/head_dims.h"
#include "pieces/device_info.h"

namespace flash {
namespace {

// Comma-separated, each value once, in the order of the table.
template <class EntryType, class Name>
std::string list_of(EntryType const* const* entries, Name name) {
  std::string list;
  for (; *entries; ++entries) {
    std::string const value = name(**entries);
    if (("," + list + ",").find("," + value + ",") == std::string::npos) {
      list += (list.empty() ? "" : ",") + value;
    }
  }
  return list;
}

template <class Params>
Entry<Params> const* choose(Entry<Params> const* const* entries, Params const& params,
                            int capability) {
  if (wrong_smem_text()) { return nullptr; }
  return choose(entries, params, built_head_dim(params.problem.head_dim),
                {pinned_number(), capability});
}

// What kernels for v of another head dimension serve: "from 129 to 192 with v's up to 128".
std::string value_head_dims() {
  std::string list;
  for (HeadDimPair const& pair : kValueHeadDims) {
    int least = 1;
    for (int built : kHeadDims) { least = built < pair.qk ? built + 1 : least; }
    list += (list.empty() ? "from " : ", from ") + std::to_string(least) + " to " +
            std::to_string(pair.qk) + " with v's up to " + std::to_string(pair.v);
  }
  return list;
}

// "192", or "192/128" where v has its own.
template <class Params>
std::string head_dims_of(Entry<Params> const& entry) {
  std::string const of_v = "/" + std::to_string(entry.head_dim_v);
  return std::to_string(entry.head_dim) + (entry.head_dim_v == entry.head_dim ? "" : of_v);
}

// Why no entry serves v with a head dimension of its own.
template <class Params>
Status nothing_serves_v(Entry<Params> const* const* entries, Problem const& problem) {
  return failure(
      cudaErrorInvalidValue,
      "no kernel for head_dim %d of q and k with head_dim %d of v, %s, serves this call on this "
      "GPU: where they differ there are sm90's kernels alone, for the forward pass on GPUs of "
      "compute capability 9.0, q's head_dim %s (built: %s; head_dim %s; dtype %s; allowed by "
      "FLASH_ATTN_ISA: %s%s)",
      problem.head_dim, problem.head_dim_v, name_of(problem.dtype), value_head_dims().c_str(),
      list_of(entries, [](auto const& entry) { return name_of(entry.isa); }).c_str(),
      list_of(entries, [](auto const& entry) { return head_dims_of(entry); }).c_str(),
      list_of(entries, [](auto const& entry) { return name_of(entry.dtype); }).c_str(),
      *pinned_isa() ? pinned_isa() : "all",
      is_smem_lowered() ? "; FLASH_ATTN_TEST_SMEM_KB keeps calls to sm80" : "");
}

// Why no entry serves.
template <class Params>
Status nothing_serves(Entry<Params> const* const* entries, Params const& params) {
  Problem const& problem = params.problem;
  int const head_dim     = built_head_dim(problem.head_dim);
  if (pinned_number() == kNoIsa) {
    return failure(cudaErrorInvalidValue, "FLASH_ATTN_ISA=%.64s is no isa: sm90 or sm80",
                   pinned_isa());
  }
  if (char const* const text = wrong_smem_text()) {
    return failure(cudaErrorInvalidValue,
                   "FLASH_ATTN_TEST_SMEM_KB=%.64s is no size of shared memory: 99, 163 or 227",
                   text);
  }
  if (!has_one_head_dim(problem)) { return nothing_serves_v(entries, problem); }
  bool is_built = false;
  for (auto entry = entries; *entry; ++entry) {
    is_built |= is_for(**entry, head_dim, problem.dtype);
  }
  if (is_built) {
    return failure(cudaErrorInvalidValue,
                   "no kernel for head_dim %d with %s serves this call on this GPU (built for: %s; "
                   "allowed by FLASH_ATTN_ISA: %s)",
                   head_dim, name_of(problem.dtype),
                   list_of(entries, [](auto const& entry) { return name_of(entry.isa); }).c_str(),
                   *pinned_isa() ? pinned_isa() : "all");
  }
  return failure(
      cudaErrorInvalidValue,
      "head_dim %d with %s needs the kernel for head_dim %d, which is not in this build "
      "(built: head_dim %s; dtype %s). "
      "Rebuild with FLASH_ATTN_HEAD_DIMS and FLASH_ATTN_DTYPES unset, or set so that "
      "they hold %d and %s",
      problem.head_dim, name_of(problem.dtype), head_dim,
      list_of(entries, [](auto const& entry) { return std::to_string(entry.head_dim); }).c_str(),
      list_of(entries, [](auto const& entry) { return name_of(entry.dtype); }).c_str(), head_dim,
      name_of(problem.dtype));
}

template <class Params>
Plan make_plan(Entry<Params> const* const* entries, Params const& params) {
  Plan plan{};
  plan.smem_kb = smem_limit_kb(), plan.capability = planned_capability();
  auto const* const entry = choose(entries, params, plan.capability);
  plan.entry              = entry;
  if (entry) { entry->plan(params, plan); }
  return plan;
}

// Whether code for one of the built architectures runs on a GPU: that of its major version, and of a minor one that is not newer.
bool is_built_for(int capability) {
  for (char const* arch = kBuiltArchs; arch; arch = std::strchr(arch, ',')) {
    arch += *arch == ',';
    int const built = std::atoi(arch);
    if (built / 10 == capability / 10 && built <= capability) { return true; }
  }
  return false;
}

// What a rebuild must have for the launch not to fail like this; empty if none would help.
std::string remedy(cudaError_t code, Plan const& plan) {
  int const capability = compute_capability();
  if (capability == 0) { return ""; }  // nobody knows the GPU
  if (!is_built_for(capability) || code == cudaErrorNoKernelImageForDevice) {
    return ": rebuild with a FLASH_ATTN_CUDA_ARCHS that has " + std::to_string(capability);
  }
  char const* const smallest = std::strrchr(kBuiltSmemKb, ',');  // the last: sizes fall
  if (plan.smem_kb >= std::atoi(smallest ? smallest + 1 : kBuiltSmemKb)) { return ""; }
  for (SmemSize size : kSmemSizes) {
    if (int(size) <= plan.smem_kb) {
      return ": rebuild with a FLASH_ATTN_SMEM_KB that has " + std::to_string(int(size));
    }
  }
  return "";
}

template <class EntryType>
Status launch_failure(EntryType const& entry, Plan const& plan, cudaError_t code) {
  return failure(code,
                 "launch of the %s kernel for head_dim %d, %s failed: %s (built for architectures "
                 "%s, with tiles for %s KB of shared memory per thread block; %s allows %d KB%s)",
                 name_of(entry.isa), entry.head_dim, name_of(entry.dtype), cudaGetErrorString(code),
                 kBuiltArchs, kBuiltSmemKb,
                 is_smem_lowered() ? "FLASH_ATTN_TEST_SMEM_KB" : "this GPU", plan.smem_kb,
                 remedy(code, plan).c_str());
}

// The error that a launch would be by its plan.
template <class Params>
Status check(Entry<Params> const* const* entries, Params const& params, Plan const& plan) {
  auto const* const entry = static_cast<Entry<Params> const*>(plan.entry);
  if (!entry) { return nothing_serves(entries, params); }
  if (plan.refused != cudaSuccess) { return launch_failure(*entry, plan, plan.refused); }
  return {cudaSuccess, nullptr};
}

template <class Params>
Status launch(Entry<Params> const* const* entries, Params const& params, Plan const& plan,
              void* workspace, cudaStream_t stream) {
  Status const planned = check(entries, params, plan);
  if (planned.code != cudaSuccess) { return planned; }
  auto const* const entry = static_cast<Entry<Params> const*>(plan.entry);
  Scratch scratch{workspace, nullptr};
  if (plan.counters > 0) {
    scratch.counters = zeroed_counters(plan.counters, stream);
    if (!scratch.counters) {
      return {cudaErrorMemoryAllocation, "out of CUDA memory for counters"};
    }
  }
  cudaError_t const code = entry->launch(params, plan, scratch, stream);
  return code == cudaSuccess ? Status{cudaSuccess, nullptr} : launch_failure(*entry, plan, code);
}

}  // namespace

// A GPU with less shared memory than sm_90's has none of the newer isas, and nothing else that came with sm_90.
int planned_capability() { return is_smem_lowered() ? int(Isa::kSm80) : compute_capability(); }

Plan plan_fwd(FwdParams const& params) { return make_plan(kFwdEntries, params); }
Status check_plan(FwdParams const& params, Plan const& plan) {
  return check(kFwdEntries, params, plan);
}
Status launch_fwd(FwdParams const& params, Plan const& plan, cudaStream_t stream) {
  return launch(kFwdEntries, params, plan, nullptr, stream);
}
Status launch_fwd(FwdParams const& params, cudaStream_t stream) {
  return launch_fwd(params, plan_fwd(params), stream);
}

Plan plan_bwd(BwdParams const& params) { return make_plan(kBwdEntries, params); }
Status launch_bwd(BwdParams const& params, Plan const& plan, void* workspace, cudaStream_t stream) {
  return launch(kBwdEntries, params, plan, workspace, stream);
}

Plan plan_decode(DecodeParams const& params) { return make_plan(kDecodeEntries, params); }
Status check_plan(DecodeParams const& params, Plan const& plan) {
  return check(kDecodeEntries, params, plan);
}
Status launch_decode(DecodeParams const& params, Plan const& plan, void* workspace,
                     cudaStream_t stream) {
  return launch(kDecodeEntries, params, plan, workspace, stream);
}

}  // namespace flash
