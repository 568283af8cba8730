// Gradients of weights for one level: sums of outer products over all steps and sequences.
//
// Method: b is packed in panels of 16 columns; rows of a^T are copied so that those of a tile lie side by side, which reads
// a as it lies. Up to six rows times four panels of sums stay in registers while the depth runs, as in the step products.
// Floor: two operations for every element of a and column of b over the rate of multiply-adds.
//
// Test: pytest tests/test_recurrent_products.py
#include "cpu/recurrent_outer_kernel.h"

#include "cpu/recurrent_steps.h"

namespace fastdl {
namespace FASTDL_LEVEL {
namespace {

void outer(const RecurrentOuterArgs& a, int64_t begin, int64_t end, Range rows, const uint8_t* packed, float* scratch) {
  const int64_t depth = end - begin, count = panels_of(a.cols), bytes = packed_panel_bytes(FORMAT_F32, depth);
  const int64_t most = a.product->rows_at_once(FORMAT_F32, OUTER_ROWS);
  alignas(64) float out[TILE_ROWS * 4 * PANEL_COLS];
  for (int64_t first = rows.begin; first < rows.end; first += OUTER_ROWS) {
    const int64_t here = rows.end - first < OUTER_ROWS ? rows.end - first : OUTER_ROWS;
    for (int64_t k = 0; k < depth; ++k) {
      const float* const line = a.a + (begin + k) * a.a_stride + first;
      for (int64_t row = 0; row < here; row += most) {
        const int64_t some = here - row < most ? here - row : most;
        memcpy(scratch + row * depth + k * some, line + row, (size_t)some * sizeof(float));
      }
    }
    for (int64_t panel = 0; panel < count; panel += 4) {
      const int group = (int)(count - panel < 4 ? count - panel : 4);
      const uint8_t* panels[4];
      for (int j = 0; j < group; ++j) panels[j] = packed + (panel + j) * bytes;
      for (int64_t row = 0; row < here; row += most) {
        const int some = (int)(here - row < most ? here - row : most);
        a.product->interleaved(scratch + row * depth, panels, group, depth, some, out);
        for (int m = 0; m < some; ++m)
          for (int j = 0; j < group; ++j)
            each_part(panel + j, a.cols, [&](int64_t i, int64_t n, int lane) FASTDL_STEP {
              const int64_t at = (first + row + m) * a.cols + i;
              vf v = vload(out + (m * group + j) * PANEL_COLS + lane);
              if (begin) v = vadd(v, get<F32>(a.c, at, n));
              put<F32>(a.c, at, v, n);
            });
      }
    }
  }
}

}  // namespace

extern const RecurrentOuterKernels recurrent_outer_kernels = {outer};

}  // namespace FASTDL_LEVEL
}  // namespace fastdl
