// Two words more for simd.h: conditions that lie in memory as bits.
#pragma once

#include "common/simd.h"

namespace fastdl {
namespace FASTDL_LEVEL {
namespace {

#if defined(__AVX512F__) && defined(__AVX512VNNI__)

// Lane by lane: yes where the word has the bit, no where it has not. bit: a power of two.
FASTDL_INLINE vf vselect_bit(vi words, uint32_t bit, vf yes, vf no) {
  return _mm512_mask_blend_ps(_mm512_test_epi32_mask(words, _mm512_set1_epi32((int)bit)), no, yes);
}

// LANES words, moved down by some bits.
FASTDL_INLINE vi vload_words(const uint32_t* words, int down) {
  return _mm512_srl_epi32(_mm512_loadu_si512(words), _mm_cvtsi32_si128(down));
}

// Bit i: byte i of 32 is not 0.
FASTDL_INLINE uint32_t nonzero_bytes(const uint8_t* p) {
  const __m256i bytes = _mm256_loadu_si256((const __m256i*)p);
  return _mm256_test_epi8_mask(bytes, bytes);
}

#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)

FASTDL_INLINE vf vselect_bit(vi words, uint32_t bit, vf yes, vf no) {
  const __m256i one = _mm256_set1_epi32((int)bit);
  return _mm256_blendv_ps(no, yes, _mm256_castsi256_ps(_mm256_cmpeq_epi32(_mm256_and_si256(words, one), one)));
}

FASTDL_INLINE vi vload_words(const uint32_t* words, int down) {
  return _mm256_srl_epi32(_mm256_loadu_si256((const __m256i*)words), _mm_cvtsi32_si128(down));
}

FASTDL_INLINE uint32_t nonzero_bytes(const uint8_t* p) {
  const __m256i bytes = _mm256_loadu_si256((const __m256i*)p);
  return ~(uint32_t)_mm256_movemask_epi8(_mm256_cmpeq_epi8(bytes, _mm256_setzero_si256()));
}

#else

FASTDL_INLINE vf vselect_bit(vi words, uint32_t bit, vf yes, vf no) { return (words & (int32_t)bit) != 0 ? yes : no; }

FASTDL_INLINE vi vload_words(const uint32_t* words, int down) {
  vi w;
  memcpy(&w, words, sizeof w);
  return w >> down;
}

FASTDL_INLINE uint32_t nonzero_bytes(const uint8_t* p) {
  uint32_t bits = 0;
  for (int i = 0; i < 32; ++i) bits |= (uint32_t)(p[i] != 0) << i;
  return bits;
}

#endif

}  // namespace
}  // namespace FASTDL_LEVEL
}  // namespace fastdl
