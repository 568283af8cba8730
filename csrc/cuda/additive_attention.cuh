// Additive attention on CUDA, forward (contract: fastdl/ops/additive_attention.py):
//
//   s_ij = sum_h w_h tanh(q_ih + k_jh),   out_i = sum_j softmax_j(s_ij) v_j,   or the scores' log-softmax
//
// Method: exp(2q) and exp(2k) are computed once (additive_attention_prepare), so that tanh(q + k) = n / (n + 2), n = exp(2q) exp(2k) - 1,
// takes one reciprocal of the special function unit (16 a clock and multiprocessor) and five multiply-adds and additions
// (128 a clock); the score is one more. That unit bounds it: 16 elements of [queries, keys, hidden] a clock and
// multiprocessor; tanhf takes two of its operations and some 20 others. Small keys and wide ranges have ways of their own,
// chosen by the largest |q| of the query and |k| of the keys of the tile that it sees, as in csrc/cpu/additive_tile.h.
// A block has 16 queries, 4 a warp, and tiles of 32 keys, one a lane, so that no score is summed across lanes; hidden
// units pass through shared memory 32 at a time. Keys are cut into chunks by their number alone; the state of each
// (largest score, sum of exponentials, sum of values) goes to memory and `additive_attention_merge` puts them together.
//
// Test: pytest tests/test_additive_attention.py
#pragma once

#include "cuda/reduce.cuh"
#include "cuda/vector.cuh"

namespace fastdl::cuda {

constexpr int kAdditiveWarps = 4, kAdditiveEach = 4, kAdditiveQueries = kAdditiveWarps * kAdditiveEach;
constexpr int kAdditiveKeys = 32, kAdditiveSlice = 32, kAdditiveThreads = 32 * kAdditiveWarps;
constexpr float kAdditiveInfinity = __builtin_huge_valf();

// Rows [batch][rows][cols] with cols side by side.
template <class T>
struct AdditiveRows {
  const T* data;
  int64_t batch, row;

  __device__ __forceinline__ const T* at(int64_t n, int64_t i) const { return data + n * batch + i * row; }
};

// What a query or key is prepared to: [batch][rows][hidden] each, and the largest |x| of a row [batch][rows].
struct AdditiveExponentials {
  float *e, *less_one, *most;
};

template <class T>
struct Additive {
  AdditiveRows<T> q, k, v;        // v.data null: pointer
  AdditiveExponentials q_e, k_e;  // exp(2x), exp(2x) - 1
  const float* w;                 // [hidden]
  const uint8_t* mask;            // or null
  const int32_t* lens;            // or null
  int64_t mask_batch, mask_query, mask_key, lens_batch, lens_query;
  int64_t batch, queries, keys, hidden, d_v;
  int64_t chunk, chunks;  // keys of a chunk, a multiple of kAdditiveKeys
  // forward
  float* part_state;  // [chunks][2][batch][queries]
  float* part_out;    // [chunks][batch][queries][d_v]
  float* scores;      // pointer: [batch][queries][keys], scores and then log-probabilities
  T* out;             // [batch][queries][d_v]
  float* statistics;  // [2][batch][queries]
  // backward
  AdditiveRows<T> grad, kept_out;   // [batch][queries][d_v]
  AdditiveRows<float> grad_scores;  // pointer: [batch][queries][keys]
  float* row_sums;                  // pointer: [batch][queries], of grad over the keys that are seen
  float *dq_parts, *dk_sum, *dv_sum,
      *dw_parts;  // [chunks][batch][queries][hidden], [batch][keys][hidden], [batch][keys]
                  // [d_v], [chunks][batch][hidden]
  T *dq, *dk, *dv;
  float* dw;
};

template <class T>
__device__ __forceinline__ int64_t additive_length(const Additive<T>& a, int64_t n, int64_t i) {
  return a.lens ? a.lens[n * a.lens_batch + i * a.lens_query] : a.keys;
}

// Whether query i attends to key j.
template <class T>
__device__ __forceinline__ bool additive_seen(const Additive<T>& a, int64_t n, int64_t i, int64_t j) {
  if (i >= a.queries || j >= a.keys || j >= additive_length(a, n, i)) return false;
  return !a.mask || a.mask[n * a.mask_batch + i * a.mask_query + j * a.mask_key];
}

__device__ __forceinline__ float warp_max(float v) {
#pragma unroll
  for (int bits = 16; bits > 0; bits /= 2) v = fmaxf(v, __shfl_xor_sync(kAllLanes, v, bits));
  return v;
}

// A warp a row of q or k.
template <class T>
__global__ void __launch_bounds__(128) additive_attention_prepare(AdditiveRows<T> x, AdditiveExponentials to,
                                                                  int64_t batch, int64_t rows, int64_t hidden) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * 4 + threadIdx.x / 32;
  if (index >= batch * rows) return;  // a whole warp, and no block barrier here
  const T* const from = x.at(index / rows, index % rows);
  float most = 0.0f;
  for (int64_t h = threadIdx.x % 32; h < hidden; h += 32) {
    const float v = to_float(from[h]), size = fabsf(v);
    most = fmaxf(most, size <= 3.0e38f ? size : kAdditiveInfinity);  // NaN counts as infinite
    to.e[index * hidden + h] = expf(2.0f * v);
    to.less_one[index * hidden + h] = expm1f(2.0f * v);
  }
  most = warp_max(most);
  if (threadIdx.x % 32 == 0) to.most[index] = most;
}

