// Attention's tiles in shared memory: rows of q, k, v or their gradients, padded with zeros to D columns, loaded by the
// block in the background, and written from there.
#pragma once

#include "cuda/tile_product.cuh"

namespace fastdl::cuda {

// A tensor [batch, heads, length, width] of T, or of const T. Strides in elements.
template <class T>
struct AttentionRows {
  T* data;
  int64_t batch, head, row;
  int width;
  bool vectors;  // every row begins at a multiple of 16 bytes and is a multiple of 16 bytes

  // Row `first` of a head.
  __device__ __forceinline__ T* at(int b, int h, int64_t first) const {
    return data + b * batch + h * head + first * row;
  }
};

// Rows first to first + rows of the `length` that begin at `from`, into tile [rows][D + padding]; zeros where there is
// none. Ends with cp_async_commit by the caller.
template <int D, class T>
__device__ __forceinline__ void load_tile(T* tile, const AttentionRows<const T>& x, const T* from, int rows, int first,
                                          int length) {
  constexpr int kPiece = 16 / static_cast<int>(sizeof(T)), kPieces = D / kPiece;
#pragma unroll 1
  for (int i = static_cast<int>(threadIdx.x); i < rows * kPieces; i += static_cast<int>(blockDim.x)) {
    const int row = i / kPieces, column = i % kPieces * kPiece;
    const bool inside = first + row < length && column < x.width;
    const T* source = from + (inside ? (first + row) * x.row + column : 0);
    T* to = tile + row * tile_pitch<T>(D) + column;
    if (x.vectors) {
      ptx::cp_async<16>(to, source, inside);
    } else {
      Vector<T, kPiece> piece;
#pragma unroll
      for (int e = 0; e < kPiece; ++e) piece.at[e] = inside && column + e < x.width ? source[e] : from_float<T>(0.0f);
      *reinterpret_cast<Vector<T, kPiece>*>(to) = piece;
    }
  }
}

// The warp's sums, times scale of their row, to rows first, first + 1, ... < length of x, columns from_column on. `tile`
// [16 R][pitch of C]: shared memory of this warp.
template <int R, int C, class T, class Scale>
__device__ __forceinline__ void store_rows(T* tile, Sums<R, C>& sums, const Scale& scale, const AttentionRows<T>& x,
                                           T* to, int first, int length, int from_column) {
  constexpr int kPiece = 16 / static_cast<int>(sizeof(T)), kPieces = C / kPiece, kPitch = tile_pitch<T>(C);
  const int lane = static_cast<int>(threadIdx.x) % 32;
  __syncwarp();  // nobody reads the tile any more
  sums.for_each([&](int r, int n, int e, int row, int column) {
    if (e % 2 == 0) {
      const float factor = scale(r, e / 2), two[2] = {sums.at[r][n][e] * factor, sums.at[r][n][e + 1] * factor};
      store(tile + row * kPitch + column, two);
    }
  });
  __syncwarp();
  for (int i = lane; i < 16 * R * kPieces; i += 32) {
    const int row = i / kPieces, column = i % kPieces * kPiece, at = from_column + column;
    if (first + row >= length || at >= x.width) continue;
    const auto piece = *reinterpret_cast<const Vector<T, kPiece>*>(tile + row * kPitch + column);
    T* address = to + (first + row) * x.row + at;
    if (x.vectors) {
      *reinterpret_cast<Vector<T, kPiece>*>(address) = piece;
    } else {
#pragma unroll
      for (int e = 0; e < kPiece; ++e)
        if (at + e < x.width) address[e] = piece.at[e];
    }
  }
}

}  // namespace fastdl::cuda
