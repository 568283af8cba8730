// Layer norm and RMS norm on CUDA, backward:
//
//   g  = grad * (weight + offset)
//   ds = rstd * (g - mean(g) - h * mean(g * h)) + grad_sum      (RMS: without mean(g))       dx = dropout's mask of ds
//   dweight = sum over rows of grad * h,   dbias = sum over rows of grad
//
// `rows`: as many blocks as fill the GPU walk over the rows; a row lies in registers, and so do the block's sums for
// dweight and dbias, which go to partial[block] at the end. `stream`: any width and alignment, dx alone, the sums by
// `columns`. `sum_partials` adds the partial sums in the order of the blocks: the result depends on the GPU's size, not on
// time. Floor: (reads of grad, grad_sum, s + writes of ds, dx) / bandwidth.
//
// Test: pytest tests/test_norm.py
#pragma once

#include "cuda/norm.cuh"

namespace fastdl::cuda {

template <class T>
struct NormBackward {
  const T* grad;        // [rows, cols], rows grad_stride apart
  const T* grad_sum;    // [rows, cols], rows grad_sum_stride apart, or null
  const T* s;           // [rows, cols], rows s_stride apart
  const void* weight;   // [cols] T or float32, or null
  const float* mean;    // [rows], or null: RMS norm
  const float* rstd;    // [rows]
  const int64_t* seed;  // [1] on the device, or null
  T* ds;                // [rows, cols]
  T* dx;                // [rows, cols], or null where it is ds
  float* partial;       // [2][parts][cols]: sums for dweight, then dbias; or null where neither is asked for
  int64_t rows, cols, grad_stride, grad_sum_stride, s_stride, parts;
  float p, scale, offset;
  bool float_parameters;
};

// grad, h and g at columns [col, col + N) of a row.
template <int N, class T>
__device__ __forceinline__ void norm_backward_load(const NormBackward<T>& a, int64_t row, int64_t col, float mean,
                                                   float rstd, float (&d)[N], float (&h)[N], float (&g)[N]) {
  load<N>(a.grad + row * a.grad_stride + col, d);
  load<N>(a.s + row * a.s_stride + col, h);
  norm_parameters<N, T>(a.weight, a.float_parameters, col, 1.0f, g);
#pragma unroll
  for (int i = 0; i < N; ++i) {
    h[i] = (h[i] - mean) * rstd;
    g[i] = d[i] * (g[i] + a.offset);
  }
}

// ds and dx from h, g and the row's means of g * h and g.
template <int N, class T>
__device__ __forceinline__ void norm_backward_store(const NormBackward<T>& a, int64_t row, int64_t col, float rstd,
                                                    float mean_gh, float mean_g, uint64_t seed, const float (&h)[N],
                                                    const float (&g)[N]) {
  float ds[N];
#pragma unroll
  for (int i = 0; i < N; ++i) ds[i] = rstd * (g[i] - mean_g - h[i] * mean_gh);
  if (a.grad_sum) {
    float extra[N];
    load<N>(a.grad_sum + row * a.grad_sum_stride + col, extra);
#pragma unroll
    for (int i = 0; i < N; ++i) ds[i] += extra[i];
  }
  store<N>(a.ds + row * a.cols + col, ds);
  if (a.dx == nullptr) return;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const float keep = philox_dropout(seed, static_cast<uint64_t>(row * a.cols + col + i), a.p, a.scale);
    ds[i] = keep == 0.0f ? 0.0f : ds[i] * keep;
  }
  store<N>(a.dx + row * a.cols + col, ds);
}

