// Room group_norm on the CPU: checks, threads, registration. Contract: fastdl/ops/group_norm.py.
//
// A thread takes whole groups, and the sums over samples (dweight, dbias) go by channel in the order of the samples:
// results do not depend on the number of threads.
#include <torch/csrc/stable/library.h>

#include <algorithm>

#include "common/group_norm_tensors.h"
#include "common/parallel.h"
#include "cpu/channels.h"
#include "cpu/group_norm_kernel.h"

namespace fastdl {
namespace {

const GroupNormKernels& group_norm_table() {
  switch (cpu_vectors()) {
#define FASTDL_CASE(variant) \
  case CpuVariant::variant: return variant::group_norm_kernels;
    FASTDL_VECTORS(FASTDL_CASE)
#undef FASTDL_CASE
    default: return scalar::group_norm_kernels;
  }
}

ThreeTensors group_norm_forward(const Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias,
                                const OptionalTensor& scale, const OptionalTensor& shift, int64_t groups, double eps) {
  const int format = float_format(x, "x: expected float32, float16 or bfloat16");
  const GroupNormForwardTensors t(x, weight, bias, scale, shift, groups);
  if (t.x.empty()) return {t.y, t.mean, t.rstd};
  const GroupNormKernels& kernels = group_norm_table();
  const int64_t rows = t.x.n * groups, room = padded(group_norm_scratch(t.shape.width, t.x.spatial) * 4) / 4;
  const int threads = team(rows, t.shape.row);
  FloatScratch scratch(threads * room, {&t.weight, &t.bias, &t.scale, &t.shift});
  GroupNormForwardArgs a{};
  a.x = t.x.tensor.const_data_ptr();
  a.weight = scratch.floats(t.weight, format, kernels.to_floats);
  a.bias = scratch.floats(t.bias, format, kernels.to_floats);
  a.scale = scratch.floats(t.scale, format, kernels.to_floats);
  a.shift = scratch.floats(t.shift, format, kernels.to_floats);
  a.y = t.y.mutable_data_ptr();
  a.mean = static_cast<float*>(t.mean.mutable_data_ptr());
  a.rstd = static_cast<float*>(t.rstd.mutable_data_ptr());
  a.groups = groups;
  a.width = t.shape.width;
  a.spatial = t.x.spatial;
  a.eps = static_cast<float>(eps);
  a.format = format;
  parallel_region(threads, [&](int thread, int team) {
    const Range mine = range(rows, thread, team);
    kernels.forward(a, mine.begin, mine.end, scratch.data() + thread * room);
  });
  return {t.y, t.mean, t.rstd};
}

// The gradients of the parameters from the sums over positions, for channels begin .. end.
void parameter_gradients(const GroupNormBackwardArgs& a, const float* bias, int64_t n, int64_t begin, int64_t end,
                         float* dweight, float* dbias, float* dscale, float* dshift) {
  const int64_t channels = a.groups * a.width;
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t c = begin; c < end; ++c) {
      const int64_t at = i * channels + c;
      const float sum = a.sum[at], product = a.product[at], s = a.scale ? a.scale[at] : 1.0f;
      if (dweight) dweight[c] = (i ? dweight[c] : 0.0f) + s * product;
      if (dbias) dbias[c] = (i ? dbias[c] : 0.0f) + s * sum;
      if (dscale) dscale[at] = (a.weight ? a.weight[c] : 1.0f) * product + (bias ? bias[c] : 0.0f) * sum;
      if (dshift) dshift[at] = sum;
    }
  }
}

FiveTensors group_norm_backward(const Tensor& grad, const Tensor& x, const OptionalTensor& weight,
                                const OptionalTensor& bias, const OptionalTensor& scale, const Tensor& mean,
                                const Tensor& rstd, int64_t groups, double, bool need_weight, bool need_bias,
                                bool need_scale, bool need_shift) {
  const int format = float_format(x, "x: expected float32, float16 or bfloat16");
  const GroupNormBackwardTensors t(grad, x, weight, bias, scale, mean, rstd, groups, need_weight, need_bias, need_scale,
                                   need_shift);
  const FiveTensors outputs{t.dx, t.dweight, t.dbias, t.dscale, t.dshift};
  if (t.x.empty()) return outputs;
  const GroupNormKernels& kernels = group_norm_table();
  const int64_t rows = t.x.n * groups, room = padded(group_norm_scratch(t.shape.width, t.x.spatial) * 4) / 4;
  const int64_t sums = padded(t.x.n * t.x.channels * 4) / 4;
  const int threads = team(rows, t.shape.row);
  FloatScratch scratch(threads * room + 2 * sums, {&t.weight, &t.bias, &t.scale});
  GroupNormBackwardArgs a{};
  a.grad = t.grad.const_data_ptr();
  a.x = t.x.tensor.const_data_ptr();
  a.weight = scratch.floats(t.weight, format, kernels.to_floats);
  a.scale = scratch.floats(t.scale, format, kernels.to_floats);
  const float* const shifts = scratch.floats(t.bias, format, kernels.to_floats);
  a.mean = static_cast<const float*>(t.mean.const_data_ptr());
  a.rstd = static_cast<const float*>(t.rstd.const_data_ptr());
  a.dx = t.dx.mutable_data_ptr();
  a.sum = scratch.data() + threads * room;
  a.product = a.sum + sums;
  a.groups = groups;
  a.width = t.shape.width;
  a.spatial = t.x.spatial;
  a.format = format;
  parallel_region(threads, [&](int thread, int team) {
    const Range mine = range(rows, thread, team);
    kernels.backward(a, mine.begin, mine.end, scratch.data() + thread * room);
  });
  if (!(need_weight || need_bias || need_scale || need_shift)) return outputs;
  const auto to = [](bool needed, const Tensor& g) {
    return needed ? static_cast<float*>(g.mutable_data_ptr()) : nullptr;
  };
  const int64_t tiles = (t.x.channels + 63) / 64;
  parallel_region(team(tiles, t.x.n * 64), [&](int thread, int team) {
    const Range mine = range(tiles, thread, team);
    parameter_gradients(a, shifts, t.x.n, mine.begin * 64, std::min(t.x.channels, mine.end * 64),
                        to(need_weight, t.dweight), to(need_bias, t.dbias), to(need_scale, t.dscale),
                        to(need_shift, t.dshift));
  });
  return outputs;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastdl, CPU, m) {
  m.impl("group_norm_forward", TORCH_BOX(&group_norm_forward));
  m.impl("group_norm_backward", TORCH_BOX(&group_norm_backward));
}

}  // namespace fastdl
