// Philox4x32-10 and dropout's decision, the same in C++, CUDA, Triton and fastdl/reference/philox.py (which has the maths).
// Plain functions of ints: no include, no symbol.
#pragma once

#include <stdint.h>

#if defined(__CUDACC__)
#define FASTDL_PHILOX __host__ __device__ __forceinline__
#else
#define FASTDL_PHILOX static inline __attribute__((always_inline))
#endif

namespace fastdl {

// First word for the key `seed` and the counter (index, 0).
FASTDL_PHILOX uint32_t philox(uint64_t seed, uint64_t index) {
  uint32_t c0 = (uint32_t)index, c1 = (uint32_t)(index >> 32), c2 = 0, c3 = 0;
  uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = (uint64_t)c0 * 0xD2511F53u, b = (uint64_t)c2 * 0xCD9E8D57u;
    c0 = (uint32_t)(b >> 32) ^ c1 ^ k0;
    c1 = (uint32_t)b;
    c2 = (uint32_t)(a >> 32) ^ c3 ^ k1;
    c3 = (uint32_t)a;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return c0;
}

// Uniform in [0, 1).
FASTDL_PHILOX float philox_uniform(uint64_t seed, uint64_t index) {
  const uint32_t bits = philox(seed, index);
  return (float)(int32_t)(bits > 0x7fffffffu ? ~bits : bits) * 4.6566127342e-10f;
}

// Dropout: 0 where element `index` is dropped with probability p, else `scale`, which is 1 / (1 - p).
FASTDL_PHILOX float philox_dropout(uint64_t seed, uint64_t index, float p, float scale) {
  return philox_uniform(seed, index) >= p ? scale : 0.0f;
}

}  // namespace fastdl
