// Attention of a block of queries for one level: online softmax (Milakov and Gimelshein 2018; Rabe and Staats 2021).
//
// Method: up to 48 queries lie in the lanes of three vectors. For every block of 128 keys their scores are computed, the
// greatest score and the sum of exponentials move on, and the outputs, transposed as well, are rescaled and added to. Blocks
// of keys start at multiples of 128 whatever the queries see, so that a row's sums do not depend on the rows beside it.
// bfloat16 is multiplied in pairs where the CPU has that; else 16-bit types become float32 block by block.
//
// Floor: 2 n_q n_k (head_dim + d_v) operations over the peak. A score costs also one exponential, 15 instructions for 16 or
// 8 of them: an eighth of the products at head_dim 64.
//
// Test: pytest tests/test_attention.py        Benchmark: pytest bench/bench_attention.py
#include "cpu/attention_columns.h"

namespace fastdl {
namespace FASTDL_LEVEL {
namespace {

struct ForwardScratch {
  float *q, *scores, *out;     // [D][COLUMNS], [KEYS][COLUMNS], [D_v][COLUMNS]; widths up to whole vectors
  float *k, *v;                // [KEYS][D], [KEYS][D_v]: 16-bit keys and values as floats, or values as pairs
  float *top, *sum, *rescale;  // [COLUMNS]
  float* row;                  // [LANES][D]
  uint32_t* pairs;             // [KEYS / 2][COLUMNS]
  OptionScratch options;
};

FASTDL_INLINE int64_t forward_floats(const AttentionCall& a) {
  const int64_t d = whole(a.head_dim), dv = whole(a.d_v);
  return (d + dv) * (COLUMNS + KEYS) + KEYS * COLUMNS + 3 * COLUMNS + LANES * d + KEYS / 2 * COLUMNS + OPTION_FLOATS;
}

FASTDL_INLINE ForwardScratch forward_scratch(const AttentionCall& a, void* memory) {
  const int64_t d = whole(a.head_dim), dv = whole(a.d_v);
  float* at = (float*)memory;
  const auto take = [&](int64_t n) FASTDL_STEP {
    float* const here = at;
    at += n;
    return here;
  };
  ForwardScratch s;
  s.q = take(d * COLUMNS), s.scores = take(KEYS * COLUMNS), s.out = take(dv * COLUMNS);
  s.k = take(KEYS * d), s.v = take(KEYS * dv);
  s.top = take(COLUMNS), s.sum = take(COLUMNS), s.rescale = take(COLUMNS);
  s.row = take(LANES * d);
  s.pairs = (uint32_t*)take(KEYS / 2 * COLUMNS);
  s.options.row = take(KEYS), s.options.top = take(COLUMNS);
  s.options.seen = (uint32_t*)take(KEYS / 32 * COLUMNS), s.options.keep = take(KEYS * COLUMNS);
  return s;
}

int64_t forward_bytes(const AttentionCall& a) { return forward_floats(a) * (int64_t)sizeof(float); }

FASTDL_INLINE vf greatest(const float* x, int64_t keys) {
  vf top[4];
  for (int i = 0; i < 4; ++i) top[i] = vset1(-INFINITY);
  int64_t j = 0;
  for (; j + 4 <= keys; j += 4)
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) top[i] = vmax(top[i], vload(x + (j + i) * COLUMNS));
  for (; j < keys; ++j) top[0] = vmax(top[0], vload(x + j * COLUMNS));
  return vmax(vmax(top[0], top[1]), vmax(top[2], top[3]));
}

// Scores [keys][COLUMNS] (times c: in units of log 2) to probabilities, and what they change in the sums so far. known: options.top
// holds the greatest. keep: dropout's factors or null. pairs: where two keys' probabilities go as bfloat16, or null: they replace the scores.
template <bool PAIRS>
inline void softmax_block(const ForwardScratch& s, int vectors, int64_t keys, float c, bool known, const float* keep) {
  const vf times = vset1(c), zero = vset1(0.0f), lowest = vset1(LOWEST);
  for (int v = 0; v < vectors; ++v) {
    float* const x = s.scores + v * LANES;
    const vf block = known ? vload(s.options.top + v * LANES) : greatest(x, keys);
    const vf old = vload(s.top + v * LANES), now = vmax(old, vmul(block, times));
    const vf safe = vselect_le(now, vset1(-FLT_MAX), zero, now);  // so far nothing was seen: no -inf - -inf
    const vf shift = vexp2(vsub(old, safe)), less = vsub(zero, safe);
    const auto probability = [&](int64_t j) FASTDL_STEP {
      const vf t = vfma(vload(x + j * COLUMNS), times, less);
      return vselect_le(t, lowest, zero, vexp2(t));
    };
    const auto kept = [&](vf p, int64_t j)
                          FASTDL_STEP { return keep ? vmul(p, vload(keep + j * COLUMNS + v * LANES)) : p; };
    vf sums[2] = {zero, zero};
    int64_t j = 0;
    for (; j + 2 <= keys; j += 2) {
      const vf even = probability(j), odd = probability(j + 1);
      sums[0] = vadd(sums[0], even);
      sums[1] = vadd(sums[1], odd);
#if defined(FASTDL_NATIVE_BF16)
      if constexpr (PAIRS) {
        const vb both = vpair(kept(even, j), kept(odd, j + 1));
        memcpy(s.pairs + j / 2 * COLUMNS + v * LANES, &both, sizeof both);
        continue;
      }
#endif
      vstore(x + j * COLUMNS, kept(even, j));
      vstore(x + (j + 1) * COLUMNS, kept(odd, j + 1));
    }
    if (j < keys) {
      const vf last = probability(j);
      sums[0] = vadd(sums[0], last);
#if defined(FASTDL_NATIVE_BF16)
      if constexpr (PAIRS) {
        const vb both = vpair(kept(last, j), zero);
        memcpy(s.pairs + j / 2 * COLUMNS + v * LANES, &both, sizeof both);
      }
#endif
      if constexpr (!PAIRS) vstore(x + j * COLUMNS, kept(last, j));
    }
    vstore(s.top + v * LANES, now);
    vstore(s.sum + v * LANES, vfma(vload(s.sum + v * LANES), shift, vadd(sums[0], sums[1])));
    vstore(s.rescale + v * LANES, shift);
  }
}

// out [D_v][COLUMNS] over the sums, and lse, to the tensors.
template <class T>
void write_out(const AttentionCall& a, const AttentionSequence& s, const Columns& c, const ForwardScratch& f) {
  for (int v = 0; v < c.vectors; ++v) {
    float inverse[LANES];
    for (int i = 0; i < LANES; ++i) {
      const int64_t column = v * LANES + i;
      const float sum = f.sum[column];
      inverse[i] = sum == 0.0f ? 0.0f : 1.0f / sum;
      if (a.lse && column < c.count)
        a.lse[(s.batch * a.heads + c.head[column]) * a.n_q + s.q0 + c.row[column]] =
            sum == 0.0f ? -INFINITY : f.top[column] * LN2 + logf(sum);
    }
    for (int64_t d = 0; d < a.d_v; d += LANES) {
      vf square[LANES];
      for (int i = 0; i < LANES; ++i)
        square[i] = d + i < a.d_v ? vmul(vload(f.out + (d + i) * COLUMNS + v * LANES), vload(inverse)) : vset1(0.0f);
      vtranspose(square);
      for (int i = 0; i < LANES; ++i)
        if (v * LANES + i < c.count) put<T>(a.out, place_of(a.out_at, s, c, v * LANES + i) + d, square[i], a.d_v - d);
    }
  }
}

// The values of a block as a product takes them.
struct Values {
  const float* rows;
  int64_t stride;
};

// 16-bit types become floats in f.v, or pairs. careful: elements that are not finite become 0.
template <class T, bool PAIRS>
Values load_values(const AttentionCall& a, int64_t at, int64_t keys, bool careful, const ForwardScratch& f) {
  const int64_t ld = whole(a.d_v);
  if constexpr (PAIRS) {
#if defined(FASTDL_NATIVE_BF16)
    uint16_t* const pairs = (uint16_t*)f.v;
    pair_rows((const uint16_t*)a.v + at, a.v_at.row, keys, a.d_v, (uint32_t*)pairs, ld);
    for (int64_t i = 0; careful && i < (keys + 1) / 2 * 2 * ld; ++i)
      if ((pairs[i] & 0x7f80) == 0x7f80) pairs[i] = 0;
#endif
  } else {
    if (__is_same(T, F32) && !careful) return {(const float*)a.v + at, a.v_at.row};
    for (int64_t j = 0; j < keys; ++j) {
      float* const row = f.v + j * ld;
      row_to_floats<T>(a.v, at + j * a.v_at.row, a.d_v, 1.0f, row);
      for (int64_t i = 0; careful && i < ld; i += LANES) vstore(row + i, finite(vload(row + i)));
    }
  }
  return {f.v, ld};
}

// What careful values lack, after their product.
template <class T, bool PAIRS>
void add_lost_values(const AttentionCall& a, int64_t at, int64_t keys, int vectors, const ForwardScratch& f) {
  const int64_t ld = whole(a.d_v);
  float* const row = PAIRS ? f.v + KEYS / 2 * ld : f.v;  // behind the pairs
  for (int64_t j = 0; j < keys; ++j) {
    row_to_floats<T>(a.v, at + j * a.v_at.row, a.d_v, 1.0f, row);
    if (all_finite(row, ld)) continue;
    float weights[COLUMNS];
    if (PAIRS) {
      for (int64_t i = 0; i < vectors * LANES; ++i) {
        const uint32_t both = f.pairs[j / 2 * COLUMNS + i], bits = j % 2 ? both & 0xffff0000u : both << 16;
        memcpy(weights + i, &bits, sizeof bits);
      }
    } else {
      memcpy(weights, f.scores + j * COLUMNS, (size_t)(vectors * LANES) * sizeof(float));
    }
    add_not_finite(row, a.d_v, weights, vectors, f.out);
  }
}

inline bool outputs_are_finite(const AttentionCall& a, int vectors, const ForwardScratch& f) {
  for (int64_t k = 0; k < a.d_v; ++k)
    if (!all_finite(f.out + k * COLUMNS, vectors * LANES)) return false;
  return true;
}

// PAIRS: bfloat16 in pairs. T: the type of keys and values.
template <class T, bool PAIRS>
void load_queries(const AttentionCall& a, const AttentionSequence& s, const Columns& c, const ForwardScratch& f) {
  const int64_t d = a.head_dim, ld = whole(d);
  const float* rows[LANES];
  for (int i = 0; i < LANES; ++i) rows[i] = f.row + i * ld;
  for (int v = 0; v < c.vectors; ++v) {
    for (int i = 0; i < LANES; ++i) {
      const int64_t at = place_of(a.q_at, s, c, v * LANES + i);
      if constexpr (PAIRS) {
        memcpy(f.row + i * ld, (const uint16_t*)a.q + at, (size_t)d * 2);
      } else {
        dispatch(a.format, [&](auto type) { row_to_floats<decltype(type)>(a.q, at, d, 1.0f, f.row + i * ld); });
      }
    }
    transpose_to_tile(rows, 1, PAIRS ? d / 2 : d, f.q + v * LANES, COLUMNS);
  }
}

// The sums over the keys key0 .. key1, and their greatest scores, into f. careful: a value that is not finite adds nothing
// where its weight is 0.
template <class T, bool PAIRS>
void forward_blocks(const AttentionCall& a, const AttentionSequence& s, const Columns& c, int64_t key0, int64_t key1,
                    bool careful, const ForwardScratch& f) {
  const int64_t d = a.head_dim, dv = a.d_v, ld = whole(d), ldv = whole(dv);
  const float unit = unit_of_scores(a);
  for (int64_t i = 0; i < c.vectors * LANES; ++i) f.top[i] = -INFINITY, f.sum[i] = 0.0f;

  const int64_t begin = (c.first > key0 ? c.first : key0) / KEYS * KEYS, end = c.last < key1 ? c.last : key1;
  if (begin >= end) memset(f.out, 0, (size_t)(ldv * COLUMNS) * sizeof(float));
  for (int64_t key = begin; key < end; key += KEYS) {
    const int64_t keys = end - key < KEYS ? end - key : KEYS;
    const int64_t k_at = key_place(a.k_at, s, key), v_at = key_place(a.v_at, s, key);
    if constexpr (PAIRS) {
#if defined(FASTDL_NATIVE_BF16)
      product_pairs<ZERO>((const uint16_t*)a.k + k_at, a.k_at.row, 2, (const uint32_t*)f.q, COLUMNS, d / 2, f.scores,
                          COLUMNS, keys, c.vectors);
#endif
    } else {
      const float* k = (const float*)a.k + k_at;
      int64_t stride = a.k_at.row;
      if constexpr (!__is_same(T, F32)) {
        for (int64_t j = 0; j < keys; ++j) row_to_floats<T>(a.k, k_at + j * a.k_at.row, d, 1.0f, f.k + j * ld);
        k = f.k, stride = ld;
      }
      product<ZERO>(k, stride, 1, f.q, COLUMNS, d, f.scores, COLUMNS, keys, c.vectors);
    }
    const bool changed = changes_scores(a, c, key, keys);
    if (changed) apply_options(a, c, key, keys, f.options, f.scores);
    if (a.dropout) dropout_tile(a, c, key, keys, f.options);
    softmax_block<PAIRS>(f, c.vectors, keys, unit, changed, a.dropout ? f.options.keep : nullptr);
    const Values v = load_values<T, PAIRS>(a, v_at, keys, careful, f);
    if constexpr (PAIRS) {
#if defined(FASTDL_NATIVE_BF16)
      const uint16_t* const pairs = (const uint16_t*)v.rows;
      if (key == begin)
        product_pairs<ZERO>(pairs, 2, 2 * ldv, f.pairs, COLUMNS, (keys + 1) / 2, f.out, COLUMNS, dv, c.vectors);
      else
        product_pairs<RESCALE>(pairs, 2, 2 * ldv, f.pairs, COLUMNS, (keys + 1) / 2, f.out, COLUMNS, dv, c.vectors,
                               f.rescale);
#endif
    } else {
      if (key == begin)
        product<ZERO>(v.rows, 1, v.stride, f.scores, COLUMNS, keys, f.out, COLUMNS, dv, c.vectors);
      else
        product<RESCALE>(v.rows, 1, v.stride, f.scores, COLUMNS, keys, f.out, COLUMNS, dv, c.vectors, f.rescale);
    }
    if (careful) add_lost_values<T, PAIRS>(a, v_at, keys, c.vectors, f);
  }
}

template <class T, bool PAIRS>
void forward_any(const AttentionCall& a, const AttentionSequence& s, int64_t first, int64_t count, int64_t key0,
                 int64_t key1, float* partial, void* memory) {
  Columns c;
  set_columns(a, s, first, count, c);
  const ForwardScratch f = forward_scratch(a, memory);
  const int64_t dv = a.d_v;
  load_queries<T, PAIRS>(a, s, c, f);
  forward_blocks<T, PAIRS>(a, s, c, key0, key1, false, f);
  // 0 times NaN is NaN: what a hidden value has spoilt is computed again.
  if (!outputs_are_finite(a, c.vectors, f)) forward_blocks<T, PAIRS>(a, s, c, key0, key1, true, f);
  if (partial) {
    memcpy(partial, f.out, (size_t)(dv * COLUMNS) * sizeof(float));
    memcpy(partial + dv * COLUMNS, f.top, (size_t)COLUMNS * sizeof(float));
    memcpy(partial + (dv + 1) * COLUMNS, f.sum, (size_t)COLUMNS * sizeof(float));
  } else {
    dispatch(a.format, [&](auto type) { write_out<decltype(type)>(a, s, c, f); });
  }
}

void forward(const AttentionCall& a, const AttentionSequence& s, int64_t first, int64_t count, int64_t key0,
             int64_t key1, float* partial, void* memory) {
#if defined(FASTDL_NATIVE_BF16)
  if (a.format == FORMAT_BF16 && a.key_format == FORMAT_BF16 && a.head_dim % 2 == 0)
    return forward_any<BF16, true>(a, s, first, count, key0, key1, partial, memory);
#endif
  dispatch(a.key_format,
           [&](auto type) { forward_any<decltype(type), false>(a, s, first, count, key0, key1, partial, memory); });
}

void merge(const AttentionCall& a, const AttentionSequence& s, int64_t first, int64_t count, const float* partial,
           int64_t parts, void* memory) {
  Columns c;
  set_columns(a, s, first, count, c);
  const ForwardScratch f = forward_scratch(a, memory);
  const int64_t dv = a.d_v, size = (dv + 2) * COLUMNS;
  for (int v = 0; v < c.vectors; ++v) {
    const float* const at = partial + v * LANES;
    vf top = vset1(-INFINITY), sum = vset1(0.0f);
    for (int64_t i = 0; i < parts; ++i) top = vmax(top, vload(at + i * size + dv * COLUMNS));
    const vf safe = vselect_le(top, vset1(-FLT_MAX), vset1(0.0f), top);
    for (int64_t k = 0; k < dv; ++k) vstore(f.out + k * COLUMNS + v * LANES, vset1(0.0f));
    for (int64_t i = 0; i < parts; ++i) {
      const float* const part = at + i * size;
      const vf factor = vexp2(vsub(vload(part + dv * COLUMNS), safe));
      sum = vfma(vload(part + (dv + 1) * COLUMNS), factor, sum);
      for (int64_t k = 0; k < dv; ++k) {
        float* const to = f.out + k * COLUMNS + v * LANES;
        vstore(to, vfma(vload(part + k * COLUMNS), factor, vload(to)));
      }
    }
    vstore(f.top + v * LANES, safe);
    vstore(f.sum + v * LANES, sum);
  }
  dispatch(a.format, [&](auto type) { write_out<decltype(type)>(a, s, c, f); });
}

}  // namespace

extern const AttentionKernels attention_kernels = {COLUMNS, KEYS, forward_bytes, forward, merge};

}  // namespace FASTDL_LEVEL
}  // namespace fastdl
