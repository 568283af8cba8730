// The columns of an item of attention, what each of them sees, and the scores' options: cap, bias, ALiBi, masks, dropout.
// For kernel sources: everything is inlined at their level.
#pragma once

#include <float.h>
#include <math.h>

#include "common/simd_math.h"
#include "cpu/attention_kernel.h"
#include "cpu/attention_tile.h"

namespace fastdl {
namespace FASTDL_LEVEL {
namespace {

struct Columns {
  int64_t count, group_size;
  int vectors;
  int64_t head[COLUMNS], row[COLUMNS];                     // of the tensors; row: of the sequence
  int64_t position[COLUMNS], low[COLUMNS], high[COLUMNS];  // keys low .. high - 1 are seen
  int64_t first, last;                                     // keys that some column sees: first .. last - 1
  int64_t all_first, all_last;                             // keys that all columns see
  float slope[COLUMNS];                                    // of ALiBi, times log2(e)
  const void* bias[COLUMNS];                               // row of the bias, moved to key 0 of the sequence
  const uint8_t* mask[COLUMNS];
  uint64_t drop[COLUMNS];   // index of key 0
  bool one_bias, one_mask;  // the same row for all columns
};

inline int element_bytes(int format) { return format == FORMAT_F32 ? 4 : 2; }

inline void set_columns(const AttentionCall& a, const AttentionSequence& s, int64_t first, int64_t count, Columns& c) {
  c.count = count;
  c.vectors = (int)((count + LANES - 1) / LANES);
  c.group_size = a.heads / a.kv_heads;
  c.first = s.n_k, c.last = 0, c.all_first = 0, c.all_last = s.n_k;
  c.one_bias = c.one_mask = true;
  for (int64_t i = 0; i < c.vectors * LANES; ++i) {
    const int64_t column = first + (i < count ? i : count - 1);  // lanes without a query repeat the last
    const int64_t head = s.group * c.group_size + column / s.n_q, row = column % s.n_q, place = row + s.n_k - s.n_q;
    int64_t low = 0, high = s.n_k;
    if (a.left >= 0 && place - a.left > low) low = place - a.left;
    if (a.right >= 0 && place + a.right + 1 < high) high = place + a.right + 1;
    if (a.lens) {
      const int64_t len = a.lens[a.lens_of_rows ? s.batch * a.n_q + s.q0 + row : s.batch];
      if (len < high) high = len;
    }
    if (low >= high) low = high = 0;
    c.head[i] = head, c.row[i] = row, c.position[i] = place, c.low[i] = low, c.high[i] = high;
    if (low < high) {
      if (low < c.first) c.first = low;
      if (high > c.last) c.last = high;
    }
    if (low > c.all_first) c.all_first = low;
    if (high < c.all_last) c.all_last = high;
    c.slope[i] = 0.0f;
    if (a.slopes) c.slope[i] = a.slopes[(a.slopes_of_batch ? s.batch * a.heads : 0) + head] * LOG2E;
    if (a.bias.data) {
      const int64_t at = s.batch * a.bias.batch + head * a.bias.head + row * a.bias.row;
      c.bias[i] = (const char*)a.bias.data + at * element_bytes(a.bias_format);
      c.one_bias = c.one_bias && c.bias[i] == c.bias[0];
    }
    if (a.mask.data) {
      c.mask[i] = (const uint8_t*)a.mask.data + s.batch * a.mask.batch + head * a.mask.head + row * a.mask.row;
      c.one_mask = c.one_mask && c.mask[i] == c.mask[0];
    }
    if (a.dropout)
      c.drop[i] = (uint64_t)((s.batch * a.heads + head) * a.n_q + s.q0 + row) * (uint64_t)a.n_k + (uint64_t)s.k0;
  }
}

struct OptionScratch {
  float* row;    // [KEYS]: a term that all columns share
  float* terms;  // [KEYS][COLUMNS]: bias and mask
  float* keep;   // [KEYS][COLUMNS]: dropout
  float* top;    // [COLUMNS]: the block's greatest scores
};
constexpr int64_t OPTION_FLOATS = KEYS + 2 * KEYS * COLUMNS + COLUMNS;

// make(column, j) are LANES keys from j on of a column; they become columns of a tile.
template <class Make>
FASTDL_INLINE void tile_of_rows(const Columns& c, int64_t keys, float* tile, const Make& make) {
  for (int v = 0; v < c.vectors; ++v)
    for (int64_t j = 0; j < keys; j += LANES) {
      vf square[LANES];
#pragma GCC unroll 16
      for (int i = 0; i < LANES; ++i) square[i] = make(v * LANES + i, j);
      vtranspose(square);
#pragma GCC unroll 16
      for (int i = 0; i < LANES; ++i) vstore(tile + (j + i) * COLUMNS + v * LANES, square[i]);
    }
}

// Bias times log2(e), and minus infinity where the mask says so, of one column and n of LANES keys from `key` on.
template <class T>
FASTDL_INLINE vf term_vector(const AttentionCall& a, const Columns& c, int64_t column, int64_t key, int64_t n) {
  vf t = vset1(0.0f);
  if (a.bias.data) {
    if (a.bias.key) {
      t = get<T>(c.bias[column], key, n);
    } else {
      float one[LANES];
      vstore(one, load_part<T>((const typename T::Element*)c.bias[column], 1));
      t = vset1(one[0]);
    }
    t = vmul(t, vset1(LOG2E));
  }
  if (a.mask.data) {
    int8_t bytes[LANES] = {};
    const int8_t* m = (const int8_t*)c.mask[column] + key * a.mask.key;
    if (a.mask.key == 0) {
      memset(bytes, *m, sizeof bytes);
      m = bytes;
    } else if (n < LANES) {
      memcpy(bytes, m, (size_t)n);
      m = bytes;
    }
    t = vselect_le(vabs(vload_i8(m)), vset1(0.5f), vset1(-INFINITY), t);
  }
  return t;
}

template <class T>
void term_tile(const AttentionCall& a, const Columns& c, int64_t key, int64_t keys, bool shared,
               const OptionScratch& s) {
  if (shared)
    for (int64_t j = 0; j < keys; j += LANES) vstore(s.row + j, term_vector<T>(a, c, 0, key + j, keys - j));
  else
    tile_of_rows(c, keys, s.terms,
                 [&](int64_t i, int64_t j) FASTDL_STEP { return term_vector<T>(a, c, i, key + j, keys - j); });
}

// tile [keys][COLUMNS] of products q . k becomes scores times log2(e). factor: what the products lack of scale (with a
// cap: of scale / cap). slope_of_cap [keys][COLUMNS], or null: the cap's derivative.
inline void apply_options(const AttentionCall& a, const Columns& c, int64_t key, int64_t keys, float factor,
                          const OptionScratch& s, float* tile, float* slope_of_cap = nullptr) {
  const bool inside = key >= c.all_first && key + keys <= c.all_last;
  const bool term = a.bias.data || a.mask.data;
  const bool shared = (!a.bias.data || c.one_bias) && (!a.mask.data || c.one_mask);
  if (term) dispatch(a.bias_format, [&](auto type) { term_tile<decltype(type)>(a, c, key, keys, shared, s); });
  for (int v = 0; v < c.vectors; ++v) {
    float low_[LANES], high_[LANES], place_[LANES];
    for (int i = 0; i < LANES; ++i) {  // relative to the block: small integers, exact in float32
      const int64_t low = c.low[v * LANES + i] - key, high = c.high[v * LANES + i] - key;
      low_[i] = (float)(low < 0 ? 0 : low > keys ? keys : low);
      high_[i] = (float)(high < 0 ? 0 : high > keys ? keys : high) - 1.0f;
      place_[i] = (float)(c.position[v * LANES + i] - key);
    }
    const vf low = vload(low_), high = vload(high_), place = vload(place_), slope = vload(c.slope + v * LANES);
    const vf cap = vset1(a.softcap * LOG2E), times = vset1(factor), hidden = vset1(-INFINITY);
    vf top = hidden;
    for (int64_t j = 0; j < keys; ++j) {
      float* const at = tile + j * COLUMNS + v * LANES;
      vf x = vmul(vload(at), times);
      if (a.softcap > 0) {
        const vf t = vtanh(x);
        if (slope_of_cap) vstore(slope_of_cap + j * COLUMNS + v * LANES, vsub(vset1(1.0f), vmul(t, t)));
        x = vmul(t, cap);
      }
      if (term) {
        const vf t = shared ? vset1(s.row[j]) : vload(s.terms + j * COLUMNS + v * LANES);
        x = vselect_le(t, vset1(-FLT_MAX), hidden, vadd(x, t));  // also where x is infinite
      }
      const vf number = vset1((float)j);
      if (a.slopes) x = vsub(x, vmul(slope, vabs(vsub(place, number))));
      if (!inside) x = vselect_le(low, number, vselect_le(number, high, x, hidden), hidden);
      top = vmax(top, x);
      vstore(at, x);
    }
    vstore(s.top + v * LANES, top);
  }
}

// keep [keys][COLUMNS]: 0 or 1 / (1 - p)
inline void dropout_tile(const AttentionCall& a, const Columns& c, int64_t key, int64_t keys, const OptionScratch& s) {
  tile_of_rows(c, keys, s.keep, [&](int64_t i, int64_t j) FASTDL_STEP {
    return dropout(a.seed, (int64_t)(c.drop[i] + (uint64_t)(key + j)), a.p, a.keep_scale);
  });
}

// Whether scores are more than a positive factor times the products q . k.
FASTDL_INLINE bool has_options(const AttentionCall& a) {
  return !(a.scale > 0) || a.softcap > 0 || a.bias.data || a.mask.data || a.slopes;
}

// out [n][COLUMNS] += weights * row[n], only of elements that are not finite, and only where a weight is not 0: 0 times NaN
// is NaN, and a key that is hidden adds nothing.
inline void add_not_finite(const float* row, int64_t n, const float* weights, int vectors, float* out) {
  for (int64_t k = 0; k < n; ++k) {
    if (is_finite(row[k])) continue;
    for (int64_t i = 0; i < vectors * LANES; ++i)
      if (weights[i] != 0.0f) out[k * COLUMNS + i] += weights[i] * row[k];
  }
}

// Where the elements of a column begin.
FASTDL_INLINE int64_t place_of(const AttentionStrides& at, const AttentionSequence& s, const Columns& c,
                               int64_t column) {
  return s.batch * at.batch + c.head[column] * at.head + (s.q0 + c.row[column]) * at.row;
}
FASTDL_INLINE int64_t key_place(const AttentionStrides& at, const AttentionSequence& s, int64_t key) {
  return s.batch * at.batch + s.group * at.head + (s.k0 + key) * at.row;
}

}  // namespace
}  // namespace FASTDL_LEVEL
}  // namespace fastdl
