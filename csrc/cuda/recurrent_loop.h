// What the wrappers of lstm, gru and rnn share on the host: the product of a step, by ATen through the stable ABI, the step
// loops around it, and the choice of the kernel that stays for the whole sequence.
#pragma once

#include <array>

#include "common/recurrent_tensors.h"
#include "cuda/recurrent_loop.cuh"
#include "cuda/recurrent_persistent.cuh"
#include "cuda/wrapper.h"

namespace fastdl::cuda {

template <class T>
const T* input(const Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}
template <class T>
const T* input(const OptionalTensor& t) {
  return t ? input<T>(*t) : nullptr;
}
template <class T>
T* output(const OptionalTensor& t) {
  return t ? output<T>(*t) : nullptr;
}

inline Sequence sequence_of(const RecurrentSizes& n, const RecurrentOptions& options, double zoneout_h,
                            double zoneout_c, double eps) {
  return {input<int64_t>(options.lengths),
          input<float>(options.h_mask),
          input<int64_t>(options.seed),
          n.steps,
          n.batch,
          n.directions,
          n.hidden,
          n.size,
          static_cast<float>(zoneout_h),
          static_cast<float>(zoneout_c),
          static_cast<float>(eps)};
}

// out [D, B, N] float32 = operand [D, B, K] weight, for a weight [D, K, N] or, transposed, [D, N, K]. Operand and weight
// are of one type; the sum is float32 and is not rounded. Overloads with `out`: autocast leaves them alone.
class StepProduct {
 public:
  StepProduct(const Tensor& operand, const Tensor& weight, bool transposed) : operand_(operand), weight_(weight) {
    out = new_floats(operand, {operand.size(0), operand.size(1), weight.size(transposed ? 1 : 2)});
    plain_ = operand.scalar_type() == ScalarType::Float;
#if defined(FASTDL_EMULATED)
    if (!plain_) {  // the CPU has no product of halves with a float32 sum: the same values, as float32
      weight_ = torch::stable::to(weight, ScalarType::Float);
      operand_ = new_floats(operand, shape_of(operand));
      source_ = operand;
      plain_ = true;
    }
#endif
    if (transposed) weight_ = torch::stable::transpose(weight_, 1, 2);
  }

  void run() {
    using torch::stable::detail::from;
    if (source_) torch::stable::copy_(operand_, *source_);
    std::array<StableIValue, 4> stack{from(operand_), from(weight_)};
    if (!plain_) stack[2] = from(ScalarType::Float);
    stack[plain_ ? 2 : 3] = from(out);
    STABLE_TORCH_ERROR_CODE_CHECK(
        torch_call_dispatcher("aten::bmm", plain_ ? "out" : "dtype_out", stack.data(), TORCH_ABI_VERSION));
    (void)torch::stable::detail::to<Tensor>(stack[0]);  // the same tensor once more, released
  }

  Tensor out;

