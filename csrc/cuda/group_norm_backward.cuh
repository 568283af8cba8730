// Group norm on CUDA, backward:
//
//   sum[n, c] = sum of grad over positions,  product[n, c] = sum of grad * h over positions
//   g  = grad * scale * weight;   dx = rstd * (g - mean(g) - h * mean(g * h)),  the means from the sums of the group
//   dweight = sum_n(scale * product),  dbias = sum_n(scale * sum),  dscale = weight * product + bias * sum,  dshift = sum
//
// Three kernels: `sums`, a warp or a block a channel; `dx`, the blocks of a group as in the forward pass; `parameters`.
// Floor: (grad and x twice + write of dx) / bandwidth, once where grad and x fit in the cache.
//
// Test: pytest tests/test_group_norm.py
#pragma once

#include "cuda/group_norm.cuh"

namespace fastdl::cuda {

template <class T>
struct GroupNormBackward {
  const T *grad, *x;                  // [N, groups, width, spatial]
  const void *weight, *bias, *scale;  // [groups * width], twice, and [N, groups * width]; T or float32, or null
  bool float_weight, float_bias, float_scale;
  const float *mean, *rstd;  // [N, groups]
  T* dx;                     // as x
  float *sum, *product;      // [N, groups * width]
  float *dweight, *dbias;    // [groups * width], or null
  float *dscale, *dshift;    // [N, groups * width], or null
  int64_t rows, groups, width, spatial, parts;
};

// Block (Threads, Channels): a channel of a sample each.
template <class T, int N, int Threads, int Channels>
__global__ void __launch_bounds__(Threads* Channels) group_norm_sums(GroupNormBackward<T> a) {
  const int64_t channel = static_cast<int64_t>(blockIdx.x) * Channels + threadIdx.y;
  if (channel >= a.rows * a.width) return;  // a whole warp, and no block barrier then
  const int64_t base = channel * a.spatial;
  const float mean = a.mean[channel / a.width];
  float sums[2] = {0.0f, 0.0f};
  for (int64_t i = static_cast<int64_t>(threadIdx.x) * N; i < a.spatial; i += Threads * N) {
    float d[N], x[N];
    load<N>(a.grad + base + i, d);
    load<N>(a.x + base + i, x);
#pragma unroll
    for (int j = 0; j < N; ++j) {
      sums[0] += d[j];
      sums[1] += d[j] * (x[j] - mean);
    }
  }
  block_sum<Threads>(sums);
  if (threadIdx.x != 0) return;
  a.sum[channel] = sums[0];
  a.product[channel] = sums[1] * a.rstd[channel / a.width];
}

// scale * weight of channel c of a group.
template <class T>
__device__ __forceinline__ float group_norm_factor(const GroupNormBackward<T>& a, int64_t first, int64_t image,
                                                   int64_t c) {
  return parameter<T>(a.scale, a.float_scale, image + c, 1.0f) *
         parameter<T>(a.weight, a.float_weight, first + c, 1.0f);
}

// Block row * parts + part.
template <class T, int N, int Threads>
__global__ void __launch_bounds__(Threads) group_norm_dx(GroupNormBackward<T> a) {
  const int64_t row = blockIdx.x / a.parts, part = blockIdx.x % a.parts, size = a.width * a.spatial;
  const int64_t first = row % a.groups * a.width, image = row / a.groups * a.groups * a.width + first;
  const float mean = a.mean[row], rstd = a.rstd[row];
  float sums[2] = {0.0f, 0.0f};
  for (int64_t c = threadIdx.x; c < a.width; c += Threads) {
    const float factor = group_norm_factor(a, first, image, c);
    sums[0] += factor * a.sum[image + c];
    sums[1] += factor * a.product[image + c];
  }
  block_sum<Threads>(sums);
  const float mean_g = sums[0] / static_cast<float>(size), mean_gh = sums[1] / static_cast<float>(size);
  const PartRange range = part_range(size, a.parts, part, N);
  const int64_t base = row * size;
  for (int64_t i = range.begin + static_cast<int64_t>(threadIdx.x) * N; i < range.end; i += Threads * N) {
    const float factor =
        group_norm_factor(a, first, image, static_cast<uint32_t>(i) / static_cast<uint32_t>(a.spatial));
    float d[N], x[N];
    load<N>(a.grad + base + i, d);
    load<N>(a.x + base + i, x);
#pragma unroll
    for (int j = 0; j < N; ++j) d[j] = rstd * (d[j] * factor - mean_g - (x[j] - mean) * rstd * mean_gh);
    store<N>(a.dx + base + i, d);
  }
}

// Block (32 channels, 8): samples threadIdx.y, + 8, ..., whose sums are added in order.
template <class T>
__global__ void __launch_bounds__(256, 1) group_norm_parameters(GroupNormBackward<T> a) {
  FASTDL_SHARED(float, sums, [2][8][33]);
  const int64_t channels = a.groups * a.width, c = static_cast<int64_t>(blockIdx.x) * 32 + threadIdx.x;
  float dweight = 0.0f, dbias = 0.0f;
  if (c < channels) {
    const float weight = parameter<T>(a.weight, a.float_weight, c, 1.0f);
    const float bias = parameter<T>(a.bias, a.float_bias, c, 0.0f);
    for (int64_t n = threadIdx.y; n < a.rows / a.groups; n += 8) {
      const int64_t at = n * channels + c;
      const float scale = parameter<T>(a.scale, a.float_scale, at, 1.0f);
      dweight += scale * a.product[at];
      dbias += scale * a.sum[at];
      if (a.dscale) a.dscale[at] = weight * a.product[at] + bias * a.sum[at];
      if (a.dshift) a.dshift[at] = a.sum[at];
    }
  }
  sums[0][threadIdx.y][threadIdx.x] = dweight;
  sums[1][threadIdx.y][threadIdx.x] = dbias;
  __syncthreads();
  float* out = threadIdx.y == 0 ? a.dweight : a.dbias;
  if (threadIdx.y < 2 && c < channels && out) {
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < 8; ++i) sum += sums[threadIdx.y][i][threadIdx.x];
    out[c] = sum;
  }
}

