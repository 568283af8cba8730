// What the CPU and CUDA wrappers of room group_norm share: checks for memory safety, and the outputs.
#pragma once

#include "common/images.h"

namespace fastdl {

struct GroupNormShape {
  int64_t groups, width, row;  // channels and elements of a group

  GroupNormShape(const Images& x, int64_t groups_) : groups(groups_) {
    check(groups > 0 && x.channels % groups == 0, "groups: expected a divisor of C");
    width = x.channels / groups;
    row = width * x.spatial;
    check(row < int64_t{1} << 31, "x: more than 2^31 elements in a group");
  }
};

struct GroupNormForwardTensors {
  Images x;
  GroupNormShape shape;
  Parameter weight, bias, scale, shift;
  Tensor y, mean, rstd;

  GroupNormForwardTensors(const Tensor& x_, const OptionalTensor& weight_, const OptionalTensor& bias_,
                          const OptionalTensor& scale_, const OptionalTensor& shift_, int64_t groups)
      : x(x_),
        shape(x, groups),
        weight(x_, weight_, {x.channels}, "weight: expected [C] in the dtype of x or float32"),
        bias(x_, bias_, {x.channels}, "bias: expected [C] in the dtype of x or float32"),
        scale(x_, scale_, {x.n, x.channels}, "scale: expected [N, C] in the dtype of x or float32"),
        shift(x_, shift_, {x.n, x.channels}, "shift: expected [N, C] in the dtype of x or float32"),
        y(new_tensor(x_, shape_of(x_), x_.scalar_type())),
        mean(float_output(x, true, {x.n, groups})),
        rstd(float_output(x, true, {x.n, groups})) {}
};

struct GroupNormBackwardTensors {
  Images x;
  GroupNormShape shape;
  Tensor grad;
  Parameter weight, bias, scale;
  Tensor mean, rstd, dx, dweight, dbias, dscale, dshift;

  GroupNormBackwardTensors(const Tensor& grad_, const Tensor& x_, const OptionalTensor& weight_,
                           const OptionalTensor& bias_, const OptionalTensor& scale_, const Tensor& mean_,
                           const Tensor& rstd_, int64_t groups, bool need_weight, bool need_bias, bool need_scale,
                           bool need_shift)
      : x(x_),
        shape(x, groups),
        grad(like(x_, grad_)),
        weight(x_, weight_, {x.channels}, "weight: expected [C] in the dtype of x or float32"),
        bias(x_, bias_, {x.channels}, "bias: expected [C] in the dtype of x or float32"),
        scale(x_, scale_, {x.n, x.channels}, "scale: expected [N, C] in the dtype of x or float32"),
        mean(statistic(mean_)),
        rstd(statistic(rstd_)),
        dx(new_tensor(x_, shape_of(x_), x_.scalar_type())),
        dweight(float_output(x, need_weight, {x.channels})),
        dbias(float_output(x, need_bias, {x.channels})),
        dscale(float_output(x, need_scale, {x.n, x.channels})),
        dshift(float_output(x, need_shift, {x.n, x.channels})) {}

 private:
  static Tensor like(const Tensor& x, const Tensor& grad) {
    check_like(x, grad, "grad: expected shape, dtype and device of x");
    return as_contiguous(grad);
  }
  Tensor statistic(const Tensor& t) const {
    check(t.scalar_type() == ScalarType::Float && t.numel() == x.n * shape.groups && same_device(t, x.tensor),
          "mean, rstd: expected float32 [N, groups]");
    return as_contiguous(t);
  }
};

}  // namespace fastdl