 private:
  Tensor operand_, weight_;
  OptionalTensor source_;
  bool plain_;
};

// The whole sequence in one launch, launch(cell, Persistent<T>, stream); false where recurrent_plan.h prefers the loop.
template <class Cell, class Launch>
bool run_persistent(const char* op, const Cell& a, const Tensor& w_hh, bool backward, cudaStream_t stream,
                    const Launch& launch) {
  using T = typename Cell::Type;
  const Sequence& q = a.q;
  const int64_t rows = Cell::kGates * q.hidden;
  const PersistentTask task{sizeof(T),
                            std::is_same_v<T, bf16_t>,
                            q.steps,
                            q.batch,
                            q.directions,
                            q.hidden,
                            backward ? 1 : Cell::kGates,
                            backward ? rows : q.hidden,
                            Cell::kStates};
  const PersistentPlan plan = persistent_plan(task, device_limits());
  if (plan.units == 0) return false;
  const Shape exchange_shape{2, q.directions, q.batch, plan.depth}, one{1};
  const Tensor exchange = torch::stable::new_zeros(w_hh, exchange_shape, w_hh.scalar_type());
  const Tensor barrier = torch::stable::new_zeros(w_hh, one, ScalarType::Int);
  const Persistent<T> p{plan, input<T>(w_hh), output<T>(exchange), output<unsigned>(barrier)};
  check_launch(op, launch(a, p, stream));
  return true;
}

// All steps forward: step(LoopForward, k) launches what follows the product of step k. States start here.
template <class Cell, class Step>
void run_forward_loop(const char* op, const Cell& a, const Tensor& w_hh, cudaStream_t stream, const Step& step) {
  using T = typename Cell::Type;
  const Sequence& q = a.q;
  const int64_t states = q.directions * q.batch;
  const Tensor operand = new_tensor(w_hh, {q.directions, q.batch, q.size}, w_hh.scalar_type());
  check_launch(op, recurrent_start_launch(q, a.initial(0), a.last(0), output<T>(operand), states * q.size, stream));
  if constexpr (Cell::kStates > 1)
    check_launch(op, recurrent_start_launch<T>(q, a.initial(1), a.last(1), nullptr, states * q.hidden, stream));
  if (states == 0 || q.steps == 0) return;
  StepProduct product(operand, w_hh, true);
  const LoopForward<T> l{output<float>(product.out), output<T>(operand)};
  for (int64_t k = 0; k < q.steps; ++k) {
    product.run();
    step(l, k);
  }
}

// What the backward ops have for layer norm of the products with w_hh.
struct ProductNorm {
  OptionalTensor u, weight;  // [T, B, D, G * H] in the dtype of w_hh, [D, G * H]
  OptionalTensor sums;       // [B, D, G * H]: the weight's gradient before its sum over the batch
  Tensor dweight;            // [D, G * H], or [0]

  ProductNorm(const RecurrentSizes& n, const Tensor& w_hh, int64_t gates, const OptionalTensor& u_,
              const OptionalTensor& weight_) {
    const Shape none{0}, shape{n.directions, gates * n.hidden};
    weight = expected("ln_weight", weight_, w_hh, shape, ScalarType::Float);
    check(!weight || u_, "u: expected with ln_weight");
    if (weight) {
      u = expected("u", u_, w_hh, n.rows(gates * n.hidden), w_hh.scalar_type());
      sums = new_zero_floats(w_hh, {n.batch, n.directions, gates * n.hidden});
    }
    dweight = new_floats(w_hh, weight ? shape : none);
  }
};

// All steps backward, the last one first: step(LoopBackward, k) launches what comes before the product of step k. Leaves
// dh0 in a.last(0). du [T, B, D, G * H] or null.
template <class Cell, class Step>
void run_backward_loop(const char* op, const Cell& a, const Tensor& w_hh, const ProductNorm& norm,
                       typename Cell::Type* du, cudaStream_t stream, const Step& step) {
  using T = typename Cell::Type;
  const Sequence& q = a.q;
  const int64_t states = q.directions * q.batch, rows = Cell::kGates * q.hidden;
  const Tensor operand = new_tensor(w_hh, {q.directions, q.batch, rows}, w_hh.scalar_type());
  const Tensor work = new_floats(w_hh, {q.directions, norm.weight ? q.batch : 0, rows});
  StepProduct product(operand, w_hh, false);
  const LoopBackward<T> l{output<float>(product.out),
                          output<T>(operand),
                          output<float>(work),
                          input<T>(norm.u),
                          input<float>(norm.weight),
                          output<float>(norm.sums),
                          du};
  if constexpr (Cell::kStates > 1)
    check_launch(op, recurrent_start_launch<T>(q, a.initial(1), a.last(1), nullptr, states * q.hidden, stream));
  for (int64_t k = q.steps - 1; k >= 0 && states > 0; --k) {
    step(l, k);
    product.run();
  }
  check_launch(op, recurrent_last_gradient_launch(q, a.initial(0), l.through, a.last(0), stream));
  if (norm.weight)
    check_launch(op, recurrent_sum_launch(l.ln_sums, output<float>(norm.dweight), nullptr, q.batch, q.directions * rows,
                                          stream));
}

}  // namespace fastdl::cuda