template <class T>
__global__ void __launch_bounds__(128) additive_attention_floats(const T* from, float* to, int64_t count) {
  const int64_t at = static_cast<int64_t>(blockIdx.x) * 128 + threadIdx.x;
  if (at < count) to[at] = to_float(from[at]);
}

enum AdditiveWay { kAdditiveRatio, kAdditiveSmall, kAdditiveWide };

__device__ __forceinline__ int additive_way(float q_most, float k_most) {
  if (!(q_most + k_most <= 40.0f)) return kAdditiveWide;
  return k_most <= 0.5f ? kAdditiveSmall : kAdditiveRatio;
}

// q: exp(2q), exp(2q) - 1 or q itself, as the way has it; of the key all three.
template <int Way>
__device__ __forceinline__ float additive_tanh(float q, float k_x, float k_e, float k_less_one) {
  if constexpr (Way == kAdditiveWide) return tanhf(q + k_x);
  const float n = fmaf(q, k_e, Way == kAdditiveSmall ? k_less_one : -1.0f), d = n + 2.0f;
  const float r = __fdividef(1.0f, d), t = n * r;
  return fmaf(fmaf(-d, t, n), r, t);
}

// A slice of hidden units (or of d_v) of the block's queries and a tile of keys.
using AdditiveQuad = Vector<float, 4>;
struct AdditiveShared {
  AdditiveQuad q[3][kAdditiveSlice][kAdditiveWarps];  // q, exp(2q), exp(2q) - 1: [unit][warp].at[query of the warp]
  float k[3][kAdditiveKeys][kAdditiveSlice + 1];
  float w[kAdditiveSlice];
};

