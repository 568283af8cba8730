// What the wrappers of lstm, gru and rnn share: checks for memory safety of the tensors that all of them take, made
// contiguous. Shapes: fastdl/reference/_recurrent.py.
#pragma once

#include <string>
#include <vector>

#include "common/rows.h"

namespace fastdl {

using Shape = std::vector<int64_t>;

// t if it has this shape and dtype and lies where `like` does, contiguous; else an error that names it.
inline Tensor expected(const char* name, const Tensor& t, const Tensor& like, const Shape& shape, ScalarType dtype) {
  if (shape_of(t) != shape || t.scalar_type() != dtype || !same_device(t, like)) {
    std::string text = std::string("fastdl: ") + name + ": expected a tensor of shape [";
    for (size_t i = 0; i < shape.size(); ++i) text += (i ? ", " : "") + std::to_string(shape[i]);
    text += dtype == ScalarType::Float  ? "], float32,"
            : dtype == ScalarType::Long ? "], int64,"
                                        : "] in the dtype of the input";
    throw std::runtime_error(text + " on its device");
  }
  return as_contiguous(t);
}

inline OptionalTensor expected(const char* name, const OptionalTensor& t, const Tensor& like, const Shape& shape,
                               ScalarType dtype) {
  if (!t) return std::nullopt;
  return expected(name, *t, like, shape, dtype);
}

// The sizes of a call, from the tensor that has one row a step [T, B, D, columns], and w_hh [D, gates * H, P].
struct RecurrentSizes {
  int64_t steps, batch, directions, hidden, size;

  RecurrentSizes(const Tensor& rows, const Tensor& w_hh, int64_t gates) {
    check(rows.dim() == 4 && w_hh.dim() == 3, "expected [T, B, D, columns] and w_hh [D, gates * H, P]");
    steps = rows.size(0), batch = rows.size(1), directions = rows.size(2);
    hidden = w_hh.size(1) / gates, size = w_hh.size(2);
    check((directions == 1 || directions == 2) && hidden > 0 && size > 0, "expected 1 or 2 directions, hidden units");
    // A step's rows are counted in 32 bits.
    check(batch <= 0x3fffffff && hidden <= 0x1fffffff, "too many sequences or hidden units");
  }
  Shape rows(int64_t columns) const { return {steps, batch, directions, columns}; }
  Shape state(int64_t columns) const { return {directions, batch, columns}; }
};

// Options of all three rooms.
struct RecurrentOptions {
  OptionalTensor h_mask, lengths, seed;

  RecurrentOptions(const RecurrentSizes& n, const Tensor& like, const OptionalTensor& h_mask_,
                   const OptionalTensor& lengths_, const OptionalTensor& seed_)
      : h_mask(expected("h_mask", h_mask_, like, n.state(n.size), ScalarType::Float)),
        lengths(expected("lengths", lengths_, like, {n.batch}, ScalarType::Long)),
        seed(expected("seed", seed_, like, {2}, ScalarType::Long)) {}
};

inline Tensor new_floats(const Tensor& like, const Shape& shape) { return new_tensor(like, shape, ScalarType::Float); }

inline Tensor new_zero_floats(const Tensor& like, const Shape& shape) {
  return torch::stable::new_zeros(like, shape, ScalarType::Float);
}

}  // namespace fastdl
