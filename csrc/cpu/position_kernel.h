// What position_kernel.cpp offers at each level: the add of a table's rows, and its gradients. Raw pointers, no torch.
// Contract: fastdl/ops/position.py; entries and inner: csrc/common/position_tensors.h.
#pragma once

#include <stdint.h>

#include "cpu/cpu_level.h"

namespace fastdl {

struct PositionArgs {
  const void* x;             // [rows][cols], rows x_stride apart; in the backward grad
  const void* table;         // [table_len][cols] in float32 or the format of x, or null: nothing is added
  void* y;                   // [rows][cols]; in the backward dx, or null where not needed
  float* dtable;             // [table_len][cols]
  const int64_t* positions;  // [entries], or null: start, start + 1, ...
  const int64_t* order;      // [entries] by position, or null
  const int64_t* begin;      // [table_len + 1]: where a position's entries begin in order
  int64_t cols, x_stride, n, entries, inner, start, table_len;
  uint64_t seed;
  float p, keep, scale;  // keep: 1 / (1 - p)
  int format;            // Format number of x and y
  bool float_table, dropout, by_batch;
};

struct PositionKernels {
  // y of rows row0 .. row1.
  void (*forward)(const PositionArgs& a, int64_t row0, int64_t row1);
  // dtable of positions first .. last, and dx of their rows; sum: cols floats of scratch.
  void (*backward)(const PositionArgs& a, int64_t first, int64_t last, float* sum);
};

#define FASTDL_DECLARE(variant) \
  namespace variant { extern const PositionKernels position_kernels; }
FASTDL_VECTORS(FASTDL_DECLARE)
#undef FASTDL_DECLARE

}  // namespace fastdl
