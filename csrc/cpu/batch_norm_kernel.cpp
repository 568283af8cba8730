// Batch norm, forward and backward, for one level.
//
// A part of the batch is summed, then summed again around its mean from the cache; batch_norm.cpp merges the parts. Long
// channels are runs of memory with one coefficient; short ones are columns, whose vectors hold as many channels as lanes.
// Floor: (reads of x twice, residual + write of y) / bandwidth; backward: grad, x and y twice, and the writes.
//
// Test: pytest tests/test_batch_norm.py
#include "cpu/batch_norm_kernel.h"

#include "cpu/channels_kernel.h"

namespace fastdl {
namespace FASTDL_LEVEL {
namespace {

// mean + rest; a mean that is infinite already stays so.
FASTDL_INLINE vf corrected(vf mean, vf rest) {
  const vf zero = vset1(0.0f);
  return vadd(mean, vselect_le(vsub(rest, rest), zero, rest, zero));
}

template <class T>
void run_moments(const BatchNormArgs& a, int64_t row0, int64_t row1, int64_t unit0, int64_t unit1, float* mean,
                 float* squares) {
  using Element = typename T::Element;
  const double count = (double)(row1 - row0) * (double)a.run;
  for (int64_t u = unit0; u < unit1; ++u) {
    const auto at = [&](int64_t r) { return (const Element*)a.x + (r * a.units + u) * a.run; };
    double sum = 0.0, rest = 0.0, square = 0.0;
    for (int64_t r = row0; r < row1; ++r) sum += run_sum<T>(at(r), a.run);
    const float center = (float)(sum / count);
    for (int64_t r = row0; r < row1; ++r) {
      const Sums sums = run_squares<T>(at(r), a.run, center);
      rest += sums.first;
      square += sums.second;
    }
    const bool finite = rest - rest == 0.0;
    mean[u] = finite ? (float)(center + rest / count) : center;
    if (finite) square -= rest * rest / count;
    squares[u] = square < 0.0 ? 0.0f : (float)square;  // rounding, where all values are equal and large
  }
}

template <class T>
void column_moments(const BatchNormArgs& a, int64_t row0, int64_t row1, int64_t unit0, int64_t unit1, float* mean,
                    float* squares) {
  using Element = typename T::Element;
  const vf zero = vset1(0.0f), width = vset1(1.0f / (float)(row1 - row0));
  for_row(unit1 - unit0, [&](int64_t k, const auto& part, auto) FASTDL_STEP {
    const Element* x = (const Element*)a.x + unit0 + k;
    vf sums[4] = {zero, zero, zero, zero};
    int64_t r = row0;
    for (; r + 4 <= row1; r += 4)
      for (int i = 0; i < 4; ++i) sums[i] = vadd(sums[i], part.template load<T>(x + (r + i) * a.units));
    for (; r < row1; ++r) sums[0] = vadd(sums[0], part.template load<T>(x + r * a.units));
    const vf center = vmul(vadd(vadd(sums[0], sums[1]), vadd(sums[2], sums[3])), width);
    vf rests[2] = {zero, zero}, apart[2] = {zero, zero};
    for (r = row0; r < row1; ++r) {
      const vf d = vsub(part.template load<T>(x + r * a.units), center);
      rests[r & 1] = vadd(rests[r & 1], d);
      apart[r & 1] = vfma(d, d, apart[r & 1]);
    }
    const vf rest = vadd(rests[0], rests[1]), mean_rest = vmul(rest, width);
    part.template store<F32>(mean + unit0 + k, corrected(center, mean_rest));
    const vf square = vsub(vadd(apart[0], apart[1]), vmul(rest, mean_rest));
    part.template store<F32>(squares + unit0 + k, vmax(zero, square));  // in this order NaN stays NaN
  });
}

template <class T>
void run_products(const BatchNormArgs& a, int64_t row0, int64_t row1, int64_t unit0, int64_t unit1, float* sum,
                  float* product) {
  using Element = typename T::Element;
  for (int64_t u = unit0; u < unit1; ++u) {
    Sums all;
    for (int64_t r = row0; r < row1; ++r) {
      const int64_t at = (r * a.units + u) * a.run;
      const Sums sums = run_products<T>((const Element*)a.grad + at, a.gate ? (const Element*)a.gate + at : nullptr,
                                        (const Element*)a.x + at, a.run, a.mean[u]);
      all.first += sums.first;
      all.second += sums.second;
    }
    sum[u] = (float)all.first;
    product[u] = (float)all.second;
  }
}

template <class T>
void column_products(const BatchNormArgs& a, int64_t row0, int64_t row1, int64_t unit0, int64_t unit1, float* sum,
                     float* product) {
  using Element = typename T::Element;
  for_row(unit1 - unit0, [&](int64_t k, const auto& part, auto) FASTDL_STEP {
    const vf zero = vset1(0.0f), center = part.template load<F32>(a.mean + unit0 + k);
    vf sums[2] = {zero, zero}, products[2] = {zero, zero};
    for (int64_t r = row0; r < row1; ++r) {
      const int64_t at = r * a.units + unit0 + k;
      const vf g = gate<T>((const Element*)a.grad + at, a.gate ? (const Element*)a.gate + at : nullptr, 0, part);
      const vf d = vsub(part.template load<T>((const Element*)a.x + at), center);
      sums[r & 1] = vadd(sums[r & 1], g);
      products[r & 1] = vfma(g, d, products[r & 1]);
    }
    part.template store<F32>(sum + unit0 + k, vadd(sums[0], sums[1]));
    part.template store<F32>(product + unit0 + k, vadd(products[0], products[1]));
  });
}

// body(offset, unit, count) for runs of elements that share coefficients, or for whole rows.
template <class Body>
__attribute__((always_inline)) static inline void for_units(const BatchNormArgs& a, int64_t unit0, int64_t unit1,
                                                            const Body& body) {
  if (a.run > 1) {
    for (int64_t u = unit0; u < unit1; ++u) body(u * a.run, u % a.units, a.run);
  } else {
    for (int64_t u = unit0; u < unit1; u += a.units) body(u, 0, a.units);
  }
}

template <class T>
void forward(const BatchNormArgs& a, int64_t unit0, int64_t unit1) {
  using Element = typename T::Element;
  for_units(a, unit0, unit1, [&](int64_t at, int64_t u, int64_t n) {
    const Element* x = (const Element*)a.x + at;
    const Element* residual = a.residual ? (const Element*)a.residual + at : nullptr;
    Element* y = (Element*)a.y + at;
    if (a.run > 1)
      run_affine<T>(x, residual, y, n, One{a.mean[u]}, One{a.slope[u]}, One{a.shift[u]}, a.relu);
    else
      run_affine<T>(x, residual, y, n, Each{a.mean}, Each{a.slope}, Each{a.shift}, a.relu);
  });
}

template <class T>
void backward(const BatchNormArgs& a, int64_t unit0, int64_t unit1) {
  using Element = typename T::Element;
  for_units(a, unit0, unit1, [&](int64_t at, int64_t u, int64_t n) {
    const Element* grad = (const Element*)a.grad + at;
    const Element* y = a.gate ? (const Element*)a.gate + at : nullptr;
    const Element* x = (const Element*)a.x + at;
    Element* dx = (Element*)a.dx + at;
    Element* dresidual = a.dresidual ? (Element*)a.dresidual + at : nullptr;
    if (a.run > 1)
      run_gradient<T>(grad, y, x, dx, dresidual, n, One{a.mean[u]}, One{a.slope[u]}, One{a.pull[u]}, One{a.shift[u]});
    else
      run_gradient<T>(grad, y, x, dx, dresidual, n, Each{a.mean}, Each{a.slope}, Each{a.pull}, Each{a.shift});
  });
}

void moments_any(const BatchNormArgs& a, int64_t row0, int64_t row1, int64_t unit0, int64_t unit1, float* mean,
                 float* squares) {
  dispatch(a.format, [&](auto type) {
    using T = decltype(type);
    (a.run > 1 ? run_moments<T> : column_moments<T>)(a, row0, row1, unit0, unit1, mean, squares);
  });
}

void products_any(const BatchNormArgs& a, int64_t row0, int64_t row1, int64_t unit0, int64_t unit1, float* sum,
                  float* product) {
  dispatch(a.format, [&](auto type) {
    using T = decltype(type);
    if (a.run > 1)
      run_products<T>(a, row0, row1, unit0, unit1, sum, product);
    else
      column_products<T>(a, row0, row1, unit0, unit1, sum, product);
  });
}

void forward_any(const BatchNormArgs& a, int64_t unit0, int64_t unit1) {
  dispatch(a.format, [&](auto type) { forward<decltype(type)>(a, unit0, unit1); });
}

void backward_any(const BatchNormArgs& a, int64_t unit0, int64_t unit1) {
  dispatch(a.format, [&](auto type) { backward<decltype(type)>(a, unit0, unit1); });
}

}  // namespace

extern const BatchNormKernels batch_norm_kernels;
const BatchNormKernels batch_norm_kernels = {to_floats, moments_any, products_any, forward_any, backward_any};

}  // namespace FASTDL_LEVEL
}  // namespace fastdl
