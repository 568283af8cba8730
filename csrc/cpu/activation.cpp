// Room activation on the CPU: checks, threads, registration. Contract: fastdl/ops/activation.py.
//
// A tensor is cut into blocks of rows and columns by its shape alone. Each block has sums of its own for dbias and dbeta,
// which are added in the order of the blocks: results do not depend on the number of threads.
#include <torch/csrc/stable/library.h>

#include <algorithm>

#include "common/activation_tensors.h"
#include "common/parallel.h"
#include "cpu/activation_kernel.h"
#include "cpu/scratch.h"

namespace fastdl {
namespace {

constexpr int64_t ALONE = 16 * 1024;    // elements; waking up a second thread costs more than so few take
constexpr int64_t BLOCK_COLS = 8192;    // columns of a block at most
constexpr int64_t BLOCK_SIZE = 32768;   // elements of a block, about
constexpr int64_t MOST_ROW_PARTS = 64;  // where each has sums of [cols]

const ActivationKernels& activation_table() {
  switch (cpu_vectors()) {
#define FASTDL_CASE(variant) \
  case CpuVariant::variant: return variant::activation_kernels;
    FASTDL_VECTORS(FASTDL_CASE)
#undef FASTDL_CASE
    default: return scalar::activation_kernels;
  }
}

struct Blocks {
  int64_t rows, cols, row_parts, col_parts;

