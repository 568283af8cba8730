// What the kernels of attention's backward pass share: the problem, tile sizes, statistics of rows, and the gradient of a
// score. Contract: fastdl/ops/attention.py.
#pragma once

#include "cuda/attention.cuh"

namespace fastdl::cuda {

template <class T>
struct AttentionBackward {
  AttentionRows<const T> grad, q, k, v, out;  // grad, out [B, H, n_q, D_v]
  AttentionRows<T> dq, dk, dv;
  const float *lse, *grad_lse;  // [B, H, n_q]; grad_lse may be null
  float *origin, *delta;        // [B, H, n_q]: lse in units of log 2, grad . out - grad_lse
  float* dbias;                 // [B or 1, H or 1, n_q or 1, n_k or 1]
  bool whole[4];                // dimensions of dbias that are not broadcast
  AttentionScores scores;
  int slots, parts;
};

// R: 16 rows a warp that stay, kStream: rows of a tile that passes, kColumns: of dk and dv that a block holds. Sums [16 R][2
// kColumns] must fit in registers.
template <class T, int D, bool General>
struct BackwardTile {
  static constexpr bool kHalf = sizeof(T) == 2;
  static constexpr int kGroups = kHalf && D <= 64 && !General ? 2 : 1;
  static constexpr int kStream = kHalf ? (D <= 128 ? 32 : 16) : D <= 64 ? 32 : D == 128 ? 16 : 8;
  static constexpr int kStages = D == 256 ? 1 : 2;
  static constexpr int kColumns = D == 256 ? 128 : D;
  static constexpr int kPitch = tile_pitch<T>(D);
  static constexpr int64_t shared(int warps) {
    return (32 * kGroups * warps + 2 * kStages * kStream) * kPitch * static_cast<int64_t>(sizeof(T));
  }
};

// origin and delta; a warp takes a row. Rows without keys get the origin +inf: their weights are 0.
template <class T>
__global__ void __launch_bounds__(256) attention_backward_rows(const AttentionBackward<T> a) {
  const AttentionScores& s = a.scores;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * 8 + threadIdx.x / 32;
  if (row >= static_cast<int64_t>(s.batch) * s.heads * s.n_q) return;  // a whole warp, and no block barrier here
  const int64_t plane = row / s.n_q, query = row % s.n_q;
  const int b = static_cast<int>(plane / s.heads), h = static_cast<int>(plane % s.heads);
  const T *grad = a.grad.at(b, h, query), *out = a.out.at(b, h, query);
  float sum = 0.0f;
  for (int c = static_cast<int>(threadIdx.x) % 32; c < a.out.width; c += 32)
    sum = fmaf(to_float(grad[c]), to_float(out[c]), sum);
  sum = warp_sum(sum);
  if (threadIdx.x % 32 != 0) return;
  const float lse = a.lse[row];
  if (a.grad_lse) sum -= a.grad_lse[row];
  a.origin[row] = lse == -INFINITY ? INFINITY : lse * kLog2e;
  a.delta[row] = lse == -INFINITY ? 0.0f : sum;
}

// Of one query.
struct alignas(16) GradientRow {
  float origin, delta;
  KeyRange keys;
};

template <class T>
__device__ __forceinline__ GradientRow gradient_row(const AttentionBackward<T>& a, const AttentionPlace& place,
                                                    int head, int query) {
  if (query < 0 || query >= place.n_q) return {INFINITY, 0.0f, {0, 0}};
  const int64_t at = (static_cast<int64_t>(place.batch) * a.scores.heads + head) * a.scores.n_q + place.q0 + query;
  return {a.origin[at], a.delta[at], keys_of(a.scores, place, query)};
}

// One query and key. p: q . k, becomes the weight after dropout; dp: grad . v, becomes the gradient of the score before
// softcap, or, where not Capped, after it.
template <bool General, bool Capped, class T>
__device__ __forceinline__ void differentiate(float& p, float& dp, const GradientRow& row, const GeneralScore<T>& score,
                                              float unit, int query, int key) {
  float weight = 0.0f, cap = 1.0f, keep = 1.0f;
  if (key >= row.keys.low && key < row.keys.high) {
    if constexpr (General) {
      weight = ptx::exp2(score(p, query, key, cap) - row.origin);
      if (score.a.seed) keep = score.kept(query, key);
    } else {
      weight = ptx::exp2(fmaf(p, unit, -row.origin));
    }
    dp = weight * (dp * keep - row.delta);
    if (Capped) dp *= cap;
    if (General && weight == 0.0f) dp = 0.0f;  // what a mask or a bias hides: also where v and the cap are NaN
  } else {
    dp = 0.0f;
  }
  p = weight * keep;
}

}  // namespace fastdl::cuda
