// What the kernels of several rooms use to walk over rows of float32, float16 or bfloat16: elements of a format as vectors
// of float32, whole and in part, and dropout. For kernel sources: everything is inlined at their level.
#pragma once

#include "common/formats.h"
#include "common/simd.h"

#define FASTDL_STEP __attribute__((always_inline))  // of a lambda that handles one vector of a row

namespace fastdl {
namespace FASTDL_LEVEL {
namespace {

// The float formats: one element's type, and vectors of LANES.
struct F32 {
  using Element = float;
  FASTDL_INLINE vf load(const Element* p) { return vload(p); }
  FASTDL_INLINE void store(Element* p, vf v) { vstore(p, v); }
};
struct F16 {
  using Element = uint16_t;
  FASTDL_INLINE vf load(const Element* p) { return vload_f16(p); }
  FASTDL_INLINE void store(Element* p, vf v) { vstore_f16(p, v); }
};
struct BF16 {
  using Element = uint16_t;
  FASTDL_INLINE vf load(const Element* p) { return vload_bf16(p); }
  FASTDL_INLINE void store(Element* p, vf v) { vstore_bf16(p, v); }
};

// The first n of LANES elements, zeros behind them.
template <class T>
FASTDL_INLINE vf load_part(const typename T::Element* p, int64_t n) {
  typename T::Element part[LANES] = {};
  memcpy(part, p, (size_t)n * sizeof part[0]);
  return T::load(part);
}

template <class T>
FASTDL_INLINE void store_part(typename T::Element* p, vf v, int64_t n) {
  typename T::Element part[LANES];
  T::store(part, v);
  memcpy(p, part, (size_t)n * sizeof part[0]);
}

// step(at, load, store) for every vector of a row, the last one in part. `load` and `store` take a format's tag.
struct Whole {
  template <class T>
  FASTDL_INLINE vf load(const typename T::Element* p) {
    return T::load(p);
  }
  template <class T>
  FASTDL_INLINE void store(typename T::Element* p, vf v) {
    T::store(p, v);
  }
  FASTDL_INLINE vf keep(vf v) { return v; }
};

struct Part {
  int64_t n;
  template <class T>
  vf load(const typename T::Element* p) const {
    return load_part<T>(p, n);
  }
  template <class T>
  void store(typename T::Element* p, vf v) const {
    store_part<T>(p, v, n);
  }
  // zeros in the lanes past the end
  vf keep(vf v) const {
    float part[LANES];
    vstore(part, v);
    return load_part<F32>(part, n);
  }
};

template <int I>
struct Index {
  static constexpr int value = I;
};

// step(at, part, index) for every vector of a row, the last one in part. Four vectors a turn, with the indices 0 to 3 as
// types: sums kept per index stay in registers and do not wait for each other.
template <class Step>
__attribute__((always_inline)) static inline void for_row(int64_t cols, const Step& step) {
  int64_t k = 0;
  for (; k + 4 * LANES <= cols; k += 4 * LANES) {
    step(k, Whole(), Index<0>());
    step(k + LANES, Whole(), Index<1>());
    step(k + 2 * LANES, Whole(), Index<2>());
    step(k + 3 * LANES, Whole(), Index<3>());
  }
  for (; k + LANES <= cols; k += LANES) step(k, Whole(), Index<0>());
  if (k < cols) step(k, Part{cols - k}, Index<1>());
}

// The same, a vector a turn, for steps that wait for nothing: step(at, part).
template <class Step>
__attribute__((always_inline)) static inline void for_each(int64_t cols, const Step& step) {
  int64_t k = 0;
  for (; k + LANES <= cols; k += LANES) step(k, Whole());
  if (k < cols) step(k, Part{cols - k});
}

FASTDL_INLINE float total(const vf (&sums)[4]) { return vsum(vadd(vadd(sums[0], sums[1]), vadd(sums[2], sums[3]))); }

// Uniform numbers of the elements index .. index + LANES - 1: philox_uniform (common/philox.h) in all lanes at once.
FASTDL_INLINE vf philox_lanes(uint64_t seed, uint64_t index) {
  int32_t low[LANES], high[LANES];
  for (int i = 0; i < LANES; ++i) {
    low[i] = (int32_t)(uint32_t)(index + (uint64_t)i);
    high[i] = (int32_t)(uint32_t)((index + (uint64_t)i) >> 32);
  }
  vi c0 = vloadi(low), c1 = vloadi(high), c2 = vset1i(0), c3 = vset1i(0);
  uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    vi a_high, a_low, b_high, b_low;
    vmul_halves(c0, 0xD2511F53u, &a_high, &a_low);
    vmul_halves(c2, 0xCD9E8D57u, &b_high, &b_low);
    c0 = vxori(vxori(b_high, c1), vset1i((int32_t)k0));
    c1 = b_low;
    c2 = vxori(vxori(a_high, c3), vset1i((int32_t)k1));
    c3 = a_low;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return vmul(vcvt(vxori(c0, vsigni(c0))), vset1(4.6566127342e-10f));
}

// 0 or scale for the elements index .. index + LANES - 1: what philox_dropout gives for each.
FASTDL_INLINE vf dropout(uint64_t seed, int64_t index, float p, float scale) {
  return vselect_le(vset1(p), philox_lanes(seed, (uint64_t)index), vset1(scale), vset1(0.0f));
}

// v * keep, and 0 where keep is 0 (v may be infinite)
FASTDL_INLINE vf dropped(vf v, vf keep) { return vselect_le(keep, vset1(0.0f), vset1(0.0f), vmul(v, keep)); }

// The one switch from formats to types.
template <class Body>
void dispatch(int format, const Body& body) {
  switch (format) {
    case FORMAT_F32: return body(F32());
    case FORMAT_F16: return body(F16());
    case FORMAT_BF16: return body(BF16());
    default: __builtin_unreachable();  // the wrapper has checked
  }
}

// to[c] = from[c] + offset in float32.
inline void to_floats(const void* from, int format, float offset, int64_t cols, float* to) {
  dispatch(format, [&](auto type) {
    using T = decltype(type);
    for_row(cols, [&](int64_t k, const auto& part, auto) {
      const vf v = part.template load<T>((const typename T::Element*)from + k);
      part.template store<F32>(to + k, vadd(v, vset1(offset)));
    });
  });
}

}  // namespace
}  // namespace FASTDL_LEVEL
}  // namespace fastdl
