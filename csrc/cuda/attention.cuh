// O = dropout(softmax(s)) v and lse, for s = scale q k^T and what may change it: the forward pass of room attention.
//
// A block takes 16 R queries of a head per warp and streams the keys past them: K of a tile arrives (cp.async) while the
// weights of the tile before multiply V, and V while the scores are computed. A row's greatest score, its sum of
// exponentials and O stay in registers (online softmax); the weights are the left operand of the product with V as they
// lie in registers. Tiles of keys begin at multiples of their length and those that no query of the block sees are not
// read, so that a row's result depends on nothing but the row.
//
// `Plain` kernels know causal, window and lens; `General` ones also bias, mask, softcap, ALiBi and dropout.
//
// Milakov and Gimelshein (2018), Dao et al. (2022), Dao (2023).  Test: tests/test_attention.py; benchmark:
// bench/attention_gpu.py. Contract: fastdl/ops/attention.py.
#pragma once

#include <stdexcept>
#include <type_traits>

#include "cuda/attention_scores.cuh"

namespace fastdl::cuda {

template <class T>
struct AttentionForward {
  AttentionRows<const T> q, k, v;  // [B, H, n_q, D], [B, G, n_k, D], [B, G, n_k, D_v]
  AttentionRows<T> out;            // [B, H, n_q, D_v]
  float* lse;                      // [B, H, n_q]
  AttentionScores scores;
  int slots;  // tiles of queries per head
};

// R: 16 rows a warp, kKeys: keys of a tile. More rows a warp read K and V from shared memory less often; O [16 R][D] and
// the scores [16 R][kKeys] must fit in 255 registers.
template <class T, int D, bool General>
struct ForwardTile {
  static constexpr bool kHalf = sizeof(T) == 2;
  static constexpr int kGroups = kHalf && D <= 128 && !General ? 2 : 1;
  static constexpr int kKeys = D == 256 ? (kHalf ? 32 : 16) : kHalf && !General ? 64 : 32;
  static constexpr int kPitch = tile_pitch<T>(D);
  static constexpr int64_t shared(int warps) {
    return (16 * kGroups * warps + 2 * kKeys) * kPitch * static_cast<int64_t>(sizeof(T));
  }
};

template <class T, int D, bool General>
__global__ void __launch_bounds__(kAttentionWarps * 32, 1) attention_forward_tile(const AttentionForward<T> a) {
  using Tile = ForwardTile<T, D, General>;
  constexpr int R = Tile::kGroups, N = kCopiesInRegisters && R == 2 && D == 128 ? 32 : Tile::kKeys;
  FASTDL_DYNAMIC_SHARED(T, k_tile);
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int rows = static_cast<int>(blockDim.x) / 2 * R;
  T* v_tile = k_tile + N * Tile::kPitch;
  T* q_tile = v_tile + N * Tile::kPitch;

  const AttentionScores& s = a.scores;
  const AttentionPlace& place = block_place(s, true, blockIdx.x, a.slots, rows);
  if (!place.any) return;  // the whole block
  const BlockKeys& keys = block_keys(s, place, place.first, rows);
  // Addresses are computed again for every tile: kept, they would cost registers that the loop has not.
  const auto load_keys = [&](T* tile, const AttentionRows<const T>& x, int key) {
    const int kv_head = place.head / (s.heads / s.kv_heads);
    load_tile<D>(tile, x, x.at(place.batch, kv_head, place.k0), N, key, keys.high);
    ptx::cp_async_commit();
  };
  const int begin = keys.low < keys.high ? keys.low / N * N : keys.high;
  load_tile<D>(q_tile, a.q, a.q.at(place.batch, place.head, place.q0), rows, place.first, place.n_q);
  load_keys(k_tile, a.k, begin);

  const int first = place.first + 16 * R * warp;  // the warp's first query
  const T* mine = q_tile + 16 * R * warp * Tile::kPitch;
  const GeneralScore<T> score(s, place, place.head);
  const float unit = General ? 1.0f : s.scale * kLog2e;  // a score times this is in units of log 2
  float top[R][2], total[R][2];                          // in units of log 2; of this lane's columns
#pragma unroll
  for (int r = 0; r < R; ++r)
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      top[r][i] = -INFINITY;
      total[r][i] = 0.0f;
    }
  Sums<R, D> o;
  o.clear();

