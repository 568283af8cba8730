// fastdl::recurrent_pack: w_hh in the layout of recurrent_product.h, for inference with weights that do not change.
#include <torch/csrc/stable/library.h>

#include "cpu/recurrent.h"

namespace fastdl {

const RecurrentProduct& recurrent_product_table() {
  switch (cpu_variant()) {
#define FASTDL_CASE(variant) \
  case CpuVariant::variant: return variant::recurrent_product;
    FASTDL_VARIANTS(FASTDL_CASE)
#undef FASTDL_CASE
    default: return scalar::recurrent_product;
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
  const RecurrentProduct& kernels = recurrent_product_table();
  parallel_region(bytes < 256 * 1024 ? 1 : thread_count(), [&](int thread, int team) {
    const Range share = range(a.directions * gates * panels_of(rows), thread, team);
    pack_outputs(kernels, a, w.const_data_ptr(), rows, cols, data_of<uint8_t>(out), share);
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastdl, CPU, m) { m.impl("recurrent_pack", TORCH_BOX(&recurrent_pack)); }

}  // namespace fastdl
