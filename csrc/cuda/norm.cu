// fastdl::norm_forward, norm_inference, norm_backward, CUDA key: checks, allocation, launches. Contract: fastdl/ops/norm.py.
#include "common/norm_tensors.h"
#include "cuda/norm_backward.cuh"
#include "cuda/wrapper.h"

namespace fastdl::cuda {
namespace {

// Both forward ops: writes t's outputs.
void run_forward(const NormForwardTensors& t, const Tensor& x, const OptionalTensor& residual,
                 const OptionalTensor& seed, double p, double eps, double offset, bool rms) {
  const Device device(x);
  for_float_type(x, "x", [&](auto type) {
    using T = decltype(type);
    NormForward<T> a{};
    a.x = t.x.data<T>();
    a.residual = residual ? t.residual.data<T>() : nullptr;
    a.weight = pointer(t.parameters.weight);
    a.bias = pointer(t.parameters.bias);
    a.seed = seed_pointer(x, seed);
    a.y = output<T>(t.y);
    a.s = t.s.numel() > 0 ? output<T>(t.s) : nullptr;
    a.mean = t.mean && !rms ? output<float>(*t.mean) : nullptr;
    a.rstd = t.rstd ? output<float>(*t.rstd) : nullptr;
    a.rows = t.x.count;
    a.cols = t.x.cols;
    a.x_stride = t.x.stride;
    a.residual_stride = t.residual.stride;
    a.p = static_cast<float>(p);
    a.scale = keep_scale(p);
    a.eps = static_cast<float>(eps);
    a.offset = t.parameters.weight ? static_cast<float>(offset) : 0.0f;
    a.float_parameters = t.parameters.is_float;
    a.rms = rms;
    a.plain = t.plain;
    check_launch("norm_forward", norm_forward_launch(a, device.stream()));
  });
}

FourTensors norm_forward(const Tensor& x, const OptionalTensor& residual, const OptionalTensor& weight,
                         const OptionalTensor& bias, const OptionalTensor& seed, double p, double eps, double offset,
                         bool rms) {
  const Device device(x);
  const NormForwardTensors t(x, residual, weight, bias, seed, rms, true, true);
  run_forward(t, x, residual, seed, p, eps, offset, rms);
  return {t.y, t.s, *t.mean, *t.rstd};
}

TwoTensors norm_inference(const Tensor& x, const OptionalTensor& residual, const OptionalTensor& weight,
                          const OptionalTensor& bias, double eps, double offset, bool rms, bool sum) {
  const Device device(x);
  const NormForwardTensors t(x, residual, weight, bias, std::nullopt, rms, false, sum);
  run_forward(t, x, residual, std::nullopt, 0.0, eps, offset, rms);
  return {t.y, t.s};
}

FourTensors norm_backward(const Tensor& grad, const OptionalTensor& grad_sum, const Tensor& s,
                          const OptionalTensor& weight, const Tensor& mean, const Tensor& rstd,
                          const OptionalTensor& seed, double p, double, double offset, bool rms, bool need_weight,
                          bool need_bias) {
  const Device device(s);
  const NormBackwardTensors t(grad, grad_sum, s, weight, mean, rstd, seed, rms, need_weight, need_bias);
  for_float_type(s, "s", [&](auto type) {
    using T = decltype(type);
    NormBackward<T> a{};
    a.grad = t.grad.data<T>();
    a.grad_sum = grad_sum ? t.grad_sum.data<T>() : nullptr;
    a.s = t.s.data<T>();
    a.weight = pointer(t.parameters.weight);
    a.mean = rms ? nullptr : static_cast<const float*>(t.mean.const_data_ptr());
    a.rstd = static_cast<const float*>(t.rstd.const_data_ptr());
    a.seed = seed_pointer(s, seed);
    a.ds = output<T>(t.ds);
    a.dx = seed ? output<T>(t.dx) : nullptr;
    a.rows = t.s.count;
    a.cols = t.s.cols;
    a.grad_stride = t.grad.stride;
    a.grad_sum_stride = t.grad_sum.stride;
    a.s_stride = t.s.stride;
    a.p = static_cast<float>(p);
    a.scale = keep_scale(p);
    a.offset = weight ? static_cast<float>(offset) : 0.0f;
    a.float_parameters = t.parameters.is_float;
    const NormPlan plan = norm_backward_plan(a);
    a.parts = plan.parts;
    const bool sums = need_weight || need_bias;
    const std::vector<int64_t> partial_shape{2, sums ? plan.parts : 0, a.cols};
    const Tensor partial = new_tensor(s, partial_shape, ScalarType::Float);
    a.partial = sums ? output<float>(partial) : nullptr;
    check_launch("norm_backward", norm_backward_launch(a, plan, need_weight ? output<float>(t.dweight) : nullptr,
                                                       need_bias ? output<float>(t.dbias) : nullptr, device.stream()));
  });
  return {t.ds, t.dx, t.dweight, t.dbias};
}

}  // namespace

FASTDL_CUDA_LIBRARY(m) {
  m.impl("norm_forward", TORCH_BOX(&norm_forward));
  m.impl("norm_inference", TORCH_BOX(&norm_inference));
  m.impl("norm_backward", TORCH_BOX(&norm_backward));
}

}  // namespace fastdl::cuda
