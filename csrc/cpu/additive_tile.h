// Scores of one query and a tile of keys, for one level: what forward and backward share.
//
// tanh costs nearly everything: batch * queries * keys * hidden of them, and the rest is their sums. With exp(2q) and
// exp(2k) known, which takes O(queries + keys), tanh(q + k) = n / (n + 2) with n = exp(2q) exp(2k) - 1. An element then
// costs a multiply-add for n, an addition, an approximate reciprocal (14 bits), three operations that make it the quotient
// (AVX2: 12 bits, five), and the multiply-add into the score: 5 on the ports of multiply-adds, one addition and one
// reciprocal, where a polynomial tanh takes some 25 and a division. Three ways, chosen by the largest |q| of the query and
// |k| of the keys of the tile that it sees (and by nothing else, so that no row depends on another, or on padding):
//   RATIO   their sum is below 40, so that products stay finite: as above. Errors are those of numbers of size 1.
//   SMALL   |k| <= 1/2 as well: n = (exp(2q) - 1) exp(2k) + (exp(2k) - 1), whose error shrinks with q and k.
//   WIDE    everything else, NaN and infinities too: tanh of the sum by polynomial and exp. This is the simple kernel.
// Test: pytest tests/test_additive_attention.py
#pragma once

#include "common/simd_math.h"
#include "common/simd_recip.h"
#include "cpu/additive_attention_kernel.h"
#include "cpu/rows_kernel.h"

namespace fastdl {
namespace FASTDL_LEVEL {
namespace {

enum class Way { RATIO, SMALL, WIDE };

constexpr float WIDE_FROM = 40.0f, SMALL_TO = 0.5f, MINUS_INFINITY = -__builtin_inff();

// exp(x) and exp(x) - 1, both to about one unit in the last place: with x = n ln 2 + r, 2^n (1 + p) and 2^n p + (2^n - 1),
// p the Taylor polynomial of exp(r) - 1 (relative error below 2e-8 up to ln 2 / 2). |x| is clamped to 87.
FASTDL_INLINE void exponentials(vf x, vf* e, vf* less_one) {
  constexpr float c[] = {0.5f, 1.0f / 6, 1.0f / 24, 1.0f / 120, 1.0f / 720, 1.0f / 5040};
  const vf one = vset1(1.0f);
  x = vmin(vset1(87.0f), vmax(vset1(-87.0f), x));
  const vi n = vround(vmul(x, vset1(1.44269504f)));
  const vf fn = vcvt(n);
  vf r = vfma(fn, vset1(-0.693359375f), x);
  r = vfma(fn, vset1(2.12194440e-4f), r);
  const vf p = vfma(vmul(r, r), vpoly(r, c), r), power = vscale2(one, n);
  *e = vfma(power, p, power);
  *less_one = vfma(power, p, vsub(power, one));
}

// exp(x) for x <= 0, 0 far below; NaN stays NaN.
FASTDL_INLINE vf decay(vf x) {
  vf e, unused;
  exponentials(x, &e, &unused);
  return vselect_le(x, vset1(-87.0f), vset1(0.0f), e);
}

inline float decay(float x) {
  float e[LANES];
  vstore(e, decay(vset1(x)));
  return e[0];
}

// cols of a row as float32, zeros up to a multiple of 16.
template <class T>
void copy_row(const typename T::Element* from, int64_t cols, float* to) {
  for_each(cols, [&](int64_t at, const auto& part) FASTDL_STEP { vstore(to + at, part.template load<T>(from + at)); });
  for (int64_t at = cols; at < additive_padded(cols); ++at) to[at] = 0.0f;
}

// The largest |x|; infinite where one is NaN.
inline float largest(const float* x, int64_t padded) {
  vf most = vset1(0.0f), zero = vset1(0.0f);
  for (int64_t at = 0; at < padded; at += LANES) {
    const vf a = vabs(vload(x + at));
    most = vmax(a, most);
    zero = vadd(zero, vsub(a, a));  // NaN for NaN and infinities
  }
  return vsum(zero) == 0.0f ? vhmax(most) : -MINUS_INFINITY;
}

struct Query {
  const float *x, *e, *less_one;  // [padded hidden]: q, exp(2q), exp(2q) - 1
  float most;                     // the largest |q|
};

inline Query query_of(const float* queries, int64_t at, int64_t padded) {
  const float* const row = queries + ADDITIVE_QUERIES + at * 3 * padded;
  return {row, row + padded, row + 2 * padded, queries[at]};
}

inline void exponentials_of(const float* x, int64_t padded, float* e, float* less_one) {
  for (int64_t at = 0; at < padded; at += LANES) {
    const vf v = vload(x + at);
    vf a, b;
    exponentials(vadd(v, v), &a, &b);
    vstore(e + at, a);
    vstore(less_one + at, b);
  }
}

template <class T>
void prepare_queries(const AdditiveArgs& a, int64_t n, int64_t i0, int64_t i1, float* to) {
  const int64_t padded = additive_padded(a.hidden);
  for (int64_t i = i0; i < i1; ++i) {
    float* const row = to + ADDITIVE_QUERIES + (i - i0) * 3 * padded;
    copy_row<T>((const typename T::Element*)a.q + n * a.q_batch + i * a.q_row, a.hidden, row);
    exponentials_of(row, padded, row + padded, row + 2 * padded);
    to[i - i0] = largest(row, padded);
  }
}

// Keys j0 <= j < j1 of a sequence, at most ADDITIVE_TILE of them.
struct Tile {
  float *x, *e, *less_one, *tanh, *v;  // rows of the padded hidden size, and of the padded d_v
  int64_t padded, padded_v;
  float most[ADDITIVE_TILE];  // the largest |k| of each key

