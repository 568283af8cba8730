// The steps of a decoder block between its products: RMS norm, RoPE, the cache. One source, compiled once
// per level; csrc/cpu/decoder_block.cpp puts them in order.
//
//   pytest tests/test_decoder_block.py        python -m pytest bench/bench_llm.py
#include "cpu/decoder_block_kernel.h"

#include <math.h>

#include "common/simd.h"

namespace fastdl {
namespace FASTDL_LEVEL {
namespace {

void rms_norm(const float* x, const float* weight, float eps, int64_t width, int64_t t0, int64_t t1, float* out) {
  const int64_t whole = width / LANES * LANES;
  for (int64_t t = t0; t < t1; ++t) {
    const float* row = x + t * width;
    float* to = out + t * width;
    vf squares = vset1(0.0f);
    for (int64_t i = 0; i < whole; i += LANES) {
      const vf v = vload(row + i);
      squares = vfma(v, v, squares);
    }
    float sum = vsum(squares);
    for (int64_t i = whole; i < width; ++i) sum += row[i] * row[i];
    const float factor = 1.0f / sqrtf(sum / (float)width + eps);
    for (int64_t i = 0; i < whole; i += LANES)
      vstore(to + i, vmul(vmul(vload(row + i), vset1(factor)), vload(weight + i)));
    for (int64_t i = whole; i < width; ++i) to[i] = row[i] * factor * weight[i];
  }
}

void rope_and_cache(const RopeArgs& a, int64_t item0, int64_t item1) {
  const int64_t heads = a.n_heads + 2 * a.n_kv_heads, hd = a.head_dim;
  for (int64_t item = item0; item < item1; ++item) {
    const int64_t t = item / heads, h = item % heads, position = a.pos + t;
    float* x = a.qkv + t * a.ld_qkv + h * hd;
    if (h < a.n_heads + a.n_kv_heads) {
      const float* cs = a.rope + position * a.rope_dim;
      for (int64_t i = 0; i < a.rope_dim; i += 2) {
        const float even = x[i], odd = x[i + 1];
        x[i] = even * cs[i] - odd * cs[i + 1];
        x[i + 1] = even * cs[i + 1] + odd * cs[i];
      }
    }
    if (h < a.n_heads) continue;
    const int64_t kv = (h - a.n_heads) % a.n_kv_heads;
    uint16_t* cache = h < a.n_heads + a.n_kv_heads ? a.k_cache : a.v_cache;
    uint16_t* to = cache + (kv * a.max_len + position) * hd;
    for (int64_t i = 0; i < hd; i += LANES) vstore_f16(to + i, vload(x + i));
  }
}

}  // namespace

const DecoderBlockKernels decoder_block_kernels = {rms_norm, rope_and_cache};

}  // namespace FASTDL_LEVEL
}  // namespace fastdl
