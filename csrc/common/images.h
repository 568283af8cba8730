// Tensors [N, C, *] and what belongs to their channels, for the wrappers of rooms that normalize over channels.
#pragma once

#include <tuple>
#include <vector>

#include "common/norm_tensors.h"

namespace fastdl {

using ThreeTensors = std::tuple<Tensor, Tensor, Tensor>;
using FiveTensors = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

// A parameter of the channels: contiguous, in the dtype of x or float32. Null where it is not given.
struct Parameter {
  OptionalTensor tensor;
  bool is_float = false;

  Parameter(const Tensor& x, const OptionalTensor& given, const std::vector<int64_t>& shape, const char* message) {
    if (!given) return;
    is_float = given->scalar_type() == ScalarType::Float;
    const auto sizes = given->sizes();
    check((is_float || given->scalar_type() == x.scalar_type()) && same_device(*given, x) &&
              std::equal(shape.begin(), shape.end(), sizes.begin(), sizes.end()),
          message);
    tensor = as_contiguous(*given);
  }

  const void* data() const { return pointer(tensor); }
};

// x [N, C, *] in one piece.
struct Images {
  Tensor tensor;
  int64_t n, channels, spatial;  // spatial: positions of a channel

  explicit Images(const Tensor& x) : tensor(as_contiguous(x)) {
    check(x.dim() >= 2 && x.size(1) > 0, "x: expected [N, C, *]");
    n = x.size(0);
    channels = x.size(1);
    spatial = 1;
    for (int64_t d = 2; d < x.dim(); ++d) spatial *= x.size(d);
    check(spatial < int64_t{1} << 30 && channels < int64_t{1} << 30, "x: more than 2^30 channels or positions");
  }

  bool empty() const { return n == 0 || spatial == 0; }
};

// Without an element no kernel runs, and statistics and sums are zero.
inline Tensor float_output(const Images& x, bool needed, const std::vector<int64_t>& shape) {
  if (needed && x.empty()) return torch::stable::new_zeros(x.tensor, shape, ScalarType::Float);
  return new_tensor(x.tensor, needed ? shape : std::vector<int64_t>{0}, ScalarType::Float);
}

}  // namespace fastdl
