// The parts of attention that know no options: products with queries in the lanes of vectors, transposed blocks, and the
// exponential. For kernel sources: everything is inlined at their level.
//
// A tile has COLUMNS = 3 vectors of queries side by side, so that scores, maxima, exponentials and sums need nothing from
// another lane, and keys and values are read as they lie. Products keep ROWS x 3 vectors of sums in registers: 24 of 32 with
// AVX-512 (8 rows), 12 of 16 with AVX2 (4 rows). A step loads 3 vectors and ROWS scalars for 3 ROWS multiply-adds, 11 loads
// for 24 at the wider level, which two load ports hide.
#pragma once

#include "cpu/rows_kernel.h"

namespace fastdl {
namespace FASTDL_LEVEL {
namespace {

constexpr int VECTORS = 3;
constexpr int64_t COLUMNS = VECTORS * LANES;
constexpr int64_t KEYS = 128;  // a block of keys
constexpr int ROWS = LANES == 16 ? 8 : 4;
constexpr float LOG2E = 1.44269504f, LN2 = 0.693147182f;
constexpr float LOWEST = -126.0f;  // 2^x is a normal number from here on

// 2^x for x <= 126, relative error 1e-7; 2^-126 below -126; NaN stays NaN. The polynomial is a minimax fit on [-1/2, 1/2].
FASTDL_INLINE vf vexp2(vf x) {
  x = vmax(vset1(LOWEST), x);
  const vi n = vround(x);
  const vf r = vsub(x, vcvt(n));
  vf p = vset1(1.53458110e-4f);
  p = vfma(p, r, vset1(0.00133999312f));
  p = vfma(p, r, vset1(0.00961848896f));
  p = vfma(p, r, vset1(0.0555032878f));
  p = vfma(p, r, vset1(0.240226469f));
  p = vfma(p, r, vset1(0.693147206f));
  p = vfma(p, r, vset1(1.0f));
  return vscale2(p, n);
}

// Element `at` on, n of LANES elements (all where n >= LANES).
template <class T>
FASTDL_INLINE vf get(const void* base, int64_t at, int64_t n) {
  const auto* p = (const typename T::Element*)base + at;
  return n >= LANES ? T::load(p) : load_part<T>(p, n & (LANES - 1));  // the mask: gcc does not see that n is small
}
template <class T>
FASTDL_INLINE void put(void* base, int64_t at, vf v, int64_t n) {
  auto* p = (typename T::Element*)base + at;
  if (n >= LANES)
    T::store(p, v);
  else
    store_part<T>(p, v, n);
}

// What the sums of a product are added to: nothing, what c holds, or c times a factor for every lane. A sum of 128 products
// is added at once, which rounds less than adding one by one.
enum Start { ZERO, ADD, RESCALE };

template <Start START>
FASTDL_INLINE void add_sum(float* c, vf sum, const float* factor, int v) {
  if (START == ADD) sum = vadd(vload(c), sum);
  if (START == RESCALE) sum = vfma(vload(c), vload(factor + v * LANES), sum);
  vstore(c, sum);
}

// c[i][lanes] = START + sum_j a[i * row + j * step] * b[j][lanes], N rows i, V vectors; b and c have ldb, ldc floats a row.
template <int N, int V, Start START>
FASTDL_INLINE void product_tile(const float* a, int64_t row, int64_t step, const float* b, int64_t ldb, int64_t count,
                                float* c, int64_t ldc, const float* factor) {
  vf sum[N][V];
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) sum[i][v] = vset1(0.0f);
  for (int64_t j = 0; j < count; ++j) {
    vf x[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) x[v] = vload(b + j * ldb + v * LANES);
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) {
      const vf y = vset1(a[i * row + j * step]);
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) sum[i][v] = vfma(y, x[v], sum[i][v]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) add_sum<START>(c + i * ldc + v * LANES, sum[i][v], factor, v);
}

template <int N, int V, Start START>
inline void product_rows(const float* a, int64_t row, int64_t step, const float* b, int64_t ldb, int64_t count,
                         float* c, int64_t ldc, int64_t rows, const float* factor) {
  int64_t i = 0;
  for (; i + N <= rows; i += N)
    product_tile<N, V, START>(a + i * row, row, step, b, ldb, count, c + i * ldc, ldc, factor);
  for (; i < rows; ++i) product_tile<1, V, START>(a + i * row, row, step, b, ldb, count, c + i * ldc, ldc, factor);
}

// All rows and vectors: three vectors at a time, four where one would be left over and registers allow it.
template <Start START>
inline void product(const float* a, int64_t row, int64_t step, const float* b, int64_t ldb, int64_t count, float* c,
                    int64_t ldc, int64_t rows, int vectors, const float* factor = nullptr) {
  while (vectors > 0) {
    const int here = LANES == 16 && (vectors == 4 || vectors == 8 || vectors == 16) ? 4 : vectors < 3 ? vectors : 3;
    if (here == 4)
      product_rows<6, 4, START>(a, row, step, b, ldb, count, c, ldc, rows, factor);
    else if (here == 3)
      product_rows<ROWS, 3, START>(a, row, step, b, ldb, count, c, ldc, rows, factor);
    else if (here == 2)
      product_rows<ROWS, 2, START>(a, row, step, b, ldb, count, c, ldc, rows, factor);
    else
      product_rows<ROWS, 1, START>(a, row, step, b, ldb, count, c, ldc, rows, factor);
    b += here * LANES, c += here * LANES, vectors -= here;
    if (START == RESCALE) factor += here * LANES;
  }
}

#if defined(FASTDL_NATIVE_BF16)
// The same with pairs of bfloat16: b holds in every lane a pair that follows each other along j, a is read in pairs.
// row, step in elements; count, ldb in pairs.
template <int N, int V, Start START>
FASTDL_INLINE void product_tile_pairs(const uint16_t* a, int64_t row, int64_t step, const uint32_t* b, int64_t ldb,
                                      int64_t count, float* c, int64_t ldc, const float* factor) {
  vf sum[N][V];
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) sum[i][v] = vset1(0.0f);
  for (int64_t j = 0; j < count; ++j) {
    vb x[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) x[v] = bload((const uint8_t*)(b + j * ldb + v * LANES));
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i)
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) sum[i][v] = vdot_bf16(sum[i][v], x[v], a + i * row + j * step);
  }
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) add_sum<START>(c + i * ldc + v * LANES, sum[i][v], factor, v);
}

