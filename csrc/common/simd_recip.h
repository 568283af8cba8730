// Two words more for simd.h, which few rooms use: a reciprocal, and the sums of four vectors.
#pragma once

#include "common/simd.h"

namespace fastdl {
namespace FASTDL_LEVEL {
namespace {

#if defined(__AVX512F__) && defined(__AVX512VNNI__)

// 1 / d, to one unit in the last place, where d and its reciprocal are normal numbers: 14 bits and one step of Newton.
FASTDL_INLINE vf vrecip(vf d) {
  const vf r = _mm512_rcp14_ps(d);
  return _mm512_fmadd_ps(r, _mm512_fnmadd_ps(d, r, _mm512_set1_ps(1.0f)), r);
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

// The same: 12 bits and one step of third order.
FASTDL_INLINE vf vrecip(vf d) {
  const vf r = _mm256_rcp_ps(d), e = _mm256_fnmadd_ps(d, r, _mm256_set1_ps(1.0f));
  return _mm256_fmadd_ps(r, _mm256_fmadd_ps(e, e, e), r);
}

FASTDL_INLINE void vsum4(vf a, vf b, vf c, vf d, float* to) {
  const vf s = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
  _mm_storeu_ps(to, _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1)));
}

#else

FASTDL_INLINE vf vrecip(vf d) { return vdiv(vset1(1.0f), d); }

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
