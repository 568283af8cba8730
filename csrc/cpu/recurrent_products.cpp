// The products over all steps in the training of lstm, gru and rnn, in float32: fastdl::recurrent_product (with a weight or
// its transpose, packed at every call) and fastdl::recurrent_outer (gradients of weights). Contract:
// fastdl/ops/_recurrent_products.py.
#include <torch/csrc/stable/library.h>

#include "cpu/recurrent.h"
#include "cpu/recurrent_input_kernel.h"
#include "cpu/recurrent_outer_kernel.h"

namespace fastdl {
namespace {

constexpr int64_t ALONE = 64 * 1024;  // multiply-adds that are over before a second thread has begun

const RecurrentOuterKernels& recurrent_outer_table(CpuVariant variant) {
  switch (cpu_vectors(variant)) {
#define FASTDL_CASE(variant) \
  case CpuVariant::variant: return variant::recurrent_outer_kernels;
    FASTDL_VECTORS(FASTDL_CASE)
#undef FASTDL_CASE
    default: return scalar::recurrent_outer_kernels;
  }
}

void check_matrix(const Tensor& t, const char* message) {
  check(t.is_cpu() && t.scalar_type() == ScalarType::Float && t.dim() == 2, message);
}

Tensor recurrent_product(const Tensor& x, const Tensor& w_, const OptionalTensor& bias_, bool transposed) {
  check(x.is_cpu() && x.scalar_type() == ScalarType::Float && x.dim() >= 1, "x: expected float32 [..., inputs]");
  check_matrix(w_, "w: expected a float32 matrix on the CPU");
  const Tensor w = as_contiguous(w_);
  RecurrentInputArgs a{};
  std::vector<int64_t> shape = shape_of(x);
  a.format = FORMAT_F32;
  a.cols = shape.back();
  a.outputs = w.size(transposed ? 1 : 0);
  check(a.cols > 0 && w.size(transposed ? 0 : 1) == a.cols, "w: expected [outputs, inputs], or transposed");
  shape.back() = a.outputs;
  const Rows rows = rows_of(x);
  const OptionalTensor bias = expected(bias_, ScalarType::Float, {a.outputs}, "bias: expected float32 [outputs]");
  const Tensor y = new_tensor(x, shape, ScalarType::Float);
  if (y.numel() == 0) return y;
  const int64_t panels = panels_of(a.outputs), panel_bytes = packed_panel_bytes(FORMAT_F32, a.cols);
  const int threads = rows.count * a.outputs * a.cols < ALONE ? 1 : thread_count();
  const Tensor memory = allocate_bytes(panels * panel_bytes);
  uint8_t* const packed = first_byte(memory);
  a.x = rows.tensor.const_data_ptr();
  a.packed = packed;
  a.bias = data_of<>(bias);
  a.y = data_of(y);
  a.stride = rows.stride;
  const CpuVariant variant = cpu_variant();
  a.product = &recurrent_product_table(variant);
  const RecurrentInputKernels& kernels = recurrent_input_table(variant);
  const auto* const from = static_cast<const float*>(w.const_data_ptr());
  Barrier packing;
  parallel_region(threads, [&](int thread, int team) {
    const Range mine = range(panels, thread, team);
    for (int64_t panel = mine.begin; panel < mine.end; ++panel) {
      const int64_t first = panel * PANEL_COLS, n = std::min(PANEL_COLS, a.outputs - first);
      uint8_t* const to = packed + panel * panel_bytes;
      if (transposed)
        a.product->pack_cols(FORMAT_F32, from + first, a.outputs, n, a.cols, 0, to);
      else
        a.product->pack_rows(FORMAT_F32, from + first * a.cols, a.cols, n, a.cols, to);
    }
    packing.wait(team);
    // By outputs, as they were packed; by rows where there are few outputs. Rows of float32 need no scratch.
    if (panels >= 4 * team)
      kernels.input(a, Range{0, rows.count}, mine, nullptr);
    else
      kernels.input(a, range(rows.count, thread, team), Range{0, panels}, nullptr);
  });
  return y;
}

Tensor recurrent_outer(const Tensor& a_, const Tensor& b_) {
  check_matrix(a_, "a: expected a float32 matrix on the CPU");
  check_matrix(b_, "b: expected a float32 matrix on the CPU");
  check(a_.size(0) == b_.size(0), "b: expected as many rows as a");
  const Rows left = rows_of(a_), right = rows_of(b_);
  RecurrentOuterArgs a{};
  a.depth = a_.size(0);
  a.rows = a_.size(1);
  a.cols = b_.size(1);
  a.a = static_cast<const float*>(left.tensor.const_data_ptr());
  a.b = static_cast<const float*>(right.tensor.const_data_ptr());
  a.a_stride = left.stride;
  a.b_stride = right.stride;
  if (a.depth == 0) return copy_or_zeros(a_, OptionalTensor(), {a.rows, a.cols});
  const Tensor c = new_tensor(a_, {a.rows, a.cols}, ScalarType::Float);
  if (c.numel() == 0) return c;
  a.c = data_of<float>(c);
  const CpuVariant variant = cpu_variant();
  a.product = &recurrent_product_table(variant);
  const RecurrentOuterKernels& kernels = recurrent_outer_table(variant);
  const int64_t most = a.product->rows_at_once(FORMAT_F32, OUTER_ROWS), tiles = (a.rows + most - 1) / most;
  const int64_t panels = panels_of(a.cols), depth = std::min(a.depth, OUTER_DEPTH);
  const int64_t panel_bytes = padded(panels * packed_panel_bytes(FORMAT_F32, depth));
  const int64_t scratch = padded(OUTER_ROWS * depth * 4);
  const int threads =
      a.depth * a.rows * a.cols < ALONE ? 1 : static_cast<int>(std::min<int64_t>(thread_count(), tiles));
  const Tensor memory = allocate_bytes(panel_bytes + threads * scratch);
  uint8_t* const packed = first_byte(memory);
  Barrier meeting;
  parallel_region(threads, [&](int thread, int team) {
    const Range share = range(panels, thread, team), part = range(tiles, thread, team);
    const Range mine{part.begin * most, std::min(part.end * most, a.rows)};
    for (int64_t begin = 0; begin < a.depth; begin += depth) {
      const int64_t end = std::min(begin + depth, a.depth);
      if (begin) meeting.wait(team);  // all have read the panels
      for (int64_t panel = share.begin; panel < share.end; ++panel) {
        const int64_t first = panel * PANEL_COLS;
        a.product->pack_cols(FORMAT_F32, a.b + begin * a.b_stride + first, a.b_stride,
                             std::min(PANEL_COLS, a.cols - first), end - begin, 0,
                             packed + panel * packed_panel_bytes(FORMAT_F32, end - begin));
      }
      meeting.wait(team);
      kernels.outer(a, begin, end, mine, packed, reinterpret_cast<float*>(packed + panel_bytes + thread * scratch));
    }
  });
  return c;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastdl, CPU, m) {
  m.impl("recurrent_product", TORCH_BOX(&recurrent_product));
  m.impl("recurrent_outer", TORCH_BOX(&recurrent_outer));
}

}  // namespace fastdl
