// What the CPU and CUDA wrappers of room additive_attention share: checks for memory safety, strides, outputs.
#pragma once

#include <tuple>
#include <vector>

#include "common/rows.h"

namespace fastdl {

using AdditiveOutputs = std::tuple<Tensor, Tensor>;                    // out or log-probabilities, statistics
using AdditiveGradients = std::tuple<Tensor, Tensor, Tensor, Tensor>;  // dq, dk, dv, dw
using AdditivePointerGradients = std::tuple<Tensor, Tensor, Tensor>;   // dq, dk, dw

// [batch, rows, cols] with cols side by side; a copy where they are not.
struct BatchedRows {
  Tensor tensor;  // holds the memory
  int64_t batch = 0, row = 0;

  BatchedRows() = default;
  explicit BatchedRows(const Tensor& x)
      : tensor(x.size(2) <= 1 || x.stride(2) == 1 ? x : torch::stable::contiguous(x)),
        batch(tensor.stride(0)),
        row(tensor.stride(1)) {}

  const void* data() const { return tensor.const_data_ptr(); }
};

// Where a query may attend: mask and lengths, strides 0 where they are broadcast.
struct AdditiveMask {
  OptionalTensor mask_tensor, lens_tensor;
  const uint8_t* mask = nullptr;
  const int32_t* lens = nullptr;
  int64_t mask_batch = 0, mask_query = 0, mask_key = 0, lens_batch = 0, lens_query = 0;
};

// Sizes and inputs of all four ops; v is absent in those of the pointer.
struct AdditiveTensors {
  int64_t batch, queries, keys, hidden, d_v;
  BatchedRows q, k, v;
  Tensor w;
  AdditiveMask seen;

  AdditiveTensors(const Tensor& q_, const Tensor& k_, const OptionalTensor& v_, const Tensor& w_,
                  const OptionalTensor& mask, const OptionalTensor& lens) {
    check(q_.dim() == 3 && k_.dim() == 3, "q, k: expected [batch, rows, hidden]");
    batch = q_.size(0);
    queries = q_.size(1);
    hidden = q_.size(2);
    keys = k_.size(1);
    check(hidden > 0 && k_.size(0) == batch && k_.size(2) == hidden && like(q_, k_),
          "k: expected [batch, keys, hidden] in the dtype and on the device of q");
    check(w_.dim() == 1 && w_.size(0) == hidden && same_device(w_, q_) &&
              (w_.scalar_type() == q_.scalar_type() || w_.scalar_type() == ScalarType::Float),
          "w: expected [hidden] in the dtype of q or float32");
    d_v = 0;
    if (v_) {
      check(v_->dim() == 3 && v_->size(0) == batch && v_->size(1) == keys && v_->size(2) > 0 && like(q_, *v_),
            "v: expected [batch, keys, d_v] in the dtype and on the device of q");
      d_v = v_->size(2);
      v = BatchedRows(*v_);
    }
    q = BatchedRows(q_);
    k = BatchedRows(k_);
    w = as_contiguous(w_);
    set_mask(q_, mask);
    set_lens(q_, lens);
  }

  // What the forward saved: out (null for the pointer) and statistics.
  void check_saved(const Tensor& q_, const Tensor* out, const Tensor& statistics) const {
    check(!out || (out->dim() == 3 && out->size(0) == batch && out->size(1) == queries && out->size(2) == d_v &&
                   like(q_, *out)),
          "out: expected [batch, queries, d_v] in the dtype and on the device of q");
    check(statistics.scalar_type() == ScalarType::Float && statistics.dim() == 3 && statistics.size(0) == 2 &&
              statistics.size(1) == batch && statistics.size(2) == queries && same_device(statistics, q_),
          "statistics: expected float32 [2, batch, queries] on the device of q");
  }

  void check_pointer_grad(const Tensor& q_, const Tensor& grad) const {
    check(grad.scalar_type() == ScalarType::Float && grad.dim() == 3 && grad.size(0) == batch &&
              grad.size(1) == queries && grad.size(2) == keys && same_device(grad, q_),
          "grad: expected float32 [batch, queries, keys] on the device of q");
  }

  // What a kernel would write nothing for.
  bool empty() const { return batch == 0 || queries == 0; }

 private:
  static bool like(const Tensor& q, const Tensor& x) { return x.scalar_type() == q.scalar_type() && same_device(x, q); }

  void set_mask(const Tensor& q_, const OptionalTensor& mask) {
    if (!mask) return;
    const int64_t full[3] = {batch, queries, keys};
    check(mask->scalar_type() == ScalarType::Bool && mask->dim() == 3 && same_device(*mask, q_),
          "mask: expected a boolean tensor of three dimensions on the device of q");
    int64_t strides[3];
    for (int64_t d = 0; d < 3; ++d) {
      check(mask->size(d) == full[d] || mask->size(d) == 1, "mask: expected [batch, queries, keys], each of them or 1");
      strides[d] = mask->size(d) == 1 ? 0 : mask->stride(d);
    }
    seen.mask_tensor = mask;
    seen.mask = static_cast<const uint8_t*>(mask->const_data_ptr());
    seen.mask_batch = strides[0];
    seen.mask_query = strides[1];
    seen.mask_key = strides[2];
  }

  void set_lens(const Tensor& q_, const OptionalTensor& lens) {
    if (!lens) return;
    check(lens->scalar_type() == ScalarType::Int && same_device(*lens, q_) && lens->size(0) == batch &&
              (lens->dim() == 1 || (lens->dim() == 2 && lens->size(1) == queries)),
          "valid_lens: expected int32 [batch] or [batch, queries] on the device of q");
    seen.lens_tensor = lens;
    seen.lens = static_cast<const int32_t*>(lens->const_data_ptr());
    seen.lens_batch = lens->stride(0);
    seen.lens_query = lens->dim() == 2 ? lens->stride(1) : 0;
  }
};

// Keys of a chunk, a multiple of `tile`, and how many chunks: at most 16 of at least `least` keys. A function of the
// number of keys alone, because results of chunks are merged in order and no row may depend on the others.
struct KeyChunks {
  int64_t length, count;

  KeyChunks(int64_t keys, int64_t least, int64_t tile) {
    const int64_t wanted = std::max(least, (keys + 15) / 16);
    length = (wanted + tile - 1) / tile * tile;
    count = std::max<int64_t>(1, (keys + length - 1) / length);
  }
};

inline Tensor float_tensor(const Tensor& x, const std::vector<int64_t>& shape) {
  return new_tensor(x, shape, ScalarType::Float);
}

// A gradient that no kernel writes is zero.
inline Tensor new_gradient(const Tensor& x, bool zero) {
  return zero ? torch::stable::new_zeros(x, shape_of(x), x.scalar_type()) : new_tensor(x, shape_of(x), x.scalar_type());
}

}  // namespace fastdl
