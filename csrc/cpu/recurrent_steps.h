// What the steps of lstm, gru and rnn share at one level: elements of a row in part, the product of all rows, zoneout,
// layer norm over units that several threads computed. For kernel sources: everything is inlined at their level.
#pragma once

#include "cpu/recurrent_kernel.h"
#include "cpu/rows_kernel.h"

namespace fastdl {
namespace FASTDL_LEVEL {
namespace {

constexpr int TILE_ROWS = 16;  // at most as many as any level's product takes at once
// Products that one sum takes in order; longer ones are sums of such sums, which round less.
constexpr int64_t DEPTH = 512;

// n of LANES elements (all where n >= LANES).
template <class T>
FASTDL_INLINE vf get(const void* base, int64_t at, int64_t n) {
  const auto* p = (const typename T::Element*)base + at;
  return n >= LANES ? T::load(p) : load_part<T>(p, n);
}
template <class T>
FASTDL_INLINE void put(void* base, int64_t at, vf v, int64_t n) {
  auto* p = (typename T::Element*)base + at;
  if (n >= LANES)
    T::store(p, v);
  else
    store_part<T>(p, v, n);
}

// What a product with panels in the dtype T reads: rounded to T, kept in the level's operand. Whole vectors.
template <class T>
struct Operand {
  static constexpr int BYTES = 4;
  FASTDL_INLINE void put(uint8_t* base, int64_t at, vf v) {
    if constexpr (!__is_same(T, F32)) {
      typename T::Element rounded[LANES];
      T::store(rounded, v);
      v = T::load(rounded);
    }
    vstore((float*)base + at, v);
  }
};
#if defined(FASTDL_NATIVE_BF16)
template <>
struct Operand<BF16> {
  static constexpr int BYTES = 2;
  FASTDL_INLINE void put(uint8_t* base, int64_t at, vf v) { vstore_bf16((uint16_t*)base + at, v); }
};
#endif

FASTDL_INLINE bool running(const RecurrentArgs& a, int64_t row, int64_t t) { return !a.lengths || a.lengths[row] > t; }

// How much of its old value each of LANES elements keeps; `at`: of the first in [T, B, D, N].
FASTDL_INLINE vf zone(bool drawn, uint64_t seed, float p, int64_t at) {
  if (!drawn) return vset1(p);
  return vsub(vset1(1.0f), dropout(seed, at, p, 1.0f));
}
// now, but for what keeps its old value
FASTDL_INLINE vf zoned(bool drawn, uint64_t seed, float p, int64_t at, vf before, vf now) {
  return p == 0.0f ? now : vfma(zone(drawn, seed, p, at), vsub(before, now), now);
}

// RecurrentProduct::tile for any k; a: the level's operand.
template <class T>
FASTDL_INLINE void deep_tile(const RecurrentProduct& product, int format, const void* a, int64_t lda,
                             const uint8_t* const* panels, int count, int64_t k, int rows, float* out) {
  product.tile(format, a, lda, panels, count, k < DEPTH ? k : DEPTH, rows, out);
  for (int64_t k0 = DEPTH; k0 < k; k0 += DEPTH) {
    alignas(64) float more[TILE_ROWS * 4 * PANEL_COLS];
    const uint8_t* later[4];
    for (int j = 0; j < count; ++j) later[j] = panels[j] + k0 * PANEL_COLS * (format == FORMAT_BF16 ? 2 : 4);
    product.tile(format, (const uint8_t*)a + k0 * Operand<T>::BYTES, lda, later, count, k - k0 < DEPTH ? k - k0 : DEPTH,
                 rows, more);
    for (int64_t i = 0; i < rows * count * PANEL_COLS; i += LANES)
      vstore(out + i, vadd(vload(out + i), vload(more + i)));
  }
}

// emit(row, out) for every row with out[count][16] = operand row . panels. Rows in even blocks; blocks in which no
// sequence runs at time t are left out.
template <class T, class Emit>
FASTDL_INLINE void each_row(const RecurrentArgs& a, int64_t t, const uint8_t* operand, int64_t stride,
                            const uint8_t* const* panels, int count, int64_t k, const Emit& emit) {
  alignas(64) float out[TILE_ROWS * 4 * PANEL_COLS];
  const int64_t most = a.product->rows_at_once(a.format, a.batch), blocks = (a.batch + most - 1) / most;
  for (int64_t b = 0; b < blocks; ++b) {
    const int64_t row0 = a.batch * b / blocks, row1 = a.batch * (b + 1) / blocks;
    bool any = !a.lengths;
    for (int64_t row = row0; row < row1 && !any; ++row) any = running(a, row, t);
    if (any)
      deep_tile<T>(*a.product, a.format, operand + row0 * stride * Operand<T>::BYTES, stride, panels, count, k,
                   (int)(row1 - row0), out);
    for (int64_t row = row0; row < row1; ++row) emit(row, out + (row - row0) * count * PANEL_COLS);
  }
}

// Mean and 1 / deviation of a row in segments of `hidden` values, `wide` apart: summed, then summed again around the mean.
struct Moments {
  float mean, rstd;
};
template <class T>
FASTDL_INLINE Moments moments(const typename T::Element* x, int64_t segments, int64_t hidden, int64_t wide, float eps) {
  const float width = 1.0f / (float)(segments * hidden);
  vf sums[4] = {vset1(0.0f), vset1(0.0f), vset1(0.0f), vset1(0.0f)};
  for (int64_t g = 0; g < segments; ++g)
    for_row(hidden, [&](int64_t i, const auto& part, auto j) FASTDL_STEP {
      sums[decltype(j)::value] = vadd(sums[decltype(j)::value], part.template load<T>(x + g * wide + i));
    });
  const float mean = total(sums) * width;
  for (vf& sum : sums) sum = vset1(0.0f);
  for (int64_t g = 0; g < segments; ++g)
    for_row(hidden, [&](int64_t i, const auto& part, auto j) FASTDL_STEP {
      const vf d = part.keep(vsub(part.template load<T>(x + g * wide + i), vset1(mean)));
      sums[decltype(j)::value] = vfma(d, d, sums[decltype(j)::value]);
    });
  return {mean, 1.0f / __builtin_sqrtf(total(sums) * width + eps)};
}

FASTDL_INLINE vf standard(vf x, Moments k) { return vmul(vsub(x, vset1(k.mean)), vset1(k.rstd)); }

// The two means that the gradient of a layer norm needs: of g, and of g * hat, hat = (x - mean) * rstd.
struct GradientMeans {
  float g, g_hat;
};
template <class T>
FASTDL_INLINE GradientMeans gradient_means(const float* g, const typename T::Element* x, int64_t segments,
                                           int64_t hidden, int64_t wide, int64_t x_wide, Moments m) {
  const float width = 1.0f / (float)(segments * hidden);
  vf sums[4], products[4];
  for (int i = 0; i < 4; ++i) sums[i] = products[i] = vset1(0.0f);
  for (int64_t s = 0; s < segments; ++s)
    for_row(hidden, [&](int64_t i, const auto& part, auto j) FASTDL_STEP {
      constexpr int J = decltype(j)::value;
      const vf v = part.template load<F32>(g + s * wide + i);
      const vf hat = vmul(vsub(part.template load<T>(x + s * x_wide + i), vset1(m.mean)), vset1(m.rstd));
      sums[J] = vadd(sums[J], v);
      products[J] = vfma(v, hat, products[J]);
    });
  return {total(sums) * width, total(products) * width};
}
// Gradient of x at one place of that layer norm.
FASTDL_INLINE vf norm_gradient(vf g, vf hat, GradientMeans means, float rstd) {
  return vmul(vset1(rstd), vsub(vsub(g, vset1(means.g)), vmul(hat, vset1(means.g_hat))));
}

// Copies rows [batch][size] of float32 into rows padded to `wide`, zeros behind, for the units of some panels.
FASTDL_INLINE void widen(const float* from, int64_t batch, int64_t size, int64_t wide, Range panels, float* to) {
  const int64_t begin = panels.begin * PANEL_COLS, end = panels.end * PANEL_COLS;
  for (int64_t row = 0; row < batch; ++row)
    for (int64_t i = begin; i < end; ++i) to[row * wide + i] = i < size ? from[row * size + i] : 0.0f;
}
FASTDL_INLINE void narrow(const float* from, int64_t batch, int64_t size, int64_t wide, Range panels, float* to) {
  const int64_t begin = panels.begin * PANEL_COLS, end = panels.end * PANEL_COLS;
  for (int64_t row = 0; row < batch; ++row)
    for (int64_t i = begin; i < end && i < size; ++i) to[row * size + i] = from[row * wide + i];
}

// The units of a member: body(unit, n) for every vector of the panel.
template <class Body>
FASTDL_INLINE void each_part(int64_t panel, int64_t hidden, const Body& body) {
  for (int part = 0; part < PARTS; ++part) {
    const int64_t unit = panel * PANEL_COLS + part * LANES;
    if (unit < hidden) body(unit, hidden - unit, part * LANES);
  }
}

}  // namespace
}  // namespace FASTDL_LEVEL
}  // namespace fastdl
