// What norm_kernel.cpp offers at each level: rows of layer norm and RMS norm, forward and backward. Raw pointers, no torch.
// Contract: fastdl/ops/norm.py.
#pragma once

#include <stdint.h>

#include "cpu/cpu_level.h"

namespace fastdl {

struct NormForwardArgs {
  const void* x;         // [rows][cols], rows x_stride apart
  const void* residual;  // [rows][cols], rows residual_stride apart, or null
  const float* weight;   // [cols], the offset added, or null
  const float* bias;     // [cols], or null
  void* y;               // [rows][cols]
  void* s;               // [rows][cols], or null where nobody asks for it
  float* mean;           // [rows], or null
  float* rstd;           // [rows], or null
  int64_t cols, x_stride, residual_stride;
  uint64_t seed;
  float p, scale, eps;       // scale: 1 / (1 - p)
  int format;                // Format number of x, residual, y, s
  bool rms, plain, dropout;  // plain: s is x
};

struct NormBackwardArgs {
  const void* grad;      // [rows][cols], rows grad_stride apart
  const void* grad_sum;  // [rows][cols], rows grad_sum_stride apart, or null
  const void* s;         // [rows][cols], rows s_stride apart
  const float* weight;   // [cols], the offset added, or null
  const float* mean;     // [rows], or null: RMS norm
  const float* rstd;     // [rows]
  void* ds;              // [rows][cols]
  void* dx;              // [rows][cols], or null where it is ds
  int64_t cols, grad_stride, grad_sum_stride, s_stride;
  uint64_t seed;
  float p, scale;
  int format;
};

struct NormKernels {
  // to[c] = from[c] + offset in float32: weight or bias as the rows below read it.
  void (*to_floats)(const void* from, int format, float offset, int64_t cols, float* to);
  // Rows row0 .. row1; row: cols floats of scratch, aligned to 64.
  void (*forward)(const NormForwardArgs& a, int64_t row0, int64_t row1, float* row);
  // The same backward; dweight, dbias [cols], added to, or null where neither is wanted.
  void (*backward)(const NormBackwardArgs& a, int64_t row0, int64_t row1, float* dweight, float* dbias);
  // sum[c] = partial[0][c] + partial[1][c] + ... for col0 <= c < col1; parts are `stride` floats apart.
  void (*add_parts)(const float* partial, int64_t parts, int64_t stride, int64_t col0, int64_t col1, float* sum);
};

#define FASTDL_DECLARE(variant) \
  namespace variant { extern const NormKernels norm_kernels; }
FASTDL_VECTORS(FASTDL_DECLARE)
#undef FASTDL_DECLARE

}  // namespace fastdl