template <int V, Start START>
inline void product_rows_pairs(const uint16_t* a, int64_t row, int64_t step, const uint32_t* b, int64_t ldb,
                               int64_t count, float* c, int64_t ldc, int64_t rows, const float* factor) {
  int64_t i = 0;
  for (; i + ROWS <= rows; i += ROWS)
    product_tile_pairs<ROWS, V, START>(a + i * row, row, step, b, ldb, count, c + i * ldc, ldc, factor);
  for (; i < rows; ++i)
    product_tile_pairs<1, V, START>(a + i * row, row, step, b, ldb, count, c + i * ldc, ldc, factor);
}

template <Start START>
inline void product_pairs(const uint16_t* a, int64_t row, int64_t step, const uint32_t* b, int64_t ldb, int64_t count,
                          float* c, int64_t ldc, int64_t rows, int vectors, const float* factor = nullptr) {
  if (vectors == 3)
    product_rows_pairs<3, START>(a, row, step, b, ldb, count, c, ldc, rows, factor);
  else if (vectors == 2)
    product_rows_pairs<2, START>(a, row, step, b, ldb, count, c, ldc, rows, factor);
  else
    product_rows_pairs<1, START>(a, row, step, b, ldb, count, c, ldc, rows, factor);
}

// to[j / 2][i] = (row j, row j + 1)[i]: n elements of `count` rows; a row of zeros makes the count even.
FASTDL_INLINE void pair_rows(const uint16_t* rows, int64_t stride, int64_t count, int64_t n, uint32_t* to, int64_t ld) {
  for (int64_t j = 0; j < count; j += 2)
    for (int64_t i = 0; i < n; i += LANES) {
      const vf even = get<BF16>(rows, j * stride + i, n - i);
      const vf odd = j + 1 < count ? get<BF16>(rows, (j + 1) * stride + i, n - i) : vset1(0.0f);
      const vb both = vpair(even, odd);
      memcpy(to + j / 2 * ld + i, &both, sizeof both);
    }
}
#endif

// to[j][c] = row(c)[j]: `count` rows of n floats become columns of a tile, in squares of LANES. rows: pointers, of which those
// from count on repeat the last. n floats are read of each, to is written up to the next multiple of LANES.
FASTDL_INLINE void transpose_to_tile(const float* const* rows, int vectors, int64_t n, float* to, int64_t ld) {
  for (int v = 0; v < vectors; ++v)
    for (int64_t j = 0; j < n; j += LANES) {
      vf square[LANES];
      const int64_t here = n - j;
#pragma GCC unroll 16
      for (int i = 0; i < LANES; ++i)
        square[i] = here >= LANES ? vload(rows[v * LANES + i] + j) : load_part<F32>(rows[v * LANES + i] + j, here);
      vtranspose(square);
#pragma GCC unroll 16
      for (int i = 0; i < LANES; ++i) vstore(to + (j + i) * ld + v * LANES, square[i]);
    }
}

FASTDL_INLINE int64_t whole(int64_t n) { return (n + LANES - 1) / LANES * LANES; }

// x where it is finite, else 0.
FASTDL_INLINE vf finite(vf x) { return vselect_le(vabs(x), vset1(3.40282347e38f), x, vset1(0.0f)); }
inline bool is_finite(float x) { return x - x == 0.0f; }

inline bool all_finite(const float* x, int64_t n) {  // n: whole vectors
  vf rest = vset1(0.0f);
  for (int64_t i = 0; i < n; i += LANES) rest = vadd(rest, vsub(vload(x + i), vload(x + i)));
  return vsum(rest) == 0.0f;
}

// A row of n elements as floats, times a factor; zeros up to a whole vector.
template <class T>
FASTDL_INLINE void row_to_floats(const void* base, int64_t at, int64_t n, float factor, float* to) {
  for (int64_t i = 0; i < n; i += LANES) vstore(to + i, vmul(get<T>(base, at + i, n - i), vset1(factor)));
}

}  // namespace
}  // namespace FASTDL_LEVEL
}  // namespace fastdl
