// What attention's kernels share: the problem, the place of a block in it, the keys that a query sees, and the score of a
// query and a key. Scores are kept in units of log 2, so that exp2 gives the weights.
#pragma once

#include "common/philox.h"
#include "cuda/attention_tile.cuh"

namespace fastdl::cuda {

// Before sm_80 tiles come to shared memory through registers: kernels that have none to spare take smaller tiles there.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
constexpr bool kCopiesInRegisters = true;
#else
constexpr bool kCopiesInRegisters = false;
#endif

constexpr int kAttentionWarps = 4;  // of a block at most
constexpr float kLog2e = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

// All but the rows. Tensors as in common/attention_tensors.h.
struct AttentionScores {
  int batch, heads, kv_heads, n_q, n_k;  // packed: lengths of all sequences together
  int left, right;                       // of the window, -1: unlimited
  float scale;
  const int *lens, *cu_q, *cu_k;
  int sequences;
  bool lens_of_rows;
  // Only where `general`:
  bool general, bias_is_float, slopes_of_batch;
  float softcap, p, keep;  // keep: 1 / (1 - p)
  const void* bias;
  const bool* mask;
  int64_t bias_stride[4], mask_stride[4];
  const float* slopes;
  const int64_t* seed;
};

// A block's rows (queries, or keys) and the sequence they belong to. Kernels keep it in shared memory: registers are short.
struct AttentionPlace {
  bool any;         // false: nothing to do
  int batch, head;  // of the rows
  int first;        // row of the sequence
  int n_q, n_k;     // of the sequence
  int64_t q0, k0;   // where it begins
};

__device__ __forceinline__ int clamped(int value, int low, int high) {
  return value < low ? low : value > high ? high : value;
}

// Tiles of a head: of packed rows enough for any division into sequences.
inline int64_t attention_slots(const AttentionScores& a, int64_t rows, int64_t tile) {
  if (a.cu_q == nullptr) return (rows + tile - 1) / tile;
  return a.sequences > 0 ? rows / tile + a.sequences : 0;
}

// Of slot `slot` of the tiles of `tile` rows of plane `plane`, one of batch x heads. cu: cu_q where the rows are queries,
// cu_k where they are keys. Sequence s has the slots from cu[s] / tile + s on; offsets that are out of order lose rows, but
// stay inside.
__device__ __forceinline__ AttentionPlace attention_place(const AttentionScores& a, bool of_queries, int plane,
                                                          int heads, int slot, int tile) {
  AttentionPlace place{true, plane / heads, plane % heads, slot * tile, a.n_q, a.n_k, 0, 0};
  if (a.cu_q == nullptr) return place;
  const int* cu = of_queries ? a.cu_q : a.cu_k;
  const int total = of_queries ? a.n_q : a.n_k;
  int low = 0, high = a.sequences;  // the sequence: the last one whose slots begin at or before this
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (clamped(cu[middle], 0, total) / tile + middle <= slot)
      low = middle;
    else
      high = middle;
  }
  const int q0 = clamped(a.cu_q[low], 0, a.n_q), k0 = clamped(a.cu_k[low], 0, a.n_k);
  place.n_q = clamped(a.cu_q[low + 1], q0, a.n_q) - q0;
  place.n_k = clamped(a.cu_k[low + 1], k0, a.n_k) - k0;
  place.q0 = q0;
  place.k0 = k0;
  place.first = (slot - (of_queries ? q0 : k0) / tile - low) * tile;
  place.any = place.first >= 0 && place.first < (of_queries ? place.n_q : place.n_k);
  return place;
}

// Of block `block` of a grid of batch x heads (kv heads where the rows are keys) x slots; in shared memory. With causal the
// last queries see the most keys and the first keys are seen by the most queries: both come first. Has a barrier.
__device__ __forceinline__ const AttentionPlace& block_place(const AttentionScores& a, bool of_queries, unsigned block,
                                                             int slots, int tile) {
  FASTDL_SHARED(AttentionPlace, places, [1]);
  if (threadIdx.x == 0) {
    const int plane = static_cast<int>(block / static_cast<unsigned>(slots));
    const int slot = static_cast<int>(block % static_cast<unsigned>(slots));
    places[0] = attention_place(a, of_queries, plane, of_queries ? a.heads : a.kv_heads,
                                of_queries ? slots - 1 - slot : slot, tile);
  }
  __syncthreads();
  return places[0];
}

// The keys [low, high) that a query sees; both 0 where it sees none.
struct KeyRange {
  int low, high;
};

