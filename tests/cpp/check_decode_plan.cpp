// Check of sm80/decode/plan.h: scratch, counters and thread blocks of decoding calls of many sizes.
#include <initializer_list>

#include "check.h"
#include "head_dims.h"
#include "sm80/decode/plan.h"

using namespace flash;
using namespace flash::sm80;
using check::expect;

#define CASE "batch %d, rows %d, heads %d, capacity %d, splits %d, %d SMs"
#define ARGS                                                                          \
  params.problem.batch, params.problem.seqlen_q *plan.group, params.problem.heads_kv, \
      params.cache.capacity, params.num_splits, device.sms

DecodeParams call(int batch, int seqlen_q, int group, int heads_kv, int capacity, int splits) {
  DecodeParams params{};
  params.problem.batch = batch, params.problem.seqlen_q = seqlen_q;
  params.problem.heads_kv = heads_kv, params.problem.heads_q = heads_kv * group;
  params.cache.capacity = capacity, params.num_splits = splits;
  return params;
}

void check_plan(DecodeParams const& params, int head_dim, DecodeDevice const& device) {
  DecodePlan const plan = plan_decode(params, head_dim, device);
  int const rows        = params.problem.seqlen_q * plan.group;
  bool const narrow     = rows <= kNarrowRows;
  expect(plan.block_m == kNarrowRows || !narrow, CASE ": block_m %d", ARGS, plan.block_m);
  int64_t const items =
      int64_t(params.problem.batch) * params.problem.heads_kv * ceil_div(rows, plan.block_m);
  // Equal parts: a thread block each, and a partial result each unless there is one part.  Shares: two partial results for each worker and head.
  bool const parts = plan.splits > 0;
  expect(plan.grid == (parts ? items * plan.splits : params.problem.heads_kv), CASE ": grid %lld",
         ARGS, (long long)plan.grid);
  expect(plan.workers >= 1 && plan.workers <= kMostParts, CASE ": %d workers", ARGS, plan.workers);
  int64_t const partials =
      parts ? (plan.splits > 1 ? items * plan.splits : 0) : 2 * plan.grid * plan.workers;
  expect(plan.partial_o == partials * plan.block_m * head_dim &&
             plan.partial_rows == 2 * partials * plan.block_m &&
             plan.counters == kMergeRounds * partials,
         CASE ": scratch is not that of %lld partial results", ARGS, (long long)partials);
  expect(plan.workers % (1 << plan.cluster_bits) == 0, CASE ": %d workers in clusters of 2^%d",
         ARGS, plan.workers, plan.cluster_bits);
  bool const may_cluster = !parts && device.clusters && narrow && params.problem.batch == 1;
  expect(plan.cluster_bits == 0 || may_cluster, CASE ": clusters", ARGS);
  expect(!plan.looks_ahead || (!parts && narrow && params.problem.batch == 1), CASE ": looks ahead",
         ARGS);
  if (params.num_splits > 0) {
    expect(plan.splits == params.num_splits, CASE ": %d parts", ARGS, plan.splits);
  }

  // The parts of the workspace lie one after the other and end where it ends.
  static char memory[1];
  static int kept[1];
  DecodeKernelParams const all = kernel_params(params, plan, {memory, kept});
  if (plan.counters == 0) {
    expect(workspace_bytes(plan) == 0 && !all.workspace.counters, CASE ": scratch of one part",
           ARGS);
    return;
  }
  auto const at = [&](void const* part) { return static_cast<char const*>(part) - memory; };
  expect(at(all.workspace.partial_o) == 0 && at(all.workspace.partial_rows) == 4 * plan.partial_o,
         CASE ": places in the workspace", ARGS);
  int64_t const end = 4 * (plan.partial_o + plan.partial_rows);
  if (parts) {
    expect(at(all.workspace.counters) == end && workspace_bytes(plan) == end + 4 * plan.counters,
           CASE ": counters in the workspace", ARGS);
  } else {
    expect(all.workspace.counters == kept && workspace_bytes(plan) == end,
           CASE ": counters that a stream keeps", ARGS);
  }
}

// Work is guessed only from lengths that are the call's own, and rows that no other kernel adds.
void check_look_ahead() {
  int numbers[1];
  auto const looks = [](DecodeParams const& params) {
    return plan_decode(params, kHeadDims[0], {132, SmemSize::k227, true}).looks_ahead;
  };
  DecodeParams const plain = call(1, 1, 4, 2, 4096, 0);
  expect(looks(plain), "a single sequence does not look ahead");
  DecodeParams paged = plain, entries = plain, ragged = plain, appended = plain, two = plain;
  paged.cache.block_table = numbers, entries.cache.entries = numbers;
  ragged.problem.cu_seqlens_q = numbers, appended.cache.seqlen_new = 1, two.problem.batch = 2;
  for (DecodeParams const* params : {&paged, &entries, &ragged, &appended, &two}) {
    expect(!looks(*params), "looks ahead where a guess may be of other memory");
  }
}

int main() {
  for (int head_dim : kHeadDims)
    for (int sms : {1, 46, 132})
      for (SmemSize size : kSmemSizes)
        for (int batch : {1, 2, 65, 500})
          for (int seqlen_q : {1, 3, 17, 300})
            for (int group : {1, 8})
              for (int heads_kv : {1, 5, 64})
                for (int capacity : {1, 1000, 1 << 22})
                  for (int splits : {0, 1, 2, 128})
                    check_plan(call(batch, seqlen_q, group, heads_kv, capacity, splits), head_dim,
                               {sms, size, size == SmemSize::k227});
  check_look_ahead();
  // More key tiles than an int numbers: equal parts, although none were asked for.
  DecodePlan const vast =
      plan_decode(call(1000, 1, 1, 1, kUnlimited - 1, 0), kMaxHeadDim, {132, SmemSize::k227, true});
  expect(vast.splits == 1, "a vast cache: %d parts", vast.splits);
  return check::finish();
}
