// What the CPU and CUDA wrappers of room linear_scan share: checks for memory safety, strides, and the outputs.
//
// Kernels walk in the order of the recurrence: step p is time p, or, with reverse, time length - 1 - p. That is a first
// address and a stride, which is negative with reverse.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <tuple>
#include <vector>

#include "common/rows.h"

namespace fastdl {

using ThreeTensors = std::tuple<Tensor, Tensor, Tensor>;

// A tensor [batch, length, channels] whose channels lie side by side.
struct Steps {
  Tensor tensor;        // holds the memory
  int64_t batch, step;  // strides in elements, step in the order of the recurrence
  int64_t first;        // elements before step 0 of batch 0
  int64_t element_bytes;

  const uint8_t* data() const { return static_cast<const uint8_t*>(tensor.const_data_ptr()) + first * element_bytes; }
  uint8_t* mutable_data() const { return static_cast<uint8_t*>(tensor.mutable_data_ptr()) + first * element_bytes; }
};

inline bool scan_complex(const Tensor& x) { return x.scalar_type() == ScalarType::ComplexFloat; }

inline Steps steps_of(const Tensor& x, bool reverse) {
  const Tensor t = x.size(2) <= 1 || x.stride(2) == 1 ? x : torch::stable::contiguous(x);
  const int64_t bytes = scan_complex(t) ? 8 : t.scalar_type() == ScalarType::Float ? 4 : 2;
  const int64_t last = t.size(1) > 0 ? (t.size(1) - 1) * t.stride(1) : 0;
  return {t, t.stride(0), reverse ? -t.stride(1) : t.stride(1), reverse ? last : 0, bytes};
}

struct LinearScanTensors {
  int64_t batch, length, channels;
  bool complex;
  OptionalTensor h0;  // [batch, channels] contiguous, float32 or complex64

  LinearScanTensors(const Tensor& like, const OptionalTensor& h0_) : complex(scan_complex(like)) {
    check(like.dim() == 3, "expected [batch, length, channels]");
    batch = like.size(0);
    length = like.size(1);
    channels = like.size(2);
    if (!h0_) return;
    check(h0_->scalar_type() == state_type() && h0_->dim() == 2 && h0_->size(0) == batch && h0_->size(1) == channels &&
              same_device(*h0_, like),
          "h0: expected [batch, channels] in float32, or complex64 where b is complex");
    h0 = as_contiguous(*h0_);
  }

  ScalarType state_type() const { return complex ? ScalarType::ComplexFloat : ScalarType::Float; }
  bool empty() const { return batch == 0 || length == 0 || channels == 0; }
};

struct LinearScanForward : LinearScanTensors {
  Steps a, b;
  Tensor h;

  LinearScanForward(const Tensor& a_, const Tensor& b_, const OptionalTensor& h0_, bool reverse)
      : LinearScanTensors(b_, h0_),
        a(checked(b_, a_, reverse)),
        b(steps_of(b_, reverse)),
        h(new_tensor(b_, shape_of(b_), b_.scalar_type())) {}

 private:
  static Steps checked(const Tensor& b, const Tensor& a, bool reverse) {
    check_like(b, a, "a: expected shape, dtype and device of b");
    return steps_of(a, reverse);
  }
};

struct LinearScanBackward : LinearScanTensors {
  Steps grad, a, h;
  Tensor da, db, dh0;  // dh0 is zero where no step writes it

  LinearScanBackward(const Tensor& grad_, const Tensor& a_, const Tensor& h_, const OptionalTensor& h0_, bool reverse,
                     bool need_a)
      : LinearScanTensors(h_, h0_),
        grad(checked(h_, grad_, "grad: expected shape, dtype and device of h", reverse)),
        a(checked(h_, a_, "a: expected shape, dtype and device of h", reverse)),
        h(steps_of(h_, reverse)),
        da(new_tensor(h_, need_a ? shape_of(h_) : std::vector<int64_t>{0}, h_.scalar_type())),
        db(new_tensor(h_, shape_of(h_), h_.scalar_type())),
        dh0(empty() ? torch::stable::new_zeros(h_, {batch, channels}, state_type())
                    : new_tensor(h_, {batch, channels}, state_type())) {}

 private:
  static Steps checked(const Tensor& h, const Tensor& other, const char* message, bool reverse) {
    check_like(h, other, message);
    return steps_of(other, reverse);
  }
};

}  // namespace fastdl
