// Layer norm and RMS norm, forward and backward, for one level.
//
// Forward: a row is brought into a float32 buffer that stays in the first-level cache (s = residual + dropout(x)), summed,
// summed again around its mean, and written. Backward: two passes over the row, the second from the cache. Floor: the
// bytes of x, residual, y, s (grad, s, ds) over the bandwidth; the arithmetic is some 3 operations an element and pass.
//
// Test: pytest tests/test_norm.py
#include "cpu/norm_kernel.h"

#include "cpu/rows_kernel.h"

namespace fastdl {
namespace FASTDL_LEVEL {
namespace {

template <class T>
void forward(const NormForwardArgs& a, int64_t row0, int64_t row1, float* row) {
  using Element = typename T::Element;
  const float width = 1.0f / (float)a.cols;
  const vf one = vset1(1.0f), zero = vset1(0.0f);
  for (int64_t r = row0; r < row1; ++r) {
    const Element* x = (const Element*)a.x + r * a.x_stride;
    const Element* residual = a.residual ? (const Element*)a.residual + r * a.residual_stride : nullptr;
    Element* s = a.s ? (Element*)a.s + r * a.cols : nullptr;
    Element* y = (Element*)a.y + r * a.cols;
    vf sums[4] = {zero, zero, zero, zero};
    for_row(a.cols, [&](int64_t k, const auto& part, auto i) FASTDL_STEP {
      vf v = part.template load<T>(x + k);
      if (!a.plain) {
        if (a.dropout) v = dropped(v, dropout(a.seed, r * a.cols + k, a.p, a.scale));
        if (residual) v = vadd(part.template load<T>(residual + k), v);
        if (s) part.template store<T>(s + k, v);
        if constexpr (sizeof(Element) < 4) {  // y is the norm of what s says
          Element rounded[LANES];
          T::store(rounded, v);
          v = T::load(rounded);
        }
        v = part.keep(v);
      }
      vstore(row + k, v);
      sums[decltype(i)::value] = vadd(sums[decltype(i)::value], v);
    });
    float mean = 0.0f;
    if (!a.rms) {
      mean = total(sums) * width;
      if (a.mean) a.mean[r] = mean;
    }
    const vf middle = vset1(mean);
    for (vf& sum : sums) sum = zero;
    for_row(a.cols, [&](int64_t k, const auto& part, auto i) FASTDL_STEP {
      const vf d = part.keep(vsub(vload(row + k), middle));
      sums[decltype(i)::value] = vfma(d, d, sums[decltype(i)::value]);
    });
    const float squares = total(sums);
    const float rstd = 1.0f / __builtin_sqrtf(squares * width + a.eps);
    if (a.rstd) a.rstd[r] = rstd;
    const vf factor = vset1(rstd);
    for_row(a.cols, [&](int64_t k, const auto& part, auto) FASTDL_STEP {
      const vf h = vmul(vsub(vload(row + k), middle), factor);
      const vf w = a.weight ? part.template load<F32>(a.weight + k) : one;
      const vf b = a.bias ? part.template load<F32>(a.bias + k) : zero;
      part.template store<T>(y + k, vfma(h, w, b));
    });
  }
}

// One row: the means of g * h and of g, with g = grad * weight and h = (s - mean) * rstd.
template <class T>
FASTDL_INLINE void row_means(const NormBackwardArgs& a, int64_t r, float* mean_gh, float* mean_g) {
  using Element = typename T::Element;
  const Element* grad = (const Element*)a.grad + r * a.grad_stride;
  const Element* s = (const Element*)a.s + r * a.s_stride;
  const vf zero = vset1(0.0f), mean = vset1(a.mean ? a.mean[r] : 0.0f);
  vf gh[4] = {zero, zero, zero, zero}, gs[4] = {zero, zero, zero, zero};
  for_row(a.cols, [&](int64_t k, const auto& part, auto i) FASTDL_STEP {
    constexpr int n = decltype(i)::value;
    const vf d = part.template load<T>(grad + k);  // zeros past the end, so every product below is 0 there
    const vf t = part.keep(vsub(part.template load<T>(s + k), mean));
    const vf g = a.weight ? vmul(d, part.template load<F32>(a.weight + k)) : d;
    gh[n] = vfma(g, t, gh[n]);
    gs[n] = vadd(gs[n], g);
  });
  *mean_gh = total(gh) * a.rstd[r] / (float)a.cols;
  *mean_g = a.mean ? total(gs) / (float)a.cols : 0.0f;
}

// Count rows at once: their ds, and their share of dweight and dbias, which are read and written once for all of them.
template <class T, int Count>
FASTDL_INLINE void backward_rows(const NormBackwardArgs& a, int64_t r0, float* dweight, float* dbias) {
  using Element = typename T::Element;
  float mean[Count], slope[Count], shift[Count];
  for (int j = 0; j < Count; ++j) {
    float mean_gh, mean_g;
    row_means<T>(a, r0 + j, &mean_gh, &mean_g);
    const float rstd = a.rstd[r0 + j];
    mean[j] = a.mean ? a.mean[r0 + j] : 0.0f;
    slope[j] = -rstd * rstd * mean_gh;
    shift[j] = -rstd * mean_g;
  }
  const vf one = vset1(1.0f), zero = vset1(0.0f);
  for_row(a.cols, [&](int64_t k, const auto& part, auto) FASTDL_STEP {
    const vf w = a.weight ? part.template load<F32>(a.weight + k) : one;
    vf dw = dweight ? part.template load<F32>(dweight + k) : zero,
       db = dweight ? part.template load<F32>(dbias + k) : zero;
#pragma GCC unroll 4
    for (int j = 0; j < Count; ++j) {
      const int64_t r = r0 + j;
      const vf d = part.template load<T>((const Element*)a.grad + r * a.grad_stride + k);
      const vf t = vsub(part.template load<T>((const Element*)a.s + r * a.s_stride + k), vset1(mean[j]));
      const vf scaled = vmul(d, vset1(a.rstd[r]));
      dw = vfma(scaled, t, dw);
      db = vadd(db, d);
      // rstd * (g - mean_g - h * mean_gh)
      vf v = vfma(t, vset1(slope[j]), vfma(scaled, w, vset1(shift[j])));
      if (a.grad_sum) v = vadd(v, part.template load<T>((const Element*)a.grad_sum + r * a.grad_sum_stride + k));
      part.template store<T>((Element*)a.ds + r * a.cols + k, v);
      if (a.dx)
        part.template store<T>((Element*)a.dx + r * a.cols + k,
                               dropped(v, dropout(a.seed, r * a.cols + k, a.p, a.scale)));
    }
    if (dweight) {
      part.template store<F32>(dweight + k, dw);
      part.template store<F32>(dbias + k, db);
    }
  });
}

template <class T>
void backward(const NormBackwardArgs& a, int64_t row0, int64_t row1, float* dweight, float* dbias) {
  // Several narrow rows at a time load and store dweight and dbias once; of wide ones no more than the first-level cache
  // holds between the two passes.
  const int64_t bytes = a.cols * (int64_t)sizeof(typename T::Element);
  int64_t r = row0;
  if (bytes <= 1024)
    for (; r + 4 <= row1; r += 4) backward_rows<T, 4>(a, r, dweight, dbias);
  if (bytes <= 2048)
    for (; r + 2 <= row1; r += 2) backward_rows<T, 2>(a, r, dweight, dbias);
  for (; r < row1; ++r) backward_rows<T, 1>(a, r, dweight, dbias);
}

void add_parts(const float* partial, int64_t parts, int64_t stride, int64_t col0, int64_t col1, float* sum) {
  for_row(col1 - col0, [&](int64_t k, const auto& part, auto) FASTDL_STEP {
    vf total = vset1(0.0f);
    for (int64_t i = 0; i < parts; ++i) total = vadd(total, part.template load<F32>(partial + i * stride + col0 + k));
    part.template store<F32>(sum + col0 + k, total);
  });
}

void forward_any(const NormForwardArgs& a, int64_t row0, int64_t row1, float* row) {
  dispatch(a.format, [&](auto type) { forward<decltype(type)>(a, row0, row1, row); });
}

void backward_any(const NormBackwardArgs& a, int64_t row0, int64_t row1, float* dweight, float* dbias) {
  dispatch(a.format, [&](auto type) { backward<decltype(type)>(a, row0, row1, dweight, dbias); });
}

}  // namespace

extern const NormKernels norm_kernels;
const NormKernels norm_kernels = {to_floats, forward_any, backward_any, add_parts};

}  // namespace FASTDL_LEVEL
}  // namespace fastdl
