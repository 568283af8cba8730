// The selective scan of Mamba on CUDA, backward (contract: fastdl/ops/selective_scan.py; lanes: selective_scan.cuh):
//
//   dh += g C;  dC = g h;  dB = dh dt x;  dA += dh h' e dt;  ddt = dh h' e A + dh B x;  dx = dh B dt + D g;  dh = e dh
//
// with g = grad silu(z), e = exp(dt A) and h' the state before the step, from the last step to the first. Sixteen steps at
// a time: they are run again from the kept state, their h in registers, and then walked back. Sums over channels (dB, dC)
// are shuffles within a warp, shared memory within a block and partial sums over blocks; all are added in order.
// Segments of time as in the forward pass: the map of a segment needs no h.
//
// Test: pytest tests/test_selective_scan.py
#pragma once

#include "cuda/reduce.cuh"
#include "cuda/selective_scan.cuh"

namespace fastdl::cuda {

constexpr int kFlush = 4;  // steps whose dB and dC wait in shared memory

// grad silu(z) of a step; 0 past the last channel.
template <int G, class T>
__device__ __forceinline__ float selective_grad(const SelectiveScan<T>& s, const SelectiveLane<G, T>& lane, int64_t t) {
  if (!lane.active) return 0.0f;
  const float g = s.grad.at(lane.n, t, lane.d);
  if (!s.z.data) return g;
  const float z = s.z.at(lane.n, t, lane.d);
  return g * z * sigmoid(z);
}

// Grid (channel blocks * batch, segments - 1): ends and spans of the segments 1, 2, ...
template <class T, int G>
__global__ void __launch_bounds__(kSelectiveThreads) selective_scan_backward_summary(const SelectiveScan<T> s) {
  SelectiveLane<G, T> lane(s);
  const int64_t part = blockIdx.y + 1;
  lane.begin = part * s.segment;
  lane.end = lane.begin + s.segment < s.length ? lane.begin + s.segment : s.length;
  float a[kSelectiveEach], dh[kSelectiveEach] = {}, span = 0.0f;
#pragma unroll
  for (int j = 0; j < kSelectiveEach; ++j) a[j] = lane.has(s, j) ? s.a[lane.d * s.state + lane.state(j)] : 0.0f;
  for (int64_t t = lane.end - 1; t >= lane.begin; --t) {
    float c[kSelectiveEach], slope;
    const float dt = selective_dt(s, lane, t, slope), g = selective_grad(s, lane, t);
    selective_row(s, lane, s.c, t, c);
#pragma unroll
    for (int j = 0; j < kSelectiveEach; ++j) dh[j] = expf(dt * a[j]) * (dh[j] + g * c[j]);
    span += dt;
  }
  selective_put(s, lane, s.ends, part, dh);
  if (lane.first == 0 && lane.active) s.spans[(part * s.batch + lane.n) * s.dim + lane.d] = span;
}

template <class T, int G>
__global__ void __launch_bounds__(kSelectiveThreads) selective_scan_backward_run(const SelectiveScan<T> s) {
  constexpr int kWarps = kSelectiveThreads / 32, kStates = G * kSelectiveEach;
  FASTDL_SHARED(float, sums, [2][kFlush][kWarps][kStates]);
  const SelectiveLane<G, T> lane(s);
  const int warp = static_cast<int>(threadIdx.x / 32), lane_of_warp = static_cast<int>(threadIdx.x % 32);
  const int64_t blocks = gridDim.x / s.batch, block = blockIdx.x % blocks, rows = s.batch * s.length * s.state;
  const bool parted = s.ends != nullptr;
  float a[kSelectiveEach], dh[kSelectiveEach], da[kSelectiveEach] = {}, dd = 0.0f, dbias = 0.0f;
#pragma unroll
  for (int j = 0; j < kSelectiveEach; ++j) a[j] = lane.has(s, j) ? s.a[lane.d * s.state + lane.state(j)] : 0.0f;
  selective_take(s, lane, parted ? s.before : s.first, parted ? blockIdx.y : 0, dh);
  const float skip = s.d && lane.active ? s.d[lane.d] : 0.0f;
  for (int64_t k = (lane.end - 1) / kSelectiveChunk; k >= lane.begin / kSelectiveChunk; --k) {
    const int64_t t0 = k * kSelectiveChunk;
    const int steps = static_cast<int>(s.length - t0 < kSelectiveChunk ? s.length - t0 : kSelectiveChunk);
    float h[kSelectiveChunk + 1][kSelectiveEach];  // before each step, and after the last
    const float* const from = s.states + (lane.n * s.chunks + k) * s.state * s.dim + lane.d;
#pragma unroll
    for (int j = 0; j < kSelectiveEach; ++j) h[0][j] = lane.has(s, j) ? from[lane.state(j) * s.dim] : 0.0f;
#pragma unroll
    for (int i = 0; i < kSelectiveChunk; ++i) {
      const bool here = i < steps;
      float b[kSelectiveEach], slope;
      const int64_t t = here ? t0 + i : t0;
      const float dt = selective_dt(s, lane, t, slope), x = lane.active ? s.x.at(lane.n, t, lane.d) : 0.0f;
      selective_row(s, lane, s.b, t, b);
#pragma unroll
      for (int j = 0; j < kSelectiveEach; ++j) h[i + 1][j] = here ? expf(dt * a[j]) * h[i][j] + dt * x * b[j] : h[i][j];
    }
#pragma unroll
    for (int i = kSelectiveChunk - 1; i >= 0; --i) {
      const bool here = i < steps;  // the same in the whole block
      const int64_t t = here ? t0 + i : t0, at = (lane.n * s.length + t) * s.dim + lane.d;
      if (here) {
        float b[kSelectiveEach], c[kSelectiveEach], slope, along = 0.0f, of_dt = 0.0f, y = 0.0f;
        const float dt = selective_dt(s, lane, t, slope), x = lane.active ? s.x.at(lane.n, t, lane.d) : 0.0f;
        const float g = selective_grad(s, lane, t);
        selective_row(s, lane, s.b, t, b);
        selective_row(s, lane, s.c, t, c);
#pragma unroll
        for (int j = 0; j < kSelectiveEach; ++j) {
          dh[j] += g * c[j];
          float db = dh[j] * dt * x, dc = g * h[i + 1][j];
          y += c[j] * h[i + 1][j];
          along += dh[j] * b[j];
          dh[j] *= expf(dt * a[j]);
          const float of_decay = dh[j] * h[i][j];
          da[j] += of_decay * dt;
          of_dt += of_decay * a[j];
#pragma unroll
          for (int bits = G; bits < 32; bits *= 2) {  // over the channels of the warp
            db += __shfl_xor_sync(kAllLanes, db, bits);
            dc += __shfl_xor_sync(kAllLanes, dc, bits);
          }
          if (lane_of_warp < G) {
            sums[0][i % kFlush][warp][lane_of_warp + j * G] = db;
            sums[1][i % kFlush][warp][lane_of_warp + j * G] = dc;
          }
        }
        along = group_sum<G>(along);
        const float ddelta = (group_sum<G>(of_dt) + along * x) * slope;
        if (s.z.data) y = group_sum<G>(y);
        if (lane.first == 0 && lane.active) {
          s.dx[at] = from_float<T>(along * dt + skip * g);
          s.ddelta[at] = from_float<T>(ddelta);
          if (s.z.data) {
            const float z = s.z.at(lane.n, t, lane.d), gate = sigmoid(z);
            s.dz[at] = from_float<T>(s.grad.at(lane.n, t, lane.d) * (y + skip * x) * gate * (1.0f + z * (1.0f - gate)));
          }
          dd += g * x;
          dbias += ddelta;
        }
      }
      if (i % kFlush == 0) {  // the steps i .. i + kFlush - 1
        __syncthreads();
        for (int m = static_cast<int>(threadIdx.x); m < 2 * kFlush * kStates; m += kSelectiveThreads) {
          const int which = m / (kFlush * kStates), step = m / kStates % kFlush, state = m % kStates;
          if (i + step >= steps || state >= s.state) continue;
          float sum = 0.0f;
#pragma unroll
          for (int v = 0; v < kWarps; ++v) sum += sums[which][step][v][state];
          s.parts_bc[(which * blocks + block) * rows + (lane.n * s.length + t0 + i + step) * s.state + state] = sum;
        }
        __syncthreads();
      }
    }
  }
  const int64_t part = blockIdx.y * s.batch + lane.n, parts = s.segments * s.batch;
#pragma unroll
  for (int j = 0; j < kSelectiveEach; ++j)
    if (lane.has(s, j)) s.parts_a[part * s.dim * s.state + lane.d * s.state + lane.state(j)] = da[j];
  if (lane.first == 0 && lane.active) {
    s.parts_d[part * s.dim + lane.d] = dd;
    s.parts_d[(parts + part) * s.dim + lane.d] = dbias;
  }
  if (lane.begin == 0) selective_put(s, lane, s.last, 0, dh);
}

// s.last is dh0, s.first the gradient of the last h. parts_bc holds [2, channel blocks, batch * length * state].
template <class T>
cudaError_t selective_scan_backward_launch(const SelectiveScan<T>& s, float* db, float* dc, float* da, float* dd,
                                           float* dbias, cudaStream_t stream) {
  cudaError_t error = for_lanes(s.state, [&](auto lanes) {
    constexpr int G = decltype(lanes)::value;
    const dim3 threads(kSelectiveThreads);
    if (s.segments > 1) {
      cudaError_t failed =
          launch(selective_scan_backward_summary<T, G>, selective_grid(s, s.segments - 1), threads, 0, stream, s);
      if (failed == cudaSuccess) failed = selective_scan_carry_launch<true>(s, stream);
      if (failed != cudaSuccess) return failed;
    }
    return launch(selective_scan_backward_run<T, G>, selective_grid(s, s.segments), threads, 0, stream, s);
  });
  const auto sum = [&](const float* parts, int64_t count, int64_t cols, float* first, float* second) {
    if (error != cudaSuccess) return;
    const dim3 grid(static_cast<unsigned>((cols + 31) / 32), second ? 2 : 1);
    error = launch(sum_partials, grid, dim3(32, 8), 0, stream, parts, first, second, count, cols);
  };
  const int64_t channels = selective_channels(s.state), parts = s.segments * s.batch;
  sum(s.parts_bc, (s.dim + channels - 1) / channels, s.batch * s.length * s.state, db, dc);
  sum(s.parts_a, parts, s.dim * s.state, da, nullptr);
  sum(s.parts_d, parts, s.dim, dd, dbias);
  return error;
}

}  // namespace fastdl::cuda
