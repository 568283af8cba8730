// LSTM on CUDA, forward: the cell, and the kernels of the step loop (method: recurrent.cuh; maths: fastdl/reference/lstm.py).
//
//   u = LN(w_hh (h * h_mask));  i, f, g, o = gates_x + u + peepholes;  s = f c + i g;  m = o tanh(LN(s));
//   c = zoneout(s);  h = zoneout(w_hr m)
//
// `units`: no layer norm and no projection, a thread a unit. `rows`: a block a sequence and direction. `project`: what is
// left to do after the product with w_hr.
//
// Test: pytest tests/test_lstm.py tests/test_recurrent_cuda.py        Backward: lstm_backward.cuh
#pragma once

#include "cuda/recurrent_loop.cuh"
#include "cuda/recurrent_persistent.cuh"

namespace fastdl::cuda {

template <class T>
struct LstmForward {
  using Type = T;
  static constexpr int kGates = 4, kStates = 2;

  Sequence q;
  const T* gates_x;          // [T, B, D, 4 H]
  const float* h0;           // [D, B, P]
  const float* c0;           // [D, B, H]
  const float* ln_weight;    // [D, 4 H], or null
  const float* peephole;     // [D, 3, H] for i f o, or null
  const float* ln_c_weight;  // [D, H], or null
  const float* ln_c_bias;    // [D, H], where there is ln_c_weight
  T* y;                      // [T, B, D, P]
  float* h_n;                // [D, B, P]
  float* c_n;                // [D, B, H]
  T* gates;                  // [T, B, D, 4 H], or null
  T* cells;                  // [T, B, D, H], or null

  __host__ __device__ __forceinline__ const float* initial(int state) const { return state == 0 ? h0 : c0; }
  __host__ __device__ __forceinline__ float* last(int state) const { return state == 0 ? h_n : c_n; }

  __device__ __forceinline__ void store_gates(const Place& at, float i, float f, float g, float o) const {
    if (gates == nullptr) return;
    const int64_t H = q.hidden;
    T* to = gates + row_of(q, at.t, at.b, at.d) * 4 * H + at.j;
    to[0] = from_float<T>(i);
    to[H] = from_float<T>(f);
    to[2 * H] = from_float<T>(g);
    to[3 * H] = from_float<T>(o);
  }

  // The cell s and the output gate o of one unit, from x + u and the c of the step before.
  __device__ __forceinline__ void activate(const Place& at, const float (&x)[4], const float (&u)[4], float c, float& s,
                                           float& o) const {
    const float* p = peephole ? peephole + at.d * 3 * q.hidden + at.j : nullptr;
    const float i = gate_sigmoid(x[0] + u[0] + (p ? p[0] * c : 0.0f));
    const float f = gate_sigmoid(x[1] + u[1] + (p ? p[q.hidden] * c : 0.0f));
    const float g = tanhf(x[2] + u[2]);
    s = fmaf(f, c, i * g);
    o = gate_sigmoid(x[3] + u[3] + (p ? p[2 * q.hidden] * s : 0.0f));
    store_gates(at, i, f, g, o);
  }

  // c after the step; s is looked at where the sequence runs.
  __device__ __forceinline__ float keep_c(const Place& at, bool here, float s, float c) const {
    const float now = here ? zoned(kept_c(q, at), s, c) : c;
    if (cells) cells[row_of(q, at.t, at.b, at.d) * q.hidden + at.j] = from_float<T>(now);
    return now;
  }
  // h after the step, and y.
  __device__ __forceinline__ float keep_h(const Place& at, bool here, float fresh, float h) const {
    const float now = here ? zoned(kept_h(q, at), fresh, h) : h;
    y[row_of(q, at.t, at.b, at.d) * q.size + at.j] = from_float<T>(here ? now : 0.0f);
    return now;
  }

