// Few queries over a long cache, which the new keys and values are appended to (contract: fastdl/ops/attention_decode.py).
//
//   append    a warp a row: k_new turned by its position's angles, v_new as it is, in the cache's type
//   split     a block a part of the keys of one key head of one sequence, and 16 queries of the heads that share it
//   merge     the parts of a query in order: out and lse
//
// The grid follows from the capacity, never from the lengths, which only the GPU knows: no call waits for it, and a CUDA
// graph can hold the call. Blocks behind a sequence's length return at once. Parts are cut by position alone, 256 keys (more of
// them for more than 64 queries a key head, so that the sums of parts stay small beside the cache), and tiles of 16 keys
// go round the warps of a block, each with two of them under way (cp.async) and a softmax of its own; the warps' sums are
// merged in order. Floor: the bytes of the cache over the memory's bandwidth.
//
// Dao et al., "Flash-Decoding" (2023).  Test: tests/test_attention_decode.py; benchmark: bench/attention_gpu.py.
#pragma once

#include "cuda/attention_decode_tile.cuh"

namespace fastdl::cuda {

constexpr int kDecodeWarps = 4;  // of a block at most
constexpr int kDecodePart = 256, kDecodeRows = 64;

// ggml's rule, to the bit: codes come from the unrounded scale. x: this lane's number of a block of 32; a warp.
__device__ __forceinline__ void store_q8(uint8_t* block, float x) {
  float largest = fabsf(x);
#pragma unroll
  for (int bits = 16; bits > 0; bits /= 2) largest = fmaxf(largest, __shfl_xor_sync(kAllLanes, largest, bits));
  const float d = largest / 127.0f, inverse = d != 0.0f ? 1.0f / d : 0.0f;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const float code = roundf(__fmul_rn(x, inverse));  // rounded before, not fused with what roundf adds
  block[2 + lane] = static_cast<uint8_t>(static_cast<int8_t>(static_cast<int>(code)));
  if (lane == 0) {
    const half_t rounded = from_float<half_t>(d);
    const auto* bytes = reinterpret_cast<const uint8_t*>(&rounded);
    block[0] = bytes[0];
    block[1] = bytes[1];
  }
}

// Block: a warp for keys and one for values. Grid (n_new, kv_heads, batch).
inline __global__ void __launch_bounds__(64) attention_decode_append(const Decode a) {
  const int t = static_cast<int>(blockIdx.x), group = static_cast<int>(blockIdx.y), b = static_cast<int>(blockIdx.z);
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const bool of_keys = threadIdx.x < 32;
  const DecodeRows& x = of_keys ? a.k_new : a.v_new;
  const DecodeCache& cache = of_keys ? a.k : a.v;
  const int64_t from = b * x.batch + group * x.head + t * x.row;
  const int position = decode_held(a, b) + t, width = of_keys ? a.head_dim : a.d_v;
  const int64_t to = decode_offset(a, cache, b, group, position);
  if (to < 0) return;  // a warp, and no block barrier here
  uint8_t* row = cache.data + to;
  for (int first = 0; first < width; first += 32) {
    const int i = first + lane;
    float y = 0.0f;
    if (i < width) y = of_keys ? decode_turned(a, x.data, from, i, position) : decode_float(x.data, a.format, from + i);
    if (a.cache_format == FORMAT_Q8_0)
      store_q8(row + first / 32 * 34, y);
    else if (i < width)
      decode_store(row, a.cache_format, i, y);
  }
}

// Where the sums of a part's queries lie.
__device__ __forceinline__ int64_t decode_place(const Decode& a, int b, int group, int part) {
  return ((static_cast<int64_t>(b) * a.kv_heads + group) * a.parts + part) * a.rows;
}

// What a lane needs to know of one of its queries to score a key.
struct DecodeRow {
  int low, high, position;  // the keys it sees
  float unit, slope;        // in units of log 2, unless there is a softcap

