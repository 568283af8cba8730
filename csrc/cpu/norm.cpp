// Room norm on the CPU: checks, threads, registration. Contract: fastdl/ops/norm.py.
//
// Sums over rows (dweight, dbias) are kept per part of rows, and the parts, a function of the shape, are added in order:
// results do not depend on the number of threads.
#include <torch/csrc/stable/library.h>

#include <algorithm>

#include "common/norm_tensors.h"
#include "common/parallel.h"
#include "cpu/norm_kernel.h"
#include "cpu/scratch.h"

namespace fastdl {
namespace {

constexpr int64_t ALONE = 16 * 1024;  // elements; waking up a second thread costs more than so few take

const NormKernels& norm_table() {
  switch (cpu_vectors()) {
#define FASTDL_CASE(variant) \
  case CpuVariant::variant: return variant::norm_kernels;
    FASTDL_VECTORS(FASTDL_CASE)
#undef FASTDL_CASE
    default: return scalar::norm_kernels;
  }
}

int team(int64_t rows, int64_t cols) {
  return rows * cols < ALONE ? 1 : static_cast<int>(std::min<int64_t>(thread_count(), rows));
}

// Both forward ops: writes t's outputs.
void run_forward(const NormForwardTensors& t, const Tensor& x, const OptionalTensor& residual,
                 const OptionalTensor& seed, double p, double eps, double offset, bool rms) {
  const int format = float_format(x, "x: expected float32, float16 or bfloat16");
  NormForwardArgs a{};
  a.x = t.x.tensor.const_data_ptr();
  a.residual = residual ? t.residual.tensor.const_data_ptr() : nullptr;
  a.y = t.y.mutable_data_ptr();
  a.s = t.s.numel() > 0 ? t.s.mutable_data_ptr() : nullptr;
  a.mean = t.mean && !rms ? static_cast<float*>(t.mean->mutable_data_ptr()) : nullptr;
  a.rstd = t.rstd ? static_cast<float*>(t.rstd->mutable_data_ptr()) : nullptr;
  a.rms = rms;
  a.plain = t.plain;
  a.cols = t.x.cols;
  a.x_stride = t.x.stride;
  a.residual_stride = t.residual.stride;
  a.dropout = seed.has_value();
  a.seed = seed ? static_cast<uint64_t>(*seed_pointer(x, seed)) : 0;
  a.p = static_cast<float>(p);
  a.scale = keep_scale(p);
  a.eps = static_cast<float>(eps);
  a.format = format;
  const int64_t rows = t.x.count, row_bytes = padded(a.cols * 4 + 64);
  const int threads = team(rows, a.cols);
  const Scratch scratch((threads + 2) * row_bytes);  // a row for each thread, weight, bias
  const NormKernels& kernels = norm_table();
  const int parameter_format = t.parameters.is_float ? FORMAT_F32 : format;
  const auto floats = [&](const OptionalTensor& from, int64_t place, double add) -> const float* {
    if (!from) return nullptr;
    float* to = reinterpret_cast<float*>(scratch.data + place * row_bytes);
    kernels.to_floats(from->const_data_ptr(), parameter_format, static_cast<float>(add), a.cols, to);
    return to;
  };
  a.weight = floats(t.parameters.weight, threads, offset);
  a.bias = floats(t.parameters.bias, threads + 1, 0.0);
  parallel_region(threads, [&](int thread, int team) {
    const Range part = range(rows, thread, team);
    kernels.forward(a, part.begin, part.end, reinterpret_cast<float*>(scratch.data + thread * row_bytes));
  });
}

FourTensors norm_forward(const Tensor& x, const OptionalTensor& residual, const OptionalTensor& weight,
                         const OptionalTensor& bias, const OptionalTensor& seed, double p, double eps, double offset,
                         bool rms) {
  const NormForwardTensors t(x, residual, weight, bias, seed, rms, true, true);
  run_forward(t, x, residual, seed, p, eps, offset, rms);
  return {t.y, t.s, *t.mean, *t.rstd};
}

TwoTensors norm_inference(const Tensor& x, const OptionalTensor& residual, const OptionalTensor& weight,
                          const OptionalTensor& bias, double eps, double offset, bool rms, bool sum) {
  const NormForwardTensors t(x, residual, weight, bias, std::nullopt, rms, false, sum);
  run_forward(t, x, residual, std::nullopt, 0.0, eps, offset, rms);
  return {t.y, t.s};
}

// How many parts the sums over rows are kept in: at least 16 rows each, at most 64 parts and 16 MB.
int64_t part_count(int64_t rows, int64_t cols) {
  return std::max<int64_t>(1, std::min({int64_t{64}, (rows + 15) / 16, (int64_t{1} << 21) / cols}));
}

FourTensors norm_backward(const Tensor& grad, const OptionalTensor& grad_sum, const Tensor& s,
                          const OptionalTensor& weight, const Tensor& mean, const Tensor& rstd,
                          const OptionalTensor& seed, double p, double, double offset, bool rms, bool need_weight,
                          bool need_bias) {
  const int format = float_format(s, "s: expected float32, float16 or bfloat16");
  const NormBackwardTensors t(grad, grad_sum, s, weight, mean, rstd, seed, rms, need_weight, need_bias);
  NormBackwardArgs a{};
  a.grad = t.grad.tensor.const_data_ptr();
  a.grad_sum = grad_sum ? t.grad_sum.tensor.const_data_ptr() : nullptr;
  a.s = t.s.tensor.const_data_ptr();
  a.mean = rms ? nullptr : static_cast<const float*>(t.mean.const_data_ptr());
  a.rstd = static_cast<const float*>(t.rstd.const_data_ptr());
  a.ds = t.ds.mutable_data_ptr();
  a.dx = seed ? t.dx.mutable_data_ptr() : nullptr;
  a.cols = t.s.cols;
  a.grad_stride = t.grad.stride;
  a.grad_sum_stride = t.grad_sum.stride;
  a.s_stride = t.s.stride;
  a.seed = seed ? static_cast<uint64_t>(*seed_pointer(s, seed)) : 0;
  a.p = static_cast<float>(p);
  a.scale = keep_scale(p);
  a.format = format;
  const int64_t rows = t.s.count, cols = a.cols;
  if (rows == 0) return {t.ds, t.dx, t.dweight, t.dbias};
  const bool sums = need_weight || need_bias;
  const int64_t parts = part_count(rows, cols), stride = padded(cols * 4) / 4;  // floats of one sum
  const Scratch memory((sums ? 2 * parts + 1 : 1) * stride * 4);
  float* const floats = reinterpret_cast<float*>(memory.data);  // the weight
  float* const partial = floats + stride;                       // [2][parts][stride]
  const NormKernels& kernels = norm_table();
  if (t.parameters.weight) {
    kernels.to_floats(pointer(t.parameters.weight), t.parameters.is_float ? FORMAT_F32 : format,
                      static_cast<float>(offset), cols, floats);
    a.weight = floats;
  }
  const int threads = team(rows, cols);
  parallel_region(std::min<int>(threads, static_cast<int>(parts)), [&](int thread, int team) {
    const Range mine = range(parts, thread, team);
    for (int64_t i = mine.begin; i < mine.end; ++i) {
      float* const dweight = sums ? partial + i * stride : nullptr;
      float* const dbias = sums ? partial + (parts + i) * stride : nullptr;
      if (sums) {
        std::fill(dweight, dweight + stride, 0.0f);
        std::fill(dbias, dbias + stride, 0.0f);
      }
      kernels.backward(a, rows * i / parts, rows * (i + 1) / parts, dweight, dbias);
    }
  });
  if (sums)
    parallel_region(parts * cols < ALONE ? 1 : thread_count(), [&](int thread, int team) {
      const Range tiles = range((cols + 63) / 64, thread, team);
      const int64_t begin = tiles.begin * 64, end = std::min(cols, tiles.end * 64);
      if (begin >= end) return;
      if (need_weight)
        kernels.add_parts(partial, parts, stride, begin, end, static_cast<float*>(t.dweight.mutable_data_ptr()));
      if (need_bias)
        kernels.add_parts(partial + parts * stride, parts, stride, begin, end,
                          static_cast<float*>(t.dbias.mutable_data_ptr()));
    });
  return {t.ds, t.dx, t.dweight, t.dbias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastdl, CPU, m) {
  m.impl("norm_forward", TORCH_BOX(&norm_forward));
  m.impl("norm_inference", TORCH_BOX(&norm_inference));
  m.impl("norm_backward", TORCH_BOX(&norm_backward));
}

}  // namespace fastdl
