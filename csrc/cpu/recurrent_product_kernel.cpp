// Products of a few rows with a packed matrix, for one level. Layout: recurrent_product.h.
//
// Method: the sums of up to max_rows rows times four panels stay in registers while k runs: at the AVX-512 level 24
// vectors, for which four loads of weights and six broadcasts feed 24 multiply-adds. With one row the weights are the
// traffic, and the floor is their bytes over the bandwidth of the cache that holds them.
//
// Test: pytest tests/test_lstm.py -k cpu
#include "cpu/recurrent_product.h"

#include "cpu/amx_tile.h"
#include "cpu/rows_kernel.h"

namespace fastdl {
namespace FASTDL_LEVEL {
namespace {

// float32 panels. float16 operands arrive rounded, in float32.
struct Float32Product {
  using Operand = float;
  using Packed = float;
  static constexpr int STEP = 1;  // inputs a turn
  using Vector = vf;
  FASTDL_INLINE Vector load(const Packed* p) { return vload(p); }
  template <int N>
  FASTDL_INLINE void add(vf (&acc)[N], const Vector (&w)[N], const Operand* x) {
    const vf v = vset1(*x);
    for (int n = 0; n < N; ++n) acc[n] = vfma(w[n], v, acc[n]);
  }
};

struct BFloat16Product {
  using Packed = uint16_t;
  static constexpr int STEP = 2;
#if defined(FASTDL_NATIVE_BF16)
  using Operand = uint16_t;
  using Vector = vb;
  FASTDL_INLINE Vector load(const Packed* p) { return bload((const uint8_t*)p); }
  template <int N>
  FASTDL_INLINE void add(vf (&acc)[N], const Vector (&w)[N], const Operand* x) {
    for (int n = 0; n < N; ++n) acc[n] = vdot_bf16(acc[n], w[n], x);
  }
#else
  using Operand = float;
  struct Vector {
    vf even, odd;
  };
  FASTDL_INLINE Vector load(const Packed* p) {
    const vb pairs = bload((const uint8_t*)p);
    return {vpair_bf16_lo(pairs), vpair_bf16_hi(pairs)};
  }
  template <int N>
  FASTDL_INLINE void add(vf (&acc)[N], const Vector (&w)[N], const Operand* x) {
    const vf even = vset1(x[0]), odd = vset1(x[1]);
    for (int n = 0; n < N; ++n) acc[n] = vfma(w[n].odd, odd, vfma(w[n].even, even, acc[n]));
  }
#endif
};

#if defined(__AVX512F__) && defined(__AVX512VNNI__)
constexpr int MAX_ROWS = 6;  // 24 sums, 4 weights, a broadcast: 29 of 32 registers
#elif defined(__AVX2__)
constexpr int MAX_ROWS = 3;  // 12 sums of 16 registers; weights are operands in memory
#else
constexpr int MAX_ROWS = 4;
#endif

// INTERLEAVED: a[k][M] instead of a[M][lda].
template <class W, int M, int N, bool INTERLEAVED>
void tile(const typename W::Operand* a, int64_t lda, const uint8_t* const* panels, int64_t k, float* out) {
  for (int part = 0; part < PARTS; ++part) {
    const typename W::Packed* w[N];
    for (int n = 0; n < N; ++n) w[n] = (const typename W::Packed*)panels[n] + part * LANES * W::STEP;
    vf acc[M][N];
    for (int m = 0; m < M; ++m)
      for (int n = 0; n < N; ++n) acc[m][n] = vset1(0.0f);
    for (int64_t i = 0; i < k; i += W::STEP) {
      typename W::Vector v[N];
      for (int n = 0; n < N; ++n) v[n] = W::load(w[n] + i * PANEL_COLS);
      for (int m = 0; m < M; ++m) W::add(acc[m], v, INTERLEAVED ? a + i * M + m : a + m * lda + i);
    }
    for (int m = 0; m < M; ++m)
      for (int n = 0; n < N; ++n) vstore(out + (m * N + n) * PANEL_COLS + part * LANES, acc[m][n]);
  }
}

template <class W, int N, bool INTERLEAVED>
void with_rows(const void* a_, int64_t lda, const uint8_t* const* panels, int64_t k, int rows, float* out) {
  const auto* a = (const typename W::Operand*)a_;
  switch (rows) {
    case 1: return tile<W, 1, N, INTERLEAVED>(a, lda, panels, k, out);
    case 2: return tile<W, 2, N, INTERLEAVED>(a, lda, panels, k, out);
    case 3: return tile<W, 3, N, INTERLEAVED>(a, lda, panels, k, out);
#if !defined(__AVX2__) || defined(__AVX512F__)
    case 4: return tile<W, 4, N, INTERLEAVED>(a, lda, panels, k, out);
#endif
#if defined(__AVX512F__)
    case 5: return tile<W, 5, N, INTERLEAVED>(a, lda, panels, k, out);
    case 6: return tile<W, 6, N, INTERLEAVED>(a, lda, panels, k, out);
#endif
    default: __builtin_unreachable();
  }
}

template <class W, bool INTERLEAVED = false>
void with_panels(const void* a, int64_t lda, const uint8_t* const* panels, int count, int64_t k, int rows, float* out) {
  switch (count) {
    case 1: return with_rows<W, 1, INTERLEAVED>(a, lda, panels, k, rows, out);
    case 2: return with_rows<W, 2, INTERLEAVED>(a, lda, panels, k, rows, out);
    case 3: return with_rows<W, 3, INTERLEAVED>(a, lda, panels, k, rows, out);
    case 4: return with_rows<W, 4, INTERLEAVED>(a, lda, panels, k, rows, out);
    default: __builtin_unreachable();
  }
}

#if defined(FASTDL_HAS_TILES)
constexpr int TILE_K = 32;           // inputs an AMX tile takes
constexpr int FEWEST_TILE_ROWS = 4;  // fewer rows leave most of a tile empty

// The same with AMX tiles, up to 16 rows. What is not there is staged as zeros.
void amx_tile(const uint16_t* a, int64_t lda, const uint8_t* const* panels, int count, int64_t k, int rows,
              float* out) {
  alignas(64) uint16_t left[16 * TILE_K] = {}, right[16 * TILE_K] = {};
  alignas(64) float sums[16 * PANEL_COLS];
  tiles_begin();
  TILE_ZERO(0);
  TILE_ZERO(1);
  TILE_ZERO(2);
  TILE_ZERO(3);
  for (int64_t k0 = 0; k0 < k; k0 += TILE_K) {
    const int64_t here = k - k0 < TILE_K ? k - k0 : TILE_K, padded = (here + 1) / 2 * 2;
    if (here < TILE_K) memset(left, 0, sizeof left);
    for (int m = 0; m < rows; ++m) memcpy(left + m * TILE_K, a + m * lda + k0, (size_t)here * 2);
    TILE_LOAD(4, left);
    const auto inputs = [&](int n) -> const void* {
      const uint8_t* const from = panels[n] + k0 * PANEL_COLS * 2;
      if (here == TILE_K) return from;
      memset(right, 0, sizeof right);
      memcpy(right, from, (size_t)padded * PANEL_COLS * 2);
      return right;
    };
#define FASTDL_TILE_STEP(n)      \
  if (n < count) {               \
    TILE_LOAD(5, inputs(n));     \
    TILE_DOT_BF16(n, 4, 5);      \
  }
    FASTDL_TILE_STEP(0);
    FASTDL_TILE_STEP(1);
    FASTDL_TILE_STEP(2);
    FASTDL_TILE_STEP(3);
#undef FASTDL_TILE_STEP
  }
  const auto write = [&](int n) {
    for (int m = 0; m < rows; ++m) memcpy(out + (m * count + n) * PANEL_COLS, sums + m * PANEL_COLS, PANEL_COLS * 4);
  };
#define FASTDL_TILE_WRITE(n) \
  if (n < count) {           \
    TILE_STORE(n, sums);     \
    write(n);                \
  }
  FASTDL_TILE_WRITE(0);
  FASTDL_TILE_WRITE(1);
  FASTDL_TILE_WRITE(2);
  FASTDL_TILE_WRITE(3);
#undef FASTDL_TILE_WRITE
  tiles_end();
}
#endif

int rows_at_once(int format, int64_t rows) {
#if defined(FASTDL_HAS_TILES)
  if (format == FORMAT_BF16 && rows >= FEWEST_TILE_ROWS) return 16;
#endif
  (void)format, (void)rows;
  return MAX_ROWS;
}

void any_tile(int format, const void* a, int64_t lda, const uint8_t* const* panels, int count, int64_t k, int rows,
              float* out) {
#if defined(FASTDL_HAS_TILES)
  if (format == FORMAT_BF16 && rows >= FEWEST_TILE_ROWS)
    return amx_tile((const uint16_t*)a, lda, panels, count, k, rows, out);
#endif
  if (format == FORMAT_BF16) return with_panels<BFloat16Product>(a, lda, panels, count, k, rows, out);
  with_panels<Float32Product>(a, lda, panels, count, k, rows, out);
}

void interleaved(const float* a, const uint8_t* const* panels, int count, int64_t k, int rows, float* out) {
  with_panels<Float32Product, true>(a, 0, panels, count, k, rows, out);
}

// [16][16] of T::Element to float32, or bfloat16 as it is; what is not there is zero.
constexpr int64_t SQUARE = 16;

template <class T>
void pack_rows_of(const void* from_, int64_t stride, int64_t n, int64_t k, uint8_t* to_) {
  using Element = typename T::Element;
  constexpr bool pairs = __is_same(T, BF16);
  const Element* from = (const Element*)from_;
  float square[SQUARE][SQUARE] = {};
  uint16_t narrow[SQUARE][SQUARE] = {};
  for (int64_t k0 = 0; k0 < k; k0 += SQUARE) {
    const int64_t width = k - k0 < SQUARE ? k - k0 : SQUARE, padded = (width + 1) / 2 * 2;
    for (int64_t row = 0; row < n; ++row) {
      const Element* line = from + row * stride + k0;
      if constexpr (pairs) {
        memcpy(narrow[row], line, (size_t)width * 2);
        if (padded > width) narrow[row][width] = 0;
      } else {
        for (int64_t i = 0; i < SQUARE; i += LANES)
          if (i < width)
            vstore(square[row] + i, width - i >= LANES ? T::load(line + i) : load_part<T>(line + i, width - i));
        if (padded > width) square[row][width] = 0.0f;
      }
    }
    if constexpr (pairs) {
      uint16_t* to = (uint16_t*)to_ + k0 * SQUARE;
      for (int64_t i = 0; i < padded; i += 2)
        for (int64_t row = 0; row < SQUARE; ++row) {
          to[i * SQUARE + row * 2] = narrow[row][i];
          to[i * SQUARE + row * 2 + 1] = narrow[row][i + 1];
        }
    } else {
      float* to = (float*)to_ + k0 * SQUARE;
      for (int64_t i = 0; i < padded; ++i)
        for (int64_t row = 0; row < SQUARE; ++row) to[i * SQUARE + row] = square[row][i];
    }
  }
}

template <class T>
void pack_cols_of(const void* from_, int64_t stride, int64_t n, int64_t k, int64_t k0, uint8_t* to_) {
  using Element = typename T::Element;
  constexpr bool pairs = __is_same(T, BF16);
  const Element* from = (const Element*)from_;
  for (int64_t i = 0; i < (pairs ? (k + 1) / 2 * 2 : k); ++i) {
    const Element* line = from + i * stride;
    if constexpr (pairs) {
      uint16_t* to = (uint16_t*)to_ + (k0 + i) / 2 * 2 * SQUARE + i % 2;
      for (int64_t col = 0; col < SQUARE; ++col) to[col * 2] = col < n && i < k ? line[col] : (uint16_t)0;
    } else {
      float* to = (float*)to_ + (k0 + i) * SQUARE;
      for (int64_t col = 0; col < SQUARE; col += LANES) {
        const int64_t here = n - col;
        vstore(to + col, here >= LANES ? T::load(line + col) : here > 0 ? load_part<T>(line + col, here) : vset1(0.0f));
      }
    }
  }
}

void pack_rows(int format, const void* from, int64_t stride, int64_t n, int64_t k, uint8_t* to) {
  dispatch(format, [&](auto type) { pack_rows_of<decltype(type)>(from, stride, n, k, to); });
}

void pack_cols(int format, const void* from, int64_t stride, int64_t n, int64_t k, int64_t k0, uint8_t* to) {
  dispatch(format, [&](auto type) { pack_cols_of<decltype(type)>(from, stride, n, k, k0, to); });
}

}  // namespace

extern const RecurrentProduct recurrent_product = {any_tile, interleaved, pack_rows, pack_cols, rows_at_once};

}  // namespace FASTDL_LEVEL
}  // namespace fastdl
