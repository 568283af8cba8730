// The arguments of attention's kernels from the tensors of its wrappers.
#pragma once

#include "common/attention_tensors.h"
#include "cuda/attention_scores.cuh"
#include "cuda/wrapper.h"

namespace fastdl::cuda {

template <class T>
AttentionRows<T> attention_rows(const HeadRows& x) {
  constexpr auto kBytes = static_cast<int64_t>(sizeof(T));
  AttentionRows<T> rows{};
  if constexpr (std::is_const_v<T>)
    rows.data = x.data<std::remove_const_t<T>>();
  else
    rows.data = x.mutable_data<T>();
  rows.batch = x.batch;
  rows.head = x.head;
  rows.row = x.row;
  rows.width = static_cast<int>(x.width);
  rows.vectors = reinterpret_cast<uintptr_t>(rows.data) % 16 == 0;
  for (const int64_t step : {x.batch, x.head, x.row, x.width}) rows.vectors &= step * kBytes % 16 == 0;
  return rows;
}

inline AttentionScores attention_scores(const AttentionTensors& t, double p, double scale, double softcap, int64_t left,
                                        int64_t right) {
  // A window wider than all there is has no limit.
  const auto limit = [&](int64_t n) { return n < 0 || n > t.n_q + t.n_k ? -1 : static_cast<int>(n); };
  AttentionScores s{};
  s.batch = static_cast<int>(t.batch);
  s.heads = static_cast<int>(t.heads);
  s.kv_heads = static_cast<int>(t.kv_heads);
  s.n_q = static_cast<int>(t.n_q);
  s.n_k = static_cast<int>(t.n_k);
  s.left = limit(left);
  s.right = limit(right);
  s.scale = static_cast<float>(scale);
  s.lens = t.lens;
  s.lens_of_rows = t.lens_of_rows;
  s.cu_q = t.cu_q;
  s.cu_k = t.cu_k;
  s.sequences = static_cast<int>(t.sequences);
  s.bias_is_float = t.bias_is_float;
  s.slopes_of_batch = t.slopes_of_batch;
  s.softcap = static_cast<float>(softcap);
  s.p = static_cast<float>(p);
  s.keep = keep_scale(p);
  s.bias = t.bias.data;
  s.mask = static_cast<const bool*>(t.mask.data);
  std::copy(std::begin(t.bias.stride), std::end(t.bias.stride), s.bias_stride);
  std::copy(std::begin(t.mask.stride), std::end(t.mask.stride), s.mask_stride);
  s.slopes = t.slopes;
  s.seed = t.seed;
  // The kernels without options compare products before they scale them.
  s.general = s.bias || s.mask || s.slopes || s.seed || s.softcap > 0.0f || !(s.scale > 0.0f);
  return s;
}

}  // namespace fastdl::cuda
