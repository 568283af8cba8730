// simd.h for AVX-512 (F, BW, DQ, VL, VNNI; BF16 where __AVX512BF16__ is set).
#pragma once

#include <immintrin.h>

namespace fastdl {
namespace FASTDL_LEVEL {
namespace {

constexpr bool VECTOR_LEVEL = true;
constexpr int LANES = 16;
using vf = __m512;
using vi = __m512i;
using vb = __m512i;

FASTDL_INLINE vf vload(const float* p) { return _mm512_loadu_ps(p); }
FASTDL_INLINE void vstore(float* p, vf x) { _mm512_storeu_ps(p, x); }
FASTDL_INLINE vf vset1(float x) { return _mm512_set1_ps(x); }
FASTDL_INLINE vf vfma(vf a, vf b, vf c) { return _mm512_fmadd_ps(a, b, c); }
FASTDL_INLINE vf vadd(vf a, vf b) { return _mm512_add_ps(a, b); }
FASTDL_INLINE vf vsub(vf a, vf b) { return _mm512_sub_ps(a, b); }
FASTDL_INLINE vf vmul(vf a, vf b) { return _mm512_mul_ps(a, b); }
FASTDL_INLINE vf vdiv(vf a, vf b) { return _mm512_div_ps(a, b); }
FASTDL_INLINE vf vmax(vf a, vf b) { return _mm512_max_ps(a, b); }
FASTDL_INLINE vf vmin(vf a, vf b) { return _mm512_min_ps(a, b); }
FASTDL_INLINE vf vabs(vf a) { return _mm512_abs_ps(a); }
// where a <= b, x; else y
FASTDL_INLINE vf vselect_le(vf a, vf b, vf x, vf y) {
  return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_LE_OQ), y, x);
}
FASTDL_INLINE float vsum(vf a) { return _mm512_reduce_add_ps(a); }
FASTDL_INLINE float vhmax(vf a) { return _mm512_reduce_max_ps(a); }
FASTDL_INLINE vf vcvt(vi a) { return _mm512_cvtepi32_ps(a); }
FASTDL_INLINE vi vround(vf a) { return _mm512_cvtps_epi32(a); }
FASTDL_INLINE vf vscale2(vf a, vi n) { return _mm512_scalef_ps(a, _mm512_cvtepi32_ps(n)); }
FASTDL_INLINE vi vset1i(int32_t x) { return _mm512_set1_epi32(x); }
FASTDL_INLINE vf vload_f16(const uint16_t* p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
FASTDL_INLINE void vstore_f16(uint16_t* p, vf x) {
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
// 2 LANES floats as pairs: the first and the second of each. The pairs stand in an order of the level's own, which
// vstore_pairs undoes.
FASTDL_INLINE void vload_pairs(const float* p, vf* first, vf* second) {
  const vf low = vload(p), high = vload(p + LANES);
  *first = _mm512_shuffle_ps(low, high, 0x88);
  *second = _mm512_shuffle_ps(low, high, 0xdd);
}
FASTDL_INLINE void vstore_pairs(float* p, vf first, vf second) {
  vstore(p, _mm512_unpacklo_ps(first, second));
  vstore(p + LANES, _mm512_unpackhi_ps(first, second));
}
// Lane i of the result: the sum of the lanes of r[i]. Half the shuffles of turning the rows.
FASTDL_INLINE vf vsum_rows(const vf r[16]) {
  vf a[8], b[4];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i)
    a[i] = _mm512_add_ps(_mm512_unpacklo_ps(r[2 * i], r[2 * i + 1]), _mm512_unpackhi_ps(r[2 * i], r[2 * i + 1]));
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {  // every quarter: sums of rows 4 i to 4 i + 3
    const __m512d x = _mm512_castps_pd(a[2 * i]), y = _mm512_castps_pd(a[2 * i + 1]);
    b[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(x, y)), _mm512_castpd_ps(_mm512_unpackhi_pd(x, y)));
  }
  const vf c = _mm512_add_ps(_mm512_shuffle_f32x4(b[0], b[1], 0x88), _mm512_shuffle_f32x4(b[0], b[1], 0xdd));
  const vf d = _mm512_add_ps(_mm512_shuffle_f32x4(b[2], b[3], 0x88), _mm512_shuffle_f32x4(b[2], b[3], 0xdd));
  return _mm512_add_ps(_mm512_shuffle_f32x4(c, d, 0x88), _mm512_shuffle_f32x4(c, d, 0xdd));
}
// r[i][j] and r[j][i] change places: 16 rows of 16.
FASTDL_INLINE void vtranspose(vf r[16]) {
  vf t[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_ps(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_ps(r[i], r[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    const __m512d a = _mm512_castps_pd(t[i]), b = _mm512_castps_pd(t[i + 1]);
    const __m512d c = _mm512_castps_pd(t[i + 2]), d = _mm512_castps_pd(t[i + 3]);
    r[i] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, c));
    r[i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, c));
    r[i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(b, d));
    r[i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(b, d));
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {  // r[4 g + i]: columns i, i + 4, i + 8, i + 12 of the rows 4 g to 4 g + 3
    const vf a = _mm512_shuffle_f32x4(r[i], r[i + 4], 0x88), b = _mm512_shuffle_f32x4(r[i + 8], r[i + 12], 0x88);
    const vf c = _mm512_shuffle_f32x4(r[i], r[i + 4], 0xdd), d = _mm512_shuffle_f32x4(r[i + 8], r[i + 12], 0xdd);
    t[i] = _mm512_shuffle_f32x4(a, b, 0x88);
    t[i + 4] = _mm512_shuffle_f32x4(c, d, 0x88);
    t[i + 8] = _mm512_shuffle_f32x4(a, b, 0xdd);
    t[i + 12] = _mm512_shuffle_f32x4(c, d, 0xdd);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) r[i] = t[i];
}
// The two floats of each pair exchanged.
FASTDL_INLINE vf vswap_pairs(vf a) { return _mm512_permute_ps(a, 0xb1); }
// Lane r of a pair vector holds two 16-bit values; these take the lower or upper one to float32.
FASTDL_INLINE vf vpair_bf16_lo(vb a) { return _mm512_castsi512_ps(_mm512_slli_epi32(a, 16)); }
FASTDL_INLINE vf vpair_bf16_hi(vb a) {
  return _mm512_castsi512_ps(_mm512_and_si512(a, _mm512_set1_epi32((int)0xffff0000)));
}
FASTDL_INLINE vf vpair_f16_lo(vb a) { return _mm512_cvtph_ps(_mm512_cvtepi32_epi16(a)); }
FASTDL_INLINE vf vpair_f16_hi(vb a) { return _mm512_cvtph_ps(_mm512_cvtepi32_epi16(_mm512_srli_epi32(a, 16))); }

FASTDL_INLINE vb bload(const uint8_t* p) { return _mm512_loadu_si512(p); }
FASTDL_INLINE vb bset1(uint8_t x) { return _mm512_set1_epi8((char)x); }
FASTDL_INLINE vb band(vb a, vb b) { return _mm512_and_si512(a, b); }
FASTDL_INLINE vb bor(vb a, vb b) { return _mm512_or_si512(a, b); }
FASTDL_INLINE vb bxor(vb a, vb b) { return _mm512_xor_si512(a, b); }
template <int N>
FASTDL_INLINE vb bshr(vb a) {  // bytes shifted right as part of 16-bit words: mask afterwards
  return _mm512_srli_epi16(a, N);
}
template <int N>
FASTDL_INLINE vb bshl(vb a) {
  return _mm512_slli_epi16(a, N);
}
// Byte I of every lane, zero-extended, as float32.
template <int I>
FASTDL_INLINE vf vbyte(vb a) {
  if constexpr (I == 3) return _mm512_cvtepi32_ps(_mm512_srli_epi32(a, 24));
  return _mm512_cvtepi32_ps(_mm512_and_si512(_mm512_srli_epi32(a, 8 * I), _mm512_set1_epi32(0xff)));
}
// 16 int8 -> float32
FASTDL_INLINE vf vload_i8(const int8_t* p) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)));
}
// LANES float32, rounded to nearest even, saturated and stored as int8.
FASTDL_INLINE void vstore_i8(int8_t* p, vi a) { _mm_storeu_si128((__m128i*)p, _mm512_cvtsepi32_epi8(a)); }
FASTDL_INLINE vi vloadi(const int32_t* p) { return _mm512_loadu_si512(p); }
FASTDL_INLINE vi vxori(vi a, vi b) { return _mm512_xor_si512(a, b); }
FASTDL_INLINE vi vsigni(vi a) { return _mm512_srai_epi32(a, 31); }  // -1 where a < 0, else 0
// a * m as unsigned 64-bit products: their upper and lower halves
FASTDL_INLINE void vmul_halves(vi a, uint32_t m, vi* high, vi* low) {
  const __m512i factor = _mm512_set1_epi32((int)m);
  const __m512i even = _mm512_mul_epu32(a, factor), odd = _mm512_mul_epu32(_mm512_srli_epi64(a, 32), factor);
  *high = _mm512_mask_mov_epi32(_mm512_srli_epi64(even, 32), 0xaaaa, odd);
  *low = _mm512_mask_mov_epi32(even, 0xaaaa, _mm512_slli_epi64(odd, 32));
}
FASTDL_INLINE vi vaddi(vi a, vi b) { return _mm512_add_epi32(a, b); }
FASTDL_INLINE int32_t vsumi(vi a) { return _mm512_reduce_add_epi32(a); }

