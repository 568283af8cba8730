// Layer norm and RMS norm, forward and backward, for one level.
//
// Forward: a row is brought into a float32 buffer that stays in the first-level cache (s = residual + dropout(x)), summed,
// summed again around its mean, and written. Backward: two passes over the row, the second from the cache. Floor: the
// bytes of x, residual, y, s (grad, s, ds) over the bandwidth; the arithmetic is some 3 operations an element and pass.
//
// Test: pytest tests/test_norm.py
#include "cpu/norm_kernel.h"

#include "common/formats.h"
#include "common/philox.h"
#include "common/simd.h"

namespace fastdl {
namespace FASTDL_LEVEL {
namespace {

// The float formats: one element's type, and vectors of LANES.
struct F32 {
  using Element = float;
  FASTDL_INLINE vf load(const Element* p) { return vload(p); }
  FASTDL_INLINE void store(Element* p, vf v) { vstore(p, v); }
};
struct F16 {
  using Element = uint16_t;
  FASTDL_INLINE vf load(const Element* p) { return vload_f16(p); }
  FASTDL_INLINE void store(Element* p, vf v) { vstore_f16(p, v); }
};
struct BF16 {
  using Element = uint16_t;
  FASTDL_INLINE vf load(const Element* p) { return vload_bf16(p); }
  FASTDL_INLINE void store(Element* p, vf v) { vstore_bf16(p, v); }
};

// The first n of LANES elements, zeros behind them.
template <class T>
FASTDL_INLINE vf load_part(const typename T::Element* p, int64_t n) {
  typename T::Element part[LANES] = {};
  memcpy(part, p, (size_t)n * sizeof part[0]);
  return T::load(part);
}

template <class T>
FASTDL_INLINE void store_part(typename T::Element* p, vf v, int64_t n) {
  typename T::Element part[LANES];
  T::store(part, v);
  memcpy(p, part, (size_t)n * sizeof part[0]);
}

// step(at, load, store) for every vector of a row, the last one in part. `load` and `store` take a format's tag.
struct Whole {
  template <class T>
  FASTDL_INLINE vf load(const typename T::Element* p) {
    return T::load(p);
  }
  template <class T>
  FASTDL_INLINE void store(typename T::Element* p, vf v) {
    T::store(p, v);
  }
  FASTDL_INLINE vf keep(vf v) { return v; }
};

struct Part {
  int64_t n;
  template <class T>
  vf load(const typename T::Element* p) const {
    return load_part<T>(p, n);
  }
  template <class T>
  void store(typename T::Element* p, vf v) const {
    store_part<T>(p, v, n);
  }
  // zeros in the lanes past the end
  vf keep(vf v) const {
    float part[LANES];
    vstore(part, v);
    return load_part<F32>(part, n);
  }
};

template <class Step>
__attribute__((always_inline)) static inline void for_row(int64_t cols, const Step& step) {
  int64_t k = 0;
  for (; k + LANES <= cols; k += LANES) step(k, Whole());
  if (k < cols) step(k, Part{cols - k});
}

// 0 or scale for the elements index .. index + LANES - 1.
FASTDL_INLINE vf dropout(uint64_t seed, int64_t index, float p, float scale) {
  float keep[LANES];
  for (int i = 0; i < LANES; ++i) keep[i] = philox_dropout(seed, (uint64_t)(index + i), p, scale);
  return vload(keep);
}

// v * keep, and 0 where keep is 0 (v may be infinite)
FASTDL_INLINE vf dropped(vf v, vf keep) { return vselect_le(keep, vset1(0.0f), vset1(0.0f), vmul(v, keep)); }

template <class T, class W>
void forward(const NormForwardArgs& a, int64_t row0, int64_t row1, float* row) {
  using Element = typename T::Element;
  const auto* weight = (const typename W::Element*)a.weight;
  const auto* bias = (const typename W::Element*)a.bias;
  const float width = 1.0f / (float)a.cols;
  const vf one = vset1(1.0f), zero = vset1(0.0f), offset = vset1(a.offset);
  for (int64_t r = row0; r < row1; ++r) {
    const Element* x = (const Element*)a.x + r * a.x_stride;
    const Element* residual = a.residual ? (const Element*)a.residual + r * a.residual_stride : nullptr;
    Element* s = a.s ? (Element*)a.s + r * a.cols : nullptr;
    Element* y = (Element*)a.y + r * a.cols;
    vf sums[4] = {zero, zero, zero, zero};
    for_row(a.cols, [&](int64_t k, const auto& part) {
      vf v = part.template load<T>(x + k);
      if (s) {
        if (a.dropout) v = dropped(v, dropout(a.seed, r * a.cols + k, a.p, a.scale));
        if (residual) v = vadd(part.template load<T>(residual + k), v);
        part.template store<T>(s + k, v);
        if constexpr (sizeof(Element) < 4) v = part.template load<T>(s + k);  // y is the norm of what s says
        v = part.keep(v);
      }
      vstore(row + k, v);
      vf& sum = sums[k / LANES % 4];
      sum = vadd(sum, v);
    });
    float mean = 0.0f;
    if (a.mean) {
      mean = vsum(vadd(vadd(sums[0], sums[1]), vadd(sums[2], sums[3]))) * width;
      a.mean[r] = mean;
    }
    const vf middle = vset1(mean);
    for (vf& sum : sums) sum = zero;
    for_row(a.cols, [&](int64_t k, const auto& part) {
      const vf d = part.keep(vsub(vload(row + k), middle));
      vf& sum = sums[k / LANES % 4];
      sum = vfma(d, d, sum);
    });
    const float squares = vsum(vadd(vadd(sums[0], sums[1]), vadd(sums[2], sums[3])));
    const float rstd = 1.0f / __builtin_sqrtf(squares * width + a.eps);
    a.rstd[r] = rstd;
    const vf factor = vset1(rstd);
    for_row(a.cols, [&](int64_t k, const auto& part) {
      const vf h = vmul(vsub(vload(row + k), middle), factor);
      const vf w = weight ? vadd(part.template load<W>(weight + k), offset) : one;
      const vf b = bias ? part.template load<W>(bias + k) : zero;
      part.template store<T>(y + k, vfma(h, w, b));
    });
  }
}

template <class T, class W>
void backward(const NormBackwardArgs& a, int64_t row0, int64_t row1, float* dweight, float* dbias) {
  using Element = typename T::Element;
  const auto* weight = (const typename W::Element*)a.weight;
  const float width = 1.0f / (float)a.cols;
  const vf one = vset1(1.0f), zero = vset1(0.0f), offset = vset1(a.offset);
  for (int64_t r = row0; r < row1; ++r) {
    const Element* grad = (const Element*)a.grad + r * a.grad_stride;
    const Element* grad_sum = a.grad_sum ? (const Element*)a.grad_sum + r * a.grad_sum_stride : nullptr;
    const Element* s = (const Element*)a.s + r * a.s_stride;
    Element* ds = (Element*)a.ds + r * a.cols;
    const vf mean = vset1(a.mean ? a.mean[r] : 0.0f), rstd = vset1(a.rstd[r]);
    vf sum_gh[2] = {zero, zero}, sum_g[2] = {zero, zero};
    for_row(a.cols, [&](int64_t k, const auto& part) {
      const vf d = part.template load<T>(grad + k);  // zeros past the end, so every product below is 0 there
      const vf h = part.keep(vmul(vsub(part.template load<T>(s + k), mean), rstd));
      const vf g = weight ? vmul(d, vadd(part.template load<W>(weight + k), offset)) : d;
      const int i = (int)(k / LANES % 2);
      sum_gh[i] = vfma(g, h, sum_gh[i]);
      sum_g[i] = vadd(sum_g[i], g);
      if (dweight) {
        part.template store<F32>(dweight + k, vfma(d, h, part.template load<F32>(dweight + k)));
        part.template store<F32>(dbias + k, vadd(d, part.template load<F32>(dbias + k)));
      }
    });
    const vf mean_gh = vset1(vsum(vadd(sum_gh[0], sum_gh[1])) * width);
    const vf mean_g = a.mean ? vset1(vsum(vadd(sum_g[0], sum_g[1])) * width) : zero;
    for_row(a.cols, [&](int64_t k, const auto& part) {
      const vf d = part.template load<T>(grad + k);
      const vf h = vmul(vsub(part.template load<T>(s + k), mean), rstd);
      const vf w = weight ? vadd(part.template load<W>(weight + k), offset) : one;
      vf v = vmul(rstd, vsub(vsub(vmul(d, w), mean_g), vmul(h, mean_gh)));
      if (grad_sum) v = vadd(v, part.template load<T>(grad_sum + k));
      part.template store<T>(ds + k, v);
      if (a.dx)
        part.template store<T>((Element*)a.dx + r * a.cols + k,
                               dropped(v, dropout(a.seed, r * a.cols + k, a.p, a.scale)));
    });
  }
}

void add_parts(const float* partial, int64_t parts, int64_t stride, int64_t col0, int64_t col1, float* sum) {
  for_row(col1 - col0, [&](int64_t k, const auto& part) {
    vf total = vset1(0.0f);
    for (int64_t i = 0; i < parts; ++i)
      total = vadd(total, part.template load<F32>(partial + i * stride + col0 + k));
    part.template store<F32>(sum + col0 + k, total);
  });
}

// The one switch from formats to types.
template <class Args, class Body>
void dispatch(const Args& a, const Body& body) {
  const bool floats = a.parameter_format == FORMAT_F32;
  switch (a.format) {
    case FORMAT_F32: return body(F32(), F32());
    case FORMAT_F16: return floats ? body(F16(), F32()) : body(F16(), F16());
    case FORMAT_BF16: return floats ? body(BF16(), F32()) : body(BF16(), BF16());
    default: __builtin_unreachable();  // norm.cpp has checked
  }
}

void forward_any(const NormForwardArgs& a, int64_t row0, int64_t row1, float* row) {
  dispatch(a, [&](auto t, auto w) { forward<decltype(t), decltype(w)>(a, row0, row1, row); });
}

void backward_any(const NormBackwardArgs& a, int64_t row0, int64_t row1, float* dweight, float* dbias) {
  dispatch(a, [&](auto t, auto w) { backward<decltype(t), decltype(w)>(a, row0, row1, dweight, dbias); });
}

}  // namespace

extern const NormKernels norm_kernels;
const NormKernels norm_kernels = {forward_any, backward_any, add_parts};

}  // namespace FASTDL_LEVEL
}  // namespace fastdl
