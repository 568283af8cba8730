// fastdl::rope_turn, CUDA key: checks, allocation, launches. Contract: fastdl/ops/rope.py.
#include "cuda/rope.cuh"

#include "common/rope_tensors.h"
#include "cuda/wrapper.h"

namespace fastdl::cuda {
namespace {

// q or k at each index of its outer dimensions.
template <class T>
std::vector<RopeHeads<T>> heads_of(const RopeTensor& t) {
  std::vector<RopeHeads<T>> found;
  if (t.empty()) return found;
  t.for_each_outer([&](int64_t x_at, int64_t y_at) {
    RopeHeads<T> h{};
    h.x = static_cast<const T*>(t.x.const_data_ptr()) + x_at;
    h.y = output<T>(t.y) + y_at;
    h.batch = t.batch.size, h.heads = t.heads.size;
    h.x_batch = t.batch.x, h.x_head = t.heads.x, h.x_row = t.n.x;
    h.y_batch = t.batch.y, h.y_head = t.heads.y, h.y_row = t.n.y;
    found.push_back(h);
  });
  return found;
}

std::tuple<Tensor, Tensor> rope_turn(const Tensor& q, const OptionalTensor& k, const Tensor& cos_sin,
                                     const OptionalTensor& positions, int64_t start, bool interleaved, bool backward) {
  const Device device(q);
  const RopeTensors t(q, k, cos_sin, positions, start);
  check(t.q.head_dim < int64_t{1} << 30 && t.q.n.size < int64_t{1} << 31, "q: head_dim or n is too large");
  const std::vector<int64_t> none{0};
  for_float_type(q, "q", [&](auto type) {
    using T = decltype(type);
    Rope<T> r{};
    r.cos_sin = static_cast<const float*>(t.cos_sin.const_data_ptr());
    r.positions = t.position_data();
    r.start = start;
    r.batch_stride = t.batch_stride;
    r.max_len = t.max_len;
    r.n = t.q.n.size;
    r.rope_dim = static_cast<int>(t.rope_dim);
    r.head_dim = static_cast<int>(t.q.head_dim);
    r.back = backward;
    std::vector<RopeHeads<T>> first = heads_of<T>(t.q), second;
    if (t.k) second = heads_of<T>(*t.k);
    if (first.empty()) first.swap(second);
    for (size_t i = 0; i < std::max(first.size(), second.size()); ++i) {
      // Both in one launch; where one has more outer indices, it goes on alone.
      r.q = i < first.size() ? first[i] : second[i];
      r.k = i < first.size() && i < second.size() ? second[i] : RopeHeads<T>{};
      check_launch("rope_turn", rope_turn_launch(r, interleaved, device.stream()));
    }
  });
  return {t.q.y, t.k ? t.k->y : new_tensor(q, none, q.scalar_type())};
}

}  // namespace

FASTDL_CUDA_LIBRARY(m) { m.impl("rope_turn", TORCH_BOX(&rope_turn)); }

}  // namespace fastdl::cuda
