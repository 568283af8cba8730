// What quant_matmul_kernel.cpp offers at each level: raw pointers, no torch. csrc/cpu/quant_matmul.cpp and the decoder
// call it through the table of the level in use.
#pragma once

#include <stdint.h>

#include "common/formats.h"
#include "cpu/cpu_level.h"

namespace fastdl {

// Activations are prepared block by block: entry (b, t) holds k = 32b .. 32b+31 of token t, at index b * tokens + t,
// so that a panel's block of weights stays in registers while all tokens stream past it.
//   FP32: float[32]    BF16: uint16[32] (float[32], rounded to bf16, where the level has no bf16 product)
//   INT8: Q8Block, x ~ d * q with d = max|x| / 127
struct Q8Block {
  int8_t q[32];
  float d;
  float sum;        // d * (q[0] + ... + q[31])
  int32_t nsum[2];  // -(q[0] + ... + q[15]), -(q[16] + ... + q[31])
};

enum Epilogue : int { STORE = 0, ADD = 1, SWIGLU = 2 };

// out[t][n] = sum_k W[n][k] * x[t][k] (+ bias[n]).  ADD: out += that (f32).  SWIGLU: out = silu(W x) * (W2 x) (f32).
struct MatmulArgs {
  const uint8_t* w;   // panels of [rows, cols]
  const uint8_t* w2;  // SWIGLU only: panels of the second matrix, of the format `format2`
  const void* acts;   // prepared activations, [ceil(cols / 32)][tokens]
  const float* bias;  // [rows] or null
  void* out;          // [tokens][ld_out] of out_format
  int64_t rows, cols, tokens, ld_out;
  int format, format2, precision, out_format, epilogue;
};

// dx[t][k] = sum_n grad[t][n] * W[n][k]
struct BackwardArgs {
  const uint8_t* w;
  const void* grad;  // [tokens][ld_grad] of grad_format
  void* out;         // [tokens][ld_out] of grad_format
  int64_t rows, cols, tokens, ld_grad, ld_out;
  int format, grad_format;
};

struct QuantMatmulKernels {
  // Bytes of one prepared block of 32 values.
  int64_t (*prepared_block_bytes)(int precision);
  // x [tokens][ld_x] of x_format -> entries for tokens t0 <= t < t1 of a prepared buffer for `tokens` tokens.
  void (*prepare)(const void* x, int x_format, int64_t ld_x, int64_t cols, int precision, int64_t tokens, int64_t t0,
                  int64_t t1, void* out);
  // Panels p0 <= p < p1 of the output, all tokens. scratch: matmul_scratch_bytes() of the calling thread's own.
  void (*matmul)(const MatmulArgs& a, int64_t p0, int64_t p1, void* scratch);
  // Blocks of 32 columns b0 <= b < b1 of the gradient, all tokens.
  void (*backward)(const BackwardArgs& a, int64_t b0, int64_t b1, void* scratch);
  int64_t (*scratch_bytes)();
};

#define FASTDL_DECLARE(variant) \
  namespace variant { extern const QuantMatmulKernels quant_matmul_kernels; }
FASTDL_VARIANTS(FASTDL_DECLARE)
#undef FASTDL_DECLARE

}  // namespace fastdl
