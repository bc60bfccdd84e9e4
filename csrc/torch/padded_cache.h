#pragma once
// Copies of tensors whose head_dim is no multiple of 8, for kernels that read 16 bytes at a time.
#include "torch/arguments.h"

namespace flash {

// A place for tensors of these sizes, the last dimension rounded up to a multiple of 8; and x in it, with zeros.
at::Tensor new_padded(at::IntArrayRef sizes, at::Tensor const& like);
void fill_padded(at::Tensor const& place, at::Tensor const& x);

// Places for padded copies of the entries or pages that sequences have, of which each has at most so many rows.  Nothing is read on the
// host.
class PaddedCache {
 public:
  PaddedCache(at::Tensor const& k_cache, at::Tensor const& v_cache, CacheArguments const& arguments,
              int64_t batch, int64_t rows);

  // Copies what the cache holds by now.
  void fill() const;

  at::Tensor k, v;
  OptionalTensor batch_idx, block_table;  // places in the copy; none: sequence b is entry b

 private:
  at::Tensor part_k_, part_v_;  // of the cache
  at::Tensor used_;             // entries or pages that are gathered from the part; undefined: all
};

}  // namespace flash
