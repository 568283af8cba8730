// The selective scan of Mamba on CUDA, forward (contract: fastdl/ops/selective_scan.py):
//
//   dt = softplus(delta + bias);  h = exp(dt A) h + dt x B;  y = (sum over state of C h + D x) silu(z)
//
// A channel has G lanes of a warp, each with four of its states in registers; sums over the state are shuffles among the
// G, and neighbouring channels lie side by side in memory. Where channels and sequences fill less than the GPU, time is cut
// into segments over the grid: `summary` runs each from zero (its map is exp(A * sum of dt), and that end), `carry` finds
// the states before them, and the segments run side by side. Floor: one exp a channel, state and step.
//
// Test: pytest tests/test_selective_scan.py        Backward: selective_scan_backward.cuh
#pragma once

#include "cuda/vector.cuh"

namespace fastdl::cuda {

template <class T>
struct ScanTrack {
  const T* data;        // [batch, length, channels], channels side by side; null where there is none
  int64_t batch, step;  // strides in elements

  __device__ __forceinline__ float at(int64_t n, int64_t t, int64_t c) const {
    return to_float(data[n * batch + t * step + c]);
  }
};

template <class T>
struct SelectiveScan {
  ScanTrack<T> x, delta, z, grad;  // [batch, length, dim]
  ScanTrack<T> b, c;               // [batch, length, state]
  const float* a;                  // [dim, state]
  const float *d, *bias;           // [dim], or null
  const float* first;       // [batch, dim, state]: h0, or in the backward walk the gradient of the last h; or null
  float* last;              // [batch, dim, state]: the last h, or dh0
  float* states;            // [batch, chunks, state, dim]: h before each chunk of kSelectiveChunk steps, or null
  T *y, *dx, *ddelta, *dz;  // [batch, length, dim] contiguous
  float* ends;              // [segments, batch, dim, state], with `spans` the maps of segments; null: one segment
  float* spans;             // [segments, batch, dim]: sums of dt
  float* before;            // [segments, batch, dim, state]: what enters each segment
  float* parts_bc;          // [2, channel blocks, batch * length * state]: dB and dC of a block
  float* parts_a;           // [segments * batch, dim * state]
  float* parts_d;           // [2, segments * batch, dim]: dD and dbias
  int64_t batch, length, dim, state, chunks;
  int64_t segment, segments;  // steps of a segment, a multiple of kSelectiveChunk
  bool softplus;
};

constexpr int kSelectiveChunk = 16, kSelectiveThreads = 256, kSelectiveEach = 4;  // states of a lane

// Where a thread stands: its sequence, channel, and the first of its states, which are G apart.
template <int G, class T>
struct SelectiveLane {
  int64_t n, d, begin, end;  // steps begin <= t < end
  int first;
  bool active;

