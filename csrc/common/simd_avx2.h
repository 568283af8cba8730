// simd.h for AVX2 with FMA and F16C; AVX-VNNI is used where __AVXVNNI__ is set.
#pragma once

#include <immintrin.h>

namespace fastdl {
namespace FASTDL_LEVEL {
namespace {

constexpr bool VECTOR_LEVEL = true;
constexpr int LANES = 8;
using vf = __m256;
using vi = __m256i;
using vb = __m256i;

FASTDL_INLINE vf vload(const float* p) { return _mm256_loadu_ps(p); }
FASTDL_INLINE void vstore(float* p, vf x) { _mm256_storeu_ps(p, x); }
FASTDL_INLINE vf vset1(float x) { return _mm256_set1_ps(x); }
FASTDL_INLINE vf vfma(vf a, vf b, vf c) { return _mm256_fmadd_ps(a, b, c); }
FASTDL_INLINE vf vadd(vf a, vf b) { return _mm256_add_ps(a, b); }
FASTDL_INLINE vf vsub(vf a, vf b) { return _mm256_sub_ps(a, b); }
FASTDL_INLINE vf vmul(vf a, vf b) { return _mm256_mul_ps(a, b); }
FASTDL_INLINE vf vdiv(vf a, vf b) { return _mm256_div_ps(a, b); }
FASTDL_INLINE vf vmax(vf a, vf b) { return _mm256_max_ps(a, b); }
FASTDL_INLINE vf vmin(vf a, vf b) { return _mm256_min_ps(a, b); }
FASTDL_INLINE vf vabs(vf a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a); }
// where a <= b, x; else y
FASTDL_INLINE vf vselect_le(vf a, vf b, vf x, vf y) { return _mm256_blendv_ps(y, x, _mm256_cmp_ps(a, b, _CMP_LE_OQ)); }
FASTDL_INLINE float vsum(vf a) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
FASTDL_INLINE float vhmax(vf a) {
  __m128 s = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  s = _mm_max_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_max_ss(s, _mm_movehdup_ps(s)));
}
FASTDL_INLINE vf vcvt(vi a) { return _mm256_cvtepi32_ps(a); }
FASTDL_INLINE vi vround(vf a) { return _mm256_cvtps_epi32(a); }
FASTDL_INLINE vf vscale2(vf a, vi n) {  // a * 2^n, |n| <= 126
  return _mm256_mul_ps(a, _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(n, _mm256_set1_epi32(127)), 23)));
}
FASTDL_INLINE vi vset1i(int32_t x) { return _mm256_set1_epi32(x); }
FASTDL_INLINE vf vload_f16(const uint16_t* p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }
FASTDL_INLINE void vstore_f16(uint16_t* p, vf x) {
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
// 2 LANES floats as pairs: the first and the second of each. The pairs stand in an order of the level's own, which
// vstore_pairs undoes.
FASTDL_INLINE void vload_pairs(const float* p, vf* first, vf* second) {
  const vf low = vload(p), high = vload(p + LANES);
  *first = _mm256_shuffle_ps(low, high, 0x88);
  *second = _mm256_shuffle_ps(low, high, 0xdd);
}
FASTDL_INLINE void vstore_pairs(float* p, vf first, vf second) {
  vstore(p, _mm256_unpacklo_ps(first, second));
  vstore(p + LANES, _mm256_unpackhi_ps(first, second));
}
// Lane i of the result: the sum of the lanes of r[i].
FASTDL_INLINE vf vsum_rows(const vf r[8]) {
  const vf a = _mm256_hadd_ps(_mm256_hadd_ps(r[0], r[1]), _mm256_hadd_ps(r[2], r[3]));
  const vf b = _mm256_hadd_ps(_mm256_hadd_ps(r[4], r[5]), _mm256_hadd_ps(r[6], r[7]));
  return _mm256_add_ps(_mm256_permute2f128_ps(a, b, 0x20), _mm256_permute2f128_ps(a, b, 0x31));
}
// r[i][j] and r[j][i] change places: 8 rows of 8.
FASTDL_INLINE void vtranspose(vf r[8]) {
  vf t[8];
#pragma GCC unroll 4
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
    t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 8; i += 4) {
    r[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
    r[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xee);
    r[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
    r[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xee);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm256_permute2f128_ps(r[i], r[i + 4], 0x20);
    t[i + 4] = _mm256_permute2f128_ps(r[i], r[i + 4], 0x31);
  }
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) r[i] = t[i];
}
// The two floats of each pair exchanged.
FASTDL_INLINE vf vswap_pairs(vf a) { return _mm256_permute_ps(a, 0xb1); }
FASTDL_INLINE vf vpair_bf16_lo(vb a) { return _mm256_castsi256_ps(_mm256_slli_epi32(a, 16)); }
FASTDL_INLINE vf vpair_bf16_hi(vb a) {
  return _mm256_castsi256_ps(_mm256_and_si256(a, _mm256_set1_epi32((int)0xffff0000)));
}
FASTDL_INLINE __m128i low_words(vb a) {  // the low 16 bits of 8 lanes, in order
  const vb p = _mm256_packus_epi32(_mm256_and_si256(a, _mm256_set1_epi32(0xffff)), _mm256_setzero_si256());
  return _mm256_castsi256_si128(_mm256_permute4x64_epi64(p, 0x08));
}
FASTDL_INLINE vf vpair_f16_lo(vb a) { return _mm256_cvtph_ps(low_words(a)); }
FASTDL_INLINE vf vpair_f16_hi(vb a) { return _mm256_cvtph_ps(low_words(_mm256_srli_epi32(a, 16))); }

FASTDL_INLINE vb bload(const uint8_t* p) { return _mm256_loadu_si256((const __m256i*)p); }
FASTDL_INLINE vb bset1(uint8_t x) { return _mm256_set1_epi8((char)x); }
FASTDL_INLINE vb band(vb a, vb b) { return _mm256_and_si256(a, b); }
FASTDL_INLINE vb bor(vb a, vb b) { return _mm256_or_si256(a, b); }
FASTDL_INLINE vb bxor(vb a, vb b) { return _mm256_xor_si256(a, b); }
template <int N>
FASTDL_INLINE vb bshr(vb a) {
  return _mm256_srli_epi16(a, N);
}
template <int N>
FASTDL_INLINE vb bshl(vb a) {
  return _mm256_slli_epi16(a, N);
}
template <int I>
FASTDL_INLINE vf vbyte(vb a) {
  if constexpr (I == 3) return _mm256_cvtepi32_ps(_mm256_srli_epi32(a, 24));
  return _mm256_cvtepi32_ps(_mm256_and_si256(_mm256_srli_epi32(a, 8 * I), _mm256_set1_epi32(0xff)));
}
FASTDL_INLINE vf vload_i8(const int8_t* p) {
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)));
}
FASTDL_INLINE void vstore_i8(int8_t* p, vi a) {
  const __m128i w = _mm_packs_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
  _mm_storel_epi64((__m128i*)p, _mm_packs_epi16(w, w));
}
FASTDL_INLINE vi vloadi(const int32_t* p) { return _mm256_loadu_si256((const __m256i*)p); }
FASTDL_INLINE vi vxori(vi a, vi b) { return _mm256_xor_si256(a, b); }
FASTDL_INLINE vi vsigni(vi a) { return _mm256_srai_epi32(a, 31); }
FASTDL_INLINE void vmul_halves(vi a, uint32_t m, vi* high, vi* low) {
  const __m256i factor = _mm256_set1_epi32((int)m);
  const __m256i even = _mm256_mul_epu32(a, factor), odd = _mm256_mul_epu32(_mm256_srli_epi64(a, 32), factor);
  *high = _mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xaa);
  *low = _mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xaa);
}
FASTDL_INLINE vi vaddi(vi a, vi b) { return _mm256_add_epi32(a, b); }
FASTDL_INLINE int32_t vsumi(vi a) {
  __m128i s = _mm_add_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
  s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(s, _mm_shuffle_epi32(s, 0xb1)));
}
FASTDL_INLINE vi vbroadcast4(const int8_t* x) {
  int32_t v;
  memcpy(&v, x, 4);
  return _mm256_set1_epi32(v);
}

