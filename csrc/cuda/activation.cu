// fastdl::activation_forward, activation_backward, glu_forward, glu_backward, CUDA key: checks, allocation, launches.
// Contract: fastdl/ops/activation.py.
#include "cuda/activation.cuh"

#include "common/activation_tensors.h"
#include "cuda/wrapper.h"

namespace fastdl::cuda {
namespace {

template <class T>
Activation<T> arguments(const ActivationTensors& t, const Tensor& x, const OptionalTensor& beta,
                        const OptionalTensor& seed, int64_t kind, double alpha, double p, const Tensor& y) {
  Activation<T> a{};
  a.x = t.x.data<T>();
  a.bias = pointer(t.bias);
  a.beta = static_cast<const float*>(pointer(beta));
  a.seed = seed_pointer(x, seed);
  a.y = output<T>(y);
  a.rows = t.x.count;
  a.cols = t.x.cols;
  a.x_stride = t.x.stride;
  a.other_stride = t.other.stride;
  a.channels = t.channels;
  a.p = static_cast<float>(p);
  a.scale = keep_scale(p);
  a.alpha = static_cast<float>(alpha);
  a.kind = checked_kind(kind);
  a.float_bias = t.float_bias;
  a.mask_by_row = t.mask_by_row;
  return a;
}

Tensor activation_forward(const Tensor& x, const OptionalTensor& bias, const OptionalTensor& residual,
                          const OptionalTensor& beta, const OptionalTensor& seed, int64_t kind, double alpha, double p,
                          int64_t inner, bool by_channel) {
  const Device device(x);
  const ActivationTensors t(x, residual, bias, beta, inner, by_channel);
  const Tensor y = new_tensor(x, shape_of(x), x.scalar_type());
  if (x.numel() == 0) return y;
  for_float_type(x, "x", [&](auto type) {
    using T = decltype(type);
    Activation<T> a = arguments<T>(t, x, beta, seed, kind, alpha, p, y);
    a.other = residual ? t.other.data<T>() : nullptr;
    check_launch("activation_forward", activation_forward_launch(a, device.stream()));
  });
  return y;
}

ThreeTensors activation_backward(const Tensor& grad, const Tensor& x, const OptionalTensor& bias,
                                 const OptionalTensor& beta, const OptionalTensor& seed, int64_t kind, double alpha,
                                 double p, int64_t inner, bool by_channel, bool need_bias, bool need_beta) {
  check(!need_bias || bias, "need_bias: there is no bias");
  const Device device(x);
  const ActivationTensors t(x, grad, bias, beta, inner, by_channel);
  const Tensor dx = new_tensor(x, shape_of(x), x.scalar_type());
  const Tensor dbias = activation_sum(x, bias ? bias->numel() : 0, need_bias), dbeta = activation_sum(x, 1, need_beta);
  if (x.numel() == 0) return {dx, dbias, dbeta};
  for_float_type(x, "x", [&](auto type) {
    using T = decltype(type);
    Activation<T> a = arguments<T>(t, x, beta, seed, kind, alpha, p, dx);
    a.other = t.other.data<T>();
    const ElementPlan plan = activation_plan(a);
    const int64_t bias_sums = !need_bias ? 0 : t.channels ? a.rows * plan.tiles : plan.parts * a.cols;
    const std::vector<int64_t> bias_shape{bias_sums}, beta_shape{need_beta ? plan.parts * plan.tiles : 0};
    const Tensor sums = new_tensor(x, bias_shape, ScalarType::Float);
    const Tensor betas = new_tensor(x, beta_shape, ScalarType::Float);
    if (need_bias) (t.channels ? a.row_sums : a.columns) = output<float>(sums);
    if (need_beta) a.betas = output<float>(betas);
    check_launch("activation_backward",
                 activation_backward_launch(a, plan, need_bias ? output<float>(dbias) : nullptr,
                                            need_beta ? output<float>(dbeta) : nullptr, device.stream()));
  });
  return {dx, dbias, dbeta};
}

template <class T>
Glu<T> glu_arguments(const GluTensors& t, int64_t kind) {
  Glu<T> a{};
  a.gate = t.gate.data<T>();
  a.up = t.up.data<T>();
  a.rows = t.gate.count;
  a.cols = t.gate.cols;
  a.gate_stride = t.gate.stride;
  a.up_stride = t.up.stride;
  a.grad_stride = t.grad.stride;
  a.kind = checked_kind(kind);
  return a;
}

Tensor glu_forward(const Tensor& gate, const Tensor& up, int64_t kind) {
  const Device device(gate);
  const GluTensors t(gate, up, gate);
  const Tensor y = new_tensor(gate, shape_of(gate), gate.scalar_type());
  if (gate.numel() == 0) return y;
  for_float_type(gate, "gate", [&](auto type) {
    using T = decltype(type);
    Glu<T> a = glu_arguments<T>(t, kind);
    a.y = output<T>(y);
    check_launch("glu_forward", glu_launch(a, device.stream()));
  });
  return y;
}

std::tuple<Tensor, Tensor> glu_backward(const Tensor& grad, const Tensor& gate, const Tensor& up, int64_t kind) {
  const Device device(gate);
  const GluTensors t(gate, up, grad);
  const Tensor dgate = new_tensor(gate, shape_of(gate), gate.scalar_type());
  const Tensor dup = new_tensor(gate, shape_of(gate), gate.scalar_type());
  if (gate.numel() == 0) return {dgate, dup};
  for_float_type(gate, "gate", [&](auto type) {
    using T = decltype(type);
    Glu<T> a = glu_arguments<T>(t, kind);
    a.grad = t.grad.data<T>();
    a.dgate = output<T>(dgate);
    a.dup = output<T>(dup);
    check_launch("glu_backward", glu_launch(a, device.stream()));
  });
  return {dgate, dup};
}

}  // namespace

FASTDL_CUDA_LIBRARY(m) {
  m.impl("activation_forward", TORCH_BOX(&activation_forward));
  m.impl("activation_backward", TORCH_BOX(&activation_backward));
  m.impl("glu_forward", TORCH_BOX(&glu_forward));
  m.impl("glu_backward", TORCH_BOX(&glu_backward));
}

}  // namespace fastdl::cuda
