// fastdl::attention_forward, CUDA key: checks, allocation, launch. Contract: fastdl/ops/attention.py.
#include "cuda/attention.cuh"
#include "cuda/attention_arguments.h"

namespace fastdl::cuda {
namespace {

std::tuple<Tensor, Tensor> attention_forward(const Tensor& q, const Tensor& k, const Tensor& v,
                                             const OptionalTensor& bias, const OptionalTensor& mask,
                                             const OptionalTensor& lens, const OptionalTensor& cu_q,
                                             const OptionalTensor& cu_k, const OptionalTensor& slopes,
                                             const OptionalTensor& seed, double p, double scale, double softcap,
                                             int64_t left, int64_t right) {
  const Device device(q);
  const AttentionTensors t(q, k, v, bias, mask, lens, cu_q, cu_k, slopes, seed);
  const Tensor out = attention_like(q, t.d_v);
  const Tensor lse = new_tensor(q, {t.batch, t.heads, t.n_q}, ScalarType::Float);
  for_float_type(q, "q", [&](auto type) {
    using T = decltype(type);
    AttentionForward<T> a{};
    a.q = attention_rows<const T>(t.q);
    a.k = attention_rows<const T>(t.k);
    a.v = attention_rows<const T>(t.v);
    a.out = attention_rows<T>(head_rows(out));
    a.lse = output<float>(lse);
    a.scores = attention_scores(t, p, scale, softcap, left, right);
    check_launch("attention_forward", attention_forward_launch(a, device.stream()));
  });
  return {out, lse};
}

}  // namespace

FASTDL_CUDA_LIBRARY(m) { m.impl("attention_forward", TORCH_BOX(&attention_forward)); }

}  // namespace fastdl::cuda
