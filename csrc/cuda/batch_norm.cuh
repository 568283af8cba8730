// Batch norm on CUDA, forward (contract: fastdl/ops/batch_norm.py):
//
//   h = (x - mean) * rstd  of a channel over the batch;   y = relu(h * weight + bias + residual)
//
// x is [N, C, spatial]. Long channels are planes: a block takes a part of one channel's elements. Short ones, and channels
// last (where spatial is 1), are columns of [N, C * spatial]: a block takes 32 columns, or 32 vectors, of a part of the rows.
// `moments` (one pass), `statistics` (merges parts in order), `apply`. Floor: (reads of x twice, of residual + write of y) /
// bandwidth; in evaluation x once.
//
// Test: pytest tests/test_batch_norm.py        Backward: batch_norm_backward.cuh
#pragma once

#include "cuda/channels.cuh"

namespace fastdl::cuda {

// How a batch is cut: a function of the shape alone.
struct BatchNormPlan {
  int64_t n, channels, spatial;
  bool columns;
  int64_t units;          // of the partial results: channels, or C * spatial columns
  int64_t run;            // elements a unit has: N * spatial, or N
  int64_t parts, length;  // of a run; length elements each, the last one shorter
};

inline BatchNormPlan batch_norm_plan(int64_t n, int64_t channels, int64_t spatial) {
  BatchNormPlan plan{n, channels, spatial, spatial < 32, 0, 0, 0, 0};
  plan.units = plan.columns ? channels * spatial : channels;
  plan.run = plan.columns ? n : n * spatial;
  // Columns: 32 threads of a block share 8 rows at a time, and a part has 128 rows at least.
  plan.parts = plan.columns ? part_count((plan.units + 31) / 32, plan.run * 128) : part_count(plan.units, plan.run);
  plan.length = part_length(plan.run, plan.parts, plan.columns ? 1 : 8);  // vectors stay in one part
  plan.parts = (plan.run + plan.length - 1) / plan.length;
  return plan;
}

template <class T>
struct BatchNormForward {
  const T *x, *residual;      // [N, C, spatial]; residual or null
  const void *weight, *bias;  // [C] T or float32, or null
  bool float_weight, float_bias;
  const float *mean, *var;        // [C]: what y is made with
  float *batch_mean, *batch_var;  // [C]: written in training, the same memory as mean, var; else null
  T* y;
  float* partial;  // [parts, 2, units]: mean and squares
  BatchNormPlan plan;
  float eps;
  bool relu;
};

// Elements of a channel: `offset` of element i of the run of N * spatial, i counted from `begin`.
struct PlaneWalk {
  int64_t image, first;  // distance of samples; where the first sample's plane begins
  uint32_t position, spatial;

  __device__ PlaneWalk(const BatchNormPlan& plan, int64_t channel, int64_t begin)
      : image(plan.channels * plan.spatial),
        first((begin / plan.spatial * plan.channels + channel) * plan.spatial),
        position(static_cast<uint32_t>(begin % plan.spatial)),
        spatial(static_cast<uint32_t>(plan.spatial)) {}
  __device__ __forceinline__ int64_t offset(int64_t i) const {
    const uint32_t at = position + static_cast<uint32_t>(i);
    return first + at / spatial * image + at % spatial;
  }
};

// Channels of elements of [N, C, spatial] near `begin`.
struct ChannelWalk {
  uint32_t first, position, spatial, channels;

