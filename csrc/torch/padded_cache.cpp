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

at::Tensor new_padded(at::IntArrayRef sizes, at::Tensor const& like) {
  std::vector<int64_t> shape = sizes.vec();
  shape.back()               = rounded_up(shape.back(), kVector);
  return at::empty(shape, like.options());
}

void fill_padded(at::Tensor const& place, at::Tensor const& x) {
  int64_t const size = x.size(-1);
  place.narrow(-1, 0, size).copy_(x);
  place.narrow(-1, size, place.size(-1) - size).zero_();
}

PaddedCache::PaddedCache(at::Tensor const& k_cache, at::Tensor const& v_cache,
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
  if (gathers) { used_ = used.clamp(0, pages - 1); }
  auto const part_of = [&](at::Tensor const& cache) {
    at::Tensor const part = table ? cache : cache.narrow(1, 0, rows);
    return has_index ? part : part.narrow(0, 0, batch);
  };
  part_k_ = part_of(k_cache), part_v_ = part_of(v_cache);
  std::vector<int64_t> shape = part_k_.sizes().vec();
  if (gathers) { shape[0] = batch, shape[1] = table ? columns * page_size : rows; }
  k = new_padded(shape, k_cache), v = new_padded(shape, v_cache);
  if (!gathers) { batch_idx = entries, block_table = table; }
}

void PaddedCache::fill() const {
  auto const copy = [&](at::Tensor const& place, at::Tensor const& part) {
    if (!used_.defined()) { return fill_padded(place, part); }
    // Pages of a sequence lie one after the other: its rows.
    std::vector<int64_t> shape = place.sizes().vec();
    shape.back()               = part.size(-1);
    fill_padded(place, part.index_select(0, used_).view(shape));
  };
  copy(k, part_k_), copy(v, part_v_);
}

}  // namespace flash
