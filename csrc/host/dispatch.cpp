// From a problem to its kernel: device, head dimension and dtype to an entry of the registry, or a message that says what is built.
#include <algorithm>
#include <cstdio>
#include <string>

#include "flash.h"
#include "host/registry.h"
#include "kernels/sm80/tile_config.h"
#include "pieces/device_info.h"
#include "pieces/level.h"
#include "pieces/sequence.cuh"
#include "pieces/split.cuh"

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

// A guess must not lead to memory that is not the cache's: what it comes from are lengths alone, and these end at the capacity.
bool can_look_ahead(Problem const& problem, KvCache const& cache) {
  constexpr bool kLooksAhead = true;
  return kLooksAhead && problem.batch == 1 && !problem.cu_seqlens_q && !problem.cu_seqlens_k &&
         !cache.block_table && !cache.entries && cache.seqlen_new == 0;
}

}  // namespace

Status launch_fwd(FwdParams const& params, cudaStream_t stream) {
  return launch(kFwdEntries, params, stream);
}
Status launch_bwd(BwdParams const& params, cudaStream_t stream) {
  return launch(kBwdEntries, params, stream);
}

Status launch_decode(DecodeParams const& params, cudaStream_t stream) {
  return launch(kDecodeEntries, params, stream);
}

BwdPlan plan_bwd(Problem const& problem) {
  bool const small_smem    = kSmallTiles && has_small_smem();  // as in sm80/bwd/launch.cuh
  int const head_dim       = built_head_dim(problem.head_dim);
  sm80::BwdTile const tile = sm80::bwd_is_general(head_dim, level_of(problem))
                                 ? sm80::general_bwd_tile(head_dim, small_smem)
                                 : sm80::bwd_tile(head_dim, small_smem);
  int64_t const blocks = query_block_count(problem, tile.block_m), rows = blocks * tile.block_m;
  return {rows * head_dim, 2 * rows, blocks};
}

DecodePlan plan_decode(Problem const& problem, KvCache const& cache, int num_splits) {
  int const group = problem.heads_q / problem.heads_kv, rows = problem.seqlen_q * group;
  bool const narrow = rows <= sm80::kNarrowRows;
  sm80::DecodeTile const tile =
      sm80::decode_tile(built_head_dim(problem.head_dim), narrow, kSmallTiles && has_small_smem());
  // At least one query tile: its thread block clears rows of q that belong to no sequence.
  int64_t const items =
      int64_t(problem.batch) * problem.heads_kv * ceil_div(max_of(rows, 1), tile.block_m());
  int const blocks = sm_count() * tile.ctas;  // that run at once
  // Many query tiles keep every multiprocessor busy as they are, and those of a head that run together share its keys in L2.
  constexpr int kManyItems = 4;
  int splits               = num_splits;
  // Of one head, at most; numbers of tiles are ints.
  int64_t const most_tiles =
      items / problem.heads_kv * (ceil_div(cache.capacity, tile.block_n()) + 1);
  if (most_tiles > INT32_MAX) { splits = max_of(1, splits); }
  if (splits == 0 && !narrow && items >= kManyItems * int64_t(blocks)) { splits = 1; }

  DecodePlan plan{};
  plan.group = group, plan.block_m = tile.block_m(), plan.splits = splits;
  int64_t slots = 0;
  if (splits > 0) {
    plan.grid = items * splits, plan.workers = 1;
    slots = splits > 1 ? items * splits : 0;
  } else {
    plan.grid    = problem.heads_kv;
    plan.workers = int(
        std::min<int64_t>(min_of(kMostParts, max_of(1, blocks / problem.heads_kv)), most_tiles));
    // Not as a choice of each thread block, for equal lengths: those without work take a microsecond from the others.
    if (narrow && problem.batch > 1 && keeps_whole(problem.batch, plan.workers)) {
      plan.workers = problem.batch;
    }
    if (narrow && problem.batch == 1 && has_clusters()) {
      plan.cluster_bits  = cluster_bits_for(plan.workers);
      int const clusters = min_of(plan.workers >> plan.cluster_bits, kMergedParts);
      if (plan.cluster_bits > 0) { plan.workers = clusters << plan.cluster_bits; }
    }
    slots            = 2 * plan.grid * plan.workers;
    plan.looks_ahead = narrow && can_look_ahead(problem, cache);
  }
  plan.partial_o    = slots * tile.block_m() * built_head_dim(problem.head_dim);
  plan.partial_rows = 2 * slots * tile.block_m();
  plan.counters     = kMergeLevels * slots;
  return plan;
}

BuildInfo build_info() {
  static std::string const head_dims = head_dims_of(kFwdEntries), dtypes = dtypes_of(kFwdEntries);
  static std::string const families = std::string(kFwdEntries[0].launch ? "fwd" : "") +
                                      (kBwdEntries[0].launch ? ",bwd" : "") +
                                      (kDecodeEntries[0].launch ? ",decode" : "");
  return {kBuiltArchs, head_dims.c_str(), dtypes.c_str(), families.c_str()};
}

}  // namespace flash
