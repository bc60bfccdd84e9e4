// New keys and values into a cache, keys rotated; queries rotated into a tensor of their own.  Attention kernels know of neither.
// One thread for a vector of K, V or Q, or for both vectors of a rotated pair.
#include <cutlass/numeric_conversion.h>
#include <cutlass/numeric_types.h>

#include "pieces/address.cuh"
#include "pieces/dependent.cuh"
#include "pieces/device_info.h"
#include "pieces/kv_cache.cuh"
#include "pieces/launch.cuh"

namespace flash {
namespace {

constexpr int kThreads = 128;
// Elements of 16 bytes.  Rows whose length is no multiple of it may begin anywhere: they are copied one element at a time.
constexpr int kWide = 8;

template <class Element, int kVector>
using VectorOf = cutlass::AlignedArray<Element, kVector>;

// Which sequence a new row, or query, belongs to.
struct Token {
  int batch, index;  // index: in the sequence
  int k_row, q_row;  // rows of k and q without the batch
  bool is_new_key, is_query;
};

__device__ Token find_token(KvUpdateParams const& params, int token) {
  Problem const& problem = params.problem;
  if (!problem.cu_seqlens_q) {
    int const most = max_of(problem.seqlen_q, params.cache.seqlen_new), index = token % most;
    return {token / most,
            index,
            index,
            index,
            index < params.cache.seqlen_new,
            index < problem.seqlen_q};
  }
  int low = 0, high = problem.batch;  // cu[low] <= token, and < cu[high] unless high is the end
  while (high - low > 1) {
    int const middle                                             = (low + high) / 2;
    (__ldg(problem.cu_seqlens_q + middle) <= token ? low : high) = middle;
  }
  bool const exists = token < __ldg(problem.cu_seqlens_q + problem.batch);
  return {low, token - __ldg(problem.cu_seqlens_q + low), token, token, exists, exists};
}

// A row's place in the cache: page or entry, and row in it; false if the cache has none.
__device__ bool find_row(KvCache const& cache, int batch, int row, int& page, int& row_in_page) {
  if (row < 0 || row >= cache.capacity) { return false; }
  if (cache.block_table) {
    page = __ldg(cache.block_table + batch * cache.block_table_stride + row / cache.page_size);
    row_in_page = row % cache.page_size;
  } else {
    page        = cache.entries ? __ldg(cache.entries + batch) : batch;
    row_in_page = row;
  }
  return unsigned(page) < unsigned(cache.pages);
}

// Values i of x1 and j of x2 become x1 cos - x2 sin and x1 sin + x2 cos, in fp32.
template <class Vector, class Element>
__device__ void rotate(Vector& x1, int i, Vector& x2, int j, Element cos, Element sin) {
  float const a = float(x1[i]), b = float(x2[j]), c = float(cos), s = float(sin);
  x1[i] = Element(a * c - b * s), x2[j] = Element(a * s + b * c);
}

// Copies one row's columns [column, column + kVector), rotated by the position if they are in the rotary dimensions.  The thread of a
// pair's first column does its second too, where that is in another vector.
template <int kVector, class Element>
__device__ void copy_rotated(KvUpdateParams const& params, Element const* from, Element* to,
                             int column, int position) {
  using Vector   = VectorOf<Element, kVector>;
  int const half = params.rotary_dim / 2;
  auto const in  = [&](int at) { return *reinterpret_cast<Vector const*>(from + at); };
  auto const out = [&](int at) -> auto& { return *reinterpret_cast<Vector*>(to + at); };
  if (column >= params.rotary_dim) {
    out(column) = in(column);
    return;
  }
  int const row            = min_of(max_of(position, 0), params.positions - 1);
  Element const* const cos = static_cast<Element const*>(params.cos) + row * params.cos_stride;
  Element const* const sin = static_cast<Element const*>(params.sin) + row * params.sin_stride;
  if (params.interleaved) {
    if constexpr (kVector == 1) {
      if (column % 2 == 1) { return; }
      Vector x1 = in(column), x2 = in(column + 1);
      rotate(x1, 0, x2, 0, cos[column / 2], sin[column / 2]);
      out(column) = x1, out(column + 1) = x2;
    } else {
      Vector x = in(column);
      CUTE_UNROLL
      for (int i = 0; i < kVector / 2; ++i) {
        rotate(x, 2 * i, x, 2 * i + 1, cos[column / 2 + i], sin[column / 2 + i]);
      }
      out(column) = x;
    }
  } else if (column < half) {
    Vector x1 = in(column), x2 = in(column + half);
    CUTE_UNROLL
    for (int i = 0; i < kVector; ++i) { rotate(x1, i, x2, i, cos[column + i], sin[column + i]); }
    out(column) = x1, out(column + half) = x2;
  }
}

template <class Element, int kVector>
__global__ void __launch_bounds__(kThreads)
    kv_update_kernel(__grid_constant__ KvUpdateParams const params, int64_t items_per_token) {
  // In this order: the attention kernel reads older rows of the cache without waiting for the end of this kernel.
  wait_for_previous_kernel();
  let_next_kernel_start();
  Problem const& problem = params.problem;
  int const chunks = problem.head_dim / kVector, blocks = int(items_per_token / kThreads);
  Token const token = find_token(params, blockIdx.x / blocks);
  int const item = blockIdx.x % blocks * kThreads + threadIdx.x, column = item % chunks * kVector;
  int head = item / chunks;  // key heads, value heads, query heads
  int const cached =
      clamped(cached_rows(problem, params.cache, token.batch), params.cache.capacity);
  if (head < 2 * problem.heads_kv) {
    bool const is_value = head >= problem.heads_kv;
    if (is_value) { head -= problem.heads_kv; }
    int page, row;
    if (!token.is_new_key ||
        !find_row(params.cache, token.batch, cached + token.index, page, row)) {
      return;
    }
    TensorRef const& source = is_value ? params.v : params.k;
    TensorRef const& target = is_value ? params.cache.v : params.cache.k;
    auto const* const from =
        matrix_of<Element const>(source, token.batch, head) + token.k_row * source.row_stride;
    auto* const to = static_cast<Element*>(target.data) + page * target.batch_stride +
                     row * target.row_stride + head * target.head_stride;
    if (is_value || !params.cos) {
      using Vector                            = VectorOf<Element, kVector>;
      *reinterpret_cast<Vector*>(to + column) = *reinterpret_cast<Vector const*>(from + column);
    } else {
      copy_rotated<kVector>(params, from, to, column, cached + token.index);
    }
  } else if (head < 2 * problem.heads_kv + problem.heads_q && token.is_query && params.cos) {
    head -= 2 * problem.heads_kv;
    auto const* const from =
        matrix_of<Element const>(params.q, token.batch, head) + token.q_row * params.q.row_stride;
    auto* const to =
        matrix_of<Element>(params.q_out, token.batch, head) + token.q_row * params.q_out.row_stride;
    copy_rotated<kVector>(params, from, to, column, cached + (params.advance_q ? token.index : 0));
  }
}

template <class Element, int kVector>
cudaError_t launch_vector(KvUpdateParams const& params, int capability, cudaStream_t stream) {
  Problem const& problem = params.problem;
  int64_t const tokens =
      problem.cu_seqlens_q
          ? problem.total_q
          : int64_t(problem.batch) * max_of(problem.seqlen_q, params.cache.seqlen_new);
  int64_t const heads = 2 * problem.heads_kv + (params.cos ? problem.heads_q : 0);
  int64_t const items = (heads * (problem.head_dim / kVector) + kThreads - 1) / kThreads * kThreads;
  Launch launch{tokens * (items / kThreads), kThreads, 0, stream};
  launch.start = earliest_start(capability);
  return launch_kernel(&kv_update_kernel<Element, kVector>, launch, params, items);
}

template <class Element>
cudaError_t launch_element(KvUpdateParams const& params, int capability, cudaStream_t stream) {
  return params.problem.head_dim % kWide == 0
             ? launch_vector<Element, kWide>(params, capability, stream)
             : launch_vector<Element, 1>(params, capability, stream);
}

}  // namespace

Status launch_kv_update(KvUpdateParams const& params, int capability, cudaStream_t stream) {
  cudaError_t const code = params.problem.dtype == DType::kFp16
                               ? launch_element<cutlass::half_t>(params, capability, stream)
                               : launch_element<cutlass::bfloat16_t>(params, capability, stream);
  return {code,
          code == cudaSuccess ? nullptr : "launch of the kernel that appends to the cache failed"};
}

}  // namespace flash
