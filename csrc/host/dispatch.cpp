// From a problem to its kernel: device, head dimension and dtype to an entry of the registry, or a message that says what is built.
#include <cstdio>
#include <string>

#include "flash.h"
#include "host/registry.h"
#include "kernels/tile_config.h"
#include "pieces/device_info.h"
#include "pieces/sequence.cuh"

namespace flash {
namespace {

char const* name_of(DType dtype) { return dtype == DType::kFp16 ? "fp16" : "bf16"; }

// Comma-separated, each value once, in the order of the table.
template <class EntryType, class Name>
std::string list_of(EntryType const* entries, Name name) {
  std::string list;
  for (EntryType const* entry = entries; entry->launch; ++entry) {
    std::string const value = name(*entry);
    if (("," + list + ",").find("," + value + ",") == std::string::npos) {
      list += (list.empty() ? "" : ",") + value;
    }
  }
  return list;
}

std::string head_dims_of(FwdEntry const* entries) {
  return list_of(entries, [](FwdEntry const& entry) { return std::to_string(entry.head_dim); });
}
std::string dtypes_of(FwdEntry const* entries) {
  return list_of(entries, [](FwdEntry const& entry) { return std::string(name_of(entry.dtype)); });
}

// Text that outlives the call: each thread keeps its last message.
template <class... Args>
Status failure(cudaError_t code, char const* format, Args... args) {
  thread_local char message[512];
  std::snprintf(message, sizeof(message), format, args...);
  return {code, message};
}

template <class Params>
Status launch(Entry<Params> const* entries, Params const& params, cudaStream_t stream) {
  Problem const& problem = params.problem;
  int const head_dim     = built_head_dim(problem.head_dim);
  for (Entry<Params> const* entry = entries; entry->launch; ++entry) {
    if (entry->head_dim != head_dim || entry->dtype != problem.dtype) { continue; }
    cudaError_t const code = entry->launch(params, stream);
    if (code == cudaSuccess) { return {cudaSuccess, nullptr}; }
    return failure(code,
                   "launch of the kernel for head_dim %d, %s failed: %s (built for architectures "
                   "%s; this GPU allows %d KB of "
                   "shared memory per thread block)",
                   head_dim, name_of(problem.dtype), cudaGetErrorString(code), kBuiltArchs,
                   smem_limit_bytes() / 1024);
  }
  return failure(cudaErrorInvalidValue,
                 "head_dim %d with %s needs the kernel for head_dim %d, which is not in this build "
                 "(built: head_dim %s; dtype %s). "
                 "Rebuild with FLASH_ATTN_HEAD_DIMS and FLASH_ATTN_DTYPES unset, or set so that "
                 "they hold %d and %s",
                 problem.head_dim, name_of(problem.dtype), head_dim,
                 head_dims_of(kFwdEntries).c_str(), dtypes_of(kFwdEntries).c_str(), head_dim,
                 name_of(problem.dtype));
}

}  // namespace

Status launch_fwd(FwdParams const& params, cudaStream_t stream) {
  return launch(kFwdEntries, params, stream);
}
Status launch_bwd(BwdParams const& params, cudaStream_t stream) {
  return launch(kBwdEntries, params, stream);
}

BwdPlan plan_bwd(Problem const& problem) {
  bool const small_smem = kSmallTiles && has_small_smem();  // as in sm80/bwd_launch.cuh
  int const head_dim    = built_head_dim(problem.head_dim);
  BwdTile const tile =
      is_general(problem) ? general_bwd_tile(head_dim, small_smem) : bwd_tile(head_dim, small_smem);
  int64_t const blocks = query_block_count(problem, tile.block_m), rows = blocks * tile.block_m;
  return {rows * head_dim, 2 * rows, blocks};
}

BuildInfo build_info() {
  static std::string const head_dims = head_dims_of(kFwdEntries), dtypes = dtypes_of(kFwdEntries);
  static std::string const families =
      std::string(kFwdEntries[0].launch ? "fwd" : "") + (kBwdEntries[0].launch ? ",bwd" : "");
  return {kBuiltArchs, head_dims.c_str(), dtypes.c_str(), families.c_str()};
}

}  // namespace flash
