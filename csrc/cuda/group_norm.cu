// fastdl::group_norm_forward, fastdl::group_norm_backward, CUDA key: checks, allocation, launches.
// Contract: fastdl/ops/group_norm.py.
#include "common/group_norm_tensors.h"
#include "cuda/group_norm_backward.cuh"
#include "cuda/wrapper.h"

namespace fastdl::cuda {
namespace {

template <class T>
const T* input(const Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}

ThreeTensors group_norm_forward(const Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias,
                                const OptionalTensor& scale, const OptionalTensor& shift, int64_t groups, double eps) {
  const Device device(x);
  const GroupNormForwardTensors t(x, weight, bias, scale, shift, groups);
  for_float_type(x, "x", [&](auto type) {
    using T = decltype(type);
    if (t.x.empty()) return;
    GroupNormForward<T> a{};
    a.x = input<T>(t.x.tensor);
    a.weight = t.weight.data();
    a.bias = t.bias.data();
    a.scale = t.scale.data();
    a.shift = t.shift.data();
    a.float_weight = t.weight.is_float;
    a.float_bias = t.bias.is_float;
    a.float_scale = t.scale.is_float;
    a.float_shift = t.shift.is_float;
    a.y = output<T>(t.y);
    a.mean = output<float>(t.mean);
    a.rstd = output<float>(t.rstd);
    a.rows = t.x.n * groups;
    a.groups = groups;
    a.width = t.shape.width;
    a.spatial = t.x.spatial;
    a.eps = static_cast<float>(eps);
    a.parts = part_count(a.rows, t.shape.row);
    const Tensor partial = new_tensor(x, {a.parts > 1 ? a.rows * a.parts * 2 : 0}, ScalarType::Float);
    a.partial = output<float>(partial);
    check_launch("group_norm_forward", group_norm_forward_launch(a, device.stream()));
  });
  return {t.y, t.mean, t.rstd};
}

FiveTensors group_norm_backward(const Tensor& grad, const Tensor& x, const OptionalTensor& weight,
                                const OptionalTensor& bias, const OptionalTensor& scale, const Tensor& mean,
                                const Tensor& rstd, int64_t groups, double, bool need_weight, bool need_bias,
                                bool need_scale, bool need_shift) {
  const Device device(x);
  const GroupNormBackwardTensors t(grad, x, weight, bias, scale, mean, rstd, groups, need_weight, need_bias, need_scale,
                                   need_shift);
  for_float_type(x, "x", [&](auto type) {
    using T = decltype(type);
    if (t.x.empty()) return;
    const Tensor sums = new_tensor(x, {2, t.x.n * t.x.channels}, ScalarType::Float);
    GroupNormBackward<T> a{};
    a.grad = input<T>(t.grad);
    a.x = input<T>(t.x.tensor);
    a.weight = t.weight.data();
    a.bias = t.bias.data();
    a.scale = t.scale.data();
    a.float_weight = t.weight.is_float;
    a.float_bias = t.bias.is_float;
    a.float_scale = t.scale.is_float;
    a.mean = input<float>(t.mean);
    a.rstd = input<float>(t.rstd);
    a.dx = output<T>(t.dx);
    a.sum = output<float>(sums);
    a.product = a.sum + t.x.n * t.x.channels;
    a.dweight = need_weight ? output<float>(t.dweight) : nullptr;
    a.dbias = need_bias ? output<float>(t.dbias) : nullptr;
    a.dscale = need_scale ? output<float>(t.dscale) : nullptr;
    a.dshift = need_shift ? output<float>(t.dshift) : nullptr;
    a.rows = t.x.n * groups;
    a.groups = groups;
    a.width = t.shape.width;
    a.spatial = t.x.spatial;
    a.parts = part_count(a.rows, t.shape.row);
    check_launch("group_norm_backward", group_norm_backward_launch(a, device.stream()));
  });
  return {t.dx, t.dweight, t.dbias, t.dscale, t.dshift};
}

}  // namespace

FASTDL_CUDA_LIBRARY(m) {
  m.impl("group_norm_forward", TORCH_BOX(&group_norm_forward));
  m.impl("group_norm_backward", TORCH_BOX(&group_norm_backward));
}

}  // namespace fastdl::cuda
