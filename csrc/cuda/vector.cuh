// Vectors of a kernel's float type T (float, half_t, bf16_t): loads and stores of up to 16 bytes, arithmetic in float32.
#pragma once

#include "cuda/platform.cuh"

namespace fastdl::cuda {

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(half_t x) { return __half2float(x); }
__device__ __forceinline__ float to_float(bf16_t x) { return __bfloat162float(x); }

template <class T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ half_t from_float<half_t>(float x) {
  return __float2half_rn(x);
}
template <>
__device__ __forceinline__ bf16_t from_float<bf16_t>(float x) {
  return __float2bfloat16_rn(x);
}

// N values that are moved in one instruction where N * sizeof(T) is 4, 8 or 16. The address must be a multiple of that.
template <class T, int N>
struct alignas(sizeof(T) * N) Vector {
  T at[N];
};

// N values, at most 16 bytes at a time.
template <int N, class T>
__device__ __forceinline__ void load(const T* from, float (&to)[N]) {
  constexpr int kPiece = N * sizeof(T) <= 16 ? N : 16 / sizeof(T);
#pragma unroll
  for (int j = 0; j < N; j += kPiece) {
    const auto v = *reinterpret_cast<const Vector<T, kPiece>*>(from + j);
#pragma unroll
    for (int i = 0; i < kPiece; ++i) to[j + i] = to_float(v.at[i]);
  }
}

template <int N, class T>
__device__ __forceinline__ void store(T* to, const float (&from)[N]) {
  constexpr int kPiece = N * sizeof(T) <= 16 ? N : 16 / sizeof(T);
#pragma unroll
  for (int j = 0; j < N; j += kPiece) {
    Vector<T, kPiece> v;
#pragma unroll
    for (int i = 0; i < kPiece; ++i) v.at[i] = from_float<T>(from[j + i]);
    *reinterpret_cast<Vector<T, kPiece>*>(to + j) = v;
  }
}

// True when rows of `cols` values that start `stride` apart can be read in vectors of N from `data`.
template <class T>
inline bool divides(int n, const T* data, int64_t cols, int64_t stride) {
  return cols % n == 0 && stride % n == 0 && reinterpret_cast<uintptr_t>(data) % (n * sizeof(T)) == 0;
}

}  // namespace fastdl::cuda