#if defined(__AVXVNNI__)
constexpr bool SIGNED_CODES = false;
template <int BITS, int N>
FASTDL_INLINE vi vdot(vi acc, const vb* w, const int8_t* x) {
#pragma GCC unroll 8
  for (int j = 0; j < N; ++j) acc = _mm256_dpbusd_avx_epi32(acc, w[j], vbroadcast4(x + 4 * j));
  return acc;
}
#else
// vpmaddubsw adds two u8 x s8 products in 16 bits, saturating at 32767. With |x| <= 127:
//   4-bit codes: 16 products of 15 * 127 make 30480, so a whole block of 32 k is summed before widening;
//   6-bit codes: 4 products of 63 * 127 make 32004, so two steps are;
//   8-bit codes: signed, |w| <= 128 as the unsigned factor and its sign moved to x: 2 * 128 * 127 = 32512, one step.
constexpr bool SIGNED_CODES = true;
template <int BITS, int N>
FASTDL_INLINE vi vdot(vi acc, const vb* w, const int8_t* x) {
  const __m256i ones = _mm256_set1_epi16(1);
  if constexpr (BITS == 4) {
    __m256i s = _mm256_maddubs_epi16(w[0], vbroadcast4(x));
#pragma GCC unroll 8
    for (int j = 1; j < N; ++j) s = _mm256_add_epi16(s, _mm256_maddubs_epi16(w[j], vbroadcast4(x + 4 * j)));
    return _mm256_add_epi32(acc, _mm256_madd_epi16(s, ones));
  } else if constexpr (BITS == 6) {
#pragma GCC unroll 4
    for (int j = 0; j < N; j += 2) {
      const __m256i s = _mm256_add_epi16(_mm256_maddubs_epi16(w[j], vbroadcast4(x + 4 * j)),
                                         _mm256_maddubs_epi16(w[j + 1], vbroadcast4(x + 4 * j + 4)));
      acc = _mm256_add_epi32(acc, _mm256_madd_epi16(s, ones));
    }
    return acc;
  } else {
#pragma GCC unroll 8
    for (int j = 0; j < N; ++j) {
      const __m256i s = _mm256_maddubs_epi16(_mm256_abs_epi8(w[j]), _mm256_sign_epi8(vbroadcast4(x + 4 * j), w[j]));
      acc = _mm256_add_epi32(acc, _mm256_madd_epi16(s, ones));
    }
    return acc;
  }
}
#endif
template <int SHIFT>
FASTDL_INLINE vi vstart(int32_t nsum) {
  return _mm256_slli_epi32(_mm256_set1_epi32(nsum), SHIFT);
}

FASTDL_INLINE void vstore_bf16(uint16_t* p, vf x) {
  const __m256i u = _mm256_castps_si256(x);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
  const __m256i r = _mm256_srli_epi32(_mm256_add_epi32(u, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
  const __m256i quiet = _mm256_or_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(0x40));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  _mm_storeu_si128((__m128i*)p, low_words(_mm256_blendv_epi8(r, quiet, nan)));
}
FASTDL_INLINE vf vload_bf16(const uint16_t* p) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16));
}

}  // namespace
}  // namespace FASTDL_LEVEL
}  // namespace fastdl
