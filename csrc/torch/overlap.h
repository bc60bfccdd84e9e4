#pragma once
// Whether tensors that are written to share memory, with themselves or with each other: flash_attn/_overlap.py for CUDA tensors.
// Views that take turns in memory, such as the keys and the values of one cache, share none.
#include <ATen/ATen.h>
#include <c10/util/SmallVector.h>

#include <algorithm>
#include <initializer_list>

namespace flash {

// A stride, and how often a sum may take it at most.
struct Term {
  int64_t stride, limit;
};
using StrideSum = c10::SmallVector<Term, 12>;  // no stride twice, the largest first

inline void add_term(StrideSum& sum, int64_t stride, int64_t limit) {
  if (stride * limit == 0) { return; }
  Term* const place =
      std::find_if(sum.begin(), sum.end(), [&](Term const& term) { return term.stride <= stride; });
  if (place != sum.end() && place->stride == stride) {
    place->limit += limit;
  } else {
    sum.insert(place, Term{stride, limit});
  }
}

// Whether the terms from `term` on can add up to the distance.  A layout that takes too many steps counts as overlapping.
inline bool reaches(Term const* term, Term const* end, int64_t distance, int& steps) {
  if (distance == 0) { return true; }
  if (distance < 0 || term == end) { return false; }
  if (--steps < 0) { return true; }
  auto const [stride, limit] = *term++;
  int64_t others             = 0;
  for (Term const* other = term; other != end; ++other) { others += other->stride * other->limit; }
  int64_t const missing = std::max<int64_t>(0, distance - others);
  int64_t const fewest = (missing + stride - 1) / stride, most = std::min(limit, distance / stride);
  for (int64_t n = most; n >= fewest; --n) {
    if (reaches(term, end, distance - n * stride, steps)) { return true; }
  }
  return false;
}
inline bool is_sum(StrideSum const& sum, int64_t distance) {
  int steps = 10'000;
  return reaches(sum.begin(), sum.end(), distance, steps);
}

// Whether two elements have one address.
inline bool overlaps_itself(at::Tensor const& tensor) {
  if (tensor.is_contiguous() || tensor.numel() == 0) { return false; }
  StrideSum smaller;
  int64_t span = 0;
  c10::SmallVector<Term, 6> dims;
  for (int64_t dim = 0; dim < tensor.dim(); ++dim) {
    if (tensor.size(dim) > 1) { dims.push_back({tensor.stride(dim), tensor.size(dim) - 1}); }
  }
  std::sort(dims.begin(), dims.end(),
            [](Term const& a, Term const& b) { return a.stride < b.stride; });
  // Two elements that differ in a dimension and in those of smaller strides: the index of the one is larger there, by 1 at least.
  for (auto const& [stride, limit] : dims) {
    if (stride <= span) {
      StrideSum sum = smaller;
      add_term(sum, stride, limit - 1);
      if (stride == 0 || is_sum(sum, span - stride)) { return true; }
    }
    add_term(smaller, stride, 2 * limit);
    span += stride * limit;
  }
  return false;
}

// Whether some byte belongs to both.
inline bool overlap(at::Tensor const& x, at::Tensor const& y) {
  if (x.numel() == 0 || y.numel() == 0) { return false; }
  auto const last_byte = [](at::Tensor const& tensor) {
    int64_t elements = 1;
    for (int64_t dim = 0; dim < tensor.dim(); ++dim) {
      elements += tensor.stride(dim) * (tensor.size(dim) - 1);
    }
    return reinterpret_cast<intptr_t>(tensor.data_ptr()) +
           elements * int64_t(tensor.element_size()) - 1;
  };
  auto const begin_x   = reinterpret_cast<intptr_t>(x.data_ptr()),
             begin_y   = reinterpret_cast<intptr_t>(y.data_ptr());
  intptr_t const end_x = last_byte(x), end_y = last_byte(y);
  if (end_x < begin_y || end_y < begin_x) { return false; }
  StrideSum sum;  // an address of x less one of y; the distances within y are counted from its end
  for (at::Tensor const* tensor : {&x, &y}) {
    auto const size = int64_t(tensor->element_size());
    add_term(sum, 1, size - 1);
    for (int64_t dim = 0; dim < tensor->dim(); ++dim) {
      add_term(sum, tensor->stride(dim) * size, tensor->size(dim) - 1);
    }
  }
  return is_sum(sum, end_y - begin_x);
}

struct NamedTensor {
  char const* name;
  at::Tensor const& tensor;
};

// Tensors that are written to overlap neither themselves nor each other, nor those that are read.
inline void check_written(std::initializer_list<NamedTensor> written,
                          std::initializer_list<NamedTensor> read = {}) {
  auto const check_pair = [](NamedTensor const& target, NamedTensor const& other) {
    at::Tensor const &x = target.tensor, &y = other.tensor;
    TORCH_CHECK(!overlap(x, y), target.name, " is written to and must not overlap ", other.name,
                " in memory; got shapes ", x.sizes(), " and ", y.sizes(), ", strides ", x.strides(),
                " and ", y.strides());
  };
  for (auto target = written.begin(); target != written.end(); ++target) {
    at::Tensor const& x = target->tensor;
    TORCH_CHECK(!overlaps_itself(x), target->name,
                " is written to and must not overlap itself in memory, as an expanded tensor does; "
                "got shape ",
                x.sizes(), ", strides ", x.strides());
    for (auto other = written.begin(); other != target; ++other) { check_pair(*target, *other); }
    for (NamedTensor const& other : read) { check_pair(*target, other); }
  }
}

}  // namespace flash
