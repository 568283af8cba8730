// Activations with bias, dropout and residual, and gated products, on CUDA (contract: fastdl/ops/activation.py):
//
//   y = residual + dropout(f(x + bias)),  dx = dropout's mask of grad * f'(x + bias),  y = f(gate) * up
//
// A block takes a tile of columns, in vectors of 16 bytes, and walks over rows; in the backward it keeps its own sums for
// dbias and dbeta, which go to partial sums that a second kernel adds in the order of the blocks. Every element is read
// and written once. Floor: (reads of x, residual or grad + writes) / bandwidth.
//
// Test: pytest tests/test_activation.py
#pragma once

#include "common/activations.h"
#include "common/philox.h"
#include "cuda/reduce.cuh"
#include "cuda/vector.cuh"

namespace fastdl::cuda {

template <class T>
struct Activation {
  const T* x;           // [rows, cols], rows x_stride apart
  const T* other;       // residual (or null), in the backward grad: rows other_stride apart
  const void* bias;     // T or float32, [channels]: bias[row % channels], or with channels 0 [cols]; or null
  const float* beta;    // [1] on the device, or null: alpha
  const int64_t* seed;  // [1] on the device, or null: no dropout
  T* y;                 // [rows, cols]; in the backward dx
  float* columns;       // backward: partial sums [row parts][cols] of dbias, or null
  float* row_sums;      // backward: partial sums [rows][tiles] of dbias, or null
  float* betas;         // backward: partial sums [row parts][tiles] of dbeta, or null
  int64_t rows, cols, x_stride, other_stride, channels;
  float p, scale, alpha;
  int kind;
  bool float_bias, mask_by_row;
};

template <class T>
struct Glu {
  const T *gate, *up, *grad;  // [rows, cols]; grad: null in the forward
  T *y, *dgate, *dup;         // [rows, cols]
  int64_t rows, cols, gate_stride, up_stride, grad_stride;
  int kind;
};

// f(t), f'(t) and the derivative by beta; what a kernel does not use is not computed.
struct Derived {
  float value, slope, by_beta;
};

// sigmoid(x), and its derivative g (1 - g) without the cancellation of 1 - g.
__device__ __forceinline__ float sigmoid(float x, float* slope) {
  const float e = expf(-fabsf(x)), s = 1.0f / (1.0f + e);
  *slope = e * s * s;
  return x <= 0.0f ? e * s : s;
}

template <int Kind>
__device__ __forceinline__ Derived derive(float t, float alpha) {
  if constexpr (Kind == RELU) return {t <= 0.0f ? 0.0f : t, t <= 0.0f ? 0.0f : 1.0f, 0.0f};
  if constexpr (Kind == LEAKY_RELU) return {t <= 0.0f ? t * alpha : t, t <= 0.0f ? alpha : 1.0f, 0.0f};
  if constexpr (Kind == GELU) {
    const float distribution = 0.5f + 0.5f * erff(t * 0.707106781f);
    return {t * distribution, distribution + t * 0.398942280f * expf(-0.5f * t * t), 0.0f};
  }
  if constexpr (Kind == GELU_TANH) {  // (1 + tanh(u)) / 2 = sigmoid(2 u)
    float dg;
    const float g = sigmoid(t * (1.59576912f + 0.0713548163f * t * t), &dg);
    return {t * g, g + t * dg * (1.59576912f + 0.214064449f * t * t), 0.0f};
  }
  if constexpr (Kind == SWISH) {
    float dg;
    const float g = sigmoid(t * alpha, &dg), tg = t * dg;
    return {t * g, g + alpha * tg, t * tg};
  }
  if constexpr (Kind == TANH) {
    float dg;
    sigmoid(t + t, &dg);
    return {tanhf(t), 4.0f * dg, 0.0f};  // 1 - tanh(t)^2, which cancels, is 4 g (1 - g) at 2 t
  }
  if constexpr (Kind == SIGMOID) {
    float dg;
    const float g = sigmoid(t, &dg);
    return {g, dg, 0.0f};
  }
  return {t, 1.0f, 0.0f};
}

template <int Kind, int N>
__device__ __forceinline__ void derive(const float (&t)[N], float alpha, Derived (&f)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) f[i] = derive<Kind>(t[i], alpha);
}