template <class T>
__device__ __forceinline__ void additive_load_slice(const Additive<T>& a, AdditiveShared& s, int64_t n, int64_t i0,
                                                    int64_t j0, int64_t h0) {
  const int unit = static_cast<int>(threadIdx.x) % kAdditiveSlice;
  const int64_t h = h0 + unit;
  for (int r = static_cast<int>(threadIdx.x) / kAdditiveSlice; r < kAdditiveKeys; r += kAdditiveWarps) {
    const int64_t j = j0 + r, at = (n * a.keys + j) * a.hidden + h;
    const bool inside = j < a.keys && h < a.hidden;
    s.k[0][r][unit] = inside ? to_float(a.k.at(n, j)[h]) : 0.0f;
    s.k[1][r][unit] = inside ? a.k_e.e[at] : 1.0f;
    s.k[2][r][unit] = inside ? a.k_e.less_one[at] : 0.0f;
  }
  for (int r = static_cast<int>(threadIdx.x) / kAdditiveSlice; r < kAdditiveQueries; r += kAdditiveWarps) {
    const int64_t i = i0 + r, at = (n * a.queries + i) * a.hidden + h;
    const bool inside = i < a.queries && h < a.hidden;
    s.q[0][unit][r / kAdditiveEach].at[r % kAdditiveEach] = inside ? to_float(a.q.at(n, i)[h]) : 0.0f;
    s.q[1][unit][r / kAdditiveEach].at[r % kAdditiveEach] = inside ? a.q_e.e[at] : 1.0f;
    s.q[2][unit][r / kAdditiveEach].at[r % kAdditiveEach] = inside ? a.q_e.less_one[at] : 0.0f;
  }
  if (threadIdx.x < kAdditiveSlice) s.w[unit] = h < a.hidden ? a.w[h] : 0.0f;
}

// Adds a slice to the scores of queries first .. first + N - 1 of the warp and the lane's key.
template <int Way, int N>
__device__ __forceinline__ void additive_slice(const AdditiveShared& s, int warp, int lane, int first,
                                               float (&scores)[kAdditiveEach]) {
  constexpr int kRow = Way == kAdditiveWide ? 0 : Way == kAdditiveRatio ? 1 : 2;
  constexpr int kPiece = 8;
  float slice[kAdditiveEach] = {};  // sums of sums: smaller errors
#pragma unroll
  for (int h0 = 0; h0 < kAdditiveSlice; h0 += kPiece) {
    float piece[kAdditiveEach] = {};
#pragma unroll
    for (int h = h0; h < h0 + kPiece; ++h) {
      const AdditiveQuad q = s.q[kRow][h][warp];
      const float x = Way == kAdditiveWide ? s.k[0][lane][h] : 0.0f, e = Way == kAdditiveWide ? 0.0f : s.k[1][lane][h];
      const float less_one = Way == kAdditiveSmall ? s.k[2][lane][h] : 0.0f;
#pragma unroll
      for (int u = 0; u < kAdditiveEach; ++u)
        if (N == kAdditiveEach || u == first)
          piece[u] = fmaf(s.w[h], additive_tanh<Way>(q.at[u], x, e, less_one), piece[u]);
    }
#pragma unroll
    for (int u = 0; u < kAdditiveEach; ++u) slice[u] += piece[u];
  }
#pragma unroll
  for (int u = 0; u < kAdditiveEach; ++u) scores[u] += slice[u];
}

template <int N>
__device__ __forceinline__ void additive_slice_way(int way, const AdditiveShared& s, int warp, int lane, int first,
                                                   float (&scores)[kAdditiveEach]) {
  if (way == kAdditiveRatio)
    additive_slice<kAdditiveRatio, N>(s, warp, lane, first, scores);
  else if (way == kAdditiveSmall)
    additive_slice<kAdditiveSmall, N>(s, warp, lane, first, scores);
  else
    additive_slice<kAdditiveWide, N>(s, warp, lane, first, scores);
}

