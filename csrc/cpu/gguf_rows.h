// One row of a weight matrix in GGUF's formats, to floats and back. Plain C++, compiled once; nothing here is hot.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "common/formats.h"
#include "common/half.h"

namespace fastdl {
namespace {

template <class T>
T load(const uint8_t* p) {
  T v;
  memcpy(&v, p, sizeof v);
  return v;
}

float bf16_value(uint16_t h) {
  const uint32_t u = (uint32_t)h << 16;
  float x;
  memcpy(&x, &u, 4);
  return x;
}

uint16_t bf16_bits(float x) {
  uint32_t u;
  memcpy(&u, &x, 4);
  if ((u & 0x7fffffffu) > 0x7f800000u) return (uint16_t)((u >> 16) | 0x40u);
  return (uint16_t)((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
}

// Six-bit codes of a superblock in order, from GGUF's ql[128] qh[64]; and back.
void q6_codes(const uint8_t* row, uint8_t* code) {
  const uint8_t *ql = row, *qh = row + 128;
  for (int half = 0; half < 2; ++half, ql += 64, qh += 32, code += 128)
    for (int l = 0; l < 32; ++l) {
      code[l] = (uint8_t)((ql[l] & 15) | (qh[l] & 3) << 4);
      code[l + 32] = (uint8_t)((ql[l + 32] & 15) | (qh[l] >> 2 & 3) << 4);
      code[l + 64] = (uint8_t)(ql[l] >> 4 | (qh[l] >> 4 & 3) << 4);
      code[l + 96] = (uint8_t)(ql[l + 32] >> 4 | (qh[l] >> 6 & 3) << 4);
    }
}

void q6_bits(const uint8_t* code, uint8_t* row) {
  uint8_t *ql = row, *qh = row + 128;
  for (int half = 0; half < 2; ++half, ql += 64, qh += 32, code += 128)
    for (int l = 0; l < 32; ++l) {
      ql[l] = (uint8_t)((code[l] & 15) | code[l + 64] << 4);
      ql[l + 32] = (uint8_t)((code[l + 32] & 15) | code[l + 96] << 4);
      qh[l] = (uint8_t)(code[l] >> 4 | code[l + 32] >> 4 << 2 | code[l + 64] >> 4 << 4 | code[l + 96] >> 4 << 6);
    }
}

void dequantize_row(int format, const uint8_t* row, int64_t cols, float* out) {
  switch (format) {
    case FORMAT_Q4_1:
      for (int64_t b = 0; b < cols / 32; ++b, row += 20, out += 32) {
        const float d = half_to_float(load<uint16_t>(row)), m = half_to_float(load<uint16_t>(row + 2));
        for (int j = 0; j < 16; ++j) {
          out[j] = (float)(row[4 + j] & 15) * d + m;
          out[j + 16] = (float)(row[4 + j] >> 4) * d + m;
        }
      }
      return;
    case FORMAT_Q8_0:
      for (int64_t b = 0; b < cols / 32; ++b, row += 34, out += 32) {
        const float d = half_to_float(load<uint16_t>(row));
        for (int j = 0; j < 32; ++j) out[j] = (float)(int8_t)row[2 + j] * d;
      }
      return;
    case FORMAT_Q6_K: {
      uint8_t code[256];
      for (int64_t s = 0; s < cols / 256; ++s, row += 210, out += 256) {
        const float d = half_to_float(load<uint16_t>(row + 208));
        q6_codes(row, code);
        for (int k = 0; k < 256; ++k) out[k] = d * (float)(int8_t)row[192 + k / 16] * (float)((int)code[k] - 32);
      }
      return;
    }
    case FORMAT_F32: memcpy(out, row, (size_t)cols * 4); return;
    case FORMAT_F16:
      for (int64_t k = 0; k < cols; ++k) out[k] = half_to_float(load<uint16_t>(row + 2 * k));
      return;
    default:
      for (int64_t k = 0; k < cols; ++k) out[k] = bf16_value(load<uint16_t>(row + 2 * k));
  }
}

// ggml's rules to the bit: codes come from the unrounded scale, which is then stored in fp16.
void quantize_row(int format, const float* x, int64_t cols, uint8_t* row) {
  if (format == FORMAT_Q4_1) {
    for (int64_t b = 0; b < cols / 32; ++b, x += 32, row += 20) {
      float low = x[0], high = x[0];
      for (int j = 1; j < 32; ++j) low = x[j] < low ? x[j] : low, high = x[j] > high ? x[j] : high;
      const float d = (high - low) / 15, inverse = d != 0 ? 1 / d : 0;
      const uint16_t bits[2] = {float_to_half(d), float_to_half(low)};
      memcpy(row, bits, 4);
      for (int j = 0; j < 16; ++j) {
        const int a = (int)((x[j] - low) * inverse + 0.5f), c = (int)((x[j + 16] - low) * inverse + 0.5f);
        row[4 + j] = (uint8_t)((a < 15 ? a : 15) | (c < 15 ? c : 15) << 4);
      }
    }
  } else if (format == FORMAT_Q8_0) {
    for (int64_t b = 0; b < cols / 32; ++b, x += 32, row += 34) {
      float largest = 0;
      for (int j = 0; j < 32; ++j) largest = std::fabs(x[j]) > largest ? std::fabs(x[j]) : largest;
      const float d = largest / 127, inverse = d != 0 ? 1 / d : 0;
      const uint16_t bits = float_to_half(d);
      memcpy(row, &bits, 2);
      for (int j = 0; j < 32; ++j) row[2 + j] = (uint8_t)(int8_t)std::round(x[j] * inverse);
    }
  } else if (format == FORMAT_F32) {
    memcpy(row, x, (size_t)cols * 4);
  } else {
    for (int64_t k = 0; k < cols; ++k) {
      const uint16_t bits = format == FORMAT_F16 ? float_to_half(x[k]) : bf16_bits(x[k]);
      memcpy(row + 2 * k, &bits, 2);
    }
  }
}

}  // namespace
}  // namespace fastdl
