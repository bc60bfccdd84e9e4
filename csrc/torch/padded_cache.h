#pragma once
// Copies of tensors whose head_dim is no multiple of 8, for kernels that read 16 bytes at a time.
#include "torch/arguments.h"

namespace flash {

// x with the last dimension rounded up to a multiple of 8, in zeros.
at::Tensor padded(at::Tensor const& x);

// What is copied of a cache, and where sequences are in the copy; none: sequence b is entry b.
struct PaddedCache {
  at::Tensor k, v;
  OptionalTensor batch_idx, block_table;
};

// Padded copies of the entries or pages that sequences have, of which each has at most so many rows.  Nothing is read on the host.
PaddedCache padded_cache(at::Tensor const& k_cache, at::Tensor const& v_cache,
                         CacheArguments const& arguments, int64_t batch, int64_t rows);

}  // namespace flash
