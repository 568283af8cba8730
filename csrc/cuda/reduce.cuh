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

}  // namespace fastdl::cuda
