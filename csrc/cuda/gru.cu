// fastdl::gru_forward, gru_inference, gru_backward, CUDA key: checks, allocation, launches. Contract: fastdl/ops/gru.py.
#include "cuda/gru.cuh"

#include <tuple>

#include "cuda/recurrent_loop.h"

namespace fastdl::cuda {
namespace {

struct GruOutputs {
  Tensor y, h_n;
  OptionalTensor gates;  // none in inference
};

GruOutputs run_forward(const Tensor& gates_x_, const Tensor& h0_, const Tensor& w_hh_, const OptionalTensor& bias_n_,
                       const OptionalTensor& ln_weight_, const OptionalTensor& h_mask, const OptionalTensor& lengths,
                       const OptionalTensor& seed, double zoneout_h, double eps, bool keep) {
  const Device device(gates_x_);
  const cudaStream_t stream = device.stream();
  const ScalarType dtype = gates_x_.scalar_type();
  const RecurrentSizes n(gates_x_, w_hh_, 3);
  const Tensor gates_x = expected("gates_x", gates_x_, gates_x_, n.rows(3 * n.hidden), dtype);
  const Tensor h0 = expected("h0", h0_, gates_x, n.state(n.hidden), ScalarType::Float);
  const Tensor w_hh = expected("w_hh", w_hh_, gates_x, {n.directions, 3 * n.hidden, n.hidden}, dtype);
  const OptionalTensor bias_n = expected("bias_n", bias_n_, gates_x, {n.directions, n.hidden}, ScalarType::Float);
  const OptionalTensor ln_weight =
      expected("ln_weight", ln_weight_, gates_x, {n.directions, 3 * n.hidden}, ScalarType::Float);
  const RecurrentOptions options(n, gates_x, h_mask, lengths, seed);
  GruOutputs out{new_tensor(gates_x, n.rows(n.hidden), dtype), new_floats(gates_x, n.state(n.hidden)), std::nullopt};
  if (keep) out.gates = new_tensor(gates_x, n.rows(4 * n.hidden), dtype);
  for_float_type(gates_x, "gates_x", [&](auto type) {
    using T = decltype(type);
    GruForward<T> a{};
    a.q = sequence_of(n, options, zoneout_h, 0.0, eps);
    a.gates_x = input<T>(gates_x);
    a.h0 = input<float>(h0);
    a.bias_n = input<float>(bias_n);
    a.ln_weight = input<float>(ln_weight);
    a.y = output<T>(out.y);
    a.h_n = output<float>(out.h_n);
    a.gates = output<T>(out.gates);
    if (!ln_weight && run_persistent("gru_forward", a, w_hh, false, stream, gru_forward_persistent_launch<T>)) return;
    run_forward_loop("gru_forward", a, w_hh, stream, [&](const LoopForward<T>& l, int64_t k) {
      check_launch("gru_forward", gru_forward_step_launch(a, l, k, stream));
    });
  });
  return out;
}

std::tuple<Tensor, Tensor, Tensor> gru_forward(const Tensor& gates_x, const Tensor& h0, const Tensor& w_hh,
                                               const OptionalTensor& bias_n, const OptionalTensor& ln_weight,
                                               const OptionalTensor& h_mask, const OptionalTensor& lengths,
                                               const OptionalTensor& seed, double zoneout_h, double eps) {
  const GruOutputs out = run_forward(gates_x, h0, w_hh, bias_n, ln_weight, h_mask, lengths, seed, zoneout_h, eps, true);
  return {out.y, out.h_n, *out.gates};
}

std::tuple<Tensor, Tensor> gru_inference(const Tensor& gates_x, const Tensor& h0, const Tensor& w_hh,
                                         const OptionalTensor& bias_n, const OptionalTensor& ln_weight,
                                         const OptionalTensor& h_mask, const OptionalTensor& lengths,
                                         const OptionalTensor& seed, double zoneout_h, double eps,
                                         const OptionalTensor&) {
  const GruOutputs out =
      run_forward(gates_x, h0, w_hh, bias_n, ln_weight, h_mask, lengths, seed, zoneout_h, eps, false);
  return {out.y, out.h_n};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> gru_backward(
    const OptionalTensor& dy_, const OptionalTensor& dh_n_, const OptionalTensor& dgates, const Tensor& gates_,
    const Tensor& y_, const Tensor& h0_, const Tensor& w_hh_, const OptionalTensor& u, const OptionalTensor& ln_weight,
    const OptionalTensor& h_mask, const OptionalTensor& lengths, const OptionalTensor& seed, double zoneout_h,
    double eps) {
  check(!dgates, "dgates: the gradient of what a double backward asks for is the torch back end's");
  const Device device(gates_);
  const cudaStream_t stream = device.stream();
  const ScalarType dtype = gates_.scalar_type();
  const RecurrentSizes n(gates_, w_hh_, 3);
  const Tensor gates = expected("gates", gates_, gates_, n.rows(4 * n.hidden), dtype);
  const Tensor y = expected("y", y_, gates, n.rows(n.hidden), dtype);
  const Tensor h0 = expected("h0", h0_, gates, n.state(n.hidden), ScalarType::Float);
  const Tensor w_hh = expected("w_hh", w_hh_, gates, {n.directions, 3 * n.hidden, n.hidden}, dtype);
  const OptionalTensor dy = expected("dy", dy_, gates, n.rows(n.hidden), dtype);
  const OptionalTensor dh_n = expected("dh_n", dh_n_, gates, n.state(n.hidden), ScalarType::Float);
  const RecurrentOptions options(n, gates, h_mask, lengths, seed);
  const ProductNorm norm(n, w_hh, 3, u, ln_weight);

  const Tensor da = new_tensor(gates, n.rows(3 * n.hidden), dtype), du = new_tensor(gates, shape_of(da), dtype);
  const Tensor dh0 = new_floats(gates, n.state(n.hidden)), dbias_n = new_floats(gates, {n.directions, n.hidden});
  const Tensor bias_sums = new_zero_floats(gates, {n.batch, n.directions, n.hidden});
  for_float_type(gates, "gates", [&](auto type) {
    using T = decltype(type);
    GruBackward<T> a{};
    a.q = sequence_of(n, options, zoneout_h, 0.0, eps);
    a.dy = input<T>(dy);
    a.dh_n = input<float>(dh_n);
    a.gates = input<T>(gates);
    a.y = input<T>(y);
    a.h0 = input<float>(h0);
    a.da = output<T>(da);
    a.du = output<T>(du);
    a.dh0 = output<float>(dh0);
    a.bias_sums = output<float>(bias_sums);
    if (!norm.weight && run_persistent("gru_backward", a, w_hh, true, stream, gru_backward_persistent_launch<T>))
      return;
    run_backward_loop("gru_backward", a, w_hh, norm, output<T>(du), stream, [&](const LoopBackward<T>& l, int64_t k) {
      check_launch("gru_backward", gru_backward_step_launch(a, l, k, stream));
    });
  });
  check_launch("gru_backward", recurrent_sum_launch(input<float>(bias_sums), output<float>(dbias_n), nullptr, n.batch,
                                                    n.directions * n.hidden, stream));
  return {da, du, dh0, dbias_n, norm.dweight};
}

}  // namespace

FASTDL_CUDA_LIBRARY(m) {
  m.impl("gru_forward", TORCH_BOX(&gru_forward));
  m.impl("gru_inference", TORCH_BOX(&gru_inference));
  m.impl("gru_backward", TORCH_BOX(&gru_backward));
}

}  // namespace fastdl::cuda
