// The product of a persistent block: its slice of the weights with a tile of h or du, both in shared memory.
//
//   partial[part][row][column] (+)= sum over k in the part of depth: weights[row][k] * tile[column][k]
//
// A warp takes a tile of rows and a part of the depth. Halves go through tensor cores, 16 rows by 8 columns by 16 of depth
// at a time, the weights as the left matrix: a tile of 16 rows is full whatever the batch. float32 stays float32: a lane
// holds a row, and its sums of all columns in registers; with fewer than 32 rows lanes share a row's depth.
#pragma once

#include "cuda/mma.cuh"
#include "cuda/recurrent_plan.h"
#include "cuda/vector.cuh"

namespace fastdl::cuda {

__device__ __forceinline__ void put(float* to, float value, bool add) { *to = add ? *to + value : value; }

// weights [rows][p.weight_stride], tile [Columns][p.tile_stride], partial [p.parts][rows][p.partial_stride]; depth: a
// multiple of 16. The same thread writes the same element of partial in every call.
template <int Columns, class T>
__device__ __forceinline__ void block_product(const PersistentPlan& p, const T* weights, const T* tile, int rows,
                                              int depth, float* partial, bool add) {
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const int tiles = (rows + 15) / 16, pieces = depth / 16;
  for (int item = warp; item < tiles * p.parts; item += kPersistentWarps) {
    const int first = item / p.parts * 16, part = item % p.parts;
    const int begin = part * pieces / p.parts, end = (part + 1) * pieces / p.parts;
    float sums[Columns / 8][4] = {};
    const int row = first + lane % 16 < rows ? first + lane % 16 : rows - 1;  // the rest is computed and dropped
    const T* a_row = weights + row * p.weight_stride + lane / 16 * 8;
    const T* b_row = tile + lane % 8 * p.tile_stride + lane / 8 % 2 * 8;
    for (int k = begin * 16; k < end * 16; k += 16) {
      uint32_t a[4];
      ptx::ldmatrix<4, false>(a, a_row + k);
#pragma unroll
      for (int n = 0; n < Columns / 8; ++n) {
        uint32_t b[2];
        ptx::ldmatrix<2, false>(b, b_row + n * 8 * p.tile_stride + k);
        mma(sums[n], a, b, T{});
      }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int at = first + lane / 4 + 8 * half;
      float* to = partial + (part * rows + at) * p.partial_stride + 2 * (lane % 4);
#pragma unroll
      for (int n = 0; n < Columns / 8; ++n) {
        if (at < rows) {
          put(to + n * 8, sums[n][2 * half], add);
          put(to + n * 8 + 1, sums[n][2 * half + 1], add);
        }
      }
    }
  }
}

template <int Columns>
__device__ __forceinline__ void block_product(const PersistentPlan& p, const float* weights, const float* tile,
                                              int rows, int depth, float* partial, bool add) {
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const int width = rows > 16 ? 32 : rows > 8 ? 16 : 8, shares = 32 / width;  // rows of a tile, lanes of a row
  const int tiles = (rows + width - 1) / width, pieces = depth / 16;
  for (int item = warp; item < tiles * p.parts; item += kPersistentWarps) {
    const int at = item / p.parts * width + lane % width, part = item % p.parts;
    const int begin = part * pieces / p.parts * 16, end = (part + 1) * pieces / p.parts * 16;
    float sums[Columns] = {};
    const float* row = weights + (at < rows ? at : rows - 1) * p.weight_stride;
    for (int k = begin + lane / width * 4; k < end; k += shares * 4) {
      float w[4];
      load<4>(row + k, w);
#pragma unroll
      for (int n = 0; n < Columns; ++n) {
        float v[4];
        load<4>(tile + n * p.tile_stride + k, v);
#pragma unroll
        for (int i = 0; i < 4; ++i) sums[n] = fmaf(w[i], v[i], sums[n]);
      }
    }
    float* to = partial + (part * rows + at) * p.partial_stride;
#pragma unroll
    for (int n = 0; n < Columns; ++n) {
      for (int bits = width; bits < 32; bits *= 2) sums[n] += __shfl_xor_sync(0xffffffffu, sums[n], bits);
      if (lane < width && at < rows) put(to + n, sums[n], add);
    }
  }
}

// sum over parts, in order
__device__ __forceinline__ float sum_of_parts(const PersistentPlan& p, const float* partial, int rows, int row,
                                              int column) {
  float sum = 0.0f;
  for (int part = 0; part < p.parts; ++part) sum += partial[(part * rows + row) * p.partial_stride + column];
  return sum;
}

}  // namespace fastdl::cuda
