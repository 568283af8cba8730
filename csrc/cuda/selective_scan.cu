// fastdl::selective_scan_forward, fastdl::selective_scan_backward, CUDA key: checks, allocation, launches.
// Contract: fastdl/ops/selective_scan.py.
#include "common/selective_scan_tensors.h"
#include "cuda/selective_scan_backward.cuh"
#include "cuda/wrapper.h"

namespace fastdl::cuda {
namespace {

template <class T>
ScanTrack<T> track(const Steps& x) {
  return {reinterpret_cast<const T*>(x.data()), x.batch, x.step};
}

const float* floats(const OptionalTensor& t) { return static_cast<const float*>(pointer(t)); }

// Everything but the outputs; `memory` then holds what segments need.
template <class T>
SelectiveScan<T> plan(const SelectiveScanTensors& t, const Tensor& like, bool softplus, Tensor& memory) {
  check(t.state <= 128, "A: expected at most 128 states");
  SelectiveScan<T> s{};
  s.x = track<T>(t.x);
  s.delta = track<T>(t.delta);
  if (t.gated) s.z = track<T>(t.z);
  s.b = track<T>(t.b);
  s.c = track<T>(t.c);
  s.a = static_cast<const float*>(t.a.const_data_ptr());
  s.d = floats(t.d);
  s.bias = floats(t.delta_bias);
  s.batch = t.batch;
  s.length = t.length;
  s.dim = t.dim;
  s.state = t.state;
  s.chunks = t.chunks;
  s.softplus = softplus;
  selective_scan_plan(s, selective_channels(t.state));
  if (s.segments == 1) return s;
  const int64_t channels = s.segments * t.batch * t.dim;
  memory = new_tensor(like, {channels * (2 * t.state + 1)}, ScalarType::Float);
  s.ends = output<float>(memory);
  s.before = s.ends + channels * t.state;
  s.spans = s.before + channels * t.state;
  return s;
}

// The state where no step changes it.
Tensor passed_on(const SelectiveScanTensors& t, const Tensor& x, const OptionalTensor& given) {
  return given ? torch::stable::clone(*given)
               : torch::stable::new_zeros(x, {t.batch, t.dim, t.state}, ScalarType::Float);
}

ThreeTensors selective_scan_forward(const Tensor& x, const Tensor& delta, const Tensor& a, const Tensor& b,
                                    const Tensor& c, const OptionalTensor& d, const OptionalTensor& z,
                                    const OptionalTensor& delta_bias, const OptionalTensor& h0, bool softplus,
                                    bool keep) {
  const Device device(x);
  const SelectiveScanTensors t(x, delta, a, b, c, d, z, delta_bias, h0);
  const auto [y, last, states] = selective_scan_outputs(t, x, keep);
  if (t.empty()) return {y, passed_on(t, x, t.h0), states};
  for_float_type(x, "x", [&](auto type) {
    using T = decltype(type);
    Tensor memory;
    SelectiveScan<T> s = plan<T>(t, x, softplus, memory);
    s.first = floats(t.h0);
    s.last = output<float>(last);
    s.states = keep ? output<float>(states) : nullptr;
    s.y = output<T>(y);
    check_launch("selective_scan_forward", selective_scan_forward_launch(s, device.stream()));
  });
  return {y, last, states};
}

NineTensors selective_scan_backward(const Tensor& grad, const OptionalTensor& grad_last, const Tensor& x,
                                    const Tensor& delta, const Tensor& a, const Tensor& b, const Tensor& c,
                                    const OptionalTensor& d, const OptionalTensor& z, const OptionalTensor& delta_bias,
                                    const OptionalTensor& h0, const Tensor& states, bool softplus) {
  const Device device(x);
  const SelectiveScanTensors t(x, delta, a, b, c, d, z, delta_bias, h0);
  const int64_t each = t.dim * t.state;
  const OptionalTensor last = t.floats(x, grad_last, t.batch * each, "grad_last: expected float32 [batch, dim, state]");
  check(states.scalar_type() == ScalarType::Float && states.is_contiguous() && same_device(states, x) &&
            states.numel() == t.batch * t.chunks * each,
        "states: expected those that the forward pass kept");
  NineTensors out = selective_scan_gradients(t, x);
  auto& [dx, ddelta, dz, db, dc, da, dd, dbias, dh0] = out;
  if (t.empty()) {
    dh0 = passed_on(t, x, last);
    return out;
  }
  const Steps steps = t.like(x, grad);
  const auto& to = out;
  for_float_type(x, "x", [&](auto type) {
    using T = decltype(type);
    Tensor memory;
    SelectiveScan<T> s = plan<T>(t, x, softplus, memory);
    const int64_t channels = selective_channels(t.state), blocks = (t.dim + channels - 1) / channels;
    const int64_t rows = 2 * blocks * t.batch * t.length * t.state, parts = s.segments * t.batch;
    const Tensor partial = new_tensor(x, {rows + parts * (each + 2 * t.dim)}, ScalarType::Float);
    s.parts_bc = output<float>(partial);
    s.parts_a = s.parts_bc + rows;
    s.parts_d = s.parts_a + parts * each;
    s.grad = track<T>(steps);
    s.first = floats(last);
    s.states = output<float>(states);
    s.dx = output<T>(std::get<0>(to));
    s.ddelta = output<T>(std::get<1>(to));
    s.dz = output<T>(std::get<2>(to));
    s.last = output<float>(std::get<8>(to));
    check_launch("selective_scan_backward",
                 selective_scan_backward_launch(s, output<float>(std::get<3>(to)), output<float>(std::get<4>(to)),
                                                output<float>(std::get<5>(to)), output<float>(std::get<6>(to)),
                                                output<float>(std::get<7>(to)), device.stream()));
  });
  return out;
}

}  // namespace

FASTDL_CUDA_LIBRARY(m) {
  m.impl("selective_scan_forward", TORCH_BOX(&selective_scan_forward));
  m.impl("selective_scan_backward", TORCH_BOX(&selective_scan_backward));
}

}  // namespace fastdl::cuda