  for (int key = begin; key < keys.high; key += N) {
    ptx::cp_async_wait<0>();
    __syncthreads();  // K is here, and nobody reads V any more
    load_keys(v_tile, a.v, key);
    Sums<R, N> p;
    p.clear();
    rows_by_rows<D>(p, mine, k_tile);
    if (General || key < keys.all_low || key + N > keys.all_high) {
      KeyRange range[R][2];
#pragma unroll
      for (int r = 0; r < R; ++r)
#pragma unroll
        for (int i = 0; i < 2; ++i) range[r][i] = keys_of(s, place, first + 16 * r + lane / 4 + 8 * i);
      p.for_each([&](int r, int n, int e, int row, int column) {
        const KeyRange seen = range[r][e / 2];
        float cap, &x = p.at[r][n][e];
        if (key + column < seen.low || key + column >= seen.high)
          x = -INFINITY;
        else if constexpr (General)
          x = score(x, first + row, key + column, cap);
      });
    }
#pragma unroll
    for (int r = 0; r < R; ++r)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float highest = -INFINITY;
#pragma unroll
        for (int n = 0; n < N / 8; ++n)
#pragma unroll
          for (int e = 0; e < 2; ++e) highest = fmaxf(highest, p.at[r][n][2 * i + e]);
        highest = fmaxf(highest, __shfl_xor_sync(kAllLanes, highest, 1));
        highest = fmaxf(highest, __shfl_xor_sync(kAllLanes, highest, 2));
        highest = fmaxf(top[r][i], highest * unit);
        // A row that has seen no key yet: any finite number in place of -inf makes its weights 0 and not NaN.
        const float origin = highest == -INFINITY ? 0.0f : highest;
        const float fade = ptx::exp2(top[r][i] - origin);
        top[r][i] = highest;
        float sum = total[r][i] * fade;
#pragma unroll
        for (int n = 0; n < N / 8; ++n)
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            float& x = p.at[r][n][2 * i + e];
            x = ptx::exp2(fmaf(x, unit, -origin));
            sum += x;
          }
        total[r][i] = sum;
#pragma unroll
        for (int n = 0; n < D / 8; ++n)
#pragma unroll
          for (int e = 0; e < 2; ++e) o.at[r][n][2 * i + e] *= fade;
      }
    if constexpr (General) {
      if (s.seed)
        p.for_each(
            [&](int r, int n, int e, int row, int column) { p.at[r][n][e] *= score.kept(first + row, key + column); });
    }
    ptx::cp_async_wait<0>();
    __syncthreads();  // V is here, and nobody reads K any more
    if (key + N < keys.high) load_keys(k_tile, a.k, key + N);
    weights_by_rows<D>(o, p, v_tile);
  }
  ptx::cp_async_wait<0>();  // q, of a block that sees no key
  __syncthreads();

  float inverse[R][2];
  float* lse = a.lse + (static_cast<int64_t>(place.batch) * s.heads + place.head) * s.n_q + place.q0;
#pragma unroll
  for (int r = 0; r < R; ++r)
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float sum = total[r][i];
      sum += __shfl_xor_sync(kAllLanes, sum, 1);
      sum += __shfl_xor_sync(kAllLanes, sum, 2);
      inverse[r][i] = sum == 0.0f ? 0.0f : 1.0f / sum;
      const int row = first + 16 * r + lane / 4 + 8 * i;
      if (lane % 4 == 0 && row < place.n_q) lse[row] = sum == 0.0f ? -INFINITY : fmaf(top[r][i], kLn2, logf(sum));
    }
  store_rows(
      q_tile + 16 * R * warp * Tile::kPitch, o, [&](int r, int i) { return inverse[r][i]; }, a.out,
      a.out.at(place.batch, place.head, place.q0), first, place.n_q, 0);
}

// Warps of a block: a function of the length, and of what the chip's shared memory holds.
template <class Tile>
inline int attention_warps(const AttentionScores& a, int64_t rows) {
  constexpr int64_t kStatic = 2048;  // places, ranges of keys, statistics of rows
  const int64_t limit = device_limits().shared_bytes - kStatic, each = 16 * Tile::kGroups;
  const int64_t wanted = a.cu_q ? kAttentionWarps : (rows + each - 1) / each;
  int warps = static_cast<int>(wanted < 1 ? 1 : wanted > kAttentionWarps ? kAttentionWarps : wanted);
  while (warps > 1 && Tile::shared(warps) > limit) --warps;
  return warps;
}

inline void check_blocks(int64_t blocks) {
  if (blocks >= int64_t{1} << 31) throw std::runtime_error("fastdl: q, k: too many rows for one launch");
}

// The one switch from the wider of head_dim and d_v to a kernel's columns: body(constant).
template <class Body>
inline cudaError_t for_head_dim(int head_dim, int d_v, const Body& body) {
  const int width = head_dim > d_v ? head_dim : d_v;
  if (width <= 32) return body(std::integral_constant<int, 32>{});
  if (width <= 64) return body(std::integral_constant<int, 64>{});
  if (width <= 128) return body(std::integral_constant<int, 128>{});
  if (width <= 256) return body(std::integral_constant<int, 256>{});
  throw std::runtime_error("fastdl: head_dim, d_v: expected at most 256");
}

template <class T, int D, bool General>
cudaError_t attention_forward_launch(AttentionForward<T> a, cudaStream_t stream) {
  using Tile = ForwardTile<T, D, General>;
  const int warps = attention_warps<Tile>(a.scores, a.scores.n_q);
  const int64_t slots = attention_slots(a.scores, a.scores.n_q, 16 * Tile::kGroups * warps);
  const int64_t blocks = slots * a.scores.heads * a.scores.batch;
  if (blocks == 0) return cudaSuccess;
  check_blocks(blocks);
  a.slots = static_cast<int>(slots);
  return launch(attention_forward_tile<T, D, General>, dim3(static_cast<unsigned>(blocks)), dim3(32 * warps),
                static_cast<size_t>(Tile::shared(warps)), stream, a);
}

template <class T>
cudaError_t attention_forward_launch(const AttentionForward<T>& a, cudaStream_t stream) {
  return for_head_dim(a.q.width, a.v.width, [&](auto columns) {
    constexpr int D = decltype(columns)::value;
    return a.scores.general ? attention_forward_launch<T, D, true>(a, stream)
                            : attention_forward_launch<T, D, false>(a, stream);
  });
}

}  // namespace fastdl::cuda