// Scores of the warp's four queries and the lane's key, masked ones too. The whole block calls it; it begins and ends with
// a barrier. ways: those of the warp's queries.
template <class T>
__device__ __forceinline__ void additive_scores(const Additive<T>& a, AdditiveShared& s, int64_t n, int64_t i0,
                                                int64_t j0, int (&ways)[kAdditiveEach],
                                                float (&scores)[kAdditiveEach]) {
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const float mine = j0 + lane < a.keys ? a.k_e.most[n * a.keys + j0 + lane] : 0.0f;
  bool same = true;
#pragma unroll
  for (int u = 0; u < kAdditiveEach; ++u) {
    const int64_t i = i0 + warp * kAdditiveEach + u;
    const float k_most = warp_max(additive_seen(a, n, i, j0 + lane) ? mine : 0.0f);
    ways[u] = i < a.queries ? additive_way(a.q_e.most[n * a.queries + i], k_most) : ways[0];
    same = same && ways[u] == ways[0];
    scores[u] = 0.0f;
  }
  if (i0 + warp * kAdditiveEach >= a.queries) same = true;
  for (int64_t h0 = 0; h0 < a.hidden; h0 += kAdditiveSlice) {
    __syncthreads();
    additive_load_slice(a, s, n, i0, j0, h0);
    __syncthreads();
    if (same)
      additive_slice_way<kAdditiveEach>(ways[0], s, warp, lane, 0, scores);
    else
#pragma unroll
      for (int u = 0; u < kAdditiveEach; ++u) additive_slice_way<1>(ways[u], s, warp, lane, u, scores);
  }
  __syncthreads();
}

// Grid (blocks of 16 queries, chunks, batch).
template <class T>
__global__ void __launch_bounds__(kAdditiveThreads) additive_attention_forward_tiles(const Additive<T> a) {
  FASTDL_SHARED(AdditiveShared, s, [1]);
  FASTDL_SHARED(float, weights, [kAdditiveQueries][kAdditiveKeys]);
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int64_t n = blockIdx.z, i0 = static_cast<int64_t>(blockIdx.x) * kAdditiveQueries,
                mine = i0 + warp * kAdditiveEach;
  const int64_t begin = blockIdx.y * a.chunk, end = begin + a.chunk < a.keys ? begin + a.chunk : a.keys;
  // Lengths of whole sequences end the walk early.
  const int64_t limit = a.lens && a.lens_query == 0 && additive_length(a, n, 0) < end ? additive_length(a, n, 0) : end;
  float most[kAdditiveEach], sum[kAdditiveEach];
#pragma unroll
  for (int u = 0; u < kAdditiveEach; ++u) {
    most[u] = -kAdditiveInfinity;
    sum[u] = 0.0f;
  }
  float* const outs = a.part_out + ((blockIdx.y * a.batch + n) * a.queries + mine) * a.d_v;  // [4][d_v]
  for (int64_t j0 = begin; j0 < end; j0 += kAdditiveKeys) {
    float scores[kAdditiveEach], scale[kAdditiveEach];
    int ways[kAdditiveEach] = {};
    const bool inside = j0 < limit;
    if (inside) additive_scores(a, s[0], n, i0, j0, ways, scores);
#pragma unroll
    for (int u = 0; u < kAdditiveEach; ++u) {
      const int64_t i = mine + u, j = j0 + lane;
      if (!inside || !additive_seen(a, n, i, j)) scores[u] = -kAdditiveInfinity;
      if (a.scores && i < a.queries && j < a.keys) a.scores[(n * a.queries + i) * a.keys + j] = scores[u];
      const float larger = fmaxf(most[u], warp_max(scores[u]));
      const float p = scores[u] == -kAdditiveInfinity ? 0.0f : expf(scores[u] - larger);
      scale[u] = most[u] == -kAdditiveInfinity ? 0.0f : expf(most[u] - larger);
      sum[u] = sum[u] * scale[u] + warp_sum(p);
      most[u] = larger;
      weights[warp * kAdditiveEach + u][lane] = p;
    }
    if (!a.v.data || (!inside && j0 > begin)) continue;  // alike in the whole block
    __syncwarp();
    const int count = static_cast<int>(end - j0 < kAdditiveKeys ? end - j0 : kAdditiveKeys);
    for (int64_t d = lane; d < a.d_v; d += 32) {
      float total[kAdditiveEach] = {};
      for (int j = 0; inside && j < count; ++j) {
        const float v = to_float(a.v.at(n, j0 + j)[d]);
#pragma unroll
        for (int u = 0; u < kAdditiveEach; ++u) {
          const float p = weights[warp * kAdditiveEach + u][j];
          total[u] = p != 0.0f ? fmaf(p, v, total[u]) : total[u];  // what is masked may be NaN
        }
      }
#pragma unroll
      for (int u = 0; u < kAdditiveEach; ++u)
        if (mine + u < a.queries) {
          float* const to = outs + u * a.d_v + d;
          *to = j0 == begin ? total[u] : fmaf(*to, scale[u], total[u]);
        }
    }
    __syncwarp();
  }
  if (lane != 0) return;
#pragma unroll
  for (int u = 0; u < kAdditiveEach; ++u)
    if (mine + u < a.queries) {
      float* const state = a.part_state + blockIdx.y * 2 * a.batch * a.queries + n * a.queries + mine + u;
      state[0] = most[u];
      state[a.batch * a.queries] = sum[u];
    }
}

