// The recurrence h = a h + b and its gradient, for one level.
//
// Channels stand in the lanes of vectors, so that no number crosses lanes; a step is a row of a, of b and of h, read and
// written in the order of memory, with the states in the first-level cache. Four vectors or fewer keep them in registers.
// Complex numbers are taken apart into vectors of real and imaginary parts. Floor: the bytes of a, b and h over the
// bandwidth; the arithmetic is one operation an element (complex: four).
//
// Test: pytest tests/test_linear_scan.py
#include "cpu/linear_scan_kernel.h"

#include "cpu/rows_kernel.h"

namespace fastdl {
namespace FASTDL_LEVEL {
namespace {

// A kind of number: vectors of LANES of them (V), their loads and stores, and the arithmetic of the recurrence.
template <class T>
struct Real {
  using Element = typename T::Element;
  using V = vf;
  static constexpr int FLOATS = 1;  // of a state
  FASTDL_INLINE V load(const Element* p, int64_t n) { return n >= LANES ? T::load(p) : load_part<T>(p, n); }
  FASTDL_INLINE void store(Element* p, V v, int64_t n) {
    if (n >= LANES)
      T::store(p, v);
    else
      store_part<T>(p, v, n);
  }
  FASTDL_INLINE V load_state(const float* p, int64_t n) { return Real<F32>::load(p, n); }
  FASTDL_INLINE void store_state(float* p, V v, int64_t n) { Real<F32>::store(p, v, n); }
  FASTDL_INLINE V fill(float x) { return vset1(x); }
  FASTDL_INLINE V add(V x, V y) { return vadd(x, y); }
  FASTDL_INLINE V mul(V x, V y) { return vmul(x, y); }
  FASTDL_INLINE V fma(V x, V y, V z) { return vfma(x, y, z); }
  FASTDL_INLINE V conj(V x) { return x; }
  FASTDL_INLINE V where_zero(V x, V then, V otherwise) {  // where x is 0, then; else otherwise
    return vselect_le(vabs(x), vset1(0.0f), then, otherwise);
  }
};

struct Pair {
  vf re, im;
};

struct Complex {
  using Element = float[2];
  using V = Pair;
  static constexpr int FLOATS = 2;
  FASTDL_INLINE V load_state(const float* p, int64_t n) {
    float part[2 * LANES] = {};
    if (n < LANES) {
      memcpy(part, p, (size_t)n * 8);
      p = part;
    }
    Pair v;
    vload_pairs(p, &v.re, &v.im);
    return v;
  }
  FASTDL_INLINE void store_state(float* p, V v, int64_t n) {
    if (n >= LANES) {
      vstore_pairs(p, v.re, v.im);
      return;
    }
    float part[2 * LANES];
    vstore_pairs(part, v.re, v.im);
    memcpy(p, part, (size_t)n * 8);
  }
  FASTDL_INLINE V load(const Element* p, int64_t n) { return load_state(*p, n); }
  FASTDL_INLINE void store(Element* p, V v, int64_t n) { store_state(*p, v, n); }
  FASTDL_INLINE V fill(float x) { return {vset1(x), vset1(0.0f)}; }
  FASTDL_INLINE V add(V x, V y) { return {vadd(x.re, y.re), vadd(x.im, y.im)}; }
  FASTDL_INLINE V mul(V x, V y) {
    return {vsub(vmul(x.re, y.re), vmul(x.im, y.im)), vfma(x.re, y.im, vmul(x.im, y.re))};
  }
  FASTDL_INLINE V fma(V x, V y, V z) { return add(mul(x, y), z); }
  FASTDL_INLINE V conj(V x) { return {x.re, vsub(vset1(0.0f), x.im)}; }
  FASTDL_INLINE V where_zero(V x, V then, V otherwise) {
    const vf zero = vset1(0.0f), size = vadd(vabs(x.re), vabs(x.im));
    return {vselect_le(size, zero, then.re, otherwise.re), vselect_le(size, zero, then.im, otherwise.im)};
  }
};

template <class K>
FASTDL_INLINE const typename K::Element* row(const LinearScanTrack& x, int64_t n, int64_t t) {
  return (const typename K::Element*)x.data + n * x.batch + t * x.step;
}

template <class K>
FASTDL_INLINE typename K::Element* row(const LinearScanOut& x, int64_t n, int64_t t) {
  return (typename K::Element*)x.data + n * x.batch + t * x.step;
}

// One step for `count` channels from c on: the state before in, the state after returned, outputs written.
template <class K>
struct Forward {
  using V = typename K::V;
  const typename K::Element *a, *b;
  typename K::Element* h;

