// The add of positions with scale and dropout, and its gradients, for one level.
//
//   y = dropout(scale * x + table[position]);   dx = scale * mask * grad;   dtable[p] = sum of mask * grad at position p
//
// Forward: one pass over the rows. Backward: a position's rows one after another, so that their sum stays in the
// first-level cache and grad is read once; sums of 32 rows are added to the total, which keeps its error small. Floor: one
// read and one write of x over the bandwidth.
//
// Test: pytest tests/test_position.py
#include "cpu/position_kernel.h"

#include "cpu/rows_kernel.h"

namespace fastdl {
namespace FASTDL_LEVEL {
namespace {

constexpr int64_t TOGETHER = 32;  // rows whose sum is added to the total at once

FASTDL_INLINE int64_t clamp(int64_t i, int64_t size) { return i < 0 ? 0 : i >= size ? size - 1 : i; }

template <class T, class Table>
void forward(const PositionArgs& a, int64_t row0, int64_t row1) {
  using Element = typename T::Element;
  const vf scale = vset1(a.scale);
  for (int64_t r = row0; r < row1; ++r) {
    const Element* x = (const Element*)a.x + r * a.x_stride;
    Element* y = (Element*)a.y + r * a.cols;
    const typename Table::Element* added = nullptr;
    if (a.table) {
      int64_t position = a.start + r % a.n;
      if (a.positions) {
        const int64_t entry = a.by_batch ? r / (a.inner * a.n) * a.n + r % a.n : r % a.n;
        position = clamp(a.positions[entry], a.table_len);
      }
      added = (const typename Table::Element*)a.table + position * a.cols;
    }
    for_each(a.cols, [&](int64_t k, const auto& part) FASTDL_STEP {
      vf v = vmul(part.template load<T>(x + k), scale);
      if (added) v = vadd(v, part.template load<Table>(added + k));
      if (a.dropout) v = dropped(v, dropout(a.seed, r * a.cols + k, a.p, a.keep));
      part.template store<T>(y + k, v);
    });
  }
}

// One row of grad: its dx, and its share of sum.
template <class T>
FASTDL_INLINE void backward_row(const PositionArgs& a, int64_t r, float* sum) {
  using Element = typename T::Element;
  const Element* grad = (const Element*)a.x + r * a.x_stride;
  Element* dx = a.y ? (Element*)a.y + r * a.cols : nullptr;
  const vf scale = vset1(a.scale);
  for_each(a.cols, [&](int64_t k, const auto& part) FASTDL_STEP {
    vf d = part.template load<T>(grad + k);
    if (a.dropout) d = dropped(d, dropout(a.seed, r * a.cols + k, a.p, a.keep));
    if (dx) part.template store<T>(dx + k, vmul(d, scale));
    part.template store<F32>(sum + k, vadd(part.template load<F32>(sum + k), d));
  });
}

template <class T>
void backward(const PositionArgs& a, int64_t first, int64_t last, float* sum) {
  const size_t bytes = (size_t)a.cols * sizeof(float);
  for (int64_t position = first; position < last; ++position) {
    float* const total = a.dtable + position * a.cols;
    memset(total, 0, bytes);
    int64_t begin = position - a.start, end = begin + 1;
    if (a.order) {
      begin = clamp(a.begin[position], a.entries + 1);
      end = clamp(a.begin[position + 1], a.entries + 1);
    } else if (begin < 0 || begin >= a.n) {
      continue;
    }
    int64_t together = 0;
    const auto flush = [&] {
      for_each(a.cols, [&](int64_t k, const auto& part) FASTDL_STEP {
        part.template store<F32>(total + k, vadd(part.template load<F32>(total + k), part.template load<F32>(sum + k)));
      });
      together = 0;
    };
    for (int64_t i = begin; i < end; ++i) {
      const int64_t entry = a.order ? clamp(a.order[i], a.entries) : i;
      for (int64_t j = 0; j < a.inner; ++j) {
        if (together == 0) memset(sum, 0, bytes);
        backward_row<T>(a, (entry / a.n * a.inner + j) * a.n + entry % a.n, sum);
        if (++together == TOGETHER) flush();
      }
    }
    if (together > 0) flush();
  }
}

void forward_any(const PositionArgs& a, int64_t row0, int64_t row1) {
  dispatch(a.format, [&](auto type) {
    using T = decltype(type);
    a.float_table ? forward<T, F32>(a, row0, row1) : forward<T, T>(a, row0, row1);
  });
}

void backward_any(const PositionArgs& a, int64_t first, int64_t last, float* sum) {
  dispatch(a.format, [&](auto type) { backward<decltype(type)>(a, first, last, sum); });
}

}  // namespace

extern const PositionKernels position_kernels;
const PositionKernels position_kernels = {forward_any, backward_any};

}  // namespace FASTDL_LEVEL
}  // namespace fastdl
