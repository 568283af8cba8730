// Two words more for simd.h, which few rooms use: a fast quotient, and the sums of four vectors.
#pragma once

#include "common/simd.h"

namespace fastdl {
namespace FASTDL_LEVEL {
namespace {

#if defined(__AVX512F__) && defined(__AVX512VNNI__)

// n / d, to half a unit in the last place and a little, where d and 1 / d are normal numbers: 14 bits of the reciprocal,
// and one correction by what is left of n.
FASTDL_INLINE vf vquotient(vf n, vf d) {
  const vf r = _mm512_rcp14_ps(d), t = _mm512_mul_ps(n, r);
  return _mm512_fmadd_ps(_mm512_fnmadd_ps(d, t, n), r, t);
}

// The sums of four vectors. Lanes are added in fours first, then the fours.
FASTDL_INLINE void vsum4(vf a, vf b, vf c, vf d, float* to) {
  const vf ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  const vf cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
  const vf s = _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee));
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(s), _mm512_extractf32x8_ps(s, 1));
  _mm_storeu_ps(to, _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
}

#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)

// The same from 12 bits, of which a step of Newton makes 23.
FASTDL_INLINE vf vquotient(vf n, vf d) {
  const vf r = _mm256_rcp_ps(d), r2 = _mm256_fmadd_ps(r, _mm256_fnmadd_ps(d, r, _mm256_set1_ps(1.0f)), r);
  const vf t = _mm256_mul_ps(n, r2);
  return _mm256_fmadd_ps(_mm256_fnmadd_ps(d, t, n), r2, t);
}

FASTDL_INLINE void vsum4(vf a, vf b, vf c, vf d, float* to) {
  const vf s = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
  _mm_storeu_ps(to, _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1)));
}

#else

FASTDL_INLINE vf vquotient(vf n, vf d) { return vdiv(n, d); }

FASTDL_INLINE void vsum4(vf a, vf b, vf c, vf d, float* to) {
  to[0] = vsum(a);
  to[1] = vsum(b);
  to[2] = vsum(c);
  to[3] = vsum(d);
}

#endif

}  // namespace
}  // namespace FASTDL_LEVEL
}  // namespace fastdl
