// Products of a few rows with a packed matrix, for the steps of lstm, gru and rnn: declarations for every level.
//
// Packed layout (level-independent). A matrix [segments * rows, cols] is cut into panels of 16 output columns of the product;
// panels never cross a segment (a gate), the last one of a segment is filled with zeros:
//
//   float32, float16 (as float32)   panel[k][16]                    bfloat16   panel[k / 2][16][2], k filled up to even
//
// The left operand is a row of what the level multiplies with: float32, or bfloat16 where the level has a product of it
// (elsewhere bfloat16 values in float32). Sums run over k in order, whatever the number of rows: a row's result does not
// depend on the rows beside it.
#pragma once

#include <stdint.h>

#include "common/formats.h"
#include "cpu/cpu_level.h"

namespace fastdl {

constexpr int64_t PANEL_COLS = 16;  // outputs a panel

static inline int64_t panels_of(int64_t n) { return (n + PANEL_COLS - 1) / PANEL_COLS; }
// Bytes of a panel with k inputs.
static inline int64_t packed_panel_bytes(int format, int64_t k) {
  return (k + 1) / 2 * 2 * PANEL_COLS * (format == FORMAT_BF16 ? 2 : 4);
}

struct RecurrentProduct {
  // out[row][panel][16] = a[row] . panels[panel]; rows <= rows_at_once, count <= 4; lda in elements of the operand.
  void (*tile)(int format, const void* a, int64_t lda, const uint8_t* const* panels, int count, int64_t k, int rows,
               float* out);
  // The same in float32 with rows that lie side by side: a[k][rows].
  void (*interleaved)(const float* a, const uint8_t* const* panels, int count, int64_t k, int rows, float* out);
  // One panel from a matrix whose outputs are rows: row i is at from + i * stride, n <= 16 of them are there.
  void (*pack_rows)(int format, const void* from, int64_t stride, int64_t n, int64_t k, uint8_t* to);
  // One panel from a matrix whose outputs are columns: input i is at from + i * stride, n <= 16 outputs; `to` starts at
  // input k0 (even) of the panel.
  void (*pack_cols)(int format, const void* from, int64_t stride, int64_t n, int64_t k, int64_t k0, uint8_t* to);
  // How many of `rows` rows a call of `tile` takes at most; cut into even blocks of so many, no block is below what the
  // level needs.
  int (*rows_at_once)(int format, int64_t rows);
};

#define FASTDL_DECLARE(variant) \
  namespace variant { extern const RecurrentProduct recurrent_product; }
FASTDL_VARIANTS(FASTDL_DECLARE)
#undef FASTDL_DECLARE

}  // namespace fastdl
