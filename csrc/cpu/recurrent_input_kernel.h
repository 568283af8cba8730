// What recurrent_input_kernel.cpp offers at each level. Raw pointers, no torch.
#pragma once

#include "common/parallel.h"
#include "cpu/recurrent_product.h"

namespace fastdl {

struct RecurrentInputArgs {
  const void* x;          // [rows][cols], rows `stride` apart
  const uint8_t* packed;  // panels of [outputs, cols]
  const void* bias;       // [outputs], or null
  void* y;                // [rows][outputs]
  int64_t cols, stride, outputs;
  int format;                       // of x, bias, y
  const RecurrentProduct* product;  // of the level
};

struct RecurrentInputKernels {
  // y of some rows and panels of outputs; scratch: 16 rows of cols filled up to 16, 4 bytes each, aligned to 64.
  void (*input)(const RecurrentInputArgs& a, Range rows, Range panels, uint8_t* scratch);
};

#define FASTDL_DECLARE(variant) \
  namespace variant { extern const RecurrentInputKernels recurrent_input_kernels; }
FASTDL_VECTORS(FASTDL_DECLARE)
#undef FASTDL_DECLARE

}  // namespace fastdl