// The one switch over kinds: the same branch in all threads.
template <int N>
__device__ __forceinline__ void derive(int kind, const float (&t)[N], float alpha, Derived (&f)[N]) {
  switch (kind) {
    case RELU: return derive<RELU>(t, alpha, f);
    case LEAKY_RELU: return derive<LEAKY_RELU>(t, alpha, f);
    case GELU: return derive<GELU>(t, alpha, f);
    case GELU_TANH: return derive<GELU_TANH>(t, alpha, f);
    case SWISH: return derive<SWISH>(t, alpha, f);
    case TANH: return derive<TANH>(t, alpha, f);
    case SIGMOID: return derive<SIGMOID>(t, alpha, f);
    default: return derive<IDENTITY>(t, alpha, f);
  }
}

// bias at columns [col, col + N) of a row; zeros without one.
template <int N, class T>
__device__ __forceinline__ void activation_bias(const Activation<T>& a, int64_t row, int64_t col, float (&b)[N]) {
  const int64_t at = a.channels ? row % a.channels : col;
  if (a.bias == nullptr || a.channels) {
    float one[1] = {0.0f};
    if (a.bias && a.float_bias) load<1>(static_cast<const float*>(a.bias) + at, one);
    if (a.bias && !a.float_bias) load<1>(static_cast<const T*>(a.bias) + at, one);
#pragma unroll
    for (int i = 0; i < N; ++i) b[i] = one[0];
  } else if (a.float_bias) {
    load<N>(static_cast<const float*>(a.bias) + at, b);
  } else {
    load<N>(static_cast<const T*>(a.bias) + at, b);
  }
}

// v where dropout keeps it, times scale; else 0.
template <int N, class T>
__device__ __forceinline__ void activation_mask(const Activation<T>& a, int64_t row, int64_t col, float (&v)[N]) {
  if (a.seed == nullptr) return;
  const auto seed = static_cast<uint64_t>(*a.seed);
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const int64_t index = a.mask_by_row ? row : row * a.cols + col + i;
    const float keep = philox_dropout(seed, static_cast<uint64_t>(index), a.p, a.scale);
    v[i] = keep == 0.0f ? 0.0f : v[i] * keep;
  }
}

// Block: (Threads, 256 / Threads). Grid: (tiles of Threads * N columns, row parts).
template <class T, int N, int Threads>
__global__ void __launch_bounds__(256) activation_forward_tiles(Activation<T> a) {
  const int64_t col = (static_cast<int64_t>(blockIdx.x) * Threads + threadIdx.x) * N;
  if (col >= a.cols) return;
  const float alpha = a.beta ? *a.beta : a.alpha;
  for (int64_t row = blockIdx.y * (256 / Threads) + threadIdx.y; row < a.rows; row += gridDim.y * (256 / Threads)) {
    float t[N], bias[N], v[N];
    load<N>(a.x + row * a.x_stride + col, t);
    activation_bias<N>(a, row, col, bias);
#pragma unroll
    for (int i = 0; i < N; ++i) t[i] += bias[i];
    Derived f[N];
    derive(a.kind, t, alpha, f);
#pragma unroll
    for (int i = 0; i < N; ++i) v[i] = f[i].value;
    activation_mask<N>(a, row, col, v);
    if (a.other) {
      float residual[N];
      load<N>(a.other + row * a.other_stride + col, residual);
#pragma unroll
      for (int i = 0; i < N; ++i) v[i] = residual[i] + v[i];
    }
    store<N>(a.y + row * a.cols + col, v);
  }
}

