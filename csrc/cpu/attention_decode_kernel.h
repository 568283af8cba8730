// What attention_decode_kernel.cpp offers at each level: a few queries against a cache, and writing to it. Raw pointers, no
// torch. Contract: fastdl/ops/attention_decode.py.
#pragma once

#include <stdint.h>

#include "cpu/cpu_level.h"

namespace fastdl {

// A cache [rows][G][positions][width]: rows are sequences, or blocks that `table` deals out. Strides in bytes.
struct DecodeCache {
  uint8_t* data;
  int64_t row, head, position;
};

struct DecodeStrides {
  int64_t batch, head, row;  // in elements
};

struct DecodeCall {
  const void *q, *k_new, *v_new;  // [B, H, n_q, D], [B, G, n_new, D], [B, G, n_new, D_v]
  DecodeStrides q_at, k_at, v_at;
  DecodeCache k, v;
  int format, cache_format;             // Format numbers: q and out; caches (F32, F16, BF16, Q8_0)
  const int32_t* lens;                  // [B]: positions held before
  const int32_t* table;                 // [B][table_blocks] or null
  int64_t table_blocks, block, blocks;  // positions of a row of the cache; rows
  const float* cos_sin;                 // [positions][rope_dim] or null
  int64_t positions, rope_dim;
  bool interleaved;
  const float* slopes;  // [H], or [B][H] with slopes_of_batch, or null
  bool slopes_of_batch;
  int64_t batch, heads, kv_heads, n_q, n_new, head_dim, d_v, left, right;
  float scale, softcap;
  void* out;  // [B, H, n_q, D_v]
  DecodeStrides out_at;
  float* lse;  // [B, H, n_q], or null
};

struct DecodeKernels {
  int64_t keys;  // of a part: part i holds positions i * keys and on
  // floats of a part's sums, and bytes of scratch of `part`
  int64_t (*part_floats)(const DecodeCall& a);
  int64_t (*scratch_bytes)(const DecodeCall& a);
  // k_new and v_new of one sequence and key head to the cache.
  void (*append)(const DecodeCall& a, int64_t b, int64_t group);
  // The queries of a key head's heads against one part of the keys. sums: greatest score, sum of exponentials, and outputs
  // not yet divided, for every query.
  void (*part)(const DecodeCall& a, int64_t b, int64_t group, int64_t index, float* sums, void* scratch);
  // Adds up `parts` parts, which lie part_floats apart, in order, and writes out and lse.
  void (*merge)(const DecodeCall& a, int64_t b, int64_t group, const float* sums, int64_t parts);
};

#define FASTDL_DECLARE(variant) \
  namespace variant { extern const DecodeKernels decode_kernels; }
FASTDL_VECTORS(FASTDL_DECLARE)
#undef FASTDL_DECLARE

}  // namespace fastdl