FASTDL_INLINE vi vbroadcast4(const int8_t* x) {
  int32_t v;
  memcpy(&v, x, 4);
  return _mm512_set1_epi32(v);
}

// Codes are offset-binary for signed formats here: dot products start from nsum << SHIFT, nsum = -sum of x.
constexpr bool SIGNED_CODES = false;

// sum over 4*N consecutive k of code[r][k] * x[k], for every row r: w[j] holds codes of k = 4j..4j+3.
// BITS (of the codes) matters only to levels without a 4-way dot product.
template <int BITS, int N>
FASTDL_INLINE vi vdot(vi acc, const vb* w, const int8_t* x) {
#pragma GCC unroll 8
  for (int j = 0; j < N; ++j) acc = _mm512_dpbusd_epi32(acc, w[j], vbroadcast4(x + 4 * j));
  return acc;
}
template <int SHIFT>
FASTDL_INLINE vi vstart(int32_t nsum) {
  return _mm512_slli_epi32(_mm512_set1_epi32(nsum), SHIFT);
}

#if defined(__AVX512BF16__)
#define FASTDL_NATIVE_BF16 1
// bf16(even) in the low half, bf16(odd) in the high half of every lane.
FASTDL_INLINE vb vpair(vf even, vf odd) {
  const __m512i e = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(even));
  const __m512i o = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(odd));
  return _mm512_or_si512(e, _mm512_slli_epi32(o, 16));
}
FASTDL_INLINE vf vdot_bf16(vf acc, vb w, const uint16_t* x) {
  int32_t v;
  memcpy(&v, x, 4);
  return _mm512_dpbf16_ps(acc, (__m512bh)w, (__m512bh)_mm512_set1_epi32(v));
}
FASTDL_INLINE void vstore_bf16(uint16_t* p, vf x) { _mm256_storeu_si256((__m256i*)p, (__m256i)_mm512_cvtneps_pbh(x)); }
#else
FASTDL_INLINE void vstore_bf16(uint16_t* p, vf x) {
  const __m512i u = _mm512_castps_si512(x);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
  __m512i r = _mm512_srli_epi32(_mm512_add_epi32(u, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
  const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
  r = _mm512_mask_mov_epi32(r, nan, _mm512_or_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(0x40)));
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16(r));
}
#endif
FASTDL_INLINE vf vload_bf16(const uint16_t* p) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16));
}

}  // namespace
}  // namespace FASTDL_LEVEL
}  // namespace fastdl
