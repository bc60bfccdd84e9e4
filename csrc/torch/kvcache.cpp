// Operator flash_attn::_flash_attn_kvcache on CUDA, and the forward pass with a block table.
#include <ATen/ATen.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <c10/cuda/CUDACachingAllocator.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <limits>
#include <optional>

#include "kernels/head_dims.h"
#include "torch/checks.h"
#include "torch/convert.h"
#include "torch/operators.h"
#include "torch/overlap.h"
#include "torch/padded_cache.h"

namespace flash {
namespace {

// New rows for the cache.
struct Append {
  at::Tensor const &k, &v;
  OptionalTensor const &rotary_cos, &rotary_sin;
  bool interleaved;
};

int* data_of(OptionalTensor const& tensor) { return tensor ? tensor->data_ptr<int>() : nullptr; }

// The attention kernels read 16 bytes at a time.
bool needs_padding(at::Tensor const& q) { return q.size(-1) % 8 != 0; }

void check_cache(at::Tensor const& q, at::Tensor const& k_cache, at::Tensor const& v_cache,
                 CacheArguments const& arguments) {
  TORCH_CHECK(q.is_cuda(), "q must be on CUDA; got ", q.device());
  TORCH_CHECK(q.scalar_type() == at::kHalf || q.scalar_type() == at::kBFloat16,
              "q: FlashAttention only support fp16 and bf16 data type; got ", q.scalar_type());
  int64_t const dims = arguments.cu_seqlens_q ? 3 : 4, head_dim = q.size(-1);
  TORCH_CHECK(q.dim() == dims && k_cache.dim() == 4, "q must have ", dims,
              " dimensions and k_cache 4; got ", q.sizes(), " and ", k_cache.sizes());
  TORCH_CHECK(head_dim <= kMaxHeadDim && head_dim > 0,
              "q: FlashAttention only supports head dimension at most ", kMaxHeadDim,
              ", and at least 1; got ", head_dim);
  int64_t const heads_q = q.size(-2), heads_kv = k_cache.size(2);
  TORCH_CHECK(heads_kv > 0 && heads_q % heads_kv == 0,
              "k_cache: Number of heads in key/value must divide number of heads in query; got ",
              heads_kv, " and ", heads_q);
  std::vector<int64_t> const shape{k_cache.size(0), k_cache.size(1), heads_kv, head_dim};
  check_like(k_cache, "k_cache", q, shape);
  check_like(v_cache, "v_cache", q, shape);
  for (auto const& [cache, name] : {std::pair{&k_cache, "k_cache"}, {&v_cache, "v_cache"}}) {
    TORCH_CHECK(needs_padding(q) ? has_contiguous_rows(*cache) : is_aligned(*cache), name,
                ": must have a contiguous last dimension, and strides and an address that are "
                "multiples of 16 bytes; got strides ",
                cache->strides());
  }
}

void check_lengths(at::Tensor const& q, at::Tensor const& k_cache, int64_t batch,
                   CacheArguments const& arguments) {
  if (arguments.cu_seqlens_q) {
    check_integers(*arguments.cu_seqlens_q, "cu_seqlens_q", q, batch + 1);
  }
  if (arguments.cu_seqlens_k) {
    check_integers(*arguments.cu_seqlens_k, "cu_seqlens_k", q, batch + 1);
  }
  if (arguments.seqlens) { check_integers(*arguments.seqlens, "cache_seqlens", q, batch); }
  if (arguments.batch_idx) { check_integers(*arguments.batch_idx, "cache_batch_idx", q, batch); }
  if (arguments.leftpad) { check_integers(*arguments.leftpad, "cache_leftpad", q, batch); }
  if (!arguments.block_table) {
    TORCH_CHECK(arguments.batch_idx || k_cache.size(0) >= batch,
                "k_cache: must have an entry for each of ", batch, " sequences; got ",
                k_cache.sizes());
    return;
  }
  at::Tensor const& table = *arguments.block_table;
  check_device(table, "block_table", q);
  TORCH_CHECK(!arguments.batch_idx, "Paged KVcache does not support cache_batch_idx");
  TORCH_CHECK(table.scalar_type() == at::kInt && table.dim() == 2 && table.size(0) == batch &&
                  has_contiguous_rows(table),
              "block_table: must have dtype int32, shape (batch, max_blocks) with batch = ", batch,
              " and a contiguous last dimension; got ", table.scalar_type(), ", ", table.sizes());
  TORCH_CHECK(k_cache.size(1) > 0 && k_cache.size(1) % 16 == 0,
              "k_cache: Paged KV cache block size must be divisible by 16; got ", k_cache.sizes());
}

KvCache make_cache(at::Tensor const& k_cache, at::Tensor const& v_cache,
                   CacheArguments const& arguments) {
  KvCache cache{};
  cache.k = ref(k_cache), cache.v = ref(v_cache);
  cache.entries = data_of(arguments.batch_idx);
  cache.pages = int(k_cache.size(0)), cache.page_size = int(k_cache.size(1));
  int64_t capacity = k_cache.size(1);
  if (arguments.block_table) {
    cache.block_table        = data_of(arguments.block_table);
    cache.block_table_stride = arguments.block_table->stride(0);
    capacity *= arguments.block_table->size(1);
  }
  TORCH_CHECK(capacity < kUnlimited, "k_cache: at most 2^30 rows a sequence; got ", capacity);
  cache.capacity = int(capacity);
  cache.seqlen   = int(std::min<int64_t>(std::max<int64_t>(arguments.seqlen, 0), capacity));
  return cache;
}

Problem cache_problem(at::Tensor const& q, int64_t batch, KvCache const& cache, int64_t heads_kv,
                      CacheArguments const& arguments, Options const& options) {
  bool const is_ragged = arguments.cu_seqlens_q.has_value();
  Problem problem      = make_problem(
      q, is_ragged,
      {batch, heads_kv, is_ragged ? std::max<int64_t>(1, arguments.max_seqlen_q) : q.size(1),
       cache.capacity},
      options);
  problem.cu_seqlens_q = data_of(arguments.cu_seqlens_q);
  problem.cu_seqlens_k = data_of(arguments.cu_seqlens_k);
  problem.seqused_k    = data_of(arguments.seqlens);
  problem.leftpad_k    = data_of(arguments.leftpad);
  problem.total_q      = is_ragged ? int(q.size(0)) : 0;
  return problem;
}

// New rows that have been checked.
struct Update {
  at::Tensor k, v, q;  // q: where the rotated one will be; without rotary tables as it is
  KvUpdateParams params;

