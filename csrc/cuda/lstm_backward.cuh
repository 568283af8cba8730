// LSTM on CUDA, backward: the gradient of one step, and the kernels of the step loop (maths: fastdl/reference/lstm.py).
// What a step saved is gates and c; s = f c + i g and m are computed again.
//
// `project`: with projection, the gradient of w_hr m, whose product with w_hr follows. `units`: no layer norm and no
// projection, a thread a unit. `rows`: a block a sequence and direction.
//
// Test: pytest tests/test_lstm.py tests/test_recurrent_cuda.py
#pragma once

#include "cuda/lstm.cuh"

namespace fastdl::cuda {

template <class T>
struct LstmBackward {
  using Type = T;
  static constexpr int kGates = 4, kStates = 2;

  Sequence q;
  const T* dy;               // [T, B, D, P], or null
  const float* dh_n;         // [D, B, P], or null
  const float* dc_n;         // [D, B, H], or null
  const T* gates;            // [T, B, D, 4 H]
  const T* cells;            // [T, B, D, H]
  const float* c0;           // [D, B, H]
  const float* peephole;     // [D, 3, H], or null
  const float* ln_c_weight;  // [D, H], or null
  const float* ln_c_bias;    // [D, H], where there is ln_c_weight
  T* da;                     // [T, B, D, 4 H]
  T* du;                     // null: it is da, or layer norm's
  float* dh0;                // [D, B, P]
  float* dc0;                // [D, B, H]
  float* peephole_sums;      // [B, D, 3, H], or null
  float* ln_c_sums;          // [2][B, D, H] for ln_c_weight and ln_c_bias, or null

  __host__ __device__ __forceinline__ const float* initial(int state) const { return state == 0 ? dh_n : dc_n; }
  __host__ __device__ __forceinline__ float* last(int state) const { return state == 0 ? dh0 : dc0; }

  struct Unit {
    float i, f, g, o, c, s;  // c: of the step before
  };
  __device__ __forceinline__ Unit unit(const Place& at) const {
    const int64_t H = q.hidden, before = time_before(q, at, false);
    const T* from = gates + row_of(q, at.t, at.b, at.d) * 4 * H + at.j;
    Unit v{to_float(from[0]), to_float(from[H]), to_float(from[2 * H]), to_float(from[3 * H]), 0.0f, 0.0f};
    v.c = before < 0 ? c0[state_row(q, at.b, at.d) * H + at.j]
                     : to_float(cells[row_of(q, before, at.b, at.d) * H + at.j]);
    v.s = fmaf(v.f, v.c, v.i * v.g);
    return v;
  }

  // From the gradients of the output gate's input (da[3]) and of s, without the peephole's part: those of the other gates'
  // inputs; returns that of c before the step. dc: of c after it, keep: of zoneout.
  __device__ __forceinline__ float gates_backward(const Place& at, const Unit& v, float ds, float dc, float keep,
                                                  float (&da)[4]) const {
    const int64_t H = q.hidden;
    const float* p = peephole ? peephole + at.d * 3 * H + at.j : nullptr;
    if (p) ds += da[3] * p[2 * H];
    da[0] = ds * v.g * v.i * (1.0f - v.i);
    da[1] = ds * v.c * v.f * (1.0f - v.f);
    da[2] = ds * v.i * (1.0f - v.g * v.g);
    float before = keep * dc + ds * v.f;
    if (p) {
      before += da[0] * p[0] + da[1] * p[H];
      float* sums = peephole_sums + (at.b * q.directions + at.d) * 3 * H + at.j;
      sums[0] += da[0] * v.c;
      sums[H] += da[1] * v.c;
      sums[2 * H] += da[3] * v.s;
    }
    return before;
  }

