// fastdl::attention_backward, CUDA key: checks, allocation, launches. Contract: fastdl/ops/attention.py.
#include "cuda/attention_backward.cuh"

#include "cuda/attention_arguments.h"
#include "cuda/attention_bias.cuh"

namespace fastdl::cuda {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor> attention_backward(
    const Tensor& grad, const OptionalTensor& grad_lse, const Tensor& q, const Tensor& k, const Tensor& v,
    const Tensor& out, const Tensor& lse, const OptionalTensor& bias, const OptionalTensor& mask,
    const OptionalTensor& lens, const OptionalTensor& cu_q, const OptionalTensor& cu_k, const OptionalTensor& slopes,
    const OptionalTensor& seed, double p, double scale, double softcap, int64_t left, int64_t right, bool need_bias) {
  const Device device(q);
  const AttentionTensors t(q, k, v, bias, mask, lens, cu_q, cu_k, slopes, seed);
  check(!need_bias || (bias && !t.packed()), "need_bias: expected a bias, and no packed sequences");
  const HeadRows grads = t.like_out(grad, q), outs = t.like_out(out, q);
  const Tensor dq = attention_like(q, t.head_dim), dk = attention_like(k, t.head_dim), dv = attention_like(v, t.d_v);
  const Tensor dbias = new_tensor(q, need_bias ? shape_of(*bias) : std::vector<int64_t>{0}, ScalarType::Float);
  const Tensor statistics = new_tensor(q, {2, t.rows()}, ScalarType::Float);
  for_float_type(q, "q", [&](auto type) {
    using T = decltype(type);
    AttentionBackward<T> a{};
    a.grad = attention_rows<const T>(grads);
    a.q = attention_rows<const T>(t.q);
    a.k = attention_rows<const T>(t.k);
    a.v = attention_rows<const T>(t.v);
    a.out = attention_rows<const T>(outs);
    a.dq = attention_rows<T>(head_rows(dq));
    a.dk = attention_rows<T>(head_rows(dk));
    a.dv = attention_rows<T>(head_rows(dv));
    a.lse = t.statistic(lse, q);
    a.grad_lse = grad_lse ? t.statistic(*grad_lse, q) : nullptr;
    a.origin = output<float>(statistics);
    a.delta = a.origin + t.rows();
    a.scores = attention_scores(t, p, scale, softcap, left, right);
    check_launch("attention_backward", attention_backward_launch(a, device.stream()));
    if (!need_bias) return;
    a.dbias = output<float>(dbias);
    for (int d = 0; d < 4; ++d) a.whole[d] = bias->size(d) != 1;
    check_launch("attention_backward", attention_bias_launch(a, device.stream()));
  });
  return {dq, dk, dv, dbias};
}

}  // namespace

FASTDL_CUDA_LIBRARY(m) { m.impl("attention_backward", TORCH_BOX(&attention_backward)); }

}  // namespace fastdl::cuda
