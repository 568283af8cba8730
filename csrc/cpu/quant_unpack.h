// From a panel's bytes to registers, one class a weight format: what a new format has to write.
//
// INT8 products use `Block` (codes and scales of 32 k in LANES rows) and `fold`; all others use `unpack`, which gives
// 8 consecutive k as float32. A format whose weights are no integers has HAS_INT8 = false.
#pragma once

#include "common/simd.h"
#include "cpu/quant_matmul_kernel.h"

namespace fastdl {
namespace FASTDL_LEVEL {
namespace {

// 4-bit codes of 32 k from 4 vectors (64 bytes apart): w[j] holds k = 4j .. 4j+3.
FASTDL_INLINE void load_nibbles(const uint8_t* p, vb* w) {
  const vb low = bset1(0x0f);
#pragma GCC unroll 4
  for (int v = 0; v < 4; ++v) {
    const vb raw = bload(p + 64 * v);
    w[v] = band(raw, low);
    w[v + 4] = band(bshr<4>(raw), low);
  }
}

// 8 codes (two vectors) to float32, k = 0 .. 7.
FASTDL_INLINE void codes_to_float(const vb* w, vf* out) {
#pragma GCC unroll 2
  for (int j = 0; j < 2; ++j) {
    out[4 * j + 0] = vbyte<0>(w[j]);
    out[4 * j + 1] = vbyte<1>(w[j]);
    out[4 * j + 2] = vbyte<2>(w[j]);
    out[4 * j + 3] = vbyte<3>(w[j]);
  }
}

struct Q4_1 {
  static constexpr bool HAS_INT8 = true;
  struct Block {
    vb w[8];
    vf d, m;
  };
  FASTDL_INLINE Block load(const uint8_t* panel, int64_t, int64_t b, int h) {
    const uint8_t* p = panel + b * 320;
    Block r;
    r.d = vload_f16((const uint16_t*)p + h * LANES);
    r.m = vload_f16((const uint16_t*)(p + 32) + h * LANES);
    load_nibbles(p + 64 + h * LANES * 4, r.w);
    return r;
  }
  // acc + (d q + m) . x = acc + d_x d (q . q_x) + m sum(x)
  FASTDL_INLINE vf fold(vf acc, const Block& w, const Q8Block& x) {
    const vi dot = vdot<4, 8>(vset1i(0), w.w, x.q);
    acc = vfma(vcvt(dot), vmul(w.d, vset1(x.d)), acc);
    return vfma(w.m, vset1(x.sum), acc);
  }
  // k = 32b + 8q .. 32b + 8q + 7
  FASTDL_INLINE void unpack(const uint8_t* panel, int64_t, int64_t b, int q, int h, vf* out) {
    const uint8_t* p = panel + b * 320;
    const vf d = vload_f16((const uint16_t*)p + h * LANES);
    const vf m = vload_f16((const uint16_t*)(p + 32) + h * LANES);
    vb w[2];
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {
      const vb raw = bload(p + 64 + 64 * ((2 * q + j) & 3) + h * LANES * 4);
      w[j] = band(q < 2 ? raw : bshr<4>(raw), bset1(0x0f));
    }
    codes_to_float(w, out);
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) out[i] = vfma(out[i], d, m);
  }
};

struct Q8_0 {
  static constexpr bool HAS_INT8 = true;
  struct Block {
    vb w[8];
    vf d;
  };
  FASTDL_INLINE vb load_codes(const uint8_t* panel, int64_t cols, int64_t b, int j, int h) {
    return bload(panel + q8_header_bytes(cols) + b * 512 + 64 * j + h * LANES * 4);
  }
  FASTDL_INLINE Block load(const uint8_t* panel, int64_t cols, int64_t b, int h) {
    Block r;
    r.d = vload_f16((const uint16_t*)panel + b * PANEL + h * LANES);
#pragma GCC unroll 8
    for (int j = 0; j < 8; ++j) {
      r.w[j] = load_codes(panel, cols, b, j, h);
      if (SIGNED_CODES) r.w[j] = bxor(r.w[j], bset1(0x80));
    }
    return r;
  }
  // The stored code is q + 128 where products are unsigned x signed: the sum starts from -128 sum(q_x).
  FASTDL_INLINE vf fold(vf acc, const Block& w, const Q8Block& x) {
    const vi start = SIGNED_CODES ? vset1i(0) : vstart<7>(x.nsum[0] + x.nsum[1]);
    return vfma(vcvt(vdot<8, 8>(start, w.w, x.q)), vmul(w.d, vset1(x.d)), acc);
  }
  FASTDL_INLINE void unpack(const uint8_t* panel, int64_t cols, int64_t b, int q, int h, vf* out) {
    const vf d = vload_f16((const uint16_t*)panel + b * PANEL + h * LANES);
    vb w[2];
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) w[j] = load_codes(panel, cols, b, 2 * q + j, h);
    codes_to_float(w, out);
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) out[i] = vmul(vsub(out[i], vset1(128.0f)), d);
  }
};

