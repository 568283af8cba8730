// fastdl::rnn_forward, rnn_inference, rnn_backward, CUDA key: checks, allocation, launches. Contract: fastdl/ops/rnn.py.
#include "cuda/rnn.cuh"

#include <tuple>

#include "cuda/recurrent_loop.h"

namespace fastdl::cuda {
namespace {

struct RnnOutputs {
  Tensor y, h_n;
  OptionalTensor gates;  // none in inference
};

RnnOutputs run_forward(const Tensor& gates_x_, const Tensor& h0_, const Tensor& w_hh_, const OptionalTensor& ln_weight_,
                       const OptionalTensor& h_mask, const OptionalTensor& lengths, const OptionalTensor& seed,
                       double zoneout_h, double eps, bool relu, bool keep) {
  const Device device(gates_x_);
  const cudaStream_t stream = device.stream();
  const ScalarType dtype = gates_x_.scalar_type();
  const RecurrentSizes n(gates_x_, w_hh_, 1);
  const Tensor gates_x = expected("gates_x", gates_x_, gates_x_, n.rows(n.hidden), dtype);
  const Tensor h0 = expected("h0", h0_, gates_x, n.state(n.hidden), ScalarType::Float);
  const Tensor w_hh = expected("w_hh", w_hh_, gates_x, {n.directions, n.hidden, n.hidden}, dtype);
  const OptionalTensor ln_weight =
      expected("ln_weight", ln_weight_, gates_x, {n.directions, n.hidden}, ScalarType::Float);
  const RecurrentOptions options(n, gates_x, h_mask, lengths, seed);
  RnnOutputs out{new_tensor(gates_x, n.rows(n.hidden), dtype), new_floats(gates_x, n.state(n.hidden)), std::nullopt};
  if (keep) out.gates = new_tensor(gates_x, n.rows(n.hidden), dtype);
  for_float_type(gates_x, "gates_x", [&](auto type) {
    using T = decltype(type);
    RnnForward<T> a{};
    a.q = sequence_of(n, options, zoneout_h, 0.0, eps);
    a.gates_x = input<T>(gates_x);
    a.h0 = input<float>(h0);
    a.ln_weight = input<float>(ln_weight);
    a.y = output<T>(out.y);
    a.h_n = output<float>(out.h_n);
    a.gates = output<T>(out.gates);
    a.relu = relu;
    if (!ln_weight && run_persistent("rnn_forward", a, w_hh, false, stream, rnn_forward_persistent_launch<T>)) return;
    run_forward_loop("rnn_forward", a, w_hh, stream, [&](const LoopForward<T>& l, int64_t k) {
      check_launch("rnn_forward", rnn_forward_step_launch(a, l, k, stream));
    });
  });
  return out;
}

std::tuple<Tensor, Tensor, Tensor> rnn_forward(const Tensor& gates_x, const Tensor& h0, const Tensor& w_hh,
                                               const OptionalTensor& ln_weight, const OptionalTensor& h_mask,
                                               const OptionalTensor& lengths, const OptionalTensor& seed,
                                               double zoneout_h, double eps, bool relu) {
  const RnnOutputs out = run_forward(gates_x, h0, w_hh, ln_weight, h_mask, lengths, seed, zoneout_h, eps, relu, true);
  return {out.y, out.h_n, *out.gates};
}

std::tuple<Tensor, Tensor> rnn_inference(const Tensor& gates_x, const Tensor& h0, const Tensor& w_hh,
                                         const OptionalTensor& ln_weight, const OptionalTensor& h_mask,
                                         const OptionalTensor& lengths, const OptionalTensor& seed, double zoneout_h,
                                         double eps, bool relu, const OptionalTensor&) {
  const RnnOutputs out = run_forward(gates_x, h0, w_hh, ln_weight, h_mask, lengths, seed, zoneout_h, eps, relu, false);
  return {out.y, out.h_n};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> rnn_backward(const OptionalTensor& dy_, const OptionalTensor& dh_n_,
                                                        const OptionalTensor& dgates, const Tensor& gates_,
                                                        const Tensor&, const Tensor& w_hh_, const OptionalTensor& u,
                                                        const OptionalTensor& ln_weight, const OptionalTensor& h_mask,
                                                        const OptionalTensor& lengths, const OptionalTensor& seed,
                                                        double zoneout_h, double eps, bool relu) {
  check(!dgates, "dgates: the gradient of what a double backward asks for is the torch back end's");
  const Device device(gates_);
  const cudaStream_t stream = device.stream();
  const ScalarType dtype = gates_.scalar_type();
  const RecurrentSizes n(gates_, w_hh_, 1);
  const Tensor gates = expected("gates", gates_, gates_, n.rows(n.hidden), dtype);
  const Tensor w_hh = expected("w_hh", w_hh_, gates, {n.directions, n.hidden, n.hidden}, dtype);
  const OptionalTensor dy = expected("dy", dy_, gates, n.rows(n.hidden), dtype);
  const OptionalTensor dh_n = expected("dh_n", dh_n_, gates, n.state(n.hidden), ScalarType::Float);
  const RecurrentOptions options(n, gates, h_mask, lengths, seed);
  const ProductNorm norm(n, w_hh, 1, u, ln_weight);
  const Shape none{0};

  const Tensor da = new_tensor(gates, n.rows(n.hidden), dtype);
  const Tensor du = new_tensor(gates, norm.weight ? n.rows(n.hidden) : none, dtype);
  const Tensor dh0 = new_floats(gates, n.state(n.hidden));
  for_float_type(gates, "gates", [&](auto type) {
    using T = decltype(type);
    RnnBackward<T> a{};
    a.q = sequence_of(n, options, zoneout_h, 0.0, eps);
    a.dy = input<T>(dy);
    a.dh_n = input<float>(dh_n);
    a.gates = input<T>(gates);
    a.da = output<T>(da);
    a.dh0 = output<float>(dh0);
    a.relu = relu;
    if (!norm.weight && run_persistent("rnn_backward", a, w_hh, true, stream, rnn_backward_persistent_launch<T>))
      return;
    T* const du_out = norm.weight ? output<T>(du) : nullptr;
    run_backward_loop("rnn_backward", a, w_hh, norm, du_out, stream, [&](const LoopBackward<T>& l, int64_t k) {
      check_launch("rnn_backward", rnn_backward_step_launch(a, l, k, stream));
    });
  });
  return {da, du, dh0, norm.dweight};
}

}  // namespace

FASTDL_CUDA_LIBRARY(m) {
  m.impl("rnn_forward", TORCH_BOX(&rnn_forward));
  m.impl("rnn_inference", TORCH_BOX(&rnn_inference));
  m.impl("rnn_backward", TORCH_BOX(&rnn_backward));
}

}  // namespace fastdl::cuda
