// What group_norm_kernel.cpp offers at each level: groups of group norm, forward and backward. Raw pointers, no torch.
// Contract: fastdl/ops/group_norm.py.
#pragma once

#include <stdint.h>

#include "cpu/cpu_level.h"

namespace fastdl {

// A group is `width` channels of `spatial` elements each, in one piece: row n * groups + g of x.
struct GroupNormForwardArgs {
  const void* x;               // [N][groups][width * spatial]
  const float *weight, *bias;  // [groups * width], or null
  const float *scale, *shift;  // [N][groups * width], or null
  void* y;                     // as x
  float *mean, *rstd;          // [N][groups]
  int64_t groups, width, spatial;
  float eps;
  int format;  // Format number of x, y
};

struct GroupNormBackwardArgs {
  const void *grad, *x;      // [N][groups][width * spatial]
  const float* weight;       // [groups * width], or null
  const float* scale;        // [N][groups * width], or null
  const float *mean, *rstd;  // [N][groups]
  void* dx;                  // as x
  float *sum, *product;      // [N][groups * width]: over positions, of grad and of grad * h
  int64_t groups, width, spatial;
  int format;
};

struct GroupNormKernels {
  // to[k] = from[k] in float32
  void (*to_floats)(const void* from, int format, int64_t n, float* to);
  // Groups row0 .. row1 of N * groups; scratch: group_norm_scratch floats, aligned to 64.
  void (*forward)(const GroupNormForwardArgs& a, int64_t row0, int64_t row1, float* scratch);
  void (*backward)(const GroupNormBackwardArgs& a, int64_t row0, int64_t row1, float* scratch);
};

// Below so many positions a channel is too short a run: coefficients are then laid out for each element of the group.
constexpr int64_t GROUP_NORM_SHORT = 32;

inline int64_t group_norm_scratch(int64_t width, int64_t spatial) {
  return 2 * ((width * (spatial < GROUP_NORM_SHORT ? spatial : 1) + 15) / 16 * 16);
}

#define FASTDL_DECLARE(variant) \
  namespace variant { extern const GroupNormKernels group_norm_kernels; }
FASTDL_VECTORS(FASTDL_DECLARE)
#undef FASTDL_DECLARE

}  // namespace fastdl
