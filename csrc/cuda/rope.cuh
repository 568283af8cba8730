// Rotary position embedding on CUDA (contract: fastdl/ops/rope.py):
//
//   y_a = x_a cos - x_b sin,   y_b = x_b cos + x_a sin          pair (a, b) of a head, angles of the row's position
//
// A thread takes N pairs of a position, 16 bytes of memory or two times that, keeps their cosines and sines in registers
// and walks over heads: of q, or in the blocks behind of k. No element is touched twice, no index divided in the loop.
// Floor: one read of q and k and one write over the bandwidth.
//
// Test: pytest tests/test_rope.py
#pragma once

#include <algorithm>

#include "cuda/vector.cuh"

namespace fastdl::cuda {

// q or k: [batch][heads][n][head_dim], distances in elements.
template <class T>
struct RopeHeads {
  const T* x;
  T* y;
  int64_t batch, heads;  // heads 0: there is none
  int64_t x_batch, x_head, x_row, y_batch, y_head, y_row;
  int parts;  // blocks that share the heads
};

template <class T>
struct Rope {
  RopeHeads<T> q, k;
  const float* cos_sin;      // [max_len][rope_dim]: cos, sin of each pair
  const int64_t* positions;  // [n], or [batch][n] with batch_stride n; null: start, start + 1, ...
  int64_t start, batch_stride, max_len, n;
  int rope_dim, head_dim;
  bool back;  // by the opposite angles
};

// Pairs of a unit, and elements of one that is copied.
template <int N, bool Interleaved>
constexpr int kRopeCopy = N > 1 && Interleaved ? 2 * N : N;

template <int N, bool Interleaved, class T>
__device__ __forceinline__ void load_pairs(const T* x, int64_t at, int half, float (&a)[N], float (&b)[N]) {
  if constexpr (!Interleaved) {
    load<N>(x + at, a);
    load<N>(x + half + at, b);
  } else if constexpr (N == 1) {
    load<1>(x + 2 * at, a);
    load<1>(x + 2 * at + 1, b);
  } else {
    float v[2 * N];
    load<2 * N>(x + 2 * at, v);
#pragma unroll
    for (int i = 0; i < N; ++i) a[i] = v[2 * i], b[i] = v[2 * i + 1];
  }
}

template <int N, bool Interleaved, class T>
__device__ __forceinline__ void store_pairs(T* y, int64_t at, int half, const float (&a)[N], const float (&b)[N]) {
  if constexpr (!Interleaved) {
    store<N>(y + at, a);
    store<N>(y + half + at, b);
  } else if constexpr (N == 1) {
    store<1>(y + 2 * at, a);
    store<1>(y + 2 * at + 1, b);
  } else {
    float v[2 * N];
#pragma unroll
    for (int i = 0; i < N; ++i) v[2 * i] = a[i], v[2 * i + 1] = b[i];
    store<2 * N>(y + 2 * at, v);
  }
}

// Block: 256 threads, `rows` positions of `units` units each, or one of more units than threads. Grid: (tiles of
// positions, parts of q's heads and then of k's, batch).
template <class T, int N, bool Interleaved>
__global__ void __launch_bounds__(256, 1) rope_turn_heads(Rope<T> r, int rows, int units) {
  constexpr int kCopy = kRopeCopy<N, Interleaved>;
  const bool second = static_cast<int>(blockIdx.y) >= r.q.parts;
  const RopeHeads<T> t = second ? r.k : r.q;
  const int64_t part = static_cast<int>(blockIdx.y) - (second ? r.q.parts : 0);
  const int64_t head0 = t.heads * part / t.parts, head1 = t.heads * (part + 1) / t.parts;
  const int thread = static_cast<int>(threadIdx.x), half = r.rope_dim / 2, turned = half / N;
  const int local = units <= 256 ? thread / units : 0, step = units <= 256 ? units : 256;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * rows + local;
  if (local >= rows || row >= r.n) return;  // no barrier in this kernel
  for (int64_t batch = blockIdx.z; batch < t.batch; batch += gridDim.z) {
    int64_t position = r.start + row;
    if (r.positions) {
      position = r.positions[batch * r.batch_stride + row];
      position = position < 0 ? 0 : position >= r.max_len ? r.max_len - 1 : position;
    }
    const T* x = t.x + batch * t.x_batch + row * t.x_row;
    T* y = t.y + batch * t.y_batch + row * t.y_row;
    for (int unit = thread - local * step; unit < units; unit += step) {
      if (unit >= turned) {
        const int64_t at = r.rope_dim + static_cast<int64_t>(unit - turned) * kCopy;
        for (int64_t h = head0; h < head1; ++h) {
          float v[kCopy];
          load<kCopy>(x + h * t.x_head + at, v);
          store<kCopy>(y + h * t.y_head + at, v);
        }
        continue;
      }
      const int64_t at = static_cast<int64_t>(unit) * N;
      float angles[2 * N], c[N], s[N];
      if constexpr (N == 1) {
        angles[0] = r.cos_sin[position * r.rope_dim + 2 * at];
        angles[1] = r.cos_sin[position * r.rope_dim + 2 * at + 1];
      } else {
        load<2 * N>(r.cos_sin + position * r.rope_dim + 2 * at, angles);
      }
#pragma unroll
      for (int i = 0; i < N; ++i) c[i] = angles[2 * i], s[i] = r.back ? -angles[2 * i + 1] : angles[2 * i + 1];
#pragma unroll 4
      for (int64_t h = head0; h < head1; ++h) {
        float a[N], b[N];
        load_pairs<N, Interleaved>(x + h * t.x_head, at, half, a, b);
#pragma unroll
        for (int i = 0; i < N; ++i) {
          const float first = a[i];
          a[i] = first * c[i] - b[i] * s[i];
          b[i] = b[i] * c[i] + first * s[i];
        }
        store_pairs<N, Interleaved>(y + h * t.y_head, at, half, a, b);
      }
    }
  }
}

template <class T, int N, bool Interleaved>
cudaError_t rope_launch(Rope<T> r, cudaStream_t stream) {
  const int units = r.rope_dim / 2 / N + (r.head_dim - r.rope_dim) / kRopeCopy<N, Interleaved>;
  const int rows = static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(r.n, 256 / units)));
  const int64_t tiles = (r.n + rows - 1) / rows, batch = std::max(r.q.batch, r.k.heads ? r.k.batch : 1);
  const int64_t heads = r.q.heads + r.k.heads, wanted = 8 * multiprocessor_count();
  // As many parts as fill the GPU; a thread walks over the other heads with the same angles.
  const int64_t parts = std::min({heads, int64_t{32768}, (wanted + tiles * batch - 1) / (tiles * batch)});
  const auto share = [&](const RopeHeads<T>& t) {
    return static_cast<int>(t.heads ? std::max<int64_t>(1, std::min(t.heads, t.heads * parts / heads)) : 0);
  };
  r.q.parts = share(r.q);
  r.k.parts = share(r.k);
  const dim3 grid(static_cast<unsigned>(tiles), static_cast<unsigned>(r.q.parts + r.k.parts),
                  static_cast<unsigned>(std::min<int64_t>(batch, 65535)));
  return launch(rope_turn_heads<T, N, Interleaved>, grid, dim3(256), 0, stream, r, rows, units);
}

template <class T>
bool rope_divides(int n, const RopeHeads<T>& t) {
  const auto address = [&](const T* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; };
  return t.heads == 0 || (address(t.x) && address(t.y) && t.x_batch % n == 0 && t.x_head % n == 0 && t.x_row % n == 0 &&
                          t.y_batch % n == 0 && t.y_head % n == 0 && t.y_row % n == 0);
}

// q.heads > 0, n > 0, head_dim > 0.
template <class T>
cudaError_t rope_turn_launch(const Rope<T>& r, bool interleaved, cudaStream_t stream) {
  constexpr int V = 16 / sizeof(T);
  const int rest = r.head_dim - r.rope_dim, half = r.rope_dim / 2;
  const bool vectors = half % (interleaved ? V / 2 : V) == 0 && rest % V == 0 && rope_divides(V, r.q) &&
                       rope_divides(V, r.k) && reinterpret_cast<uintptr_t>(r.cos_sin) % 16 == 0;
  if (interleaved) return vectors ? rope_launch<T, V / 2, true>(r, stream) : rope_launch<T, 1, true>(r, stream);
  return vectors ? rope_launch<T, V, false>(r, stream) : rope_launch<T, 1, false>(r, stream);
}

}  // namespace fastdl::cuda