// The chunks of a row together; a warp a row.
template <class T>
__global__ void __launch_bounds__(128) additive_attention_merge(const Additive<T> a) {
  const int64_t rows = a.batch * a.queries, row = static_cast<int64_t>(blockIdx.x) * 4 + threadIdx.x / 32;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  if (row >= rows) return;  // a whole warp, and no block barrier here
  float most = -kAdditiveInfinity, sum = 0.0f;
  for (int64_t c = 0; c < a.chunks; ++c) most = fmaxf(most, a.part_state[c * 2 * rows + row]);
  for (int64_t c = 0; c < a.chunks; ++c) {
    const float part = a.part_state[c * 2 * rows + row];
    if (part != -kAdditiveInfinity || a.part_state[(c * 2 + 1) * rows + row] != 0.0f)
      sum += a.part_state[(c * 2 + 1) * rows + row] * expf(part - most);
  }
  if (lane == 0) {
    a.statistics[row] = most;
    a.statistics[rows + row] = sum;
  }
  if (a.scores) {
    const float lse = most + logf(sum);
    for (int64_t j = lane; sum != 0.0f && j < a.keys; j += 32) a.scores[row * a.keys + j] -= lse;
    return;
  }
  for (int64_t d = lane; d < a.d_v; d += 32) {
    float total = 0.0f;
    for (int64_t c = 0; c < a.chunks; ++c) {
      const float part = a.part_state[c * 2 * rows + row];
      if (part != -kAdditiveInfinity) total = fmaf(a.part_out[(c * rows + row) * a.d_v + d], expf(part - most), total);
    }
    a.out[row * a.d_v + d] = from_float<T>(sum == 0.0f ? 0.0f : total / sum);  // NaN where the sum is
  }
}

inline dim3 additive_blocks(int64_t count, int each) { return dim3(static_cast<unsigned>((count + each - 1) / each)); }

template <class T>
cudaError_t additive_prepare_launch(const Additive<T>& a, cudaStream_t stream) {
  const cudaError_t error = launch(additive_attention_prepare<T>, additive_blocks(a.batch * a.queries, 4), dim3(128), 0,
                                   stream, a.q, a.q_e, a.batch, a.queries, a.hidden);
  if (error != cudaSuccess || a.keys == 0) return error;
  return launch(additive_attention_prepare<T>, additive_blocks(a.batch * a.keys, 4), dim3(128), 0, stream, a.k, a.k_e,
                a.batch, a.keys, a.hidden);
}

// After additive_prepare_launch.
template <class T>
cudaError_t additive_forward_launch(const Additive<T>& a, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>((a.queries + kAdditiveQueries - 1) / kAdditiveQueries),
                  static_cast<unsigned>(a.chunks), static_cast<unsigned>(a.batch));
  const cudaError_t error = launch(additive_attention_forward_tiles<T>, grid, dim3(kAdditiveThreads), 0, stream, a);
  if (error != cudaSuccess) return error;
  return launch(additive_attention_merge<T>, additive_blocks(a.batch * a.queries, 4), dim3(128), 0, stream, a);
}

}  // namespace fastdl::cuda
