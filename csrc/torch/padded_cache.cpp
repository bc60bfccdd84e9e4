// Padded copies for the decoding kernels, of torch operations.
//
// A row of 59 elements of 2 bytes begins at any even address, where cp.async cannot read: it moves 4, 8 or 16 bytes from addresses that
// are multiples of that.  Kernels that read such rows through registers would be one more variant of every tile.
#include "torch/padded_cache.h"

#include <ATen/ATen.h>

namespace flash {
namespace {

constexpr int64_t kVector = 8;

int64_t rounded_up(int64_t size, int64_t multiple) {
  return (size + multiple - 1) / multiple * multiple;
}

}  // namespace

at::Tensor padded(at::Tensor const& x) {
  std::vector<int64_t> shape = x.sizes().vec();
  int64_t const size = shape.back(), wide_size = rounded_up(size, kVector);
  shape.back()          = wide_size;
  at::Tensor const wide = at::empty(shape, x.options());
  wide.narrow(-1, 0, size).copy_(x);
  wide.narrow(-1, size, wide_size - size).zero_();
  return wide;
}

PaddedCache padded_cache(at::Tensor const& k_cache, at::Tensor const& v_cache,
                         CacheArguments const& arguments, int64_t batch, int64_t rows) {
  OptionalTensor const &table = arguments.block_table, &entries = arguments.batch_idx;
  int64_t const pages = k_cache.size(0), page_size = k_cache.size(1);
  int64_t const columns = table ? rounded_up(rows, page_size) / page_size : 0;
  at::Tensor used;  // entries or pages: those of sequence 0, then those of sequence 1, ...
  if (table) {
    used = table->narrow(1, 0, columns).reshape(-1);
  } else if (entries) {
    used = *entries;
  }
  bool const has_index = used.defined(), gathers = has_index && used.numel() < pages;
  // What lies beyond a sequence's length in a block table may be no page, and is copied without being used.
  if (gathers) { used = used.clamp(0, pages - 1); }
  auto const copy = [&](at::Tensor const& cache) {
    at::Tensor part = table ? cache : cache.narrow(1, 0, rows);
    if (!has_index) { part = part.narrow(0, 0, batch); }
    at::Tensor const wide = padded(gathers ? part.index_select(0, used) : part);
    if (!gathers || !table) { return wide; }
    return wide.view({batch, columns * page_size, wide.size(2), wide.size(3)});
  };
  PaddedCache result{copy(k_cache), copy(v_cache), {}, {}};
  if (!gathers) { result.batch_idx = entries, result.block_table = table; }
  return result;
}

}  // namespace flash
