// AMX tiles behind named functions, with a twin in plain C so that the AMX path runs (slowly) where there is no AMX.
//
// A tile is 16 rows of 64 bytes. Tiles 0-3 accumulate, 4 and 5 hold the operands. gcc pastes the tile's number into the
// instruction's text, so it has to be a literal: these are macros.
#pragma once

#include "common/simd.h"

#if defined(FASTDL_AMX_TWIN) || defined(__AMX_BF16__)
#define FASTDL_HAS_TILES 1

namespace fastdl {
namespace FASTDL_LEVEL {
namespace {

#if defined(FASTDL_AMX_TWIN)

static thread_local uint8_t twin_tiles[8][16][64];
FASTDL_INLINE void tiles_begin() {}
FASTDL_INLINE void tiles_end() {}
#define TILE_ZERO(c) memset(twin_tiles[c], 0, sizeof twin_tiles[c])
#define TILE_LOAD(c, p) memcpy(twin_tiles[c], p, sizeof twin_tiles[c])
#define TILE_STORE(c, p) memcpy(p, twin_tiles[c], sizeof twin_tiles[c])
#define TILE_DOT_BF16(c, a, b) twin_dot_bf16(twin_tiles[c], twin_tiles[a], twin_tiles[b])
inline void twin_dot_bf16(void* c_, const void* a_, const void* b_) {
  float* c = (float*)c_;
  const uint16_t* a = (const uint16_t*)a_;
  const uint16_t* b = (const uint16_t*)b_;
  for (int m = 0; m < 16; ++m)
    for (int k = 0; k < 32; ++k)
      for (int n = 0; n < 16; ++n)
        c[m * 16 + n] += bf16_to_float(a[m * 32 + k]) * bf16_to_float(b[k / 2 * 32 + n * 2 + k % 2]);
}

#else

struct TileConfig {
  uint8_t palette, start_row, zero[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};
FASTDL_INLINE void tiles_begin() {
  alignas(64) TileConfig config;
  memset(&config, 0, sizeof config);
  config.palette = 1;
  for (int i = 0; i < 8; ++i) config.row_bytes[i] = 64, config.rows[i] = 16;
  // gcc 12 and 13 believe that _tile_loadconfig reads 8 bytes and drop the other stores; this makes them keep them.
  asm volatile("" ::"r"(&config) : "memory");
  _tile_loadconfig(&config);
}
FASTDL_INLINE void tiles_end() { _tile_release(); }
// 16 rows, 64 bytes apart
#define TILE_ZERO(c) _tile_zero(c)
#define TILE_LOAD(c, p) _tile_loadd(c, p, 64)
#define TILE_STORE(c, p) _tile_stored(c, p, 64)
// C f32[m][n] += sum_k A bf16[m][k] * B bf16[k / 2][n][k % 2], k < 32
#define TILE_DOT_BF16(c, a, b) _tile_dpbf16ps(c, a, b)

#endif

}  // namespace
}  // namespace FASTDL_LEVEL
}  // namespace fastdl
#endif
