// A tensor [..., cols] seen as rows: any leading shape, and any distance between rows; copied only when no single distance
// describes it.
#pragma once

#include <torch/csrc/stable/ops.h>

#include "common/tensor.h"

namespace fastdl {

struct Rows {
  Tensor tensor;  // holds the memory
  int64_t count, cols, stride;

  template <class T>
  const T* data() const {
    return static_cast<const T*>(tensor.const_data_ptr());
  }
};

inline Rows rows_of(const Tensor& x) {
  const int64_t dims = x.dim(), cols = x.size(dims - 1);
  int64_t count = 1;
  for (int64_t d = 0; d + 1 < dims; ++d) count *= x.size(d);
  // From the innermost leading dimension outwards each stride must be the product of the inner size and stride.
  bool even = x.stride(dims - 1) == 1 || cols == 1;
  int64_t stride = cols, next = -1;
  for (int64_t d = dims - 2; d >= 0 && even; --d) {
    if (x.size(d) == 1) continue;
    if (next < 0)
      stride = x.stride(d);
    else
      even = x.stride(d) == next;
    next = x.stride(d) * x.size(d);
  }
  if (!even) return {torch::stable::contiguous(x), count, cols, cols};
  return {x, count, cols, stride};
}

}  // namespace fastdl
