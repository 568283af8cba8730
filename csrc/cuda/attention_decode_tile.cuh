// What the kernels of attention_decode.cuh are made of: the problem, the cache's rows and their way to shared memory,
// queries that are turned and cut into parts, and products with Q8_0 tiles.
//
// Nothing is rounded on the way to a product but by 2^-22 or less: a query and its weights, float32, are P numbers of the
// cache's 16-bit type that add up to them (2 float16, of a row scaled to its largest element, or 3 bfloat16; one where
// the query is of that type already), and the sums are float32. The codes of Q8_0 are bfloat16 as they are; their scales are
// put to sums of 32 products (keys), and to the weights (values). Keys are read once either way, and memory is the bound.
#pragma once

#include "common/formats.h"
#include "cuda/attention.cuh"

namespace fastdl::cuda {

// A cache [rows][G][positions][width]: rows are sequences, or blocks that a table deals out. Strides in bytes.
struct DecodeCache {
  uint8_t* data;
  int64_t row, head, position;
  int bytes;  // of a position
  int piece;  // 16, 8, 4, 2 or 1: divides every address
};

// q, k_new or v_new [batch, heads, length, width]. Strides in elements.
struct DecodeRows {
  const void* data;
  int64_t batch, head, row;
};

struct Decode {
  DecodeRows q, k_new, v_new;
  DecodeCache k, v;
  int format, cache_format;         // Format numbers of q, k_new, v_new and out; of the caches
  const int *lens, *table;          // [batch]; [batch][table_blocks] or null
  int table_blocks, block, blocks;  // positions of a row of the cache; its rows
  int capacity;                     // positions of a sequence
  const float* cos_sin;             // [positions][rope_dim] or null
  int positions, rope_dim;
  bool interleaved;
  const float* slopes;  // [heads], or [batch][heads] with slopes_of_batch, or null
  bool slopes_of_batch;
  int batch, heads, kv_heads, n_q, n_new, head_dim, d_v, left, right;
  float scale, softcap;
  int rows, tiles;       // queries of a key head, and tiles of 16 of them
  int part, parts;       // keys of a part; parts of the capacity
  float *outs, *states;  // [batch][kv_heads][parts][rows][d_v], and [..][rows][2]: greatest score and sum
  void* out;             // [batch, heads, n_q, d_v]
  int64_t out_batch, out_head, out_row;
  float* lse;  // [batch, heads, n_q]
};

__device__ __forceinline__ float decode_float(const void* data, int format, int64_t i) {
  if (format == FORMAT_F32) return static_cast<const float*>(data)[i];
  return format == FORMAT_F16 ? to_float(static_cast<const half_t*>(data)[i])
                              : to_float(static_cast<const bf16_t*>(data)[i]);
}

__device__ __forceinline__ void decode_store(void* data, int format, int64_t i, float x) {
  if (format == FORMAT_F32)
    static_cast<float*>(data)[i] = x;
  else if (format == FORMAT_F16)
    static_cast<half_t*>(data)[i] = from_float<half_t>(x);
  else
    static_cast<bf16_t*>(data)[i] = from_float<bf16_t>(x);
}

// Positions of sequence b before the call, and with the new ones: never more than there is room for.
__device__ __forceinline__ int decode_held(const Decode& a, int b) { return clamped(a.lens[b], 0, a.capacity); }
__device__ __forceinline__ int decode_total(const Decode& a, int b) {
  return min(a.capacity, decode_held(a, b) + a.n_new);
}

// The first key that a query of sequence b sees; parts before it are neither computed nor read.
__device__ __forceinline__ int decode_first(const Decode& a, int total) {
  return a.left < 0 ? 0 : max(0, total - a.n_q - a.left);
}

// Byte of a position in a cache, or -1 where the table or the cache has none.
__device__ __forceinline__ int64_t decode_offset(const Decode& a, const DecodeCache& cache, int b, int group, int at) {
  int row = b;
  if (at >= a.capacity) return -1;
  if (a.table) {
    row = a.table[static_cast<int64_t>(b) * a.table_blocks + at / a.block];
    at %= a.block;
  }
  if (row < 0 || row >= a.blocks) return -1;
  return row * cache.row + group * cache.head + at * cache.position;
}

// Element i of the row that begins at element `from`, turned by the angles of a position (clamped to the table).
__device__ __forceinline__ float decode_turned(const Decode& a, const void* data, int64_t from, int i, int position) {
  const float x = decode_float(data, a.format, from + i);
  if (!a.cos_sin || !a.positions || i >= a.rope_dim) return x;
  const int half = a.rope_dim / 2, pair = a.interleaved ? i / 2 : i % half;
  const bool first = a.interleaved ? i % 2 == 0 : i < half;
  const float other = decode_float(data, a.format, from + (a.interleaved ? i ^ 1 : first ? i + half : i - half));
  const float* angle = a.cos_sin + static_cast<int64_t>(clamped(position, 0, a.positions - 1)) * a.rope_dim + 2 * pair;
  return first ? x * angle[0] - other * angle[1] : x * angle[0] + other * angle[1];
}

// ---- The cache's tiles ----------------------------------------------------------------------------------------------
struct Q8 {};

// Tiles of kKeys keys in shared memory. T: what they are multiplied in; bytes of a row, and to the next.
template <class C, int D>
struct DecodeTile {
  using T = C;
  static constexpr int kKeys = sizeof(C) == 4 && D == 256 ? 8 : 16;
  static constexpr int kBytes = D * static_cast<int>(sizeof(C));
  static constexpr int kPitch = tile_pitch<C>(D) * static_cast<int>(sizeof(C));
};
template <int D>
struct DecodeTile<Q8, D> {
  using T = bf16_t;
  static constexpr int kKeys = 16;
  static constexpr int kBytes = D / 32 * 34;
  static constexpr int kPitch = ((kBytes + 15) / 16 | 1) * 16;  // an odd number of 16 bytes: 8 rows in different banks
};

// Copies under way in a thread: where they pass through registers (before sm_80), one at a time.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
constexpr int kDecodeCopies = 1;
#else
constexpr int kDecodeCopies = 4;
#endif

// One tile of rows that begin `offset` bytes (of lane from_lane + row) behind data; zeros where that is negative and behind
// the row's bytes. The whole warp calls it.
template <int Bytes, class Tile>
__device__ __forceinline__ void decode_copy(uint8_t* tile, const DecodeCache& cache, int64_t offset, int from_lane) {
  constexpr int kPieces = Tile::kBytes / Bytes, kAll = Tile::kKeys * kPieces;
#pragma unroll kDecodeCopies
  for (int first = 0; first < kAll; first += 32) {
    const int i = first + static_cast<int>(threadIdx.x) % 32;
    const int row = min(i / kPieces, Tile::kKeys - 1), at = i % kPieces * Bytes;
    const int64_t from = __shfl_sync(kAllLanes, offset, from_lane + row);
    const bool valid = from >= 0 && at < cache.bytes;
    if (i >= kAll) continue;
    const uint8_t* source = cache.data + (valid ? from + at : 0);
    uint8_t* to = tile + row * Tile::kPitch + at;
    if constexpr (Bytes >= 4)
      ptx::cp_async<Bytes>(to, source, valid);
    else if constexpr (Bytes == 2)
      *reinterpret_cast<uint16_t*>(to) = valid ? *reinterpret_cast<const uint16_t*>(source) : uint16_t{0};
    else
      *to = valid ? *source : uint8_t{0};
  }
}

template <class Tile>
__device__ __forceinline__ void decode_load(uint8_t* tile, const DecodeCache& cache, int64_t offset, int from_lane) {
  switch (cache.piece) {
    case 16:
      if constexpr (Tile::kBytes % 16 == 0) decode_copy<16, Tile>(tile, cache, offset, from_lane);
      return;
    case 8:
      if constexpr (Tile::kBytes % 8 == 0) decode_copy<8, Tile>(tile, cache, offset, from_lane);
      return;
    case 4:
      if constexpr (Tile::kBytes % 4 == 0) decode_copy<4, Tile>(tile, cache, offset, from_lane);
      return;
    case 2: return decode_copy<2, Tile>(tile, cache, offset, from_lane);
    default: return decode_copy<1, Tile>(tile, cache, offset, from_lane);
  }
}

// ---- Queries --------------------------------------------------------------------------------------------------------
// Query `row` of a key head's: its head and its number within the sequence.
struct DecodeQuery {
  int head, t;
};
__device__ __forceinline__ DecodeQuery decode_query(const Decode& a, int group, int row) {
  return {group * (a.heads / a.kv_heads) + row / a.n_q, row % a.n_q};
}

// Row `row` of the queries to row `to` of tile [P][16][D + padding], in P parts; zeros behind a.rows. A warp calls it.
// Returns what a product with it must be multiplied by.
template <int D, int P, class T>
__device__ __forceinline__ float decode_load_query(const Decode& a, T* tile, int to, int b, int group, int row,
                                                   int total) {
  constexpr int E = D / 32;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  float x[E], unit = 1.0f;
#pragma unroll
  for (int e = 0; e < E; ++e) x[e] = 0.0f;
  if (row < a.rows) {
    const DecodeQuery query = decode_query(a, group, row);
    const int64_t from = b * a.q.batch + query.head * a.q.head + query.t * a.q.row;
#pragma unroll
    for (int e = 0; e < E; ++e)
      if (lane + 32 * e < a.head_dim) x[e] = decode_turned(a, a.q.data, from, lane + 32 * e, total - a.n_q + query.t);
  }
  if constexpr (std::is_same_v<T, half_t>) {  // to the middle of what float16 can hold
    float most = 0.0f;
#pragma unroll
    for (int e = 0; e < E; ++e) most = fmaxf(most, fabsf(x[e]));
#pragma unroll
    for (int bits = 16; bits > 0; bits /= 2) most = fmaxf(most, __shfl_xor_sync(kAllLanes, most, bits));
    const unsigned exponent = __float_as_uint(most) >> 23;  // biased; most >= 0
    if (exponent > 16 && exponent < 255) {
      unit = __uint_as_float((exponent - 8) << 23);
      const float inverse = __uint_as_float(min(262 - static_cast<int>(exponent), 254) << 23);
#pragma unroll
      for (int e = 0; e < E; ++e) x[e] *= inverse;
    }
  }
#pragma unroll
  for (int e = 0; e < E; ++e)
#pragma unroll
    for (int p = 0; p < P; ++p) {
      const T rounded = from_float<T>(x[e]);
      tile[(16 * p + to) * tile_pitch<T>(D) + lane + 32 * e] = rounded;
      x[e] -= to_float(rounded);
    }
  return unit;
}

// ---- Products with Q8_0 tiles ---------------------------------------------------------------------------------------
__device__ __forceinline__ float q8_scale(const uint8_t* block) {
  return to_float(*reinterpret_cast<const half_t*>(block));
}
__device__ __forceinline__ float q8_code(const uint8_t* at) { return static_cast<float>(static_cast<int8_t>(*at)); }

// s [16][N] += q [P][16][D] k [N][D]^T
template <int D, int P, int N>
__device__ __forceinline__ void q8_scores(Sums<1, N>& s, const bf16_t* q, const uint8_t* k) {
  constexpr int kPitch = tile_pitch<bf16_t>(D), kRow = DecodeTile<Q8, D>::kPitch;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const bf16_t* q_row = q + lane % 16 * kPitch + lane / 16 * 8;
#pragma unroll 1
  for (int block = 0; block < D / 32; ++block) {
    uint32_t left[P][2][4];
#pragma unroll
    for (int p = 0; p < P; ++p)
#pragma unroll
      for (int h = 0; h < 2; ++h) ptx::ldmatrix<4, false>(left[p][h], q_row + 16 * p * kPitch + 32 * block + 16 * h);
#pragma unroll
    for (int n = 0; n < N / 8; ++n) {
      const uint8_t* codes = k + (8 * n + lane / 4) * kRow + 34 * block + 2 + 2 * (lane % 4);
      const uint8_t* scales = k + (8 * n + 2 * (lane % 4)) * kRow + 34 * block;
      float sum[4] = {};
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        uint32_t right[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const uint8_t* two = codes + 16 * h + 8 * i;
          right[i] = pack(q8_code(two), q8_code(two + 1), bf16_t{});
        }
#pragma unroll
        for (int p = P; p-- > 0;) mma(sum, left[p][h], right, bf16_t{});  // the smallest first
      }
      const float d[2] = {q8_scale(scales), q8_scale(scales + kRow)};
#pragma unroll
      for (int e = 0; e < 4; ++e) s.at[0][n][e] = fmaf(d[e % 2], sum[e], s.at[0][n][e]);
    }
  }
}

