// What additive_attention_kernel.cpp and additive_attention_backward_kernel.cpp offer at each level: additive attention of
// a block of queries and a chunk of keys. Raw pointers, no torch. Contract: fastdl/ops/additive_attention.py.
#pragma once

#include <stdint.h>

#include "cpu/cpu_level.h"

namespace fastdl {

constexpr int64_t ADDITIVE_TILE = 8;      // keys whose numbers stay in the first-level cache while queries pass
constexpr int64_t ADDITIVE_QUERIES = 64;  // of a block

// Rows of working memory are padded to whole vectors of every level.
static inline int64_t additive_padded(int64_t n) { return (n + 15) / 16 * 16; }

// Strides are in elements; the last dimension lies side by side.
struct AdditiveArgs {
  const void *q, *k, *v;       // [batch][queries][hidden], [batch][keys][hidden], [batch][keys][d_v] (null: pointer)
  const void* grad;            // backward: [batch][queries][d_v]; of the pointer [batch][queries][keys] float32
  const void* out;             // backward: contiguous [batch][queries][d_v]; null: pointer
  const float *largest, *sum;  // backward: the statistics, contiguous [batch][queries] each
  const float* weights;        // [2][padded hidden]: w, then -2 w, zeros behind
  const uint8_t* mask;         // [batch][queries][keys], or null
  const int32_t* lens;         // [batch][queries], or null
  int64_t q_batch, q_row, k_batch, k_row, v_batch, v_row, grad_batch, grad_row;
  int64_t mask_batch, mask_query, mask_key, lens_batch, lens_query;
  int64_t queries, keys, hidden, d_v;
  int format;  // Format number of q, k, v, out, grad
};

// Queries i0 <= i < i1 of sequence n and keys j0 <= j < j1.
struct AdditivePiece {
  int64_t n, i0, i1, j0, j1;
};

// Softmax in parts: the largest score so far, the sum of exp(score - largest), and the sum of those times v.
struct AdditiveState {
  float *largest, *sum;  // [queries of the block]
  float* out;            // [queries of the block][padded d_v]; null: pointer
};

// Prepared queries of a block: the largest |q| of each, then for each its numbers, exp(2 q) and exp(2 q) - 1.
static inline int64_t additive_query_floats(int64_t hidden, int64_t queries) {
  return ADDITIVE_QUERIES + queries * 3 * additive_padded(hidden);
}
// Working memory of a piece: keys and their exponentials, v, tanh of a query and a tile.
static inline int64_t additive_work_floats(int64_t hidden, int64_t d_v) {
  return ADDITIVE_TILE * (4 * additive_padded(hidden) + additive_padded(d_v)) + additive_padded(hidden);
}

// A query's row in the backward: grad and out, of the pointer one number.
static inline int64_t additive_row_floats(int64_t d_v) { return d_v > 0 ? 2 * additive_padded(d_v) : 16; }

struct AdditiveBackward {
  float* dq;    // [queries][padded hidden]: of this chunk alone, without the factor w
  float* dk;    // [keys of the chunk][padded hidden]: likewise
  float* dv;    // [keys of the chunk][padded d_v]; null: pointer
  float* dw;    // [padded hidden]: of this chunk alone
  float* rows;  // [ADDITIVE_QUERIES][additive_row_floats]
};

struct AdditiveKernels {
  void (*weights)(const void* w, int format, int64_t hidden, float* to);
  void (*queries)(const AdditiveArgs& a, int64_t n, int64_t i0, int64_t i1, float* to);
  // The state of a chunk. scores: working memory [queries of the block][padded keys of the chunk]; scores_out, or null:
  // rows of the block [queries of the block][keys], where scores are left.
  void (*forward)(const AdditiveArgs& a, const AdditivePiece& piece, const float* queries, float* work, float* scores,
                  const AdditiveState& state, float* scores_out);
  // whole = whole and part together
  void (*merge)(int64_t queries, int64_t d_v, const AdditiveState& part, const AdditiveState& whole);
  // out [queries][d_v] = state.out / state.sum
  void (*finish)(int64_t queries, int64_t d_v, const AdditiveState& state, int format, void* out);
  // to [rows][cols] = factor[col] * from [rows][padded cols]; factor null: 1
  void (*store)(const float* from, int64_t rows, int64_t cols, const float* factor, int format, void* to);
  void (*add)(const float* from, int64_t count, float* to);  // to += from; count: a multiple of 16
};

struct AdditiveBackwardKernels {
  // All queries of piece.n and one chunk of keys.
  void (*backward)(const AdditiveArgs& a, const AdditivePiece& piece, float* queries, float* work,
                   const AdditiveBackward& b);
};

#define FASTDL_DECLARE(variant) \
  namespace variant { \
  extern const AdditiveKernels additive_attention_kernels; \
  extern const AdditiveBackwardKernels additive_attention_backward_kernels; \
  }
FASTDL_VECTORS(FASTDL_DECLARE)
#undef FASTDL_DECLARE

}  // namespace fastdl
