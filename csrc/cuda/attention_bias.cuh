// The gradient of attention's bias, float32: ds summed over the dimensions along which the bias was broadcast.
//
// A block owns a tile of dbias, or of the queries or keys whose sum is one element of it, and walks in order over the batch,
// heads, queries and keys that share it: no matrix of queries by keys, no atomics. Scores are computed again.
#pragma once

#include "cuda/attention_gradient.cuh"

namespace fastdl::cuda {

template <class T, int D>
__global__ void __launch_bounds__(kAttentionWarps * 32, 1) attention_backward_bias(const AttentionBackward<T> a) {
  using Tile = BackwardTile<T, D, true>;
  constexpr int R = Tile::kGroups, N = Tile::kStream;
  FASTDL_DYNAMIC_SHARED(T, q_tile);
  FASTDL_SHARED(AttentionPlace, places, [1]);
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int threads = static_cast<int>(blockDim.x), rows = threads / 2 * R, mine = 16 * R * warp;
  T* grad_tile = q_tile + rows * Tile::kPitch;
  T* k_tile = grad_tile + rows * Tile::kPitch;
  T* v_tile = k_tile + N * Tile::kPitch;

  const AttentionScores& s = a.scores;
  const int tiles_q = (s.n_q + rows - 1) / rows, tiles_k = (s.n_k + N - 1) / N;
  // This block's share of batch, heads, tiles of queries and of keys.
  const int count[4] = {s.batch, s.heads, tiles_q, tiles_k};
  int from[4], to[4];
  unsigned index = blockIdx.x;
#pragma unroll
  for (int d = 3; d >= 0; --d) {
    const unsigned size = a.whole[d] ? static_cast<unsigned>(count[d]) : 1u;
    from[d] = a.whole[d] ? static_cast<int>(index % size) : 0;
    to[d] = a.whole[d] ? from[d] + 1 : count[d];
    index /= size;
  }
  const AttentionPlace& place = places[0];
  const float unit = s.scale * kLog2e;
  Sums<R, N> sums;
  sums.clear();
#pragma unroll 1
  for (int plane = from[0] * s.heads; plane < to[0] * s.heads; ++plane) {
    const int b = plane / s.heads, h = plane % s.heads, kv_head = h / (s.heads / s.kv_heads);
    if (h < from[1] || h >= to[1]) continue;
#pragma unroll 1
    for (int tile = from[2]; tile < to[2]; ++tile) {
      __syncthreads();
      if (threadIdx.x == 0) places[0] = attention_place(s, true, plane, s.heads, tile, rows);
      __syncthreads();
      const BlockKeys& keys = block_keys(s, place, place.first, rows);
      load_tile<D>(q_tile, a.q, a.q.at(b, h, 0), rows, place.first, s.n_q);
      load_tile<D>(grad_tile, a.grad, a.grad.at(b, h, 0), rows, place.first, s.n_q);
      const GeneralScore<T> score(s, place, h);
#pragma unroll 1
      for (int key = from[3] * N; key < to[3] * N; key += N) {
        if (key + N <= keys.low || key >= keys.high) continue;
        __syncthreads();
        load_tile<D>(k_tile, a.k, a.k.at(b, kv_head, 0), N, key, keys.high);
        load_tile<D>(v_tile, a.v, a.v.at(b, kv_head, 0), N, key, keys.high);
        ptx::cp_async_commit();
        ptx::cp_async_wait<0>();
        __syncthreads();
        Sums<R, N> p, dp;
        p.clear();
        dp.clear();
        rows_by_rows<D>(p, q_tile + mine * Tile::kPitch, k_tile);
        rows_by_rows<D>(dp, grad_tile + mine * Tile::kPitch, v_tile);
        GradientRow row_of[R][2];
#pragma unroll
        for (int r = 0; r < R; ++r)
#pragma unroll
          for (int i = 0; i < 2; ++i)
            row_of[r][i] = gradient_row(a, place, h, place.first + mine + 16 * r + lane / 4 + 8 * i);
        p.for_each([&](int r, int n, int e, int row, int column) {
          differentiate<true, false>(p.at[r][n][e], dp.at[r][n][e], row_of[r][e / 2], score, unit,
                                     place.first + mine + row, key + column);
          sums.at[r][n][e] += dp.at[r][n][e];
        });
      }
      ptx::cp_async_commit();
      ptx::cp_async_wait<0>();  // q and grad, where no key was seen
    }
  }

  // The tile goes to shared memory, where its rows and columns are summed in order.
  __syncthreads();
  float* tile = reinterpret_cast<float*>(q_tile);
  sums.for_each([&](int r, int n, int e, int row, int column) { tile[(mine + row) * N + column] = sums.at[r][n][e]; });
  __syncthreads();
  const int row_count = a.whole[2] ? min(rows, s.n_q - from[2] * rows) : 1;
  const int column_count = a.whole[3] ? min(N, s.n_k - from[3] * N) : 1;
  const int64_t heads = a.whole[1] ? s.heads : 1, n_q = a.whole[2] ? s.n_q : 1, n_k = a.whole[3] ? s.n_k : 1;
  float* dbias = a.dbias + ((from[0] * heads + from[1]) * n_q + from[2] * rows) * n_k + from[3] * N;
  for (int i = static_cast<int>(threadIdx.x); i < row_count * column_count; i += threads) {
    const int row = i / column_count, column = i % column_count;
    float sum = 0.0f;
    for (int r = row; r < (a.whole[2] ? row + 1 : rows); ++r)
      for (int c = column; c < (a.whole[3] ? column + 1 : N); ++c) sum += tile[r * N + c];
    dbias[row * n_k + column] = sum;
  }
}

// After attention_backward_launch.
template <class T>
cudaError_t attention_bias_launch(const AttentionBackward<T>& a, cudaStream_t stream) {
  return for_head_dim(a.q.width, a.v.width, [&](auto columns) {
    constexpr int D = decltype(columns)::value;
    using Tile = BackwardTile<T, D, true>;
    const AttentionScores& s = a.scores;
    const int warps = attention_warps<Tile>(s, s.n_q), rows = 16 * Tile::kGroups * warps;
    const int64_t count[4] = {s.batch, s.heads, (s.n_q + rows - 1) / rows, (s.n_k + Tile::kStream - 1) / Tile::kStream};
    int64_t blocks = 1;
    for (int d = 0; d < 4; ++d) blocks *= a.whole[d] ? count[d] : 1;
    check_blocks(blocks);
    if (blocks == 0) return cudaSuccess;
    return launch(attention_backward_bias<T, D>, dim3(static_cast<unsigned>(blocks)), dim3(32 * warps),
                  static_cast<size_t>(Tile::shared(warps)), stream, a);
  });
}

}  // namespace fastdl::cuda