  void write(at::Tensor const& k_cache, at::Tensor const& v_cache, cudaStream_t stream) const {
    check_status(launch_kv_update(params, planned_capability(), stream));
    for (at::Tensor const* cache : {&k_cache, &v_cache}) {
      if (!cache->is_inference()) { cache->unsafeGetTensorImpl()->bump_version(); }
    }
  }
};

Update make_update(Append const& rows, at::Tensor const& q, Problem const& problem,
                   KvCache const& cache, bool advance_q) {
  std::vector<int64_t> shape = q.sizes().vec();
  shape[q.dim() - 2]         = problem.heads_kv;
  if (q.dim() == 4) { shape[1] = rows.k.size(1); }
  check_like(rows.k, "k", q, shape);
  check_like(rows.v, "v", q, shape);
  Update update{aligned(rows.k), aligned(rows.v), rows.rotary_cos ? new_like(q) : q, {}};
  KvUpdateParams& params = update.params;
  params.problem = problem, params.cache = cache;
  params.k = ref(update.k), params.v = ref(update.v);
  params.q = ref(q), params.q_out = ref(update.q);
  if (rows.rotary_cos) {
    TORCH_CHECK(rows.rotary_sin, "rotary_sin: must be given with rotary_cos");
    at::Tensor const &cos = *rows.rotary_cos, &sin = *rows.rotary_sin;
    TORCH_CHECK(cos.dim() == 2 && cos.size(0) > 0,
                "rotary_cos: must have shape (positions, "
                "rotary_dim / 2); got ",
                cos.sizes());
    check_like(cos, "rotary_cos", q, cos.sizes());
    check_like(sin, "rotary_sin", q, cos.sizes());
    TORCH_CHECK(has_contiguous_rows(cos) && has_contiguous_rows(sin),
                "rotary_cos and rotary_sin must have a contiguous last dimension");
    int64_t const rotary_dim = 2 * cos.size(1);
    TORCH_CHECK(rotary_dim <= q.size(-1), "rotary_dim must be <= headdim; got ", rotary_dim);
    TORCH_CHECK(rotary_dim % 16 == 0, "Only rotary dimensions divisible by 16 are supported; got ",
                rotary_dim);
    params.cos = cos.data_ptr(), params.sin = sin.data_ptr();
    params.cos_stride = cos.stride(0), params.sin_stride = sin.stride(0);
    params.rotary_dim = int(rotary_dim), params.positions = int(cos.size(0));
    params.interleaved = rows.interleaved, params.advance_q = advance_q;
  }
  return update;
}

// Whether the forward kernels can do it, and have enough to do: a chunk of many queries, keys in one piece, lengths that the host knows.
bool fits_forward(DecodeParams const& params, CacheArguments const& arguments) {
  Problem const& problem        = params.problem;
  constexpr int64_t kRowsOfTile = 128, kManyTiles = 256;
  bool const is_plain = !arguments.seqlens && !arguments.cu_seqlens_q && !arguments.cu_seqlens_k &&
                        !arguments.batch_idx && !arguments.leftpad && !arguments.block_table;
  int64_t const tiles = int64_t(problem.batch) * problem.heads_q * (problem.seqlen_q / kRowsOfTile);
  return is_plain && tiles >= kManyTiles && params.cache.seqlen + params.cache.seqlen_new > 0;
}

struct CacheCall {
  at::Tensor const &q, &k_cache, &v_cache;
  CacheArguments const& arguments;
  Options const& options;
  int64_t num_splits;
};

// A call that nothing refuses any more, with its results and the workspace that its plan asks for.  Of forward and decode it has the one
// that serves it, or none for rows that see no key.
struct Attention {
  at::Tensor out, lse;
  std::optional<FwdParams> forward;
  std::optional<DecodeParams> decode;
  Plan plan{};
  c10::DataPtr workspace;

