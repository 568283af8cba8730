// GRU on CUDA, forward and backward: the cell, and its kernels for the step loop and for a whole sequence (methods:
// recurrent_loop.cuh, recurrent_persistent.cuh; maths: fastdl/reference/gru.py).
//
//   u = LN(w_hh (h * h_mask)), u_n + bias_n;  r, z = sigmoid(gates_x + u);  n = tanh(gates_x + r u_n)
//   h = zoneout(n + z (h - n))
//
// Test: pytest tests/test_gru.py tests/test_recurrent_cuda.py
#pragma once

#include "cuda/recurrent_loop.cuh"
#include "cuda/recurrent_persistent.cuh"

namespace fastdl::cuda {

template <class T>
struct GruForward {
  using Type = T;
  static constexpr int kGates = 3, kStates = 1;

  Sequence q;
  const T* gates_x;        // [T, B, D, 3 H]
  const float* h0;         // [D, B, H]
  const float* bias_n;     // [D, H], or null
  const float* ln_weight;  // [D, 3 H], or null
  T* y;                    // [T, B, D, H]
  float* h_n;              // [D, B, H]
  T* gates;                // [T, B, D, 4 H]: r, z, n, u_n; or null

  __host__ __device__ __forceinline__ const float* initial(int) const { return h0; }
  __host__ __device__ __forceinline__ float* last(int) const { return h_n; }

  // One step of one unit; state: h.
  __device__ __forceinline__ void element(const Place& at, const float (&x)[3], const float (&u)[3],
                                          float (&state)[1]) const {
    const int64_t H = q.hidden, row = row_of(q, at.t, at.b, at.d);
    const bool here = runs(q, at.t, at.b);
    float r = 0.0f, z = 0.0f, n = 0.0f, un = 0.0f;
    if (here) {
      r = gate_sigmoid(x[0] + u[0]);
      z = gate_sigmoid(x[1] + u[1]);
      un = u[2] + (bias_n ? bias_n[at.d * H + at.j] : 0.0f);
      n = tanhf(fmaf(r, un, x[2]));
      state[0] = zoned(kept_h(q, at), fmaf(z, state[0] - n, n), state[0]);
    }
    y[row * H + at.j] = from_float<T>(here ? state[0] : 0.0f);
    if (gates == nullptr) return;
    T* to = gates + row * 4 * H + at.j;
    to[0] = from_float<T>(r);
    to[H] = from_float<T>(z);
    to[2 * H] = from_float<T>(n);
    to[3 * H] = from_float<T>(un);
  }
};

template <class T>
struct GruBackward {
  using Type = T;
  static constexpr int kGates = 3, kStates = 1;

  Sequence q;
  const T* dy;        // [T, B, D, H], or null
  const float* dh_n;  // [D, B, H], or null
  const T* gates;     // [T, B, D, 4 H]
  const T* y;         // [T, B, D, H]
  const float* h0;    // [D, B, H]
  T* da;              // [T, B, D, 3 H]
  T* du;              // [T, B, D, 3 H]
  float* dh0;         // [D, B, H]
  float* bias_sums;   // [B, D, H]

  __host__ __device__ __forceinline__ const float* initial(int) const { return dh_n; }
  __host__ __device__ __forceinline__ float* last(int) const { return dh0; }

  // One step of one unit that runs. state: gradient of h after the step, which becomes that of h around w_hh.
  __device__ __forceinline__ void element(const Place& at, float (&state)[1], float (&da)[3], float (&du)[3]) const {
    const int64_t H = q.hidden, before = time_before(q, at, true);
    const T* from = gates + row_of(q, at.t, at.b, at.d) * 4 * H + at.j;
    const float r = to_float(from[0]), z = to_float(from[H]), n = to_float(from[2 * H]), un = to_float(from[3 * H]);
    const float h =
        before < 0 ? h0[state_row(q, at.b, at.d) * H + at.j] : to_float(y[row_of(q, before, at.b, at.d) * H + at.j]);
    const float keep = kept_h(q, at), fresh = (1.0f - keep) * state[0];
    da[2] = fresh * (1.0f - z) * (1.0f - n * n);
    da[1] = du[1] = fresh * (h - n) * z * (1.0f - z);
    da[0] = du[0] = da[2] * un * r * (1.0f - r);
    du[2] = da[2] * r;
    bias_sums[(at.b * q.directions + at.d) * H + at.j] += du[2];
    state[0] = keep * state[0] + fresh * z;
  }
};

// ---- The step loop --------------------------------------------------------------------------------------------------

template <class T>
__global__ void __launch_bounds__(256) gru_forward_units(GruForward<T> a, LoopForward<T> l, int64_t k) {
  loop_forward<GruForward<T>, false>(a, l, nullptr, k);
}
template <class T>
__global__ void __launch_bounds__(kRowThreads) gru_forward_rows(GruForward<T> a, LoopForward<T> l, int64_t k) {
  loop_forward<GruForward<T>, true>(a, l, a.ln_weight, k);
}
template <class T>
__global__ void __launch_bounds__(256) gru_backward_units(GruBackward<T> a, LoopBackward<T> l, int64_t k) {
  loop_backward<GruBackward<T>, false>(a, l, k);
}
template <class T>
__global__ void __launch_bounds__(kRowThreads) gru_backward_rows(GruBackward<T> a, LoopBackward<T> l, int64_t k) {
  loop_backward<GruBackward<T>, true>(a, l, k);
}

// What follows the product l.u of step k.
template <class T>
cudaError_t gru_forward_step_launch(const GruForward<T>& a, const LoopForward<T>& l, int64_t k, cudaStream_t stream) {
  const LoopShape shape = a.ln_weight ? loop_rows(a.q) : loop_units(a.q, a.q.hidden);
  return launch(a.ln_weight ? gru_forward_rows<T> : gru_forward_units<T>, shape.grid, shape.block, 0, stream, a, l, k);
}

// Step k up to the product of l.operand.
template <class T>
cudaError_t gru_backward_step_launch(const GruBackward<T>& a, const LoopBackward<T>& l, int64_t k,
                                     cudaStream_t stream) {
  const LoopShape shape = l.ln_weight ? loop_rows(a.q) : loop_units(a.q, a.q.hidden);
  return launch(l.ln_weight ? gru_backward_rows<T> : gru_backward_units<T>, shape.grid, shape.block, 0, stream, a, l,
                k);
}

// ---- The whole sequence ---------------------------------------------------------------------------------------------

template <class T, int Columns>
__global__ void __launch_bounds__(kPersistentThreads, 1) gru_forward_persistent(GruForward<T> a, Persistent<T> p) {
  persistent_forward<GruForward<T>, Columns>(a, p);
}
template <class T, int Columns>
__global__ void __launch_bounds__(kPersistentThreads, 1) gru_backward_persistent(GruBackward<T> a, Persistent<T> p) {
  persistent_backward<GruBackward<T>, Columns>(a, p);
}

template <class T>
cudaError_t gru_forward_persistent_launch(const GruForward<T>& a, const Persistent<T>& p, cudaStream_t stream) {
  return persistent_launch<GruForward<T>>(gru_forward_persistent<T, 8>, gru_forward_persistent<T, kWideColumns<T>>, a,
                                          p, stream);
}
template <class T>
cudaError_t gru_backward_persistent_launch(const GruBackward<T>& a, const Persistent<T>& p, cudaStream_t stream) {
  return persistent_launch<GruBackward<T>>(gru_backward_persistent<T, 8>, gru_backward_persistent<T, kWideColumns<T>>,
                                           a, p, stream);
}

}  // namespace fastdl::cuda
