// Room position on the CPU: checks, threads, registration. Contract: fastdl/ops/position.py.
//
// A position's sum is made by one thread, in the order of its tokens: results do not depend on the number of threads.
#include <torch/csrc/stable/library.h>

#include <algorithm>

#include "common/parallel.h"
#include "common/position_tensors.h"
#include "cpu/position_kernel.h"
#include "cpu/scratch.h"

namespace fastdl {
namespace {

constexpr int64_t ALONE = 16 * 1024;  // elements; waking up a second thread costs more than so few take

const PositionKernels& position_table() {
  switch (cpu_vectors()) {
#define FASTDL_CASE(variant) \
  case CpuVariant::variant: return variant::position_kernels;
    FASTDL_VECTORS(FASTDL_CASE)
#undef FASTDL_CASE
    default: return scalar::position_kernels;
  }
}

PositionArgs arguments(const PositionTensors& t, const Tensor& x, int64_t start, const OptionalTensor& seed, double p,
                       double scale) {
  PositionArgs a{};
  a.format = float_format(x, "x: expected float32, float16 or bfloat16");
  a.x = t.x.tensor.const_data_ptr();
  a.positions = t.position_data();
  a.cols = t.x.cols;
  a.x_stride = t.x.stride;
  a.n = t.n;
  a.entries = t.entries;
  a.inner = t.inner;
  a.start = start;
  a.dropout = seed.has_value();
  a.seed = seed ? static_cast<uint64_t>(*seed_pointer(x, seed)) : 0;
  a.p = static_cast<float>(p);
  a.keep = keep_scale(p);
  a.scale = static_cast<float>(scale);
  a.by_batch = t.positions && t.positions->dim() == 2;
  return a;
}

void run_rows(const PositionArgs& a, int64_t rows) {
  const PositionKernels& kernels = position_table();
  const int wanted = rows * a.cols < ALONE ? 1 : static_cast<int>(std::min<int64_t>(thread_count(), rows));
  parallel_region(wanted, [&](int thread, int team) {
    const Range mine = range(rows, thread, team);
    kernels.forward(a, mine.begin, mine.end);
  });
}

Tensor position_forward(const Tensor& x, const Tensor& table, const OptionalTensor& positions, int64_t start,
                        const OptionalTensor& seed, double p, double scale) {
  const PositionTensors t(x, positions);
  const PositionTable added(x, table);
  t.check_table(start, table.size(0));
  PositionArgs a = arguments(t, x, start, seed, p, scale);
  const Tensor y = new_tensor(x, shape_of(x), x.scalar_type());
  if (x.numel() == 0) return y;
  a.table = added.table.const_data_ptr();
  a.table_len = table.size(0);
  a.float_table = added.is_float;
  a.y = y.mutable_data_ptr();
  run_rows(a, t.x.count);
  return y;
}

std::tuple<Tensor, Tensor> position_backward(const Tensor& grad, const OptionalTensor& positions,
                                             const OptionalTensor& order, const OptionalTensor& begin, int64_t start,
                                             const OptionalTensor& seed, double p, double scale, int64_t table_len,
                                             bool need_x, bool need_table) {
  const PositionTensors t(grad, positions);
  const PositionGradient out(t, grad, order, begin, start, table_len, need_x, need_table);
  PositionArgs a = arguments(t, grad, start, seed, p, scale);
  if (grad.numel() == 0) return {out.dx, out.dtable};
  a.table_len = table_len;
  a.y = need_x ? out.dx.mutable_data_ptr() : nullptr;
  if (!need_table) {
    if (need_x) run_rows(a, t.x.count);
    return {out.dx, out.dtable};
  }
  a.dtable = static_cast<float*>(out.dtable.mutable_data_ptr());
  a.order = static_cast<const int64_t*>(pointer(out.order));
  a.begin = static_cast<const int64_t*>(pointer(out.begin));
  const int wanted = grad.numel() < ALONE ? 1 : thread_count();
  const int64_t bytes = padded(a.cols * 4);
  const Scratch sums(wanted * bytes);
  const PositionKernels& kernels = position_table();
  parallel_region(wanted, [&](int thread, int team) {
    // Positions with the same share of the tokens: those before the first and behind the last have none.
    const auto position_at = [&](int64_t entry) {
      if (!a.order) return start + entry;
      return std::lower_bound(a.begin, a.begin + table_len, entry) - a.begin;
    };
    const Range mine = range(t.entries, thread, team);
    const int64_t first = thread == 0 ? 0 : position_at(mine.begin);
    const int64_t last = thread == team - 1 ? table_len : position_at(mine.end);
    kernels.backward(a, first, last, reinterpret_cast<float*>(sums.data + thread * bytes));
  });
  return {out.dx, out.dtable};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastdl, CPU, m) {
  m.impl("position_forward", TORCH_BOX(&position_forward));
  m.impl("position_backward", TORCH_BOX(&position_backward));
}

}  // namespace fastdl