  __device__ __forceinline__ DecodeRow(const Decode& a, int b, int group, int row, int total, float unit_)
      : low(0), high(0), position(0), unit(unit_), slope(0.0f) {
    if (row >= a.rows) return;
    const DecodeQuery query = decode_query(a, group, row);
    position = total - a.n_q + query.t;
    low = a.left < 0 ? 0 : max(0, position - a.left);
    high = a.right < 0 ? total : min(total, position + a.right + 1);
    unit *= a.softcap > 0.0f ? a.scale / a.softcap : a.scale * kLog2e;
    if (a.slopes) slope = a.slopes[(a.slopes_of_batch ? b * a.heads : 0) + query.head] * kLog2e;
  }

  __device__ __forceinline__ float score(const Decode& a, float product, int key) const {
    if (key < low || key >= high) return -INFINITY;
    float x = product * unit;
    if (a.softcap > 0.0f) x = a.softcap * kLog2e * tanhf(x);
    return a.slopes ? x - slope * static_cast<float>(abs(position - key)) : x;
  }
};

template <class C, int D, int P>
struct DecodeShared {
  using Tile = DecodeTile<C, D>;
  static constexpr int kTile = Tile::kKeys * Tile::kPitch;
  static constexpr int kWarp = 4 * kTile;  // keys and values, twice; later its O [16][D], greatest scores and sums [16]
  static constexpr int kQueries = P * 16 * tile_pitch<typename Tile::T>(D) * static_cast<int>(sizeof(typename Tile::T));
  static_assert(kWarp >= (16 * D + 32) * 4);
};

// Grid (parts x tiles of queries, kv_heads, batch).
template <class C, int D, int P>
__global__ void __launch_bounds__(kDecodeWarps * 32, 1) attention_decode_split(const Decode a) {
  using Tile = DecodeTile<C, D>;
  using T = typename Tile::T;
  using Shared = DecodeShared<C, D, P>;
  constexpr int N = Tile::kKeys;
  FASTDL_DYNAMIC_SHARED(uint8_t, memory);
  FASTDL_SHARED(float, units, [16]);
  FASTDL_SHARED(float, fades, [kDecodeWarps][16]);
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int warps = static_cast<int>(blockDim.x) / 32;
  const int b = static_cast<int>(blockIdx.z), group = static_cast<int>(blockIdx.y);
  const int part = static_cast<int>(blockIdx.x) / a.tiles, row0 = static_cast<int>(blockIdx.x) % a.tiles * 16;
  const int total = decode_total(a, b), rows = min(16, a.rows - row0);
  if (part * a.part >= total || part < decode_first(a, total) / a.part) return;  // the whole block

  // Keys of the part that some of these queries see.
  int t0 = row0 % a.n_q, t1 = (row0 + rows - 1) % a.n_q;
  if (rows > a.n_q || t1 < t0) t0 = 0, t1 = a.n_q - 1;
  int begin = part * a.part, end = min(begin + a.part, total);
  if (a.left >= 0) begin = max(begin, total - a.n_q + t0 - a.left);
  if (a.right >= 0) end = min(end, total - a.n_q + t1 + a.right + 1);
  const int64_t place = decode_place(a, b, group, part) + row0;
  if (begin >= end) {
    if (static_cast<int>(threadIdx.x) < rows) {
      a.states[2 * (place + threadIdx.x)] = -INFINITY;
      a.states[2 * (place + threadIdx.x) + 1] = 0.0f;
    }
    return;
  }

  T* queries = reinterpret_cast<T*>(memory);
  uint8_t* mine = memory + Shared::kQueries + warp * Shared::kWarp;
  // Lanes 0 to 15 know where keys of a tile lie, the others know it of values.
  const auto offset_of = [&](int tile) {
    const int key = tile * N + lane % 16;
    return lane % 16 < N && key >= begin && key < end ? decode_offset(a, lane < 16 ? a.k : a.v, b, group, key)
                                                      : int64_t{-1};
  };
  const auto load = [&](int stage, int64_t offset) {
    uint8_t* tile = mine + stage * 2 * Shared::kTile;
    decode_load<Tile>(tile, a.k, offset, 0);
    decode_load<Tile>(tile + Shared::kTile, a.v, offset, 16);
  };
  const int first = begin / N, last = (end + N - 1) / N;
  int tile = first + (warp + warps - first % warps) % warps;  // tile i is that of warp i % warps
  int64_t offset = offset_of(tile);
  if (tile < last) load(0, offset);
  ptx::cp_async_commit();
  uint32_t there = __ballot_sync(kAllLanes, offset >= 0);
  offset = offset_of(tile + warps);

  for (int row = warp; row < 16; row += warps) {
    const float unit = decode_load_query<D, P>(a, queries, row, b, group, row0 + row, total);
    if (lane == 0) units[row] = unit;
  }
  __syncthreads();
  const DecodeRow of[2] = {{a, b, group, row0 + lane / 4, total, units[lane / 4]},
                           {a, b, group, row0 + lane / 4 + 8, total, units[lane / 4 + 8]}};
  float top[2] = {-INFINITY, -INFINITY}, sum[2] = {};  // in units of log 2; of this lane's columns
  Sums<1, D> o;
  o.clear();

  for (int stage = 0; tile < last; tile += warps, stage ^= 1) {
    if (tile + warps < last) load(stage ^ 1, offset);
    ptx::cp_async_commit();
    const uint32_t next = __ballot_sync(kAllLanes, offset >= 0);
    offset = offset_of(tile + 2 * warps);
    ptx::cp_async_wait<1>();
    __syncwarp();
    const uint8_t* k = mine + stage * 2 * Shared::kTile;
    Sums<1, N> w;
    w.clear();
    if constexpr (std::is_same_v<C, Q8>) {
      q8_scores<D, P>(w, queries, k);
    } else {
      Sums<P, N> each;
      each.clear();
      rows_by_rows<D>(each, queries, reinterpret_cast<const T*>(k));
      w.for_each([&](int, int n, int e, int, int) {
#pragma unroll
        for (int p = P; p-- > 0;) w.at[0][n][e] += each.at[p][n][e];
      });
    }
    w.for_each([&](int, int n, int e, int, int column) {
      float& x = w.at[0][n][e];
      x = there >> column & 1 ? of[e / 2].score(a, x, tile * N + column) : -INFINITY;
    });
    float fade[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float highest = -INFINITY;
#pragma unroll
      for (int n = 0; n < N / 8; ++n) highest = fmaxf(highest, fmaxf(w.at[0][n][2 * i], w.at[0][n][2 * i + 1]));
      highest = fmaxf(highest, __shfl_xor_sync(kAllLanes, highest, 1));
      highest = fmaxf(highest, __shfl_xor_sync(kAllLanes, highest, 2));
      highest = fmaxf(top[i], highest);
      const float origin = highest == -INFINITY ? 0.0f : highest;  // finite: weights of no key are 0 and not NaN
      fade[i] = top[i] == highest ? 1.0f : ptx::exp2(top[i] - origin);
      top[i] = highest;
      sum[i] *= fade[i];
#pragma unroll
      for (int n = 0; n < N / 8; ++n)
#pragma unroll
        for (int e = 2 * i; e < 2 * i + 2; ++e) {
          w.at[0][n][e] = ptx::exp2(w.at[0][n][e] - origin);
          sum[i] += w.at[0][n][e];
        }
    }
    if (__any_sync(kAllLanes, fade[0] != 1.0f || fade[1] != 1.0f))
      o.for_each([&](int, int n, int e, int, int) { o.at[0][n][e] *= fade[e / 2]; });
    if constexpr (std::is_same_v<C, Q8>) {
      q8_outputs<D, P>(o, w, k + Shared::kTile);
    } else {
#pragma unroll
      for (int p = 0; p < P; ++p) {
        weights_by_rows<D>(o, w, reinterpret_cast<const T*>(k + Shared::kTile));
        if (p + 1 < P)
          w.for_each([&](int, int n, int e, int, int) { w.at[0][n][e] -= to_float(from_float<T>(w.at[0][n][e])); });
      }
    }
    __syncwarp();  // nobody reads this stage any more
    there = next;
  }
  ptx::cp_async_wait<0>();

  auto* sums = reinterpret_cast<float*>(mine);  // O [16][D], greatest scores [16], sums [16]
  o.for_each([&](int, int n, int e, int row, int column) {
    if (e % 2 == 0) {
      const float two[2] = {o.at[0][n][e], o.at[0][n][e + 1]};
      store(sums + row * D + column, two);
    }
  });
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    sum[i] += __shfl_xor_sync(kAllLanes, sum[i], 1);
    sum[i] += __shfl_xor_sync(kAllLanes, sum[i], 2);
    if (lane % 4 == 0) {
      sums[16 * D + lane / 4 + 8 * i] = top[i];
      sums[16 * D + 16 + lane / 4 + 8 * i] = sum[i];
    }
  }
  __syncthreads();
  const auto of_warp = [&](int i) {
    return reinterpret_cast<const float*>(memory + Shared::kQueries + i * Shared::kWarp);
  };
  if (static_cast<int>(threadIdx.x) < rows) {
    const int row = static_cast<int>(threadIdx.x);
    float greatest = -INFINITY, all = 0.0f;
    for (int i = 0; i < warps; ++i) greatest = fmaxf(greatest, of_warp(i)[16 * D + row]);
    for (int i = 0; i < warps; ++i) {
      fades[i][row] = ptx::exp2(of_warp(i)[16 * D + row] - (greatest == -INFINITY ? 0.0f : greatest));
      all = fmaf(fades[i][row], of_warp(i)[16 * D + 16 + row], all);
    }
    a.states[2 * (place + row)] = greatest;
    a.states[2 * (place + row) + 1] = all;
  }
  __syncthreads();
  for (int row = warp; row < rows; row += warps)
    for (int column = lane; column < a.d_v; column += 32) {
      float x = 0.0f;
      for (int i = 0; i < warps; ++i) x = fmaf(fades[i][row], of_warp(i)[row * D + column], x);
      a.outs[(place + row) * a.d_v + column] = x;
    }
}

