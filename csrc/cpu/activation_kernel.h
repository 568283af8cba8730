// What activation_kernel.cpp offers at each level: activations and gated products over blocks of rows. Raw pointers, no
// torch. Contract: fastdl/ops/activation.py.
#pragma once

#include <stdint.h>

#include "common/activations.h"
#include "cpu/cpu_level.h"

namespace fastdl {

struct ActivationArgs {
  const void* x;      // [rows][cols], rows x_stride apart
  const void* other;  // residual (or null), in the backward grad: [rows][cols], rows other_stride apart
  const float* bias;  // [channels]: bias[row % channels], or with channels 0 [cols]; or null
  void* y;            // [rows][cols]; in the backward dx
  int64_t cols, x_stride, other_stride, channels;
  uint64_t seed;
  float p, scale, alpha;  // scale: 1 / (1 - p); alpha: slope or beta
  int format, kind;       // Format number of x, other, y; ActivationKind
  bool dropout, mask_by_row;
};

struct GluArgs {
  const void *gate, *up, *grad;  // [rows][cols]; grad: null in the forward
  void *y, *dgate, *dup;         // [rows][cols]; y in the forward, the others in the backward
  int64_t cols, gate_stride, up_stride, grad_stride;
  int format, kind;
};

// Rows row0 .. row1, columns col0 .. col1.
struct RowBlock {
  int64_t row0, row1, col0, col1;
};

// Where a block adds its sums of dt; null where not wanted.
struct ActivationSums {
  float* columns;  // [cols]
  float* rows;     // rows[r * rows_stride]
  int64_t rows_stride;
  float* beta;  // one
};

struct ActivationKernels {
  void (*to_floats)(const void* from, int format, float offset, int64_t cols, float* to);
  void (*forward)(const ActivationArgs& a, const RowBlock& b);
  void (*backward)(const ActivationArgs& a, const RowBlock& b, const ActivationSums& sums);
  void (*glu_forward)(const GluArgs& a, const RowBlock& b);
  void (*glu_backward)(const GluArgs& a, const RowBlock& b);
};

#define FASTDL_DECLARE(variant) \
  namespace variant { extern const ActivationKernels activation_kernels; }
FASTDL_VECTORS(FASTDL_DECLARE)
#undef FASTDL_DECLARE

}  // namespace fastdl
