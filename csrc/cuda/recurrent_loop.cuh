// The step loop, on the GPU's side: one launch a step does everything between two products with w_hh, for all sequences and
// both directions. The products are ATen's (recurrent_loop.h). It takes every shape and every option.
//
// Without layer norm a thread takes one hidden unit of one sequence; with it a block takes all of one sequence, because the
// products are normalized over all gates. Sums over the batch and the steps (for gradients of layer norm's weights, ...) are
// kept a sequence and added up at the end, always in the same order.
#pragma once

#include "cuda/recurrent.cuh"

namespace fastdl::cuda {

constexpr int kRowThreads = 256;  // a block that takes a whole row

template <class T>
struct LoopForward {
  float* u;    // [D, B, G * H]  w_hh (h * h_mask) of this step
  T* operand;  // [D, B, P]      h * h_mask after it, for the next product
};

template <class T>
struct LoopBackward {
  float* through;          // [D, B, P]      du w_hh of the step that was done before this one
  T* operand;              // [D, B, G * H]  du, for the next product
  float* work;             // [D, B, G * H]  du before layer norm's gradient, or null without layer norm
  const T* u;              // [T, B, D, G * H], or null without layer norm
  const float* ln_weight;  // [D, G * H], or null
  float* ln_sums;          // [B, D, G * H] for ln_weight's gradient, or null
  T* du;                   // [T, B, D, G * H], or null where nobody asks for it
};

// ---- Forward --------------------------------------------------------------------------------------------------------

// Block blockIdx.x: sequence b and direction d of the row [B, D]; blockIdx.y: which of the row's units, without Norm.
template <class Cell, bool Norm>
__device__ __forceinline__ void loop_forward(const Cell& a, const LoopForward<typename Cell::Type>& l,
                                             const float* ln_weight, int64_t k) {
  using T = typename Cell::Type;
  constexpr int G = Cell::kGates, S = Cell::kStates;
  const Sequence& q = a.q;
  const int64_t b = blockIdx.x / q.directions, d = blockIdx.x % q.directions, t = time_of(q, k, d), H = q.hidden;
  const float* u = l.u + state_row(q, b, d) * G * H;
  const T* x = a.gates_x + row_of(q, t, b, d) * G * H;
  float mean = 0.0f, rstd = 1.0f;
  if constexpr (Norm) row_statistics<kRowThreads>(u, G * H, q.eps, mean, rstd);
  const int64_t first = Norm ? threadIdx.x : static_cast<int64_t>(blockIdx.y) * blockDim.x + threadIdx.x;
  for (int64_t j = first; j < H; j += Norm ? kRowThreads : H) {
    float gx[G], gu[G], state[S];
#pragma unroll
    for (int g = 0; g < G; ++g) {
      gx[g] = to_float(x[g * H + j]);
      gu[g] = u[g * H + j];
      if constexpr (Norm) gu[g] = (gu[g] - mean) * rstd * ln_weight[(d * G + g) * H + j];
    }
    const int64_t at = state_row(q, b, d) * H + j;
#pragma unroll
    for (int s = 0; s < S; ++s) state[s] = a.last(s)[at];
    a.element({t, b, d, j}, gx, gu, state);
#pragma unroll
    for (int s = 0; s < S; ++s) a.last(s)[at] = state[s];
    l.operand[at] = operand_of<T>(q, at, state[0]);
  }
}

// ---- Backward -------------------------------------------------------------------------------------------------------

// The gradient of h after step k, without that of y: from the step that was done before (k + 1), or of h_n. `carry`
// [D, B, P]: what passed that step by w_hh.
__device__ __forceinline__ float incoming(const Sequence& q, const float* dh_n, const float* carry,
                                          const float* through, int64_t k, int64_t b, int64_t d, int64_t p) {
  const int64_t at = state_row(q, b, d) * q.size + p;
  if (k == q.steps - 1) return dh_n ? dh_n[at] : 0.0f;
  if (!runs(q, time_of(q, k + 1, d), b)) return carry[at];
  return carry[at] + (q.h_mask ? through[at] * q.h_mask[at] : through[at]);
}

// Gradient of layer norm over a row of n = G * H, by the whole block: work, the gradient of its output, and u, its input,
// give the gradient of u; sums += the row's part of the gradient of the weight. Other threads wrote work before.
template <class T>
__device__ __forceinline__ void loop_norm_backward(const Sequence& q, const LoopBackward<T>& l, int64_t row,
                                                   int64_t state, int64_t sum_row, int64_t d, int64_t n) {
  const T* u = l.u + row * n;
  const float *work = l.work + state * n, *weight = l.ln_weight + d * n;
  float mean, rstd, sums[2] = {0.0f, 0.0f};
  row_statistics<kRowThreads>(u, n, q.eps, mean, rstd);  // its barriers also show this block what it wrote to work
  for (int64_t i = threadIdx.x; i < n; i += kRowThreads) {
    const float hat = (to_float(u[i]) - mean) * rstd, g = work[i] * weight[i];
    sums[0] += g;
    sums[1] += g * hat;
    l.ln_sums[sum_row * n + i] += work[i] * hat;
  }
  block_sum<kRowThreads>(sums);
  const float width = 1.0f / static_cast<float>(n);
  for (int64_t i = threadIdx.x; i < n; i += kRowThreads) {
    const float hat = (to_float(u[i]) - mean) * rstd, g = work[i] * weight[i];
    const T du = from_float<T>(rstd * (g - sums[0] * width - hat * (sums[1] * width)));
    l.operand[state * n + i] = du;
    l.du[row * n + i] = du;
  }
}

// Step k of the backward pass; blocks as in loop_forward.
template <class Cell, bool Norm>
__device__ __forceinline__ void loop_backward(const Cell& a, const LoopBackward<typename Cell::Type>& l, int64_t k) {
  using T = typename Cell::Type;
  constexpr int G = Cell::kGates, S = Cell::kStates;
  const Sequence& q = a.q;
  const int64_t b = blockIdx.x / q.directions, d = blockIdx.x % q.directions, t = time_of(q, k, d), H = q.hidden;
  const int64_t row = row_of(q, t, b, d), state_at = state_row(q, b, d);
  const bool here = runs(q, t, b);
  const int64_t first = Norm ? threadIdx.x : static_cast<int64_t>(blockIdx.y) * blockDim.x + threadIdx.x;
  for (int64_t j = first; j < H; j += Norm ? kRowThreads : H) {
    float da[G] = {}, du[G] = {}, state[S];
    state[0] = incoming(q, a.dh_n, a.last(0), l.through, k, b, d, j);
    if constexpr (S > 1) state[1] = a.last(1)[state_at * H + j];
    if (here) {
      if (a.dy) state[0] += to_float(a.dy[row * H + j]);
      a.element({t, b, d, j}, state, da, du);
    }
#pragma unroll
    for (int s = 0; s < S; ++s) a.last(s)[state_at * H + j] = state[s];
#pragma unroll
    for (int g = 0; g < G; ++g) {
      const int64_t i = g * H + j;
      a.da[row * G * H + i] = from_float<T>(da[g]);
      if constexpr (Norm) {
        l.work[state_at * G * H + i] = du[g];
      } else {
        l.operand[state_at * G * H + i] = from_float<T>(du[g]);
        if (l.du) l.du[row * G * H + i] = from_float<T>(du[g]);
      }
    }
  }
  if constexpr (Norm) loop_norm_backward(q, l, row, state_at, b * q.directions + d, d, G * H);
}

// After the last step of the backward pass: dh0 [D, B, P], in place of what was carried.
__global__ void __launch_bounds__(256) inline recurrent_last_gradient(Sequence q, const float* dh_n,
                                                                      const float* through, float* dh0) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * 256 + threadIdx.x;
  if (i >= q.directions * q.batch * q.size) return;
  const int64_t p = i % q.size, b = i / q.size % q.batch, d = i / q.size / q.batch;
  dh0[i] = incoming(q, dh_n, dh0, through, -1, b, d, p);
}

inline cudaError_t recurrent_last_gradient_launch(const Sequence& q, const float* dh_n, const float* through,
                                                  float* dh0, cudaStream_t stream) {
  const int64_t count = q.directions * q.batch * q.size;
  if (count == 0) return cudaSuccess;
  return launch(recurrent_last_gradient, dim3(static_cast<unsigned>((count + 255) / 256)), dim3(256), 0, stream, q,
                dh_n, through, dh0);
}

// ---- Launching ------------------------------------------------------------------------------------------------------

struct LoopShape {
  dim3 grid, block;
};

// A block a row, or a thread a unit (`units` of them a row).
inline LoopShape loop_rows(const Sequence& q) {
  return {dim3(static_cast<unsigned>(q.batch * q.directions)), dim3(kRowThreads)};
}
inline LoopShape loop_units(const Sequence& q, int64_t units) {
  const int64_t threads = units >= 256 ? 256 : (units + 31) / 32 * 32;
  return {dim3(static_cast<unsigned>(q.batch * q.directions), static_cast<unsigned>((units + threads - 1) / threads)),
          dim3(static_cast<unsigned>(threads))};
}

}  // namespace fastdl::cuda