  __device__ ChannelWalk(const BatchNormPlan& plan, int64_t begin)
      : first(static_cast<uint32_t>(begin / plan.spatial % plan.channels)),
        position(static_cast<uint32_t>(begin % plan.spatial)),
        spatial(static_cast<uint32_t>(plan.spatial)),
        channels(static_cast<uint32_t>(plan.channels)) {}
  __device__ __forceinline__ int64_t channel(uint32_t i) const { return (first + (position + i) / spatial) % channels; }
};

// Block channel * parts + part. N divides spatial.
template <class T, int N>
__global__ void __launch_bounds__(256) batch_norm_moments_planes(BatchNormForward<T> a) {
  const BatchNormPlan& plan = a.plan;
  const int64_t channel = blockIdx.x / plan.parts, part = blockIdx.x % plan.parts;
  const int64_t begin = part * plan.length, left = plan.run - begin, count = left < plan.length ? left : plan.length;
  const PlaneWalk walk(plan, channel, begin);
  MomentSums sums;
  for (int64_t i = static_cast<int64_t>(threadIdx.x) * N; i < count; i += 256 * N) {
    float v[N];
    load<N>(a.x + walk.offset(i), v);
    sums.add(v);
  }
  const float origin = finite_or_zero(to_float(a.x[walk.offset(0)]));
  const Moments m = block_moments<256>(sums.moments(), origin, static_cast<float>(count));
  if (threadIdx.x != 0) return;
  a.partial[part * 2 * plan.units + channel] = m.mean;
  a.partial[(part * 2 + 1) * plan.units + channel] = m.squares;
}

// Block (32, 8): vectors of N columns, rows threadIdx.y, + 8, ... of part blockIdx.y.
template <class T, int N>
__global__ void __launch_bounds__(256) batch_norm_moments_columns(BatchNormForward<T> a) {
  FASTDL_SHARED(float, means, [8][32 * N + 1]);
  FASTDL_SHARED(float, squares, [8][32 * N + 1]);
  const BatchNormPlan& plan = a.plan;
  const int64_t unit = (static_cast<int64_t>(blockIdx.x) * 32 + threadIdx.x) * N;
  const int64_t begin = blockIdx.y * plan.length, left = plan.run - begin;
  const int64_t count = left < plan.length ? left : plan.length;
  MomentSums sums[N];
  if (unit < plan.units) {
    for (int64_t row = threadIdx.y; row < count; row += 8) {
      float v[N];
      load<N>(a.x + (begin + row) * plan.units + unit, v);
#pragma unroll
      for (int i = 0; i < N; ++i) {
        const float one[1] = {v[i]};
        sums[i].add(one);
      }
    }
  }
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const Moments m = sums[i].moments();
    means[threadIdx.y][threadIdx.x * N + i] = m.mean;
    squares[threadIdx.y][threadIdx.x * N + i] = m.squares;
  }
  __syncthreads();
  // Column j of the block's 32 * N is merged by one thread.
  for (int j = static_cast<int>(threadIdx.y * 32 + threadIdx.x); j < 32 * N; j += 256) {
    const int64_t at = static_cast<int64_t>(blockIdx.x) * 32 * N + j;
    if (at >= plan.units) continue;
    const float origin = finite_or_zero(means[0][j]);
    float shifted = 0.0f, square = 0.0f;
    const auto rows = [&](int y) { return static_cast<float>((count - y + 7) / 8); };
    for (int y = 0; y < 8 && y < count; ++y) shifted += rows(y) * (means[y][j] - origin);
    const float mean = origin + shifted / static_cast<float>(count);
    for (int y = 0; y < 8 && y < count; ++y) {
      const float apart = means[y][j] - mean;
      square += squares[y][j] + rows(y) * apart * apart;
    }
    a.partial[blockIdx.y * 2 * plan.units + at] = mean;
    a.partial[(blockIdx.y * 2 + 1) * plan.units + at] = square;
  }
}

// Block (32, 8): a warp a channel merges its parts, and its columns.
template <class T>
__global__ void __launch_bounds__(256) batch_norm_statistics(BatchNormForward<T> a) {
  const BatchNormPlan& plan = a.plan;
  const int64_t channel = static_cast<int64_t>(blockIdx.x) * 8 + threadIdx.y;
  if (channel >= plan.channels) return;  // a whole warp, and no block barrier
  const int64_t width = plan.units / plan.channels, pieces = plan.parts * width, first = channel * width;
  const auto at = [&](int64_t i) { return i / width * 2 * plan.units + first + i % width; };
  const auto count = [&](int64_t i) {
    const int64_t left = plan.run - i / width * plan.length;
    return static_cast<float>(left < plan.length ? left : plan.length);
  };
  const float total = static_cast<float>(plan.run * width), origin = finite_or_zero(a.partial[first]);
  float sums[1] = {0.0f};
  for (int64_t i = threadIdx.x; i < pieces; i += 32) sums[0] += count(i) * (a.partial[at(i)] - origin);
  const float mean = origin + warp_sum(sums[0]) / total;
  sums[0] = 0.0f;
  for (int64_t i = threadIdx.x; i < pieces; i += 32) {
    const float apart = a.partial[at(i)] - mean;
    sums[0] += a.partial[at(i) + plan.units] + count(i) * apart * apart;
  }
  const float squares = warp_sum(sums[0]);
  if (threadIdx.x != 0) return;
  a.batch_mean[channel] = mean;
  a.batch_var[channel] = squares / total;
}

