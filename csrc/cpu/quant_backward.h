// The gradient for x: dx[t][k] = sum_n grad[t][n] * W[n][k]. As in the forward product weights stand and tokens stream;
// here the lanes are k, so a panel's block is turned round once.
#pragma once

#include "cpu/quant_activations.h"
#include "cpu/quant_unpack.h"

namespace fastdl {
namespace FASTDL_LEVEL {
namespace {

constexpr int64_t BACKWARD_CHUNK = 128;  // tokens, 32 sums each

struct BackwardScratch {
  alignas(64) float sums[BACKWARD_CHUNK * 32];
  alignas(64) float grad[BACKWARD_CHUNK * PANEL];
  alignas(64) float by_column[32 * PANEL];
  alignas(64) float by_row[PANEL * 32];
};

// 32 columns of a panel as float32, by row
template <class F>
void unpack_by_row(const uint8_t* panel, int64_t cols, int64_t b, BackwardScratch* s) {
  for (int q = 0; q < 4; ++q)
    for (int h = 0; h < PARTS; ++h) {
      vf w[8];
      F::unpack(panel, cols, b, q, h, w);
      for (int i = 0; i < 8; ++i) vstore(s->by_column + (q * 8 + i) * PANEL + h * LANES, w[i]);
    }
  for (int r = 0; r < PANEL; ++r)
    for (int k = 0; k < 32; ++k) s->by_row[r * 32 + k] = s->by_column[k * PANEL + r];
}

void backward_block(const BackwardArgs& a, int64_t b, int64_t t0, int64_t n, BackwardScratch* s) {
  const int64_t bytes = panel_bytes(a.format, a.cols), panels = panel_count(a.rows);
  const int64_t width = a.grad_format == FORMAT_F32 ? 4 : 2;
  memset(s->sums, 0, (size_t)n * 32 * sizeof(float));
  for (int64_t p = 0; p < panels; ++p) {
#define FASTDL_UNPACK(F) unpack_by_row<F>(a.w + p * bytes, a.cols, b, s)
    FASTDL_FORMAT_SWITCH(a.format, FASTDL_UNPACK)
#undef FASTDL_UNPACK
    const int64_t valid = a.rows - p * PANEL < PANEL ? a.rows - p * PANEL : PANEL;
    for (int64_t t = 0; t < n; ++t) {
      uint32_t raw[PANEL] = {0};
      memcpy(raw, (const char*)a.grad + ((t0 + t) * a.ld_grad + p * PANEL) * width, (size_t)(valid * width));
      for (int h = 0; h < PANEL; h += LANES) vstore(s->grad + t * PANEL + h, load_as_float(raw, a.grad_format, h));
    }
    for (int r = 0; r < PANEL; r += 8)
      for (int k = 0; k < 32; k += LANES) {
        vf w[8];
        for (int i = 0; i < 8; ++i) w[i] = vload(s->by_row + (r + i) * 32 + k);
        for (int64_t t = 0; t < n; ++t) {
          const float* g = s->grad + t * PANEL + r;
          vf acc = vload(s->sums + t * 32 + k);
#pragma GCC unroll 8
          for (int i = 0; i < 8; ++i) acc = vfma(w[i], vset1(g[i]), acc);
          vstore(s->sums + t * 32 + k, acc);
        }
      }
  }
  const int64_t columns = a.cols - b * 32 < 32 ? a.cols - b * 32 : 32;
  for (int64_t t = 0; t < n; ++t) {
    alignas(64) uint32_t row[32];
    for (int k = 0; k < 32; k += LANES) store_from_float(row, a.grad_format, k, vload(s->sums + t * 32 + k));
    memcpy((char*)a.out + ((t0 + t) * a.ld_out + b * 32) * width, row, (size_t)(columns * width));
  }
}

void backward(const BackwardArgs& a, int64_t b0, int64_t b1, void* scratch) {
  for (int64_t t0 = 0; t0 < a.tokens; t0 += BACKWARD_CHUNK)
    for (int64_t b = b0; b < b1; ++b)
      backward_block(a, b, t0, a.tokens - t0 < BACKWARD_CHUNK ? a.tokens - t0 : BACKWARD_CHUNK,
                     (BackwardScratch*)scratch);
}

}  // namespace
}  // namespace FASTDL_LEVEL
}  // namespace fastdl
