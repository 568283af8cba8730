// simd.h without any instruction set: GCC's and Clang's vector types, which the compiler lowers to whatever the baseline
// has (SSE2 on x86-64, NEON on AArch64). The level that builds on every machine.
#pragma once

#include <math.h>

#include "half.h"

namespace fastdl {
namespace FASTDL_LEVEL {
namespace {

constexpr bool VECTOR_LEVEL = false;
constexpr int LANES = 16;
typedef float vf __attribute__((vector_size(64)));
typedef int32_t vi __attribute__((vector_size(64)));
typedef uint32_t vu __attribute__((vector_size(64)));
typedef uint8_t vb __attribute__((vector_size(64)));

FASTDL_INLINE vf vload(const float* p) {
  vf r;
  memcpy(&r, p, sizeof r);
  return r;
}
FASTDL_INLINE void vstore(float* p, vf x) { memcpy(p, &x, sizeof x); }
FASTDL_INLINE vf vset1(float x) { return x - (vf){}; }
FASTDL_INLINE vf vfma(vf a, vf b, vf c) { return a * b + c; }
FASTDL_INLINE vf vadd(vf a, vf b) { return a + b; }
FASTDL_INLINE vf vsub(vf a, vf b) { return a - b; }
FASTDL_INLINE vf vmul(vf a, vf b) { return a * b; }
FASTDL_INLINE vf vdiv(vf a, vf b) { return a / b; }
// As the x86 instructions: the second operand when one is NaN.
FASTDL_INLINE vf vmax(vf a, vf b) { return a > b ? a : b; }
FASTDL_INLINE vf vmin(vf a, vf b) { return a < b ? a : b; }
FASTDL_INLINE vf vabs(vf a) { return (vf)((vi)a & 0x7fffffff); }
// where a <= b, x; else y
FASTDL_INLINE vf vselect_le(vf a, vf b, vf x, vf y) { return a <= b ? x : y; }
FASTDL_INLINE float vsum(vf a) {
  float s[LANES];
  vstore(s, a);
  for (int n = LANES / 2; n > 0; n /= 2)
    for (int i = 0; i < n; ++i) s[i] += s[i + n];
  return s[0];
}
FASTDL_INLINE float vhmax(vf a) {
  float m = a[0];
  for (int i = 1; i < LANES; ++i) m = a[i] > m ? a[i] : m;
  return m;
}
FASTDL_INLINE vf vcvt(vi a) { return __builtin_convertvector(a, vf); }
FASTDL_INLINE vi vround(vf a) {  // to nearest even; NaN and what does not fit give INT_MIN, as on x86
  vi r;
  for (int i = 0; i < LANES; ++i) r[i] = fabsf(a[i]) < 2147483648.0f ? (int32_t)lrintf(a[i]) : INT32_MIN;
  return r;
}
FASTDL_INLINE vf vscale2(vf a, vi n) { return a * (vf)((n + 127) << 23); }  // a * 2^n, |n| <= 126
FASTDL_INLINE vi vset1i(int32_t x) { return x - (vi){}; }
FASTDL_INLINE vf vload_f16(const uint16_t* p) {
  float r[LANES];
  for (int i = 0; i < LANES; ++i) r[i] = half_to_float(p[i]);
  return vload(r);
}
FASTDL_INLINE void vstore_f16(uint16_t* p, vf x) {
  for (int i = 0; i < LANES; ++i) p[i] = float_to_half(x[i]);
}
// 2 LANES floats as pairs: the first and the second of each, in an order of the level's own.
FASTDL_INLINE void vload_pairs(const float* p, vf* first, vf* second) {
  for (int i = 0; i < LANES; ++i) {
    (*first)[i] = p[2 * i];
    (*second)[i] = p[2 * i + 1];
  }
}
FASTDL_INLINE void vstore_pairs(float* p, vf first, vf second) {
  for (int i = 0; i < LANES; ++i) {
    p[2 * i] = first[i];
    p[2 * i + 1] = second[i];
  }
}
// Lane i of the result: the sum of the lanes of r[i].
FASTDL_INLINE vf vsum_rows(const vf r[LANES]) {
  vf sums;
  for (int i = 0; i < LANES; ++i) sums[i] = vsum(r[i]);
  return sums;
}
// r[i][j] and r[j][i] change places.
FASTDL_INLINE void vtranspose(vf r[LANES]) {
  for (int i = 0; i < LANES; ++i)
    for (int j = 0; j < i; ++j) {
      const float x = r[i][j];
      r[i][j] = r[j][i];
      r[j][i] = x;
    }
}
// The two floats of each pair exchanged.
FASTDL_INLINE vf vswap_pairs(vf a) {
  vf r;
  for (int i = 0; i < LANES; ++i) r[i] = a[i ^ 1];
  return r;
}
FASTDL_INLINE vf vpair_bf16_lo(vb a) { return (vf)((vu)a << 16); }
FASTDL_INLINE vf vpair_bf16_hi(vb a) { return (vf)((vu)a & 0xffff0000u); }
FASTDL_INLINE vf halves_to_float(vu a) {
  float r[LANES];
  for (int i = 0; i < LANES; ++i) r[i] = half_to_float((uint16_t)a[i]);
  return vload(r);
}
FASTDL_INLINE vf vpair_f16_lo(vb a) { return halves_to_float((vu)a & 0xffffu); }
FASTDL_INLINE vf vpair_f16_hi(vb a) { return halves_to_float((vu)a >> 16); }

FASTDL_INLINE vb bload(const uint8_t* p) {
  vb r;
  memcpy(&r, p, sizeof r);
  return r;
}
FASTDL_INLINE vb bset1(uint8_t x) { return x - (vb){}; }
FASTDL_INLINE vb band(vb a, vb b) { return a & b; }
FASTDL_INLINE vb bor(vb a, vb b) { return a | b; }
FASTDL_INLINE vb bxor(vb a, vb b) { return a ^ b; }
template <int N>
FASTDL_INLINE vb bshr(vb a) {
  return a >> N;
}
template <int N>
FASTDL_INLINE vb bshl(vb a) {
  return a << N;
}
template <int I>
FASTDL_INLINE vf vbyte(vb a) {
  return vcvt((vi)(((vu)a >> (8 * I)) & 0xffu));
}
FASTDL_INLINE vf vload_i8(const int8_t* p) {
  float r[LANES];
  for (int i = 0; i < LANES; ++i) r[i] = (float)p[i];
  return vload(r);
}
FASTDL_INLINE void vstore_i8(int8_t* p, vi a) {
  for (int i = 0; i < LANES; ++i) p[i] = (int8_t)(a[i] > 127 ? 127 : a[i] < -128 ? -128 : a[i]);
}
FASTDL_INLINE vi vloadi(const int32_t* p) {
  vi r;
  memcpy(&r, p, sizeof r);
  return r;
}
FASTDL_INLINE vi vxori(vi a, vi b) { return a ^ b; }
FASTDL_INLINE vi vsigni(vi a) { return a >> 31; }
FASTDL_INLINE void vmul_halves(vi a, uint32_t m, vi* high, vi* low) {
  for (int i = 0; i < LANES; ++i) {
    const uint64_t product = (uint64_t)(uint32_t)a[i] * m;
    (*high)[i] = (int32_t)(product >> 32);
    (*low)[i] = (int32_t)product;
  }
}
FASTDL_INLINE vi vaddi(vi a, vi b) { return a + b; }
FASTDL_INLINE int32_t vsumi(vi a) {
  int32_t s = 0;
  for (int i = 0; i < LANES; ++i) s += a[i];
  return s;
}

constexpr bool SIGNED_CODES = false;
template <int BITS, int N>
FASTDL_INLINE vi vdot(vi acc, const vb* w, const int8_t* x) {
  for (int j = 0; j < N; ++j)
    for (int b = 0; b < 4; ++b) acc += (vi)(((vu)w[j] >> (8 * b)) & 0xffu) * (int32_t)x[4 * j + b];
  return acc;
}
template <int SHIFT>
FASTDL_INLINE vi vstart(int32_t nsum) {
  return vset1i(nsum * (1 << SHIFT));
}

FASTDL_INLINE void vstore_bf16(uint16_t* p, vf x) {
  const vu u = (vu)x;
  const vu rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  const vu r = (u & 0x7fffffffu) > 0x7f800000u ? (u >> 16) | 0x40u : rounded;
  for (int i = 0; i < LANES; ++i) p[i] = (uint16_t)r[i];
}
FASTDL_INLINE vf vload_bf16(const uint16_t* p) {
  vu r;
  for (int i = 0; i < LANES; ++i) r[i] = (uint32_t)p[i] << 16;
  return (vf)r;
}

}  // namespace
}  // namespace FASTDL_LEVEL
}  // namespace fastdl