  Blocks(int64_t rows_, int64_t cols_, int64_t most_row_parts)
      : rows(rows_), cols(cols_), col_parts((cols + BLOCK_COLS - 1) / BLOCK_COLS) {
    row_parts = std::max<int64_t>(1, std::min({rows, rows * cols / col_parts / BLOCK_SIZE + 1, most_row_parts}));
  }
  int64_t count() const { return row_parts * col_parts; }
  RowBlock at(int64_t i) const {
    const int64_t part = i / col_parts, first = i % col_parts * BLOCK_COLS;
    return {rows * part / row_parts, rows * (part + 1) / row_parts, first, std::min(cols, first + BLOCK_COLS)};
  }
  template <class Body>
  void run(const Body& body) const {
    const int wanted = rows * cols < ALONE ? 1 : static_cast<int>(std::min<int64_t>(thread_count(), count()));
    parallel_region(wanted, [&](int thread, int team) {
      const Range mine = range(count(), thread, team);
      for (int64_t i = mine.begin; i < mine.end; ++i) body(i, at(i));
    });
  }
};

// Arguments of both directions; memory holds the bias in float32.
ActivationArgs activation_args(const ActivationTensors& t, const OptionalTensor& beta, const OptionalTensor& seed,
                               const Tensor& x, int64_t kind, double alpha, double p, float* bias) {
  ActivationArgs a{};
  a.format = float_format(x, "x: expected float32, float16 or bfloat16");
  a.kind = checked_kind(kind);
  a.x = t.x.tensor.const_data_ptr();
  a.cols = t.x.cols;
  a.x_stride = t.x.stride;
  a.other_stride = t.other.stride;
  a.channels = t.channels;
  a.dropout = seed.has_value();
  a.seed = seed ? static_cast<uint64_t>(*seed_pointer(x, seed)) : 0;
  a.p = static_cast<float>(p);
  a.scale = keep_scale(p);
  a.alpha = beta ? *static_cast<const float*>(beta->const_data_ptr()) : static_cast<float>(alpha);
  a.mask_by_row = t.mask_by_row;
  if (t.bias && t.float_bias) a.bias = static_cast<const float*>(t.bias->const_data_ptr());
  if (t.bias && !t.float_bias) {
    activation_table().to_floats(t.bias->const_data_ptr(), a.format, 0.0f, t.bias->numel(), bias);
    a.bias = bias;
  }
  return a;
}

int64_t bias_bytes(const ActivationTensors& t) { return t.bias && !t.float_bias ? padded(t.bias->numel() * 4) : 0; }

Tensor activation_forward(const Tensor& x, const OptionalTensor& bias, const OptionalTensor& residual,
                          const OptionalTensor& beta, const OptionalTensor& seed, int64_t kind, double alpha, double p,
                          int64_t inner, bool by_channel) {
  const ActivationTensors t(x, residual, bias, beta, inner, by_channel);
  const Tensor y = new_tensor(x, shape_of(x), x.scalar_type());
  if (x.numel() == 0) return y;
  const Scratch memory(bias_bytes(t));
  ActivationArgs a = activation_args(t, beta, seed, x, kind, alpha, p, reinterpret_cast<float*>(memory.data));
  a.other = residual ? t.other.tensor.const_data_ptr() : nullptr;
  a.y = y.mutable_data_ptr();
  const ActivationKernels& kernels = activation_table();
  Blocks(t.x.count, t.x.cols, t.x.count).run([&](int64_t, const RowBlock& block) { kernels.forward(a, block); });
  return y;
}

// dbias from the blocks' sums: by column [row_parts][cols], or by row [rows][col_parts].
void add_columns(const Blocks& blocks, const float* sums, float* dbias) {
  std::copy(sums, sums + blocks.cols, dbias);
  for (int64_t part = 1; part < blocks.row_parts; ++part)
    for (int64_t c = 0; c < blocks.cols; ++c) dbias[c] += sums[part * blocks.cols + c];
}

void add_rows(const Blocks& blocks, const float* sums, int64_t channels, float* dbias) {
  std::fill(dbias, dbias + channels, 0.0f);
  for (int64_t r = 0; r < blocks.rows; ++r)
    for (int64_t j = 0; j < blocks.col_parts; ++j) dbias[r % channels] += sums[r * blocks.col_parts + j];
}

ThreeTensors activation_backward(const Tensor& grad, const Tensor& x, const OptionalTensor& bias,
                                 const OptionalTensor& beta, const OptionalTensor& seed, int64_t kind, double alpha,
                                 double p, int64_t inner, bool by_channel, bool need_bias, bool need_beta) {
  check(!need_bias || bias, "need_bias: there is no bias");
  const ActivationTensors t(x, grad, bias, beta, inner, by_channel);
  const Tensor dx = new_tensor(x, shape_of(x), x.scalar_type());
  const Tensor dbias = activation_sum(x, bias ? bias->numel() : 0, need_bias), dbeta = activation_sum(x, 1, need_beta);
  if (x.numel() == 0) return {dx, dbias, dbeta};
  const bool by_column = need_bias && !t.channels, by_row = need_bias && t.channels;
  const Blocks blocks(t.x.count, t.x.cols, by_column ? MOST_ROW_PARTS : t.x.count);
  const int64_t bias_at = bias_bytes(t);
  const int64_t sums_bytes = padded(4 * (by_column ? blocks.row_parts * blocks.cols
                                         : by_row  ? blocks.rows * blocks.col_parts
                                                   : 0));
  const Scratch memory(bias_at + sums_bytes + padded(need_beta ? 4 * blocks.count() : 0));
  ActivationArgs a = activation_args(t, beta, seed, x, kind, alpha, p, reinterpret_cast<float*>(memory.data));
  a.other = t.other.tensor.const_data_ptr();
  a.y = dx.mutable_data_ptr();
  float* const sums = reinterpret_cast<float*>(memory.data + bias_at);
  float* const betas = reinterpret_cast<float*>(memory.data + bias_at + sums_bytes);
  if (by_column) std::fill(sums, sums + blocks.row_parts * blocks.cols, 0.0f);
  const ActivationKernels& kernels = activation_table();
  blocks.run([&](int64_t i, const RowBlock& block) {
    ActivationSums mine{};
    if (by_column) mine.columns = sums + i / blocks.col_parts * blocks.cols;
    if (by_row) mine.rows = sums + i % blocks.col_parts;
    mine.rows_stride = blocks.col_parts;
    if (need_beta) mine.beta = betas + i;
    kernels.backward(a, block, mine);
  });
  if (by_column) add_columns(blocks, sums, static_cast<float*>(dbias.mutable_data_ptr()));
  if (by_row) add_rows(blocks, sums, t.channels, static_cast<float*>(dbias.mutable_data_ptr()));
  if (need_beta) {
    float sum = 0.0f;
    for (int64_t i = 0; i < blocks.count(); ++i) sum += betas[i];
    *static_cast<float*>(dbeta.mutable_data_ptr()) = sum;
  }
  return {dx, dbias, dbeta};
}

GluArgs glu_args(const GluTensors& t, int64_t kind, const Tensor& gate) {
  GluArgs a{};
  a.format = float_format(gate, "gate: expected float32, float16 or bfloat16");
  a.kind = checked_kind(kind);
  check(kind == SWISH || kind == GELU || kind == GELU_TANH, "kind: expected swish, gelu or gelu_tanh");
  a.gate = t.gate.tensor.const_data_ptr();
  a.up = t.up.tensor.const_data_ptr();
  a.grad = t.grad.tensor.const_data_ptr();
  a.cols = t.gate.cols;
  a.gate_stride = t.gate.stride;
  a.up_stride = t.up.stride;
  a.grad_stride = t.grad.stride;
  return a;
}

Tensor glu_forward(const Tensor& gate, const Tensor& up, int64_t kind) {
  const GluTensors t(gate, up, gate);
  const Tensor y = new_tensor(gate, shape_of(gate), gate.scalar_type());
  GluArgs a = glu_args(t, kind, gate);
  if (gate.numel() == 0) return y;
  a.y = y.mutable_data_ptr();
  const ActivationKernels& kernels = activation_table();
  Blocks(t.gate.count, a.cols, t.gate.count).run([&](int64_t, const RowBlock& b) { kernels.glu_forward(a, b); });
  return y;
}

std::tuple<Tensor, Tensor> glu_backward(const Tensor& grad, const Tensor& gate, const Tensor& up, int64_t kind) {
  const GluTensors t(gate, up, grad);
  const Tensor dgate = new_tensor(gate, shape_of(gate), gate.scalar_type());
  const Tensor dup = new_tensor(gate, shape_of(gate), gate.scalar_type());
  GluArgs a = glu_args(t, kind, gate);
  if (gate.numel() == 0) return {dgate, dup};
  a.dgate = dgate.mutable_data_ptr();
  a.dup = dup.mutable_data_ptr();
  const ActivationKernels& kernels = activation_table();
  Blocks(t.gate.count, a.cols, t.gate.count).run([&](int64_t, const RowBlock& b) { kernels.glu_backward(a, b); });
  return {dgate, dup};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastdl, CPU, m) {
  m.impl("activation_forward", TORCH_BOX(&activation_forward));
  m.impl("activation_backward", TORCH_BOX(&activation_backward));
  m.impl("glu_forward", TORCH_BOX(&glu_forward));
  m.impl("glu_backward", TORCH_BOX(&glu_backward));
}

}  // namespace fastdl
