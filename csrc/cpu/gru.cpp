// Room gru on the CPU: checks, memory, threads, registration. Contract: fastdl/ops/gru.py.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "cpu/gru_kernel.h"
#include "cpu/recurrent.h"

namespace fastdl {
namespace {

const GruKernels& gru_table(CpuVariant variant) {
  switch (cpu_vectors(variant)) {
#define FASTDL_CASE(variant) \
  case CpuVariant::variant: return variant::gru_kernels;
    FASTDL_VECTORS(FASTDL_CASE)
#undef FASTDL_CASE
    default: return scalar::gru_kernels;
  }
}

RecurrentForwardCall run_forward(const RecurrentParameters& p, GruForwardArgs& a, const Tensor& gates_x,
                                 const Tensor& h0, const OptionalTensor& bias_n_, const OptionalTensor& packed,
                                 bool keep) {
  const OptionalTensor bias_n =
      expected(bias_n_, ScalarType::Float, {a.directions, a.hidden}, "bias_n: expected float32 [D, H]");
  a.bias_n = data_of<float>(bias_n);
  RecurrentForwardCall call(a, p, gates_x, h0, packed, keep ? 4 : 0);
  call.arena.allocate();
  call.run(a, gru_table(call.variant).forward, [](int, int) {});
  return call;
}

std::tuple<Tensor, Tensor, Tensor> gru_forward(const Tensor& gates_x, const Tensor& h0, const Tensor& w_hh,
                                               const OptionalTensor& bias_n, const OptionalTensor& ln_weight,
                                               const OptionalTensor& h_mask, const OptionalTensor& lengths,
                                               const OptionalTensor& seed, double zoneout_h, double eps) {
  GruForwardArgs a{};
  fill_shape(a, gates_x, 3, w_hh, 3);
  fill_zoneout(a, seed, zoneout_h, eps);
  const RecurrentParameters p(a, gates_x.scalar_type(), w_hh, ln_weight, h_mask, lengths);
  const RecurrentForwardCall call = run_forward(p, a, gates_x, h0, bias_n, OptionalTensor(), true);
  return {call.y, call.h_n, *call.gates};
}

std::tuple<Tensor, Tensor> gru_inference(const Tensor& gates_x, const Tensor& h0, const Tensor& w_hh,
                                         const OptionalTensor& bias_n, const OptionalTensor& ln_weight,
                                         const OptionalTensor& h_mask, const OptionalTensor& lengths,
                                         const OptionalTensor& seed, double zoneout_h, double eps,
                                         const OptionalTensor& packed) {
  GruForwardArgs a{};
  fill_shape(a, gates_x, 3, w_hh, 3);
  fill_zoneout(a, seed, zoneout_h, eps);
  const RecurrentParameters p(a, gates_x.scalar_type(), w_hh, ln_weight, h_mask, lengths);
  const RecurrentForwardCall call = run_forward(p, a, gates_x, h0, bias_n, packed, false);
  return {call.y, call.h_n};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> gru_backward(
    const OptionalTensor& dy, const OptionalTensor& dh_n, const OptionalTensor& dgates, const Tensor& gates,
    const Tensor& y_, const Tensor& h0_, const Tensor& w_hh, const OptionalTensor& u, const OptionalTensor& ln_weight,
    const OptionalTensor& h_mask, const OptionalTensor& lengths, const OptionalTensor& seed, double zoneout_h,
    double eps) {
  check(!dgates, "dgates: a double backward is the reference's");
  GruBackwardArgs a{};
  fill_shape(a, gates, 4, w_hh, 3);
  fill_zoneout(a, seed, zoneout_h, eps);
  const RecurrentParameters p(a, gates.scalar_type(), w_hh, ln_weight, h_mask, lengths);
  const Tensor y =
      expected(y_, gates.scalar_type(), {a.time, a.batch, a.directions, a.hidden}, "y: expected [T, B, D, H]");
  const Tensor h0 =
      expected(h0_, ScalarType::Float, {a.directions, a.batch, a.hidden}, "h0: expected float32 [D, B, H]");
  RecurrentBackwardCall call(a, p, gates, dy, dh_n, u, true);
  const Tensor dbias_n = copy_or_zeros(h0, OptionalTensor(), {a.directions, a.hidden});
  a.y = y.const_data_ptr();
  a.h0 = static_cast<const float*>(h0.const_data_ptr());
  a.dbias_n = data_of<float>(dbias_n);
  call.arena.allocate();
  call.run(a, gru_table(call.variant).backward, [](int, int) {});
  return {call.da, call.du, call.dh0, dbias_n, call.dln_weight};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastdl, CPU, m) {
  m.impl("gru_forward", TORCH_BOX(&gru_forward));
  m.impl("gru_inference", TORCH_BOX(&gru_inference));
  m.impl("gru_backward", TORCH_BOX(&gru_backward));
}

}  // namespace fastdl
