// Elman RNN on CUDA, forward and backward: the cell, and its kernels for the step loop and for a whole sequence (methods:
// recurrent_loop.cuh, recurrent_persistent.cuh; maths: fastdl/reference/rnn.py).
//
//   u = LN(w_hh (h * h_mask));  h = zoneout(tanh(gates_x + u)), or max(gates_x + u, 0)
//
// Test: pytest tests/test_rnn.py tests/test_recurrent_cuda.py
#pragma once

#include "cuda/recurrent_loop.cuh"
#include "cuda/recurrent_persistent.cuh"

namespace fastdl::cuda {

template <class T>
struct RnnForward {
  using Type = T;
  static constexpr int kGates = 1, kStates = 1;

  Sequence q;
  const T* gates_x;        // [T, B, D, H]
  const float* h0;         // [D, B, H]
  const float* ln_weight;  // [D, H], or null
  T* y;                    // [T, B, D, H]
  float* h_n;              // [D, B, H]
  T* gates;                // [T, B, D, H]: what the activation gave; or null
  bool relu;

  __host__ __device__ __forceinline__ const float* initial(int) const { return h0; }
  __host__ __device__ __forceinline__ float* last(int) const { return h_n; }

  // One step of one unit; state: h.
  __device__ __forceinline__ void element(const Place& at, const float (&x)[1], const float (&u)[1],
                                          float (&state)[1]) const {
    const int64_t to = row_of(q, at.t, at.b, at.d) * q.hidden + at.j;
    const bool here = runs(q, at.t, at.b);
    float fresh = 0.0f;
    if (here) {
      const float pre = x[0] + u[0];
      fresh = !relu ? tanhf(pre) : pre < 0.0f ? 0.0f : pre;  // NaN stays
      state[0] = zoned(kept_h(q, at), fresh, state[0]);
    }
    y[to] = from_float<T>(here ? state[0] : 0.0f);
    if (gates) gates[to] = from_float<T>(fresh);
  }
};

template <class T>
struct RnnBackward {
  using Type = T;
  static constexpr int kGates = 1, kStates = 1;

  Sequence q;
  const T* dy;        // [T, B, D, H], or null
  const float* dh_n;  // [D, B, H], or null
  const T* gates;     // [T, B, D, H]
  T* da;              // [T, B, D, H]
  T* du;              // null: it is da, or layer norm's
  float* dh0;         // [D, B, H]
  bool relu;

  __host__ __device__ __forceinline__ const float* initial(int) const { return dh_n; }
  __host__ __device__ __forceinline__ float* last(int) const { return dh0; }

  // One step of one unit that runs. state: gradient of h after the step, which becomes that of h around w_hh.
  __device__ __forceinline__ void element(const Place& at, float (&state)[1], float (&da)[1], float (&du)[1]) const {
    const float fresh = to_float(gates[row_of(q, at.t, at.b, at.d) * q.hidden + at.j]), keep = kept_h(q, at);
    const float slope = relu ? (fresh > 0.0f ? 1.0f : 0.0f) : 1.0f - fresh * fresh;
    da[0] = du[0] = (1.0f - keep) * state[0] * slope;
    state[0] *= keep;
  }
};

// ---- The step loop --------------------------------------------------------------------------------------------------

template <class T>
__global__ void __launch_bounds__(256) rnn_forward_units(RnnForward<T> a, LoopForward<T> l, int64_t k) {
  loop_forward<RnnForward<T>, false>(a, l, nullptr, k);
}
template <class T>
__global__ void __launch_bounds__(kRowThreads) rnn_forward_rows(RnnForward<T> a, LoopForward<T> l, int64_t k) {
  loop_forward<RnnForward<T>, true>(a, l, a.ln_weight, k);
}
template <class T>
__global__ void __launch_bounds__(256) rnn_backward_units(RnnBackward<T> a, LoopBackward<T> l, int64_t k) {
  loop_backward<RnnBackward<T>, false>(a, l, k);
}
template <class T>
__global__ void __launch_bounds__(kRowThreads) rnn_backward_rows(RnnBackward<T> a, LoopBackward<T> l, int64_t k) {
  loop_backward<RnnBackward<T>, true>(a, l, k);
}

// What follows the product l.u of step k.
template <class T>
cudaError_t rnn_forward_step_launch(const RnnForward<T>& a, const LoopForward<T>& l, int64_t k, cudaStream_t stream) {
  const LoopShape shape = a.ln_weight ? loop_rows(a.q) : loop_units(a.q, a.q.hidden);
  return launch(a.ln_weight ? rnn_forward_rows<T> : rnn_forward_units<T>, shape.grid, shape.block, 0, stream, a, l, k);
}

// Step k up to the product of l.operand.
template <class T>
cudaError_t rnn_backward_step_launch(const RnnBackward<T>& a, const LoopBackward<T>& l, int64_t k,
                                     cudaStream_t stream) {
  const LoopShape shape = l.ln_weight ? loop_rows(a.q) : loop_units(a.q, a.q.hidden);
  return launch(l.ln_weight ? rnn_backward_rows<T> : rnn_backward_units<T>, shape.grid, shape.block, 0, stream, a, l,
                k);
}

// ---- The whole sequence ---------------------------------------------------------------------------------------------

template <class T, int Columns>
__global__ void __launch_bounds__(kPersistentThreads, 1) rnn_forward_persistent(RnnForward<T> a, Persistent<T> p) {
  persistent_forward<RnnForward<T>, Columns>(a, p);
}
template <class T, int Columns>
__global__ void __launch_bounds__(kPersistentThreads, 1) rnn_backward_persistent(RnnBackward<T> a, Persistent<T> p) {
  persistent_backward<RnnBackward<T>, Columns>(a, p);
}

template <class T>
cudaError_t rnn_forward_persistent_launch(const RnnForward<T>& a, const Persistent<T>& p, cudaStream_t stream) {
  return persistent_launch<RnnForward<T>>(rnn_forward_persistent<T, 8>, rnn_forward_persistent<T, kWideColumns<T>>, a,
                                          p, stream);
}
template <class T>
cudaError_t rnn_backward_persistent_launch(const RnnBackward<T>& a, const Persistent<T>& p, cudaStream_t stream) {
  return persistent_launch<RnnBackward<T>>(rnn_backward_persistent<T, 8>, rnn_backward_persistent<T, kWideColumns<T>>,
                                           a, p, stream);
}

}  // namespace fastdl::cuda