  std::tuple<at::Tensor, at::Tensor> run(cudaStream_t stream) const {
    if (forward) {
      check_status(launch_fwd(*forward, plan, stream));
    } else if (decode) {
      check_status(launch_decode(*decode, plan, workspace.get(), stream));
    } else {
      out.zero_(), lse.fill_(std::numeric_limits<float>::infinity());
    }
    return {out, lse};
  }
};

// Attention to what is in the cache, whose lengths do not count yet what will be appended.  To be made before that is written: a call
// that is refused leaves the cache as it was.
Attention plan_attention(CacheCall const& call, DecodeParams params) {
  at::Tensor const& q = call.q;
  Attention attention{new_like(q), new_lse(q), {}, {}, {}, {}};
  if (q.numel() == 0 || call.k_cache.numel() == 0 || params.cache.capacity == 0) {
    return attention;
  }
  if (call.num_splits == 0 && fits_forward(params, call.arguments)) {
    int const rows = std::min(params.cache.seqlen + params.cache.seqlen_new, params.cache.capacity);
    attention.forward = FwdParams{
        make_problem(q, false, {params.problem.batch, call.k_cache.size(2), q.size(1), rows},
                     call.options),
        ref(q),
        params.cache.k,
        params.cache.v,
        ref(attention.out),
        attention.lse.data_ptr<float>()};
    attention.plan = plan_fwd(*attention.forward);
    check_status(check_plan(*attention.forward, attention.plan));
    return attention;
  }
  params.q = ref(q), params.out = ref(attention.out);
  params.lse        = attention.lse.data_ptr<float>();
  params.num_splits = int(call.num_splits);
  attention.decode = params, attention.plan = plan_decode(params);
  check_status(check_plan(params, attention.plan));
  attention.workspace =
      c10::cuda::CUDACachingAllocator::get()->allocate(size_t(attention.plan.workspace_bytes));
  return attention;
}

// Where head_dim is no multiple of 8: attention to a padded copy.
std::tuple<at::Tensor, at::Tensor> attend_padded(CacheCall const& call, DecodeParams params,
                                                 Update const* update, cudaStream_t stream) {
  at::AutoDispatchBelowAutograd const guard;
  CacheArguments const& given = call.arguments;
  int64_t rows                = params.cache.capacity;
  if (!given.seqlens && !given.cu_seqlens_k) {  // the host knows the lengths, or a bound
    int const added = params.cache.seqlen_new;
    rows = std::min<int64_t>(rows, int64_t(params.cache.seqlen) +
                                       (added == kAsQueries ? params.problem.seqlen_q : added));
  }
  int64_t const batch = params.problem.batch;
  PaddedCache const copy(call.k_cache, call.v_cache, given, batch, rows);
  CacheArguments const arguments{given.cu_seqlens_q, given.cu_seqlens_k, given.max_seqlen_q,
                                 given.seqlens,      given.seqlen,       copy.batch_idx,
                                 given.leftpad,      copy.block_table};
  at::Tensor const wide = new_padded(call.q.sizes(), call.q);
  KvCache cache         = make_cache(copy.k, copy.v, arguments);
  cache.seqlen_new      = params.cache.seqlen_new;
  params.cache          = cache;
  params.problem = cache_problem(wide, batch, cache, copy.k.size(2), arguments, call.options);
  Attention const attention =
      plan_attention({wide, copy.k, copy.v, arguments, call.options, call.num_splits}, params);
  if (update) { update->write(call.k_cache, call.v_cache, stream); }
  fill_padded(wide, call.q);
  copy.fill();
  auto const [out, lse] = attention.run(stream);
  return {out.narrow(-1, 0, call.q.size(-1)).contiguous(), lse};
}

std::tuple<at::Tensor, at::Tensor> attend_cache(at::Tensor const& q_in, at::Tensor const& k_cache,
                                                at::Tensor const& v_cache,
                                                CacheArguments const& arguments,
                                                Options const& options, int64_t num_splits,
                                                Append const* rows) {
  check_cache(q_in, k_cache, v_cache, arguments);
  int64_t const batch = arguments.cu_seqlens_q ? arguments.cu_seqlens_q->numel() - 1 : q_in.size(0);
  TORCH_CHECK(batch > 0, arguments.cu_seqlens_q ? "cu_seqlens_q" : "q",
              ": batch size must be positive; got ",
              arguments.cu_seqlens_q ? arguments.cu_seqlens_q->sizes() : q_in.sizes());
  check_lengths(q_in, k_cache, batch, arguments);
  TORCH_CHECK(num_splits >= 0 && num_splits <= 128,
              "num_splits > 128 not supported, nor negative ones; got ", num_splits);
  TORCH_CHECK(options.dropout_p == 0.0, "dropout_p: must be 0 with a cache; got ",
              options.dropout_p);
  if (rows) { check_written({{"k_cache", k_cache}, {"v_cache", v_cache}}); }

  c10::cuda::CUDAGuard const guard(q_in.device());
  cudaStream_t const stream = c10::cuda::getCurrentCUDAStream();
  // The kernels' running maximum needs a positive scale: a negative one moves its sign into Q.
  at::Tensor const q = aligned(options.softmax_scale < 0 ? q_in.neg() : q_in);
  DecodeParams params{};
  params.cache   = make_cache(k_cache, v_cache, arguments);
  params.problem = cache_problem(q, batch, params.cache, k_cache.size(2), arguments, options);
  int64_t const tile_rows =
      int64_t(params.problem.seqlen_q) * (params.problem.heads_q / params.problem.heads_kv);
  TORCH_CHECK(tile_rows < kUnlimited,
              "max_seqlen_q: times the query heads of a key head it must be below 2^30; got ",
              params.problem.seqlen_q, " and ", params.problem.heads_q, " / ",
              params.problem.heads_kv);
  std::optional<Update> update;
  if (rows) {
    params.cache.seqlen_new = arguments.cu_seqlens_q ? kAsQueries : int(rows->k.size(1));
    bool const advances = options.causal || options.window_left >= 0 || options.window_right >= 0;
    update              = make_update(*rows, q, params.problem, params.cache, advances);
  }
  CacheCall const call{update ? update->q : q, k_cache, v_cache, arguments, options, num_splits};
  if (needs_padding(q)) { return attend_padded(call, params, update ? &*update : nullptr, stream); }
  Attention const attention = plan_attention(call, params);
  if (update) { update->write(k_cache, v_cache, stream); }
  return attention.run(stream);
}

}  // namespace

std::tuple<at::Tensor, at::Tensor> attend_pages(at::Tensor const& q, at::Tensor const& k,
                                                at::Tensor const& v,
                                                CacheArguments const& arguments,
                                                Options const& options, int64_t num_splits) {
  return attend_cache(q, k, v, arguments, options, num_splits, nullptr);
}

std::tuple<at::Tensor, at::Tensor> flash_attn_kvcache(
    at::Tensor const& q, at::Tensor const& k_cache, at::Tensor const& v_cache,
    OptionalTensor const& cu_seqlens_q, int64_t max_seqlen_q, OptionalTensor const& cache_seqlens,
    int64_t cache_seqlen, OptionalTensor const& cache_batch_idx,
    OptionalTensor const& cache_leftpad, OptionalTensor const& block_table, double softmax_scale,
    bool causal, int64_t window_left, int64_t window_right, double softcap,
    OptionalTensor const& alibi_slopes, int64_t num_splits,
    OptionalTensor const& softmax_scale_tensor, OptionalTensor const& softcap_tensor) {
  OptionalTensor const none;
  return attend_cache(
      q, k_cache, v_cache,
      {cu_seqlens_q, none, max_seqlen_q, cache_seqlens, cache_seqlen, cache_batch_idx,
       cache_leftpad, block_table},
      {number(softmax_scale, softmax_scale_tensor, "softmax_scale_tensor"), causal, window_left,
       window_right, number(softcap, softcap_tensor, "softcap_tensor"), alibi_slopes, 0.0, none},
      num_splits, nullptr);
}

std::tuple<at::Tensor, at::Tensor> flash_attn_kvcache_append(
    at::Tensor const& q, at::Tensor k_cache, at::Tensor v_cache, at::Tensor const& k,
    at::Tensor const& v, OptionalTensor const& rotary_cos, OptionalTensor const& rotary_sin,
    bool rotary_interleaved, OptionalTensor const& cu_seqlens_q, int64_t max_seqlen_q,
    OptionalTensor const& cache_seqlens, int64_t cache_seqlen,
    OptionalTensor const& cache_batch_idx, OptionalTensor const& cache_leftpad,
    OptionalTensor const& block_table, double softmax_scale, bool causal, int64_t window_left,
    int64_t window_right, double softcap, OptionalTensor const& alibi_slopes, int64_t num_splits,
    OptionalTensor const& softmax_scale_tensor, OptionalTensor const& softcap_tensor) {
  OptionalTensor const none;
  Append const rows{k, v, rotary_cos, rotary_sin, rotary_interleaved};
  return attend_cache(
      q, k_cache, v_cache,
      {cu_seqlens_q, none, max_seqlen_q, cache_seqlens, cache_seqlen, cache_batch_idx,
       cache_leftpad, block_table},
      {number(softmax_scale, softmax_scale_tensor, "softmax_scale_tensor"), causal, window_left,
       window_right, number(softcap, softcap_tensor, "softcap_tensor"), alibi_slopes, 0.0, none},
      num_splits, &rows);
}

}  // namespace flash