// o [16][D] += w [16][N] v [N][D]
template <int D, int P, int N>
__device__ __forceinline__ void q8_outputs(Sums<1, D>& o, const Sums<1, N>& w, const uint8_t* v) {
  constexpr int kRow = DecodeTile<Q8, D>::kPitch;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  static_assert(N == 16);
#pragma unroll
  for (int block = 0; block < D / 32; ++block) {
    uint32_t left[P][4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint8_t* scales = v + (8 * (i / 2) + 2 * (lane % 4)) * kRow + 34 * block;
      const float* pair = w.at[0][i / 2] + 2 * (i % 2);
      float first = pair[0] * q8_scale(scales), second = pair[1] * q8_scale(scales + kRow);
#pragma unroll
      for (int p = 0; p < P; ++p) {
        left[p][i] = pack(first, second, bf16_t{});
        first -= first_bf16(left[p][i]);
        second -= second_bf16(left[p][i]);
      }
    }
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      const uint8_t* codes = v + 2 * (lane % 4) * kRow + 34 * block + 2 + 8 * n + lane / 4;
      uint32_t right[2];
#pragma unroll
      for (int i = 0; i < 2; ++i)
        right[i] = pack(q8_code(codes + 8 * i * kRow), q8_code(codes + (8 * i + 1) * kRow), bf16_t{});
#pragma unroll
      for (int p = P; p-- > 0;) mma(o.at[0][4 * block + n], left[p], right, bf16_t{});
    }
  }
}

}  // namespace fastdl::cuda
