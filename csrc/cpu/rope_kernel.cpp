// Rotary position embedding for one level.
//
//   y_a = x_a cos - x_b sin,   y_b = x_b cos + x_a sin          pair (a, b) of a head, angles of the row's position
//
// The angles of a block's positions are spread once into the first-level cache, as the vectors below read them, and serve
// all heads. Interleaved pairs are turned in place of their lanes: y = x * (cos, cos) + swap(x) * (-sin, sin).
// Floor: one read of x and one write of y over the bandwidth; two operations an element.
//
// Test: pytest tests/test_rope.py
#include "cpu/rope_kernel.h"

#include "cpu/rows_kernel.h"

namespace fastdl {
namespace FASTDL_LEVEL {
namespace {

// Cosines, then sines of one position: [rope_dim / 2] each, or interleaved [rope_dim] each, the sines signed.
FASTDL_INLINE void spread(const RopeArgs& a, int64_t position, float* cosines, float* sines) {
  const float* row = a.cos_sin + position * a.rope_dim;
  const float sign = a.back ? -1.0f : 1.0f;
  const int64_t half = a.rope_dim / 2;
  if (a.interleaved) {
    for (int64_t i = 0; i < half; ++i) {
      cosines[2 * i] = cosines[2 * i + 1] = row[2 * i];
      sines[2 * i] = -sign * row[2 * i + 1];
      sines[2 * i + 1] = sign * row[2 * i + 1];
    }
  } else {
    for (int64_t i = 0; i < half; ++i) {
      cosines[i] = row[2 * i];
      sines[i] = sign * row[2 * i + 1];
    }
  }
}

// One head at one position.
template <class T, bool Interleaved>
FASTDL_INLINE void turn_row(const RopeArgs& a, const typename T::Element* x, typename T::Element* y,
                            const float* cosines, const float* sines) {
  if constexpr (Interleaved) {
    for_each(a.rope_dim, [&](int64_t k, const auto& part) FASTDL_STEP {
      const vf v = part.template load<T>(x + k);
      const vf turned = vmul(vswap_pairs(v), part.template load<F32>(sines + k));
      part.template store<T>(y + k, vfma(v, part.template load<F32>(cosines + k), turned));
    });
  } else {
    const int64_t half = a.rope_dim / 2;
    for_each(half, [&](int64_t k, const auto& part) FASTDL_STEP {
      const vf first = part.template load<T>(x + k), second = part.template load<T>(x + half + k);
      const vf c = part.template load<F32>(cosines + k), s = part.template load<F32>(sines + k);
      part.template store<T>(y + k, vsub(vmul(first, c), vmul(second, s)));
      part.template store<T>(y + half + k, vfma(second, c, vmul(first, s)));
    });
  }
  if (a.rope_dim < a.head_dim) memcpy(y + a.rope_dim, x + a.rope_dim, (size_t)(a.head_dim - a.rope_dim) * sizeof(*x));
}

template <class T, bool Interleaved>
void turn(const RopeArgs& a, const RopeBlock& b, float* scratch) {
  using Element = typename T::Element;
  for (int64_t r = b.row0; r < b.row1; ++r) {
    int64_t position = a.start + r;
    if (a.positions) {
      position = a.positions[b.batch * a.batch_stride + r];
      position = position < 0 ? 0 : position >= a.max_len ? a.max_len - 1 : position;
    }
    float* const cosines = scratch + (r - b.row0) * 2 * a.rope_dim;
    spread(a, position, cosines, cosines + a.rope_dim);
  }
  const Element* x = (const Element*)a.x + b.batch * a.x_batch;
  Element* y = (Element*)a.y + b.batch * a.y_batch;
  const auto row = [&](int64_t h, int64_t r) FASTDL_STEP {
    const float* cosines = scratch + (r - b.row0) * 2 * a.rope_dim;
    turn_row<T, Interleaved>(a, x + h * a.x_head + r * a.x_row, y + h * a.y_head + r * a.y_row, cosines,
                             cosines + a.rope_dim);
  };
  if (a.y_row >= a.y_head) {  // in the order of memory
    for (int64_t r = b.row0; r < b.row1; ++r)
      for (int64_t h = b.head0; h < b.head1; ++h) row(h, r);
  } else {
    for (int64_t h = b.head0; h < b.head1; ++h)
      for (int64_t r = b.row0; r < b.row1; ++r) row(h, r);
  }
}

void turn_any(const RopeArgs& a, const RopeBlock& b, float* scratch) {
  dispatch(a.format, [&](auto type) {
    using T = decltype(type);
    a.interleaved ? turn<T, true>(a, b, scratch) : turn<T, false>(a, b, scratch);
  });
}

}  // namespace

extern const RopeKernels rope_kernels;
const RopeKernels rope_kernels = {turn_any};

}  // namespace FASTDL_LEVEL
}  // namespace fastdl
