// What gru_kernel.cpp and gru_backward_kernel.cpp offer at each level: the steps of one thread of a team. Raw pointers, no
// torch. Contract: fastdl/ops/gru.py.
#pragma once

#include "cpu/recurrent_kernel.h"

namespace fastdl {

struct GruForwardArgs : RecurrentForwardArgs {
  const float* bias_n;  // [D][H], or null
};

struct GruBackwardArgs : RecurrentBackwardArgs {
  const void* y;    // [T][B][D][H]
  const float* h0;  // [D][B][H]
  float* dbias_n;   // [D][H], zeroed
};

struct GruKernels {
  // Steps of thread `thread` of `team`, which all call it at once.
  void (*forward)(const GruForwardArgs& a, int thread, int team);
  void (*backward)(const GruBackwardArgs& a, int thread, int team);
};

#define FASTDL_DECLARE(variant)                        \
  namespace variant {                                  \
  extern const GruKernels gru_kernels;                 \
  void gru_backward(const GruBackwardArgs&, int, int); \
  }
FASTDL_VECTORS(FASTDL_DECLARE)
#undef FASTDL_DECLARE

}  // namespace fastdl