// A block takes 256 * kVectors vectors of the whole tensor. Last: spatial is 1, and a vector has N channels; else it has one.
constexpr int kVectors = 4;

template <class T, int N, bool Last>
__global__ void __launch_bounds__(256) batch_norm_apply(BatchNormForward<T> a) {
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * 256 * kVectors * N;
  const int64_t size = a.plan.n * a.plan.channels * a.plan.spatial;
  const ChannelWalk walk(a.plan, begin);
  float mean = 0.0f, slope = 0.0f, shift = 0.0f;
  const auto coefficients = [&](int64_t c) {
    mean = a.mean[c];
    slope = parameter<T>(a.weight, a.float_weight, c, 1.0f) * rsqrtf(a.var[c] + a.eps);
    shift = parameter<T>(a.bias, a.float_bias, c, 0.0f);
  };
#pragma unroll
  for (int k = 0; k < kVectors; ++k) {
    const uint32_t i = (k * 256 + threadIdx.x) * N;
    if (begin + i >= size) continue;
    float v[N], r[N] = {};
    load<N>(a.x + begin + i, v);
    if (a.residual) load<N>(a.residual + begin + i, r);
    const int64_t c = walk.channel(i);
    if (!Last) coefficients(c);
#pragma unroll
    for (int j = 0; j < N; ++j) {
      if (Last) coefficients(c + j);
      v[j] = (v[j] - mean) * slope + shift + r[j];
      if (a.relu && v[j] <= 0.0f) v[j] = 0.0f;  // NaN stays
    }
    store<N>(a.y + begin + i, v);
  }
}

template <class T, int N>
cudaError_t batch_norm_moments_launch(const BatchNormForward<T>& a, cudaStream_t stream) {
  const BatchNormPlan& plan = a.plan;
  if (!plan.columns)
    return launch(batch_norm_moments_planes<T, N>, dim3(static_cast<unsigned>(plan.units * plan.parts)), dim3(256), 0,
                  stream, a);
  const auto tiles = static_cast<unsigned>((plan.units + 32 * N - 1) / (32 * N));
  return launch(batch_norm_moments_columns<T, N>, dim3(tiles, static_cast<unsigned>(plan.parts)), dim3(32, 8), 0,
                stream, a);
}

template <class T, int N, bool Last>
cudaError_t batch_norm_apply_launch(const BatchNormForward<T>& a, cudaStream_t stream) {
  const int64_t size = a.plan.n * a.plan.channels * a.plan.spatial, step = 256 * kVectors * N;
  return launch(batch_norm_apply<T, N, Last>, dim3(static_cast<unsigned>((size + step - 1) / step)), dim3(256), 0,
                stream, a);
}

template <class T>
cudaError_t batch_norm_forward_launch(const BatchNormForward<T>& a, cudaStream_t stream) {
  constexpr int N = 16 / sizeof(T);
  const int64_t spatial = a.plan.spatial, row = a.plan.channels * spatial;
  const bool rows =
      divides(N, a.x, row, row) && divides(N, a.y, row, row) && (!a.residual || divides(N, a.residual, row, row));
  const bool vectors = rows && spatial % N == 0, last = rows && spatial == 1;
  if (a.batch_mean) {
    const bool wide = a.plan.columns ? rows : vectors;
    cudaError_t error = wide ? batch_norm_moments_launch<T, N>(a, stream) : batch_norm_moments_launch<T, 1>(a, stream);
    if (error != cudaSuccess) return error;
    const auto blocks = static_cast<unsigned>((a.plan.channels + 7) / 8);
    error = launch(batch_norm_statistics<T>, dim3(blocks), dim3(32, 8), 0, stream, a);
    if (error != cudaSuccess) return error;
  }
  if (vectors) return batch_norm_apply_launch<T, N, false>(a, stream);
  if (last) return batch_norm_apply_launch<T, N, true>(a, stream);
  return batch_norm_apply_launch<T, 1, false>(a, stream);
}

}  // namespace fastdl::cuda
