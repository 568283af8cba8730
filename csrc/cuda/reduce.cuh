// Sums over a warp and over a block. The order of the additions depends on the block's size alone.
#pragma once

#include "cuda/platform.cuh"

namespace fastdl::cuda {

constexpr unsigned kAllLanes = 0xffffffffu;

// The same sum in every lane.
__device__ __forceinline__ float warp_sum(float v) {
#pragma unroll
  for (int bits = 16; bits > 0; bits /= 2) v += __shfl_xor_sync(kAllLanes, v, bits);
  return v;
}

// N sums over a block of Threads threads, the same in every thread. Begins and ends with a barrier between its uses of
// shared memory, so that it may be called again at once.
template <int Threads, int N>
__device__ __forceinline__ void block_sum(float (&v)[N]) {
  static_assert(Threads % 32 == 0 && Threads <= 1024);
#pragma unroll
  for (int n = 0; n < N; ++n) v[n] = warp_sum(v[n]);
  if constexpr (Threads > 32) {
    constexpr int kWarps = Threads / 32;
    FASTDL_SHARED(float, partial, [N][kWarps]);
    __syncthreads();
    if (threadIdx.x % 32 == 0) {
#pragma unroll
      for (int n = 0; n < N; ++n) partial[n][threadIdx.x / 32] = v[n];
    }
    __syncthreads();
#pragma unroll
    for (int n = 0; n < N; ++n) {
      const int lane = threadIdx.x % 32;
      v[n] = warp_sum(lane < kWarps ? partial[n][lane] : 0.0f);
    }
  }
}

template <int Threads>
__device__ __forceinline__ float block_sum(float v) {
  float one[1] = {v};
  block_sum<Threads>(one);
  return one[0];
}

// out[which][col] = sum of partial[which][0 .. parts)[col]; block (32 columns, 8), blockIdx.y: which, of one or two sums.
inline __global__ void __launch_bounds__(256)
    sum_partials(const float* partial, float* first, float* second, int64_t parts, int64_t cols) {
  FASTDL_SHARED(float, sums, [8][33]);
  const int64_t col = static_cast<int64_t>(blockIdx.x) * 32 + threadIdx.x;
  float* out = blockIdx.y == 0 ? first : second;
  if (out == nullptr) return;  // the whole block
  float sum = 0.0f;
  if (col < cols)
    for (int64_t part = threadIdx.y; part < parts; part += 8) sum += partial[(blockIdx.y * parts + part) * cols + col];
  sums[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y == 0 && col < cols) {
    sum = 0.0f;
#pragma unroll
    for (int i = 0; i < 8; ++i) sum += sums[i][threadIdx.x];
    out[col] = sum;
  }
}

// out[c] = sum over i < outer and j < inner of partial[i][c][j], for each of `channels`. Block: (32, 8), a warp an output.
inline __global__ void __launch_bounds__(256)
    sum_channels(const float* partial, float* out, int64_t outer, int64_t channels, int64_t inner) {
  const int64_t c = static_cast<int64_t>(blockIdx.x) * 8 + threadIdx.y;
  if (c >= channels) return;  // a whole warp, and no block barrier here
  float sum = 0.0f;
  for (int64_t k = threadIdx.x; k < outer * inner; k += 32)
    sum += partial[(k / inner * channels + c) * inner + k % inner];
  sum = warp_sum(sum);
  if (threadIdx.x == 0) out[c] = sum;
}

}  // namespace fastdl::cuda
