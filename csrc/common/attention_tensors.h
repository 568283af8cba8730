// What the CPU and CUDA wrappers of room attention share: checks for memory safety, strides, and the outputs. The readable
// errors were raised in fastdl/ops/_attention_checks.py. Contract: fastdl/ops/attention.py.
#pragma once

#include <tuple>

#include "common/rows.h"

namespace fastdl {

// A tensor [batch, heads, length, width] whose last dimension lies side by side. Strides count elements; that of a
// dimension of one is 0.
struct HeadRows {
  Tensor tensor;  // holds the memory
  int64_t batch, head, row, width;

  template <class T>
  const T* data() const {
    return static_cast<const T*>(tensor.const_data_ptr());
  }
  template <class T>
  T* mutable_data() const {
    return static_cast<T*>(tensor.mutable_data_ptr());
  }
};

inline int64_t stride_of(const Tensor& t, int64_t d) { return t.size(d) == 1 ? 0 : t.stride(d); }

inline HeadRows head_rows(const Tensor& x) {
  const Tensor t = x.size(3) == 1 || x.stride(3) == 1 ? x : torch::stable::contiguous(x);
  return {t, stride_of(t, 0), stride_of(t, 1), stride_of(t, 2), t.size(3)};
}

// Uninitialised [B, H, n, width], heads inside the length where x [B, H, n, *] has them so: output_like of
// fastdl/reference/attention.py.
inline Tensor attention_like(const Tensor& x, int64_t width) {
  const int64_t batch = x.size(0), heads = x.size(1), length = x.size(2);
  if (heads > 1 && length > 1 && x.stride(1) < x.stride(2))
    return torch::stable::transpose(new_tensor(x, {batch, length, heads, width}, x.scalar_type()), 1, 2);
  return new_tensor(x, {batch, heads, length, width}, x.scalar_type());
}

// bias or mask, [B or 1, H or 1, n_q or 1, n_k or 1]: the stride of a dimension of one is 0.
struct ScoreTerm {
  const void* data = nullptr;
  int64_t stride[4] = {};

  ScoreTerm() = default;
  ScoreTerm(const Tensor& t, const int64_t (&scores)[4], const char* message) : data(t.const_data_ptr()) {
    check(t.dim() == 4, message);
    for (int d = 0; d < 4; ++d) {
      check(t.size(d) == 1 || t.size(d) == scores[d], message);
      stride[d] = stride_of(t, d);
    }
  }
};

struct AttentionTensors {
  int64_t batch, heads, kv_heads, n_q, n_k, head_dim, d_v;
  int64_t sequences;  // packed one after the other; 0: not packed
  HeadRows q, k, v;
  ScoreTerm bias, mask;
  bool bias_is_float = false;  // float32, whatever q is
  OptionalTensor lens_memory;
  const int32_t* lens = nullptr;  // [B], or [B, n_q] with lens_of_rows
  bool lens_of_rows = false;
  const int32_t *cu_q = nullptr, *cu_k = nullptr;  // [sequences + 1]
  const float* slopes = nullptr;                   // [H], or [B, H] with slopes_of_batch
  bool slopes_of_batch = false;
  const int64_t* seed = nullptr;

