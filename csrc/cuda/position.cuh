// The add of positions with scale and dropout, and its gradients, on CUDA (contract: fastdl/ops/position.py):
//
//   y = dropout(scale * x + table[position]);   dx = scale * mask * grad;   dtable[p] = sum of mask * grad at position p
//
// Forward: a thread keeps 16 bytes' worth of a table's row in registers and walks over the rows of x that it is added to.
// Backward: a block takes one position and some columns, reads grad of its tokens once for dx and dtable, and adds in an
// order that the shape alone decides. Entries and inner: csrc/common/position_tensors.h. Floor: one read and one write of
// x over the bandwidth.
//
// Test: pytest tests/test_position.py
#pragma once

#include <algorithm>

#include "common/philox.h"
#include "cuda/vector.cuh"

namespace fastdl::cuda {

template <class T>
struct Position {
  const T* x;                // [rows][cols], rows x_stride apart; in the backward grad
  const void* table;         // T or float32 [table_len][cols], or null: nothing is added
  T* y;                      // [rows][cols]; in the backward dx, or null
  float* dtable;             // [table_len][cols]
  const int64_t* positions;  // [entries], or null: start, start + 1, ...
  const int64_t* order;      // [entries] by position, or null
  const int64_t* begin;      // [table_len + 1]: where a position's entries begin in order
  const int64_t* seed;       // [1] on the device, or null: no dropout
  int64_t rows, cols, x_stride, n, entries, inner, start, table_len;
  float p, keep, scale;  // keep: 1 / (1 - p)
  bool float_table;
};

__device__ __forceinline__ int64_t clamped(int64_t i, int64_t size) { return i < 0 ? 0 : i >= size ? size - 1 : i; }

template <class T>
__device__ __forceinline__ int64_t row_of(const Position<T>& a, int64_t entry, int64_t j) {
  return (entry / a.n * a.inner + j) * a.n + entry % a.n;
}

template <int N, class T>
__device__ __forceinline__ void position_mask(const Position<T>& a, uint64_t seed, int64_t at, float (&v)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const float keep = philox_dropout(seed, static_cast<uint64_t>(at + i), a.p, a.keep);
    v[i] = keep == 0.0f ? 0.0f : v[i] * keep;
  }
}

// Block: 256 threads, `tokens` entries of `units` vectors each (256 at most). Grid: (tiles of entries, parts of inner,
// tiles of columns).
template <class T, int N>
__global__ void __launch_bounds__(256) position_forward_rows(Position<T> a, int tokens, int units) {
  const int local = static_cast<int>(threadIdx.x) / units;
  const int64_t entry = static_cast<int64_t>(blockIdx.x) * tokens + local;
  const int64_t col = (static_cast<int64_t>(blockIdx.z) * 256 + static_cast<int>(threadIdx.x) - local * units) * N;
  if (local >= tokens || entry >= a.entries || col >= a.cols) return;  // no barrier in this kernel
  float added[N] = {};
  if (a.table) {
    const int64_t position = a.positions ? clamped(a.positions[entry], a.table_len) : a.start + entry;
    if (a.float_table)
      load<N>(static_cast<const float*>(a.table) + position * a.cols + col, added);
    else
      load<N>(static_cast<const T*>(a.table) + position * a.cols + col, added);
  }
  const uint64_t seed = a.seed ? static_cast<uint64_t>(*a.seed) : 0;
  const int64_t first = a.inner * blockIdx.y / gridDim.y, last = a.inner * (blockIdx.y + 1) / gridDim.y;
  const int64_t row0 = row_of(a, entry, 0);
#pragma unroll 4
  for (int64_t j = first; j < last; ++j) {
    const int64_t row = row0 + j * a.n;
    float v[N];
    load<N>(a.x + row * a.x_stride + col, v);
#pragma unroll
    for (int i = 0; i < N; ++i) v[i] = v[i] * a.scale + added[i];
    if (a.seed) position_mask<N>(a, seed, row * a.cols + col, v);
    store<N>(a.y + row * a.cols + col, v);
  }
}

