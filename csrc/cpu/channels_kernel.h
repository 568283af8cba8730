// What the kernels of group_norm and batch_norm share, for one level: statistics of a run of elements, the affine step and
// its gradient, with coefficients that are the same for the whole run (One) or one for each element (Each).
#pragma once

#include "cpu/rows_kernel.h"

namespace fastdl {
namespace FASTDL_LEVEL {
namespace {

// A float32 sum takes at most so many elements; their totals are added in double.
constexpr int64_t SUM_BLOCK = 2048;

struct One {
  float value;
  template <class Step>
  FASTDL_INLINE vf at(const One& c, int64_t, const Step&) {
    return vset1(c.value);
  }
};
struct Each {
  const float* values;
  template <class Step>
  FASTDL_INLINE vf at(const Each& c, int64_t k, const Step& part) {
    return part.template load<F32>(c.values + k);
  }
};

struct Sums {
  double first = 0.0, second = 0.0;
};

// Calls part(begin, end) -> Sums for blocks of a run and adds them up.
template <class Body>
__attribute__((always_inline)) static inline Sums for_blocks(int64_t n, const Body& body) {
  Sums sums;
  for (int64_t k = 0; k < n; k += SUM_BLOCK) {
    const Sums s = body(k, k + SUM_BLOCK < n ? SUM_BLOCK : n - k);
    sums.first += s.first;
    sums.second += s.second;
  }
  return sums;
}

// sum of x
template <class T>
double run_sum(const typename T::Element* x, int64_t n) {
  return for_blocks(n,
                    [&](int64_t first, int64_t count) {
                      const vf zero = vset1(0.0f);
                      vf sums[4] = {zero, zero, zero, zero};
                      for_row(count, [&](int64_t k, const auto& part, auto i) FASTDL_STEP {
                        vf& sum = sums[decltype(i)::value];
                        sum = vadd(sum, part.template load<T>(x + first + k));
                      });
                      return Sums{total(sums), 0.0};
                    })
      .first;
}

// sum of d and of d^2, d = x - center
template <class T>
Sums run_squares(const typename T::Element* x, int64_t n, float center) {
  return for_blocks(n, [&](int64_t first, int64_t count) {
    const vf zero = vset1(0.0f), middle = vset1(center);
    vf sums[4] = {zero, zero, zero, zero}, squares[4] = {zero, zero, zero, zero};
    for_row(count, [&](int64_t k, const auto& part, auto i) FASTDL_STEP {
      constexpr int j = decltype(i)::value;
      const vf d = part.keep(vsub(part.template load<T>(x + first + k), middle));
      sums[j] = vadd(sums[j], d);
      squares[j] = vfma(d, d, squares[j]);
    });
    return Sums{total(sums), total(squares)};
  });
}

// grad, or 0 where the ReLU whose output is y cut it off; y may be null.
template <class T, class Step>
FASTDL_INLINE vf gate(const typename T::Element* grad, const typename T::Element* y, int64_t k, const Step& part) {
  const vf d = part.template load<T>(grad + k);
  if (!y) return d;
  return vselect_le(part.template load<T>(y + k), vset1(0.0f), vset1(0.0f), d);
}

// sum of g and of g * (x - mean), g = gate(grad)
template <class T>
Sums run_products(const typename T::Element* grad, const typename T::Element* y, const typename T::Element* x,
                  int64_t n, float mean) {
  return for_blocks(n, [&](int64_t first, int64_t count) {
    const vf zero = vset1(0.0f), middle = vset1(mean);
    vf sums[4] = {zero, zero, zero, zero}, products[4] = {zero, zero, zero, zero};
    for_row(count, [&](int64_t k, const auto& part, auto i) FASTDL_STEP {
      constexpr int j = decltype(i)::value;
      const vf g = gate<T>(grad, y, first + k, part);  // zeros past the end
      const vf d = part.keep(vsub(part.template load<T>(x + first + k), middle));
      sums[j] = vadd(sums[j], g);
      products[j] = vfma(g, d, products[j]);
    });
    return Sums{total(sums), total(products)};
  });
}

// y = (x - mean) * slope + bias, + residual and ReLU where asked for
template <class T, class Mean, class Slope>
FASTDL_INLINE void run_affine(const typename T::Element* x, const typename T::Element* residual, typename T::Element* y,
                              int64_t n, Mean mean, Slope slope, Slope bias, bool relu) {
  for_row(n, [&](int64_t k, const auto& part, auto) FASTDL_STEP {
    const vf d = vsub(part.template load<T>(x + k), Mean::at(mean, k, part));
    vf v = vfma(d, Slope::at(slope, k, part), Slope::at(bias, k, part));
    if (residual) v = vadd(v, part.template load<T>(residual + k));
    if (relu) v = vmax(vset1(0.0f), v);  // in this order NaN stays NaN
    part.template store<T>(y + k, v);
  });
}

// dx = g * slope + (x - mean) * pull + shift, g = gate(grad), which goes to dresidual where that is asked for
template <class T, class Mean, class Slope>
FASTDL_INLINE void run_gradient(const typename T::Element* grad, const typename T::Element* y,
                                const typename T::Element* x, typename T::Element* dx, typename T::Element* dresidual,
                                int64_t n, Mean mean, Slope slope, Mean pull, Mean shift) {
  for_row(n, [&](int64_t k, const auto& part, auto) FASTDL_STEP {
    const vf g = gate<T>(grad, y, k, part);
    const vf d = vsub(part.template load<T>(x + k), Mean::at(mean, k, part));
    const vf v = vfma(d, Mean::at(pull, k, part), vfma(g, Slope::at(slope, k, part), Mean::at(shift, k, part)));
    part.template store<T>(dx + k, v);
    if (dresidual) part.template store<T>(dresidual + k, g);
  });
}

// to[c] = from[c] in float32
void to_floats(const void* from, int format, int64_t n, float* to) {
  dispatch(format, [&](auto type) {
    using T = decltype(type);
    for_row(n, [&](int64_t k, const auto& part, auto) FASTDL_STEP {
      part.template store<F32>(to + k, part.template load<T>((const typename T::Element*)from + k));
    });
  });
}

}  // namespace
}  // namespace FASTDL_LEVEL
}  // namespace fastdl
