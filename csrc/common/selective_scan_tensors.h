// What the CPU and CUDA wrappers of room selective_scan share: checks for memory safety, and the outputs.
#pragma once

#include <tuple>

#include "common/linear_scan_tensors.h"

namespace fastdl {

using NineTensors = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

constexpr int64_t SCAN_CHUNK = 16;  // steps between kept states, as in fastdl/reference/selective_scan.py

struct SelectiveScanTensors {
  int64_t batch, length, dim, state, chunks;
  Steps x, delta, b, c, z;           // z: x where there is none
  Tensor a;                          // [dim, state] float32, contiguous
  OptionalTensor d, delta_bias, h0;  // [dim], [dim], [batch, dim, state] float32, contiguous
  bool gated;

  SelectiveScanTensors(const Tensor& x_, const Tensor& delta_, const Tensor& a_, const Tensor& b_, const Tensor& c_,
                       const OptionalTensor& d_, const OptionalTensor& z_, const OptionalTensor& delta_bias_,
                       const OptionalTensor& h0_)
      : x(steps_of(three(x_), false)),
        delta(like(x_, delta_)),
        b(matrix(x_, b_, a_)),
        c(matrix(x_, c_, a_)),
        z(z_ ? like(x_, *z_) : x),
        a(as_contiguous(a_)),
        gated(z_.has_value()) {
    batch = x_.size(0);
    length = x_.size(1);
    dim = x_.size(2);
    state = a_.size(1);
    chunks = (length + SCAN_CHUNK - 1) / SCAN_CHUNK;
    check(a_.scalar_type() == ScalarType::Float && a_.size(0) == dim && state > 0 && same_device(a_, x_),
          "A: expected float32 [dim, state]");
    d = floats(x_, d_, dim, "D: expected float32 [dim]");
    delta_bias = floats(x_, delta_bias_, dim, "delta_bias: expected float32 [dim]");
    h0 = floats(x_, h0_, batch * dim * state, "h0: expected float32 [batch, dim, state]");
  }

  bool empty() const { return batch == 0 || length == 0 || dim == 0; }

  static OptionalTensor floats(const Tensor& x, const OptionalTensor& t, int64_t count, const char* message) {
    if (!t) return t;
    check(t->scalar_type() == ScalarType::Float && t->numel() == count && same_device(*t, x), message);
    return as_contiguous(*t);
  }
  static Steps like(const Tensor& x, const Tensor& other) {
    check_like(x, other, "delta, z, grad: expected shape, dtype and device of x");
    return steps_of(other, false);
  }

 private:
  static const Tensor& three(const Tensor& x) {
    check(x.dim() == 3, "x: expected [batch, length, dim]");
    return x;
  }
  static Steps matrix(const Tensor& x, const Tensor& m, const Tensor& a) {
    check(a.dim() == 2 && m.dim() == 3 && m.size(0) == x.size(0) && m.size(1) == x.size(1) && m.size(2) == a.size(1) &&
              m.scalar_type() == x.scalar_type() && same_device(m, x),
          "B, C: expected [batch, length, state] in the dtype of x");
    return steps_of(m, false);
  }
};

// y, last, states.
inline ThreeTensors selective_scan_outputs(const SelectiveScanTensors& t, const Tensor& x, bool keep) {
  const Tensor last = new_tensor(x, {t.batch, t.dim, t.state}, ScalarType::Float);
  const std::vector<int64_t> kept{t.batch, t.chunks, t.state, t.dim}, none{0};
  return {new_tensor(x, shape_of(x), x.scalar_type()), last, new_tensor(x, keep ? kept : none, ScalarType::Float)};
}

// dx, ddelta, dz, dB, dC, dA, dD, dbias, dh0; zeros where no kernel runs.
inline NineTensors selective_scan_gradients(const SelectiveScanTensors& t, const Tensor& x) {
  const std::vector<int64_t> shape = shape_of(x), none{0}, matrix{t.batch, t.length, t.state};
  const auto sums = [&](const std::vector<int64_t>& size) {
    return t.empty() ? torch::stable::new_zeros(x, size, ScalarType::Float) : new_tensor(x, size, ScalarType::Float);
  };
  const auto rows = [&](const std::vector<int64_t>& size) { return new_tensor(x, size, x.scalar_type()); };
  return {rows(shape),   rows(shape),   rows(t.gated ? shape : none),
          sums(matrix),  sums(matrix),  sums({t.dim, t.state}),
          sums({t.dim}), sums({t.dim}), sums({t.batch, t.dim, t.state})};
}

}  // namespace fastdl
