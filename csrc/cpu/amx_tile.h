// AMX tiles behind named functions, with a twin in plain C so that the AMX path runs (slowly) where there is no AMX.
//
// A tile is 16 rows of 64 bytes. Tiles 0-3 accumulate, 4 and 5 hold the operands. The instructions take the tile's
// number as an immediate, hence the template arguments.
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
template <int C>
FASTDL_INLINE void tile_zero() {
  memset(twin_tiles[C], 0, sizeof twin_tiles[C]);
}
template <int C>
FASTDL_INLINE void tile_load(const void* p) {  // 16 rows, 64 bytes apart
  memcpy(twin_tiles[C], p, sizeof twin_tiles[C]);
}
template <int C>
FASTDL_INLINE void tile_store(void* p) {
  memcpy(p, twin_tiles[C], sizeof twin_tiles[C]);
}
// C f32[m][n] += sum_k A bf16[m][k] * B bf16[k / 2][n][k % 2], k < 32
template <int C, int A, int B>
FASTDL_INLINE void tile_dot_bf16() {
  float* c = (float*)twin_tiles[C];
  const uint16_t* a = (const uint16_t*)twin_tiles[A];
  const uint16_t* b = (const uint16_t*)twin_tiles[B];
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
template <int C>
FASTDL_INLINE void tile_zero() {
  _tile_zero(C);
}
template <int C>
FASTDL_INLINE void tile_load(const void* p) {
  _tile_loadd(C, p, 64);
}
template <int C>
FASTDL_INLINE void tile_store(void* p) {
  _tile_stored(C, p, 64);
}
template <int C, int A, int B>
FASTDL_INLINE void tile_dot_bf16() {
  _tile_dpbf16ps(C, A, B);
}

#endif

}  // namespace
}  // namespace FASTDL_LEVEL
}  // namespace fastdl
#endif
