// What the kernels of lstm, gru and rnn share: the call's sizes and options, positions, zoneout, sums over a row, and how
// the states begin. Meaning of every name: fastdl/reference/_recurrent.py.
//
// A room describes one unit's step as a struct ("cell"): kGates products with w_hh a unit, kStates states (h, and lstm's
// c), and `element`, which does everything of one step for one hidden unit of one sequence. The step loop
// (recurrent_loop.cuh) and the kernel that stays for the whole sequence (recurrent_persistent.cuh) are written once, over
// any cell. State, statistics and sums are float32; T is the type of what is multiplied and stored.
//
// Test: pytest tests/test_recurrent_cuda.py
#pragma once

#include "common/philox.h"
#include "cuda/reduce.cuh"
#include "cuda/vector.cuh"

namespace fastdl::cuda {

struct Sequence {
  const int64_t* lengths;  // [B], or null: all are `steps` long
  const float* h_mask;     // [D, B, P], or null
  const int64_t* seed;     // [2] on the device, or null: zoneout by its expectation
  int64_t steps, batch, directions, hidden;
  int64_t size;  // P, of h: hidden, or that of the projection
  float zoneout_h, zoneout_c, eps;
};

// Unit j of direction d of sequence b at time t.
struct Place {
  int64_t t, b, d, j;
};

// The time at which a direction does its k-th step.
__device__ __forceinline__ int64_t time_of(const Sequence& q, int64_t k, int64_t d) {
  return d == 0 ? k : q.steps - 1 - k;
}

__device__ __forceinline__ bool runs(const Sequence& q, int64_t t, int64_t b) {
  return q.lengths == nullptr || q.lengths[b] > t;
}

// Row of [T, B, D, ...], and of [D, B, ...].
__device__ __forceinline__ int64_t row_of(const Sequence& q, int64_t t, int64_t b, int64_t d) {
  return (t * q.batch + b) * q.directions + d;
}
__device__ __forceinline__ int64_t state_row(const Sequence& q, int64_t b, int64_t d) { return d * q.batch + b; }

// The time of the step before, or -1 where the initial state comes before. `running`: -1 too where the sequence was over
// then, which the second direction meets.
__device__ __forceinline__ int64_t time_before(const Sequence& q, const Place& at, bool running) {
  const int64_t t = at.d == 0 ? at.t - 1 : at.t + 1;
  return t < 0 || t >= q.steps || (running && !runs(q, t, at.b)) ? -1 : t;
}

// How much of the old value zoneout keeps; which: 0 for h [T, B, D, P], 1 for c [T, B, D, H].
__device__ __forceinline__ float kept(const Sequence& q, int which, float p, int64_t index) {
  if (p == 0.0f || q.seed == nullptr) return p;
  return philox_uniform(static_cast<uint64_t>(q.seed[which]), static_cast<uint64_t>(index)) >= p ? 0.0f : 1.0f;
}
__device__ __forceinline__ float kept_h(const Sequence& q, const Place& at) {
  return kept(q, 0, q.zoneout_h, row_of(q, at.t, at.b, at.d) * q.size + at.j);
}
__device__ __forceinline__ float kept_c(const Sequence& q, const Place& at) {
  return kept(q, 1, q.zoneout_c, row_of(q, at.t, at.b, at.d) * q.hidden + at.j);
}
__device__ __forceinline__ float zoned(float keep, float fresh, float old) {
  return keep == 0.0f ? fresh : fmaf(keep, old - fresh, fresh);
}

__device__ __forceinline__ float gate_sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

// h as w_hh sees it: times its mask, rounded. `at`: index in [D, B, P].
template <class T>
__device__ __forceinline__ T operand_of(const Sequence& q, int64_t at, float h) {
  return from_float<T>(q.h_mask ? h * q.h_mask[at] : h);
}

// Mean and 1 / deviation of row [n], by the whole block of Threads.
template <int Threads, class T>
__device__ __forceinline__ void row_statistics(const T* row, int64_t n, float eps, float& mean, float& rstd) {
  const auto width = static_cast<float>(n);
  float sum = 0.0f, squares = 0.0f;
  for (int64_t i = threadIdx.x; i < n; i += Threads) sum += to_float(row[i]);
  mean = block_sum<Threads>(sum) / width;
  for (int64_t i = threadIdx.x; i < n; i += Threads) {
    const float apart = to_float(row[i]) - mean;
    squares += apart * apart;
  }
  rstd = rsqrtf(block_sum<Threads>(squares) / width + eps);
}

// ---- Before the first step ------------------------------------------------------------------------------------------

// state = initial (0 where it is null), and the first product's operand, where one is asked for. All [D, B, N].
template <class T>
__global__ void __launch_bounds__(256)
    recurrent_start(Sequence q, const float* initial, float* state, T* operand, int64_t count) {
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * 256 + threadIdx.x; i < count;
       i += static_cast<int64_t>(gridDim.x) * 256) {
    const float h = initial ? initial[i] : 0.0f;
    state[i] = h;
    if (operand) operand[i] = operand_of<T>(q, i, h);
  }
}

template <class T>
cudaError_t recurrent_start_launch(const Sequence& q, const float* initial, float* state, T* operand, int64_t count,
                                   cudaStream_t stream) {
  if (count == 0) return cudaSuccess;
  const int64_t blocks = (count + 255) / 256;
  return launch(recurrent_start<T>, dim3(static_cast<unsigned>(blocks < 1024 ? blocks : 1024)), dim3(256), 0, stream, q,
                initial, state, operand, count);
}

// sums [which][B, cols] -> first, second [cols], in the order of the sequences; second may be null.
inline cudaError_t recurrent_sum_launch(const float* sums, float* first, float* second, int64_t batch, int64_t cols,
                                        cudaStream_t stream) {
  if (cols == 0) return cudaSuccess;
  return launch(sum_partials, dim3(static_cast<unsigned>((cols + 31) / 32), second ? 2u : 1u), dim3(32, 8), 0, stream,
                sums, first, second, batch, cols);
}

}  // namespace fastdl::cuda