// A block a query. Each warp forms the same sums of parts, in order.
inline __global__ void __launch_bounds__(128) attention_decode_merge(const Decode a) {
  const int lane = static_cast<int>(threadIdx.x) % 32, shared = a.heads / a.kv_heads;
  const int t = static_cast<int>(blockIdx.x % static_cast<unsigned>(a.n_q));
  const int plane = static_cast<int>(blockIdx.x / static_cast<unsigned>(a.n_q)), b = plane / a.heads;
  const int head = plane % a.heads, group = head / shared, row = head % shared * a.n_q + t;
  const int total = decode_total(a, b), begin = decode_first(a, total) / a.part, end = (total + a.part - 1) / a.part;
  const int64_t place = decode_place(a, b, group, 0) + row;
  const auto state = [&](int part) { return a.states + 2 * (place + static_cast<int64_t>(part) * a.rows); };
  float top = -INFINITY, sum = 0.0f, x[2] = {};
  for (int part = begin + lane; part < end; part += 32) top = fmaxf(top, state(part)[0]);
#pragma unroll
  for (int bits = 16; bits > 0; bits /= 2) top = fmaxf(top, __shfl_xor_sync(kAllLanes, top, bits));
  const float origin = top == -INFINITY ? 0.0f : top;
  for (int first = begin; first < end; first += 32) {
    const int part = first + lane;
    float fade = 0.0f, weight = 0.0f;
    if (part < end) {
      fade = ptx::exp2(state(part)[0] - origin);
      weight = state(part)[1];
    }
    sum += fade * weight;
    const unsigned any = __ballot_sync(kAllLanes, weight != 0.0f);  // others have written no O
#pragma unroll 4
    for (int i = 0; i < min(32, end - first); ++i) {
      const float factor = __shfl_sync(kAllLanes, fade, i);
      const float* from = a.outs + (place + static_cast<int64_t>(first + i) * a.rows) * a.d_v;
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const int column = static_cast<int>(threadIdx.x) + 128 * j;
        if ((any >> i & 1) && column < a.d_v) x[j] = fmaf(factor, from[column], x[j]);
      }
    }
  }
  sum = warp_sum(sum);
  const float inverse = sum == 0.0f ? 0.0f : 1.0f / sum;
  const int64_t to = b * a.out_batch + head * a.out_head + t * a.out_row;
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    const int column = static_cast<int>(threadIdx.x) + 128 * j;
    if (column < a.d_v) decode_store(a.out, a.format, to + column, x[j] * inverse);
  }
  if (threadIdx.x == 0) a.lse[blockIdx.x] = sum == 0.0f ? -INFINITY : fmaf(top, kLn2, logf(sum));
}

