// Room batch_norm on the CPU: checks, threads, registration. Contract: fastdl/ops/batch_norm.py.
//
// Sums are kept per part of the batch; the parts, a function of the shape, are added in order and in double: results do not
// depend on the number of threads.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>

#include "common/batch_norm_tensors.h"
#include "common/parallel.h"
#include "cpu/batch_norm_kernel.h"
#include "cpu/channels.h"

namespace fastdl {
namespace {

const BatchNormKernels& batch_norm_table() {
  switch (cpu_vectors()) {
#define FASTDL_CASE(variant) \
  case CpuVariant::variant: return variant::batch_norm_kernels;
    FASTDL_VECTORS(FASTDL_CASE)
#undef FASTDL_CASE
    default: return scalar::batch_norm_kernels;
  }
}

// How a batch is cut: parts of about 16 K elements of a unit, or of a tile of 1024 columns.
struct Plan {
  int64_t rows, channels, repeats, units, run;  // repeats: units of a channel
  int64_t part_rows, parts, tile, tiles, stride;

  explicit Plan(const Images& x) : rows(x.n), channels(x.channels) {
    const bool columns = x.spatial < BATCH_NORM_SHORT;
    repeats = columns ? x.spatial : 1;
    run = columns ? 1 : x.spatial;
    units = channels * repeats;
    tile = columns ? 1024 : 1;
    const int64_t width = columns ? std::min(tile, units) : run;
    part_rows = std::max<int64_t>(columns ? 16 : 1, 16 * 1024 / width);
    parts = (rows + part_rows - 1) / part_rows;
    tiles = (units + tile - 1) / tile;
    stride = padded(units * 4) / 4;
  }

  // Elements of a unit in part p.
  double count(int64_t p) const {
    return static_cast<double>((std::min(rows, (p + 1) * part_rows) - p * part_rows) * run);
  }

  // body(row0, row1, unit0, unit1, first, second) for every part and tile; first and second are the part's rows of `partial`.
  template <class Body>
  void for_parts(float* partial, const Body& body) const {
    parallel_region(team(parts * tiles, std::min(part_rows, rows) * run * std::min(tile, units)),
                    [&](int thread, int team) {
                      const Range mine = range(parts * tiles, thread, team);
                      for (int64_t i = mine.begin; i < mine.end; ++i) {
                        const int64_t p = i / tiles, t = i % tiles;
                        float* const first = partial + 2 * p * stride;
                        body(p * part_rows, std::min(rows, (p + 1) * part_rows), t * tile,
                             std::min(units, (t + 1) * tile), first, first + stride);
                      }
                    });
  }

  // body(channel) for every channel, where all its parts are read.
  template <class Body>
  void for_channels(const Body& body) const {
    parallel_region(team(channels, parts * repeats * 4), [&](int thread, int team) {
      const Range mine = range(channels, thread, team);
      for (int64_t c = mine.begin; c < mine.end; ++c) body(c);
    });
  }

  // body(unit0, unit1) for shares of all N * units: whole rows where a unit is one element.
  template <class Body>
  void for_output(const Body& body) const {
    const int64_t step = run > 1 ? 1 : units, items = rows * units / step;
    parallel_region(team(items, step * run), [&](int thread, int team) {
      const Range mine = range(items, thread, team);
      body(mine.begin * step, mine.end * step);
    });
  }
};

// The batch's mean and var of channel c from the moments of its parts.
void merge(const Plan& plan, const float* partial, int64_t c, float* mean, float* var) {
  double count = 0.0, center = 0.0, squares = 0.0;
  for (int64_t p = 0; p < plan.parts; ++p)
    for (int64_t u = c * plan.repeats; u < (c + 1) * plan.repeats; ++u) {
      count += plan.count(p);
      center += plan.count(p) * partial[2 * p * plan.stride + u];
    }
  center /= count;
  for (int64_t p = 0; p < plan.parts; ++p)
    for (int64_t u = c * plan.repeats; u < (c + 1) * plan.repeats; ++u) {
      const double apart = partial[2 * p * plan.stride + u] - center;
      squares += partial[(2 * p + 1) * plan.stride + u] + plan.count(p) * apart * apart;
    }
  mean[c] = static_cast<float>(center);
  var[c] = static_cast<float>(squares / count);
}

// The coefficients of every unit, in one block of memory.
struct Coefficients {
  float *mean, *slope, *pull, *shift;

  Coefficients(const Plan& plan, float* at)
      : mean(at), slope(at + plan.stride), pull(at + 2 * plan.stride), shift(at + 3 * plan.stride) {}