template <class T, int N, int Threads>
__global__ void __launch_bounds__(256, 1) activation_backward_tiles(Activation<T> a) {
  constexpr int kRows = 256 / Threads;
  FASTDL_SHARED(float, sums, [kRows][Threads * N]);
  const int64_t tile = blockIdx.x, tiles = gridDim.x, col = (tile * Threads + threadIdx.x) * N;
  const float alpha = a.beta ? *a.beta : a.alpha;
  float column[N] = {}, beta = 0.0f;
  // All threads walk together, because the sums of rows have barriers in them.
  for (int64_t first = static_cast<int64_t>(blockIdx.y) * kRows; first < a.rows; first += gridDim.y * kRows) {
    const int64_t row = first + threadIdx.y;
    float sum = 0.0f;
    if (col < a.cols && row < a.rows) {
      float t[N], bias[N], d[N], dt[N];
      load<N>(a.x + row * a.x_stride + col, t);
      load<N>(a.other + row * a.other_stride + col, d);
      activation_bias<N>(a, row, col, bias);
#pragma unroll
      for (int i = 0; i < N; ++i) t[i] += bias[i];
      activation_mask<N>(a, row, col, d);
      Derived f[N];
      derive(a.kind, t, alpha, f);
#pragma unroll
      for (int i = 0; i < N; ++i) {
        dt[i] = d[i] * f[i].slope;
        beta += d[i] * f[i].by_beta;
        column[i] += dt[i];
        sum += dt[i];
      }
      store<N>(a.y + row * a.cols + col, dt);
    }
    if (a.row_sums) {
      if constexpr (Threads == 32) {
        sum = warp_sum(sum);
      } else {
        sum = block_sum<256>(sum);
      }
      if (threadIdx.x == 0 && row < a.rows) a.row_sums[row * tiles + tile] = sum;
    }
  }
  if (a.columns) {
#pragma unroll
    for (int i = 0; i < N; ++i) sums[threadIdx.y][threadIdx.x * N + i] = column[i];
    __syncthreads();
    for (int i = threadIdx.y * Threads + threadIdx.x; i < Threads * N; i += 256) {
      float sum = 0.0f;
#pragma unroll
      for (int j = 0; j < kRows; ++j) sum += sums[j][i];
      if (tile * Threads * N + i < a.cols) a.columns[blockIdx.y * a.cols + tile * Threads * N + i] = sum;
    }
  }
  if (a.betas) {
    const int warp = (threadIdx.y * Threads + threadIdx.x) / 32, lane = threadIdx.x % 32;
    __syncthreads();  // sums were read above
    beta = warp_sum(beta);
    if (lane == 0) sums[0][warp] = beta;
    __syncthreads();
    if (warp == 0) {
      beta = warp_sum(lane < 8 ? sums[0][lane] : 0.0f);
      if (lane == 0) a.betas[blockIdx.y * tiles + tile] = beta;
    }
  }
}

template <class T, int N, int Threads>
__global__ void __launch_bounds__(256) glu_tiles(Glu<T> a) {
  const int64_t col = (static_cast<int64_t>(blockIdx.x) * Threads + threadIdx.x) * N;
  if (col >= a.cols) return;
  for (int64_t row = blockIdx.y * (256 / Threads) + threadIdx.y; row < a.rows; row += gridDim.y * (256 / Threads)) {
    float gate[N], up[N], d[N];
    load<N>(a.gate + row * a.gate_stride + col, gate);
    load<N>(a.up + row * a.up_stride + col, up);
    Derived f[N];
    derive(a.kind, gate, 1.0f, f);
    if (a.grad == nullptr) {
#pragma unroll
      for (int i = 0; i < N; ++i) up[i] *= f[i].value;
      store<N>(a.y + row * a.cols + col, up);
    } else {
      load<N>(a.grad + row * a.grad_stride + col, d);
#pragma unroll
      for (int i = 0; i < N; ++i) {
        gate[i] = d[i] * up[i] * f[i].slope;
        up[i] = d[i] * f[i].value;
      }
      store<N>(a.dgate + row * a.cols + col, gate);
      store<N>(a.dup + row * a.cols + col, up);
    }
  }
}

// How a tensor is cut: threads along the columns, tiles, row parts; a function of shapes and the GPU.
struct ElementPlan {
  int threads, vector;  // 32 or 256; 1 or 16 bytes' worth
  int64_t tiles, parts;

  dim3 grid() const { return dim3(static_cast<unsigned>(tiles), static_cast<unsigned>(parts)); }
  dim3 block() const { return dim3(static_cast<unsigned>(threads), static_cast<unsigned>(256 / threads)); }
};

