// What the CPU and CUDA wrappers of room norm share: checks for memory safety, and the outputs.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <tuple>
#include <vector>

#include "common/rows.h"

namespace fastdl {

using TwoTensors = std::tuple<Tensor, Tensor>;
using FourTensors = std::tuple<Tensor, Tensor, Tensor, Tensor>;

// weight and bias: contiguous, of one dtype, which is that of x or float32.
struct NormParameters {
  OptionalTensor weight, bias;
  bool is_float = false;

  NormParameters(const Tensor& x, const OptionalTensor& weight_, const OptionalTensor& bias_) {
    take(x, weight_, weight, "weight: expected [cols] in the dtype of x or float32");
    take(x, bias_, bias, "bias: expected [cols] in the dtype of x or float32");
    check(!weight || !bias || weight->scalar_type() == bias->scalar_type(), "weight, bias: expected one dtype");
  }

 private:
  void take(const Tensor& x, const OptionalTensor& given, OptionalTensor& to, const char* message) {
    if (!given) return;
    const bool wide = given->scalar_type() == ScalarType::Float;
    check((wide || given->scalar_type() == x.scalar_type()) && given->dim() == 1 &&
              given->numel() == x.size(x.dim() - 1) && same_device(*given, x),
          message);
    is_float = wide;
    to = as_contiguous(*given);
  }
};

struct NormForwardTensors {
  Rows x, residual;  // residual: x where there is none
  NormParameters parameters;
  Tensor y, s;
  OptionalTensor mean, rstd;  // none in inference
  bool plain;                 // no residual, no dropout: s is x

  // keep: s and the statistics, for a backward pass; without it s only where `sum` asks for it
  NormForwardTensors(const Tensor& x_, const OptionalTensor& residual_, const OptionalTensor& weight,
                     const OptionalTensor& bias, const OptionalTensor& seed, bool rms, bool keep, bool sum)
      : x(checked(x_)),
        residual(residual_ ? like(x_, *residual_) : x),
        parameters(x_, weight, bias),
        plain(!residual_ && !seed) {
    const std::vector<int64_t> shape = shape_of(x_), rows(shape.begin(), shape.end() - 1), none{0};
    y = new_tensor(x_, shape, x_.scalar_type());
    s = new_tensor(x_, plain || !(keep || sum) ? none : shape, x_.scalar_type());
    if (!keep) return;
    mean = new_tensor(x_, rms ? none : rows, ScalarType::Float);
    rstd = new_tensor(x_, rows, ScalarType::Float);
  }

 private:
  static Rows checked(const Tensor& x) {
    check(x.dim() >= 1 && x.size(x.dim() - 1) > 0, "x: expected [..., cols]");
    return rows_of(x);
  }
  static Rows like(const Tensor& x, const Tensor& residual) {
    check_like(x, residual, "residual: expected shape, dtype and device of x");
    return rows_of(residual);
  }
};

struct NormBackwardTensors {
  Rows grad, grad_sum, s;  // grad_sum: s where there is none
  NormParameters parameters;
  Tensor mean, rstd;  // contiguous
  Tensor ds, dx, dweight, dbias;

  NormBackwardTensors(const Tensor& grad_, const OptionalTensor& grad_sum_, const Tensor& s_,
                      const OptionalTensor& weight, const Tensor& mean_, const Tensor& rstd_,
                      const OptionalTensor& seed, bool rms, bool need_weight, bool need_bias)
      : grad(like(s_, grad_, "grad: expected shape, dtype and device of s")),
        grad_sum(grad_sum_ ? like(s_, *grad_sum_, "grad_sum: expected shape, dtype and device of s") : grad),
        s(rows_of(s_)),
        parameters(s_, weight, std::nullopt),
        mean(as_contiguous(mean_)),
        rstd(as_contiguous(rstd_)) {
    const auto fits = [&](const Tensor& t) {
      return t.scalar_type() == ScalarType::Float && t.numel() == s.count && same_device(t, s_);
    };
    check(fits(rstd) && (rms || fits(mean)), "mean, rstd: expected float32 [rows]");
    const std::vector<int64_t> shape = shape_of(s_), none{0}, width{s.cols};
    ds = new_tensor(s_, shape, s_.scalar_type());
    dx = new_tensor(s_, seed ? shape : none, s_.scalar_type());
    // Without a row no kernel runs, and the sums are zero.
    const auto sums = [&](bool need) {
      if (need && s.count == 0) return torch::stable::new_zeros(s_, width, ScalarType::Float);
      return new_tensor(s_, need ? width : none, ScalarType::Float);
    };
    dweight = sums(need_weight);
    dbias = sums(need_bias);
  }

 private:
  static Rows like(const Tensor& s, const Tensor& other, const char* message) {
    check(s.dim() >= 1 && s.size(s.dim() - 1) > 0, "s: expected [..., cols]");
    check_like(s, other, message);
    return rows_of(other);
  }
};

}  // namespace fastdl
