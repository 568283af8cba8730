// Room quant_matmul on the CPU: checks, allocation, threads, registration. The arithmetic is in quant_matmul_kernel.cpp.
#include <torch/csrc/stable/library.h>

#include <vector>

#include "common/parallel.h"
#include "common/tensor.h"
#include "cpu/quant_matmul_kernel.h"
#include "cpu/quant_table.h"

namespace fastdl {

const QuantMatmulKernels& quant_matmul_table() {
  switch (cpu_variant()) {
#define FASTDL_CASE(variant) \
  case CpuVariant::variant: return variant::quant_matmul_kernels;
    FASTDL_VARIANTS(FASTDL_CASE)
#undef FASTDL_CASE
    default: return scalar::quant_matmul_kernels;
  }
}

namespace {

// Prepared activations take at most this, so that x is worked on in chunks of tokens that stay in the level-2 cache.
constexpr int64_t PREPARED_BYTES = 640 << 10;

Tensor new_output(const Tensor& x, int64_t last) {
  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
  shape.back() = last;
  return torch::stable::new_empty(x, shape);
}

Tensor quant_matmul(const Tensor& x_, const Tensor& packed, const std::optional<Tensor>& bias, int64_t format_,
                    int64_t rows, int64_t activation) {
  check(x_.is_cpu() && x_.dim() >= 1, "x: expected a CPU tensor with at least one dimension");
  const Tensor x = torch::stable::contiguous(x_);
  const int x_format = float_format(x, "x: expected float32, float16 or bfloat16");
  const int64_t cols = x.size(x.dim() - 1), tokens = cols ? x.numel() / cols : 0;
  const int format = checked_format(format_, cols);
  MatmulArgs args{};
  args.w = checked_panels(packed, format, rows, cols);
  check(activation >= PRECISION_FP32 && activation <= PRECISION_INT8, "activation: unknown number");
  args.precision = activation == PRECISION_INT8 && !format_has_int8(format) ? PRECISION_FP32 : (int)activation;
  if (bias) {
    check(bias->scalar_type() == ScalarType::Float && bias->is_contiguous() && bias->numel() == rows && bias->is_cpu(),
          "bias: expected a contiguous float32 CPU tensor with one value a row");
    args.bias = (const float*)bias->const_data_ptr();
  }
  Tensor out = new_output(x, rows);
  if (tokens == 0 || rows == 0) return out;

  const QuantMatmulKernels& k = quant_matmul_table();
  const int64_t blocks = (cols + 31) / 32, token_bytes = blocks * k.prepared_block_bytes(args.precision);
  int64_t chunk = PREPARED_BYTES / token_bytes;
  chunk = chunk < 16 ? 16 : chunk / 16 * 16;
  chunk = tokens < chunk ? tokens : chunk;
  const int team = thread_count();
  const int64_t scratch_bytes = k.scratch_bytes();
  const Tensor memory = allocate_bytes(padded(chunk * token_bytes) + team * scratch_bytes);
  uint8_t* prepared = first_byte(memory);
  uint8_t* scratch = prepared + padded(chunk * token_bytes);

  const int64_t x_width = x_format == FORMAT_F32 ? 4 : 2, panels = panel_count(rows);
  const uint8_t* x_data = (const uint8_t*)x.const_data_ptr();
  uint8_t* out_data = (uint8_t*)out.mutable_data_ptr();
  args.acts = prepared;
  args.rows = rows, args.cols = cols, args.ld_out = rows;
  args.format = format, args.out_format = x_format, args.epilogue = STORE;
  parallel_region(panels > 1 || tokens > 1 ? team : 1, [&](int thread, int threads) {
    MatmulArgs mine = args;
    for (int64_t t = 0; t < tokens; t += chunk) {
      mine.tokens = tokens - t < chunk ? tokens - t : chunk;
      mine.out = out_data + t * rows * x_width;
      const Range part = range(mine.tokens, thread, threads);
      k.prepare(x_data + t * cols * x_width, x_format, cols, cols, mine.precision, mine.tokens, part.begin, part.end,
                prepared);
#pragma omp barrier
      const Range mine_panels = range(panels, thread, threads);
      k.matmul(mine, mine_panels.begin, mine_panels.end, scratch + thread * scratch_bytes);
#pragma omp barrier
    }
  });
  return out;
}

Tensor quant_matmul_backward(const Tensor& grad_, const Tensor& packed, int64_t format_, int64_t cols) {
  check(grad_.is_cpu() && grad_.dim() >= 1, "grad: expected a CPU tensor with at least one dimension");
  const Tensor grad = torch::stable::contiguous(grad_);
  BackwardArgs args{};
  args.grad_format = float_format(grad, "grad: expected float32, float16 or bfloat16");
  args.format = checked_format(format_, cols);
  args.rows = grad.size(grad.dim() - 1), args.cols = cols;
  args.w = checked_panels(packed, args.format, args.rows, cols);
  Tensor out = new_output(grad, cols);
  if (out.numel() == 0) return out;
  if (args.rows == 0) return torch::stable::zero_(out);
  args.tokens = grad.numel() / args.rows;
  args.grad = grad.const_data_ptr();
  args.out = out.mutable_data_ptr();
  args.ld_grad = args.rows, args.ld_out = cols;

  const QuantMatmulKernels& k = quant_matmul_table();
  const int team = thread_count();
  const int64_t scratch_bytes = k.scratch_bytes(), blocks = (cols + 31) / 32;
  const Tensor memory = allocate_bytes(team * scratch_bytes);
  uint8_t* scratch = first_byte(memory);
  parallel_region(blocks > 1 ? team : 1, [&](int thread, int threads) {
    const Range part = range(blocks, thread, threads);
    k.backward(args, part.begin, part.end, scratch + thread * scratch_bytes);
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastdl, CPU, m) {
  m.impl("quant_matmul", TORCH_BOX(&quant_matmul));
  m.impl("quant_matmul_backward", TORCH_BOX(&quant_matmul_backward));
}

}  // namespace fastdl
