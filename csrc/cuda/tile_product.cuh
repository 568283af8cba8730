// Products of tiles by one warp, operands in shared memory or registers, sums in registers: halves through tensor cores,
// float32 by multiply-adds in the same layout of registers.
//
//   rows_by_rows      s [16 R][N] += a [16 R][D] b [N][D]^T         a, b in shared memory
//   weights_by_rows   o [16 R][C] += p [16 R][N] b [N][C]           p in registers, as rows_by_rows left it
//
// The layout is that of mma's sums (emulator/ptx.h): with g = lane / 4 and t = lane % 4 element [r][n][e] is row
// 16 r + g + 8 (e / 2), column 8 n + 2 t + e % 2. The sums of a product are, packed, the left operand of the next one:
// weights never leave the registers. A row in shared memory is padded by 16 bytes to an odd number of 16 bytes, so that
// 8 rows lie in different banks.
#pragma once

#include "cuda/mma.cuh"

namespace fastdl::cuda {

// Elements from one row of a tile to the next; width: a multiple of 16.
template <class T>
__host__ __device__ constexpr int tile_pitch(int width) {
  return width + 16 / static_cast<int>(sizeof(T));
}

template <int R, int N>
struct Sums {
  float at[R][N / 8][4];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int r = 0; r < R; ++r)
#pragma unroll
      for (int n = 0; n < N / 8; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) at[r][n][e] = 0.0f;
  }

  // body(r, n, e, row, column): every element that this lane holds, column by column.
  template <class Body>
  __device__ __forceinline__ void for_each(const Body& body) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
    for (int n = 0; n < N / 8; ++n)
#pragma unroll
      for (int r = 0; r < R; ++r)
#pragma unroll
        for (int e = 0; e < 4; ++e) body(r, n, e, 16 * r + lane / 4 + 8 * (e / 2), 8 * n + 2 * (lane % 4) + e % 2);
  }
};

// a: the warp's first row of a tile of D columns, b: N rows of one.
template <int D, int R, int N, class T>
__device__ __forceinline__ void rows_by_rows(Sums<R, N>& s, const T* a, const T* b) {
  constexpr int kPitch = tile_pitch<T>(D);
  const int lane = static_cast<int>(threadIdx.x) % 32;
  if constexpr (sizeof(T) == 2) {
    static_assert(N % 16 == 0 && D % 16 == 0);
    const T* a_row = a + lane % 16 * kPitch + lane / 16 * 8;
    const T* b_row = b + (lane / 16 * 8 + lane % 8) * kPitch + lane / 8 % 2 * 8;
#pragma unroll
    for (int k = 0; k < D; k += 16) {
      uint32_t left[R][4];
#pragma unroll
      for (int r = 0; r < R; ++r) ptx::ldmatrix<4, false>(left[r], a_row + 16 * r * kPitch + k);
#pragma unroll
      for (int n = 0; n < N / 8; n += 2) {
        uint32_t both[4];
        ptx::ldmatrix<4, false>(both, b_row + 8 * n * kPitch + k);
        const uint32_t right[2][2] = {{both[0], both[1]}, {both[2], both[3]}};
#pragma unroll
        for (int r = 0; r < R; ++r)
#pragma unroll
          for (int i = 0; i < 2; ++i) mma(s.at[r][n + i], left[r], right[i], T{});
      }
    }
  } else {
    const T* a_row = a + lane / 4 * kPitch;
    const T* b_row = b + 2 * (lane % 4) * kPitch;
#pragma unroll 1
    for (int k = 0; k < D; k += 4) {
      float left[R][2][4];
#pragma unroll
      for (int r = 0; r < R; ++r)
#pragma unroll
        for (int i = 0; i < 2; ++i) load(a_row + (16 * r + 8 * i) * kPitch + k, left[r][i]);
#pragma unroll
      for (int n = 0; n < N / 8; ++n)
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          float right[4];
          load(b_row + (8 * n + j) * kPitch + k, right);
#pragma unroll
          for (int r = 0; r < R; ++r)
#pragma unroll
            for (int i = 0; i < 2; ++i)
#pragma unroll
              for (int e = 0; e < 4; ++e) s.at[r][n][2 * i + j] = fmaf(left[r][i][e], right[e], s.at[r][n][2 * i + j]);
        }
    }
  }
}

// b: N rows of C columns of a tile of D columns.
template <int D, int R, int N, int C, class T>
__device__ __forceinline__ void weights_by_rows(Sums<R, C>& o, const Sums<R, N>& p, const T* b) {
  constexpr int kPitch = tile_pitch<T>(D);
  const int lane = static_cast<int>(threadIdx.x) % 32;
  if constexpr (sizeof(T) == 2) {
    static_assert(N % 16 == 0 && C % 16 == 0);
    const T* b_row = b + lane % 16 * kPitch + lane / 16 * 8;
#pragma unroll
    for (int k = 0; k < N / 8; k += 2) {
      uint32_t left[R][4];
#pragma unroll
      for (int r = 0; r < R; ++r)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float* pair = p.at[r][k + i / 2] + 2 * (i % 2);
          left[r][i] = pack(pair[0], pair[1], T{});
        }
#pragma unroll
      for (int n = 0; n < C / 8; n += 2) {
        uint32_t both[4];
        ptx::ldmatrix<4, true>(both, b_row + 8 * k * kPitch + 8 * n);
        const uint32_t right[2][2] = {{both[0], both[1]}, {both[2], both[3]}};
#pragma unroll
        for (int r = 0; r < R; ++r)
#pragma unroll
          for (int i = 0; i < 2; ++i) mma(o.at[r][n + i], left[r], right[i], T{});
      }
    }
  } else {
    const int quad = lane / 4 * 4;
#pragma unroll
    for (int k = 0; k < N / 8; ++k)
#pragma unroll 1
      for (int t = 0; t < 4; ++t)  // lane t of the quad holds two columns of p
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          float left[R][2];
#pragma unroll
          for (int r = 0; r < R; ++r)
#pragma unroll
            for (int i = 0; i < 2; ++i) left[r][i] = __shfl_sync(kAllLanes, p.at[r][k][2 * i + j], quad + t);
          const T* b_row = b + (8 * k + 2 * t + j) * kPitch + 2 * (lane % 4);
#pragma unroll
          for (int n = 0; n < C / 8; ++n) {
            float right[2];
            load(b_row + 8 * n, right);
#pragma unroll
            for (int r = 0; r < R; ++r)
#pragma unroll
              for (int e = 0; e < 4; ++e) o.at[r][n][e] = fmaf(left[r][e / 2], right[e % 2], o.at[r][n][e]);
          }
        }
  }
}

}  // namespace fastdl::cuda
