// The columns of an item of attention, what each of them sees, and the scores' options: cap, bias, ALiBi, masks, dropout.
// For kernel sources: everything is inlined at their level.
#pragma once

#include <float.h>
#include <math.h>

#include "common/simd_bits.h"
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
  float slope[COLUMNS];                                    // of ALiBi
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
    if (a.slopes) c.slope[i] = a.slopes[(a.slopes_of_batch ? s.batch * a.heads : 0) + head];
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

// Whether scores are more than a positive factor times the products q . k of the keys that are seen.
FASTDL_INLINE bool has_options(const AttentionCall& a) {
  return !(a.scale > 0) || a.softcap > 0 || a.bias.data || a.slopes;
}

// What apply_options leaves, times this, is in units of log 2.
FASTDL_INLINE float unit_of_scores(const AttentionCall& a) { return has_options(a) ? LOG2E : a.scale * LOG2E; }

// Whether a block of keys needs apply_options.
FASTDL_INLINE bool changes_scores(const AttentionCall& a, const Columns& c, int64_t key, int64_t keys) {
  return has_options(a) || a.mask.data || key < c.all_first || key + keys > c.all_last;
}

struct OptionScratch {
  float* row;      // [KEYS]: bias and mask that all columns share
  uint32_t* seen;  // [KEYS / 32][COLUMNS]: bit k of word w: the mask shows key 32 w + k of the block to the column
  float* keep;     // [KEYS][COLUMNS]: dropout
  float* top;      // [COLUMNS]: the block's greatest scores
};
constexpr int64_t OPTION_FLOATS = KEYS + KEYS / 32 * COLUMNS + KEYS * COLUMNS + COLUMNS;

// n of LANES elements of a row of the bias, from `key` on.
template <class T>
FASTDL_INLINE vf bias_vector(const AttentionCall& a, const void* row, int64_t key, int64_t n) {
  const auto* p = (const typename T::Element*)row;
  if (a.bias.key) {
    __builtin_prefetch(p + key + KEYS, 0, 2);  // the rows are too many for the prefetching of the CPU
    return get<T>(row, key, n);
  }
  float one[LANES];
  vstore(one, load_part<T>(p, 1));
  return vset1(one[0]);
}

// Minus infinity where the mask hides one of n of LANES keys, from `key` on; else t.
FASTDL_INLINE vf mask_vector(const AttentionCall& a, const uint8_t* row, int64_t key, int64_t n, vf t) {
  int8_t bytes[LANES] = {};
  if (a.mask.key == 0)
    memset(bytes, row[0], sizeof bytes);
  else
    memcpy(bytes, row + key, (size_t)(n < LANES ? n : LANES));
  return vselect_le(vabs(vload_i8(bytes)), vset1(0.5f), vset1(-INFINITY), t);
}

inline void mask_bits(const AttentionCall& a, const Columns& c, int64_t key, int64_t keys, uint32_t* seen) {
  for (int64_t i = 0; i < c.vectors * LANES; ++i)
    for (int64_t j = 0; j < keys; j += 32) {
      const uint8_t* const at = c.mask[i] + (key + j) * a.mask.key;
      uint8_t some[32] = {};
      uint32_t bits;
      if (a.mask.key == 0) {
        bits = *at ? ~0u : 0u;
      } else if (keys - j >= 32) {
        __builtin_prefetch(at + KEYS);
        bits = nonzero_bytes(at);
      } else {
        memcpy(some, at, (size_t)(keys - j));
        bits = nonzero_bytes(some);
      }
      seen[j / 32 * COLUMNS + i] = bits;
    }
}

struct NoBias {};  // in place of the bias's type: none, or one row for all columns

