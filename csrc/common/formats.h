// Weight formats: their numbers are ggml's type ids, their sizes those of GGUF, and the panel layout the kernels read.
//
// GGUF keeps a weight matrix row by row. The kernels keep it in panels of 16 rows, the rows side by side in the lanes of
// a vector and k in groups of 4, so that a product with one activation vector needs no horizontal sum:
//
//   Q4_1  panel: for each block of 32 k (320 bytes): d f16[16 rows], m f16[16], then 4 vectors v of 64 bytes;
//         byte 4r+i of vector v is the file's byte qs[4v+i] of row r (low nibble k = 4v+i, high nibble k = 16+4v+i)
//   Q8_0  panel: d f16[blocks][16], padded to 64 bytes; then for each block 8 vectors j: byte 4r+i = q[4j+i] + 128
//   Q6_K  panel: for each superblock of 256 k (3392 bytes): d f16[16], 32 bytes of zeros, scale i8[16 sub-blocks][16];
//         then for each 32 k: 4 vectors v of low nibbles as in Q4_1, 2 vectors h whose bits 2p and 2p+1 in byte 4r+i are
//         the high bits of the code of k = 4(4h+p)+i
//   F16, BF16  panel: [ceil(cols/2)][16 rows][2]          F32  panel: [cols][16 rows]
//
// Rows past the end of the last panel are zeros. Packing loses nothing: quant_unpack gives the file's bytes back.
#pragma once

#include <stdint.h>

namespace fastdl {

enum Format : int {
  FORMAT_F32 = 0,
  FORMAT_F16 = 1,
  FORMAT_Q4_1 = 3,
  FORMAT_Q8_0 = 8,
  FORMAT_Q6_K = 14,
  FORMAT_BF16 = 30
};
enum Precision : int { PRECISION_FP32 = 0, PRECISION_BF16 = 1, PRECISION_INT8 = 2 };

static inline bool format_known(int f) {
  return f == FORMAT_F32 || f == FORMAT_F16 || f == FORMAT_Q4_1 || f == FORMAT_Q8_0 || f == FORMAT_Q6_K ||
         f == FORMAT_BF16;
}

// Integer codes, so that products with 8-bit activations exist.
static inline bool format_has_int8(int f) { return f == FORMAT_Q4_1 || f == FORMAT_Q8_0 || f == FORMAT_Q6_K; }

// The number of columns must divide by this.
static inline int64_t format_block(int f) {
  return f == FORMAT_Q6_K ? 256 : f == FORMAT_Q4_1 || f == FORMAT_Q8_0 ? 32 : 1;
}

static inline int64_t row_bytes(int f, int64_t cols) {
  switch (f) {
    case FORMAT_Q4_1: return cols / 32 * 20;
    case FORMAT_Q8_0: return cols / 32 * 34;
    case FORMAT_Q6_K: return cols / 256 * 210;
    case FORMAT_F32: return cols * 4;
    default: return cols * 2;
  }
}

static inline int64_t q8_header_bytes(int64_t cols) { return (cols + 63) / 64 * 64; }  // 32 bytes a block of 32

static inline int64_t panel_bytes(int f, int64_t cols) {
  switch (f) {
    case FORMAT_Q4_1: return cols / 32 * 320;
    case FORMAT_Q8_0: return q8_header_bytes(cols) + cols / 32 * 512;
    case FORMAT_Q6_K: return cols / 256 * 3392;
    case FORMAT_F32: return cols * 64;
    default: return (cols + 1) / 2 * 64;
  }
}

static inline int64_t panel_count(int64_t rows) { return (rows + 15) / 16; }

}  // namespace fastdl