  void set(const Plan& plan, int64_t c, float mean_, float slope_, float pull_, float shift_) const {
    for (int64_t u = c * plan.repeats; u < (c + 1) * plan.repeats; ++u) {
      mean[u] = mean_;
      slope[u] = slope_;
      pull[u] = pull_;
      shift[u] = shift_;
    }
  }
  void give(BatchNormArgs& a) const {
    a.mean = mean;
    a.slope = slope;
    a.pull = pull;
    a.shift = shift;
  }
};

ThreeTensors batch_norm_forward(const Tensor& x, const OptionalTensor& residual, const OptionalTensor& weight,
                                const OptionalTensor& bias, const OptionalTensor& mean, const OptionalTensor& var,
                                double eps, bool relu) {
  const int format = float_format(x, "x: expected float32, float16 or bfloat16");
  const BatchNormForwardTensors t(x, residual, weight, bias, mean, var);
  if (t.x.empty()) return {t.y, t.batch_mean, t.batch_var};
  const BatchNormKernels& kernels = batch_norm_table();
  const Plan plan(t.x);
  FloatScratch scratch((4 + (t.training ? 2 * plan.parts : 0)) * plan.stride, {&t.weight, &t.bias});
  const Coefficients coefficients(plan, scratch.data());
  float* const partial = scratch.data() + 4 * plan.stride;
  const float* const weights = scratch.floats(t.weight, format, kernels.to_floats);
  const float* const biases = scratch.floats(t.bias, format, kernels.to_floats);
  BatchNormArgs a{};
  a.x = t.x.tensor.const_data_ptr();
  a.residual = pointer(t.residual);
  a.y = t.y.mutable_data_ptr();
  a.units = plan.units;
  a.run = plan.run;
  a.format = format;
  a.relu = relu;
  coefficients.give(a);
  const float* const means = static_cast<const float*>(t.mean.const_data_ptr());
  const float* const vars = static_cast<const float*>(t.var.const_data_ptr());
  if (t.training)
    plan.for_parts(partial, [&](int64_t row0, int64_t row1, int64_t unit0, int64_t unit1, float* mean, float* squares) {
      kernels.moments(a, row0, row1, unit0, unit1, mean, squares);
    });
  plan.for_channels([&](int64_t c) {
    if (t.training)
      merge(plan, partial, c, static_cast<float*>(t.batch_mean.mutable_data_ptr()),
            static_cast<float*>(t.batch_var.mutable_data_ptr()));
    const float rstd = 1.0f / std::sqrt(vars[c] + static_cast<float>(eps));
    coefficients.set(plan, c, means[c], (weights ? weights[c] : 1.0f) * rstd, 0.0f, biases ? biases[c] : 0.0f);
  });
  plan.for_output([&](int64_t unit0, int64_t unit1) { kernels.forward(a, unit0, unit1); });
  return {t.y, t.batch_mean, t.batch_var};
}

FourTensors batch_norm_backward(const Tensor& grad, const Tensor& x, const OptionalTensor& y,
                                const OptionalTensor& weight, const Tensor& mean, const Tensor& var, double eps,
                                bool training, bool need_residual, bool need_weight, bool need_bias) {
  const int format = float_format(x, "x: expected float32, float16 or bfloat16");
  const BatchNormBackwardTensors t(grad, x, y, weight, mean, var, need_residual, need_weight, need_bias);
  const FourTensors outputs{t.dx, t.dresidual, t.dweight, t.dbias};
  if (t.x.empty()) return outputs;
  const BatchNormKernels& kernels = batch_norm_table();
  const Plan plan(t.x);
  const bool sums = training || need_weight || need_bias;
  FloatScratch scratch((4 + (sums ? 2 * plan.parts : 0)) * plan.stride, {&t.weight});
  const Coefficients coefficients(plan, scratch.data());
  float* const partial = scratch.data() + 4 * plan.stride;
  const float* const weights = scratch.floats(t.weight, format, kernels.to_floats);
  BatchNormArgs a{};
  a.x = t.x.tensor.const_data_ptr();
  a.grad = t.grad.const_data_ptr();
  a.gate = pointer(t.y);
  a.dx = t.dx.mutable_data_ptr();
  a.dresidual = need_residual ? t.dresidual.mutable_data_ptr() : nullptr;
  a.units = plan.units;
  a.run = plan.run;
  a.format = format;
  coefficients.give(a);
  const float* const means = static_cast<const float*>(t.mean.const_data_ptr());
  const float* const vars = static_cast<const float*>(t.var.const_data_ptr());
  if (sums) {
    for (int64_t c = 0; c < plan.channels; ++c) coefficients.set(plan, c, means[c], 0.0f, 0.0f, 0.0f);
    plan.for_parts(partial, [&](int64_t row0, int64_t row1, int64_t unit0, int64_t unit1, float* sum, float* product) {
      kernels.products(a, row0, row1, unit0, unit1, sum, product);
    });
  }
  const double count = static_cast<double>(plan.rows * t.x.spatial);
  plan.for_channels([&](int64_t c) {
    double sum = 0.0, product = 0.0;
    for (int64_t p = 0; sums && p < plan.parts; ++p)
      for (int64_t u = c * plan.repeats; u < (c + 1) * plan.repeats; ++u) {
        sum += partial[2 * p * plan.stride + u];
        product += partial[(2 * p + 1) * plan.stride + u];
      }
    const float rstd = 1.0f / std::sqrt(vars[c] + static_cast<float>(eps));
    const float slope = (weights ? weights[c] : 1.0f) * rstd;
    if (need_weight) static_cast<float*>(t.dweight.mutable_data_ptr())[c] = static_cast<float>(product * rstd);
    if (need_bias) static_cast<float*>(t.dbias.mutable_data_ptr())[c] = static_cast<float>(sum);
    // slope * (g - mean(g) - h * mean(g * h))
    coefficients.set(plan, c, means[c], slope,
                     training ? static_cast<float>(-slope * rstd * rstd * (product / count)) : 0.0f,
                     training ? static_cast<float>(-slope * (sum / count)) : 0.0f);
  });
  plan.for_output([&](int64_t unit0, int64_t unit1) { kernels.backward(a, unit0, unit1); });
  return outputs;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastdl, CPU, m) {
  m.impl("batch_norm_forward", TORCH_BOX(&batch_norm_forward));
  m.impl("batch_norm_backward", TORCH_BOX(&batch_norm_backward));
}

}  // namespace fastdl
