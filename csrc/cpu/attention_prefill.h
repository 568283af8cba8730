// Causal attention of many queries against the cache: blocked online softmax (Milakov and Gimelshein 2018; Dao et al.
// 2022), everything vertical.
//
// The lanes of a vector are 16 consecutive queries of one head, so scores, maxima, exponentials and sums need no
// horizontal operation and K and V are read row by row, as they lie in the cache. One item is up to HEADS query heads
// that share a key head, for one block of 16 queries: the conversion of K and V to float32 is shared too.
#pragma once

#include "common/simd.h"
#include "cpu/decoder_block_kernel.h"

namespace fastdl {
namespace FASTDL_LEVEL {
namespace {

constexpr int64_t QUERIES = 16;   // a block: one vector of 16 lanes or two of 8
constexpr int64_t KEYS = 32;      // keys a step
constexpr int64_t HEADS = 3;      // query heads an item: 3 vectors x 4 keys fill the accumulators of both vector widths
constexpr float MASKED = -1e30f;  // finite, so that the difference of two masked scores is no NaN

struct PrefillScratch {
  float *q, *o;                // [head_dim][columns]: transposed queries and outputs; a column is one query of one head
  float *k, *v;                // [KEYS][head_dim]
  float* p;                    // [KEYS][columns]: scores, then exp(score - max)
  float *max, *sum, *rescale;  // [columns]
};

FASTDL_INLINE int64_t prefill_scratch_floats(int64_t head_dim) {
  const int64_t columns = HEADS * QUERIES;
  return 2 * head_dim * columns + 2 * KEYS * head_dim + KEYS * columns + 3 * columns;
}

FASTDL_INLINE PrefillScratch prefill_scratch(void* memory, int64_t head_dim) {
  const int64_t columns = HEADS * QUERIES;
  PrefillScratch s;
  s.q = (float*)memory;
  s.o = s.q + head_dim * columns;
  s.k = s.o + head_dim * columns;
  s.v = s.k + KEYS * head_dim;
  s.p = s.v + KEYS * head_dim;
  s.max = s.p + KEYS * columns;
  s.sum = s.max + columns;
  s.rescale = s.sum + columns;
  return s;
}

// c[i][V vectors] (+)= sum_j a[i * stride_i + j * stride_j] * b[j][V vectors] for ROWS rows i: both products of
// attention have this form, with queries in the lanes. b and c have `columns` floats a row.
template <int V, int ROWS>
FASTDL_INLINE void lane_product(const float* a, int64_t stride_i, int64_t stride_j, const float* b, int64_t count,
                                float* c, int64_t columns, const float* rescale) {
  vf acc[ROWS][V];
#pragma GCC unroll 4
  for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 3
    for (int v = 0; v < V; ++v)
      acc[i][v] = rescale ? vmul(vload(c + i * columns + v * LANES), vload(rescale + v * LANES)) : vset1(0.0f);
  for (int64_t j = 0; j < count; ++j) {
    vf row[V];
#pragma GCC unroll 3
    for (int v = 0; v < V; ++v) row[v] = vload(b + j * columns + v * LANES);
#pragma GCC unroll 4
    for (int i = 0; i < ROWS; ++i) {
      const vf x = vset1(a[i * stride_i + j * stride_j]);
#pragma GCC unroll 3
      for (int v = 0; v < V; ++v) acc[i][v] = vfma(x, row[v], acc[i][v]);
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 3
    for (int v = 0; v < V; ++v) vstore(c + i * columns + v * LANES, acc[i][v]);
}

// The same for `rows` rows (a multiple of 4) and all columns, three vectors at a time.
void lane_products(const float* a, int64_t stride_i, int64_t stride_j, const float* b, int64_t count, float* c,
                   int64_t columns, int64_t rows, const float* rescale) {
  for (int64_t first = 0; first < columns; first += 3 * LANES) {
    const int64_t vectors = (columns - first) / LANES;
    for (int64_t i = 0; i < rows; i += 4) {
      const float* a4 = a + i * stride_i;
      float* c4 = c + i * columns + first;
      const float* r = rescale ? rescale + first : nullptr;
      if (vectors >= 3) {
        lane_product<3, 4>(a4, stride_i, stride_j, b + first, count, c4, columns, r);
      } else if (vectors == 2) {
        lane_product<2, 4>(a4, stride_i, stride_j, b + first, count, c4, columns, r);
      } else {
        lane_product<1, 4>(a4, stride_i, stride_j, b + first, count, c4, columns, r);
      }
    }
  }
}

// Scores of one step to probabilities, with the running maximum and sum. keys: those of the step; position: of key 0.
void softmax_step(const PrefillScratch& s, int64_t columns, int64_t keys, int64_t position, int64_t first_query) {
  const bool masked = position + keys - 1 > first_query;
  alignas(64) float lane[QUERIES];
  for (int i = 0; i < QUERIES; ++i) lane[i] = (float)i;
  for (int64_t c = 0; c < columns; c += LANES) {
    // Positions relative to the first key of the step: small integers, exact in float32.
    const vf query = vadd(vload(lane + c % QUERIES), vset1((float)(first_query - position)));
    vf top = vload(s.max + c);
    const vf old = top;
    for (int64_t j = 0; j < keys; ++j) {
      vf x = vload(s.p + j * columns + c);
      if (masked) {
        x = vselect_le(vset1((float)j), query, x, vset1(MASKED));
        vstore(s.p + j * columns + c, x);
      }
      top = vmax(top, x);
    }
    const vf factor = vexp(vsub(old, top));
    vf total = vmul(vload(s.sum + c), factor);
    for (int64_t j = 0; j < keys; ++j) {
      const vf p = vexp(vsub(vload(s.p + j * columns + c), top));
      vstore(s.p + j * columns + c, p);
      total = vadd(total, p);
    }
    vstore(s.max + c, top);
    vstore(s.sum + c, total);
    vstore(s.rescale + c, factor);
  }
}

FASTDL_INLINE void rows_to_float(const uint16_t* rows, int64_t count, float* out) {
  for (int64_t i = 0; i < count; i += LANES) vstore(out + i, vload_f16(rows + i));
}

FASTDL_INLINE int64_t head_groups(const AttentionArgs& a) { return (a.n_heads / a.n_kv_heads + HEADS - 1) / HEADS; }

void prefill_item(const AttentionArgs& a, int64_t item, void* memory) {
  const int64_t shared = a.n_heads / a.n_kv_heads, groups = head_groups(a), hd = a.head_dim;
  const int64_t kv = item % a.n_kv_heads, group = item / a.n_kv_heads % groups;
  // The last queries see most keys: they go first, so that no thread ends with the longest item.
  const int64_t blocks = (a.n + QUERIES - 1) / QUERIES, block = blocks - 1 - item / a.n_kv_heads / groups;
  const int64_t head0 = kv * shared + group * HEADS;
  const int64_t heads = shared - group * HEADS < HEADS ? shared - group * HEADS : HEADS;
  const int64_t t0 = block * QUERIES, queries = a.n - t0 < QUERIES ? a.n - t0 : QUERIES, columns = heads * QUERIES;
  const PrefillScratch s = prefill_scratch(memory, hd);

  memset(s.q, 0, (size_t)(hd * columns) * sizeof(float));
  memset(s.o, 0, (size_t)(hd * columns) * sizeof(float));
  for (int64_t h = 0; h < heads; ++h)
    for (int64_t t = 0; t < queries; ++t)
      for (int64_t d = 0; d < hd; ++d)
        s.q[d * columns + h * QUERIES + t] = a.q[(t0 + t) * a.ld_q + (head0 + h) * hd + d] * a.scale;
  for (int64_t c = 0; c < columns; ++c) s.max[c] = MASKED, s.sum[c] = 0.0f;

  const int64_t seen = a.pos + t0 + queries;  // keys that the block's last query sees
  for (int64_t key = 0; key < seen; key += KEYS) {
    const int64_t keys = seen - key < KEYS ? seen - key : KEYS, padded = (keys + 3) / 4 * 4;
    rows_to_float(a.k_cache + (kv * a.max_len + key) * hd, keys * hd, s.k);
    rows_to_float(a.v_cache + (kv * a.max_len + key) * hd, keys * hd, s.v);
    memset(s.k + keys * hd, 0, (size_t)((padded - keys) * hd) * sizeof(float));
    lane_products(s.k, hd, 1, s.q, hd, s.p, columns, padded, nullptr);  // scores [key][column]
    softmax_step(s, columns, keys, key, a.pos + t0);
    lane_products(s.v, 1, hd, s.p, keys, s.o, columns, hd, s.rescale);  // outputs [d][column]
  }
  for (int64_t h = 0; h < heads; ++h)
    for (int64_t t = 0; t < queries; ++t) {
      const float inverse = 1.0f / s.sum[h * QUERIES + t];
      float* out = a.out + (t0 + t) * a.n_heads * hd + (head0 + h) * hd;
      for (int64_t d = 0; d < hd; ++d) out[d] = s.o[d * columns + h * QUERIES + t] * inverse;
    }
}

}  // namespace
}  // namespace FASTDL_LEVEL
}  // namespace fastdl
