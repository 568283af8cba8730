// What the kernels of group_norm and batch_norm share: moments that do not cancel, parameters of channels, and the channel
// of an element of [N, C, positions].
//
// Moments in one pass: a thread sums d and d^2 with d = x - k, k the first value that it sees. Because k is one of the
// values, the squares lose at most a factor of the thread's count, 64 to a few thousand, and the mean may be as far from 0
// as it likes.
#pragma once

#include "cuda/reduce.cuh"
#include "cuda/vector.cuh"

namespace fastdl::cuda {

// count, mean, and the sum of squared distances from the mean.
struct Moments {
  float count = 0.0f, mean = 0.0f, squares = 0.0f;
};

// k - k is 0 for finite k: an infinite or NaN first value must not hide the others.
__device__ __forceinline__ float finite_or_zero(float k) { return k - k == 0.0f ? k : 0.0f; }

struct MomentSums {
  float origin = 0.0f, count = 0.0f, sum = 0.0f, squares = 0.0f;

  template <int N>
  __device__ __forceinline__ void add(const float (&x)[N]) {
    if (count == 0.0f) origin = finite_or_zero(x[0]);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const float d = x[i] - origin;
      sum += d;
      squares += d * d;
    }
    count += static_cast<float>(N);
  }
  __device__ __forceinline__ Moments moments() const {
    if (count == 0.0f) return {};
    const float rest = sum / count, apart = squares - sum * rest;
    return {count, origin + rest, apart < 0.0f ? 0.0f : apart};  // NaN stays
  }
};

// The moments of all threads of a block together; `origin`: any value near them, the same in every thread.
template <int Threads>
__device__ __forceinline__ Moments block_moments(const Moments& mine, float origin, float count) {
  const float mean = origin + block_sum<Threads>(mine.count == 0.0f ? 0.0f : mine.count * (mine.mean - origin)) / count;
  const float apart = mine.mean - mean;
  const float squares = mine.count == 0.0f ? 0.0f : mine.squares + mine.count * apart * apart;
  return {count, mean, block_sum<Threads>(squares)};
}

// A number of a channel, or `fill` where there is none.
template <class T>
__device__ __forceinline__ float parameter(const void* data, bool is_float, int64_t at, float fill) {
  if (data == nullptr) return fill;
  return is_float ? static_cast<const float*>(data)[at] : to_float(static_cast<const T*>(data)[at]);
}

// Moments of x[begin, end), by the whole block; vectors of N from x must be aligned, begin and end multiples of N.
template <int N, int Threads, class T>
__device__ __forceinline__ Moments run_moments(const T* x, int64_t begin, int64_t end) {
  MomentSums sums;
  for (int64_t i = begin + static_cast<int64_t>(threadIdx.x) * N; i < end; i += Threads * N) {
    float v[N];
    load<N>(x + i, v);
    sums.add(v);
  }
  return block_moments<Threads>(sums.moments(), finite_or_zero(to_float(x[begin])), static_cast<float>(end - begin));
}

// Part `part` of `parts` of a run of `size`, cut at multiples of N.
struct PartRange {
  int64_t begin, end;
};

__host__ __device__ inline int64_t part_length(int64_t size, int64_t parts, int n) {
  return ((size + parts - 1) / parts + n - 1) / n * n;
}

__device__ __forceinline__ PartRange part_range(int64_t size, int64_t parts, int64_t part, int n) {
  const int64_t length = part_length(size, parts, n);
  const int64_t begin = part * length < size ? part * length : size;
  return {begin, begin + length < size ? begin + length : size};
}

// Parts of at least 16 K elements, so many that the GPU is full, 64 at most: a function of the shape alone.
inline int64_t part_count(int64_t runs, int64_t size) {
  constexpr int64_t kLeast = 16 * 1024, kBlocks = 1024;
  int64_t parts = (kBlocks + runs - 1) / runs;
  if (parts > 64) parts = 64;
  if (parts > size / kLeast) parts = size / kLeast;
  return parts < 1 ? 1 : parts;
}

}  // namespace fastdl::cuda