__device__ __forceinline__ KeyRange keys_of(const AttentionScores& a, const AttentionPlace& place, int query) {
  if (query < 0 || query >= place.n_q) return {0, 0};
  const int position = query + place.n_k - place.n_q;
  int low = 0, high = place.n_k;
  if (a.left >= 0) low = max(low, position - a.left);
  if (a.right >= 0) high = min(high, position + a.right + 1);
  if (a.lens != nullptr) {
    const int64_t row = a.lens_of_rows ? static_cast<int64_t>(place.batch) * a.n_q + place.q0 + query : place.batch;
    high = min(high, a.lens[row]);
  }
  if (low < high) return {low, high};
  return {0, 0};
}

// The keys that some of a block's queries see, [low, high), and those that all of them see, [all_low, all_high).
struct BlockKeys {
  int low, high, all_low, all_high;
};

// Of queries first to first + rows; in shared memory. Has barriers.
__device__ __forceinline__ const BlockKeys& block_keys(const AttentionScores& a, const AttentionPlace& place, int first,
                                                       int rows) {
  FASTDL_SHARED(BlockKeys, of_warp, [kAttentionWarps]);
  FASTDL_SHARED(BlockKeys, of_block, [1]);
  constexpr int kNone = 0x7fffffff;
  BlockKeys mine{kNone, 0, 0, kNone};
  const auto join = [&](int low, int high, int all_low, int all_high) {
    mine = {min(mine.low, low), max(mine.high, high), max(mine.all_low, all_low), min(mine.all_high, all_high)};
  };
  for (int row = static_cast<int>(threadIdx.x); row < rows; row += static_cast<int>(blockDim.x)) {
    if (first + row >= place.n_q) continue;
    const KeyRange range = keys_of(a, place, first + row);
    join(range.low < range.high ? range.low : kNone, range.high, range.low, range.high);
  }
#pragma unroll
  for (int bits = 16; bits > 0; bits /= 2)
    join(__shfl_xor_sync(kAllLanes, mine.low, bits), __shfl_xor_sync(kAllLanes, mine.high, bits),
         __shfl_xor_sync(kAllLanes, mine.all_low, bits), __shfl_xor_sync(kAllLanes, mine.all_high, bits));
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = mine;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int warp = 1; warp < static_cast<int>(blockDim.x) / 32; ++warp)
      join(of_warp[warp].low, of_warp[warp].high, of_warp[warp].all_low, of_warp[warp].all_high);
    of_block[0] = mine;
  }
  __syncthreads();
  return of_block[0];
}

// The scores of one head, with everything that may change them. T: the dtype of q.
template <class T>
struct GeneralScore {
  const AttentionScores& a;
  const AttentionPlace& place;
  const char* bias;
  const bool* mask;
  float slope;
  int64_t plane;  // of dropout's index
  uint64_t seed;

  __device__ __forceinline__ GeneralScore(const AttentionScores& a_, const AttentionPlace& place_, int head)
      : a(a_), place(place_), bias(static_cast<const char*>(a.bias)), mask(a.mask), slope(0.0f), seed(0) {
    const int b = place.batch;
    if (bias) bias += (b * a.bias_stride[0] + head * a.bias_stride[1]) * (a.bias_is_float ? 4 : sizeof(T));
    if (mask) mask += b * a.mask_stride[0] + head * a.mask_stride[1];
    if (a.slopes) slope = a.slopes[(a.slopes_of_batch ? b * a.heads : 0) + head];
    if (a.seed) seed = static_cast<uint64_t>(*a.seed);
    plane = static_cast<int64_t>(b) * a.heads + head;
  }

  // product: q . k of a query and a key that it sees; cap: the factor of softcap's gradient.
  __device__ __forceinline__ float operator()(float product, int query, int key, float& cap) const {
    float t = a.scale * product;
    cap = 1.0f;
    if (a.softcap > 0.0f) {
      const float tanh = tanhf(t / a.softcap);
      t = a.softcap * tanh;
      cap = 1.0f - tanh * tanh;
    }
    if (bias) {
      const int64_t at = query * a.bias_stride[2] + key * a.bias_stride[3];
      const float term =
          a.bias_is_float ? reinterpret_cast<const float*>(bias)[at] : to_float(reinterpret_cast<const T*>(bias)[at]);
      t = term == -INFINITY ? term : t + term;  // also where t is NaN
    }
    if (a.slopes) t -= slope * static_cast<float>(abs(query + place.n_k - place.n_q - key));
    if (mask && !mask[query * a.mask_stride[2] + key * a.mask_stride[3]]) t = -INFINITY;
    return t * kLog2e;
  }

  // Dropout's factor.
  __device__ __forceinline__ float kept(int query, int key) const {
    const int64_t index = (plane * a.n_q + place.q0 + query) * a.n_k + place.k0 + key;
    return philox_dropout(seed, static_cast<uint64_t>(index), a.p, a.keep);
  }
};

}  // namespace fastdl::cuda
