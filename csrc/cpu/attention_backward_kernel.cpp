// The backward pass of attention for one level: probabilities come again from scores and lse (Dao et al. 2022).
//
// Method: for a block of 128 keys the blocks of queries stream by, in the lanes of vectors as in the forward pass. A pair of
// blocks takes five products: scores, dP, and what dQ, dK and dV gain. dK and dV stay until the keys change; dQ is summed per
// part of the keys, transposed, and the parts, which follow from the number of keys, are added in order.
//
// Floor: 2 n_q n_k (3 head_dim + 2 d_v) operations over the peak.
//
// Test: pytest tests/test_attention.py        Benchmark: pytest bench/bench_attention.py
#include "cpu/attention_columns.h"

namespace fastdl {
namespace FASTDL_LEVEL {
namespace {

struct BackwardScratch {
  float *q, *grad;           // [D][COLUMNS], [D_v][COLUMNS]: transposed
  float *q_rows, *do_rows;   // [COLUMNS][D], [COLUMNS][D_v]
  float *p, *ds, *slope;     // [KEYS][COLUMNS]
  float *k, *v, *dk, *dv;    // [KEYS][D], [KEYS][D_v]
  float* finite;             // [KEYS][D]: keys whose elements that are not finite are 0
  float *lse, *low, *delta;  // [COLUMNS]; lse in base 2, and what that rounds off
  OptionScratch options;
};

FASTDL_INLINE int64_t backward_floats(const AttentionCall& a) {
  return 2 * (whole(a.head_dim) + whole(a.d_v)) * (COLUMNS + KEYS) + whole(a.head_dim) * KEYS + 3 * KEYS * COLUMNS +
         3 * COLUMNS + OPTION_FLOATS;
}

FASTDL_INLINE BackwardScratch backward_scratch(const AttentionCall& a, void* memory) {
  const int64_t d = whole(a.head_dim), dv = whole(a.d_v);
  float* at = (float*)memory;
  const auto take = [&](int64_t n) FASTDL_STEP {
    float* const here = at;
    at += n;
    return here;
  };
  BackwardScratch s;
  s.q = take(d * COLUMNS), s.grad = take(dv * COLUMNS);
  s.q_rows = take(d * COLUMNS), s.do_rows = take(dv * COLUMNS);
  s.p = take(KEYS * COLUMNS), s.ds = take(KEYS * COLUMNS), s.slope = take(KEYS * COLUMNS);
  s.k = take(KEYS * d), s.v = take(KEYS * dv), s.dk = take(KEYS * d), s.dv = take(KEYS * dv);
  s.finite = take(KEYS * d);
  s.lse = take(COLUMNS), s.low = take(COLUMNS), s.delta = take(COLUMNS);
  s.options.row = take(KEYS), s.options.top = take(COLUMNS);
  s.options.seen = (uint32_t*)take(KEYS / 32 * COLUMNS), s.options.keep = take(KEYS * COLUMNS);
  return s;
}

int64_t backward_bytes(const AttentionCall& a) { return backward_floats(a) * (int64_t)sizeof(float); }

FASTDL_INLINE int64_t statistic(const AttentionCall& a, const AttentionSequence& s, const Columns& c, int64_t column) {
  return (s.batch * a.heads + c.head[column]) * a.n_q + s.q0 + c.row[column];
}

// Queries and gradients of the columns as rows and transposed, and their statistics.
template <class T>
void load_columns(const AttentionCall& a, const AttentionSequence& s, const Columns& c, const BackwardScratch& f) {
  const int64_t d = a.head_dim, dv = a.d_v, ld = whole(d), ldv = whole(dv);
  const float *q[COLUMNS], *grad[COLUMNS];
  for (int64_t i = 0; i < c.vectors * LANES; ++i) {
    row_to_floats<T>(a.q, place_of(a.q_at, s, c, i), d, 1.0f, f.q_rows + i * ld);
    row_to_floats<T>(a.grad, place_of(a.grad_at, s, c, i), dv, 1.0f, f.do_rows + i * ldv);
    q[i] = f.q_rows + i * ld, grad[i] = f.do_rows + i * ldv;
    const float lse = a.row_lse[statistic(a, s, c, i)];
    const bool blind = lse == -INFINITY;  // without keys: exp2 gives 0
    f.lse[i] = blind ? FLT_MAX : lse * LOG2E;
    f.low[i] = blind ? 0.0f : fmaf(lse, LOG2E, -f.lse[i]);
    f.delta[i] = a.delta[statistic(a, s, c, i)];
  }
  transpose_to_tile(q, c.vectors, d, f.q, COLUMNS);
  transpose_to_tile(grad, c.vectors, dv, f.grad, COLUMNS);
}

struct KeyRows {
  const float *k, *v;
  int64_t k_stride, v_stride;
};

// Keys and values of a block as rows of floats: the tensors' own where they are float32.
template <class T>
KeyRows load_keys(const AttentionCall& a, const AttentionSequence& s, int64_t key, int64_t keys,
                  const BackwardScratch& f) {
  const int64_t d = a.head_dim, dv = a.d_v, ld = whole(d), ldv = whole(dv);
  const int64_t k_at = key_place(a.k_at, s, key), v_at = key_place(a.v_at, s, key);
  if constexpr (__is_same(T, F32)) {
    return {(const float*)a.k + k_at, (const float*)a.v + v_at, a.k_at.row, a.v_at.row};
  } else {
    for (int64_t j = 0; j < keys; ++j) {
      row_to_floats<T>(a.k, k_at + j * a.k_at.row, d, 1.0f, f.k + j * ld);
      row_to_floats<T>(a.v, v_at + j * a.v_at.row, dv, 1.0f, f.v + j * ldv);
    }
    return {f.k, f.v, ld, ldv};
  }
}

// p: the probabilities, dropped; ds: the gradients of the scores after the cap.
void score_gradients(const AttentionCall& a, const Columns& c, int64_t key, int64_t keys, const KeyRows& rows,
                     const BackwardScratch& f) {
  product<ZERO>(rows.k, rows.k_stride, 1, f.q, COLUMNS, a.head_dim, f.p, COLUMNS, keys, c.vectors);
  product<ZERO>(rows.v, rows.v_stride, 1, f.grad, COLUMNS, a.d_v, f.ds, COLUMNS, keys, c.vectors);
  if (changes_scores(a, c, key, keys))
    apply_options(a, c, key, keys, f.options, f.p, a.softcap > 0 ? f.slope : nullptr);
  if (a.dropout) dropout_tile(a, c, key, keys, f.options);
  const vf zero = vset1(0.0f), lowest = vset1(LOWEST), times = vset1(unit_of_scores(a));
  for (int v = 0; v < c.vectors; ++v) {
    const vf lse = vload(f.lse + v * LANES), low = vload(f.low + v * LANES), delta = vload(f.delta + v * LANES);
    for (int64_t j = 0; j < keys; ++j) {
      const int64_t at = j * COLUMNS + v * LANES;
      const vf t = vsub(vfma(vload(f.p + at), times, vsub(zero, lse)), low);
      vf p = vselect_le(t, lowest, zero, vexp2(t)), dp = vload(f.ds + at);
      if (a.dropout) dp = vmul(dp, vload(f.options.keep + at));
      vstore(f.ds + at, vselect_le(t, lowest, zero, vmul(p, vsub(dp, delta))));  // hidden: also where dp is NaN
      if (a.dropout) p = vmul(p, vload(f.options.keep + at));
      vstore(f.p + at, p);
    }
  }
}

// dbias += ds, whose columns become rows again.
void add_to_bias(const AttentionCall& a, const AttentionSequence& s, const Columns& c, int64_t key, int64_t keys,
                 const BackwardScratch& f) {
  for (int v = 0; v < c.vectors; ++v)
    for (int64_t j = 0; j < keys; j += LANES) {
      vf square[LANES];
      const int64_t n = keys - j < LANES ? keys - j : LANES;
      for (int i = 0; i < LANES; ++i) square[i] = i < n ? vload(f.ds + (j + i) * COLUMNS + v * LANES) : vset1(0.0f);
      vtranspose(square);
      for (int i = 0; i < LANES && v * LANES + i < c.count; ++i) {
        const int64_t column = v * LANES + i;
        float* const to = a.dbias + s.batch * a.dbias_at.batch + c.head[column] * a.dbias_at.head +
                          c.row[column] * a.dbias_at.row + (key + j) * a.dbias_at.key;
        if (a.dbias_at.key)
          put<F32>(to, 0, vadd(get<F32>(to, 0, n), square[i]), n);
        else
          *to += vsum(square[i]);
      }
    }
}

// ds becomes the gradient of the products q . k (times the scale).
void through_cap(const AttentionCall& a, const Columns& c, int64_t keys, const BackwardScratch& f) {
  if (!(a.softcap > 0)) return;
  for (int64_t j = 0; j < keys; ++j)
    for (int v = 0; v < c.vectors; ++v) {
      const int64_t at = j * COLUMNS + v * LANES;
      const vf ds = vload(f.ds + at);
      vstore(f.ds + at, vselect_le(vabs(ds), vset1(0.0f), ds, vmul(ds, vload(f.slope + at))));
    }
}

template <class T>
void write_rows(const float* from, int64_t ld, int64_t rows, int64_t n, float factor, void* to, int64_t at,
                int64_t stride) {
  for (int64_t j = 0; j < rows; ++j)
    for (int64_t i = 0; i < n; i += LANES)
      put<T>(to, at + j * stride + i, vmul(vload(from + j * ld + i), vset1(factor)), n - i);
}

// The keys as the product with ds takes them: where some are not finite, those become 0, and `lost` is set.
template <class T>
KeyRows finite_keys(const AttentionCall& a, const AttentionSequence& s, int64_t key, int64_t keys, const KeyRows& rows,
                    const BackwardScratch& f, bool* lost) {
  const int64_t d = a.head_dim, ld = whole(d), at = key_place(a.k_at, s, key);
  *lost = false;
  for (int64_t j = 0; j < keys; ++j) {
    float* const row = f.finite + j * ld;
    row_to_floats<T>(a.k, at + j * a.k_at.row, d, 1.0f, row);
    if (all_finite(row, ld)) continue;
    for (int64_t i = 0; i < ld; i += LANES) vstore(row + i, finite(vload(row + i)));
    *lost = true;
  }
  return *lost ? KeyRows{f.finite, rows.v, ld, rows.v_stride} : rows;
}

// What the product of ds with such keys lacks.
template <class T>
void add_lost_keys(const AttentionCall& a, const AttentionSequence& s, const Columns& c, int64_t key, int64_t keys,
                   const BackwardScratch& f, float* dq) {
  const int64_t d = a.head_dim, at = key_place(a.k_at, s, key);
  float* const row = f.q_rows;  // read again for the next columns
  for (int64_t j = 0; j < keys; ++j) {
    row_to_floats<T>(a.k, at + j * a.k_at.row, d, 1.0f, row);
    if (!all_finite(row, whole(d))) add_not_finite(row, d, f.ds + j * COLUMNS, c.vectors, dq);
  }
}

template <class T>
void backward_any(const AttentionCall& a, const AttentionSequence& s, int64_t key0, int64_t key1, float* dq_part,
                  const BackwardScratch& f) {
  const int64_t d = a.head_dim, dv = a.d_v, ld = whole(d), ldv = whole(dv);
  const int64_t columns = a.heads / a.kv_heads * s.n_q;
  memset(dq_part, 0, (size_t)((columns + COLUMNS - 1) / COLUMNS * d * COLUMNS) * sizeof(float));
  for (int64_t key = key0; key < key1; key += KEYS) {
    const int64_t keys = key1 - key < KEYS ? key1 - key : KEYS;
    memset(f.dk, 0, (size_t)(keys * ld) * sizeof(float));
    memset(f.dv, 0, (size_t)(keys * ldv) * sizeof(float));
    const KeyRows rows = load_keys<T>(a, s, key, keys, f);
    bool lost;
    const KeyRows safe = finite_keys<T>(a, s, key, keys, rows, f, &lost);
    for (int64_t first = 0; first < columns; first += COLUMNS) {
      Columns c;
      set_columns(a, s, first, columns - first < COLUMNS ? columns - first : COLUMNS, c);
      if (key >= c.last || key + keys <= c.first) continue;
      load_columns<T>(a, s, c, f);
      score_gradients(a, c, key, keys, rows, f);
      if (a.dbias) add_to_bias(a, s, c, key, keys, f);
      through_cap(a, c, keys, f);
      float* const dq = dq_part + first / COLUMNS * d * COLUMNS;
      product<ADD>(safe.k, 1, safe.k_stride, f.ds, COLUMNS, keys, dq, COLUMNS, d, c.vectors);
      product<ADD>(f.ds, COLUMNS, 1, f.q_rows, ld, c.count, f.dk, ld, keys, (int)(ld / LANES));
      product<ADD>(f.p, COLUMNS, 1, f.do_rows, ldv, c.count, f.dv, ldv, keys, (int)(ldv / LANES));
      if (lost) add_lost_keys<T>(a, s, c, key, keys, f, dq);
    }
    write_rows<T>(f.dk, ld, keys, d, a.scale, a.dk, key_place(a.dk_at, s, key), a.dk_at.row);
    write_rows<T>(f.dv, ldv, keys, dv, 1.0f, a.dv, key_place(a.dv_at, s, key), a.dv_at.row);
  }
}

void backward(const AttentionCall& a, const AttentionSequence& s, int64_t key0, int64_t key1, float* dq_part,
              void* memory) {
  const BackwardScratch f = backward_scratch(a, memory);
  dispatch(a.format, [&](auto type) { backward_any<decltype(type)>(a, s, key0, key1, dq_part, f); });
}

void bias_gradient(const AttentionCall& a, const AttentionSequence& s, int64_t first, int64_t count, int64_t key,
                   int64_t n, void* memory) {
  const BackwardScratch f = backward_scratch(a, memory);
  Columns c;
  set_columns(a, s, first, count, c);
  if (key >= c.last || key + n <= c.first) return;
  dispatch(a.format, [&](auto type) {
    const KeyRows rows = load_keys<decltype(type)>(a, s, key, n, f);
    load_columns<decltype(type)>(a, s, c, f);
    score_gradients(a, c, key, n, rows, f);
  });
  add_to_bias(a, s, c, key, n, f);
}

void deltas(const AttentionCall& a, const AttentionSequence& s, int64_t first, int64_t count, void* memory) {
  const BackwardScratch f = backward_scratch(a, memory);
  Columns c;
  set_columns(a, s, first, count, c);
  dispatch(a.format, [&](auto type) {
    using T = decltype(type);
    for (int64_t i = 0; i < count; ++i) {
      row_to_floats<T>(a.grad, place_of(a.grad_at, s, c, i), a.d_v, 1.0f, f.do_rows);
      row_to_floats<T>(a.result, place_of(a.result_at, s, c, i), a.d_v, 1.0f, f.q_rows);
      vf sum = vset1(0.0f);
      for (int64_t k = 0; k < a.d_v; k += LANES) sum = vfma(vload(f.do_rows + k), vload(f.q_rows + k), sum);
      const int64_t at = statistic(a, s, c, i);
      a.delta[at] = vsum(sum) - (a.grad_lse ? a.grad_lse[at] : 0.0f);
    }
  });
}

void write_dq(const AttentionCall& a, const AttentionSequence& s, int64_t first, int64_t count, const float* part,
              int64_t parts, int64_t stride) {
  Columns c;
  set_columns(a, s, first, count, c);
  const vf scale = vset1(a.scale);
  dispatch(a.format, [&](auto type) {
    for (int v = 0; v < c.vectors; ++v)
      for (int64_t k = 0; k < a.head_dim; k += LANES) {
        vf square[LANES];
        for (int i = 0; i < LANES; ++i) {
          square[i] = vset1(0.0f);
          const float* const at = part + (k + i) * COLUMNS + v * LANES;
          if (k + i < a.head_dim)
            for (int64_t n = 0; n < parts; ++n) square[i] = vadd(square[i], vload(at + n * stride));
          square[i] = vmul(square[i], scale);
        }
        vtranspose(square);
        for (int i = 0; i < LANES && v * LANES + i < count; ++i)
          put<decltype(type)>(a.dq, place_of(a.dq_at, s, c, v * LANES + i) + k, square[i], a.head_dim - k);
      }
  });
}

}  // namespace

extern const AttentionBackwardKernels attention_backward_kernels = {COLUMNS,  KEYS,     backward_bytes, deltas,
                                                                    backward, write_dq, bias_gradient};

}  // namespace FASTDL_LEVEL
}  // namespace fastdl
