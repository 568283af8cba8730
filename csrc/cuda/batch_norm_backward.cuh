// Batch norm on CUDA, backward:
//
//   g = grad where y > 0, else 0 (grad without a ReLU);   dresidual = g
//   dweight = sum(g * h),  dbias = sum(g)  of a channel over the batch
//   training  dx = weight * rstd * (g - mean(g) - h * mean(g * h));   evaluation  dx = weight * rstd * g
//
// `products` cuts the batch as `moments` does; `sums` adds its parts in order; `dx`. Floor: (reads of grad, x, y twice +
// writes of dx, dresidual) / bandwidth; in evaluation without parameters grad and y once.
//
// Test: pytest tests/test_batch_norm.py
#pragma once

#include "cuda/batch_norm.cuh"

namespace fastdl::cuda {

template <class T>
struct BatchNormBackward {
  const T *grad, *x, *y;  // [N, C, spatial]; y null without a ReLU
  const void* weight;     // [C] T or float32, or null
  bool float_weight;
  const float *mean, *var;  // [C]
  T *dx, *dresidual;        // [N, C, spatial]; dresidual or null
  float* partial;           // [parts, 2, units]: sums of g and of g * (x - mean); null where they are not needed
  float* sums;              // [2, C]: the same of all parts
  float *dweight, *dbias;   // [C], or null
  BatchNormPlan plan;
  float eps;
  bool training;
};

// g of N elements: grad, or 0 where the ReLU cut it off.
template <int N, class T>
__device__ __forceinline__ void batch_norm_gate(const BatchNormBackward<T>& a, int64_t at, float (&g)[N]) {
  load<N>(a.grad + at, g);
  if (a.y == nullptr) return;
  float y[N];
  load<N>(a.y + at, y);
#pragma unroll
  for (int j = 0; j < N; ++j) g[j] = y[j] <= 0.0f ? 0.0f : g[j];
}

// Block channel * parts + part. N divides spatial.
template <class T, int N>
__global__ void __launch_bounds__(256) batch_norm_products_planes(BatchNormBackward<T> a) {
  const BatchNormPlan& plan = a.plan;
  const int64_t channel = blockIdx.x / plan.parts, part = blockIdx.x % plan.parts;
  const int64_t begin = part * plan.length, left = plan.run - begin, count = left < plan.length ? left : plan.length;
  const PlaneWalk walk(plan, channel, begin);
  const float mean = a.mean[channel];
  float sums[2] = {0.0f, 0.0f};
  for (int64_t i = static_cast<int64_t>(threadIdx.x) * N; i < count; i += 256 * N) {
    const int64_t at = walk.offset(i);
    float g[N], x[N];
    batch_norm_gate(a, at, g);
    load<N>(a.x + at, x);
#pragma unroll
    for (int j = 0; j < N; ++j) {
      sums[0] += g[j];
      sums[1] += g[j] * (x[j] - mean);
    }
  }
  block_sum<256>(sums);
  if (threadIdx.x != 0) return;
  a.partial[part * 2 * plan.units + channel] = sums[0];
  a.partial[(part * 2 + 1) * plan.units + channel] = sums[1];
}

// Block (32, 8): vectors of N columns, rows threadIdx.y, + 8, ... of part blockIdx.y.
template <class T, int N>
__global__ void __launch_bounds__(256) batch_norm_products_columns(BatchNormBackward<T> a) {
  FASTDL_SHARED(float, shared, [2][8][32 * N + 1]);
  const BatchNormPlan& plan = a.plan;
  const int64_t unit = (static_cast<int64_t>(blockIdx.x) * 32 + threadIdx.x) * N;
  const int64_t begin = blockIdx.y * plan.length, left = plan.run - begin;
  const int64_t count = left < plan.length ? left : plan.length;
  float sums[2][N] = {};
  if (unit < plan.units) {
    float mean[N];
#pragma unroll
    for (int i = 0; i < N; ++i) mean[i] = a.mean[static_cast<uint32_t>(unit + i) / static_cast<uint32_t>(plan.spatial)];
    for (int64_t row = threadIdx.y; row < count; row += 8) {
      const int64_t at = (begin + row) * plan.units + unit;
      float g[N], x[N];
      batch_norm_gate(a, at, g);
      load<N>(a.x + at, x);
#pragma unroll
      for (int i = 0; i < N; ++i) {
        sums[0][i] += g[i];
        sums[1][i] += g[i] * (x[i] - mean[i]);
      }
    }
  }
#pragma unroll
  for (int i = 0; i < N; ++i) {
    shared[0][threadIdx.y][threadIdx.x * N + i] = sums[0][i];
    shared[1][threadIdx.y][threadIdx.x * N + i] = sums[1][i];
  }
  __syncthreads();
  for (int j = static_cast<int>(threadIdx.y * 32 + threadIdx.x); j < 2 * 32 * N; j += 256) {
    const int which = j / (32 * N), column = j % (32 * N);
    const int64_t at = static_cast<int64_t>(blockIdx.x) * 32 * N + column;
    if (at >= plan.units) continue;
    float sum = 0.0f;
#pragma unroll
    for (int y = 0; y < 8; ++y) sum += shared[which][y][column];
    a.partial[(blockIdx.y * 2 + which) * plan.units + at] = sum;
  }
}

// Block (32, 8): a warp a channel adds its parts, and its columns.
template <class T>
__global__ void __launch_bounds__(256) batch_norm_sums(BatchNormBackward<T> a) {
  const BatchNormPlan& plan = a.plan;
  const int64_t channel = static_cast<int64_t>(blockIdx.x) * 8 + threadIdx.y;
  if (channel >= plan.channels) return;  // a whole warp, and no block barrier
  const int64_t width = plan.units / plan.channels, pieces = plan.parts * width;
  float sum = 0.0f, product = 0.0f;
  for (int64_t i = threadIdx.x; i < pieces; i += 32) {
    const int64_t at = i / width * 2 * plan.units + channel * width + i % width;
    sum += a.partial[at];
    product += a.partial[at + plan.units];
  }
  sum = warp_sum(sum);
  product = warp_sum(product);
  if (threadIdx.x != 0) return;
  a.sums[channel] = sum;
  a.sums[plan.channels + channel] = product;
  if (a.dbias) a.dbias[channel] = sum;
  if (a.dweight) a.dweight[channel] = product * rsqrtf(a.var[channel] + a.eps);
}

// A block takes 256 * kVectors vectors of the whole tensor. Last: spatial is 1, and a vector has N channels; else it has one.
template <class T, int N, bool Last>
__global__ void __launch_bounds__(256) batch_norm_dx(BatchNormBackward<T> a) {
  const BatchNormPlan& plan = a.plan;
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * 256 * kVectors * N;
  const int64_t size = plan.n * plan.channels * plan.spatial;
  const float share = 1.0f / static_cast<float>(plan.n * plan.spatial);
  const ChannelWalk walk(plan, begin);
  float mean = 0.0f, slope = 0.0f, pull = 0.0f, shift = 0.0f;
  const auto coefficients = [&](int64_t c) {
    const float rstd = rsqrtf(a.var[c] + a.eps);
    slope = parameter<T>(a.weight, a.float_weight, c, 1.0f) * rstd;
    if (!a.training) return;
    mean = a.mean[c];
    shift = a.sums[c] * share;
    pull = a.sums[plan.channels + c] * share * rstd * rstd;
  };
#pragma unroll
  for (int k = 0; k < kVectors; ++k) {
    const uint32_t i = (k * 256 + threadIdx.x) * N;
    if (begin + i >= size) continue;
    float g[N], x[N] = {};
    batch_norm_gate(a, begin + i, g);
    if (a.dresidual) store<N>(a.dresidual + begin + i, g);
    if (a.training) load<N>(a.x + begin + i, x);
    const int64_t c = walk.channel(i);
    if (!Last) coefficients(c);
#pragma unroll
    for (int j = 0; j < N; ++j) {
      if (Last) coefficients(c + j);
      g[j] = slope * (g[j] - shift - (x[j] - mean) * pull);
    }
    store<N>(a.dx + begin + i, g);
  }
}

template <class T, int N>
cudaError_t batch_norm_products_launch(const BatchNormBackward<T>& a, cudaStream_t stream) {
  const BatchNormPlan& plan = a.plan;
  if (!plan.columns)
    return launch(batch_norm_products_planes<T, N>, dim3(static_cast<unsigned>(plan.units * plan.parts)), dim3(256), 0,
                  stream, a);
  const auto tiles = static_cast<unsigned>((plan.units + 32 * N - 1) / (32 * N));
  return launch(batch_norm_products_columns<T, N>, dim3(tiles, static_cast<unsigned>(plan.parts)), dim3(32, 8), 0,
                stream, a);
}

template <class T, int N, bool Last>
cudaError_t batch_norm_dx_launch(const BatchNormBackward<T>& a, cudaStream_t stream) {
  const int64_t size = a.plan.n * a.plan.channels * a.plan.spatial, step = 256 * kVectors * N;
  return launch(batch_norm_dx<T, N, Last>, dim3(static_cast<unsigned>((size + step - 1) / step)), dim3(256), 0, stream,
                a);
}

template <class T>
cudaError_t batch_norm_backward_launch(const BatchNormBackward<T>& a, cudaStream_t stream) {
  constexpr int N = 16 / sizeof(T);
  const int64_t spatial = a.plan.spatial, row = a.plan.channels * spatial;
  const bool rows = divides(N, a.x, row, row) && divides(N, a.grad, row, row) && divides(N, a.dx, row, row) &&
                    (!a.y || divides(N, a.y, row, row)) && (!a.dresidual || divides(N, a.dresidual, row, row));
  const bool vectors = rows && spatial % N == 0, last = rows && spatial == 1;
  if (a.partial) {
    const bool wide = a.plan.columns ? rows : vectors;
    cudaError_t error =
        wide ? batch_norm_products_launch<T, N>(a, stream) : batch_norm_products_launch<T, 1>(a, stream);
    if (error != cudaSuccess) return error;
    const auto blocks = static_cast<unsigned>((a.plan.channels + 7) / 8);
    error = launch(batch_norm_sums<T>, dim3(blocks), dim3(32, 8), 0, stream, a);
    if (error != cudaSuccess) return error;
  }
  if (vectors) return batch_norm_dx_launch<T, N, false>(a, stream);
  if (last) return batch_norm_dx_launch<T, N, true>(a, stream);
  return batch_norm_dx_launch<T, 1, false>(a, stream);
}

}  // namespace fastdl::cuda
