// The selective scan, forward and backward, for one level.
//
// Channels stand in the lanes of vectors; a vector's states [state] stay in the first-level cache while 16 steps pass.
// Backward goes chunk by chunk from the end: 16 steps are run again from the kept state, with every h and decay in a
// buffer, and then walked back. Sums over channels (dB, dC) are kept as vectors over the blocks of the range and added
// across lanes once a chunk. Floor: one exp a channel, state and step, some 15 operations.
//
// Test: pytest tests/test_selective_scan.py
#include "cpu/selective_scan_kernel.h"

#include "common/simd_math.h"
#include "cpu/rows_kernel.h"

namespace fastdl {
namespace FASTDL_LEVEL {
namespace {

constexpr int64_t CHUNK = 16;

// log(1 + e^x) = max(x, 0) + log(1 + u), u = e^-|x|: with s = u / (2 + u) <= 1/3 the logarithm is 2 artanh(s), a series.
FASTDL_INLINE vf vsoftplus(vf x) {
  constexpr float c[] = {2.0f, 2.0f / 3, 2.0f / 5, 2.0f / 7, 2.0f / 9, 2.0f / 11, 2.0f / 13, 2.0f / 15};
  const vf u = vexp(vsub(vset1(0.0f), vabs(x))), s = vdiv(u, vadd(vset1(2.0f), u));
  return vfma(s, vpoly(vmul(s, s), c), vmax(vset1(0.0f), x));  // in this order NaN stays NaN
}

FASTDL_INLINE vf load(const float* p) { return vload(p); }

template <class T>
FASTDL_INLINE vf load(const SelectiveScanTrack& x, int64_t n, int64_t t, int64_t c, int64_t count) {
  const auto* p = (const typename T::Element*)x.data + n * x.batch + t * x.step + c;
  return count >= LANES ? T::load(p) : load_part<T>(p, count);
}

template <class T>
FASTDL_INLINE void put(void* to, int64_t at, vf v, int64_t count) {
  auto* p = (typename T::Element*)to + at;
  if (count >= LANES)
    T::store(p, v);
  else
    store_part<T>(p, v, count);
}

// Rows of B or C of the steps t0 .. t1 as floats: to [steps][state].
template <class T>
FASTDL_INLINE void to_rows(const SelectiveScanTrack& m, int64_t n, int64_t t0, int64_t t1, int64_t state, float* to) {
  for (int64_t t = t0; t < t1; ++t)
    for_each(state, [&](int64_t k, const auto& part) FASTDL_STEP {
      const auto* row = (const typename T::Element*)m.data + n * m.batch + t * m.step;
      part.template store<F32>(to + (t - t0) * state + k, part.template load<T>(row + k));
    });
}

// dt of a step, and its derivative for delta.
template <class T>
FASTDL_INLINE vf step_size(const SelectiveScanArgs& a, int64_t n, int64_t t, int64_t c, int64_t count, vf* slope) {
  const vf raw = vadd(load<T>(a.delta, n, t, c, count), load(a.bias + c));
  *slope = vset1(1.0f);
  if (!a.softplus) return raw;
  vf unused;
  *slope = vsigmoid(raw, &unused);
  return vsoftplus(raw);
}

template <class T>
void forward(const SelectiveScanArgs& a, const SelectiveScanRange& r) {
  float *const rows_b = r.scratch, *const rows_c = rows_b + CHUNK * a.state;
  for (int64_t k = 0; k < a.chunks; ++k) {
    const int64_t t0 = k * CHUNK, t1 = t0 + CHUNK < a.length ? t0 + CHUNK : a.length;
    to_rows<T>(a.b, r.n, t0, t1, a.state, rows_b);
    to_rows<T>(a.c, r.n, t0, t1, a.state, rows_c);
    for (int64_t c = r.c0; c < r.c1; c += LANES) {
      const int64_t count = r.c1 - c;
      if (a.states)
        for (int64_t s = 0; s < a.state; ++s)
          put<F32>(a.states, ((r.n * a.chunks + k) * a.state + s) * a.dim + c, load(r.h + s * a.stride + c), count);
      for (int64_t t = t0; t < t1; ++t) {
        vf slope;
        const vf dt = step_size<T>(a, r.n, t, c, count, &slope), x = load<T>(a.x, r.n, t, c, count);
        const vf dtx = vmul(dt, x);
        const float *b = rows_b + (t - t0) * a.state, *cs = rows_c + (t - t0) * a.state;
        vf y = vmul(load(a.d + c), x);
        for (int64_t s = 0; s < a.state; ++s) {
          float* const h = r.h + s * a.stride + c;
          const vf decay = vexp(vmul(dt, load(a.a + s * a.stride + c)));
          const vf now = vfma(decay, vload(h), vmul(dtx, vset1(b[s])));
          vstore(h, now);
          y = vfma(now, vset1(cs[s]), y);
        }
        if (a.z.data) {
          const vf z = load<T>(a.z, r.n, t, c, count);
          vf unused;
          y = vmul(y, vmul(z, vsigmoid(z, &unused)));
        }
        put<T>(a.y, (r.n * a.length + t) * a.dim + c, y, count);
      }
    }
  }
}

// What a chunk of one vector of channels keeps: rows of LANES floats.
struct Buffer {
  float *h, *decay;           // [CHUNK + 1][state], [CHUNK][state]
  float *dt, *x, *g, *slope;  // [CHUNK]

