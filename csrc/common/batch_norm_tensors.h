// What the CPU and CUDA wrappers of room batch_norm share: checks for memory safety, and the outputs.
#pragma once

#include "common/images.h"

namespace fastdl {

// mean and var of every channel: float32 [C].
inline Tensor batch_norm_statistic(const Images& x, const Tensor& t) {
  check(t.scalar_type() == ScalarType::Float && t.dim() == 1 && t.numel() == x.channels && same_device(t, x.tensor),
        "mean, var: expected float32 [C] on the device of x");
  return as_contiguous(t);
}

struct BatchNormForwardTensors {
  Images x;
  OptionalTensor residual;
  Parameter weight, bias;
  bool training;
  Tensor y, batch_mean, batch_var;
  Tensor mean, var;  // given, or those of the batch

  BatchNormForwardTensors(const Tensor& x_, const OptionalTensor& residual_, const OptionalTensor& weight_,
                          const OptionalTensor& bias_, const OptionalTensor& mean_, const OptionalTensor& var_)
      : x(x_),
        weight(x_, weight_, {x.channels}, "weight: expected [C] in the dtype of x or float32"),
        bias(x_, bias_, {x.channels}, "bias: expected [C] in the dtype of x or float32"),
        training(!mean_ || !var_),
        y(new_tensor(x_, shape_of(x_), x_.scalar_type())),
        batch_mean(float_output(x, training, {x.channels})),
        batch_var(float_output(x, training, {x.channels})),
        mean(training ? batch_mean : batch_norm_statistic(x, *mean_)),
        var(training ? batch_var : batch_norm_statistic(x, *var_)) {
    check(!mean_ == !var_, "mean, var: expected both or neither");
    if (!residual_) return;
    check_like(x_, *residual_, "residual: expected shape, dtype and device of x");
    residual = as_contiguous(*residual_);
  }
};

struct BatchNormBackwardTensors {
  Images x;
  Tensor grad;
  OptionalTensor y;
  Parameter weight;
  Tensor mean, var;
  Tensor dx, dresidual, dweight, dbias;

  BatchNormBackwardTensors(const Tensor& grad_, const Tensor& x_, const OptionalTensor& y_,
                           const OptionalTensor& weight_, const Tensor& mean_, const Tensor& var_, bool need_residual,
                           bool need_weight, bool need_bias)
      : x(x_),
        grad(like(x_, grad_, "grad: expected shape, dtype and device of x")),
        weight(x_, weight_, {x.channels}, "weight: expected [C] in the dtype of x or float32"),
        mean(batch_norm_statistic(x, mean_)),
        var(batch_norm_statistic(x, var_)),
        dx(new_tensor(x_, shape_of(x_), x_.scalar_type())),
        dresidual(new_tensor(x_, need_residual ? shape_of(x_) : std::vector<int64_t>{0}, x_.scalar_type())),
        dweight(float_output(x, need_weight, {x.channels})),
        dbias(float_output(x, need_bias, {x.channels})) {
    if (y_) y = like(x_, *y_, "y: expected shape, dtype and device of x");
  }

 private:
  static Tensor like(const Tensor& x, const Tensor& other, const char* message) {
    check_like(x, other, message);
    return as_contiguous(other);
  }
};

}  // namespace fastdl
