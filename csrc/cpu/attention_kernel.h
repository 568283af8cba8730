// What the attention kernels offer at each level: blocks of queries against all their keys, forward and backward. Raw
// pointers, no torch. Contract: fastdl/ops/attention.py.
//
// The queries of all heads that share a key head are numbered in a row, `column` = head in the group * n_q + query, and
// an item takes up to `columns` of them, because columns lie in the lanes of vectors.
#pragma once

#include <stdint.h>

#include "cpu/cpu_level.h"

namespace fastdl {

struct AttentionStrides {
  int64_t batch, head, row;  // in elements; the last dimension is contiguous
};

// bias or mask [batch, heads, n_q, n_k], broadcast where a stride is 0; null: none
struct AttentionTerm {
  const void* data;
  int64_t batch, head, row, key;
};

struct AttentionCall {
  const void *q, *k, *v;  // [B, H, n_q, D], [B, G, n_k, D], [B, G, n_k, D_v]
  AttentionStrides q_at, k_at, v_at;
  AttentionTerm bias, mask;           // mask: bytes
  const int32_t* lens;                // [B], or [B, n_q] with lens_of_rows, or null
  const float* slopes;                // [H], or [B, H] with slopes_of_batch, or null
  int64_t heads, kv_heads, n_q, n_k;  // n_q, n_k: of all packed sequences together
  int64_t head_dim, d_v, left, right;
  float scale, softcap, p, keep_scale;  // keep_scale: 1 / (1 - p)
  uint64_t seed;
  int format, key_format, bias_format;  // format: of q, out and their gradients; key_format: of k and v
  bool lens_of_rows, slopes_of_batch, dropout;

  void* out;  // [B, H, n_q, D_v]
  AttentionStrides out_at;
  float* lse;  // [B, H, n_q], or null

  // backward
  const void *grad, *result;  // like out
  AttentionStrides grad_at, result_at;
  const float *row_lse, *grad_lse;  // [B, H, n_q]; grad_lse or null
  float* delta;                     // [B, H, n_q]: sum of grad * result, less grad_lse
  void *dq, *dk, *dv;
  AttentionStrides dq_at, dk_at, dv_at;
  float* dbias;            // added to, with dbias_at's strides, by `backward` where not null, and by `bias_gradient`
  AttentionTerm dbias_at;  // its data is not used
};

// One sequence: rows q0 .. q0 + n_q of batch `batch`, keys k0 .. k0 + n_k, for the heads of key head `group`.
struct AttentionSequence {
  int64_t batch, group, q0, n_q, k0, n_k;
};

struct AttentionKernels {
  int64_t columns, keys;  // of an item; of a block of keys
  int64_t (*forward_bytes)(const AttentionCall& a);
  // Columns first .. first + count and the keys key0 .. key1 (key0 a multiple of `keys`). partial null: writes out and lse;
  // else the sums of these keys: d_v + 2 rows of `columns` floats, outputs not yet divided, greatest score, sum.
  void (*forward)(const AttentionCall& a, const AttentionSequence& s, int64_t first, int64_t count, int64_t key0,
                  int64_t key1, float* partial, void* scratch);
  // Adds up the partial sums of `parts` ranges of keys, which lie behind each other, in order, and writes out and lse.
  void (*merge)(const AttentionCall& a, const AttentionSequence& s, int64_t first, int64_t count, const float* partial,
                int64_t parts, void* scratch);
};

struct AttentionBackwardKernels {
  int64_t columns, keys;
  int64_t (*bytes)(const AttentionCall& a);
  // delta of columns first .. first + count.
  void (*deltas)(const AttentionCall& a, const AttentionSequence& s, int64_t first, int64_t count, void* scratch);
  // dk and dv of the keys key0 .. key1 (key0 a multiple of `keys`) from all queries, dbias likewise, and what these keys add
  // to dq: dq_part [blocks of columns][head_dim][columns], without the scale.
  void (*backward)(const AttentionCall& a, const AttentionSequence& s, int64_t key0, int64_t key1, float* dq_part,
                   void* scratch);
  // dq of columns first .. first + count from the parts' sums, which are `stride` floats apart.
  void (*write_dq)(const AttentionCall& a, const AttentionSequence& s, int64_t first, int64_t count, const float* part,
                   int64_t parts, int64_t stride);
  // Adds the gradients of the scores of columns first .. first + count, of one head, and keys key .. key + n to dbias.
  void (*bias_gradient)(const AttentionCall& a, const AttentionSequence& s, int64_t first, int64_t count, int64_t key,
                        int64_t n, void* scratch);
};

#define FASTDL_DECLARE(variant)                         \
  namespace variant {                                   \
  extern const AttentionKernels attention_kernels;      \
  extern const AttentionBackwardKernels attention_backward_kernels; \
  }
FASTDL_VECTORS(FASTDL_DECLARE)
#undef FASTDL_DECLARE

}  // namespace fastdl
