// Additive attention on CUDA, backward (contract: fastdl/ops/additive_attention.py):
//
//   ds_ij = p_ij grad_i . (v_j - out_i)      pointer: grad_ij - p_ij sum_j grad_ij
//   dv_j = sum_i p_ij grad_i,  dq_i = w sum_j ds_ij (1 - t_ij^2),  dk_j = w sum_i ds_ij (1 - t_ij^2),  dw = sum ds_ij t_ij
//
// Method: a block has one chunk of keys of a sequence and walks over its tiles of 32 keys and, in each, over all queries,
// 16 at a time. First the scores, as in the forward, with a key a lane; then p and ds in shared memory; then tanh again,
// with a hidden unit a thread, which adds up dk and dw without crossing lanes and dq of the chunk. So forward and backward
// take three tanh an element; the tile of tanh would not fit in shared memory beside enough blocks. dk and dv of the
// chunk are this block's alone; dq and dw are summed over chunks, in order, by additive_attention_finish.
//
// Test: pytest tests/test_additive_attention.py
#pragma once

#include "cuda/additive_attention.cuh"

namespace fastdl::cuda {

struct AdditiveBackwardShared {
  AdditiveShared slice;
  AdditiveQuad p[kAdditiveKeys][kAdditiveWarps];  // [key][warp].at[query of the warp]
  AdditiveQuad ds[kAdditiveKeys][kAdditiveWarps];
  int used[kAdditiveWarps][kAdditiveKeys];  // whether a query of the warp attends to the key
  int ways[kAdditiveQueries];
};

// dp += grad_i . (v_j - out_i) for the warp's queries and the lane's key. The whole block calls it; ends with a barrier.
template <class T>
__device__ __forceinline__ void additive_products(const Additive<T>& a, AdditiveShared& s, int64_t n, int64_t i0,
                                                  int64_t j0, float (&dp)[kAdditiveEach]) {
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  for (int64_t d0 = 0; d0 < a.d_v; d0 += kAdditiveSlice) {
    const int unit = static_cast<int>(threadIdx.x) % kAdditiveSlice;
    const int64_t d = d0 + unit;
    for (int r = static_cast<int>(threadIdx.x) / kAdditiveSlice; r < kAdditiveKeys; r += kAdditiveWarps)
      s.k[0][r][unit] = j0 + r < a.keys && d < a.d_v ? to_float(a.v.at(n, j0 + r)[d]) : 0.0f;
    for (int r = static_cast<int>(threadIdx.x) / kAdditiveSlice; r < kAdditiveQueries; r += kAdditiveWarps) {
      const bool inside = i0 + r < a.queries && d < a.d_v;
      s.q[0][unit][r / kAdditiveEach].at[r % kAdditiveEach] = inside ? to_float(a.grad.at(n, i0 + r)[d]) : 0.0f;
      s.q[1][unit][r / kAdditiveEach].at[r % kAdditiveEach] = inside ? to_float(a.kept_out.at(n, i0 + r)[d]) : 0.0f;
    }
    __syncthreads();
#pragma unroll 8
    for (int h = 0; h < kAdditiveSlice; ++h) {
      const AdditiveQuad grad = s.q[0][h][warp], out = s.q[1][h][warp];
      const float v = s.k[0][lane][h];
#pragma unroll
      for (int u = 0; u < kAdditiveEach; ++u) dp[u] = fmaf(grad.at[u], v - out.at[u], dp[u]);
    }
    __syncthreads();
  }
}

// p and ds of the block's queries and a tile to shared memory. The whole block calls it; ends with a barrier.
template <class T>
__device__ __forceinline__ void additive_weights(const Additive<T>& a, AdditiveBackwardShared& s, int64_t n, int64_t i0,
                                                 int64_t j0) {
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  float scores[kAdditiveEach], dp[kAdditiveEach] = {};
  int ways[kAdditiveEach] = {};
  additive_scores(a, s.slice, n, i0, j0, ways, scores);
  if (a.v.data) additive_products(a, s.slice, n, i0, j0, dp);
  AdditiveQuad weights, slopes;
  int used = 0;
#pragma unroll
  for (int u = 0; u < kAdditiveEach; ++u) {
    const int64_t i = i0 + warp * kAdditiveEach + u, row = n * a.queries + i, j = j0 + lane;
    weights.at[u] = slopes.at[u] = 0.0f;
    const float sum = i < a.queries ? a.statistics[a.batch * a.queries + row] : 0.0f;
    if (sum != 0.0f && additive_seen(a, n, i, j)) {
      used = 1;
      const float p = expf(scores[u] - a.statistics[row]) / sum;
      weights.at[u] = p;
      slopes.at[u] = a.v.data ? p * dp[u] : a.grad_scores.at(n, i)[j] - p * a.row_sums[row];
    }
    if (lane == 0) s.ways[warp * kAdditiveEach + u] = ways[u];
  }
  s.p[lane][warp] = weights;
  s.ds[lane][warp] = slopes;
  s.used[warp][lane] = used;
  __syncthreads();
}

__device__ __forceinline__ bool additive_used(const AdditiveBackwardShared& s, int key) {
  return s.used[0][key] || s.used[1][key] || s.used[2][key] || s.used[3][key];
}

// dv_sum of a tile; a thread an element of d_v.
template <class T>
__device__ __forceinline__ void additive_dv(const Additive<T>& a, const AdditiveBackwardShared& s, int64_t n,
                                            int64_t i0, int64_t j0) {
  for (int64_t d = threadIdx.x; d < a.d_v; d += kAdditiveThreads) {
    float grad[kAdditiveQueries];
#pragma unroll
    for (int r = 0; r < kAdditiveQueries; ++r)
      grad[r] = i0 + r < a.queries && a.statistics[(a.batch + n) * a.queries + i0 + r] != 0.0f
                    ? to_float(a.grad.at(n, i0 + r)[d])
                    : 0.0f;
    for (int j = 0; j < kAdditiveKeys; ++j) {
      if (!additive_used(s, j)) continue;
      float sum = 0.0f;
#pragma unroll
      for (int r = 0; r < kAdditiveQueries; ++r)
        sum = fmaf(s.p[j][r / kAdditiveEach].at[r % kAdditiveEach], grad[r], sum);
      a.dv_sum[(n * a.keys + j0 + j) * a.d_v + d] += sum;
    }
  }
}

// dk_sum, dq and dw of the chunk; a thread a hidden unit. Way: of all queries of the block, or kMixed.
constexpr int kAdditiveMixed = 3;

template <int Way, class T>
__device__ __forceinline__ void additive_derivative(const Additive<T>& a, const AdditiveBackwardShared& s, int64_t n,
                                                    int64_t i0, int64_t j0, float* dq_part, float* dw_part) {
  for (int64_t h = threadIdx.x; h < a.hidden; h += kAdditiveThreads) {
    float q[kAdditiveQueries], dq[kAdditiveQueries], dw = 0.0f;
#pragma unroll
    for (int r = 0; r < kAdditiveQueries; ++r) {
      const int64_t at = (n * a.queries + i0 + r) * a.hidden + h;
      const int way = Way == kAdditiveMixed ? s.ways[r] : Way;
      q[r] = i0 + r >= a.queries     ? 0.0f
             : way == kAdditiveRatio ? a.q_e.e[at]
             : way == kAdditiveSmall ? a.q_e.less_one[at]
                                     : to_float(a.q.at(n, i0 + r)[h]);
      dq[r] = 0.0f;
    }
    for (int j = 0; j < kAdditiveKeys; ++j) {
      if (!additive_used(s, j)) continue;  // alike in the whole block
      const int64_t at = (n * a.keys + j0 + j) * a.hidden + h;
      const float x = Way >= kAdditiveWide ? to_float(a.k.at(n, j0 + j)[h]) : 0.0f;
      const float e = Way == kAdditiveWide ? 0.0f : a.k_e.e[at];
      const float less_one = Way == kAdditiveSmall || Way == kAdditiveMixed ? a.k_e.less_one[at] : 0.0f;
      float dk = 0.0f;
#pragma unroll
      for (int r = 0; r < kAdditiveQueries; ++r) {
        const float ds = s.ds[j][r / kAdditiveEach].at[r % kAdditiveEach];
        float t;
        if constexpr (Way == kAdditiveMixed) {
          t = s.ways[r] == kAdditiveRatio   ? additive_tanh<kAdditiveRatio>(q[r], x, e, less_one)
              : s.ways[r] == kAdditiveSmall ? additive_tanh<kAdditiveSmall>(q[r], x, e, less_one)
                                            : additive_tanh<kAdditiveWide>(q[r], x, e, less_one);
        } else {
          t = additive_tanh<Way>(q[r], x, e, less_one);
        }
        const float slope = fmaf(-t, t, 1.0f);
        dq[r] = fmaf(ds, slope, dq[r]);
        dk = fmaf(ds, slope, dk);
        dw = fmaf(ds, t, dw);
      }
      a.dk_sum[at] += dk;
    }
#pragma unroll
    for (int r = 0; r < kAdditiveQueries; ++r)
      if (i0 + r < a.queries) dq_part[(i0 + r) * a.hidden + h] += dq[r];
    dw_part[h] += dw;
  }
}

// Grid (chunks, batch).
template <class T>
__global__ void __launch_bounds__(kAdditiveThreads) additive_attention_backward_tiles(const Additive<T> a) {
  FASTDL_SHARED(AdditiveBackwardShared, s, [1]);
  const int64_t n = blockIdx.y, begin = blockIdx.x * a.chunk;
  const int64_t end = begin + a.chunk < a.keys ? begin + a.chunk : a.keys;
  const int64_t limit = a.lens && a.lens_query == 0 && additive_length(a, n, 0) < end ? additive_length(a, n, 0) : end;
  float* const dq_part = a.dq_parts + (blockIdx.x * a.batch + n) * a.queries * a.hidden;
  float* const dw_part = a.dw_parts + (blockIdx.x * a.batch + n) * a.hidden;
  // Each thread clears what it alone adds to.
  for (int64_t h = threadIdx.x; h < a.hidden; h += kAdditiveThreads) {
    for (int64_t i = 0; i < a.queries; ++i) dq_part[i * a.hidden + h] = 0.0f;
    for (int64_t j = begin; j < end; ++j) a.dk_sum[(n * a.keys + j) * a.hidden + h] = 0.0f;
    dw_part[h] = 0.0f;
  }
  for (int64_t d = threadIdx.x; d < a.d_v; d += kAdditiveThreads)
    for (int64_t j = begin; j < end; ++j) a.dv_sum[(n * a.keys + j) * a.d_v + d] = 0.0f;
  for (int64_t j0 = begin; j0 < limit; j0 += kAdditiveKeys) {
    for (int64_t i0 = 0; i0 < a.queries; i0 += kAdditiveQueries) {
      __syncthreads();  // the tile before is done with shared memory
      additive_weights(a, s[0], n, i0, j0);
      if (a.v.data) additive_dv(a, s[0], n, i0, j0);
      int way = s[0].ways[0];
      for (int r = 1; r < kAdditiveQueries; ++r)
        if (i0 + r < a.queries && s[0].ways[r] != way) way = kAdditiveMixed;
      if (way == kAdditiveRatio)
        additive_derivative<kAdditiveRatio>(a, s[0], n, i0, j0, dq_part, dw_part);
      else if (way == kAdditiveSmall)
        additive_derivative<kAdditiveSmall>(a, s[0], n, i0, j0, dq_part, dw_part);
      else if (way == kAdditiveWide)
        additive_derivative<kAdditiveWide>(a, s[0], n, i0, j0, dq_part, dw_part);
      else
        additive_derivative<kAdditiveMixed>(a, s[0], n, i0, j0, dq_part, dw_part);
    }
  }
}

// row_sums of the pointer's gradient; a warp a row.
template <class T>
__global__ void __launch_bounds__(128) additive_attention_row_sums(const Additive<T> a) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * 4 + threadIdx.x / 32, n = row / a.queries, i = row % a.queries;
  if (row >= a.batch * a.queries) return;  // a whole warp, and no block barrier here
  float sum = 0.0f;
  for (int64_t j = threadIdx.x % 32; j < a.keys; j += 32)
    if (additive_seen(a, n, i, j)) sum += a.grad_scores.at(n, i)[j];
  sum = warp_sum(sum);
  if (threadIdx.x % 32 == 0) a.row_sums[row] = sum;
}

