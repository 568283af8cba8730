// fastdl::batch_norm_forward, fastdl::batch_norm_backward, CUDA key: checks, allocation, launches.
// Contract: fastdl/ops/batch_norm.py.
#include "common/batch_norm_tensors.h"
#include "cuda/batch_norm_backward.cuh"
#include "cuda/wrapper.h"

namespace fastdl::cuda {
namespace {

template <class T>
const T* input(const Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}

ThreeTensors batch_norm_forward(const Tensor& x, const OptionalTensor& residual, const OptionalTensor& weight,
                                const OptionalTensor& bias, const OptionalTensor& mean, const OptionalTensor& var,
                                double eps, bool relu) {
  const Device device(x);
  const BatchNormForwardTensors t(x, residual, weight, bias, mean, var);
  for_float_type(x, "x", [&](auto type) {
    using T = decltype(type);
    if (t.x.empty()) return;
    BatchNormForward<T> a{};
    a.x = input<T>(t.x.tensor);
    a.residual = static_cast<const T*>(pointer(t.residual));
    a.weight = t.weight.data();
    a.bias = t.bias.data();
    a.float_weight = t.weight.is_float;
    a.float_bias = t.bias.is_float;
    a.mean = input<float>(t.mean);
    a.var = input<float>(t.var);
    a.batch_mean = t.training ? output<float>(t.batch_mean) : nullptr;
    a.batch_var = t.training ? output<float>(t.batch_var) : nullptr;
    a.y = output<T>(t.y);
    a.plan = batch_norm_plan(t.x.n, t.x.channels, t.x.spatial);
    a.eps = static_cast<float>(eps);
    a.relu = relu;
    const Tensor partial = new_tensor(x, {t.training ? a.plan.parts * 2 * a.plan.units : 0}, ScalarType::Float);
    a.partial = output<float>(partial);
    check_launch("batch_norm_forward", batch_norm_forward_launch(a, device.stream()));
  });
  return {t.y, t.batch_mean, t.batch_var};
}

FourTensors batch_norm_backward(const Tensor& grad, const Tensor& x, const OptionalTensor& y,
                                const OptionalTensor& weight, const Tensor& mean, const Tensor& var, double eps,
                                bool training, bool need_residual, bool need_weight, bool need_bias) {
  const Device device(x);
  const BatchNormBackwardTensors t(grad, x, y, weight, mean, var, need_residual, need_weight, need_bias);
  for_float_type(x, "x", [&](auto type) {
    using T = decltype(type);
    if (t.x.empty()) return;
    BatchNormBackward<T> a{};
    a.grad = input<T>(t.grad);
    a.x = input<T>(t.x.tensor);
    a.y = static_cast<const T*>(pointer(t.y));
    a.weight = t.weight.data();
    a.float_weight = t.weight.is_float;
    a.mean = input<float>(t.mean);
    a.var = input<float>(t.var);
    a.dx = output<T>(t.dx);
    a.dresidual = need_residual ? output<T>(t.dresidual) : nullptr;
    a.dweight = need_weight ? output<float>(t.dweight) : nullptr;
    a.dbias = need_bias ? output<float>(t.dbias) : nullptr;
    a.plan = batch_norm_plan(t.x.n, t.x.channels, t.x.spatial);
    a.eps = static_cast<float>(eps);
    a.training = training;
    const bool sums = training || need_weight || need_bias;
    const int64_t parts = a.plan.parts * 2 * a.plan.units;
    const Tensor partial = new_tensor(x, {sums ? parts + 2 * t.x.channels : 0}, ScalarType::Float);
    a.partial = sums ? output<float>(partial) : nullptr;
    a.sums = sums ? a.partial + parts : nullptr;
    check_launch("batch_norm_backward", batch_norm_backward_launch(a, device.stream()));
  });
  return {t.dx, t.dresidual, t.dweight, t.dbias};
}

}  // namespace

FASTDL_CUDA_LIBRARY(m) {
  m.impl("batch_norm_forward", TORCH_BOX(&batch_norm_forward));
  m.impl("batch_norm_backward", TORCH_BOX(&batch_norm_backward));
}

}  // namespace fastdl::cuda