  // One step of one unit that runs, without layer norm and projection. state: gradients of h and c after the step, which
  // become that of h around w_hh and that of c before it.
  __device__ __forceinline__ void element(const Place& at, float (&state)[2], float (&da)[4], float (&du)[4]) const {
    const Unit v = unit(at);
    const float keep = kept_h(q, at), keep_cell = kept_c(q, at);
    const float out = tanhf(v.s), dm = (1.0f - keep) * state[0];
    da[3] = dm * out * v.o * (1.0f - v.o);
    const float ds = (1.0f - keep_cell) * state[1] + dm * v.o * (1.0f - out * out);
    state[0] *= keep;
    state[1] = gates_backward(at, v, ds, state[1], keep_cell, da);
#pragma unroll
    for (int g = 0; g < 4; ++g) du[g] = da[g];
  }
};

template <class T>
struct LstmProjectionBackward {
  T* out;           // [D, B, P]     the gradient of w_hr m, what w_hr is multiplied with; or null without projection
  const float* dm;  // [D, B, H]     the product
  T* dm_out;        // [T, B, D, P]  out of all steps
  T* m;             // [T, B, D, H]
};

template <class T>
__global__ void __launch_bounds__(256) lstm_backward_units(LstmBackward<T> a, LoopBackward<T> l, int64_t k) {
  loop_backward<LstmBackward<T>, false>(a, l, k);
}

// The gradient of h of the row [B, D] blockIdx.x as far as w_hr, a thread an element.
template <class T>
__global__ void __launch_bounds__(256)
    lstm_backward_project(LstmBackward<T> a, LoopBackward<T> l, LstmProjectionBackward<T> p, int64_t k) {
  const Sequence& q = a.q;
  const int64_t b = blockIdx.x / q.directions, d = blockIdx.x % q.directions, t = time_of(q, k, d);
  const int64_t j = static_cast<int64_t>(blockIdx.y) * blockDim.x + threadIdx.x;
  if (j >= q.size) return;
  const int64_t at = state_row(q, b, d) * q.size + j, row = row_of(q, t, b, d) * q.size + j;
  float dh = incoming(q, a.dh_n, a.dh0, l.through, k, b, d, j), out = 0.0f;
  if (runs(q, t, b)) {
    if (a.dy) dh += to_float(a.dy[row]);
    const float keep = kept_h(q, {t, b, d, j});
    out = (1.0f - keep) * dh;
    dh *= keep;
  }
  a.dh0[at] = dh;
  p.out[at] = from_float<T>(out);
  p.dm_out[row] = from_float<T>(out);
}

// Layer norm or projection: step k of the row [B, D] blockIdx.x.
template <class T>
__global__ void __launch_bounds__(kRowThreads)
    lstm_backward_rows(LstmBackward<T> a, LoopBackward<T> l, LstmProjectionBackward<T> p, int64_t k) {
  const Sequence& q = a.q;
  const int64_t b = blockIdx.x / q.directions, d = blockIdx.x % q.directions, t = time_of(q, k, d), H = q.hidden;
  const int64_t row = row_of(q, t, b, d), state_at = state_row(q, b, d), sum_row = b * q.directions + d;
  const bool here = runs(q, t, b);  // of the whole block
  const bool norm = a.ln_c_weight != nullptr;
  float mean = 0.0f, rstd = 1.0f, mean_g = 0.0f, mean_gh = 0.0f;

  // The gradient of h after the step; with projection it went through lstm_backward_project, and dm is the product's.
  const auto gradient_of_h = [&](int64_t j) {
    float dh = incoming(q, a.dh_n, a.dh0, l.through, k, b, d, j);
    if (here && a.dy) dh += to_float(a.dy[row * H + j]);
    return dh;
  };
  const auto gradient_of_m = [&](int64_t j) {
    if (p.out) return p.dm[state_at * H + j];
    return (1.0f - kept_h(q, {t, b, d, j})) * gradient_of_h(j);
  };

  if (here && norm) {
    const float width = 1.0f / static_cast<float>(H);
    float sum = 0.0f, squares = 0.0f, sums[2] = {0.0f, 0.0f};
    for (int64_t j = threadIdx.x; j < H; j += kRowThreads) sum += a.unit({t, b, d, j}).s;
    mean = block_sum<kRowThreads>(sum) * width;
    for (int64_t j = threadIdx.x; j < H; j += kRowThreads) {
      const float apart = a.unit({t, b, d, j}).s - mean;
      squares += apart * apart;
    }
    rstd = rsqrtf(block_sum<kRowThreads>(squares) * width + q.eps);
    for (int64_t j = threadIdx.x; j < H; j += kRowThreads) {
      const typename LstmBackward<T>::Unit v = a.unit({t, b, d, j});
      const float hat = (v.s - mean) * rstd, weight = a.ln_c_weight[d * H + j];
      const float out = tanhf(fmaf(hat, weight, a.ln_c_bias[d * H + j]));
      const float dv = gradient_of_m(j) * v.o * (1.0f - out * out);
      sums[0] += dv * weight;
      sums[1] += dv * weight * hat;
      a.ln_c_sums[sum_row * H + j] += dv * hat;
      a.ln_c_sums[(q.batch * q.directions + sum_row) * H + j] += dv;
    }
    block_sum<kRowThreads>(sums);
    mean_g = sums[0] * width;
    mean_gh = sums[1] * width;
  }

  for (int64_t j = threadIdx.x; j < H; j += kRowThreads) {
    const Place at{t, b, d, j};
    float da[4] = {}, m = 0.0f;
    if (here) {
      const typename LstmBackward<T>::Unit v = a.unit(at);
      const float keep_cell = kept_c(q, at), dm = gradient_of_m(j), dc = a.dc0[state_at * H + j];
      const float hat = (v.s - mean) * rstd, weight = norm ? a.ln_c_weight[d * H + j] : 1.0f;
      const float out = tanhf(norm ? fmaf(hat, weight, a.ln_c_bias[d * H + j]) : v.s);
      const float dv = dm * v.o * (1.0f - out * out);
      m = v.o * out;
      da[3] = dm * out * v.o * (1.0f - v.o);
      const float ds = (1.0f - keep_cell) * dc + (norm ? rstd * (dv * weight - mean_g - hat * mean_gh) : dv);
      a.dc0[state_at * H + j] = a.gates_backward(at, v, ds, dc, keep_cell, da);
    }
    if (p.out) {
      p.m[row * H + j] = from_float<T>(m);
    } else {
      const float dh = gradient_of_h(j);
      a.dh0[state_at * H + j] = here ? kept_h(q, at) * dh : dh;
    }
#pragma unroll
    for (int g = 0; g < 4; ++g) {
      const int64_t i = g * H + j;
      a.da[row * 4 * H + i] = from_float<T>(da[g]);
      if (l.ln_weight)
        l.work[state_at * 4 * H + i] = da[g];
      else
        l.operand[state_at * 4 * H + i] = from_float<T>(da[g]);
    }
  }
  if (l.ln_weight) loop_norm_backward(q, l, row, state_at, sum_row, d, 4 * H);
}

template <class T, int Columns>
__global__ void __launch_bounds__(kPersistentThreads, 1) lstm_backward_persistent(LstmBackward<T> a, Persistent<T> p) {
  persistent_backward<LstmBackward<T>, Columns>(a, p);
}

// ---- Launchers ------------------------------------------------------------------------------------------------------

// Step k up to the product of p.out with w_hr; only with projection.
template <class T>
cudaError_t lstm_backward_project_launch(const LstmBackward<T>& a, const LoopBackward<T>& l,
                                         const LstmProjectionBackward<T>& p, int64_t k, cudaStream_t stream) {
  const LoopShape shape = loop_units(a.q, a.q.size);
  return launch(lstm_backward_project<T>, shape.grid, shape.block, 0, stream, a, l, p, k);
}

// Step k up to the product of l.operand with w_hh.
template <class T>
cudaError_t lstm_backward_step_launch(const LstmBackward<T>& a, const LoopBackward<T>& l,
                                      const LstmProjectionBackward<T>& p, int64_t k, cudaStream_t stream) {
  if (l.ln_weight || a.ln_c_weight || p.out) {
    const LoopShape shape = loop_rows(a.q);
    return launch(lstm_backward_rows<T>, shape.grid, shape.block, 0, stream, a, l, p, k);
  }
  const LoopShape shape = loop_units(a.q, a.q.hidden);
  return launch(lstm_backward_units<T>, shape.grid, shape.block, 0, stream, a, l, k);
}

template <class T>
cudaError_t lstm_backward_persistent_launch(const LstmBackward<T>& a, const Persistent<T>& p, cudaStream_t stream) {
  return persistent_launch<LstmBackward<T>>(lstm_backward_persistent<T, 8>,
                                            lstm_backward_persistent<T, kWideColumns<T>>, a, p, stream);
}

}  // namespace fastdl::cuda