// Block: (Threads, Rows); with Rows > 1 a row has one warp. Part `blockIdx.x * Rows + threadIdx.y` of the partial sums.
template <class T, int Threads, int Chunks, int Rows>
__global__ void __launch_bounds__(Threads* Rows, 1) norm_backward_rows(NormBackward<T> a) {
  constexpr int N = 16 / sizeof(T);
  const uint64_t seed = a.seed ? static_cast<uint64_t>(*a.seed) : 0;
  const float width = 1.0f / static_cast<float>(a.cols);
  const int64_t part = static_cast<int64_t>(blockIdx.x) * Rows + threadIdx.y;
  float dweight[Chunks][N] = {}, dbias[Chunks][N] = {};
  for (int64_t row = part; row < a.rows; row += a.parts) {
    const float mean = a.mean ? a.mean[row] : 0.0f, rstd = a.rstd[row];
    float h[Chunks][N], g[Chunks][N], sums[2] = {0.0f, 0.0f};
#pragma unroll
    for (int c = 0; c < Chunks; ++c) {
      const int64_t col = static_cast<int64_t>(c * Threads + threadIdx.x) * N;
      if (col >= a.cols) continue;
      float d[N];
      norm_backward_load<N>(a, row, col, mean, rstd, d, h[c], g[c]);
#pragma unroll
      for (int i = 0; i < N; ++i) {
        sums[0] += g[c][i] * h[c][i];
        sums[1] += g[c][i];
        dweight[c][i] += d[i] * h[c][i];
        dbias[c][i] += d[i];
      }
    }
    block_sum<Threads>(sums);
    const float mean_gh = sums[0] * width, mean_g = a.mean ? sums[1] * width : 0.0f;
#pragma unroll
    for (int c = 0; c < Chunks; ++c) {
      const int64_t col = static_cast<int64_t>(c * Threads + threadIdx.x) * N;
      if (col < a.cols) norm_backward_store<N>(a, row, col, rstd, mean_gh, mean_g, seed, h[c], g[c]);
    }
  }
  if (a.partial == nullptr) return;
#pragma unroll
  for (int c = 0; c < Chunks; ++c) {
    const int64_t col = static_cast<int64_t>(c * Threads + threadIdx.x) * N;
    if (col >= a.cols) continue;
    store<N>(a.partial + part * a.cols + col, dweight[c]);
    store<N>(a.partial + (a.parts + part) * a.cols + col, dbias[c]);
  }
}

// One block a row: ds and dx.
template <class T, int N, int Threads>
__global__ void __launch_bounds__(Threads) norm_backward_stream(NormBackward<T> a) {
  const int64_t row = blockIdx.x, step = static_cast<int64_t>(Threads) * N,
                first = static_cast<int64_t>(threadIdx.x) * N;
  const uint64_t seed = a.seed ? static_cast<uint64_t>(*a.seed) : 0;
  const float mean = a.mean ? a.mean[row] : 0.0f, rstd = a.rstd[row], width = 1.0f / static_cast<float>(a.cols);
  float d[N], h[N], g[N], sums[2] = {0.0f, 0.0f};
  for (int64_t col = first; col < a.cols; col += step) {
    norm_backward_load<N>(a, row, col, mean, rstd, d, h, g);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      sums[0] += g[i] * h[i];
      sums[1] += g[i];
    }
  }
  block_sum<Threads>(sums);
  const float mean_gh = sums[0] * width, mean_g = a.mean ? sums[1] * width : 0.0f;
  for (int64_t col = first; col < a.cols; col += step) {
    norm_backward_load<N>(a, row, col, mean, rstd, d, h, g);
    norm_backward_store<N>(a, row, col, rstd, mean_gh, mean_g, seed, h, g);
  }
}

// Partial sums for dweight and dbias: block (32 columns, 8), part blockIdx.y takes the rows blockIdx.y, + parts, ...
template <class T>
__global__ void __launch_bounds__(256) norm_columns(NormBackward<T> a) {
  FASTDL_SHARED(float, sums, [2][8][33]);
  const int64_t col = static_cast<int64_t>(blockIdx.x) * 32 + threadIdx.x;
  float dweight = 0.0f, dbias = 0.0f;
  if (col < a.cols) {
    for (int64_t row = blockIdx.y + threadIdx.y * a.parts; row < a.rows; row += a.parts * 8) {
      const float d = to_float(a.grad[row * a.grad_stride + col]);
      const float mean = a.mean ? a.mean[row] : 0.0f;
      dweight += d * ((to_float(a.s[row * a.s_stride + col]) - mean) * a.rstd[row]);
      dbias += d;
    }
  }
  sums[0][threadIdx.y][threadIdx.x] = dweight;
  sums[1][threadIdx.y][threadIdx.x] = dbias;
  __syncthreads();
  if (threadIdx.y < 2 && col < a.cols) {
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < 8; ++i) sum += sums[threadIdx.y][i][threadIdx.x];
    a.partial[(threadIdx.y * a.parts + blockIdx.y) * a.cols + col] = sum;
  }
}

