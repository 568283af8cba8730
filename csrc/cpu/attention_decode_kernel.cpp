// Attention of a few queries over a cache for one level.
//
// Method: the heads that share a key head are up to 4 queries that pass every key together, so that a row of the cache is
// read and converted once. Scores of LANES keys come from products in the lanes of head_dim, whose sums are formed for LANES keys
// at once; outputs lie in registers while the values stream by. Parts of 512 keys are merged in order.
//
// Floor: the bytes of the cache over the bandwidth of the memory or cache that holds it.
//
// Test: pytest tests/test_attention_decode.py        Benchmark: pytest bench/bench_attention_decode.py
#include "cpu/attention_decode_kernel.h"

#include <float.h>
#include <math.h>

#include "common/half.h"
#include "common/simd_math.h"
#include "cpu/attention_tile.h"

namespace fastdl {
namespace FASTDL_LEVEL {
namespace {

constexpr int64_t PART = 512;
constexpr int TOGETHER = 4;

// LANES elements of a cache's row from i on, those from n on zero.
template <class T>
struct Row {
  FASTDL_INLINE vf load(const uint8_t* row, int64_t i, int64_t n) { return get<T>(row, i, n - i); }
};
struct Q8 {};
template <>
struct Row<Q8> {  // n is a multiple of 32
  FASTDL_INLINE vf load(const uint8_t* row, int64_t i, int64_t) {
    const uint8_t* const block = row + i / 32 * 34;
    uint16_t d;
    memcpy(&d, block, 2);
    return vmul(vload_i8((const int8_t*)block + 2 + i % 32), vset1(half_to_float(d)));
  }
};

template <class Body>
void dispatch_cache(int format, const Body& body) {
  if (format == FORMAT_Q8_0) return body(Q8());
  dispatch(format, body);
}

// The row of a position, or null where the table or the cache has none.
FASTDL_INLINE uint8_t* position_of(const DecodeCall& a, const DecodeCache& cache, int64_t b, int64_t group,
                                   int64_t at) {
  int64_t row = b;
  if (a.table) {
    const int64_t index = at / a.block;
    row = index < a.table_blocks ? a.table[b * a.table_blocks + index] : -1;
    at %= a.block;
  } else if (at >= a.block) {
    row = -1;
  }
  if (row < 0 || row >= a.blocks) return nullptr;
  return cache.data + row * cache.row + group * cache.head + at * cache.position;
}

FASTDL_INLINE int64_t capacity(const DecodeCall& a) { return a.table ? a.table_blocks * a.block : a.block; }
FASTDL_INLINE int64_t held(const DecodeCall& a, int64_t b) {
  const int64_t n = a.lens[b];
  return n < 0 ? 0 : n > capacity(a) ? capacity(a) : n;
}
FASTDL_INLINE int64_t total(const DecodeCall& a, int64_t b) {
  const int64_t n = held(a, b) + a.n_new;
  return n > capacity(a) ? capacity(a) : n;
}

// x [head_dim], turned by the angles of a position (clamped to the table).
inline void turn(const DecodeCall& a, int64_t position, float* x) {
  if (!a.cos_sin || !a.positions) return;
  const int64_t at = position < 0 ? 0 : position >= a.positions ? a.positions - 1 : position;
  const float* const cs = a.cos_sin + at * a.rope_dim;
  const int64_t half = a.rope_dim / 2;
  for (int64_t i = 0; i < half; ++i) {
    float* const first = x + (a.interleaved ? 2 * i : i);
    float* const second = a.interleaved ? first + 1 : first + half;
    const float u = *first, w = *second;
    *first = u * cs[2 * i] - w * cs[2 * i + 1];
    *second = w * cs[2 * i] + u * cs[2 * i + 1];
  }
}

// ggml's rule, to the bit: codes come from the unrounded scale.
inline void store_q8(const float* x, int64_t n, uint8_t* row) {
  for (int64_t b = 0; b < n / 32; ++b, x += 32, row += 34) {
    float largest = 0;
    for (int j = 0; j < 32; ++j) largest = fabsf(x[j]) > largest ? fabsf(x[j]) : largest;
    const float d = largest / 127, inverse = d != 0 ? 1 / d : 0;
    const uint16_t bits = float_to_half(d);
    memcpy(row, &bits, 2);
    for (int j = 0; j < 32; ++j) row[2 + j] = (uint8_t)(int8_t)roundf(x[j] * inverse);
  }
}

inline void store_row(const DecodeCall& a, const float* x, int64_t n, uint8_t* row) {
  if (a.cache_format == FORMAT_Q8_0) return store_q8(x, n, row);
  dispatch(a.cache_format, [&](auto type) {
    for (int64_t i = 0; i < n; i += LANES) put<decltype(type)>(row, i, vload(x + i), n - i);
  });
}

constexpr int64_t WIDEST = 4096;  // of a row; the wrapper has checked

void append(const DecodeCall& a, int64_t b, int64_t group) {
  alignas(64) float x[WIDEST];
  for (int64_t t = 0; t < a.n_new; ++t) {
    const int64_t position = held(a, b) + t;
    uint8_t* const k = position_of(a, a.k, b, group, position);
    uint8_t* const v = position_of(a, a.v, b, group, position);
    if (!k || !v) continue;
    dispatch(a.format, [&](auto type) {
      row_to_floats<decltype(type)>(a.k_new, b * a.k_at.batch + group * a.k_at.head + t * a.k_at.row, a.head_dim, 1.0f,
                                    x);
    });
    turn(a, position, x);
    store_row(a, x, a.head_dim, k);
    dispatch(a.format, [&](auto type) {
      row_to_floats<decltype(type)>(a.v_new, b * a.v_at.batch + group * a.v_at.head + t * a.v_at.row, a.d_v, 1.0f, x);
    });
    store_row(a, x, a.d_v, v);
  }
}

FASTDL_INLINE int64_t queries_of(const DecodeCall& a) { return a.heads / a.kv_heads * a.n_q; }
FASTDL_INLINE int64_t query_floats(const DecodeCall& a) { return whole(a.d_v) + LANES; }  // outputs, greatest, sum
int64_t part_floats(const DecodeCall& a) { return queries_of(a) * query_floats(a); }
int64_t scratch_bytes(const DecodeCall& a) {
  return (TOGETHER * (whole(a.head_dim) + PART) + 2 * PART * (int64_t)(sizeof(void*) / sizeof(float))) * 4;
}

// M queries against `keys` keys; q [M][whole(head_dim)], s [M][PART]. Some keys at once, so that a vector of q is loaded for
// all of them.
template <class T, int M>
void scores_of(const uint8_t* const* rows, int64_t keys, int64_t d, const float* q, float* s) {
  constexpr int SOME = LANES == 16 ? 4 : 2;
  const int64_t ld = whole(d), even = d / LANES * LANES;
  for (int64_t j = 0; j < keys; j += LANES) {
    vf sum[M][LANES];
    const int64_t last = keys - 1;
    for (int i = 0; i < LANES; i += SOME) {
      vf dot[M][SOME];
      const uint8_t* row[SOME];
#pragma GCC unroll 4
      for (int n = 0; n < SOME; ++n) {
        row[n] = rows[j + i + n < last ? j + i + n : last];
#pragma GCC unroll 4
        for (int m = 0; m < M; ++m) dot[m][n] = vset1(0.0f);
      }
      const auto step = [&](int64_t k, int64_t end) FASTDL_STEP {
        vf x[SOME];
#pragma GCC unroll 4
        for (int n = 0; n < SOME; ++n) x[n] = Row<T>::load(row[n], k, end);
#pragma GCC unroll 4
        for (int m = 0; m < M; ++m) {
          const vf y = vload(q + m * ld + k);
#pragma GCC unroll 4
          for (int n = 0; n < SOME; ++n) dot[m][n] = vfma(x[n], y, dot[m][n]);
        }
      };
      for (int64_t k = 0; k < even; k += LANES) step(k, k + LANES);
      if (even < d) step(even, d);
#pragma GCC unroll 4
      for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
        for (int n = 0; n < SOME; ++n) sum[m][i + n] = dot[m][n];
    }
    for (int m = 0; m < M; ++m) vstore(s + m * PART + j, vsum_rows(sum[m]));
  }
}

// out [M][query_floats] = sum over keys of s [M][PART] times the values.
template <class T, int M>
void outputs_of(const uint8_t* const* rows, int64_t keys, int64_t dv, const float* s, float* out, int64_t ld) {
  constexpr int V = LANES == 16 ? 4 : 2;
  for (int64_t k = 0; k < dv; k += V * LANES) {
    vf sum[M][V];
    for (int m = 0; m < M; ++m)
      for (int v = 0; v < V; ++v) sum[m][v] = vset1(0.0f);
    const int here = (int)((dv - k + LANES - 1) / LANES < V ? (dv - k + LANES - 1) / LANES : V);
    if (here == V && dv - k >= V * LANES) {
      for (int64_t j = 0; j < keys; ++j) {
        vf x[V];
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) x[v] = Row<T>::load(rows[j], k + v * LANES, k + (v + 1) * LANES);
#pragma GCC unroll 4
        for (int m = 0; m < M; ++m) {
          const vf p = vset1(s[m * PART + j]);
#pragma GCC unroll 4
          for (int v = 0; v < V; ++v) sum[m][v] = vfma(p, x[v], sum[m][v]);
        }
      }
    } else {
      for (int64_t j = 0; j < keys; ++j)
        for (int v = 0; v < here; ++v) {
          const vf x = Row<T>::load(rows[j], k + v * LANES, dv);
          for (int m = 0; m < M; ++m) sum[m][v] = vfma(vset1(s[m * PART + j]), x, sum[m][v]);
        }
    }
    for (int m = 0; m < M; ++m)
      for (int v = 0; v < here; ++v) vstore(out + m * ld + k + v * LANES, sum[m][v]);
  }
}

// Products s [keys] of one query become exp2 of scores less the greatest; keys it does not see become 0.
void softmax(const DecodeCall& a, int64_t key0, int64_t keys, int64_t place, float slope, float* s, float* top_,
             float* sum_) {
  int64_t low = a.left >= 0 ? place - a.left - key0 : 0, high = a.right >= 0 ? place + a.right + 1 - key0 : keys;
  low = low < 0 ? 0 : low > keys ? keys : low;
  high = high < 0 ? 0 : high > keys ? keys : high;
  const vf hidden = vset1(-INFINITY), first = vset1((float)low), last = vset1((float)high - 1.0f);
  const vf factor = vset1(a.softcap > 0 ? a.scale / a.softcap : a.scale * LOG2E), cap = vset1(a.softcap * LOG2E);
  const vf here = vset1((float)(place - key0)), slopes = vset1(slope * LOG2E);
  float lanes[LANES];
  for (int i = 0; i < LANES; ++i) lanes[i] = (float)i;
  vf top = hidden;
  for (int64_t j = 0; j < keys; j += LANES) {
    const vf number = vadd(vload(lanes), vset1((float)j));
    vf x = vmul(vload(s + j), factor);
    if (a.softcap > 0) x = vmul(vtanh(x), cap);
    if (slope != 0.0f) x = vsub(x, vmul(slopes, vabs(vsub(here, number))));
    x = vselect_le(first, number, vselect_le(number, last, x, hidden), hidden);
    vstore(s + j, x);
    top = vmax(top, x);
  }
  *top_ = vhmax(top);
  const vf less = vset1(*top_ == -INFINITY ? 0.0f : -*top_);
  vf sum = vset1(0.0f);
  for (int64_t j = 0; j < keys; j += LANES) {
    const vf t = vadd(vload(s + j), less), p = vselect_le(t, vset1(LOWEST), vset1(0.0f), vexp2(t));
    vstore(s + j, p);
    sum = vadd(sum, p);
  }
  *sum_ = vsum(sum);
}

FASTDL_INLINE float slope_of(const DecodeCall& a, int64_t b, int64_t head) {
  return a.slopes ? a.slopes[(a.slopes_of_batch ? b * a.heads : 0) + head] : 0.0f;
}

void part(const DecodeCall& a, int64_t b, int64_t group, int64_t index, float* sums, void* memory) {
  const int64_t ld = whole(a.head_dim), shared = a.heads / a.kv_heads, queries = queries_of(a), each = query_floats(a);
  float* const q = (float*)memory;
  float* const s = q + TOGETHER * ld;
  const uint8_t** const k = (const uint8_t**)(s + TOGETHER * PART);
  const uint8_t** const v = k + PART;
  const int64_t end = total(a, b), key0 = index * PART, keys = end - key0 < PART ? end - key0 : PART;
  int64_t known = 0;
  while (known < keys) {  // block by block; a table with a hole ends the part
    const uint8_t* const first_k = position_of(a, a.k, b, group, key0 + known);
    const uint8_t* const first_v = position_of(a, a.v, b, group, key0 + known);
    if (!first_k || !first_v) break;
    const int64_t left = a.block - (key0 + known) % a.block, run = left < keys - known ? left : keys - known;
    for (int64_t i = 0; i < run; ++i) {
      k[known + i] = first_k + i * a.k.position;
      v[known + i] = first_v + i * a.v.position;
    }
    known += run;
  }
  for (int64_t first = 0; first < queries; first += TOGETHER) {
    const int count = (int)(queries - first < TOGETHER ? queries - first : TOGETHER);
    for (int m = 0; m < count; ++m) {
      const int64_t head = group * shared + (first + m) / a.n_q, t = (first + m) % a.n_q;
      dispatch(a.format, [&](auto type) {
        row_to_floats<decltype(type)>(a.q, b * a.q_at.batch + head * a.q_at.head + t * a.q_at.row, a.head_dim, 1.0f,
                                      q + m * ld);
      });
      turn(a, end - a.n_q + t, q + m * ld);
    }
    float* const out = sums + first * each;
    const auto run = [&](auto type, auto number) {
      using T = decltype(type);
      constexpr int M = decltype(number)::value;
      scores_of<T, M>(k, known, a.head_dim, q, s);
      for (int m = 0; m < M; ++m) {
        const int64_t head = group * shared + (first + m) / a.n_q, t = (first + m) % a.n_q;
        float* const statistics = out + m * each + whole(a.d_v);
        softmax(a, key0, known, end - a.n_q + t, slope_of(a, b, head), s + m * PART, statistics, statistics + 1);
      }
      outputs_of<T, M>(v, known, a.d_v, s, out, each);
    };
    dispatch_cache(a.cache_format, [&](auto type) {
      switch (count) {
        case 1: return run(type, Index<1>());
        case 2: return run(type, Index<2>());
        case 3: return run(type, Index<3>());
        default: return run(type, Index<4>());
      }
    });
  }
}

void merge(const DecodeCall& a, int64_t b, int64_t group, const float* sums, int64_t parts) {
  const int64_t shared = a.heads / a.kv_heads, each = query_floats(a), stride = part_floats(a), wide = whole(a.d_v);
  for (int64_t i = 0; i < queries_of(a); ++i) {
    const int64_t head = group * shared + i / a.n_q, t = i % a.n_q;
    const float* const at = sums + i * each;
    float top = -INFINITY, sum = 0.0f;
    for (int64_t n = 0; n < parts; ++n) {
      const float x = at[n * stride + wide];
      if (!(x <= top)) top = x;  // NaN stays
    }
    const float safe = top == -INFINITY ? 0.0f : top;
    for (int64_t n = 0; n < parts; ++n) sum += at[n * stride + wide + 1] * exp2f(at[n * stride + wide] - safe);
    const float inverse = sum == 0.0f ? 0.0f : 1.0f / sum;
    if (a.lse) a.lse[(b * a.heads + head) * a.n_q + t] = sum == 0.0f ? -INFINITY : top * LN2 + logf(sum);
    dispatch(a.format, [&](auto type) {
      for (int64_t k = 0; k < a.d_v; k += LANES) {
        vf x = vset1(0.0f);
        for (int64_t n = 0; n < parts; ++n)
          x = vfma(vload(at + n * stride + k), vset1(exp2f(at[n * stride + wide] - safe)), x);
        put<decltype(type)>(a.out, b * a.out_at.batch + head * a.out_at.head + t * a.out_at.row + k,
                            vmul(x, vset1(inverse)), a.d_v - k);
      }
    });
  }
}

}  // namespace

extern const DecodeKernels decode_kernels = {PART, part_floats, scratch_bytes, append, part, merge};

}  // namespace FASTDL_LEVEL
}  // namespace fastdl
