// Group norm on CUDA, forward (contract: fastdl/ops/group_norm.py):
//
//   h = (x - mean) * rstd  over a group of channels;   y = scale * (h * weight + bias) + shift
//
// A group is one run of memory. Small ones: one block, which finds the moments in one pass and reads the group again from
// the cache. Large ones: several blocks find the moments of parts, and as many merge them, in order, and write their part.
// Floor: (read of x + write of y) / bandwidth; a group larger than the cache is read twice.
//
// Test: pytest tests/test_group_norm.py        Backward: group_norm_backward.cuh
#pragma once

#include "cuda/channels.cuh"

namespace fastdl::cuda {

template <class T>
struct GroupNormForward {
  const T* x;                                 // [N, groups, width, spatial]
  const void *weight, *bias, *scale, *shift;  // [groups * width], and [N, groups * width]; T or float32, or null
  bool float_weight, float_bias, float_scale, float_shift;
  T* y;                // as x
  float *mean, *rstd;  // [N, groups]
  float* partial;      // [N * groups, parts, 2]: mean and squares; null where parts is 1
  int64_t rows, groups, width, spatial, parts;
  float eps;
};

// y of the elements begin .. end of a group. N divides spatial, so that a vector has one channel.
template <int N, int Threads, class T>
__device__ __forceinline__ void group_norm_affine(const GroupNormForward<T>& a, int64_t row, PartRange range,
                                                  float mean, float rstd) {
  const int64_t first = row % a.groups * a.width, image = row / a.groups * a.groups * a.width + first;
  const int64_t base = row * a.width * a.spatial;
  for (int64_t i = range.begin + static_cast<int64_t>(threadIdx.x) * N; i < range.end; i += Threads * N) {
    const int64_t c = static_cast<uint32_t>(i) / static_cast<uint32_t>(a.spatial);
    const float scale = parameter<T>(a.scale, a.float_scale, image + c, 1.0f);
    const float slope = scale * parameter<T>(a.weight, a.float_weight, first + c, 1.0f) * rstd;
    const float bias = scale * parameter<T>(a.bias, a.float_bias, first + c, 0.0f) +
                       parameter<T>(a.shift, a.float_shift, image + c, 0.0f);
    float v[N];
    load<N>(a.x + base + i, v);
#pragma unroll
    for (int j = 0; j < N; ++j) v[j] = (v[j] - mean) * slope + bias;
    store<N>(a.y + base + i, v);
  }
}

template <class T>
__device__ __forceinline__ float group_norm_statistics(const GroupNormForward<T>& a, int64_t row, const Moments& m,
                                                       bool keep) {
  const float rstd = rsqrtf(m.squares / m.count + a.eps);
  if (keep && threadIdx.x == 0) {
    a.mean[row] = m.mean;
    a.rstd[row] = rstd;
  }
  return rstd;
}

// One block a group.
template <class T, int N, int Threads>
__global__ void __launch_bounds__(Threads) group_norm_forward_rows(GroupNormForward<T> a) {
  const int64_t row = blockIdx.x, size = a.width * a.spatial;
  const Moments m = run_moments<N, Threads>(a.x + row * size, 0, size);
  const float rstd = group_norm_statistics(a, row, m, true);
  group_norm_affine<N, Threads>(a, row, {0, size}, m.mean, rstd);
}

// Block row * parts + part: the moments of a part.
template <class T, int N, int Threads>
__global__ void __launch_bounds__(Threads) group_norm_moments(GroupNormForward<T> a) {
  const int64_t row = blockIdx.x / a.parts, part = blockIdx.x % a.parts, size = a.width * a.spatial;
  const PartRange range = part_range(size, a.parts, part, N);
  const Moments m = run_moments<N, Threads>(a.x + row * size, range.begin, range.end);
  if (threadIdx.x == 0) {
    a.partial[blockIdx.x * 2] = m.mean;
    a.partial[blockIdx.x * 2 + 1] = m.squares;
  }
}

// Block row * parts + part: merges the parts, writes y of one of them.
template <class T, int N, int Threads>
__global__ void __launch_bounds__(Threads) group_norm_apply(GroupNormForward<T> a) {
  const int64_t row = blockIdx.x / a.parts, part = blockIdx.x % a.parts, size = a.width * a.spatial;
  const float* partial = a.partial + row * a.parts * 2;
  const int64_t lane = threadIdx.x;
  Moments mine;
  if (lane < a.parts) {
    const PartRange range = part_range(size, a.parts, lane, N);
    mine = {static_cast<float>(range.end - range.begin), partial[lane * 2], partial[lane * 2 + 1]};
  }
  const Moments m = block_moments<Threads>(mine, finite_or_zero(partial[0]), static_cast<float>(size));
  const float rstd = group_norm_statistics(a, row, m, part == 0);
  group_norm_affine<N, Threads>(a, row, part_range(size, a.parts, part, N), m.mean, rstd);
}

template <class T, int N>
cudaError_t group_norm_forward_launch(const GroupNormForward<T>& a, cudaStream_t stream) {
  const dim3 blocks(static_cast<unsigned>(a.rows * a.parts));
  if (a.parts == 1) {
    if (a.width * a.spatial <= 256 * N)
      return launch(group_norm_forward_rows<T, N, 64>, blocks, dim3(64), 0, stream, a);
    return launch(group_norm_forward_rows<T, N, 512>, blocks, dim3(512), 0, stream, a);
  }
  const cudaError_t error = launch(group_norm_moments<T, N, 256>, blocks, dim3(256), 0, stream, a);
  if (error != cudaSuccess) return error;
  return launch(group_norm_apply<T, N, 256>, blocks, dim3(256), 0, stream, a);
}

// a.parts is part_count(rows, width * spatial), and a.partial holds [rows, parts, 2] where that is more than 1.
template <class T>
cudaError_t group_norm_forward_launch(const GroupNormForward<T>& a, cudaStream_t stream) {
  constexpr int N = 16 / sizeof(T);
  if (divides(N, a.x, a.spatial, a.spatial) && divides(N, a.y, a.spatial, a.spatial))
    return group_norm_forward_launch<T, N>(a, stream);
  return group_norm_forward_launch<T, 1>(a, stream);
}

}  // namespace fastdl::cuda