// How a backward pass is cut: the kernel for a width, and the number of partial sums, a function of shapes and the GPU.
struct NormPlan {
  int threads, chunks, rows;  // of norm_backward_rows; threads 0: stream and columns
  int64_t parts;
};

template <class T>
NormPlan norm_backward_plan(const NormBackward<T>& a) {
  constexpr int N = 16 / sizeof(T);
  const bool vectors = divides(N, a.grad, a.cols, a.grad_stride) && divides(N, a.s, a.cols, a.s_stride) &&
                       (!a.grad_sum || divides(N, a.grad_sum, a.cols, a.grad_sum_stride)) &&
                       reinterpret_cast<uintptr_t>(a.weight) % 16 == 0;
  const int64_t count = a.cols / N, processors = multiprocessor_count();
  NormPlan plan{0, 0, 1, 0};
  if (vectors && count <= 64)
    plan = {32, count <= 32 ? 1 : 2, 4, processors * 8 * 4};
  else if (vectors && count <= 256)
    plan = {128, count <= 128 ? 1 : 2, 1, processors * 8};
  else if (vectors && count <= 1024)
    plan = {256, count <= 512 ? 2 : 4, 1, processors * 4};
  else
    plan.parts = 64;
  const int64_t groups = (a.rows + plan.rows - 1) / plan.rows * plan.rows;
  plan.parts = plan.parts < groups ? plan.parts : groups;
  return plan;
}

template <class T, int Threads, int Chunks, int Rows>
cudaError_t norm_backward_rows_launch(const NormBackward<T>& a, cudaStream_t stream) {
  return launch(norm_backward_rows<T, Threads, Chunks, Rows>, dim3(static_cast<unsigned>(a.parts / Rows)),
                dim3(Threads, Rows), 0, stream, a);
}

// a.partial holds [2][plan.parts][cols] where dweight or dbias is not null; a.parts is plan.parts.
template <class T>
cudaError_t norm_backward_launch(const NormBackward<T>& a, const NormPlan& plan, float* dweight, float* dbias,
                                 cudaStream_t stream) {
  constexpr int N = 16 / sizeof(T);
  if (a.rows == 0) return cudaSuccess;
  cudaError_t error = cudaSuccess;
  const auto tiles = static_cast<unsigned>((a.cols + 31) / 32);
  if (plan.threads == 32)
    error = plan.chunks == 1 ? norm_backward_rows_launch<T, 32, 1, 4>(a, stream)
                             : norm_backward_rows_launch<T, 32, 2, 4>(a, stream);
  else if (plan.threads == 128)
    error = plan.chunks == 1 ? norm_backward_rows_launch<T, 128, 1, 1>(a, stream)
                             : norm_backward_rows_launch<T, 128, 2, 1>(a, stream);
  else if (plan.threads == 256)
    error = plan.chunks == 2 ? norm_backward_rows_launch<T, 256, 2, 1>(a, stream)
                             : norm_backward_rows_launch<T, 256, 4, 1>(a, stream);
  else {
    const dim3 rows(static_cast<unsigned>(a.rows));
    const bool vectors = divides(N, a.grad, a.cols, a.grad_stride) && divides(N, a.s, a.cols, a.s_stride) &&
                         (!a.grad_sum || divides(N, a.grad_sum, a.cols, a.grad_sum_stride)) &&
                         reinterpret_cast<uintptr_t>(a.weight) % 16 == 0;
    error = vectors ? launch(norm_backward_stream<T, N, 512>, rows, dim3(512), 0, stream, a)
                    : launch(norm_backward_stream<T, 1, 256>, rows, dim3(256), 0, stream, a);
    if (error == cudaSuccess && a.partial)
      error = launch(norm_columns<T>, dim3(tiles, static_cast<unsigned>(a.parts)), dim3(32, 8), 0, stream, a);
  }
  if (error != cudaSuccess || !a.partial) return error;
  return launch(sum_partials, dim3(tiles, 2), dim3(32, 8), 0, stream, static_cast<const float*>(a.partial), dweight,
                dbias, a.parts, a.cols);
}

}  // namespace fastdl::cuda
