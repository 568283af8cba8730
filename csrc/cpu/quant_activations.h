// Activations for the products: float rows of x to the blocks of 32 that quant_matmul_kernel.h describes.
#pragma once

#include "common/simd.h"
#include "cpu/quant_matmul_kernel.h"

namespace fastdl {
namespace FASTDL_LEVEL {
namespace {

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

void prepare_int8(const float* x, Q8Block* out) {
  vf largest = vset1(0.0f), check = vset1(0.0f);
  for (int j = 0; j < 32; j += LANES) {
    const vf v = vload(x + j);
    largest = vmax(largest, vabs(v));
    check = vfma(v, vset1(0.0f), check);  // NaN if any value is NaN or infinite: it has to reach the result
  }
  const float bad = vsum(check);  // 0 or NaN
  if (bad != bad) {
    memset(out, 0, sizeof *out);
    out->d = out->sum = bad;
    return;
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
  out->d = usable ? amax / 127.0f : 0.0f;
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

}  // namespace
}  // namespace FASTDL_LEVEL
}  // namespace fastdl
