// What recurrent_outer_kernel.cpp offers at each level. Raw pointers, no torch.
#pragma once

#include "common/parallel.h"
#include "cpu/recurrent_product.h"

namespace fastdl {

// c [rows][cols] = a^T b, for a [depth][rows] and b [depth][cols] in float32: the gradient of a weight from those of the
// products and from the inputs, summed over steps and batch.
struct RecurrentOuterArgs {
  const float *a, *b;
  float* c;
  int64_t depth, rows, cols, a_stride, b_stride;
  const RecurrentProduct* product;  // of the level
};

constexpr int64_t OUTER_DEPTH = 768;  // inputs a pass: four panels of b and the rows below stay in a second-level cache
constexpr int64_t OUTER_ROWS = 96;    // rows of c a pass

struct RecurrentOuterKernels {
  // Adds (stores, where begin is 0) the products of inputs begin .. end - 1 to some rows of c. panels: those of b packed;
  // scratch: OUTER_ROWS * OUTER_DEPTH floats.
  void (*outer)(const RecurrentOuterArgs& a, int64_t begin, int64_t end, Range rows, const uint8_t* panels,
                float* scratch);
};

#define FASTDL_DECLARE(variant) \
  namespace variant { extern const RecurrentOuterKernels recurrent_outer_kernels; }
FASTDL_VECTORS(FASTDL_DECLARE)
#undef FASTDL_DECLARE

}  // namespace fastdl
