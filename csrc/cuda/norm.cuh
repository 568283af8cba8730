// Layer norm and RMS norm on CUDA, forward (contract: fastdl/ops/norm.py):
//
//   s = residual + dropout(x);  h = (s - mean(s)) * rstd  (RMS: h = s * rstd);  y = h * (weight + offset) + bias
//
// Two kernels. `rows`: a row lies in the registers of one warp or one block, in vectors of 16 bytes, so that memory is
// read once; the variance is summed around the mean. `stream`: rows of any width and alignment, read three times, the
// second and third time from the cache. Floor: (reads of x, residual + writes of y, s) / bandwidth.
//
// Test: pytest tests/test_norm.py        Backward: norm_backward.cuh
#pragma once

#include "common/philox.h"
#include "cuda/reduce.cuh"
#include "cuda/vector.cuh"

namespace fastdl::cuda {

template <class T>
struct NormForward {
  const T* x;           // [rows, cols], rows x_stride apart
  const T* residual;    // [rows, cols], rows residual_stride apart, or null
  const void* weight;   // [cols] T or float32, or null
  const void* bias;     // [cols] of the same type, or null
  const int64_t* seed;  // [1] on the device, or null: no dropout
  T* y;                 // [rows, cols]
  T* s;                 // [rows, cols], or null where nobody asks for it
  float* mean;          // [rows], or null
  float* rstd;          // [rows], or null
  int64_t rows, cols, x_stride, residual_stride;
  float p, scale, eps, offset;  // offset: 0 without a weight
  bool float_parameters;        // weight and bias are float32
  bool rms, plain;              // plain: s is x
};

// weight + offset and bias at columns [col, col + N); 1 and 0 where there are none.
template <int N, class T>
__device__ __forceinline__ void norm_parameters(const void* data, bool is_float, int64_t col, float fill,
                                                float (&to)[N]) {
  if (data == nullptr) {
#pragma unroll
    for (int i = 0; i < N; ++i) to[i] = fill;
  } else if (is_float) {
    load<N>(static_cast<const float*>(data) + col, to);
  } else {
    load<N>(static_cast<const T*>(data) + col, to);
  }
}

// s at columns [col, col + N) of a row, rounded to T; stored where it is asked for.
template <int N, class T>
__device__ __forceinline__ void norm_sum(const NormForward<T>& a, int64_t row, int64_t col, uint64_t seed,
                                         float (&s)[N]) {
  load<N>(a.x + row * a.x_stride + col, s);
  if (a.plain) return;
  if (a.seed) {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const float keep = philox_dropout(seed, static_cast<uint64_t>(row * a.cols + col + i), a.p, a.scale);
      s[i] = keep == 0.0f ? 0.0f : s[i] * keep;
    }
  }
  if (a.residual) {
    float r[N];
    load<N>(a.residual + row * a.residual_stride + col, r);
#pragma unroll
    for (int i = 0; i < N; ++i) s[i] = r[i] + s[i];
  }
#pragma unroll
  for (int i = 0; i < N; ++i) s[i] = to_float(from_float<T>(s[i]));
  if (a.s) store<N>(a.s + row * a.cols + col, s);
}

// The same a second time: from s where it was stored.
template <int N, class T>
__device__ __forceinline__ void norm_again(const NormForward<T>& a, int64_t row, int64_t col, uint64_t seed,
                                           float (&s)[N]) {
  if (a.s) {
    load<N>(a.s + row * a.cols + col, s);
  } else {
    norm_sum<N>(a, row, col, seed, s);
  }
}

template <int N, class T>
__device__ __forceinline__ void norm_finish(const NormForward<T>& a, int64_t row, int64_t col, float mean, float rstd,
                                            const float (&s)[N]) {
  float weight[N], bias[N], y[N];
  norm_parameters<N, T>(a.weight, a.float_parameters, col, 1.0f, weight);
  norm_parameters<N, T>(a.bias, a.float_parameters, col, 0.0f, bias);
#pragma unroll
  for (int i = 0; i < N; ++i) y[i] = (s[i] - mean) * rstd * (weight[i] + a.offset) + bias[i];
  store<N>(a.y + row * a.cols + col, y);
}

template <class T>
__device__ __forceinline__ void norm_statistics(const NormForward<T>& a, int64_t row, float mean, float rstd) {
  if (threadIdx.x == 0) {
    if (a.mean) a.mean[row] = mean;
    if (a.rstd) a.rstd[row] = rstd;
  }
}

