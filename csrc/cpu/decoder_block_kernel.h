// What decoder_block_kernel.cpp offers at each level beside the products of quant_matmul_kernel.h: the small steps of a
// decoder block between them. Raw pointers, no torch; all activations are float32.
#pragma once

#include <stdint.h>

#include "cpu/cpu_level.h"

namespace fastdl {

// n new tokens of one sequence at positions pos .. pos + n - 1. head_dim is a multiple of 16.
struct RopeArgs {
  float* qkv;         // [n][ld_qkv]: query heads, key heads, value heads
  const float* rope;  // [>= pos + n][rope_dim]: (cos, sin) pairs for the pairs of elements (2i, 2i + 1)
  uint16_t* k_cache;  // f16 [n_kv_heads][max_len][head_dim]
  uint16_t* v_cache;  // the same
  int64_t n, pos, ld_qkv, max_len, n_heads, n_kv_heads, head_dim, rope_dim;
};

struct DecoderBlockKernels {
  // out[t] = x[t] / sqrt(mean(x[t]^2) + eps) * weight for t0 <= t < t1; x, out [n][width]
  void (*rms_norm)(const float* x, const float* weight, float eps, int64_t width, int64_t t0, int64_t t1, float* out);
  // Items 0 .. n * (n_heads + 2 n_kv_heads): turns one head of one token, or copies it to the cache.
  void (*rope_and_cache)(const RopeArgs& a, int64_t item0, int64_t item1);
};

#define FASTDL_DECLARE(variant) \
  namespace variant { extern const DecoderBlockKernels decoder_block_kernels; }
FASTDL_VARIANTS(FASTDL_DECLARE)
#undef FASTDL_DECLARE

}  // namespace fastdl
