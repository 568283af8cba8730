// What the CPU and CUDA wrappers of room attention_decode share: checks for memory safety, and the outputs. The readable errors
// were raised in fastdl/ops/attention_decode.py.
#pragma once

#include "common/attention_tensors.h"

namespace fastdl {

struct DecodeTensors {
  int64_t batch, heads, kv_heads, n_q, n_new, head_dim, d_v;
  int64_t rows, block;       // of the caches: sequences or blocks, positions of each
  int64_t table_blocks = 0;  // blocks of a sequence
  int64_t rope_dim = 0, positions = 0;
  int cache_format;          // FORMAT_F32, F16, BF16 or Q8_0
  HeadRows q, k_new, v_new;  // k_new, v_new: q's where nothing is appended (n_new is 0)
  const int32_t *lens, *table = nullptr;
  const float *cos_sin = nullptr, *slopes = nullptr;
  bool slopes_of_batch = false;
  Tensor out, lse;

  DecodeTensors(const Tensor& q_, const OptionalTensor& k_, const OptionalTensor& v_, const Tensor& k_cache,
                const Tensor& v_cache, const Tensor& lens_, const OptionalTensor& table_,
                const OptionalTensor& cos_sin_, const OptionalTensor& slopes_)
      : q(rows_of_heads(q_, q_)),
        k_new(rows_of_heads(k_ ? *k_ : q_, q_)),
        v_new(rows_of_heads(v_ ? *v_ : q_, q_)),
        out(q_),
        lse(q_) {
    batch = q_.size(0), heads = q_.size(1), n_q = q_.size(2), head_dim = q_.size(3);
    check(k_cache.dim() == 4 && v_cache.dim() == 4, "k_cache, v_cache: expected four dimensions");
    rows = k_cache.size(0), kv_heads = k_cache.size(1), block = k_cache.size(2);
    for (const Tensor* cache : {&k_cache, &v_cache})
      check(cache->size(0) == rows && cache->size(1) == kv_heads && cache->size(2) == block && cache->stride(3) == 1 &&
                same_device(*cache, q_) && cache->scalar_type() == k_cache.scalar_type(),
            "k_cache, v_cache: expected the same shapes and dtype, the last dimension contiguous");
    const bool packed = k_cache.scalar_type() == ScalarType::Byte;
    cache_format =
        packed ? FORMAT_Q8_0 : float_format(k_cache, "k_cache: expected float32, float16, bfloat16 or uint8");
    check(!packed || (k_cache.size(3) % 34 == 0 && v_cache.size(3) % 34 == 0), "k_cache: expected blocks of 34 bytes");
    d_v = packed ? v_cache.size(3) / 34 * 32 : v_cache.size(3);
    check((packed ? k_cache.size(3) / 34 * 32 : k_cache.size(3)) == head_dim && head_dim > 0 && d_v > 0,
          "k_cache: expected the head_dim of q");
    check(head_dim <= 4096 && d_v <= 4096, "q: expected a head_dim of at most 4096");
    check(kv_heads > 0 && heads % kv_heads == 0, "k_cache: expected heads that divide those of q");
    check(k_.has_value() == v_.has_value(), "k_new, v_new: expected both or none");
    n_new = k_ ? k_->size(2) : 0;
    if (k_) {
      const auto fits = [&](const Tensor& t, int64_t width) {
        return t.size(0) == batch && t.size(1) == kv_heads && t.size(2) == n_new && t.size(3) == width;
      };
      check(fits(*k_, head_dim) && fits(*v_, d_v), "k_new, v_new: expected [batch, kv_heads, n_new, width]");
    }
    const auto ints = [&](const Tensor& t, int64_t count, const char* message) {
      check(t.scalar_type() == ScalarType::Int && t.is_contiguous() && t.numel() == count && same_device(t, q_),
            message);
      return static_cast<const int32_t*>(t.const_data_ptr());
    };
    lens = ints(lens_, batch, "lens: expected int32 [batch]");
    if (table_) {
      check(table_->dim() == 2 && table_->size(0) == batch, "block_table: expected [batch, blocks]");
      table_blocks = table_->size(1);
      table = ints(*table_, batch * table_blocks, "block_table: expected int32 [batch, blocks]");
    } else {
      check(rows == batch, "k_cache: expected the batch of q");
    }
    const auto floats = [&](const Tensor& t, const char* message) {
      check(t.scalar_type() == ScalarType::Float && t.is_contiguous() && t.dim() == 2 && same_device(t, q_), message);
      return static_cast<const float*>(t.const_data_ptr());
    };
    if (cos_sin_) {
      cos_sin = floats(*cos_sin_, "cos_sin: expected float32 [positions, rope_dim]");
      positions = cos_sin_->size(0), rope_dim = cos_sin_->size(1);
      check(rope_dim % 2 == 0 && rope_dim <= head_dim, "cos_sin: expected an even rope_dim of at most head_dim");
    }
    if (slopes_) {
      slopes = floats(*slopes_, "slopes: expected float32 [1 or batch, heads]");
      check(slopes_->size(1) == heads && (slopes_->size(0) == 1 || slopes_->size(0) == batch),
            "slopes: expected float32 [1 or batch, heads]");
      slopes_of_batch = slopes_->size(0) != 1;
    }
    out = attention_like(q_, d_v);
    lse = new_tensor(q_, {batch, heads, n_q}, ScalarType::Float);
  }

  int64_t capacity() const { return table ? table_blocks * block : block; }

 private:
  static HeadRows rows_of_heads(const Tensor& t, const Tensor& q) {
    check(t.dim() == 4 && t.scalar_type() == q.scalar_type() && same_device(t, q),
          "q, k_new, v_new: expected [batch, heads, length, width] of one dtype");
    return head_rows(t);
  }
};

}  // namespace fastdl
