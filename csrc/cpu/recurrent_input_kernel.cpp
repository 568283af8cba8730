// Products of many rows with a packed matrix, plus a bias, for one level: what lstm, gru and rnn compute from their input
// for all steps at once in inference, where the weights stay packed. Layout: recurrent_product.h.
//
// Method: four panels (64 outputs) at a time stay in the first- or second-level cache while all rows pass by.
//
// Test: pytest tests/test_recurrent_input.py
#include "cpu/recurrent_input_kernel.h"

#include "cpu/recurrent_steps.h"

namespace fastdl {
namespace FASTDL_LEVEL {
namespace {

// Whether rows of T are operands as they lie in memory.
template <class T>
constexpr bool direct = __is_same(T, F32) || (__is_same(T, BF16) && Operand<T>::BYTES == 2);

template <class T>
void input_of(const RecurrentInputArgs& a, Range rows, Range panels, uint8_t* scratch) {
  using Element = typename T::Element;
  const bool pad = __is_same(T, BF16) && a.cols % 2;
  const int64_t wide = (a.cols + LANES - 1) / LANES * LANES, bytes = packed_panel_bytes(a.format, a.cols);
  const Element* const x = (const Element*)a.x;
  const int64_t all = rows.end - rows.begin, most = a.product->rows_at_once(a.format, all);
  const int64_t blocks = (all + most - 1) / most;
  alignas(64) float out[TILE_ROWS * 4 * PANEL_COLS];
  for (int64_t panel = panels.begin; panel < panels.end; panel += 4) {
    const int some = (int)(panels.end - panel < 4 ? panels.end - panel : 4);
    const uint8_t* some_panels[4];
    for (int j = 0; j < some; ++j) some_panels[j] = a.packed + (panel + j) * bytes;
    for (int64_t block = 0; block < blocks; ++block) {
      const int64_t row = rows.begin + all * block / blocks;
      const int count = (int)(rows.begin + all * (block + 1) / blocks - row);
      const void* operand = x + row * a.stride;
      int64_t lda = a.stride;
      if (!direct<T> || pad) {
        for (int m = 0; m < count; ++m)
          for (int64_t k = 0; k < wide; k += LANES)
            Operand<T>::put(scratch, m * wide + k, get<T>(x + (row + m) * a.stride, k, a.cols - k));
        operand = scratch;
        lda = wide;
      }
      deep_tile<T>(*a.product, a.format, operand, lda, some_panels, some, a.cols, count, out);
      for (int m = 0; m < count; ++m)
        for (int j = 0; j < some; ++j)
          each_part((panel + j), a.outputs, [&](int64_t i, int64_t n, int lane) FASTDL_STEP {
            vf v = vload(out + (m * some + j) * PANEL_COLS + lane);
            if (a.bias) v = vadd(v, get<T>(a.bias, i, n));
            put<T>(a.y, (row + m) * a.outputs + i, v, n);
          });
    }
  }
}

void input(const RecurrentInputArgs& a, Range rows, Range panels, uint8_t* scratch) {
  dispatch(a.format, [&](auto type) { input_of<decltype(type)>(a, rows, panels, scratch); });
}

}  // namespace

extern const RecurrentInputKernels recurrent_input_kernels = {input};

}  // namespace FASTDL_LEVEL
}  // namespace fastdl