struct Q6_K {
  static constexpr bool HAS_INT8 = true;
  struct Block {
    vb w[8];
    vf d[2];
  };
  // d * scale of sub-block i (16 k each) of superblock p
  FASTDL_INLINE vf scale(const uint8_t* p, int i, int h) {
    const vf d = vload_f16((const uint16_t*)p + h * LANES);
    return vmul(d, vload_i8((const int8_t*)p + 64 + i * PANEL + h * LANES));
  }
  FASTDL_INLINE vb high_bits(const uint8_t* codes, int j, int h) {
    const vb raw = bload(codes + 256 + 64 * (j / 4) + h * LANES * 4);
    const vb mask = bset1(0x30);
    switch (j % 4) {
      case 0: return band(bshl<4>(raw), mask);
      case 1: return band(bshl<2>(raw), mask);
      case 2: return band(raw, mask);
      default: return band(bshr<2>(raw), mask);
    }
  }
  FASTDL_INLINE Block load(const uint8_t* panel, int64_t, int64_t b, int h) {
    const uint8_t* p = panel + b / 8 * 3392;
    const uint8_t* codes = p + 320 + (b % 8) * 384;
    Block r;
    r.d[0] = scale(p, 2 * (int)(b % 8), h);
    r.d[1] = scale(p, 2 * (int)(b % 8) + 1, h);
    load_nibbles(codes + h * LANES * 4, r.w);
#pragma GCC unroll 8
    for (int j = 0; j < 8; ++j) r.w[j] = bor(r.w[j], high_bits(codes, j, h));
    return r;
  }
  // value = d * scale * (code - 32): each half of the block starts from -32 sum(q_x)
  FASTDL_INLINE vf fold(vf acc, const Block& w, const Q8Block& x) {
    const vf dx = vset1(x.d);
    acc = vfma(vcvt(vdot<6, 4>(vstart<5>(x.nsum[0]), w.w, x.q)), vmul(w.d[0], dx), acc);
    return vfma(vcvt(vdot<6, 4>(vstart<5>(x.nsum[1]), w.w + 4, x.q + 16)), vmul(w.d[1], dx), acc);
  }
  FASTDL_INLINE void unpack(const uint8_t* panel, int64_t, int64_t b, int q, int h, vf* out) {
    const uint8_t* p = panel + b / 8 * 3392;
    const uint8_t* codes = p + 320 + (b % 8) * 384;
    const vf d = scale(p, 2 * (int)(b % 8) + q / 2, h);
    vb w[2];
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {
      const vb raw = bload(codes + 64 * ((2 * q + j) & 3) + h * LANES * 4);
      w[j] = bor(band(q < 2 ? raw : bshr<4>(raw), bset1(0x0f)), high_bits(codes, 2 * q + j, h));
    }
    codes_to_float(w, out);
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) out[i] = vmul(vsub(out[i], vset1(32.0f)), d);
  }
};

struct F32 {
  static constexpr bool HAS_INT8 = false;
  FASTDL_INLINE void unpack(const uint8_t* panel, int64_t cols, int64_t b, int q, int h, vf* out) {
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
      const int64_t k = b * 32 + q * 8 + i;
      out[i] = k < cols ? vload((const float*)panel + k * PANEL + h * LANES) : vset1(0.0f);
    }
  }
};

struct F16 {
  static constexpr bool HAS_INT8 = false;
  FASTDL_INLINE void unpack(const uint8_t* panel, int64_t cols, int64_t b, int q, int h, vf* out) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const int64_t pair = b * 16 + q * 4 + i;
      const vb raw = pair * 2 < cols ? bload(panel + pair * 64 + h * LANES * 4) : bset1(0);
      out[2 * i] = vpair_f16_lo(raw);
      out[2 * i + 1] = vpair_f16_hi(raw);
    }
  }
};

struct BF16 {
  static constexpr bool HAS_INT8 = false;
  FASTDL_INLINE void unpack(const uint8_t* panel, int64_t cols, int64_t b, int q, int h, vf* out) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const int64_t pair = b * 16 + q * 4 + i;
      const vb raw = pair * 2 < cols ? bload(panel + pair * 64 + h * LANES * 4) : bset1(0);
      out[2 * i] = vpair_bf16_lo(raw);
      out[2 * i + 1] = vpair_bf16_hi(raw);
    }
  }
};

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

}  // namespace
}  // namespace FASTDL_LEVEL
}  // namespace fastdl