  // One step of one unit, without layer norm and projection; state: h, c.
  __device__ __forceinline__ void element(const Place& at, const float (&x)[4], const float (&u)[4],
                                          float (&state)[2]) const {
    const bool here = runs(q, at.t, at.b);
    float s = 0.0f, m = 0.0f, o;
    if (here) {
      activate(at, x, u, state[1], s, o);
      m = o * tanhf(s);
    } else {
      store_gates(at, 0.0f, 0.0f, 0.0f, 0.0f);
    }
    state[0] = keep_h(at, here, m, state[0]);
    state[1] = keep_c(at, here, s, state[1]);
  }
};

template <class T>
struct LstmProjection {
  T* m;              // [D, B, H]  what w_hr is multiplied with
  const float* out;  // [D, B, P]  the product
};

template <class T>
__global__ void __launch_bounds__(256) lstm_forward_units(LstmForward<T> a, LoopForward<T> l, int64_t k) {
  loop_forward<LstmForward<T>, false>(a, l, nullptr, k);
}

// Layer norm or projection (p.m not null: h is finished by lstm_forward_project). Step k of the row [B, D] blockIdx.x.
template <class T>
__global__ void __launch_bounds__(kRowThreads)
    lstm_forward_rows(LstmForward<T> a, LoopForward<T> l, LstmProjection<T> p, int64_t k) {
  const Sequence& q = a.q;
  const int64_t b = blockIdx.x / q.directions, d = blockIdx.x % q.directions, t = time_of(q, k, d), H = q.hidden;
  const int64_t state_at = state_row(q, b, d) * H;
  const bool here = runs(q, t, b);  // of the whole block
  float* u = l.u + state_row(q, b, d) * 4 * H;
  const T* x = a.gates_x + row_of(q, t, b, d) * 4 * H;
  float mean = 0.0f, rstd = 1.0f;
  if (here && a.ln_weight) row_statistics<kRowThreads>(u, 4 * H, q.eps, mean, rstd);
  // s and o of a unit wait in u, in the places of its gates g and o, which only its thread reads.
  float* cell = u + 2 * H;
  if (here) {
    for (int64_t j = threadIdx.x; j < H; j += kRowThreads) {
      float gx[4], gu[4], s, o;
#pragma unroll
      for (int g = 0; g < 4; ++g) {
        gx[g] = to_float(x[g * H + j]);
        gu[g] = u[g * H + j];
        if (a.ln_weight) gu[g] = (gu[g] - mean) * rstd * a.ln_weight[(d * 4 + g) * H + j];
      }
      a.activate({t, b, d, j}, gx, gu, a.c_n[state_at + j], s, o);
      cell[j] = s;
      cell[H + j] = o;
    }
    if (a.ln_c_weight) row_statistics<kRowThreads>(cell, H, q.eps, mean, rstd);
  }
  for (int64_t j = threadIdx.x; j < H; j += kRowThreads) {
    const Place at{t, b, d, j};
    float s = 0.0f, m = 0.0f;
    if (here) {
      s = cell[j];
      const float v = a.ln_c_weight ? fmaf((s - mean) * rstd, a.ln_c_weight[d * H + j], a.ln_c_bias[d * H + j]) : s;
      m = cell[H + j] * tanhf(v);
    } else {
      a.store_gates(at, 0.0f, 0.0f, 0.0f, 0.0f);
    }
    a.c_n[state_at + j] = a.keep_c(at, here, s, a.c_n[state_at + j]);
    if (p.m) {
      p.m[state_at + j] = from_float<T>(m);
    } else {
      const float h = a.keep_h(at, here, m, a.h_n[state_at + j]);
      a.h_n[state_at + j] = h;
      l.operand[state_at + j] = operand_of<T>(q, state_at + j, h);
    }
  }
}

// h of the row [B, D] blockIdx.x from w_hr m, a thread an element.
template <class T>
__global__ void __launch_bounds__(256)
    lstm_forward_project(LstmForward<T> a, LoopForward<T> l, LstmProjection<T> p, int64_t k) {
  const Sequence& q = a.q;
  const int64_t b = blockIdx.x / q.directions, d = blockIdx.x % q.directions, t = time_of(q, k, d);
  const int64_t j = static_cast<int64_t>(blockIdx.y) * blockDim.x + threadIdx.x;
  if (j >= q.size) return;
  const int64_t at = state_row(q, b, d) * q.size + j;
  const float h = a.keep_h({t, b, d, j}, runs(q, t, b), p.out[at], a.h_n[at]);
  a.h_n[at] = h;
  l.operand[at] = operand_of<T>(q, at, h);
}

template <class T, int Columns>
__global__ void __launch_bounds__(kPersistentThreads, 1) lstm_forward_persistent(LstmForward<T> a, Persistent<T> p) {
  persistent_forward<LstmForward<T>, Columns>(a, p);
}

// ---- Launchers ------------------------------------------------------------------------------------------------------

// What follows the product l.u of step k; with projection lstm_forward_project_launch comes after p.out is there.
template <class T>
cudaError_t lstm_forward_step_launch(const LstmForward<T>& a, const LoopForward<T>& l, const LstmProjection<T>& p,
                                     int64_t k, cudaStream_t stream) {
  if (a.ln_weight || a.ln_c_weight || p.m) {
    const LoopShape shape = loop_rows(a.q);
    return launch(lstm_forward_rows<T>, shape.grid, shape.block, 0, stream, a, l, p, k);
  }
  const LoopShape shape = loop_units(a.q, a.q.hidden);
  return launch(lstm_forward_units<T>, shape.grid, shape.block, 0, stream, a, l, k);
}

template <class T>
cudaError_t lstm_forward_project_launch(const LstmForward<T>& a, const LoopForward<T>& l, const LstmProjection<T>& p,
                                        int64_t k, cudaStream_t stream) {
  const LoopShape shape = loop_units(a.q, a.q.size);
  return launch(lstm_forward_project<T>, shape.grid, shape.block, 0, stream, a, l, p, k);
}

template <class T>
cudaError_t lstm_forward_persistent_launch(const LstmForward<T>& a, const Persistent<T>& p, cudaStream_t stream) {
  return persistent_launch<LstmForward<T>>(lstm_forward_persistent<T, 8>, lstm_forward_persistent<T, kWideColumns<T>>,
                                           a, p, stream);
}

}  // namespace fastdl::cuda
