// y = x * scale + shift, elementwise: the smallest kernel that proves that CUDA code compiles, links, loads without a
// GPU and runs with one. Test: tests/test_build.py
#pragma once
#include "cuda/platform.cuh"

namespace fastdl::cuda {

// x [n] f32, y [n] f32
inline __global__ void smoke_kernel(const float* x, float* y, int64_t n, float scale, float shift) {
  const int64_t step = int64_t(gridDim.x) * blockDim.x;
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < n; i += step) y[i] = x[i] * scale + shift;
}

inline cudaError_t smoke_launch(const float* x, float* y, int64_t n, float scale, float shift, cudaStream_t stream) {
  if (n == 0) return cudaSuccess;  // a grid of zero blocks is an error
  constexpr int kThreads = 256;
  const int64_t blocks = (n + kThreads - 1) / kThreads;
  return launch(smoke_kernel, dim3(static_cast<unsigned>(blocks < 65535 ? blocks : 65535)), dim3(kThreads), 0, stream,
                x, y, n, scale, shift);
}

}  // namespace fastdl::cuda