// One vector of columns of apply_options. RARE: more than a scale, a bias and a mask that differ from column to column.
template <class Bias, bool RARE>
inline void apply_options_to(const AttentionCall& a, const Columns& c, int v, int64_t key, int64_t keys, bool row,
                             float factor, const OptionScratch& s, float* tile, float* slope_of_cap) {
  const bool inside = key >= c.all_first && key + keys <= c.all_last, mask = a.mask.data && !c.one_mask;
  float low_[LANES], high_[LANES], place_[LANES];
  for (int i = 0; i < LANES; ++i) {  // relative to the block: small integers, exact in float32
    const int64_t low = c.low[v * LANES + i] - key, high = c.high[v * LANES + i] - key;
    low_[i] = (float)(low < 0 ? 0 : low > keys ? keys : low);
    high_[i] = (float)(high < 0 ? 0 : high > keys ? keys : high) - 1.0f;
    place_[i] = (float)(c.position[v * LANES + i] - key);
  }
  const vf low = vload(low_), high = vload(high_), place = vload(place_), slope = vload(c.slope + v * LANES);
  const vf cap = vset1(a.softcap), times = vset1(factor), hidden = vset1(-INFINITY), least = vset1(-FLT_MAX);
  vf top = hidden;
  for (int64_t j0 = 0; j0 < keys; j0 += LANES) {
    vi words{};
    if (mask) words = vload_words(s.seen + j0 / 32 * COLUMNS + v * LANES, (int)(j0 % 32));
    vf square[LANES];  // of the bias: rows become columns
    if constexpr (!__is_same(Bias, NoBias)) {
#pragma GCC unroll 16
      for (int i = 0; i < LANES; ++i) square[i] = bias_vector<Bias>(a, c.bias[v * LANES + i], key + j0, keys - j0);
      vtranspose(square);
    }
#pragma GCC unroll 16
    for (int i = 0; i < LANES; ++i) {
      const int64_t j = j0 + i;
      if (j >= keys) break;
      float* const at = tile + j * COLUMNS + v * LANES;
      vf x = vload(at);
      if constexpr (RARE) {
        x = vmul(x, times);
        if (a.softcap > 0) {
          const vf t = vtanh(x);
          if (slope_of_cap) vstore(slope_of_cap + j * COLUMNS + v * LANES, vsub(vset1(1.0f), vmul(t, t)));
          x = vmul(t, cap);
        }
        if (row) x = vselect_le(vset1(s.row[j]), least, hidden, vadd(x, vset1(s.row[j])));
      }
      if constexpr (!__is_same(Bias, NoBias)) {
        const vf sum = RARE ? vadd(x, square[i]) : vfma(x, times, square[i]);
        x = vselect_le(square[i], least, hidden, sum);  // also where x is infinite
      }
      if (mask) x = vselect_bit(words, 1u << i, x, hidden);
      if constexpr (RARE) {
        const vf number = vset1((float)j);
        if (a.slopes) x = vsub(x, vmul(slope, vabs(vsub(place, number))));
        if (!inside) x = vselect_le(low, number, vselect_le(number, high, x, hidden), hidden);
      }
      top = vmax(top, x);
      vstore(at, x);
    }
  }
  vstore(s.top + v * LANES, top);
}

// tile [keys][COLUMNS] of products q . k becomes scores, without the scale where there are no options. slope_of_cap
// [keys][COLUMNS], or null: the cap's derivative.
inline void apply_options(const AttentionCall& a, const Columns& c, int64_t key, int64_t keys, const OptionScratch& s,
                          float* tile, float* slope_of_cap = nullptr) {
  const float factor = !has_options(a) ? 1.0f : a.softcap > 0 ? a.scale / a.softcap : a.scale;
  const bool inside = key >= c.all_first && key + keys <= c.all_last;
  const bool one_bias = a.bias.data && c.one_bias, one_mask = a.mask.data && c.one_mask, row = one_bias || one_mask;
  if (row)
    for (int64_t j = 0; j < keys; j += LANES) {
      vf t = vset1(0.0f);
      if (one_bias)
        dispatch(a.bias_format, [&](auto type) { t = bias_vector<decltype(type)>(a, c.bias[0], key + j, keys - j); });
      if (one_mask) t = mask_vector(a, c.mask[0], key + j, keys - j, t);
      vstore(s.row + j, t);
    }
  if (a.mask.data && !one_mask) mask_bits(a, c, key, keys, s.seen);
  const bool rare = !(a.scale > 0) || a.softcap > 0 || a.slopes || row || !inside;
  const auto run = [&](auto bias) {
    using Bias = decltype(bias);
    for (int v = 0; v < c.vectors; ++v)
      if (rare)
        apply_options_to<Bias, true>(a, c, v, key, keys, row, factor, s, tile, slope_of_cap);
      else
        apply_options_to<Bias, false>(a, c, v, key, keys, row, factor, s, tile, slope_of_cap);
  };
  if (a.bias.data && !one_bias)
    dispatch(a.bias_format, run);
  else
    run(NoBias());
}

// keep [keys][COLUMNS]: 0 or 1 / (1 - p)
inline void dropout_tile(const AttentionCall& a, const Columns& c, int64_t key, int64_t keys, const OptionScratch& s) {
  for (int v = 0; v < c.vectors; ++v)
    for (int64_t j = 0; j < keys; j += LANES) {
      vf square[LANES];
#pragma GCC unroll 16
      for (int i = 0; i < LANES; ++i)
        square[i] = dropout(a.seed, (int64_t)(c.drop[v * LANES + i] + (uint64_t)(key + j)), a.p, a.keep_scale);
      vtranspose(square);
#pragma GCC unroll 16
      for (int i = 0; i < LANES; ++i) vstore(s.keep + (j + i) * COLUMNS + v * LANES, square[i]);
    }
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