// Block: (lanes, 256 / lanes). Grid: (table_len, tiles of lanes * N columns).
template <class T, int N>
__global__ void __launch_bounds__(256) position_backward_rows(Position<T> a) {
  FASTDL_SHARED(float, sums, [256 * N]);
  const int lanes = static_cast<int>(blockDim.x), rows = static_cast<int>(blockDim.y);
  const int64_t position = blockIdx.x, tile = static_cast<int64_t>(blockIdx.y) * lanes * N;
  const int64_t col = tile + static_cast<int64_t>(threadIdx.x) * N;
  int64_t begin = position - a.start, end = begin + 1;
  if (a.order) {
    begin = clamped(a.begin[position], a.entries + 1);
    end = clamped(a.begin[position + 1], a.entries + 1);
  } else if (begin < 0 || begin >= a.n) {
    end = begin;
  }
  const uint64_t seed = a.seed ? static_cast<uint64_t>(*a.seed) : 0;
  const int64_t count = col < a.cols ? (end - begin) * a.inner : 0;
  float sum[N] = {};
  for (int64_t k = threadIdx.y; k < count; k += rows) {
    const int64_t i = begin + k / a.inner, entry = a.order ? clamped(a.order[i], a.entries) : i;
    const int64_t row = row_of(a, entry, k % a.inner);
    float d[N];
    load<N>(a.x + row * a.x_stride + col, d);
    if (a.seed) position_mask<N>(a, seed, row * a.cols + col, d);
#pragma unroll
    for (int c = 0; c < N; ++c) sum[c] += d[c];
    if (a.y) {
#pragma unroll
      for (int c = 0; c < N; ++c) d[c] *= a.scale;
      store<N>(a.y + row * a.cols + col, d);
    }
  }
#pragma unroll
  for (int c = 0; c < N; ++c) sums[(threadIdx.y * lanes + threadIdx.x) * N + c] = sum[c];
  __syncthreads();
  for (int c = static_cast<int>(threadIdx.y) * lanes + static_cast<int>(threadIdx.x); c < lanes * N; c += 256) {
    if (tile + c >= a.cols) continue;
    float total = 0.0f;
    for (int r = 0; r < rows; ++r) total += sums[r * lanes * N + c];
    a.dtable[position * a.cols + tile + c] = total;
  }
}

template <class T, int N>
cudaError_t position_forward_with(const Position<T>& a, cudaStream_t stream) {
  const int64_t vectors = a.cols / N, columns = (vectors + 255) / 256;
  const int units = static_cast<int>(std::min<int64_t>(vectors, 256));
  const int tokens = static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(a.entries, 256 / units)));
  const int64_t tiles = (a.entries + tokens - 1) / tokens, wanted = 8 * multiprocessor_count();
  const int64_t parts = std::min({a.inner, int64_t{65535}, (wanted + tiles * columns - 1) / (tiles * columns)});
  const dim3 grid(static_cast<unsigned>(tiles), static_cast<unsigned>(parts), static_cast<unsigned>(columns));
  return launch(position_forward_rows<T, N>, grid, dim3(256), 0, stream, a, tokens, units);
}

template <class T, int N>
cudaError_t position_backward_with(const Position<T>& a, cudaStream_t stream) {
  const int64_t vectors = a.cols / N;
  int lanes = 32;
  while (lanes > 4 && lanes / 2 >= vectors) lanes /= 2;
  const int64_t tiles = (vectors + lanes - 1) / lanes;
  const dim3 grid(static_cast<unsigned>(a.table_len), static_cast<unsigned>(tiles));
  return launch(position_backward_rows<T, N>, grid, dim3(lanes, 256 / lanes), 0, stream, a);
}

template <class T>
bool position_divides(const Position<T>& a) {
  constexpr int N = 16 / sizeof(T);
  return divides(N, a.x, a.cols, a.x_stride) && (!a.y || divides(N, a.y, a.cols, a.cols)) &&
         reinterpret_cast<uintptr_t>(a.table) % 16 == 0;
}

// rows > 0, cols > 0: y, or without a table dx.
template <class T>
cudaError_t position_forward_launch(const Position<T>& a, cudaStream_t stream) {
  return position_divides(a) ? position_forward_with<T, 16 / sizeof(T)>(a, stream)
                             : position_forward_with<T, 1>(a, stream);
}

// rows > 0, cols > 0: dtable, and dx where y is given.
template <class T>
cudaError_t position_backward_launch(const Position<T>& a, cudaStream_t stream) {
  return position_divides(a) ? position_backward_with<T, 16 / sizeof(T)>(a, stream)
                             : position_backward_with<T, 1>(a, stream);
}

}  // namespace fastdl::cuda
