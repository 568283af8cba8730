// The steps of a decoder block between its products: RMS norm, RoPE, the cache, attention. One source, compiled once
// per level; csrc/cpu/decoder_block.cpp puts them in order.
//
//   pytest tests/test_decoder_block.py        python -m pytest bench/bench_llm.py
#include "cpu/decoder_block_kernel.h"

#include <math.h>

#include "cpu/attention_prefill.h"

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

// One query of one head against all its keys. scores: pos + n floats.
void one_query(const AttentionArgs& a, int64_t t, int64_t h, float* scores) {
  const int64_t hd = a.head_dim, keys = a.pos + t + 1, kv = h / (a.n_heads / a.n_kv_heads);
  const float* q = a.q + t * a.ld_q + h * hd;
  const uint16_t* k = a.k_cache + kv * a.max_len * hd;
  const uint16_t* v = a.v_cache + kv * a.max_len * hd;
  float* out = a.out + (t * a.n_heads + h) * hd;

  float top = MASKED;
  for (int64_t j = 0; j < keys; ++j) {
    vf dot = vset1(0.0f);
    for (int64_t d = 0; d < hd; d += LANES) dot = vfma(vload(q + d), vload_f16(k + j * hd + d), dot);
    scores[j] = vsum(dot) * a.scale;
    top = scores[j] > top ? scores[j] : top;
  }
  const int64_t whole = keys / LANES * LANES;
  vf sums = vset1(0.0f);
  for (int64_t j = 0; j < whole; j += LANES) {
    const vf p = vexp(vsub(vload(scores + j), vset1(top)));
    vstore(scores + j, p);
    sums = vadd(sums, p);
  }
  if (whole < keys) {
    alignas(64) float rest[LANES];
    for (int64_t i = 0; i < LANES; ++i) rest[i] = whole + i < keys ? scores[whole + i] : -INFINITY;
    vstore(rest, vexp(vsub(vload(rest), vset1(top))));
    for (int64_t i = 0; whole + i < keys; ++i) scores[whole + i] = rest[i];
    sums = vadd(sums, vload(rest));
  }
  const vf inverse = vset1(1.0f / vsum(sums));
  for (int64_t d = 0; d < hd; d += LANES) {
    vf even = vset1(0.0f), odd = vset1(0.0f);
    int64_t j = 0;
    for (; j + 1 < keys; j += 2) {
      even = vfma(vset1(scores[j]), vload_f16(v + j * hd + d), even);
      odd = vfma(vset1(scores[j + 1]), vload_f16(v + (j + 1) * hd + d), odd);
    }
    if (j < keys) even = vfma(vset1(scores[j]), vload_f16(v + j * hd + d), even);
    vstore(out + d, vmul(vadd(even, odd), inverse));
  }
}

// Few queries: an item is one query of one head. Many: a block of 16 queries of up to three heads.
constexpr int64_t FEW = 4;

int64_t attention_items(const AttentionArgs& a) {
  if (a.n <= FEW) return a.n * a.n_heads;
  return (a.n + QUERIES - 1) / QUERIES * a.n_kv_heads * head_groups(a);
}

int64_t attention_scratch_bytes(const AttentionArgs& a) {
  const int64_t floats = a.n <= FEW ? a.pos + a.n : prefill_scratch_floats(a.head_dim);
  return (floats * (int64_t)sizeof(float) + 127) / 64 * 64;
}

void attention(const AttentionArgs& a, int64_t item0, int64_t item1, void* scratch) {
  for (int64_t item = item0; item < item1; ++item) {
    if (a.n <= FEW) {
      one_query(a, item / a.n_heads, item % a.n_heads, (float*)scratch);
    } else {
      prefill_item(a, item, scratch);
    }
  }
}

}  // namespace

const DecoderBlockKernels decoder_block_kernels = {rms_norm, rope_and_cache, attention_items, attention_scratch_bytes,
                                                   attention};

}  // namespace FASTDL_LEVEL
}  // namespace fastdl
