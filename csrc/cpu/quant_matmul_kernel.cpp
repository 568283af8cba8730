// y = x W^T from packed weights, and its gradient for x: one source, compiled once per level.
//
// Method. Weights stand, tokens stream: 32 k of a panel of 16 rows are unpacked into registers once, then every token
// of the batch passes them, adding to a row of 16 float32 sums that stays in the level-1 cache. One token keeps its sums
// in registers and is bound by memory bandwidth; hundreds pay for the unpacking once in 256. The order of additions is
// fixed by the shape alone, so results do not depend on the number of threads or on how many tokens come together.
//
//   pytest tests/test_quant_matmul_cpu.py        python -m pytest bench/bench_quant_matmul.py
#include "cpu/quant_matmul_kernel.h"

#include "cpu/amx_tile.h"
#include "cpu/quant_unpack.h"

namespace fastdl {
namespace FASTDL_LEVEL {
namespace {

constexpr int64_t CHUNK = 256;          // tokens that stream past one set of weights: 16 KB of sums
constexpr int64_t TILE_BLOCKS = 64;     // AMX: blocks of 32 k unpacked at a time, 1 KB each
constexpr int64_t BACKWARD_CHUNK = 128;  // tokens, 32 sums each

FASTDL_INLINE vf load_as_float(const void* p, int format, int64_t i) {
  if (format == FORMAT_F32) return vload((const float*)p + i);
  return format == FORMAT_F16 ? vload_f16((const uint16_t*)p + i) : vload_bf16((const uint16_t*)p + i);
}

FASTDL_INLINE void store_from_float(void* p, int format, int64_t i, vf x) {
  if (format == FORMAT_F32) return vstore((float*)p + i, x);
  return format == FORMAT_F16 ? vstore_f16((uint16_t*)p + i, x) : vstore_bf16((uint16_t*)p + i, x);
}

// n <= 32 values, zeros after them
void load_row_block(const void* p, int format, int64_t i, int64_t n, float* out) {
  if (n == 32) {
    for (int j = 0; j < 32; j += LANES) vstore(out + j, load_as_float(p, format, i + j));
    return;
  }
  uint32_t raw[32] = {0};
  const int64_t width = format == FORMAT_F32 ? 4 : 2;
  memcpy(raw, (const char*)p + i * width, (size_t)(n * width));
  for (int j = 0; j < 32; j += LANES) vstore(out + j, load_as_float(raw, format, j));
}

// ---------------------------------------------------------------- activations

void prepare_int8(const float* x, Q8Block* out) {
  vf largest = vset1(0.0f), check = vset1(0.0f);
  for (int j = 0; j < 32; j += LANES) {
    const vf v = vload(x + j);
    largest = vmax(largest, vabs(v));
    check = vfma(v, vset1(0.0f), check);  // NaN if any value is NaN or infinite: it has to reach the result
  }
  const float amax = vhmax(largest);
  const bool usable = amax > 1e-30f;  // below, 127 / amax could overflow: such a block counts as zeros
  const float inverse = usable ? 127.0f / amax : 0.0f;
  int32_t sums[2];
  for (int half = 0; half < 2; ++half) {
    vi sum = vset1i(0);
    for (int j = 16 * half; j < 16 * half + 16; j += LANES) {
      const vi q = vround(vmul(vload(x + j), vset1(inverse)));
      vstore_i8(out->q + j, q);
      sum = vaddi(sum, q);
    }
    sums[half] = vsumi(sum);
  }
  out->d = (usable ? amax / 127.0f : 0.0f) + vsum(check);
  out->sum = out->d * (float)(sums[0] + sums[1]);
  out->nsum[0] = -sums[0];
  out->nsum[1] = -sums[1];
}

int64_t prepared_block_bytes(int precision) {
  if (precision == PRECISION_INT8) return sizeof(Q8Block);
#if defined(FASTDL_NATIVE_BF16)
  if (precision == PRECISION_BF16) return 64;
#endif
  return 128;
}

void prepare_entry(const float* v, int precision, void* entry) {
  if (precision == PRECISION_INT8) return prepare_int8(v, (Q8Block*)entry);
  if (precision == PRECISION_FP32) {
    memcpy(entry, v, 128);
    return;
  }
  for (int j = 0; j < 32; j += LANES) {
#if defined(FASTDL_NATIVE_BF16)
    vstore_bf16((uint16_t*)entry + j, vload(v + j));
#else
    uint16_t h[LANES];
    vstore_bf16(h, vload(v + j));
    vstore((float*)entry + j, vload_bf16(h));
#endif
  }
}

void prepare(const void* x, int x_format, int64_t ld_x, int64_t cols, int precision, int64_t tokens, int64_t t0,
             int64_t t1, void* out) {
  const int64_t blocks = (cols + 31) / 32, size = prepared_block_bytes(precision);
  alignas(64) float v[32];
  // Entries of one block lie side by side, those of one token far apart: 16 tokens go together, so that a cache line
  // that was fetched for writing is filled before it is lost.
  for (int64_t group = t0; group < t1; group += 16)
    for (int64_t b = 0; b < blocks; ++b)
      for (int64_t t = group; t < t1 && t < group + 16; ++t) {
        load_row_block(x, x_format, t * ld_x + b * 32, cols - b * 32 < 32 ? cols - b * 32 : 32, v);
        prepare_entry(v, precision, (char*)out + (b * tokens + t) * size);
      }
}

// ---------------------------------------------------------------- products: weights of one step, and one token's fold

struct Int8 {
  using Entry = Q8Block;
  static constexpr int STEPS = 1;
  template <class F>
  FASTDL_INLINE typename F::Block load(const uint8_t* panel, int64_t cols, int64_t b, int, int h) {
    return F::load(panel, cols, b, h);
  }
  template <class F>
  FASTDL_INLINE vf fold(vf acc, const typename F::Block& w, const Entry& x, int) {
    return F::fold(acc, w, x);
  }
};

template <int N>
struct Vectors {
  vf v[N];
};

struct Fp32 {
  struct Entry {
    float x[32];
  };
  static constexpr int STEPS = 4;
  template <class F>
  FASTDL_INLINE Vectors<8> load(const uint8_t* panel, int64_t cols, int64_t b, int step, int h) {
    Vectors<8> w;
    F::unpack(panel, cols, b, step, h, w.v);
    return w;
  }
  template <class F>
  FASTDL_INLINE vf fold(vf acc, const Vectors<8>& w, const Entry& x, int step) {
    vf other = vset1(0.0f);  // two chains: an FMA takes 4 cycles and two start in each
#pragma GCC unroll 4
    for (int i = 0; i < 8; i += 2) {
      acc = vfma(w.v[i], vset1(x.x[8 * step + i]), acc);
      other = vfma(w.v[i + 1], vset1(x.x[8 * step + i + 1]), other);
    }
    return vadd(acc, other);
  }
};

#if defined(FASTDL_NATIVE_BF16)
template <int N>
struct Pairs {
  vb v[N];
};

struct Bf16 {
  struct Entry {
    uint16_t x[32];
  };
  static constexpr int STEPS = 1;
  template <class F>
  FASTDL_INLINE Pairs<16> load(const uint8_t* panel, int64_t cols, int64_t b, int, int h) {
    Pairs<16> w;
#pragma GCC unroll 4
    for (int q = 0; q < 4; ++q) {
      vf f[8];
      F::unpack(panel, cols, b, q, h, f);
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) w.v[4 * q + i] = vpair(f[2 * i], f[2 * i + 1]);
    }
    return w;
  }
  template <class F>
  FASTDL_INLINE vf fold(vf acc, const Pairs<16>& w, const Entry& x, int) {
    vf other = vset1(0.0f);
#pragma GCC unroll 8
    for (int i = 0; i < 16; i += 2) {
      acc = vdot_bf16(acc, w.v[i], x.x + 2 * i);
      other = vdot_bf16(other, w.v[i + 1], x.x + 2 * i + 2);
    }
    return vadd(acc, other);
  }
};
#else
// No bf16 product at this level: weights and activations are rounded to bf16, the sums are those of float32.
struct Bf16 : Fp32 {
  template <class F>
  FASTDL_INLINE Vectors<8> load(const uint8_t* panel, int64_t cols, int64_t b, int step, int h) {
    Vectors<8> w = Fp32::load<F>(panel, cols, b, step, h);
    uint16_t rounded[LANES];
    for (int i = 0; i < 8; ++i) {
      vstore_bf16(rounded, w.v[i]);
      w.v[i] = vload_bf16(rounded);
    }
    return w;
  }
};
#endif

// ---------------------------------------------------------------- one panel against a chunk of tokens

// c [T][16] = this panel's sums; acts: entry (0, first token)
template <class F, class P, int T>
void stream_few(const uint8_t* panel, int64_t cols, int64_t blocks, const typename P::Entry* acts, int64_t tokens,
                float* c) {
  vf acc[PARTS][T];
  for (int h = 0; h < PARTS; ++h)
    for (int t = 0; t < T; ++t) acc[h][t] = vset1(0.0f);
  for (int64_t b = 0; b < blocks; ++b, acts += tokens)
#pragma GCC unroll 4
    for (int step = 0; step < P::STEPS; ++step)
#pragma GCC unroll 2
      for (int h = 0; h < PARTS; ++h) {
        const auto w = P::template load<F>(panel, cols, b, step, h);
#pragma GCC unroll 8
        for (int t = 0; t < T; ++t) acc[h][t] = P::template fold<F>(acc[h][t], w, acts[t], step);
      }
  for (int h = 0; h < PARTS; ++h)
    for (int t = 0; t < T; ++t) vstore(c + t * PANEL + h * LANES, acc[h][t]);
}

template <class F, class P>
void stream_many(const uint8_t* panel, int64_t cols, int64_t blocks, const typename P::Entry* acts, int64_t tokens,
                 int64_t n, float* c) {
  memset(c, 0, (size_t)n * PANEL * sizeof(float));
  for (int64_t b = 0; b < blocks; ++b, acts += tokens)
    for (int step = 0; step < P::STEPS; ++step)
      for (int h = 0; h < PARTS; ++h) {
        const auto w = P::template load<F>(panel, cols, b, step, h);
        for (int64_t t = 0; t < n; ++t) {
          float* sums = c + t * PANEL + h * LANES;
          vstore(sums, P::template fold<F>(vload(sums), w, acts[t], step));
        }
      }
}

template <class F, class P>
void stream(const uint8_t* panel, int64_t cols, int64_t blocks, const void* acts_, int64_t tokens, int64_t n, float* c) {
  const typename P::Entry* acts = (const typename P::Entry*)acts_;
  switch (n) {
    case 1: return stream_few<F, P, 1>(panel, cols, blocks, acts, tokens, c);
    case 2: return stream_few<F, P, 2>(panel, cols, blocks, acts, tokens, c);
    case 3: return stream_few<F, P, 3>(panel, cols, blocks, acts, tokens, c);
    case 4: return stream_few<F, P, 4>(panel, cols, blocks, acts, tokens, c);
    default: return stream_many<F, P>(panel, cols, blocks, acts, tokens, n, c);
  }
}

#if defined(FASTDL_HAS_TILES)
// bf16 by tiles: 64 tokens x 16 rows in four accumulators. c [n][16], n a multiple of 16.
template <class F>
void stream_tiles(const uint8_t* panel, int64_t cols, int64_t blocks, const Bf16::Entry* acts, int64_t tokens, int64_t n,
                  float* c, uint16_t* weights) {
  for (int64_t first = 0; first < blocks; first += TILE_BLOCKS) {
    const int64_t count = blocks - first < TILE_BLOCKS ? blocks - first : TILE_BLOCKS;
    for (int64_t b = 0; b < count; ++b) {
      const auto w = Bf16::load<F>(panel, cols, first + b, 0, 0);
      for (int i = 0; i < 16; ++i) memcpy(weights + b * 512 + i * 32, &w.v[i], 64);
    }
    for (int64_t t = 0; t < n; t += 64) {
      const int64_t left = (n - t) / 16;
      float* sums = c + t * PANEL;
#define FASTDL_TILES(op) \
  op(0) if (left > 1) { op(1) } \
  if (left > 2) { op(2) } \
  if (left > 3) { op(3) }
#define FASTDL_OPEN(i) \
  if (first) TILE_LOAD(i, sums + i * 256); \
  else TILE_ZERO(i);
      FASTDL_TILES(FASTDL_OPEN)
      for (int64_t b = 0; b < count; ++b) {
        const Bf16::Entry* a = acts + (first + b) * tokens + t;
        TILE_LOAD(5, weights + b * 512);
#define FASTDL_STEP(i) \
  TILE_LOAD(4, a + i * 16); \
  TILE_DOT_BF16(i, 4, 5);
        FASTDL_TILES(FASTDL_STEP)
      }
#define FASTDL_CLOSE(i) TILE_STORE(i, sums + i * 256);
      FASTDL_TILES(FASTDL_CLOSE)
#undef FASTDL_TILES
#undef FASTDL_OPEN
#undef FASTDL_STEP
#undef FASTDL_CLOSE
    }
  }
}
#endif

struct Scratch {
  alignas(64) float sums[CHUNK * PANEL];
  alignas(64) float sums2[CHUNK * PANEL];
  alignas(64) uint16_t tiles[TILE_BLOCKS * 512];
};

template <class F>
void panel_sums(const MatmulArgs& a, const uint8_t* panel, int64_t t0, int64_t n, float* c, Scratch* s) {
  const int64_t blocks = (a.cols + 31) / 32;
  const void* acts = (const char*)a.acts + t0 * prepared_block_bytes(a.precision);
  if constexpr (F::HAS_INT8)
    if (a.precision == PRECISION_INT8) return stream<F, Int8>(panel, a.cols, blocks, acts, a.tokens, n, c);
  if (a.precision == PRECISION_FP32) return stream<F, Fp32>(panel, a.cols, blocks, acts, a.tokens, n, c);
#if defined(FASTDL_HAS_TILES)
  const int64_t tiled = n / 16 * 16;
  if (tiled) {
    stream_tiles<F>(panel, a.cols, blocks, (const Bf16::Entry*)acts, a.tokens, tiled, c, s->tiles);
    if (tiled == n) return;
    acts = (const Bf16::Entry*)acts + tiled;
    n -= tiled;
    c += tiled * PANEL;
  }
#else
  (void)s;
#endif
  stream<F, Bf16>(panel, a.cols, blocks, acts, a.tokens, n, c);
}

// The one switch from a format's number to its class; a caller has checked the number.
#define FASTDL_FORMAT_SWITCH(format, call)      \
  switch (format) {                             \
    case FORMAT_Q4_1: call(Q4_1); break;        \
    case FORMAT_Q8_0: call(Q8_0); break;        \
    case FORMAT_Q6_K: call(Q6_K); break;        \
    case FORMAT_F16: call(F16); break;          \
    case FORMAT_BF16: call(BF16); break;        \
    case FORMAT_F32: call(F32); break;          \
    default: __builtin_trap();                  \
  }

void write_panel(const MatmulArgs& a, int64_t p, int64_t t0, int64_t n, const Scratch* s) {
  const int64_t row = p * PANEL, valid = a.rows - row < PANEL ? a.rows - row : PANEL;
  const int64_t width = a.out_format == FORMAT_F32 ? 4 : 2;
  alignas(64) float bias[PANEL] = {0};
  if (a.bias) memcpy(bias, a.bias + row, (size_t)valid * sizeof(float));
  for (int64_t t = 0; t < n; ++t) {
    char* out = (char*)a.out + ((t0 + t) * a.ld_out + row) * width;
    alignas(64) float part[PANEL] = {0};
    const bool direct = valid == PANEL;
    if (!direct && a.epilogue == ADD) memcpy(part, out, (size_t)(valid * width));
    void* to = direct ? (void*)out : (void*)part;
    for (int h = 0; h < PANEL; h += LANES) {
      vf y = vadd(vload(s->sums + t * PANEL + h), vload(bias + h));
      if (a.epilogue == SWIGLU) y = vmul(vsilu(y), vload(s->sums2 + t * PANEL + h));
      if (a.epilogue == ADD) y = vadd(y, vload((const float*)to + h));
      store_from_float(to, a.out_format, h, y);
    }
    if (!direct) memcpy(out, part, (size_t)(valid * width));
  }
}

void matmul(const MatmulArgs& a, int64_t p0, int64_t p1, void* scratch) {
  Scratch* s = (Scratch*)scratch;
  const int64_t bytes = panel_bytes(a.format, a.cols);
  const int64_t bytes2 = a.epilogue == SWIGLU ? panel_bytes(a.format2, a.cols) : 0;
#if defined(FASTDL_HAS_TILES)
  const bool tiles = a.precision == PRECISION_BF16 && a.tokens >= 16;
  if (tiles) tiles_begin();
#endif
  for (int64_t t0 = 0; t0 < a.tokens; t0 += CHUNK) {
    const int64_t n = a.tokens - t0 < CHUNK ? a.tokens - t0 : CHUNK;
    for (int64_t p = p0; p < p1; ++p) {
#define FASTDL_FIRST(F) panel_sums<F>(a, a.w + p * bytes, t0, n, s->sums, s)
#define FASTDL_SECOND(F) panel_sums<F>(a, a.w2 + p * bytes2, t0, n, s->sums2, s)
      FASTDL_FORMAT_SWITCH(a.format, FASTDL_FIRST)
      if (a.epilogue == SWIGLU) FASTDL_FORMAT_SWITCH(a.format2, FASTDL_SECOND)
#undef FASTDL_FIRST
#undef FASTDL_SECOND
      write_panel(a, p, t0, n, s);
    }
  }
#if defined(FASTDL_HAS_TILES)
  if (tiles) tiles_end();
#endif
}

// ---------------------------------------------------------------- gradient for x

struct BackwardScratch {
  alignas(64) float sums[BACKWARD_CHUNK * 32];
  alignas(64) float grad[BACKWARD_CHUNK * PANEL];
  alignas(64) float by_column[32 * PANEL];
  alignas(64) float by_row[PANEL * 32];
};

// 32 columns of a panel as float32, by row
template <class F>
void unpack_by_row(const uint8_t* panel, int64_t cols, int64_t b, BackwardScratch* s) {
  for (int q = 0; q < 4; ++q)
    for (int h = 0; h < PARTS; ++h) {
      vf w[8];
      F::unpack(panel, cols, b, q, h, w);
      for (int i = 0; i < 8; ++i) vstore(s->by_column + (q * 8 + i) * PANEL + h * LANES, w[i]);
    }
  for (int r = 0; r < PANEL; ++r)
    for (int k = 0; k < 32; ++k) s->by_row[r * 32 + k] = s->by_column[k * PANEL + r];
}

void backward_block(const BackwardArgs& a, int64_t b, int64_t t0, int64_t n, BackwardScratch* s) {
  const int64_t bytes = panel_bytes(a.format, a.cols), panels = panel_count(a.rows);
  const int64_t width = a.grad_format == FORMAT_F32 ? 4 : 2;
  memset(s->sums, 0, (size_t)n * 32 * sizeof(float));
  for (int64_t p = 0; p < panels; ++p) {
#define FASTDL_UNPACK(F) unpack_by_row<F>(a.w + p * bytes, a.cols, b, s)
    FASTDL_FORMAT_SWITCH(a.format, FASTDL_UNPACK)
#undef FASTDL_UNPACK
    const int64_t valid = a.rows - p * PANEL < PANEL ? a.rows - p * PANEL : PANEL;
    for (int64_t t = 0; t < n; ++t) {
      uint32_t raw[PANEL] = {0};
      memcpy(raw, (const char*)a.grad + ((t0 + t) * a.ld_grad + p * PANEL) * width, (size_t)(valid * width));
      for (int h = 0; h < PANEL; h += LANES) vstore(s->grad + t * PANEL + h, load_as_float(raw, a.grad_format, h));
    }
    for (int r = 0; r < PANEL; r += 8)
      for (int k = 0; k < 32; k += LANES) {
        vf w[8];
        for (int i = 0; i < 8; ++i) w[i] = vload(s->by_row + (r + i) * 32 + k);
        for (int64_t t = 0; t < n; ++t) {
          const float* g = s->grad + t * PANEL + r;
          vf acc = vload(s->sums + t * 32 + k);
#pragma GCC unroll 8
          for (int i = 0; i < 8; ++i) acc = vfma(w[i], vset1(g[i]), acc);
          vstore(s->sums + t * 32 + k, acc);
        }
      }
  }
  const int64_t columns = a.cols - b * 32 < 32 ? a.cols - b * 32 : 32;
  for (int64_t t = 0; t < n; ++t) {
    alignas(64) uint32_t row[32];
    for (int k = 0; k < 32; k += LANES) store_from_float(row, a.grad_format, k, vload(s->sums + t * 32 + k));
    memcpy((char*)a.out + ((t0 + t) * a.ld_out + b * 32) * width, row, (size_t)(columns * width));
  }
}

void backward(const BackwardArgs& a, int64_t b0, int64_t b1, void* scratch) {
  for (int64_t t0 = 0; t0 < a.tokens; t0 += BACKWARD_CHUNK)
    for (int64_t b = b0; b < b1; ++b)
      backward_block(a, b, t0, a.tokens - t0 < BACKWARD_CHUNK ? a.tokens - t0 : BACKWARD_CHUNK,
                     (BackwardScratch*)scratch);
}

int64_t scratch_bytes() {
  return sizeof(Scratch) > sizeof(BackwardScratch) ? sizeof(Scratch) : sizeof(BackwardScratch);
}

}  // namespace

const QuantMatmulKernels quant_matmul_kernels = {prepared_block_bytes, prepare, matmul, backward, scratch_bytes};

}  // namespace FASTDL_LEVEL
}  // namespace fastdl
