// What rnn_kernel.cpp offers at each level: the steps of one thread of a team. Raw pointers, no torch.
// Contract: fastdl/ops/rnn.py.
#pragma once

#include "cpu/recurrent_kernel.h"

namespace fastdl {

struct RnnForwardArgs : RecurrentForwardArgs {
  bool relu;
};

struct RnnBackwardArgs : RecurrentBackwardArgs {
  bool relu;
};

struct RnnKernels {
  // Steps of thread `thread` of `team`, which all call it at once.
  void (*forward)(const RnnForwardArgs& a, int thread, int team);
  void (*backward)(const RnnBackwardArgs& a, int thread, int team);
};

#define FASTDL_DECLARE(variant) \
  namespace variant { extern const RnnKernels rnn_kernels; }
FASTDL_VECTORS(FASTDL_DECLARE)
#undef FASTDL_DECLARE

}  // namespace fastdl