// to [rows][cols] = w * the sum over parts [parts][rows][cols], in order; w null: 1.
template <class T>
__global__ void __launch_bounds__(128)
    additive_attention_finish(const float* parts, const float* w, int64_t count, int64_t rows, int64_t cols, T* to) {
  const int64_t at = static_cast<int64_t>(blockIdx.x) * 128 + threadIdx.x;
  if (at >= rows * cols) return;
  float sum = parts[at];
  for (int64_t part = 1; part < count; ++part) sum += parts[part * rows * cols + at];
  to[at] = from_float<T>(w ? w[at % cols] * sum : sum);
}

// After additive_prepare_launch; keys and queries above 0.
template <class T>
cudaError_t additive_backward_launch(const Additive<T>& a, cudaStream_t stream) {
  const dim3 threads(128);
  cudaError_t error = cudaSuccess;
  if (!a.v.data)
    error = launch(additive_attention_row_sums<T>, additive_blocks(a.batch * a.queries, 4), threads, 0, stream, a);
  if (error != cudaSuccess) return error;
  const dim3 grid(static_cast<unsigned>(a.chunks), static_cast<unsigned>(a.batch));
  error = launch(additive_attention_backward_tiles<T>, grid, dim3(kAdditiveThreads), 0, stream, a);
  if (error != cudaSuccess) return error;
  const auto finish = [&](const float* parts, const float* w, int64_t count, int64_t rows, int64_t cols, auto* to) {
    using To = std::remove_pointer_t<decltype(to)>;
    if (error == cudaSuccess)
      error = launch(additive_attention_finish<To>, additive_blocks(rows * cols, 128), threads, 0, stream, parts, w,
                     count, rows, cols, to);
  };
  finish(a.dq_parts, a.w, a.chunks, a.batch * a.queries, a.hidden, a.dq);
  finish(a.dk_sum, a.w, 1, a.batch * a.keys, a.hidden, a.dk);
  if (a.v.data) finish(a.dv_sum, nullptr, 1, a.batch * a.keys, a.d_v, a.dv);
  finish(a.dw_parts, nullptr, a.chunks * a.batch, 1, a.hidden, a.dw);
  return error;
}

}  // namespace fastdl::cuda
