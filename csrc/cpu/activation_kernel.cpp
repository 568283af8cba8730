// Activations with bias, dropout and residual, and gated products, forward and backward, for one level.
//
// One pass over each block of rows, a vector a turn. Floor: the bytes of x, residual, y (grad, x, dx) over the bandwidth;
// gelu, swish and tanh take some 25 operations an element.
//
// Test: pytest tests/test_activation.py
#include "cpu/activation_kernel.h"

#include "common/philox.h"
#include "common/simd_math.h"
#include "cpu/rows_kernel.h"

namespace fastdl {
namespace FASTDL_LEVEL {
namespace {

// f(t), f'(t) and the derivative by beta; what a caller does not use is not computed.
struct Derived {
  vf value, slope, by_beta;
};

template <int Kind>
FASTDL_INLINE Derived derive(vf t, vf alpha) {
  const vf one = vset1(1.0f), zero = vset1(0.0f);
  if constexpr (Kind == RELU) return {vmax(zero, t), vselect_le(t, zero, zero, one), zero};  // vmax: NaN stays
  if constexpr (Kind == LEAKY_RELU)
    return {vselect_le(t, zero, vmul(t, alpha), t), vselect_le(t, zero, alpha, one), zero};
  if constexpr (Kind == GELU) {
    vf distribution, density;
    vnormal(t, &distribution, &density);
    return {vmul(t, distribution), vfma(t, density, distribution), zero};
  }
  if constexpr (Kind == GELU_TANH) {  // (1 + tanh(u)) / 2 = sigmoid(2 u)
    const vf square = vmul(t, t);
    vf dg;
    const vf g = vsigmoid(vmul(t, vfma(square, vset1(0.0713548163f), vset1(1.59576912f))), &dg);
    const vf du = vfma(square, vset1(0.214064449f), vset1(1.59576912f));  // of 2 u
    return {vmul(t, g), vfma(vmul(t, du), dg, g), zero};
  }
  if constexpr (Kind == SWISH) {
    vf dg;
    const vf g = vsigmoid(vmul(t, alpha), &dg), tg = vmul(t, dg);
    return {vmul(t, g), vfma(alpha, tg, g), vmul(t, tg)};
  }
  if constexpr (Kind == TANH) {
    vf dg;
    vsigmoid(vadd(t, t), &dg);
    return {vtanh(t), vmul(vset1(4.0f), dg), zero};  // 1 - tanh(t)^2, which cancels, is 4 g (1 - g) at 2 t
  }
  if constexpr (Kind == SIGMOID) {
    vf dg;
    const vf g = vsigmoid(t, &dg);
    return {g, dg, zero};
  }
  return {t, one, zero};
}

// What one row of a block reads beside x.
struct Row {
  const float* column_bias;  // or null
  vf bias, keep;             // of the whole row
  int64_t first;             // index of its first element in the contiguous tensor
};

FASTDL_INLINE Row row_of(const ActivationArgs& a, const RowBlock& b, int64_t r) {
  return {a.bias && !a.channels ? a.bias + b.col0 : nullptr, vset1(a.channels ? a.bias[r % a.channels] : 0.0f),
          vset1(a.mask_by_row ? philox_dropout(a.seed, (uint64_t)r, a.p, a.scale) : 0.0f), r * a.cols + b.col0};
}

template <class T, class P>
FASTDL_INLINE vf biased(const Row& row, const typename T::Element* x, int64_t k, const P& part) {
  return vadd(part.template load<T>(x + k), row.column_bias ? part.template load<F32>(row.column_bias + k) : row.bias);
}

FASTDL_INLINE vf masked(const ActivationArgs& a, const Row& row, int64_t k, vf v) {
  if (!a.dropout) return v;
  return dropped(v, a.mask_by_row ? row.keep : dropout(a.seed, row.first + k, a.p, a.scale));
}

template <class T, int Kind>
void forward(const ActivationArgs& a, const RowBlock& b) {
  using Element = typename T::Element;
  const vf alpha = vset1(a.alpha);
  for (int64_t r = b.row0; r < b.row1; ++r) {
    const Element* x = (const Element*)a.x + r * a.x_stride + b.col0;
    const Element* residual = a.other ? (const Element*)a.other + r * a.other_stride + b.col0 : nullptr;
    Element* y = (Element*)a.y + r * a.cols + b.col0;
    const Row row = row_of(a, b, r);
    for_each(b.col1 - b.col0, [&](int64_t k, const auto& part) FASTDL_STEP {
      vf v = masked(a, row, k, derive<Kind>(biased<T>(row, x, k, part), alpha).value);
      if (residual) v = vadd(part.template load<T>(residual + k), v);
      part.template store<T>(y + k, v);
    });
  }
}

template <class T, int Kind>
void backward(const ActivationArgs& a, const RowBlock& b, const ActivationSums& sums) {
  using Element = typename T::Element;
  const vf alpha = vset1(a.alpha), zero = vset1(0.0f);
  vf beta = zero;
  for (int64_t r = b.row0; r < b.row1; ++r) {
    const Element* x = (const Element*)a.x + r * a.x_stride + b.col0;
    const Element* grad = (const Element*)a.other + r * a.other_stride + b.col0;
    Element* dx = (Element*)a.y + r * a.cols + b.col0;
    float* const columns = sums.columns ? sums.columns + b.col0 : nullptr;
    const Row row = row_of(a, b, r);
    vf sum = zero;
    for_each(b.col1 - b.col0, [&](int64_t k, const auto& part) FASTDL_STEP {
      const vf d = masked(a, row, k, part.template load<T>(grad + k));
      const Derived f = derive<Kind>(biased<T>(row, x, k, part), alpha);
      const vf dt = vmul(d, f.slope);
      part.template store<T>(dx + k, dt);
      if (columns) part.template store<F32>(columns + k, vadd(part.template load<F32>(columns + k), dt));
      if constexpr (Kind == SWISH) beta = vfma(d, f.by_beta, beta);
      sum = vadd(sum, dt);
    });
    if (sums.rows) sums.rows[r * sums.rows_stride] = vsum(sum);
  }
  if (sums.beta) *sums.beta = vsum(beta);
}

template <class T, int Kind>
void glu_forward(const GluArgs& a, const RowBlock& b) {
  using Element = typename T::Element;
  for (int64_t r = b.row0; r < b.row1; ++r) {
    const Element* gate = (const Element*)a.gate + r * a.gate_stride + b.col0;
    const Element* up = (const Element*)a.up + r * a.up_stride + b.col0;
    Element* y = (Element*)a.y + r * a.cols + b.col0;
    for_each(b.col1 - b.col0, [&](int64_t k, const auto& part) FASTDL_STEP {
      const vf v = derive<Kind>(part.template load<T>(gate + k), vset1(1.0f)).value;
      part.template store<T>(y + k, vmul(v, part.template load<T>(up + k)));
    });
  }
}

template <class T, int Kind>
void glu_backward(const GluArgs& a, const RowBlock& b) {
  using Element = typename T::Element;
  for (int64_t r = b.row0; r < b.row1; ++r) {
    const Element* gate = (const Element*)a.gate + r * a.gate_stride + b.col0;
    const Element* up = (const Element*)a.up + r * a.up_stride + b.col0;
    const Element* grad = (const Element*)a.grad + r * a.grad_stride + b.col0;
    Element* dgate = (Element*)a.dgate + r * a.cols + b.col0;
    Element* dup = (Element*)a.dup + r * a.cols + b.col0;
    for_each(b.col1 - b.col0, [&](int64_t k, const auto& part) FASTDL_STEP {
      const Derived f = derive<Kind>(part.template load<T>(gate + k), vset1(1.0f));
      const vf d = part.template load<T>(grad + k);
      part.template store<T>(dgate + k, vmul(vmul(d, part.template load<T>(up + k)), f.slope));
      part.template store<T>(dup + k, vmul(d, f.value));
    });
  }
}

// The one switch from kinds to types.
template <class Body>
void dispatch_kind(int kind, const Body& body) {
  switch (kind) {
    case RELU: return body(Index<RELU>());
    case LEAKY_RELU: return body(Index<LEAKY_RELU>());
    case GELU: return body(Index<GELU>());
    case GELU_TANH: return body(Index<GELU_TANH>());
    case SWISH: return body(Index<SWISH>());
    case TANH: return body(Index<TANH>());
    case SIGMOID: return body(Index<SIGMOID>());
    case IDENTITY: return body(Index<IDENTITY>());
    default: __builtin_unreachable();  // the wrapper has checked
  }
}

template <class Body>
void dispatch_both(int format, int kind, const Body& body) {
  dispatch(format, [&](auto type) { dispatch_kind(kind, [&](auto number) { body(type, number); }); });
}

void forward_any(const ActivationArgs& a, const RowBlock& b) {
  dispatch_both(a.format, a.kind, [&](auto type, auto kind) { forward<decltype(type), decltype(kind)::value>(a, b); });
}

void backward_any(const ActivationArgs& a, const RowBlock& b, const ActivationSums& sums) {
  dispatch_both(a.format, a.kind,
                [&](auto type, auto kind) { backward<decltype(type), decltype(kind)::value>(a, b, sums); });
}

// Gated products exist of the three kinds that models use.
template <class Body>
void dispatch_glu(int format, int kind, const Body& body) {
  dispatch(format, [&](auto type) {
    if (kind == GELU) return body(type, Index<GELU>());
    if (kind == GELU_TANH) return body(type, Index<GELU_TANH>());
    return body(type, Index<SWISH>());
  });
}

void glu_forward_any(const GluArgs& a, const RowBlock& b) {
  dispatch_glu(a.format, a.kind,
               [&](auto type, auto kind) { glu_forward<decltype(type), decltype(kind)::value>(a, b); });
}

void glu_backward_any(const GluArgs& a, const RowBlock& b) {
  dispatch_glu(a.format, a.kind,
               [&](auto type, auto kind) { glu_backward<decltype(type), decltype(kind)::value>(a, b); });
}

}  // namespace

extern const ActivationKernels activation_kernels;
const ActivationKernels activation_kernels = {to_floats, forward_any, backward_any, glu_forward_any, glu_backward_any};

}  // namespace FASTDL_LEVEL
}  // namespace fastdl