// Keys of a part for `rows` queries a key head, and how many parts a capacity has.
inline int decode_part(int64_t rows) {
  const int64_t times = (rows + kDecodeRows - 1) / kDecodeRows;
  return static_cast<int>(kDecodePart * (times < 1 ? 1 : times > 1 << 16 ? 1 << 16 : times));
}

template <class C, int D, int P>
cudaError_t attention_decode_split_launch(const Decode& a, cudaStream_t stream) {
  using Shared = DecodeShared<C, D, P>;
  int warps = kDecodeWarps;
  while (warps > 1 && Shared::kQueries + warps * Shared::kWarp > device_limits().shared_bytes - 1024) warps /= 2;
  const int64_t blocks = static_cast<int64_t>(a.parts) * a.tiles;
  check_blocks(blocks);
  const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(a.kv_heads), static_cast<unsigned>(a.batch));
  return launch(attention_decode_split<C, D, P>, grid, dim3(static_cast<unsigned>(32 * warps)),
                static_cast<size_t>(Shared::kQueries + warps * Shared::kWarp), stream, a);
}

// The one switch from formats to kernels. A query that is turned has more digits than its type.
template <int D>
cudaError_t attention_decode_split_launch(const Decode& a, cudaStream_t stream) {
  const bool turned = a.cos_sin != nullptr, bf16 = a.format == FORMAT_BF16 && !turned;
  switch (a.cache_format) {
    case FORMAT_F32: return attention_decode_split_launch<float, D, 1>(a, stream);
    case FORMAT_F16:
      return turned || a.format == FORMAT_F32 ? attention_decode_split_launch<half_t, D, 2>(a, stream)
                                              : attention_decode_split_launch<half_t, D, 1>(a, stream);
    case FORMAT_BF16:
      return bf16 ? attention_decode_split_launch<bf16_t, D, 1>(a, stream)
                  : attention_decode_split_launch<bf16_t, D, 3>(a, stream);
    case FORMAT_Q8_0:
      return bf16 ? attention_decode_split_launch<Q8, D, 1>(a, stream)
                  : attention_decode_split_launch<Q8, D, 3>(a, stream);
    default: throw std::runtime_error("fastdl: k_cache: expected float32, float16, bfloat16 or Q8_0");
  }
}

inline cudaError_t attention_decode_launch(const Decode& a, cudaStream_t stream) {
  const auto of = [](int64_t n) { return static_cast<unsigned>(n); };
  if (a.batch >= 65536 || a.kv_heads >= 65536)
    throw std::runtime_error("fastdl: q, k_cache: expected fewer than 65536 sequences and key heads");
  if (a.n_new > 0 && a.capacity > 0 && a.batch > 0) {
    const dim3 grid(of(a.n_new), of(a.kv_heads), of(a.batch));
    const cudaError_t error = launch(attention_decode_append, grid, dim3(64), 0, stream, a);
    if (error != cudaSuccess) return error;
  }
  const int64_t queries = static_cast<int64_t>(a.batch) * a.heads * a.n_q;
  if (queries == 0) return cudaSuccess;
  check_blocks(queries);
  if (a.parts > 0) {
    const cudaError_t error = for_head_dim(a.head_dim, a.d_v, [&](auto columns) {
      return attention_decode_split_launch<decltype(columns)::value>(a, stream);
    });
    if (error != cudaSuccess) return error;
  }
  return launch(attention_decode_merge, dim3(of(queries)), dim3(128), 0, stream, a);
}

}  // namespace fastdl::cuda
