// What rope_kernel.cpp offers at each level: rows of heads turned by the angles of their positions. Raw pointers, no torch.
// Contract: fastdl/ops/rope.py.
#pragma once

#include <stdint.h>

#include "cpu/cpu_level.h"

namespace fastdl {

struct RopeArgs {
  const void* x;                   // [batch][heads][n][head_dim], distances below
  void* y;                         // the same, other distances
  const float* cos_sin;            // [max_len][rope_dim]: cos, sin of each pair
  const int64_t* positions;        // [n], or [batch][n] with batch_stride n; null: start, start + 1, ...
  int64_t x_batch, x_head, x_row;  // elements
  int64_t y_batch, y_head, y_row;
  int64_t start, batch_stride, max_len, rope_dim, head_dim;
  int format;              // Format number of x and y
  bool interleaved, back;  // back: by the opposite angles
};

// Heads head0 .. head1 at positions row0 .. row1 of one batch.
struct RopeBlock {
  int64_t batch, head0, head1, row0, row1;
};

struct RopeKernels {
  // scratch: 2 * rope_dim floats for each row of the block.
  void (*turn)(const RopeArgs& a, const RopeBlock& b, float* scratch);
};

#define FASTDL_DECLARE(variant) \
  namespace variant { extern const RopeKernels rope_kernels; }
FASTDL_VECTORS(FASTDL_DECLARE)
#undef FASTDL_DECLARE

}  // namespace fastdl
