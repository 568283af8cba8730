// fastdl::position_forward, position_backward, CUDA key: checks, allocation, launches. Contract: fastdl/ops/position.py.
#include "cuda/position.cuh"

#include "common/position_tensors.h"
#include "cuda/wrapper.h"

namespace fastdl::cuda {
namespace {

template <class T>
Position<T> arguments(const PositionTensors& t, const Tensor& x, int64_t start, const OptionalTensor& seed, double p,
                      double scale) {
  Position<T> a{};
  a.x = t.x.data<T>();
  a.positions = t.position_data();
  a.seed = seed_pointer(x, seed);
  a.rows = t.x.count;
  a.cols = t.x.cols;
  a.x_stride = t.x.stride;
  a.n = t.n;
  a.entries = t.entries;
  a.inner = t.inner;
  a.start = start;
  a.p = static_cast<float>(p);
  a.keep = keep_scale(p);
  a.scale = static_cast<float>(scale);
  return a;
}

Tensor position_forward(const Tensor& x, const Tensor& table, const OptionalTensor& positions, int64_t start,
                        const OptionalTensor& seed, double p, double scale) {
  const Device device(x);
  const PositionTensors t(x, positions);
  const PositionTable added(x, table);
  t.check_table(start, table.size(0));
  const Tensor y = new_tensor(x, shape_of(x), x.scalar_type());
  if (x.numel() == 0) return y;
  for_float_type(x, "x", [&](auto type) {
    using T = decltype(type);
    Position<T> a = arguments<T>(t, x, start, seed, p, scale);
    a.table = added.table.const_data_ptr();
    a.table_len = table.size(0);
    a.float_table = added.is_float;
    a.y = output<T>(y);
    check_launch("position_forward", position_forward_launch(a, device.stream()));
  });
  return y;
}

std::tuple<Tensor, Tensor> position_backward(const Tensor& grad, const OptionalTensor& positions,
                                             const OptionalTensor& order, const OptionalTensor& begin, int64_t start,
                                             const OptionalTensor& seed, double p, double scale, int64_t table_len,
                                             bool need_x, bool need_table) {
  const Device device(grad);
  const PositionTensors t(grad, positions);
  const PositionGradient out(t, grad, order, begin, start, table_len, need_x, need_table);
  if (grad.numel() == 0 || (!need_x && !need_table)) return {out.dx, out.dtable};
  for_float_type(grad, "grad", [&](auto type) {
    using T = decltype(type);
    Position<T> a = arguments<T>(t, grad, start, seed, p, scale);
    a.table_len = table_len;
    a.y = need_x ? output<T>(out.dx) : nullptr;
    if (!need_table) return check_launch("position_backward", position_forward_launch(a, device.stream()));
    a.dtable = output<float>(out.dtable);
    a.order = static_cast<const int64_t*>(pointer(out.order));
    a.begin = static_cast<const int64_t*>(pointer(out.begin));
    check_launch("position_backward", position_backward_launch(a, device.stream()));
  });
  return {out.dx, out.dtable};
}

}  // namespace

FASTDL_CUDA_LIBRARY(m) {
  m.impl("position_forward", TORCH_BOX(&position_forward));
  m.impl("position_backward", TORCH_BOX(&position_backward));
}

}  // namespace fastdl::cuda
