#pragma once
// From a tile's coordinates to memory.  Used by every kernel.
#include <cute/config.hpp>

#include "flash.h"

namespace flash {

// First element of one head's (seqlen, head_dim) matrix.
template <class Element>
CUTE_DEVICE Element* matrix_of(TensorRef const& tensor, int batch, int head) {
  return static_cast<Element*>(tensor.data) + batch * tensor.batch_stride +
         head * tensor.head_stride;
}

// First element of one of its rows.
template <class Element>
CUTE_DEVICE Element* row_of(TensorRef const& tensor, int batch, int head, int64_t row) {
  return matrix_of<Element>(tensor, batch, head) + row * tensor.row_stride;
}

}  // namespace flash
