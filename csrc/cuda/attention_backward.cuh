// dq, dk and dv of room attention, for the weights P = exp(s - lse), D dropout's factor:
//
//   dP = D (grad v^T)    ds = P (dP - delta)    dq = scale ds k    dk = scale ds^T q    dv = (D P)^T grad
//
// Scores and dP of a tile are computed again, in two kernels without atomics: in one a block keeps keys, the queries of all
// heads of the group stream by in order, and dk and dv stay in registers; in the other a block keeps queries and dq while
// the keys stream by. The first holds scores transposed, [keys][queries], so that both feed weights and ds from registers
// into the next product. delta = grad . out - grad_lse comes from a kernel of its own, dbias too (attention_bias.cuh).
//
// Dao et al. (2022), Dao (2023).  Test: tests/test_attention.py.
#pragma once

#include "cuda/attention_gradient.cuh"

namespace fastdl::cuda {

// Tiles of queries of each head, from a first one on, and of all heads of the group.
struct QuerySpan {
  int begin, tiles, steps;
};

// A block: keys of a kv head; part: which kColumns of dk and dv.
template <class T, int D, bool General>
__global__ void __launch_bounds__(kAttentionWarps * 32, 1) attention_backward_keys(const AttentionBackward<T> a) {
  using Tile = BackwardTile<T, D, General>;
  constexpr int R = Tile::kGroups, C = Tile::kColumns, kStages = Tile::kStages;
  constexpr int N = kCopiesInRegisters && R == 2 && D == 64 ? 16 : Tile::kStream;
  FASTDL_DYNAMIC_SHARED(T, q_tiles);
  FASTDL_SHARED(GradientRow, stats, [kStages][N]);
  FASTDL_SHARED(QuerySpan, spans, [1]);
  const int warp = static_cast<int>(threadIdx.x) / 32, rows = static_cast<int>(blockDim.x) / 2 * R;
  T* grad_tiles =
      q_tiles + kStages * N * Tile::kPitch;  // what passes comes first: its places are known when this is compiled
  T* k_tile = grad_tiles + kStages * N * Tile::kPitch;
  T* v_tile = k_tile + rows * Tile::kPitch;

  const AttentionScores& s = a.scores;
  const unsigned parts = C == D ? 1u : static_cast<unsigned>(a.parts);
  const int part = static_cast<int>(blockIdx.x % parts);
  const AttentionPlace& place = block_place(s, false, blockIdx.x / parts, a.slots, rows);
  if (!place.any) return;  // the whole block
  load_tile<D>(k_tile, a.k, a.k.at(place.batch, place.head, place.k0), rows, place.first, place.n_k);
  load_tile<D>(v_tile, a.v, a.v.at(place.batch, place.head, place.k0), rows, place.first, place.n_k);
  ptx::cp_async_commit();

  if (threadIdx.x == 0) {  // the queries that can see one of these keys
    const int shift = place.n_k - place.n_q;
    int begin = 0, end = place.n_q;
    if (s.right >= 0) begin = max(begin, place.first - s.right - shift);
    if (s.left >= 0) end = min(end, place.first + rows + s.left - shift);
    if (s.lens && !s.lens_of_rows && place.first >= s.lens[place.batch]) end = 0;
    begin = begin / N * N;
    const int tiles = begin < end ? (end - begin + N - 1) / N : 0;
    spans[0] = {begin, tiles, s.heads / s.kv_heads * tiles};
  }
  __syncthreads();
  const QuerySpan& span = spans[0];
  const auto head_of = [&](int step) { return place.head * (s.heads / s.kv_heads) + step / span.tiles; };
  const auto load_queries = [&](int step) {
    const int head = head_of(step), query = span.begin + step % span.tiles * N;
    const int stage = step % kStages;
    T* to = q_tiles + stage * N * Tile::kPitch;
    load_tile<D>(to, a.q, a.q.at(place.batch, head, place.q0), N, query, place.n_q);
    to = grad_tiles + stage * N * Tile::kPitch;
    load_tile<D>(to, a.grad, a.grad.at(place.batch, head, place.q0), N, query, place.n_q);
    const int row = static_cast<int>(threadIdx.x);  // blocks have at least N threads
    if (row < N) stats[stage][row] = gradient_row(a, place, head, query + row);
    ptx::cp_async_commit();
  };
  if (span.steps > 0) load_queries(0);

  const int mine = 16 * R * warp;
  const float unit = s.scale * kLog2e;
  Sums<R, C> dk, dv;
  dk.clear();
  dv.clear();
#pragma unroll 1
  for (int step = 0; step < span.steps; ++step) {
    const int stage = step % kStages;
    const T* q = q_tiles + stage * N * Tile::kPitch;
    const T* grad = grad_tiles + stage * N * Tile::kPitch;
    ptx::cp_async_wait<0>();
    __syncthreads();  // the tiles of this step are here, and nobody reads those of the last one any more
    if (kStages == 2 && step + 1 < span.steps) load_queries(step + 1);
    Sums<R, N> p, dp;
    p.clear();
    dp.clear();
    rows_by_rows<D>(p, k_tile + mine * Tile::kPitch, q);
    rows_by_rows<D>(dp, v_tile + mine * Tile::kPitch, grad);
    const int query = span.begin + step % span.tiles * N;
    const GeneralScore<T> score(s, place, head_of(step));
    p.for_each([&](int r, int n, int e, int row, int column) {
      differentiate<General, true>(p.at[r][n][e], dp.at[r][n][e], stats[stage][column], score, unit, query + column,
                                   place.first + mine + row);
    });
    weights_by_rows<D>(dv, p, grad + part * C);
    weights_by_rows<D>(dk, dp, q + part * C);
    if (kStages == 1) {
      __syncthreads();
      if (step + 1 < span.steps) load_queries(step + 1);
    }
  }
  ptx::cp_async_wait<0>();  // k and v, of a block that no query sees
  __syncthreads();
  T* tile = k_tile + mine * Tile::kPitch;
  store_rows(
      tile, dk, [&](int, int) { return s.scale; }, a.dk, a.dk.at(place.batch, place.head, place.k0), place.first + mine,
      place.n_k, part * C);
  store_rows(
      tile, dv, [](int, int) { return 1.0f; }, a.dv, a.dv.at(place.batch, place.head, place.k0), place.first + mine,
      place.n_k, part * C);
}

// A block: queries of a head.
template <class T, int D, bool General>
__global__ void __launch_bounds__(kAttentionWarps * 32, 1) attention_backward_queries(const AttentionBackward<T> a) {
  using Tile = BackwardTile<T, D, General>;
  constexpr int R = Tile::kGroups, N = Tile::kStream, kStages = Tile::kStages;
  FASTDL_DYNAMIC_SHARED(T, q_tile);
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int rows = static_cast<int>(blockDim.x) / 2 * R;
  T* grad_tile = q_tile + rows * Tile::kPitch;
  T* k_tiles = grad_tile + rows * Tile::kPitch;
  T* v_tiles = k_tiles + kStages * N * Tile::kPitch;

  const AttentionScores& s = a.scores;
  const AttentionPlace& place = block_place(s, true, blockIdx.x, a.slots, rows);
  if (!place.any) return;  // the whole block
  const BlockKeys& keys = block_keys(s, place, place.first, rows);
  load_tile<D>(q_tile, a.q, a.q.at(place.batch, place.head, place.q0), rows, place.first, place.n_q);
  load_tile<D>(grad_tile, a.grad, a.grad.at(place.batch, place.head, place.q0), rows, place.first, place.n_q);
  const auto load_keys = [&](int key) {
    const int kv_head = place.head / (s.heads / s.kv_heads), stage = key / N % kStages;
    T* to = k_tiles + stage * N * Tile::kPitch;
    load_tile<D>(to, a.k, a.k.at(place.batch, kv_head, place.k0), N, key, keys.high);
    to = v_tiles + stage * N * Tile::kPitch;
    load_tile<D>(to, a.v, a.v.at(place.batch, kv_head, place.k0), N, key, keys.high);
    ptx::cp_async_commit();
  };
  const int begin = keys.low < keys.high ? keys.low / N * N : keys.high;
  load_keys(begin);

  const int mine = 16 * R * warp;
  const GeneralScore<T> score(s, place, place.head);
  const float unit = s.scale * kLog2e;
  GradientRow row_of[R][2];
#pragma unroll
  for (int r = 0; r < R; ++r)
#pragma unroll
    for (int i = 0; i < 2; ++i)
      row_of[r][i] = gradient_row(a, place, place.head, place.first + mine + 16 * r + lane / 4 + 8 * i);
  Sums<R, D> dq;
  dq.clear();
#pragma unroll 1
  for (int key = begin; key < keys.high; key += N) {
    const int stage = key / N % kStages;
    const T* k = k_tiles + stage * N * Tile::kPitch;
    const T* v = v_tiles + stage * N * Tile::kPitch;
    ptx::cp_async_wait<0>();
    __syncthreads();  // the tiles of this step are here, and nobody reads those of the last one any more
    if (kStages == 2 && key + N < keys.high) load_keys(key + N);
    Sums<R, N> p, dp;
    p.clear();
    dp.clear();
    rows_by_rows<D>(p, q_tile + mine * Tile::kPitch, k);
    rows_by_rows<D>(dp, grad_tile + mine * Tile::kPitch, v);
    p.for_each([&](int r, int n, int e, int row, int column) {
      differentiate<General, true>(p.at[r][n][e], dp.at[r][n][e], row_of[r][e / 2], score, unit,
                                   place.first + mine + row, key + column);
    });
    weights_by_rows<D>(dq, dp, k);
    if (kStages == 1) {
      __syncthreads();
      if (key + N < keys.high) load_keys(key + N);
    }
  }
  ptx::cp_async_wait<0>();
  __syncthreads();
  store_rows(
      q_tile + mine * Tile::kPitch, dq, [&](int, int) { return s.scale; }, a.dq,
      a.dq.at(place.batch, place.head, place.q0), place.first + mine, place.n_q, 0);
}

template <class T, int D, bool General>
cudaError_t attention_backward_launch(AttentionBackward<T> a, cudaStream_t stream) {
  using Tile = BackwardTile<T, D, General>;
  const AttentionScores& s = a.scores;
  int warps = attention_warps<Tile>(s, s.n_k);
  a.slots = static_cast<int>(attention_slots(s, s.n_k, 16 * Tile::kGroups * warps));
  a.parts = (std::max(a.q.width, a.v.width) + Tile::kColumns - 1) / Tile::kColumns;
  int64_t blocks = static_cast<int64_t>(a.slots) * a.parts * s.kv_heads * s.batch;
  check_blocks(blocks);
  if (blocks > 0)
    if (const cudaError_t error = launch(attention_backward_keys<T, D, General>, dim3(static_cast<unsigned>(blocks)),
                                         dim3(32 * warps), static_cast<size_t>(Tile::shared(warps)), stream, a);
        error != cudaSuccess)
      return error;
  warps = attention_warps<Tile>(s, s.n_q);
  a.slots = static_cast<int>(attention_slots(s, s.n_q, 16 * Tile::kGroups * warps));
  blocks = static_cast<int64_t>(a.slots) * s.heads * s.batch;
  check_blocks(blocks);
  if (blocks == 0) return cudaSuccess;
  return launch(attention_backward_queries<T, D, General>, dim3(static_cast<unsigned>(blocks)), dim3(32 * warps),
                static_cast<size_t>(Tile::shared(warps)), stream, a);
}

// dq, dk and dv; origin and delta for the kernel of dbias.
template <class T>
cudaError_t attention_backward_launch(const AttentionBackward<T>& a, cudaStream_t stream) {
  const AttentionScores& s = a.scores;
  const int64_t rows = static_cast<int64_t>(s.batch) * s.heads * s.n_q;
  check_blocks((rows + 7) / 8);
  if (rows > 0)
    if (const cudaError_t error =
            launch(attention_backward_rows<T>, dim3(static_cast<unsigned>((rows + 7) / 8)), dim3(256), 0, stream, a);
        error != cudaSuccess)
      return error;
  return for_head_dim(a.q.width, a.v.width, [&](auto columns) {
    constexpr int D = decltype(columns)::value;
    return s.general ? attention_backward_launch<T, D, true>(a, stream)
                     : attention_backward_launch<T, D, false>(a, stream);
  });
}

}  // namespace fastdl::cuda
