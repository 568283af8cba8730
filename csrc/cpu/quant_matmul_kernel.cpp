// y = x W^T from packed weights, and its gradient for x: one source, compiled once per level.
//
// Method. Weights stand, tokens stream: 32 k of a panel of 16 rows are unpacked into registers once, then every token
// of the batch passes them, adding to a row of 16 float32 sums that stays in the level-1 cache. One token keeps its sums
// in registers and is bound by memory bandwidth; hundreds pay for the unpacking once in 256. The order of additions is
// fixed by the shape alone, so results do not depend on the number of threads. (Where AMX multiplies, 16 tokens at a
// time, tiles add in another order than the stream that takes the tokens left over.)
//
//   pytest tests/test_quant_matmul_cpu.py        python -m pytest bench/bench_quant_matmul.py
#include "cpu/quant_matmul_kernel.h"

#include "cpu/amx_tile.h"
#include "cpu/quant_activations.h"
#include "cpu/quant_backward.h"
#include "cpu/quant_products.h"

namespace fastdl {
namespace FASTDL_LEVEL {
namespace {

constexpr int64_t CHUNK = 256;       // tokens that stream past one set of weights: 16 KB of sums
constexpr int64_t TILE_BLOCKS = 64;  // AMX: blocks of 32 k unpacked at a time, 1 KB each

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
void stream(const uint8_t* panel, int64_t cols, int64_t blocks, const void* acts_, int64_t tokens, int64_t n,
            float* c) {
  const typename P::Entry* acts = (const typename P::Entry*)acts_;
  if constexpr (VECTOR_LEVEL) {  // the scalar level has no registers for these sums, it would only compile for minutes
    if (n == 1) return stream_few<F, P, 1>(panel, cols, blocks, acts, tokens, c);
    if (n == 2) return stream_few<F, P, 2>(panel, cols, blocks, acts, tokens, c);
    if (n == 3) return stream_few<F, P, 3>(panel, cols, blocks, acts, tokens, c);
    if (n == 4) return stream_few<F, P, 4>(panel, cols, blocks, acts, tokens, c);
  }
  stream_many<F, P>(panel, cols, blocks, acts, tokens, n, c);
}

#if defined(FASTDL_HAS_TILES)
// bf16 by tiles: 64 tokens x 16 rows in four accumulators. c [n][16], n a multiple of 16.
template <class F>
void stream_tiles(const uint8_t* panel, int64_t cols, int64_t blocks, const Bf16::Entry* acts, int64_t tokens,
                  int64_t n, float* c, uint16_t* weights) {
  for (int64_t first = 0; first < blocks; first += TILE_BLOCKS) {
    const int64_t count = blocks - first < TILE_BLOCKS ? blocks - first : TILE_BLOCKS;
    for (int64_t b = 0; b < count; ++b) {
      const auto w = Bf16::load<F>(panel, cols, first + b, 0, 0);
      for (int i = 0; i < 16; ++i) memcpy(weights + b * 512 + i * 32, &w.v[i], 64);
    }
    asm volatile("" ::: "memory");  // gcc does not know that a tile load reads memory
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

int64_t scratch_bytes() {
  return sizeof(Scratch) > sizeof(BackwardScratch) ? sizeof(Scratch) : sizeof(BackwardScratch);
}

}  // namespace

const QuantMatmulKernels quant_matmul_kernels = {prepared_block_bytes, prepare, matmul, backward, scratch_bytes};

}  // namespace FASTDL_LEVEL
}  // namespace fastdl
