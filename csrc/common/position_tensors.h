// What the CPU and CUDA wrappers of room position share: checks for memory safety, tensors as rows, and the outputs.
//
// An entry is a token with a position of its own: token i of n, or of a sequence of [batch, n]. `inner` rows of x share
// it: row (e / n * inner + j) * n + e % n for entry e and j < inner.
#pragma once

#include "common/rows.h"

namespace fastdl {

struct PositionTensors {
  Rows x;  // in the backward grad
  OptionalTensor positions;
  int64_t n, entries, inner;

  PositionTensors(const Tensor& x_, const OptionalTensor& positions_) : x(checked(x_)), n(x_.size(x_.dim() - 2)) {
    entries = n;
    inner = n > 0 ? x.count / n : 0;
    if (!positions_) return;
    const bool two = positions_->dim() == 2;
    check(positions_->scalar_type() == ScalarType::Long && same_device(*positions_, x_) &&
              (two ? x_.dim() > 2 && positions_->size(0) == x_.size(0) && positions_->size(1) == n
                   : positions_->dim() == 1 && positions_->size(0) == n),
          "positions: expected int64 [n] or [batch, n] on the device of x");
    if (two) {
      entries = positions_->numel();
      inner = entries > 0 ? x.count / entries : 0;
    }
    positions = as_contiguous(*positions_);
  }

  const int64_t* position_data() const { return static_cast<const int64_t*>(pointer(positions)); }

  // The rows start .. start + n - 1 of a table, where there are no positions, lie in it.
  void check_table(int64_t start, int64_t table_len) const {
    check(table_len >= 0 &&
              (positions ? table_len > 0 || entries == 0 : start >= 0 && start <= table_len && n <= table_len - start),
          "table: the positions do not lie in it");
  }

 private:
  static Rows checked(const Tensor& x) {
    check(x.dim() >= 2, "x: expected [..., n, dim]");
    if (x.numel() == 0) return {x, 0, 0, 0};  // no kernel runs
    return rows_of(x);
  }
};

// The table of the forward op.
struct PositionTable {
  Tensor table;
  bool is_float;

  PositionTable(const Tensor& x, const Tensor& table_) : table(as_contiguous(table_)) {
    is_float = table.scalar_type() == ScalarType::Float;
    check((is_float || table.scalar_type() == x.scalar_type()) && table.dim() == 2 &&
              table.size(1) == x.size(x.dim() - 1) && same_device(table, x),
          "table: expected [max_len, dim] in the dtype of x or float32");
  }
};

// What the backward op needs to add up a table's gradient, and its outputs.
struct PositionGradient {
  OptionalTensor order, begin;  // int64 [entries], [table_len + 1]; none: the positions are start, start + 1, ...
  Tensor dx, dtable;

  PositionGradient(const PositionTensors& t, const Tensor& grad, const OptionalTensor& order_,
                   const OptionalTensor& begin_, int64_t start, int64_t table_len, bool need_x, bool need_table) {
    const std::vector<int64_t> none{0}, shape{table_len, grad.size(grad.dim() - 1)};
    t.check_table(start, table_len);
    if (need_table && t.positions) {
      check(order_ && begin_ && order_->scalar_type() == ScalarType::Long &&
                begin_->scalar_type() == ScalarType::Long && order_->numel() == t.entries &&
                begin_->numel() == table_len + 1 && same_device(*order_, grad) && same_device(*begin_, grad),
            "order, begin: expected int64 [tokens] and [table_len + 1] on the device of grad");
      order = as_contiguous(*order_);
      begin = as_contiguous(*begin_);
    }
    dx = new_tensor(grad, need_x ? shape_of(grad) : none, grad.scalar_type());
    // Without an element no kernel runs, and the sums are zero.
    dtable = need_table && grad.numel() == 0 ? torch::stable::new_zeros(grad, shape, ScalarType::Float)
                                             : new_tensor(grad, need_table ? shape : none, ScalarType::Float);
  }
};

}  // namespace fastdl
