// fastdl::additive_attention_forward and _backward, additive_pointer_forward and _backward, CUDA key: checks, allocation,
// launches. Contract: fastdl/ops/additive_attention.py.
#include "common/additive_attention_tensors.h"
#include "cuda/additive_attention_backward.cuh"
#include "cuda/wrapper.h"

namespace fastdl::cuda {
namespace {

template <class T>
AdditiveRows<T> rows(const BatchedRows& x) {
  return {static_cast<const T*>(x.data()), x.batch, x.row};
}

// Sizes, inputs and the exponentials of q and k. `memory` holds what they need.
template <class T>
Additive<T> plan(const AdditiveTensors& t, const Tensor& q, int64_t least_keys, Tensor& memory, cudaStream_t stream) {
  Additive<T> a{};
  a.q = rows<T>(t.q);
  a.k = rows<T>(t.k);
  if (t.d_v > 0) a.v = rows<T>(t.v);
  a.mask = t.seen.mask;
  a.lens = t.seen.lens;
  a.mask_batch = t.seen.mask_batch;
  a.mask_query = t.seen.mask_query;
  a.mask_key = t.seen.mask_key;
  a.lens_batch = t.seen.lens_batch;
  a.lens_query = t.seen.lens_query;
  a.batch = t.batch;
  a.queries = t.queries;
  a.keys = t.keys;
  a.hidden = t.hidden;
  a.d_v = t.d_v;
  const KeyChunks chunks(t.keys, least_keys, kAdditiveKeys);
  a.chunk = chunks.length;
  a.chunks = chunks.count;
  check(t.batch < 65536, "batch: expected fewer than 65536 sequences");
  const int64_t q_count = t.batch * t.queries, k_count = t.batch * t.keys;
  memory = float_tensor(q, {(q_count + k_count) * (2 * t.hidden + 1) + t.hidden});
  float* next = output<float>(memory);
  const auto take = [&](int64_t count) {
    float* const found = next;
    next += count;
    return found;
  };
  a.q_e = {take(q_count * t.hidden), take(q_count * t.hidden), take(q_count)};
  a.k_e = {take(k_count * t.hidden), take(k_count * t.hidden), take(k_count)};
  float* const w = take(t.hidden);
  for_float_type(t.w, "w", [&](auto type) {
    using W = decltype(type);
    check_launch("additive_attention", launch(additive_attention_floats<W>, additive_blocks(t.hidden, 128), dim3(128),
                                              0, stream, static_cast<const W*>(t.w.const_data_ptr()), w, t.hidden));
  });
  a.w = w;
  check_launch("additive_attention", additive_prepare_launch(a, stream));
  return a;
}

constexpr int64_t kForwardKeys = 256, kBackwardKeys = 32;  // least keys of a chunk

AdditiveOutputs forward(const Tensor& q, const Tensor& k, const OptionalTensor& v, const Tensor& w,
                        const OptionalTensor& mask, const OptionalTensor& valid_lens) {
  const Device device(q);
  const AdditiveTensors t(q, k, v, w, mask, valid_lens);
  const Tensor found =
      v ? new_tensor(q, {t.batch, t.queries, t.d_v}, q.scalar_type()) : float_tensor(q, {t.batch, t.queries, t.keys});
  const Tensor statistics = float_tensor(q, {2, t.batch, t.queries});
  if (t.empty()) return {found, statistics};
  for_float_type(q, "q", [&](auto type) {
    using T = decltype(type);
    Tensor memory;
    Additive<T> a = plan<T>(t, q, kForwardKeys, memory, device.stream());
    const int64_t each = t.batch * t.queries;
    const Tensor parts = float_tensor(q, {a.chunks * each * (2 + t.d_v)});
    a.part_state = output<float>(parts);
    a.part_out = a.part_state + a.chunks * each * 2;
    a.statistics = output<float>(statistics);
    if (v)
      a.out = output<T>(found);
    else
      a.scores = output<float>(found);
    check_launch("additive_attention_forward", additive_forward_launch(a, device.stream()));
  });
  return {found, statistics};
}

AdditiveGradients backward(const Tensor& grad, const Tensor& q, const Tensor& k, const OptionalTensor& v,
                           const Tensor& w, const OptionalTensor& mask, const OptionalTensor& valid_lens,
                           const Tensor* out, const Tensor& statistics) {
  const Device device(q);
  const AdditiveTensors t(q, k, v, w, mask, valid_lens);
  if (v)
    check_like(*out, grad, "grad: expected shape, dtype and device of out");
  else
    t.check_pointer_grad(q, grad);
  t.check_saved(q, out, statistics);
  const bool none = t.empty() || t.keys == 0;
  const Tensor dq = new_gradient(q, none), dk = new_gradient(k, none), dv = v ? new_gradient(*v, none) : Tensor();
  const Tensor dw = none ? torch::stable::new_zeros(q, {t.hidden}, ScalarType::Float) : float_tensor(q, {t.hidden});
  if (none) return {dq, dk, dv, dw};
  for_float_type(q, "q", [&](auto type) {
    using T = decltype(type);
    Tensor memory;
    Additive<T> a = plan<T>(t, q, kBackwardKeys, memory, device.stream());
    const BatchedRows rows_of_grad(grad);
    const Tensor whole = as_contiguous(statistics), whole_out = v ? as_contiguous(*out) : whole;
    a.statistics = const_cast<float*>(static_cast<const float*>(whole.const_data_ptr()));
    if (v) {
      a.grad = rows<T>(rows_of_grad);
      a.kept_out = {static_cast<const T*>(whole_out.const_data_ptr()), t.queries * t.d_v, t.d_v};
      a.dv = output<T>(dv);
    } else {
      a.grad_scores = rows<float>(rows_of_grad);
    }
    const int64_t q_count = t.batch * t.queries, k_count = t.batch * t.keys, parts = a.chunks;
    const Tensor sums =
        float_tensor(q, {(parts * (q_count + t.batch) + k_count) * t.hidden + k_count * t.d_v + q_count});
    a.dq_parts = output<float>(sums);
    a.dw_parts = a.dq_parts + parts * q_count * t.hidden;
    a.dk_sum = a.dw_parts + parts * t.batch * t.hidden;
    a.dv_sum = a.dk_sum + k_count * t.hidden;
    a.row_sums = a.dv_sum + k_count * t.d_v;
    a.dq = output<T>(dq);
    a.dk = output<T>(dk);
    a.dw = output<float>(dw);
    check_launch("additive_attention_backward", additive_backward_launch(a, device.stream()));
  });
  return {dq, dk, dv, dw};
}

AdditiveOutputs additive_attention_forward(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& w,
                                           const OptionalTensor& mask, const OptionalTensor& valid_lens) {
  return forward(q, k, v, w, mask, valid_lens);
}

AdditiveOutputs additive_pointer_forward(const Tensor& q, const Tensor& k, const Tensor& w, const OptionalTensor& mask,
                                         const OptionalTensor& valid_lens) {
  return forward(q, k, std::nullopt, w, mask, valid_lens);
}

AdditiveGradients additive_attention_backward(const Tensor& grad, const Tensor& q, const Tensor& k, const Tensor& v,
                                              const Tensor& w, const OptionalTensor& mask,
                                              const OptionalTensor& valid_lens, const Tensor& out,
                                              const Tensor& statistics) {
  return backward(grad, q, k, v, w, mask, valid_lens, &out, statistics);
}

AdditivePointerGradients additive_pointer_backward(const Tensor& grad, const Tensor& q, const Tensor& k,
                                                   const Tensor& w, const OptionalTensor& mask,
                                                   const OptionalTensor& valid_lens, const Tensor& statistics) {
  const auto [dq, dk, dv, dw] = backward(grad, q, k, std::nullopt, w, mask, valid_lens, nullptr, statistics);
  return {dq, dk, dw};
}

}  // namespace

FASTDL_CUDA_LIBRARY(m) {
  m.impl("additive_attention_forward", TORCH_BOX(&additive_attention_forward));
  m.impl("additive_attention_backward", TORCH_BOX(&additive_attention_backward));
  m.impl("additive_pointer_forward", TORCH_BOX(&additive_pointer_forward));
  m.impl("additive_pointer_backward", TORCH_BOX(&additive_pointer_backward));
}

}  // namespace fastdl::cuda