  FASTDL_INLINE void walk(const LinearScanArgs&, const LinearScanPiece& p, int64_t i, int64_t* t) { *t = p.t0 + i; }
  FASTDL_INLINE Forward at(const LinearScanArgs& s, int64_t n, int64_t t) {
    return {row<K>(s.a, n, t), row<K>(s.b, n, t), row<K>(s.out, n, t)};
  }
  FASTDL_INLINE V coefficient(const Forward& s, int64_t c, int64_t count) { return K::load(s.a + c, count); }
  FASTDL_INLINE V next(const Forward& s, V a, V state, int64_t c, int64_t count) {
    return K::fma(a, state, K::load(s.b + c, count));
  }
  FASTDL_INLINE V write(const Forward& s, V state, int64_t c, int64_t count) {
    const V after = next(s, coefficient(s, c, count), state, c, count);
    K::store(s.h + c, after, count);
    return after;
  }
};

template <class K>
struct Backward {
  using V = typename K::V;
  const typename K::Element *a, *grad, *before;  // before: h of the step before, or null at step 0
  const float* h0;                               // or null
  typename K::Element *db, *da;                  // da: or null

  FASTDL_INLINE void walk(const LinearScanArgs&, const LinearScanPiece& p, int64_t i, int64_t* t) { *t = p.t1 - 1 - i; }
  FASTDL_INLINE Backward at(const LinearScanArgs& s, int64_t n, int64_t t) {
    return {row<K>(s.a, n, t),
            row<K>(s.b, n, t),
            t > 0 ? row<K>(s.h, n, t - 1) : nullptr,
            s.h0 ? s.h0 + n * s.channels * K::FLOATS : nullptr,
            row<K>(s.out, n, t),
            s.da.data ? row<K>(s.da, n, t) : nullptr};
  }
  FASTDL_INLINE V coefficient(const Backward& s, int64_t c, int64_t count) { return K::conj(K::load(s.a + c, count)); }
  FASTDL_INLINE V next(const Backward& s, V a, V state, int64_t c, int64_t count) {
    return K::mul(a, K::add(K::load(s.grad + c, count), state));
  }
  FASTDL_INLINE V write(const Backward& s, V state, int64_t c, int64_t count) {
    const V g = K::add(K::load(s.grad + c, count), state);
    K::store(s.db + c, g, count);
    if (s.da) {
      const V before = s.before ? K::load(s.before + c, count)
                       : s.h0   ? K::load_state(s.h0 + c * K::FLOATS, count)
                                : K::fill(0.0f);
      K::store(s.da + c, K::mul(g, K::conj(before)), count);
    }
    return K::mul(coefficient(s, c, count), g);
  }
};

// step(c, count) for the vectors of channels c0 .. c1; count is LANES but for the last, where it may be less.
template <class Step>
__attribute__((always_inline)) static inline void for_channels(int64_t c0, int64_t c1, const Step& step) {
  int64_t c = c0;
  for (; c + LANES <= c1; c += LANES) step(c, LANES);
  if (c < c1) step(c, c1 - c);
}

// N vectors of channels with their states in registers; the last one has `last` channels.
template <class Direction, class K, int N>
void run_few(const LinearScanArgs& a, const LinearScanPiece& p, int64_t last, float* state) {
  typename K::V v[N];
  for (int i = 0; i < N; ++i) v[i] = K::load_state(state + (p.c0 + i * LANES) * K::FLOATS, i + 1 < N ? LANES : last);
  for (int64_t i = 0, t; i < p.t1 - p.t0; ++i) {
    Direction::walk(a, p, i, &t);
    const Direction s = Direction::at(a, p.n, t);
#pragma GCC unroll 4
    for (int j = 0; j < N; ++j) v[j] = Direction::write(s, v[j], p.c0 + j * LANES, j + 1 < N ? LANES : last);
  }
  for (int i = 0; i < N; ++i) K::store_state(state + (p.c0 + i * LANES) * K::FLOATS, v[i], i + 1 < N ? LANES : last);
}

template <class Direction, class K>
void run(const LinearScanArgs& a, const LinearScanPiece& p, float* state) {
  const int64_t vectors = (p.c1 - p.c0 + LANES - 1) / LANES, last = p.c1 - p.c0 - (vectors - 1) * LANES;
  switch (vectors) {
    case 1: return run_few<Direction, K, 1>(a, p, last, state);
    case 2: return run_few<Direction, K, 2>(a, p, last, state);
    case 3: return run_few<Direction, K, 3>(a, p, last, state);
    case 4: return run_few<Direction, K, 4>(a, p, last, state);
    default: break;
  }
  for (int64_t i = 0, t; i < p.t1 - p.t0; ++i) {
    Direction::walk(a, p, i, &t);
    const Direction s = Direction::at(a, p.n, t);
    for_channels(p.c0, p.c1, [&](int64_t c, int64_t count) FASTDL_STEP {
      float* const mine = state + c * K::FLOATS;
      K::store_state(mine, Direction::write(s, K::load_state(mine, count), c, count), count);
    });
  }
}

template <class Direction, class K>
void summarize(const LinearScanArgs& a, const LinearScanPiece& p, float* product, float* end) {
  for_channels(p.c0, p.c1, [&](int64_t c, int64_t count) FASTDL_STEP {
    typename K::V whole = K::fill(1.0f), state = K::fill(0.0f);
    for (int64_t i = 0, t; i < p.t1 - p.t0; ++i) {
      Direction::walk(a, p, i, &t);
      const Direction s = Direction::at(a, p.n, t);
      const typename K::V factor = Direction::coefficient(s, c, count);
      whole = K::mul(whole, factor);
      state = Direction::next(s, factor, state, c, count);
    }
    K::store_state(product + c * K::FLOATS, whole, count);
    K::store_state(end + c * K::FLOATS, state, count);
  });
}

template <class K>
void carry(int64_t c0, int64_t c1, const float* product, const float* end, const float* before, float* after) {
  for_channels(c0, c1, [&](int64_t c, int64_t count) FASTDL_STEP {
    const int64_t at = c * K::FLOATS;
    const typename K::V state = K::load_state(before + at, count), last = K::load_state(end + at, count);
    const typename K::V moved = K::fma(K::load_state(product + at, count), state, last);
    K::store_state(after + at, K::where_zero(state, last, moved), count);
  });
}

// body(K, direction) for the numbers and the direction of the call.
template <class Body>
void choose(const LinearScanArgs& a, const Body& body) {
  const auto with = [&](auto kind) {
    using K = decltype(kind);
    if (a.backward)
      body(kind, Backward<K>());
    else
      body(kind, Forward<K>());
  };
  if (a.complex) return with(Complex());
  dispatch(a.format, [&](auto type) { with(Real<decltype(type)>()); });
}

void run_any(const LinearScanArgs& a, const LinearScanPiece& piece, float* state) {
  choose(a, [&](auto kind, auto direction) { run<decltype(direction), decltype(kind)>(a, piece, state); });
}

void summarize_any(const LinearScanArgs& a, const LinearScanPiece& piece, float* product, float* end) {
  choose(a, [&](auto kind, auto direction) { summarize<decltype(direction), decltype(kind)>(a, piece, product, end); });
}

void carry_any(const LinearScanArgs& a, int64_t c0, int64_t c1, const float* product, const float* end,
               const float* before, float* after) {
  if (a.complex) return carry<Complex>(c0, c1, product, end, before, after);
  carry<Real<F32>>(c0, c1, product, end, before, after);
}

}  // namespace

extern const LinearScanKernels linear_scan_kernels;
const LinearScanKernels linear_scan_kernels = {run_any, summarize_any, carry_any};

}  // namespace FASTDL_LEVEL
}  // namespace fastdl
