// The products, one class a precision: `load` brings one step of a block's weights into registers, `fold` adds one
// token's product with them to its sums. quant_unpack.h knows the formats.
#pragma once

#include "cpu/quant_unpack.h"

namespace fastdl {
namespace FASTDL_LEVEL {
namespace {

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

}  // namespace
}  // namespace FASTDL_LEVEL
}  // namespace fastdl