// Block: (Threads, rows per block); more than one row per block only where a row has one warp.
template <class T, int Threads, int Chunks>
__global__ void __launch_bounds__(Threads < 128 ? 128 : Threads) norm_forward_rows(NormForward<T> a) {
  constexpr int N = 16 / sizeof(T);
  const int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  if (row >= a.rows) return;  // a whole warp, and no block barrier then
  const uint64_t seed = a.seed ? static_cast<uint64_t>(*a.seed) : 0;
  float s[Chunks][N];
  float sum = 0.0f;
#pragma unroll
  for (int c = 0; c < Chunks; ++c) {
    const int64_t col = static_cast<int64_t>(c * Threads + threadIdx.x) * N;
    if (col >= a.cols) {
#pragma unroll
      for (int i = 0; i < N; ++i) s[c][i] = 0.0f;
      continue;
    }
    norm_sum<N>(a, row, col, seed, s[c]);
#pragma unroll
    for (int i = 0; i < N; ++i) sum += s[c][i];
  }
  const float mean = !a.rms ? block_sum<Threads>(sum) / static_cast<float>(a.cols) : 0.0f;
  float squares = 0.0f;
#pragma unroll
  for (int c = 0; c < Chunks; ++c) {
    if (static_cast<int64_t>(c * Threads + threadIdx.x) * N >= a.cols) continue;
#pragma unroll
    for (int i = 0; i < N; ++i) squares += (s[c][i] - mean) * (s[c][i] - mean);
  }
  const float rstd = rsqrtf(block_sum<Threads>(squares) / static_cast<float>(a.cols) + a.eps);
  norm_statistics(a, row, mean, rstd);
#pragma unroll
  for (int c = 0; c < Chunks; ++c) {
    const int64_t col = static_cast<int64_t>(c * Threads + threadIdx.x) * N;
    if (col < a.cols) norm_finish<N>(a, row, col, mean, rstd, s[c]);
  }
}

// One block a row; every thread reads again only what it has read, or written to s, itself.
template <class T, int N, int Threads>
__global__ void __launch_bounds__(Threads) norm_forward_stream(NormForward<T> a) {
  const int64_t row = blockIdx.x, step = static_cast<int64_t>(Threads) * N,
                first = static_cast<int64_t>(threadIdx.x) * N;
  const uint64_t seed = a.seed ? static_cast<uint64_t>(*a.seed) : 0;
  float sum = 0.0f, squares = 0.0f, s[N];
  for (int64_t col = first; col < a.cols; col += step) {
    norm_sum<N>(a, row, col, seed, s);
#pragma unroll
    for (int i = 0; i < N; ++i) sum += s[i];
  }
  const float mean = !a.rms ? block_sum<Threads>(sum) / static_cast<float>(a.cols) : 0.0f;
  for (int64_t col = first; col < a.cols; col += step) {
    norm_again<N>(a, row, col, seed, s);
#pragma unroll
    for (int i = 0; i < N; ++i) squares += (s[i] - mean) * (s[i] - mean);
  }
  const float rstd = rsqrtf(block_sum<Threads>(squares) / static_cast<float>(a.cols) + a.eps);
  norm_statistics(a, row, mean, rstd);
  for (int64_t col = first; col < a.cols; col += step) {
    norm_again<N>(a, row, col, seed, s);
    norm_finish<N>(a, row, col, mean, rstd, s);
  }
}

template <class T, int Threads, int Chunks>
cudaError_t norm_forward_rows_launch(const NormForward<T>& a, cudaStream_t stream) {
  constexpr int kRows = Threads == 32 ? 4 : 1;
  const auto blocks = static_cast<unsigned>((a.rows + kRows - 1) / kRows);
  return launch(norm_forward_rows<T, Threads, Chunks>, dim3(blocks), dim3(Threads, kRows), 0, stream, a);
}

template <class T>
cudaError_t norm_forward_launch(const NormForward<T>& a, cudaStream_t stream) {
  if (a.rows == 0) return cudaSuccess;
  constexpr int N = 16 / sizeof(T);
  const auto parameters_divide = [&](const void* data) {
    return data == nullptr || reinterpret_cast<uintptr_t>(data) % 16 == 0;
  };
  const bool vectors = divides(N, a.x, a.cols, a.x_stride) && divides(N, a.y, a.cols, a.cols) &&
                       (!a.residual || divides(N, a.residual, a.cols, a.residual_stride)) &&
                       (!a.s || divides(N, a.s, a.cols, a.cols)) && parameters_divide(a.weight) &&
                       parameters_divide(a.bias);
  if (!vectors)
    return launch(norm_forward_stream<T, 1, 256>, dim3(static_cast<unsigned>(a.rows)), dim3(256), 0, stream, a);
  const int64_t count = a.cols / N;  // vectors a row
  if (count <= 32) return norm_forward_rows_launch<T, 32, 1>(a, stream);
  if (count <= 64) return norm_forward_rows_launch<T, 32, 2>(a, stream);
  if (count <= 128) return norm_forward_rows_launch<T, 32, 4>(a, stream);
  if (count <= 256) return norm_forward_rows_launch<T, 128, 2>(a, stream);
  if (count <= 512) return norm_forward_rows_launch<T, 128, 4>(a, stream);
  if (count <= 1024) return norm_forward_rows_launch<T, 256, 4>(a, stream);
  if (count <= 2048) return norm_forward_rows_launch<T, 512, 4>(a, stream);
  return launch(norm_forward_stream<T, N, 512>, dim3(static_cast<unsigned>(a.rows)), dim3(512), 0, stream, a);
}

}  // namespace fastdl::cuda
