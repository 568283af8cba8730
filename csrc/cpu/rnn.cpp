// Room rnn on the CPU: checks, memory, threads, registration. Contract: fastdl/ops/rnn.py.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "cpu/recurrent.h"
#include "cpu/rnn_kernel.h"

namespace fastdl {
namespace {

const RnnKernels& rnn_table(CpuVariant variant) {
  switch (cpu_vectors(variant)) {
#define FASTDL_CASE(variant) \
  case CpuVariant::variant: return variant::rnn_kernels;
    FASTDL_VECTORS(FASTDL_CASE)
#undef FASTDL_CASE
    default: return scalar::rnn_kernels;
  }
}

RecurrentForwardCall run_forward(const RecurrentParameters& p, RnnForwardArgs& a, const Tensor& gates_x,
                                 const Tensor& h0, bool relu, const OptionalTensor& packed, bool keep) {
  a.relu = relu;
  RecurrentForwardCall call(a, p, gates_x, h0, packed, keep ? 1 : 0);
  call.arena.allocate();
  call.run(a, rnn_table(call.variant).forward, [](int, int) {});
  return call;
}

std::tuple<Tensor, Tensor, Tensor> rnn_forward(const Tensor& gates_x, const Tensor& h0, const Tensor& w_hh,
                                               const OptionalTensor& ln_weight, const OptionalTensor& h_mask,
                                               const OptionalTensor& lengths, const OptionalTensor& seed,
                                               double zoneout_h, double eps, bool relu) {
  RnnForwardArgs a{};
  fill_shape(a, gates_x, 1, w_hh, 1);
  fill_zoneout(a, seed, zoneout_h, eps);
  const RecurrentParameters p(a, gates_x.scalar_type(), w_hh, ln_weight, h_mask, lengths);
  const RecurrentForwardCall call = run_forward(p, a, gates_x, h0, relu, OptionalTensor(), true);
  return {call.y, call.h_n, *call.gates};
}

std::tuple<Tensor, Tensor> rnn_inference(const Tensor& gates_x, const Tensor& h0, const Tensor& w_hh,
                                         const OptionalTensor& ln_weight, const OptionalTensor& h_mask,
                                         const OptionalTensor& lengths, const OptionalTensor& seed, double zoneout_h,
                                         double eps, bool relu, const OptionalTensor& packed) {
  RnnForwardArgs a{};
  fill_shape(a, gates_x, 1, w_hh, 1);
  fill_zoneout(a, seed, zoneout_h, eps);
  const RecurrentParameters p(a, gates_x.scalar_type(), w_hh, ln_weight, h_mask, lengths);
  const RecurrentForwardCall call = run_forward(p, a, gates_x, h0, relu, packed, false);
  return {call.y, call.h_n};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> rnn_backward(const OptionalTensor& dy, const OptionalTensor& dh_n,
                                                        const OptionalTensor& dgates, const Tensor& gates,
                                                        const Tensor& h0, const Tensor& w_hh, const OptionalTensor& u,
                                                        const OptionalTensor& ln_weight, const OptionalTensor& h_mask,
                                                        const OptionalTensor& lengths, const OptionalTensor& seed,
                                                        double zoneout_h, double eps, bool relu) {
  check(!dgates, "dgates: a double backward is the reference's");
  RnnBackwardArgs a{};
  fill_shape(a, gates, 1, w_hh, 1);
  fill_zoneout(a, seed, zoneout_h, eps);
  const RecurrentParameters p(a, gates.scalar_type(), w_hh, ln_weight, h_mask, lengths);
  expected(h0, ScalarType::Float, {a.directions, a.batch, a.hidden}, "h0: expected float32 [D, B, H]");
  a.relu = relu;
  RecurrentBackwardCall call(a, p, gates, dy, dh_n, u, ln_weight.has_value());
  call.arena.allocate();
  call.run(a, rnn_table(call.variant).backward, [](int, int) {});
  return {call.da, call.du, call.dh0, call.dln_weight};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastdl, CPU, m) {
  m.impl("rnn_forward", TORCH_BOX(&rnn_forward));
  m.impl("rnn_inference", TORCH_BOX(&rnn_inference));
  m.impl("rnn_backward", TORCH_BOX(&rnn_backward));
}

}  // namespace fastdl