  Buffer(float* p, int64_t state) {
    h = p;
    decay = h + (CHUNK + 1) * state * LANES;
    dt = decay + CHUNK * state * LANES;
    x = dt + CHUNK * LANES;
    g = x + CHUNK * LANES;
    slope = g + CHUNK * LANES;
  }
};

// The steps t0 .. t1 again, from the kept state: fills the buffer, and writes dz.
template <class T>
FASTDL_INLINE void run_again(const SelectiveScanArgs& a, const SelectiveScanRange& r, int64_t k, int64_t t0, int64_t t1,
                             int64_t c, const float* rows_b, const float* rows_c, const Buffer& to) {
  const int64_t count = r.c1 - c;
  for (int64_t s = 0; s < a.state; ++s) {
    const float* from = a.states + ((r.n * a.chunks + k) * a.state + s) * a.dim + c;
    vstore(to.h + s * LANES, count >= LANES ? vload(from) : load_part<F32>(from, count));
  }
  for (int64_t t = t0; t < t1; ++t) {
    const int64_t i = t - t0;
    vf slope;
    const vf dt = step_size<T>(a, r.n, t, c, count, &slope), x = load<T>(a.x, r.n, t, c, count);
    vf g = load<T>(a.grad, r.n, t, c, count), y = vmul(load(a.d + c), x);
    const vf dtx = vmul(dt, x);
    const float *h = to.h + i * a.state * LANES, *b = rows_b + i * a.state, *cs = rows_c + i * a.state;
    float *const after = to.h + (i + 1) * a.state * LANES, *const decays = to.decay + i * a.state * LANES;
    for (int64_t s = 0; s < a.state; ++s) {
      const vf decay = vexp(vmul(dt, load(a.a + s * a.stride + c)));
      const vf now = vfma(decay, vload(h + s * LANES), vmul(dtx, vset1(b[s])));
      vstore(decays + s * LANES, decay);
      vstore(after + s * LANES, now);
      y = vfma(now, vset1(cs[s]), y);
    }
    if (a.z.data) {
      const vf z = load<T>(a.z, r.n, t, c, count);
      vf curve;
      const vf sigmoid = vsigmoid(z, &curve), silu = vmul(z, sigmoid);
      put<T>(a.dz, (r.n * a.length + t) * a.dim + c, vmul(vmul(g, y), vfma(z, curve, sigmoid)), count);
      g = vmul(g, silu);
    }
    vstore(to.dt + i * LANES, dt);
    vstore(to.x + i * LANES, x);
    vstore(to.g + i * LANES, g);
    vstore(to.slope + i * LANES, slope);
  }
}

template <class T>
void backward(const SelectiveScanArgs& a, const SelectiveScanRange& r) {
  const int64_t state = a.state;
  float *const sums_b = r.scratch, *const sums_c = sums_b + CHUNK * state * LANES;  // [CHUNK][state][LANES]
  float *const rows_b = sums_c + CHUNK * state * LANES, *const rows_c = rows_b + CHUNK * state;
  const Buffer kept(rows_c + CHUNK * state, state);
  const vf zero = vset1(0.0f);
  for (int64_t k = a.chunks - 1; k >= 0; --k) {
    const int64_t t0 = k * CHUNK, t1 = t0 + CHUNK < a.length ? t0 + CHUNK : a.length;
    to_rows<T>(a.b, r.n, t0, t1, state, rows_b);
    to_rows<T>(a.c, r.n, t0, t1, state, rows_c);
    for (int64_t i = 0; i < 2 * CHUNK * state; ++i) vstore(sums_b + i * LANES, zero);
    for (int64_t c = r.c0; c < r.c1; c += LANES) {
      const int64_t count = r.c1 - c;
      run_again<T>(a, r, k, t0, t1, c, rows_b, rows_c, kept);
      vf dd = load(r.dd + c), dbias = load(r.dbias + c);
      for (int64_t t = t1 - 1; t >= t0; --t) {
        const int64_t i = t - t0;
        const vf dt = load(kept.dt + i * LANES), x = load(kept.x + i * LANES), g = load(kept.g + i * LANES);
        const vf dtx = vmul(dt, x);
        const float *b = rows_b + i * state, *cs = rows_c + i * state;
        vf along = zero, of_dt = zero;
        for (int64_t s = 0; s < state; ++s) {
          const int64_t at = (i * state + s) * LANES;
          float *const grad = r.h + s * a.stride + c, *const da = r.da + s * a.stride + c;
          const vf dh = vfma(g, vset1(cs[s]), vload(grad));
          vstore(sums_c + at, vfma(g, vload(kept.h + at + state * LANES), vload(sums_c + at)));
          vstore(sums_b + at, vfma(dh, dtx, vload(sums_b + at)));
          along = vfma(dh, vset1(b[s]), along);
          const vf moved = vmul(dh, vload(kept.decay + at)), of_decay = vmul(moved, vload(kept.h + at));
          vstore(da, vfma(of_decay, dt, vload(da)));
          of_dt = vfma(of_decay, load(a.a + s * a.stride + c), of_dt);
          vstore(grad, moved);
        }
        const vf ddelta = vmul(vfma(along, x, of_dt), load(kept.slope + i * LANES));
        const int64_t to = (r.n * a.length + t) * a.dim + c;
        put<T>(a.ddelta, to, ddelta, count);
        put<T>(a.dx, to, vfma(load(a.d + c), g, vmul(along, dt)), count);
        dbias = vadd(dbias, ddelta);
        dd = vfma(g, x, dd);
      }
      vstore(r.dd + c, dd);
      vstore(r.dbias + c, dbias);
    }
    for (int64_t i = 0; i < (t1 - t0) * state; ++i) {
      r.db[t0 * state + i] = vsum(vload(sums_b + i * LANES));
      r.dc[t0 * state + i] = vsum(vload(sums_c + i * LANES));
    }
  }
}

void add_parts(const float* parts, int64_t count, int64_t stride, int64_t begin, int64_t end, float* sum) {
  for_each(end - begin, [&](int64_t k, const auto& part) FASTDL_STEP {
    vf total = vset1(0.0f);
    for (int64_t i = 0; i < count; ++i) total = vadd(total, part.template load<F32>(parts + i * stride + begin + k));
    part.template store<F32>(sum + begin + k, total);
  });
}

void forward_any(const SelectiveScanArgs& a, const SelectiveScanRange& r) {
  dispatch(a.format, [&](auto type) { forward<decltype(type)>(a, r); });
}

void backward_any(const SelectiveScanArgs& a, const SelectiveScanRange& r) {
  dispatch(a.format, [&](auto type) { backward<decltype(type)>(a, r); });
}

}  // namespace

extern const SelectiveScanKernels selective_scan_kernels;
const SelectiveScanKernels selective_scan_kernels = {forward_any, backward_any, add_parts};

}  // namespace FASTDL_LEVEL
}  // namespace fastdl