template <class T, int N>
cudaError_t group_norm_backward_launch(const GroupNormBackward<T>& a, cudaStream_t stream) {
  const int64_t count = a.rows * a.width;
  cudaError_t error =
      a.spatial >= 4096
          ? launch(group_norm_sums<T, N, 256, 1>, dim3(static_cast<unsigned>(count)), dim3(256), 0, stream, a)
          : launch(group_norm_sums<T, N, 32, 4>, dim3(static_cast<unsigned>((count + 3) / 4)), dim3(32, 4), 0, stream,
                   a);
  if (error != cudaSuccess) return error;
  const dim3 blocks(static_cast<unsigned>(a.rows * a.parts));
  error = a.width * a.spatial <= 256 * N ? launch(group_norm_dx<T, N, 64>, blocks, dim3(64), 0, stream, a)
                                         : launch(group_norm_dx<T, N, 256>, blocks, dim3(256), 0, stream, a);
  if (error != cudaSuccess || !(a.dweight || a.dbias || a.dscale || a.dshift)) return error;
  const auto tiles = static_cast<unsigned>((a.groups * a.width + 31) / 32);
  return launch(group_norm_parameters<T>, dim3(tiles), dim3(32, 8), 0, stream, a);
}

template <class T>
cudaError_t group_norm_backward_launch(const GroupNormBackward<T>& a, cudaStream_t stream) {
  constexpr int N = 16 / sizeof(T);
  if (divides(N, a.x, a.spatial, a.spatial) && divides(N, a.grad, a.spatial, a.spatial) &&
      divides(N, a.dx, a.spatial, a.spatial))
    return group_norm_backward_launch<T, N>(a, stream);
  return group_norm_backward_launch<T, 1>(a, stream);
}

}  // namespace fastdl::cuda
