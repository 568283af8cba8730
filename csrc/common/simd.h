// One vocabulary of vector operations, played by whatever the level being compiled has.
//
// A kernel source is compiled once per level (FASTDL_LEVEL names it) and sees the same names each time:
//   LANES   floats a vector: 16 (avx512, scalar) or 8 (avx2)
//   vf      LANES float32          vi   LANES int32          vb   LANES x 4 bytes, lane r holds 4 bytes of row r
// A panel of 16 rows is therefore PARTS = 16 / LANES vectors. Everything is static and inlined: nothing here may leave
// a symbol behind, or the linker could hand AVX-512 code to a smaller CPU.
#pragma once

#include <stdint.h>
#include <string.h>

#if !defined(FASTDL_LEVEL)
#error "simd.h is for kernel sources, which are compiled with -DFASTDL_LEVEL=<level>"
#endif

#define FASTDL_INLINE static inline __attribute__((always_inline))

#if defined(__AVX512F__) && defined(__AVX512VNNI__)
#include "simd_avx512.h"
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#include "simd_avx2.h"
#else
#include "simd_scalar.h"
#endif

namespace fastdl {
namespace FASTDL_LEVEL {
namespace {

constexpr int PANEL = 16;
constexpr int PARTS = PANEL / LANES;

// exp(x) for x <= 0 and moderate positive x, relative error below 2e-7: 2^n * p(r) with r = x - n ln 2 in
// [-ln2/2, ln2/2] and p the degree-6 Taylor polynomial, which is exact to 1.2e-7 there. Inputs are clamped to
// [-87.3, 88], so that the result is a normal number; exp(-inf) comes out as 1.2e-38, which a softmax cannot see.
FASTDL_INLINE vf vexp(vf x) {
  x = vmin(vset1(88.0f), vmax(vset1(-87.3f), x));  // in this order NaN stays NaN
  const vi n = vround(vmul(x, vset1(1.44269504f)));
  const vf fn = vcvt(n);
  vf r = vfma(fn, vset1(-0.693359375f), x);  // ln 2 in two parts (Cody and Waite)
  r = vfma(fn, vset1(2.12194440e-4f), r);
  vf p = vset1(1.0f / 720.0f);
  p = vfma(p, r, vset1(1.0f / 120.0f));
  p = vfma(p, r, vset1(1.0f / 24.0f));
  p = vfma(p, r, vset1(1.0f / 6.0f));
  p = vfma(p, r, vset1(0.5f));
  p = vfma(p, r, vset1(1.0f));
  p = vfma(p, r, vset1(1.0f));
  return vscale2(p, n);
}

// x * sigmoid(x)
FASTDL_INLINE vf vsilu(vf x) { return vdiv(x, vadd(vset1(1.0f), vexp(vsub(vset1(0.0f), x)))); }

// Round to the nearest bfloat16 (ties to even), kept in a float32. NaN stays NaN.
FASTDL_INLINE float round_bf16(float x) {
  uint32_t u;
  memcpy(&u, &x, 4);
  if ((u & 0x7fffffffu) > 0x7f800000u) return x;
  u = (u + 0x7fffu + ((u >> 16) & 1u)) & 0xffff0000u;
  memcpy(&x, &u, 4);
  return x;
}

FASTDL_INLINE float bf16_to_float(uint16_t h) {
  const uint32_t u = (uint32_t)h << 16;
  float x;
  memcpy(&x, &u, 4);
  return x;
}

FASTDL_INLINE uint16_t float_to_bf16(float x) {
  uint32_t u;
  memcpy(&u, &x, 4);
  if ((u & 0x7fffffffu) > 0x7f800000u) return (uint16_t)((u >> 16) | 0x40u);
  return (uint16_t)((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
}

}  // namespace
}  // namespace FASTDL_LEVEL
}  // namespace fastdl