inline ElementPlan element_plan(int vector, int64_t rows, int64_t cols, int64_t blocks_per_processor) {
  ElementPlan plan{cols <= 32 * vector || rows >= 64 ? 32 : 256, vector, 0, 0};
  plan.tiles = (cols + plan.threads * vector - 1) / (plan.threads * vector);
  const int64_t groups = (rows * plan.threads + 255) / 256;
  const int64_t wanted = multiprocessor_count() * blocks_per_processor / plan.tiles + 1;
  plan.parts = groups < wanted ? groups : wanted;
  if (plan.parts > 65535) plan.parts = 65535;
  return plan;
}

template <class T>
ElementPlan activation_plan(const Activation<T>& a) {
  constexpr int N = 16 / sizeof(T);
  const bool vectors = divides(N, a.x, a.cols, a.x_stride) &&
                       (!a.other || divides(N, a.other, a.cols, a.other_stride)) &&
                       (a.channels || reinterpret_cast<uintptr_t>(a.bias) % 16 == 0);
  return element_plan(vectors ? N : 1, a.rows, a.cols, 16);
}

// body(vectors, threads) with the plan's constants as types.
template <int I>
struct Constant {
  static constexpr int value = I;
};

template <class T, class Body>
cudaError_t with_plan(const ElementPlan& plan, const Body& body) {
  constexpr int N = 16 / sizeof(T);
  if (plan.vector == N)
    return plan.threads == 32 ? body(Constant<N>{}, Constant<32>{}) : body(Constant<N>{}, Constant<256>{});
  return plan.threads == 32 ? body(Constant<1>{}, Constant<32>{}) : body(Constant<1>{}, Constant<256>{});
}

template <class T>
cudaError_t activation_forward_launch(const Activation<T>& a, cudaStream_t stream) {
  if (a.rows == 0) return cudaSuccess;
  const ElementPlan plan = activation_plan(a);
  return with_plan<T>(plan, [&](auto n, auto threads) {
    return launch(activation_forward_tiles<T, decltype(n)::value, decltype(threads)::value>, plan.grid(), plan.block(),
                  0, stream, a);
  });
}

// dbias [channels or cols] and dbeta [1]: null where not asked for.
template <class T>
cudaError_t activation_backward_launch(const Activation<T>& a, const ElementPlan& plan, float* dbias, float* dbeta,
                                       cudaStream_t stream) {
  if (a.rows == 0) return cudaSuccess;
  cudaError_t error = with_plan<T>(plan, [&](auto n, auto threads) {
    return launch(activation_backward_tiles<T, decltype(n)::value, decltype(threads)::value>, plan.grid(), plan.block(),
                  0, stream, a);
  });
  if (error == cudaSuccess && a.columns)
    error = launch(sum_partials, dim3(static_cast<unsigned>((a.cols + 31) / 32), 1), dim3(32, 8), 0, stream,
                   static_cast<const float*>(a.columns), dbias, static_cast<float*>(nullptr), plan.parts, a.cols);
  if (error == cudaSuccess && a.row_sums)
    error = launch(sum_channels, dim3(static_cast<unsigned>((a.channels + 7) / 8)), dim3(32, 8), 0, stream,
                   static_cast<const float*>(a.row_sums), dbias, a.rows / a.channels, a.channels, plan.tiles);
  if (error == cudaSuccess && a.betas)
    error = launch(sum_channels, dim3(1), dim3(32, 8), 0, stream, static_cast<const float*>(a.betas), dbeta, int64_t{1},
                   int64_t{1}, plan.parts * plan.tiles);
  return error;
}

template <class T>
cudaError_t glu_launch(const Glu<T>& a, cudaStream_t stream) {
  if (a.rows == 0) return cudaSuccess;
  constexpr int N = 16 / sizeof(T);
  const bool vectors = divides(N, a.gate, a.cols, a.gate_stride) && divides(N, a.up, a.cols, a.up_stride) &&
                       (!a.grad || divides(N, a.grad, a.cols, a.grad_stride));
  const ElementPlan plan = element_plan(vectors ? N : 1, a.rows, a.cols, 32);
  return with_plan<T>(plan, [&](auto n, auto threads) {
    return launch(glu_tiles<T, decltype(n)::value, decltype(threads)::value>, plan.grid(), plan.block(), 0, stream, a);
  });
}

}  // namespace fastdl::cuda
