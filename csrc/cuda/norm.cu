// fastdl::norm_forward, fastdl::norm_backward, CUDA key: checks, allocation, launches. Contract: fastdl/ops/norm.py.
#include "common/rows.h"
#include "cuda/norm_backward.cuh"
#include "cuda/wrapper.h"

#include <optional>
#include <tuple>

namespace fastdl::cuda {
namespace {

using Optional = std::optional<Tensor>;
using torch::stable::contiguous;
using torch::stable::new_empty;
using torch::stable::new_zeros;

struct Parameters {
  std::optional<Tensor> weight, bias;  // contiguous
  bool is_float = false;
};

Parameters parameters(const Tensor& x, const Optional& weight, const Optional& bias) {
  Parameters found;
  const auto take = [&](const Optional& given, Optional& to, const char* message) {
    if (!given) return;
    check((given->scalar_type() == x.scalar_type() || given->scalar_type() == ScalarType::Float) &&
              given->numel() == x.size(x.dim() - 1) && same_device(*given, x),
          message);
    to = contiguous(*given);
    found.is_float = given->scalar_type() == ScalarType::Float;
  };
  take(weight, found.weight, "weight: expected [cols], in the dtype of x or float32");
  take(bias, found.bias, "bias: expected [cols], in the dtype of x or float32");
  check(!weight || !bias || weight->scalar_type() == bias->scalar_type(), "weight, bias: expected one dtype");
  return found;
}

const int64_t* seed_pointer(const Tensor& x, const Optional& seed) {
  if (!seed) return nullptr;
  check(seed->scalar_type() == ScalarType::Long && seed->numel() == 1 && same_device(*seed, x),
        "seed: expected int64 [1] on the device of x");
  return static_cast<const int64_t*>(seed->const_data_ptr());
}

template <class T>
T* output(const Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

const void* pointer(const Optional& t) { return t ? t->const_data_ptr() : nullptr; }

float keep_scale(double p) { return p >= 1 ? 0.0f : static_cast<float>(1.0 / (1.0 - p)); }

void check_like(const Tensor& x, const Optional& other, const char* message) {
  if (!other) return;
  bool same = other->scalar_type() == x.scalar_type() && same_device(*other, x) && other->dim() == x.dim();
  for (int64_t d = 0; same && d < x.dim(); ++d) same = other->size(d) == x.size(d);
  check(same, message);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> norm_forward(const Tensor& x, const Optional& residual, const Optional& weight,
                                                        const Optional& bias, const Optional& seed, double p, double eps,
                                                        double offset, bool rms) {
  check(x.dim() >= 1 && x.size(x.dim() - 1) > 0, "x: expected [..., cols]");
  check_like(x, residual, "residual: expected shape, dtype and device of x");
  const Device device(x);
  const Rows in = rows_of(x);
  const Optional other = residual ? Optional(*residual) : std::nullopt;
  const Rows add = other ? rows_of(*other) : in;
  const Parameters affine = parameters(x, weight, bias);
  std::vector<int64_t> shape, lead;
  for (int64_t d = 0; d < x.dim(); ++d) shape.push_back(x.size(d));
  lead.assign(shape.begin(), shape.end() - 1);
  const std::vector<int64_t> none{0};
  const bool plain = !residual && !seed;
  Tensor y = new_empty(x, shape), s = new_empty(x, plain ? none : shape);
  Tensor mean = new_empty(x, rms ? none : lead, ScalarType::Float), rstd = new_empty(x, lead, ScalarType::Float);
  for_float_type(x, "x", [&](auto type) {
    using T = decltype(type);
    const NormForward<T> a{in.data<T>(),
                           residual ? add.data<T>() : nullptr,
                           pointer(affine.weight),
                           pointer(affine.bias),
                           seed_pointer(x, seed),
                           output<T>(y),
                           plain ? nullptr : output<T>(s),
                           rms ? nullptr : output<float>(mean),
                           output<float>(rstd),
                           in.count,
                           in.cols,
                           in.stride,
                           add.stride,
                           static_cast<float>(p),
                           keep_scale(p),
                           static_cast<float>(eps),
                           weight ? static_cast<float>(offset) : 0.0f,
                           affine.is_float};
    check_launch("norm_forward", norm_forward_launch(a, device.stream()));
  });
  return {y, s, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> norm_backward(const Tensor& grad, const Optional& grad_sum, const Tensor& s,
                                                         const Optional& weight, const Tensor& mean, const Tensor& rstd,
                                                         const Optional& seed, double p, double, double offset, bool rms,
                                                         bool need_weight, bool need_bias) {
  check(s.dim() >= 1 && s.size(s.dim() - 1) > 0, "s: expected [..., cols]");
  check_like(s, grad, "grad: expected shape, dtype and device of s");
  check_like(s, grad_sum, "grad_sum: expected shape, dtype and device of s");
  const Device device(s);
  const Rows in = rows_of(s), d = rows_of(grad), extra = grad_sum ? rows_of(*grad_sum) : in;
  const auto statistic = [&](const Tensor& t) {
    return t.scalar_type() == ScalarType::Float && t.numel() == in.count && same_device(t, s);
  };
  check(statistic(rstd) && (rms || statistic(mean)), "mean, rstd: expected float32 [rows]");
  const Tensor means = contiguous(mean), deviations = contiguous(rstd);
  const Parameters affine = parameters(s, weight, std::nullopt);
  std::vector<int64_t> shape;
  for (int64_t i = 0; i < s.dim(); ++i) shape.push_back(s.size(i));
  const std::vector<int64_t> none{0}, width{in.cols};
  Tensor ds = new_empty(s, shape), dx = new_empty(s, seed ? shape : none);
  // Without a row no kernel runs, and the sums are zero.
  const auto sums = [&](bool need) {
    if (need && in.count == 0) return new_zeros(s, width, ScalarType::Float);
    return new_empty(s, need ? width : none, ScalarType::Float);
  };
  Tensor dweight = sums(need_weight), dbias = sums(need_bias);
  for_float_type(s, "s", [&](auto type) {
    using T = decltype(type);
    NormBackward<T> a{d.data<T>(),
                      grad_sum ? extra.data<T>() : nullptr,
                      in.data<T>(),
                      pointer(affine.weight),
                      rms ? nullptr : static_cast<const float*>(means.const_data_ptr()),
                      static_cast<const float*>(deviations.const_data_ptr()),
                      seed_pointer(s, seed),
                      output<T>(ds),
                      seed ? output<T>(dx) : nullptr,
                      nullptr,
                      in.count,
                      in.cols,
                      d.stride,
                      extra.stride,
                      in.stride,
                      0,
                      static_cast<float>(p),
                      keep_scale(p),
                      weight ? static_cast<float>(offset) : 0.0f,
                      affine.is_float};
    const NormPlan plan = norm_backward_plan(a);
    a.parts = plan.parts;
    const bool wanted = need_weight || need_bias;
    Tensor partial = new_empty(s, wanted ? std::vector<int64_t>{2, plan.parts, in.cols} : none, ScalarType::Float);
    if (wanted) a.partial = output<float>(partial);
    check_launch("norm_backward", norm_backward_launch(a, plan, need_weight ? output<float>(dweight) : nullptr,
                                                       need_bias ? output<float>(dbias) : nullptr, device.stream()));
  });
  return {ds, dx, dweight, dbias};
}

}  // namespace

FASTDL_CUDA_LIBRARY(m) {
  m.impl("norm_forward", TORCH_BOX(&norm_forward));
  m.impl("norm_backward", TORCH_BOX(&norm_backward));
}

}  // namespace fastdl::cuda