  __device__ __forceinline__ explicit SelectiveLane(const SelectiveScan<T>& s) {
    constexpr int64_t kChannels = kSelectiveThreads / G;
    const int64_t blocks = (s.dim + kChannels - 1) / kChannels;
    n = blockIdx.x / blocks;
    d = blockIdx.x % blocks * kChannels + threadIdx.x / G;
    first = static_cast<int>(threadIdx.x % G);
    active = d < s.dim;
    begin = blockIdx.y * s.segment;
    end = begin + s.segment < s.length ? begin + s.segment : s.length;
  }
  __device__ __forceinline__ int64_t state(int j) const { return first + j * G; }
  __device__ __forceinline__ bool has(const SelectiveScan<T>& s, int j) const { return active && state(j) < s.state; }
};

// v[j] = from[... channel d, state ...], 0 past the end. from [.., dim, state] of sequence n in the part `part`, or null.
template <int G, class T>
__device__ __forceinline__ void selective_take(const SelectiveScan<T>& s, const SelectiveLane<G, T>& lane,
                                               const float* from, int64_t part, float (&v)[kSelectiveEach]) {
#pragma unroll
  for (int j = 0; j < kSelectiveEach; ++j)
    v[j] = from && lane.has(s, j) ? from[((part * s.batch + lane.n) * s.dim + lane.d) * s.state + lane.state(j)] : 0.0f;
}

template <int G, class T>
__device__ __forceinline__ void selective_put(const SelectiveScan<T>& s, const SelectiveLane<G, T>& lane, float* to,
                                              int64_t part, const float (&v)[kSelectiveEach]) {
#pragma unroll
  for (int j = 0; j < kSelectiveEach; ++j)
    if (lane.has(s, j)) to[((part * s.batch + lane.n) * s.dim + lane.d) * s.state + lane.state(j)] = v[j];
}

// Row t of B or C at the lane's states, 0 past the end.
template <int G, class T>
__device__ __forceinline__ void selective_row(const SelectiveScan<T>& s, const SelectiveLane<G, T>& lane,
                                              const ScanTrack<T>& m, int64_t t, float (&v)[kSelectiveEach]) {
#pragma unroll
  for (int j = 0; j < kSelectiveEach; ++j) v[j] = lane.has(s, j) ? m.at(lane.n, t, lane.state(j)) : 0.0f;
}

__device__ __forceinline__ float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

// dt of a step, and in `slope` its derivative for delta. 0 past the last channel.
template <int G, class T>
__device__ __forceinline__ float selective_dt(const SelectiveScan<T>& s, const SelectiveLane<G, T>& lane, int64_t t,
                                              float& slope) {
  slope = 1.0f;
  if (!lane.active) return 0.0f;
  const float raw = s.delta.at(lane.n, t, lane.d) + (s.bias ? s.bias[lane.d] : 0.0f);
  if (!s.softplus) return raw;
  slope = sigmoid(raw);
  return raw > 20.0f ? raw : log1pf(expf(raw));
}

// The sum over the G lanes of a channel, in each of them.
template <int G>
__device__ __forceinline__ float group_sum(float v) {
#pragma unroll
  for (int bits = G / 2; bits > 0; bits /= 2) v += __shfl_xor_sync(0xffffffffu, v, bits);
  return v;
}

// Grid (channel blocks * batch, segments). Summary: ends and spans of all segments but the last; else the outputs.
template <class T, int G, bool Summary>
__global__ void __launch_bounds__(kSelectiveThreads) selective_scan_forward_run(const SelectiveScan<T> s) {
  const SelectiveLane<G, T> lane(s);
  float a[kSelectiveEach], h[kSelectiveEach], span = 0.0f;
  const bool parted = s.ends != nullptr;
#pragma unroll
  for (int j = 0; j < kSelectiveEach; ++j) a[j] = lane.has(s, j) ? s.a[lane.d * s.state + lane.state(j)] : 0.0f;
  selective_take(s, lane, Summary ? nullptr : parted ? s.before : s.first, parted ? blockIdx.y : 0, h);
  const float skip = s.d && lane.active ? s.d[lane.d] : 0.0f;
  for (int64_t t = lane.begin; t < lane.end; ++t) {
    if (!Summary && s.states && t % kSelectiveChunk == 0) {
      float* const to = s.states + (lane.n * s.chunks + t / kSelectiveChunk) * s.state * s.dim + lane.d;
#pragma unroll
      for (int j = 0; j < kSelectiveEach; ++j)
        if (lane.has(s, j)) to[lane.state(j) * s.dim] = h[j];
    }
    float b[kSelectiveEach], c[kSelectiveEach], slope, y = 0.0f;
    const float dt = selective_dt(s, lane, t, slope), x = lane.active ? s.x.at(lane.n, t, lane.d) : 0.0f;
    selective_row(s, lane, s.b, t, b);
    if constexpr (!Summary) selective_row(s, lane, s.c, t, c);
#pragma unroll
    for (int j = 0; j < kSelectiveEach; ++j) {
      h[j] = expf(dt * a[j]) * h[j] + dt * x * b[j];
      if constexpr (!Summary) y += c[j] * h[j];
    }
    if constexpr (Summary) {
      span += dt;
    } else {
      y = group_sum<G>(y) + skip * x;
      if (lane.first == 0 && lane.active) {
        if (s.z.data) {
          const float z = s.z.at(lane.n, t, lane.d);
          y *= z * sigmoid(z);
        }
        s.y[(lane.n * s.length + t) * s.dim + lane.d] = from_float<T>(y);
      }
    }
  }
  if constexpr (Summary) {
    selective_put(s, lane, s.ends, blockIdx.y, h);
    if (lane.first == 0 && lane.active) s.spans[(blockIdx.y * s.batch + lane.n) * s.dim + lane.d] = span;
  } else if (lane.end == s.length) {
    selective_put(s, lane, s.last, 0, h);
  }
}

// What enters each segment, in the order of the walk. A thread a state of a channel.
template <class T, bool Backward>
__global__ void __launch_bounds__(128) selective_scan_carry(const SelectiveScan<T> s) {
  const int64_t all = s.batch * s.dim * s.state, i = static_cast<int64_t>(blockIdx.x) * 128 + threadIdx.x;
  if (i >= all) return;
  const int64_t channel = i / s.state;
  const float a = s.a[channel % s.dim * s.state + i % s.state];
  float h = s.first ? s.first[i] : 0.0f;
  for (int64_t m = 0; m < s.segments; ++m) {
    const int64_t k = Backward ? s.segments - 1 - m : m;
    s.before[k * all + i] = h;
    if (m + 1 == s.segments) break;
    const float end = s.ends[k * all + i];
    h = h == 0.0f ? end : expf(a * s.spans[k * s.batch * s.dim + channel]) * h + end;
  }
}

// How time is cut: a function of the shape and of the GPU's size. Sets s.segment and s.segments.
template <class T>
void selective_scan_plan(SelectiveScan<T>& s, int64_t channels) {
  constexpr int64_t kLeast = 4 * kSelectiveChunk;
  const int64_t blocks = s.batch * ((s.dim + channels - 1) / channels), processors = multiprocessor_count();
  int64_t segments = blocks == 0 || blocks >= 2 * processors ? 1 : 4 * processors / blocks;
  if (segments > s.length / kLeast) segments = s.length / kLeast;
  if (segments < 1) segments = 1;
  s.segment = ((s.length + segments - 1) / segments + kSelectiveChunk - 1) / kSelectiveChunk * kSelectiveChunk;
  s.segments = s.segment > 0 ? (s.length + s.segment - 1) / s.segment : 1;
}

// body(constant) with the lanes of a channel, constant.value; states beyond four times 32 were refused.
template <int G>
struct Lanes {
  static constexpr int value = G;
};
template <class Body>
cudaError_t for_lanes(int64_t state, const Body& body) {
  if (state <= 4 * kSelectiveEach) return body(Lanes<4>());
  if (state <= 16 * kSelectiveEach) return body(Lanes<16>());
  return body(Lanes<32>());
}

inline int64_t selective_channels(int64_t state) {  // of a block
  return kSelectiveThreads / (state <= 4 * kSelectiveEach ? 4 : state <= 16 * kSelectiveEach ? 16 : 32);
}

template <class T>
dim3 selective_grid(const SelectiveScan<T>& s, int64_t segments) {
  const int64_t channels = selective_channels(s.state);
  return dim3(static_cast<unsigned>(s.batch * ((s.dim + channels - 1) / channels)), static_cast<unsigned>(segments));
}

template <bool Backward, class T>
cudaError_t selective_scan_carry_launch(const SelectiveScan<T>& s, cudaStream_t stream) {
  const auto blocks = static_cast<unsigned>((s.batch * s.dim * s.state + 127) / 128);
  return launch(selective_scan_carry<T, Backward>, dim3(blocks), dim3(128), 0, stream, s);
}

// s.ends, spans and before are there where s.segments is above 1.
template <class T>
cudaError_t selective_scan_forward_launch(const SelectiveScan<T>& s, cudaStream_t stream) {
  return for_lanes(s.state, [&](auto lanes) {
    constexpr int G = decltype(lanes)::value;
    const dim3 threads(kSelectiveThreads);
    if (s.segments > 1) {
      cudaError_t error =
          launch(selective_scan_forward_run<T, G, true>, selective_grid(s, s.segments - 1), threads, 0, stream, s);
      if (error == cudaSuccess) error = selective_scan_carry_launch<false>(s, stream);
      if (error != cudaSuccess) return error;
    }
    return launch(selective_scan_forward_run<T, G, false>, selective_grid(s, s.segments), threads, 0, stream, s);
  });
}

}  // namespace fastdl::cuda
