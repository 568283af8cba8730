// What inference of lstm, gru and rnn does with weights that do not change: fastdl::recurrent_pack, the weights in the layout
// of recurrent_product.h, and fastdl::recurrent_input, the products of all steps with the input.
#include <torch/csrc/stable/library.h>

#include "cpu/recurrent.h"
#include "cpu/recurrent_input_kernel.h"

namespace fastdl {

const RecurrentProduct& recurrent_product_table(CpuVariant variant) {
  switch (variant) {
#define FASTDL_CASE(variant) \
  case CpuVariant::variant: return variant::recurrent_product;
    FASTDL_VARIANTS(FASTDL_CASE)
#undef FASTDL_CASE
    default: return scalar::recurrent_product;
  }
}

const RecurrentInputKernels& recurrent_input_table(CpuVariant variant) {
  switch (cpu_vectors(variant)) {
#define FASTDL_CASE(variant) \
  case CpuVariant::variant: return variant::recurrent_input_kernels;
    FASTDL_VECTORS(FASTDL_CASE)
#undef FASTDL_CASE
    default: return scalar::recurrent_input_kernels;
  }
}

namespace {

Tensor recurrent_pack(const Tensor& weight, int64_t gates) {
  check(weight.is_cpu() && weight.dim() == 3 && gates > 0 && weight.size(1) % gates == 0,
        "weight: expected [D, gates * hidden_size, size] on the CPU");
  const Tensor w = as_contiguous(weight);
  RecurrentArgs a{};
  a.directions = w.size(0);
  a.format = float_format(w, "weight: expected float32, float16 or bfloat16");
  const int64_t rows = w.size(1) / gates, cols = w.size(2), bytes = packed_bytes(a, gates, rows, cols);
  const Tensor out = new_tensor(w, {bytes}, ScalarType::Byte);
  const RecurrentProduct& kernels = recurrent_product_table(cpu_variant());
  parallel_region(bytes < 256 * 1024 ? 1 : thread_count(), [&](int thread, int team) {
    const Range share = range(a.directions * gates * panels_of(rows), thread, team);
    pack_outputs(kernels, a, w.const_data_ptr(), rows, cols, data_of<uint8_t>(out), share);
  });
  return out;
}

Tensor recurrent_input(const Tensor& x, const Tensor& packed, const OptionalTensor& bias_, int64_t outputs) {
  check(x.is_cpu() && x.dim() >= 1 && outputs >= 0, "x: expected [..., cols] on the CPU");
  RecurrentInputArgs a{};
  a.format = float_format(x, "x: expected float32, float16 or bfloat16");
  std::vector<int64_t> shape = shape_of(x);
  a.cols = shape.back();
  shape.back() = outputs;
  check(a.cols > 0, "x: expected at least one column");
  const Rows rows = rows_of(x);
  const OptionalTensor bias = expected(bias_, x.scalar_type(), {outputs}, "bias: expected [outputs] in the dtype of x");
  const int64_t panels = panels_of(outputs);
  check(packed.is_cpu() && packed.scalar_type() == ScalarType::Byte && packed.is_contiguous() &&
            packed.numel() == panels * packed_panel_bytes(a.format, a.cols),
        "packed: expected what recurrent_pack gave for [1, outputs, cols]");
  const Tensor y = new_tensor(x, shape, x.scalar_type());
  a.x = rows.tensor.const_data_ptr();
  a.packed = static_cast<const uint8_t*>(packed.const_data_ptr());
  a.bias = data_of<>(bias);
  a.y = data_of(y);
  a.stride = rows.stride;
  a.outputs = outputs;
  const CpuVariant variant = cpu_variant();
  a.product = &recurrent_product_table(variant);
  const RecurrentInputKernels& kernels = recurrent_input_table(variant);
  const int threads = rows.count * outputs * a.cols < 64 * 1024 ? 1 : thread_count();
  const int64_t bytes = padded((a.cols + 15) / 16 * 16 * 4 * 16);
  const Tensor scratch = allocate_bytes(threads * bytes);
  parallel_region(threads, [&](int thread, int team) {
    // Outputs are shared out, so that each thread reads its own weights; rows where there are too few outputs and enough
    // rows for whole tiles in every share.
    const bool by_panel = panels >= 4 * team || rows.count < 16 * team;
    const Range mine = by_panel ? Range{0, rows.count} : range(rows.count, thread, team);
    const Range columns = by_panel ? range(panels, thread, team) : Range{0, panels};
    kernels.input(a, mine, columns, first_byte(scratch) + thread * bytes);
  });
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastdl, CPU, m) {
  m.impl("recurrent_pack", TORCH_BOX(&recurrent_pack));
  m.impl("recurrent_input", TORCH_BOX(&recurrent_input));
}

}  // namespace fastdl
