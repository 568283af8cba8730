// The recurrence h_t = a_t h_{t-1} + b_t on CUDA, and its gradient (contract: fastdl/ops/linear_scan.py):
//
//   forward    state = a state + b,                    h = state
//   backward   g = grad + state,  state = conj(a) g,   db = g,  da = g conj(h before); walks from the last step
//
// Both are affine maps of the state, and one kernel walks either. A block has 32 channels in its lanes, so that memory is
// read in whole lines, and a tile of 64 steps: each warp takes 8 of them into registers and finds their map, the maps
// compose through shared memory, and each warp runs its steps from the state that it then knows. Memory is read once.
// Where channels and sequences fill less than the GPU, time is cut into chunks over the grid: `summary` finds the map of
// each, `carry` the states before them, and the chunks run side by side; a and b are read twice, the second time often
// from the cache. Floor: (reads of a, b + write of h) / bandwidth.
//
// Test: pytest tests/test_linear_scan.py
#pragma once

#include "cuda/vector.cuh"

namespace fastdl::cuda {

struct alignas(8) complex_t {
  float re, im;
};

template <class T>
struct ScanNumber {
  using Type = float;  // what a state of T is kept in
};
template <>
struct ScanNumber<complex_t> {
  using Type = complex_t;
};
template <class T>
using Number = typename ScanNumber<T>::Type;

template <class T>
__device__ __forceinline__ float to_number(T x) {
  return to_float(x);
}
__device__ __forceinline__ complex_t to_number(complex_t x) { return x; }
template <class T>
__device__ __forceinline__ void put(T* to, float x) {
  *to = from_float<T>(x);
}
__device__ __forceinline__ void put(complex_t* to, complex_t x) { *to = x; }

__device__ __forceinline__ float add(float x, float y) { return x + y; }
__device__ __forceinline__ complex_t add(complex_t x, complex_t y) { return {x.re + y.re, x.im + y.im}; }
__device__ __forceinline__ float mul(float x, float y) { return x * y; }
__device__ __forceinline__ complex_t mul(complex_t x, complex_t y) {
  return {x.re * y.re - x.im * y.im, x.re * y.im + x.im * y.re};
}
__device__ __forceinline__ float conj(float x) { return x; }
__device__ __forceinline__ complex_t conj(complex_t x) { return {x.re, -x.im}; }
__device__ __forceinline__ bool is_zero(float x) { return x == 0.0f; }
__device__ __forceinline__ bool is_zero(complex_t x) { return x.re == 0.0f && x.im == 0.0f; }
__device__ __forceinline__ void fill(float x, float& to) { to = x; }
__device__ __forceinline__ void fill(float x, complex_t& to) { to = {x, 0.0f}; }

// The state after a piece whose map is (product, end). A state of 0 gives end, whatever the product has overflowed to.
template <class N>
__device__ __forceinline__ N moved(N product, N end, N state) {
  return is_zero(state) ? end : add(mul(product, state), end);
}

// Steps p are in the order of the recurrence; strides in elements, the channels side by side.
template <class T>
struct LinearScan {
  const T *a, *b, *h;   // [batch, length, channels]; b: grad in the backward walk; h there alone
  T *out, *da;          // h, or db and da (or null)
  const Number<T>* h0;  // [batch, channels], or null
  Number<T>* dh0;       // [batch, channels], in the backward walk
  Number<T>* products;  // [chunks, batch, channels], with `ends` the maps of chunks; null where chunks is 1
  Number<T>* ends;      // the same
  Number<T>* states;    // the same: before each chunk
  int64_t a_batch, a_step, b_batch, b_step, h_batch, h_step, out_batch, out_step;
  int64_t batch, length, channels;
  int64_t chunk, chunks;  // steps of a chunk, a multiple of kScanTile; how many
};

constexpr int kScanWarps = 8, kScanSteps = 8, kScanTile = kScanWarps * kScanSteps;

// a and b of one step, and what the walk does with them.
template <class T>
struct ScanItem {
  Number<T> a, b;
};

// Step u of the walk: its place in the order of the recurrence.
template <bool Backward, class T>
__device__ __forceinline__ int64_t scan_place(const LinearScan<T>& s, int64_t u) {
  return Backward ? s.length - 1 - u : u;
}

template <bool Backward, class T>
__device__ __forceinline__ ScanItem<T> scan_load(const LinearScan<T>& s, int64_t n, int64_t u, int64_t c) {
  const int64_t p = scan_place<Backward>(s, u);
  const Number<T> a = to_number(s.a[n * s.a_batch + p * s.a_step + c]);
  return {Backward ? conj(a) : a, to_number(s.b[n * s.b_batch + p * s.b_step + c])};
}

template <bool Backward, class N, class T>
__device__ __forceinline__ N scan_next(const ScanItem<T>& item, N state) {
  return Backward ? mul(item.a, add(item.b, state)) : add(mul(item.a, state), item.b);
}

// The state after step u, its outputs written.
template <bool Backward, class T>
__device__ __forceinline__ Number<T> scan_write(const LinearScan<T>& s, const ScanItem<T>& item, Number<T> state,
                                                int64_t n, int64_t u, int64_t c) {
  const int64_t p = scan_place<Backward>(s, u), at = n * s.out_batch + p * s.out_step + c;
  const Number<T> after = scan_next<Backward>(item, state);
  if constexpr (!Backward) {
    put(s.out + at, after);
  } else {
    const Number<T> g = add(item.b, state);
    put(s.out + at, g);
    if (s.da) {
      Number<T> before;
      fill(0.0f, before);
      if (p > 0)
        before = to_number(s.h[n * s.h_batch + (p - 1) * s.h_step + c]);
      else if (s.h0)
        before = s.h0[n * s.channels + c];
      put(s.da + at, mul(g, conj(before)));
    }
  }
  return after;
}

template <bool Backward, class T>
__device__ __forceinline__ Number<T> scan_initial(const LinearScan<T>& s, int64_t channel) {
  Number<T> state;
  fill(0.0f, state);
  if (!Backward && s.h0) state = s.h0[channel];
  return state;
}

// Grid (channel groups * batch, chunks). Summary: writes the maps of all chunks but the last; else the outputs.
template <class T, bool Backward, bool Summary>
__global__ void __launch_bounds__(32 * kScanWarps) linear_scan_run(const LinearScan<T> s) {
  using N = Number<T>;
  FASTDL_SHARED(N, products, [kScanWarps][32]);
  FASTDL_SHARED(N, ends, [kScanWarps][32]);
  const int lane = static_cast<int>(threadIdx.x), warp = static_cast<int>(threadIdx.y);
  const int64_t groups = (s.channels + 31) / 32, n = blockIdx.x / groups, c = blockIdx.x % groups * 32 + lane;
  const int64_t begin = blockIdx.y * s.chunk, end = begin + s.chunk < s.length ? begin + s.chunk : s.length;
  const int64_t channel = n * s.channels + c, all = s.batch * s.channels;
  const bool active = c < s.channels;
  N state, whole;
  fill(0.0f, state);
  fill(1.0f, whole);
  if (!Summary && active) state = s.states ? s.states[blockIdx.y * all + channel] : scan_initial<Backward>(s, channel);
  for (int64_t tile = begin; tile < end; tile += kScanTile) {
    const int64_t first = tile + warp * kScanSteps;
    ScanItem<T> items[kScanSteps];
    N product, last;
    fill(1.0f, product);
    fill(0.0f, last);
#pragma unroll
    for (int k = 0; k < kScanSteps; ++k) {
      fill(1.0f, items[k].a);
      fill(0.0f, items[k].b);
      if (active && first + k < end) items[k] = scan_load<Backward>(s, n, first + k, c);
    }
#pragma unroll
    for (int k = 0; k < kScanSteps; ++k) {
      product = mul(items[k].a, product);
      last = scan_next<Backward>(items[k], last);
    }
    products[warp][lane] = product;
    ends[warp][lane] = last;
    __syncthreads();
    N mine = state;
#pragma unroll
    for (int v = 0; v < kScanWarps; ++v) {
      if (v == warp) mine = state;
      if constexpr (Summary) whole = mul(products[v][lane], whole);
      state = moved(products[v][lane], ends[v][lane], state);
    }
    if constexpr (!Summary) {
#pragma unroll
      for (int k = 0; k < kScanSteps; ++k)
        if (active && first + k < end) mine = scan_write<Backward>(s, items[k], mine, n, first + k, c);
    }
    __syncthreads();
  }
  if (warp != 0 || !active) return;
  if constexpr (Summary) {
    s.products[blockIdx.y * all + channel] = whole;
    s.ends[blockIdx.y * all + channel] = state;
  } else if constexpr (Backward) {
    if (end == s.length) s.dh0[channel] = state;
  }
}

// The states before each chunk. A thread a channel of a sequence.
template <class T, bool Backward>
__global__ void __launch_bounds__(128) linear_scan_carry(const LinearScan<T> s) {
  const int64_t all = s.batch * s.channels, channel = static_cast<int64_t>(blockIdx.x) * 128 + threadIdx.x;
  if (channel >= all) return;
  Number<T> state = scan_initial<Backward>(s, channel);
  for (int64_t k = 0; k < s.chunks; ++k) {
    s.states[k * all + channel] = state;
    if (k + 1 < s.chunks) state = moved(s.products[k * all + channel], s.ends[k * all + channel], state);
  }
}

// How time is cut: a function of the shape and of the GPU's size. Sets s.chunk and s.chunks.
template <class T>
void linear_scan_plan(LinearScan<T>& s) {
  constexpr int64_t kLeast = 4 * kScanTile;
  const int64_t blocks = s.batch * ((s.channels + 31) / 32), processors = multiprocessor_count();
  int64_t chunks = blocks == 0 || blocks >= 2 * processors ? 1 : 4 * processors / blocks;
  if (chunks > s.length / kLeast) chunks = s.length / kLeast;
  if (chunks < 1) chunks = 1;
  s.chunk = ((s.length + chunks - 1) / chunks + kScanTile - 1) / kScanTile * kScanTile;
  s.chunks = s.chunk > 0 ? (s.length + s.chunk - 1) / s.chunk : 1;
}

// s.products, ends and states hold [chunks, batch, channels] where chunks is above 1.
template <bool Backward, class T>
cudaError_t linear_scan_launch(const LinearScan<T>& s, cudaStream_t stream) {
  const auto blocks = static_cast<unsigned>(s.batch * ((s.channels + 31) / 32));
  const auto chunks = static_cast<unsigned>(s.chunks);
  const dim3 threads(32, kScanWarps);
  if (s.chunks > 1) {
    cudaError_t error = launch(linear_scan_run<T, Backward, true>, dim3(blocks, chunks - 1), threads, 0, stream, s);
    if (error != cudaSuccess) return error;
    const auto channels = static_cast<unsigned>((s.batch * s.channels + 127) / 128);
    error = launch(linear_scan_carry<T, Backward>, dim3(channels), dim3(128), 0, stream, s);
    if (error != cudaSuccess) return error;
  }
  return launch(linear_scan_run<T, Backward, false>, dim3(blocks, chunks), threads, 0, stream, s);
}

}  // namespace fastdl::cuda
