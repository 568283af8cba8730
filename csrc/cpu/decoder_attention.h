// How decoder_block.cpp attends to the cache of a layer: the kernels of room attention_decode for a few queries, those of room
// attention for many.
#pragma once

#include <cmath>

#include "common/formats.h"
#include "cpu/attention_decode_kernel.h"
#include "cpu/attention_kernel.h"

namespace fastdl {

// Of one call of decoder_blocks.
struct DecoderShape {
  int64_t n, width, n_heads, n_kv_heads, head_dim, ff, max_len, rope_dim, pos;
  float eps;
  int activation;
  int64_t q_rows() const { return n_heads * head_dim; }
  int64_t kv_rows() const { return n_kv_heads * head_dim; }
  int64_t qkv_rows() const { return q_rows() + 2 * kv_rows(); }
};

struct CacheAttention {
  bool few;
  int64_t parts, part_floats, scratch_bytes;
  int32_t length;  // positions with the new ones
  const DecodeKernels* decode;
  const AttentionKernels* many;
  DecodeCall few_call;
  AttentionCall many_call;

  CacheAttention(const DecoderShape& s) : few(s.n <= 4), length((int32_t)(s.pos + s.n)), few_call{}, many_call{} {
    switch (cpu_vectors()) {
#define FASTDL_CASE(variant)                  \
  case CpuVariant::variant:                   \
    decode = &variant::decode_kernels;        \
    many = &variant::attention_kernels;       \
    break;
      FASTDL_VECTORS(FASTDL_CASE)
#undef FASTDL_CASE
      default: decode = &scalar::decode_kernels, many = &scalar::attention_kernels;
    }
    DecodeCall& a = few_call;
    a.format = FORMAT_F32, a.cache_format = FORMAT_F16;
    a.block = s.max_len, a.blocks = 1;
    a.batch = 1, a.heads = s.n_heads, a.kv_heads = s.n_kv_heads, a.n_q = s.n;
    a.head_dim = a.d_v = s.head_dim, a.left = -1, a.right = 0;
    a.scale = 1.0f / std::sqrt((float)s.head_dim);
    a.q_at = {0, s.head_dim, s.qkv_rows()};
    a.out_at = {0, s.head_dim, s.q_rows()};
    a.k = a.v = {nullptr, 0, s.max_len * s.head_dim * 2, s.head_dim * 2};
    parts = (length + decode->keys - 1) / decode->keys;
    part_floats = decode->part_floats(a);
    AttentionCall& b = many_call;
    b.format = FORMAT_F32, b.key_format = FORMAT_F16;
    b.heads = s.n_heads, b.kv_heads = s.n_kv_heads, b.n_q = s.n, b.n_k = length;
    b.head_dim = b.d_v = s.head_dim, b.left = -1, b.right = 0;
    b.scale = a.scale;
    b.q_at = {0, s.head_dim, s.qkv_rows()};
    b.out_at = {0, s.head_dim, s.q_rows()};
    b.k_at = b.v_at = {0, s.max_len * s.head_dim, s.head_dim};
    scratch_bytes = few ? decode->scratch_bytes(a) : many->forward_bytes(b);
  }

  void tensors(const float* q, float* out) {
    few_call.q = many_call.q = q;
    few_call.out = many_call.out = out;
    few_call.lens = &length;
  }
  void cache(uint16_t* k, uint16_t* v) {
    few_call.k.data = (uint8_t*)k, few_call.v.data = (uint8_t*)v;
    many_call.k = k, many_call.v = v;
  }
};

}  // namespace fastdl
