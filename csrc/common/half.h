// IEEE half precision in plain C++, for code compiled for any CPU. Static functions only: no symbol leaves a file.
#pragma once

#include <stdint.h>
#include <string.h>

namespace fastdl {

static inline float half_to_float(uint16_t h) {
  const uint32_t sign = (uint32_t)(h & 0x8000u) << 16;
  const uint32_t exponent = (h >> 10) & 0x1fu;
  uint32_t mantissa = h & 0x3ffu;
  uint32_t u;
  if (exponent == 0x1fu) {
    u = sign | 0x7f800000u | (mantissa << 13);
  } else if (exponent != 0) {
    u = sign | ((exponent + 112u) << 23) | (mantissa << 13);
  } else {  // subnormal: mantissa * 2^-24 is exact in float32
    float x = (float)mantissa * 5.9604644775390625e-8f;
    memcpy(&u, &x, 4);
    u |= sign;
  }
  float x;
  memcpy(&x, &u, 4);
  return x;
}

static inline uint16_t float_to_half(float x) {  // round to nearest even
  uint32_t u;
  memcpy(&u, &x, 4);
  const uint16_t sign = (uint16_t)((u >> 16) & 0x8000u);
  u &= 0x7fffffffu;
  if (u > 0x7f800000u) return (uint16_t)(sign | 0x7e00u);   // NaN
  if (u >= 0x477ff000u) return (uint16_t)(sign | 0x7c00u);  // 65520 and above round to infinity
  if (u < 0x38800000u) {                                    // below 2^-14: subnormal, units of 2^-24
    float a;
    memcpy(&a, &u, 4);
    a += 0.5f;  // the float32 addition rounds to the unit 2^-24, ties to even
    memcpy(&u, &a, 4);
    return (uint16_t)(sign | (u - 0x3f000000u));
  }
  u += 0xfffu + ((u >> 13) & 1u);
  return (uint16_t)(sign | ((u - 0x38000000u) >> 13));
}

}  // namespace fastdl
