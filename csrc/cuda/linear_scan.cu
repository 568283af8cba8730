// fastdl::linear_scan_forward, fastdl::linear_scan_backward, CUDA key: checks, allocation, launches.
// Contract: fastdl/ops/linear_scan.py.
#include "common/linear_scan_tensors.h"
#include "cuda/linear_scan.cuh"
#include "cuda/wrapper.h"

namespace fastdl::cuda {
namespace {

// body(T{}): the dtype's type, a complex one too.
template <class Body>
void for_scan_type(const Tensor& x, const Body& body) {
  if (scan_complex(x)) return body(complex_t{});
  for_float_type(x, "b", body);
}

template <class T>
const T* input(const Steps& x) {
  return reinterpret_cast<const T*>(x.data());
}

// Sizes, h0 and the cut of time; `memory` then holds what chunks need.
template <class T>
LinearScan<T> plan(const LinearScanTensors& t, const Tensor& like, Tensor& memory) {
  using N = Number<T>;
  LinearScan<T> s{};
  s.batch = t.batch;
  s.length = t.length;
  s.channels = t.channels;
  s.h0 = static_cast<const N*>(pointer(t.h0));
  linear_scan_plan(s);
  if (s.chunks == 1) return s;
  const int64_t each = s.chunks * s.batch * s.channels;
  memory = new_tensor(like, {3 * each}, t.state_type());
  s.products = output<N>(memory);
  s.ends = s.products + each;
  s.states = s.ends + each;
  return s;
}

template <class T>
void set_out(LinearScan<T>& s, const Tensor& out, bool reverse) {
  const Steps steps = steps_of(out, reverse);
  s.out = reinterpret_cast<T*>(steps.mutable_data());
  s.out_batch = steps.batch;
  s.out_step = steps.step;
}

template <class T>
void set_a(LinearScan<T>& s, const Steps& a, const Steps& b) {
  s.a = input<T>(a);
  s.a_batch = a.batch;
  s.a_step = a.step;
  s.b = input<T>(b);
  s.b_batch = b.batch;
  s.b_step = b.step;
}

Tensor linear_scan_forward(const Tensor& a, const Tensor& b, const OptionalTensor& h0, bool reverse) {
  const Device device(b);
  const LinearScanForward t(a, b, h0, reverse);
  for_scan_type(b, [&](auto type) {
    using T = decltype(type);
    if (t.empty()) return;
    Tensor memory;
    LinearScan<T> s = plan<T>(t, b, memory);
    set_a(s, t.a, t.b);
    set_out(s, t.h, reverse);
    check_launch("linear_scan_forward", linear_scan_launch<false>(s, device.stream()));
  });
  return t.h;
}

ThreeTensors linear_scan_backward(const Tensor& grad, const Tensor& a, const Tensor& h, const OptionalTensor& h0,
                                  bool reverse, bool need_a) {
  const Device device(h);
  const LinearScanBackward t(grad, a, h, h0, reverse, need_a);
  for_scan_type(h, [&](auto type) {
    using T = decltype(type);
    if (t.empty()) return;
    Tensor memory;
    LinearScan<T> s = plan<T>(t, h, memory);
    set_a(s, t.a, t.grad);
    s.h = input<T>(t.h);
    s.h_batch = t.h.batch;
    s.h_step = t.h.step;
    set_out(s, t.db, reverse);
    s.da = need_a ? reinterpret_cast<T*>(steps_of(t.da, reverse).mutable_data()) : nullptr;
    s.dh0 = output<Number<T>>(t.dh0);
    check_launch("linear_scan_backward", linear_scan_launch<true>(s, device.stream()));
  });
  return {t.da, t.db, t.dh0};
}

}  // namespace

FASTDL_CUDA_LIBRARY(m) {
  m.impl("linear_scan_forward", TORCH_BOX(&linear_scan_forward));
  m.impl("linear_scan_backward", TORCH_BOX(&linear_scan_backward));
}

}  // namespace fastdl::cuda
