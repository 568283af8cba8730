// Functions over the vocabulary of simd.h: sigmoid, tanh, and the distribution of the standard normal.
//
// The polynomials were fitted to 30 digits of the functions by Lawson's iteration (weighted least squares that tend to the
// smallest largest error).
#pragma once

#include "common/simd.h"

namespace fastdl {
namespace FASTDL_LEVEL {
namespace {

// c[0] + c[1] x + ... by Horner's rule.
template <int N>
FASTDL_INLINE vf vpoly(vf x, const float (&c)[N]) {
  vf p = vset1(c[N - 1]);
#pragma GCC unroll 16
  for (int i = N - 2; i >= 0; --i) p = vfma(p, x, vset1(c[i]));
  return p;
}

// sigmoid(x), and its derivative g (1 - g) without the cancellation of 1 - g: with e = exp(-|x|) and s = 1 / (1 + e) the
// sigmoid is s or e s, and the derivative e s s. e is 0 beyond 88, so that x * sigmoid(x) is NaN at minus infinity, as
// torch's.
FASTDL_INLINE vf vsigmoid(vf x, vf* slope) {
  const vf zero = vset1(0.0f), one = vset1(1.0f), a = vabs(x);
  const vf e = vselect_le(vset1(88.0f), a, zero, vexp(vsub(zero, a)));
  const vf s = vdiv(one, vadd(one, e)), es = vmul(e, s);
  *slope = vmul(es, s);
  return vselect_le(x, zero, es, s);
}

// sigmoid(x) alone. The exponential is clamped to 1.7e38, so that far below 0 it is 6e-39 and not 0.
FASTDL_INLINE vf vsigmoid(vf x) { return vdiv(vset1(1.0f), vadd(vset1(1.0f), vexp(vsub(vset1(0.0f), x)))); }

// Around 0 an odd polynomial (error below 3e-8 of x), beyond 0.65 by exp: 1 - 2 / (exp(2 |x|) + 1).
FASTDL_INLINE vf vtanh(vf x) {
  constexpr float c[] = {-0.333333275f, 0.13332619f, -0.0538279153f, 0.0208891463f, -0.00594224347f};
  const vf one = vset1(1.0f), a = vabs(x), s = vmul(x, x);
  const vf near = vfma(vmul(x, s), vpoly(s, c), x);
  const vf far = vsub(one, vdiv(vset1(2.0f), vadd(vexp(vadd(a, a)), one)));
  return vselect_le(a, vset1(0.65f), near, vselect_le(x, vset1(0.0f), vsub(vset1(0.0f), far), far));
}

// The distribution P and the density p of the standard normal at x. With z = |x| / sqrt(2) and t = 1 / (1 + z / 2):
// P(-|x|) = exp(-z^2) t Q(t) / 2, where Q is a polynomial with a relative error of 4e-8.
FASTDL_INLINE void vnormal(vf x, vf* distribution, vf* density) {
  constexpr float c[] = {0.282116989f, 0.281875905f,  0.246528046f, 0.189790723f,  0.00262060095f,
                         0.237062307f, -0.452397304f, 0.26818388f,  -0.0557811786f};
  const vf one = vset1(1.0f), zero = vset1(0.0f), square = vmul(vmul(x, x), vset1(0.5f));
  const vf e = vselect_le(vset1(87.0f), square, zero, vexp(vsub(zero, square)));
  const vf t = vdiv(one, vfma(vabs(x), vset1(0.353553391f), one));
  const vf tail = vmul(vmul(e, vset1(0.5f)), vmul(t, vpoly(t, c)));
  *distribution = vselect_le(x, zero, tail, vsub(one, tail));
  *density = vmul(e, vset1(0.398942280f));
}

}  // namespace
}  // namespace FASTDL_LEVEL
}  // namespace fastdl
