// What the CPU wrappers of group_norm and batch_norm share: the size of a team, and working memory in floats.
#pragma once

#include <algorithm>
#include <initializer_list>

#include "common/images.h"

namespace fastdl {

// Threads for `items` of `size` elements each; waking up a second thread costs more than 16 K elements take.
inline int team(int64_t items, int64_t size) {
  return items * size < 16 * 1024 ? 1 : static_cast<int>(std::min<int64_t>(thread_count(), items));
}

// `count` floats for the caller, and behind them the parameters in float32, where they are of another type.
class FloatScratch {
 public:
  FloatScratch(int64_t count, std::initializer_list<const Parameter*> parameters)
      : memory_(allocate_bytes(bytes(count, parameters))),
        data_(reinterpret_cast<float*>(first_byte(memory_))),
        next_(data_ + padded(count * 4) / 4) {}

  float* data() const { return data_; }

  const float* floats(const Parameter& p, int format, void (*convert)(const void*, int, int64_t, float*)) {
    if (!p.tensor || p.is_float) return static_cast<const float*>(p.data());
    float* const to = next_;
    next_ += padded(p.tensor->numel() * 4) / 4;
    convert(p.data(), format, p.tensor->numel(), to);
    return to;
  }

 private:
  static int64_t bytes(int64_t count, std::initializer_list<const Parameter*> parameters) {
    int64_t all = padded(count * 4);
    for (const Parameter* p : parameters)
      if (p->tensor && !p->is_float) all += padded(p->tensor->numel() * 4);
    return all;
  }

  Tensor memory_;
  float* data_;
  float* next_;
};

}  // namespace fastdl
