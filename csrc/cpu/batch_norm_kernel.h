// What batch_norm_kernel.cpp offers at each level: statistics of parts of a batch, the affine step, and their gradients.
// Raw pointers, no torch. Contract: fastdl/ops/batch_norm.py.
//
// [N, C, spatial] is read as N rows of `units`, each a run of `run` elements that share coefficients: long channels are
// units themselves; short ones (and channels last, where spatial is 1) are `spatial` units of one element, so that vectors
// go along the row.
#pragma once

#include <stdint.h>

#include "cpu/cpu_level.h"

namespace fastdl {

struct BatchNormArgs {
  const void *x, *residual;   // [N][units][run]; residual or null
  const void *grad, *gate;    // the same: gradient of y, and y where a ReLU made it, or null
  void *y, *dx, *dresidual;   // the same; dresidual or null
  const float *mean, *slope;  // [units]: y = (x - mean) * slope + shift;
  const float *shift, *pull;  // dx = g * slope + (x - mean) * pull + shift
  int64_t units, run;
  int format;
  bool relu;
};

struct BatchNormKernels {
  void (*to_floats)(const void* from, int format, int64_t n, float* to);
  // Rows row0 .. row1, units unit0 .. unit1: mean[unit] and the sum of squared distances from it.
  void (*moments)(const BatchNormArgs& a, int64_t row0, int64_t row1, int64_t unit0, int64_t unit1, float* mean,
                  float* squares);
  // The same: sums of g and of g * (x - mean).
  void (*products)(const BatchNormArgs& a, int64_t row0, int64_t row1, int64_t unit0, int64_t unit1, float* sum,
                   float* product);
  // y, or dx and dresidual, of units unit0 .. unit1 of N * units; whole rows where run is 1.
  void (*forward)(const BatchNormArgs& a, int64_t unit0, int64_t unit1);
  void (*backward)(const BatchNormArgs& a, int64_t unit0, int64_t unit1);
};

constexpr int64_t BATCH_NORM_SHORT = 32;  // positions below which a channel is short

#define FASTDL_DECLARE(variant) \
  namespace variant { extern const BatchNormKernels batch_norm_kernels; }
FASTDL_VECTORS(FASTDL_DECLARE)
#undef FASTDL_DECLARE

}  // namespace fastdl
