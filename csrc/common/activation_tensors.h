// What the CPU and CUDA wrappers of room activation share: checks for memory safety, tensors as rows, and the outputs.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <tuple>

#include "common/activations.h"
#include "common/rows.h"

namespace fastdl {

inline bool all_contiguous(const Tensor& x) { return x.is_contiguous(); }
template <class... Rest>
bool all_contiguous(const Tensor& x, const Rest&... rest) {
  return x.is_contiguous() && all_contiguous(rest...);
}

// A contiguous tensor of any shape as one row.
inline Rows flat(const Tensor& x) { return {x, 1, x.numel(), x.numel()}; }

inline int checked_kind(int64_t kind) {
  check(kind >= 0 && kind < ACTIVATION_KINDS, "kind: unknown number");
  return static_cast<int>(kind);
}

// x, and residual or grad beside it, as [rows, cols]. With one element behind each of the bias's, cols are its columns;
// else a row is the `inner` elements behind one of them, and row r has bias[r % channels].
struct ActivationTensors {
  Rows x, other;  // other: x where there is none
  OptionalTensor bias;
  bool float_bias = false;
  int64_t channels = 0;      // 0: bias by column
  bool mask_by_row = false;  // dropout decides once a row

  ActivationTensors(const Tensor& x_, const OptionalTensor& other_, const OptionalTensor& bias_,
                    const OptionalTensor& beta, int64_t inner, bool by_channel)
      : mask_by_row(by_channel && inner > 1) {
    if (other_) check_like(x_, *other_, "residual, grad: expected shape, dtype and device of x");
    if (beta)
      check(beta->scalar_type() == ScalarType::Float && beta->numel() == 1 && same_device(*beta, x_),
            "beta: expected float32 [1] on the device of x");
    const Tensor& second = other_ ? *other_ : x_;
    check(inner > 0 && x_.numel() % inner == 0, "inner: does not divide x");
    if (x_.numel() == 0) {  // no kernel runs
      x = other = Rows{x_, 0, 1, 1};
      return;
    }
    if (inner > 1) {
      const auto rows = [&](const Tensor& t) { return Rows{as_contiguous(t), t.numel() / inner, inner, inner}; };
      x = rows(x_);
      other = other_ ? rows(second) : x;
    } else if (!bias_ && all_contiguous(x_, second)) {
      x = flat(x_);
      other = flat(second);
    } else {
      check(x_.dim() > 0, "x: expected [..., cols]");
      x = rows_of(x_);
      other = other_ ? rows_of(second) : x;
    }
    if (!bias_) return;
    float_bias = bias_->scalar_type() == ScalarType::Float;
    check((float_bias || bias_->scalar_type() == x_.scalar_type()) && bias_->dim() == 1 && same_device(*bias_, x_),
          "bias: expected [channels] in the dtype of x or float32");
    if (inner > 1) {
      channels = bias_->numel();
      check(channels > 0 && x.count % channels == 0, "bias: its size does not fit x and inner");
    } else {
      check(bias_->numel() == x.cols, "bias: its size is not that of x's last dimension");
    }
    bias = as_contiguous(*bias_);
  }
};

using ThreeTensors = std::tuple<Tensor, Tensor, Tensor>;

// The sums dbias and dbeta: [0] where not needed, zeros where x has no element and no kernel runs.
inline Tensor activation_sum(const Tensor& x, int64_t size, bool need) {
  const std::vector<int64_t> shape{need ? size : 0};
  if (need && x.numel() == 0) return torch::stable::new_zeros(x, shape, ScalarType::Float);
  return new_tensor(x, shape, ScalarType::Float);
}

// gate, up and (in the backward) grad, all as one row, or as rows of their own distances.
struct GluTensors {
  Rows gate, up, grad;

  GluTensors(const Tensor& gate_, const Tensor& up_, const Tensor& grad_) {
    check_like(gate_, up_, "up: expected shape, dtype and device of gate");
    check_like(gate_, grad_, "grad: expected shape, dtype and device of gate");
    const bool one = all_contiguous(gate_, up_, grad_);
    gate = one ? flat(gate_) : rows_of(gate_);
    up = one ? flat(up_) : rows_of(up_);
    grad = one ? flat(grad_) : rows_of(grad_);
  }
};

}  // namespace fastdl
