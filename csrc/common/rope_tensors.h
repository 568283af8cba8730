// What the CPU and CUDA wrappers of room rope share: checks for memory safety, outputs in the memory order of their inputs,
// and tensors of any strides as [batch][heads][n][head_dim].
#pragma once

#include "common/rows.h"

namespace fastdl {

// How many dimensions of heads, and how far apart: of a result y beside its input x, both in elements.
struct HeadDim {
  int64_t size = 1, x = 0, y = 0;
};

// Memory for a result: dense, its dimensions in the order of x's memory, a head's elements side by side. Where x shares
// memory or scatters a head it is contiguous. The rule of fastdl/reference/rope.py.
inline Tensor like_in_memory(const Tensor& x) {
  const int64_t dims = x.dim();
  check(dims >= 2 && dims <= 64, "a tensor of less than 2 or more than 64 dimensions");
  int64_t order[64], strides[64];
  bool plain = x.stride(dims - 1) != 1 && x.size(dims - 1) != 1;
  for (int64_t d = 0; d < dims; ++d) {
    order[d] = d;
    plain = plain || (x.stride(d) == 0 && x.size(d) > 1);
  }
  if (!plain)
    std::stable_sort(order, order + dims - 1, [&](int64_t a, int64_t b) { return x.stride(a) > x.stride(b); });
  for (int64_t i = dims - 1, step = 1; i >= 0; --i) {
    strides[order[i]] = step;
    step *= std::max<int64_t>(1, x.size(order[i]));
  }
  const std::vector<int64_t> shape = shape_of(x);
  return new_strided(x, dims, shape.data(), strides, x.scalar_type());
}

// One of q and k. A kernel is called once for each index of `outer`: dimensions that do not merge into batch and heads,
// which ordinary layouts do not have.
struct RopeTensor {
  Tensor x, y;
  HeadDim batch, heads, n;
  int64_t head_dim;
  std::vector<HeadDim> outer;

  // by_batch: the first dimension has positions of its own and merges with no other.
  RopeTensor(const Tensor& x_, bool by_batch) : x(x_), y(like_in_memory(x_)) {
    const int64_t dims = x.dim();
    head_dim = x.size(dims - 1);
    if (x.stride(dims - 1) != 1 && head_dim != 1) x = torch::stable::contiguous(x);
    const auto dim = [&](int64_t d) { return HeadDim{x.size(d), x.stride(d), y.stride(d)}; };
    n = dim(dims - 2);
    if (by_batch) {
      check(dims > 2, "positions: expected [n] for [n, head_dim]");
      batch = dim(0);
    }
    for (int64_t d = dims - 3; d >= (by_batch ? 1 : 0); --d) {
      const HeadDim next = dim(d);
      if (next.size == 1) continue;
      HeadDim* const last = outer.empty() ? nullptr : &outer.back();
      if (last && next.x == last->x * last->size && next.y == last->y * last->size)
        last->size *= next.size;
      else
        outer.push_back(next);
    }
    take(heads);
    if (!by_batch) take(batch);
  }

  bool empty() const { return x.numel() == 0; }

  // body(first element of x, of y) for each index of the outer dimensions.
  template <class Body>
  void for_each_outer(const Body& body) const {
    std::vector<int64_t> index(outer.size(), 0);
    for (int64_t x_at = 0, y_at = 0;;) {
      body(x_at, y_at);
      size_t d = 0;
      for (; d < outer.size(); ++d) {
        x_at += outer[d].x;
        y_at += outer[d].y;
        if (++index[d] < outer[d].size) break;
        x_at -= outer[d].x * outer[d].size;
        y_at -= outer[d].y * outer[d].size;
        index[d] = 0;
      }
      if (d == outer.size()) return;
    }
  }

 private:
  void take(HeadDim& to) {
    if (outer.empty()) return;
    to = outer.front();
    outer.erase(outer.begin());
  }
};

struct RopeTensors {
  RopeTensor q;
  std::optional<RopeTensor> k;
  Tensor cos_sin, positions;                // positions: cos_sin where there are none
  bool given;                               // positions are
  int64_t max_len, rope_dim, batch_stride;  // of positions; 0: the same for every sequence

  RopeTensors(const Tensor& q_, const OptionalTensor& k_, const Tensor& table, const OptionalTensor& positions_,
              int64_t start)
      : q(q_, positions_ && positions_->dim() == 2),
        cos_sin(as_contiguous(table)),
        positions(positions_ ? as_contiguous(*positions_) : table),
        given(positions_.has_value()) {
    check(table.scalar_type() == ScalarType::Float && table.dim() == 2 && table.size(1) % 2 == 0 &&
              table.size(1) <= q.head_dim && same_device(table, q_),
          "cos_sin: expected float32 [max_len, rope_dim] on the device of q");
    if (k_) {
      k.emplace(*k_, given && positions.dim() == 2);
      check(k_->scalar_type() == q_.scalar_type() && same_device(*k_, q_) && k->n.size == q.n.size &&
                k->head_dim == q.head_dim && (!given || positions.dim() == 1 || k->batch.size == q.batch.size),
            "k: expected the dtype, device, n and head_dim of q");
    }
    max_len = table.size(0);
    rope_dim = table.size(1);
    const int64_t n = q.n.size;
    if (given) {
      const bool two = positions.dim() == 2;
      check(positions.scalar_type() == ScalarType::Long && same_device(positions, q_) &&
                (two ? positions.size(0) == q.batch.size && positions.size(1) == n
                     : positions.dim() == 1 && positions.size(0) == n),
            "positions: expected int64 [n] or [batch, n] on the device of q");
      check(max_len > 0 || positions.numel() == 0, "cos_sin: it has no rows");
      batch_stride = two ? n : 0;
    } else {
      check(start >= 0 && start <= max_len && n <= max_len - start, "start: the positions do not lie in the table");
      batch_stride = 0;
    }
  }

  const int64_t* position_data() const {
    return given ? static_cast<const int64_t*>(positions.const_data_ptr()) : nullptr;
  }
};

}  // namespace fastdl