  Tile(const AdditiveArgs& a, float* work)
      : x(work),
        e(x + ADDITIVE_TILE * additive_padded(a.hidden)),
        less_one(e + ADDITIVE_TILE * additive_padded(a.hidden)),
        tanh(less_one + ADDITIVE_TILE * additive_padded(a.hidden)),
        v(tanh + ADDITIVE_TILE * additive_padded(a.hidden)),
        padded(additive_padded(a.hidden)),
        padded_v(additive_padded(a.d_v)) {}

  template <class T>
  void prepare_keys(const AdditiveArgs& a, int64_t n, int64_t j0, int64_t j1) {
    for (int64_t j = 0; j < j1 - j0; ++j) {
      copy_row<T>((const typename T::Element*)a.k + n * a.k_batch + (j0 + j) * a.k_row, a.hidden, x + j * padded);
      most[j] = largest(x + j * padded, padded);
    }
    exponentials_of(x, (j1 - j0) * padded, e, less_one);
  }

  template <class T>
  void prepare_values(const AdditiveArgs& a, int64_t n, int64_t j0, int64_t j1) {
    for (int64_t j = j0; j < j1; ++j)
      copy_row<T>((const typename T::Element*)a.v + n * a.v_batch + j * a.v_row, a.d_v, v + (j - j0) * padded_v);
    memset(v + (j1 - j0) * padded_v, 0, (size_t)((ADDITIVE_TILE - (j1 - j0)) * padded_v) * sizeof(float));
  }
};

// The keys of a tile that query i attends to.
struct Active {
  int64_t count, at[ADDITIVE_TILE];

  Active(const AdditiveArgs& a, int64_t n, int64_t i, int64_t j0, int64_t keys) : count(0) {
    if (a.lens) {
      const int64_t left = a.lens[n * a.lens_batch + i * a.lens_query] - j0;
      keys = left < keys ? left : keys;
    }
    const uint8_t* const mask = a.mask ? a.mask + n * a.mask_batch + i * a.mask_query + j0 * a.mask_key : nullptr;
    for (int64_t j = 0; j < keys; ++j) {
      at[count] = j;
      count += !mask || mask[j * a.mask_key];
    }
  }
};

inline Way way_of(const Query& q, const Tile& t, const Active& active) {
  float most = 0.0f;
  for (int64_t c = 0; c < active.count; ++c) most = t.most[active.at[c]] > most ? t.most[active.at[c]] : most;
  if (!(q.most + most <= WIDE_FROM)) return Way::WIDE;
  return most <= SMALL_TO ? Way::SMALL : Way::RATIO;
}

// Scores of four keys. KEEP leaves tanh in the tile, which the derivative needs.
template <Way WAY, bool KEEP>
void score_four(const AdditiveArgs& a, const Query& q, const Tile& t, const int64_t (&at)[4], float* scores) {
  const float *x[4], *e[4], *less_one[4];
  float* kept[4];
  vf sums[4];
  for (int j = 0; j < 4; ++j) {
    x[j] = t.x + at[j] * t.padded;
    e[j] = t.e + at[j] * t.padded;
    less_one[j] = t.less_one + at[j] * t.padded;
    kept[j] = t.tanh + at[j] * t.padded;
    sums[j] = vset1(0.0f);
  }
  const vf minus_one = vset1(-1.0f), two = vset1(2.0f);
  for (int64_t h = 0; h < t.padded; h += LANES) {
    const vf weight = vload(a.weights + h);
    const vf mine = vload((WAY == Way::RATIO ? q.e : WAY == Way::SMALL ? q.less_one : q.x) + h);
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      vf found;
      if constexpr (WAY == Way::WIDE) {
        found = vtanh(vadd(mine, vload(x[j] + h)));
      } else {
        const vf n = vfma(mine, vload(e[j] + h), WAY == Way::SMALL ? vload(less_one[j] + h) : minus_one);
        found = vquotient(n, vadd(n, two));
      }
      sums[j] = vfma(weight, found, sums[j]);
      if constexpr (KEEP) vstore(kept[j] + h, found);
    }
  }
  vsum4(sums[0], sums[1], sums[2], sums[3], scores);
}

// scores [16]: of the active keys by their place in the tile, -inf elsewhere.
template <Way WAY, bool KEEP>
void score_way(const AdditiveArgs& a, const Query& q, const Tile& t, const Active& active, float* scores) {
  for (int64_t c = 0; c < active.count; c += 4) {
    int64_t at[4];
    float found[4];
    for (int64_t j = 0; j < 4; ++j) at[j] = active.at[c + j < active.count ? c + j : c];
    score_four<WAY, KEEP>(a, q, t, at, found);
    for (int64_t j = 0; j < 4; ++j) scores[at[j]] = found[j];
  }
}

template <bool KEEP>
Way score(const AdditiveArgs& a, const Query& q, const Tile& t, const Active& active, float* scores) {
  for (int j = 0; j < 16; ++j) scores[j] = MINUS_INFINITY;
  const Way way = way_of(q, t, active);
  switch (way) {
    case Way::RATIO: score_way<Way::RATIO, KEEP>(a, q, t, active, scores); break;
    case Way::SMALL: score_way<Way::SMALL, KEEP>(a, q, t, active, scores); break;
    case Way::WIDE: score_way<Way::WIDE, KEEP>(a, q, t, active, scores); break;
  }
  return way;
}

// e [16] = exp(scores - largest), 0 where a score is -inf.
inline void decays(const float* scores, float most, float* e) {
  for (int j = 0; j < 16; j += LANES) vstore(e + j, decay(vsub(vload(scores + j), vset1(most))));
}

}  // namespace
}  // namespace FASTDL_LEVEL
}  // namespace fastdl
