// What selective_scan_kernel.cpp offers at each level: the selective scan of a range of channels. Raw pointers, no torch.
// Contract: fastdl/ops/selective_scan.py.
#pragma once

#include <stdint.h>

#include "cpu/cpu_level.h"

namespace fastdl {

struct SelectiveScanTrack {
  const void* data;     // [batch][length][channels], channels side by side; null where there is none
  int64_t batch, step;  // strides in elements
};

struct SelectiveScanArgs {
  SelectiveScanTrack x, delta, z;  // [batch][length][dim]
  SelectiveScanTrack grad;         // of y, for the backward pass
  SelectiveScanTrack b, c;         // [batch][length][state]
  const float* a;                  // [state][stride]: transposed
  const float *d, *bias;           // [stride], zeros where there is none
  float* states;                   // [batch][chunks][state][dim]: before each chunk, or null
  void *y, *dx, *ddelta, *dz;      // [batch][length][dim] contiguous
  int64_t length, dim, state, chunks, stride;
  int format;
  bool softplus;
};

// What one range of channels of one sequence works in and adds to.
struct SelectiveScanRange {
  int64_t n, c0, c1;  // sequence, channels; c0 is a multiple of 16
  float* h;           // [state][stride]: before the first step, then after the last; backward: the gradient, likewise
  float* scratch;     // selective_scan_scratch(state) floats, aligned to 64
  float *db, *dc;     // [length][state]: this range's share of the gradients
  float* da;          // [state][stride]: this sequence's
  float *dd, *dbias;  // [stride]
};

inline int64_t selective_scan_scratch(int64_t state) {
  return 16 * (2 * 16 * state + (16 + 1) * state + 16 * state + 6 * 16) + 2 * 16 * state;
}

struct SelectiveScanKernels {
  void (*forward)(const SelectiveScanArgs& a, const SelectiveScanRange& r);
  void (*backward)(const SelectiveScanArgs& a, const SelectiveScanRange& r);
  // sum[i] = parts[0][i] + parts[1][i] + ..., `stride` floats apart, for begin <= i < end.
  void (*add_parts)(const float* parts, int64_t count, int64_t stride, int64_t begin, int64_t end, float* sum);
};

#define FASTDL_DECLARE(variant) \
  namespace variant { extern const SelectiveScanKernels selective_scan_kernels; }
FASTDL_VECTORS(FASTDL_DECLARE)
#undef FASTDL_DECLARE

}  // namespace fastdl