  AttentionTensors(const Tensor& q_, const Tensor& k_, const Tensor& v_, const OptionalTensor& bias_,
                   const OptionalTensor& mask_, const OptionalTensor& lens_, const OptionalTensor& cu_q_,
                   const OptionalTensor& cu_k_, const OptionalTensor& slopes_, const OptionalTensor& seed_)
      : q(head_rows(four(q_))), k(head_rows(four(k_))), v(head_rows(four(v_))) {
    batch = q_.size(0);
    heads = q_.size(1);
    n_q = q_.size(2);
    head_dim = q_.size(3);
    kv_heads = k_.size(1);
    n_k = k_.size(2);
    d_v = v_.size(3);
    for (const Tensor* t : {&k_, &v_})
      check(t->size(0) == batch && t->size(1) == kv_heads && t->size(2) == n_k && same(*t, q_, q_.scalar_type()),
            "k, v: expected [batch, kv_heads, n_k, *] in the dtype of q");
    check(k_.size(3) == head_dim && head_dim > 0 && d_v > 0, "k: expected the head_dim of q");
    check(kv_heads > 0 && heads % kv_heads == 0, "k: expected heads that divide those of q");
    check(n_q < (1 << 29) && n_k < (1 << 29), "q, k: expected a length below 2^29");  // positions plus windows are ints
    const int64_t scores[4] = {batch, heads, n_q, n_k};
    if (bias_) {
      const char* message = "bias: expected the dtype of q or float32, broadcastable to [batch, heads, n_q, n_k]";
      bias_is_float = bias_->scalar_type() == ScalarType::Float;
      check(same(*bias_, q_, bias_is_float ? ScalarType::Float : q_.scalar_type()), message);
      bias = ScoreTerm(*bias_, scores, message);
    }
    if (mask_) {
      const char* message = "mask: expected bool, broadcastable to [batch, heads, n_q, n_k]";
      check(same(*mask_, q_, ScalarType::Bool), message);
      mask = ScoreTerm(*mask_, scores, message);
    }
    if (lens_) {
      lens_of_rows = lens_->dim() == 2;
      lens_memory = as_contiguous(*lens_);
      lens = ints(*lens_memory, q_, lens_of_rows ? batch * n_q : batch, "lens: expected int32 [batch] or [batch, n_q]");
    }
    check(cu_q_.has_value() == cu_k_.has_value(), "cu_q, cu_k: expected both or none");
    sequences = 0;
    if (cu_q_) {
      sequences = cu_q_->numel() - 1;
      check(batch == 1 && sequences >= 0 && sequences < (1 << 30), "cu_q: expected [sequences + 1] and a batch of one");
      cu_q = ints(*cu_q_, q_, sequences + 1, "cu_q: expected int32 [sequences + 1]");
      cu_k = ints(*cu_k_, q_, sequences + 1, "cu_k: expected int32 [sequences + 1]");
    }
    if (slopes_) {
      check(slopes_->dim() == 2 && slopes_->size(1) == heads && slopes_->is_contiguous() &&
                (slopes_->size(0) == 1 || slopes_->size(0) == batch) && same(*slopes_, q_, ScalarType::Float),
            "slopes: expected contiguous float32 [1 or batch, heads]");
      slopes = static_cast<const float*>(slopes_->const_data_ptr());
      slopes_of_batch = slopes_->size(0) != 1;
    }
    seed = seed_pointer(q_, seed_);
  }

  bool packed() const { return cu_q != nullptr; }
  int64_t rows() const { return batch * heads * n_q; }

  // A tensor like [batch, heads, n_q, d_v]: grad, out.
  HeadRows like_out(const Tensor& t, const Tensor& q_) const {
    check(t.dim() == 4 && t.size(0) == batch && t.size(1) == heads && t.size(2) == n_q && t.size(3) == d_v &&
              same(t, q_, q_.scalar_type()),
          "grad, out: expected [batch, heads, n_q, d_v] in the dtype of q");
    return head_rows(t);
  }

  // lse or its gradient: contiguous float32 [batch, heads, n_q].
  const float* statistic(const Tensor& t, const Tensor& q_) const {
    check(t.is_contiguous() && t.numel() == rows() && same(t, q_, ScalarType::Float),
          "lse, grad_lse: expected contiguous float32 [batch, heads, n_q]");
    return static_cast<const float*>(t.const_data_ptr());
  }

 private:
  static const Tensor& four(const Tensor& t) {
    check(t.dim() == 4, "q, k, v: expected [batch, heads, length, head_dim]");
    return t;
  }
  static bool same(const Tensor& t, const Tensor& q, ScalarType dtype) {
    return t.scalar_type() == dtype && same_device(t, q);
  }
  static const int32_t* ints(const Tensor& t, const Tensor& q, int64_t count, const char* message) {
    check(same(t, q, ScalarType::Int) && t.is_contiguous() && t.numel() == count, message);
    return static_cast<const int32_t*>(t.const_data_ptr());
  }
};

}  // namespace fastdl
