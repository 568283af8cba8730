// Room lstm on the CPU: checks, memory, threads, registration. Contract: fastdl/ops/lstm.py.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "cpu/lstm_kernel.h"
#include "cpu/recurrent.h"

namespace fastdl {
namespace {

const LstmKernels& lstm_table(CpuVariant variant) {
  switch (cpu_vectors(variant)) {
#define FASTDL_CASE(variant) \
  case CpuVariant::variant: return variant::lstm_kernels;
    FASTDL_VECTORS(FASTDL_CASE)
#undef FASTDL_CASE
    default: return scalar::lstm_kernels;
  }
}

// What only this room has, contiguous; holds the memory that the arguments point to.
struct LstmParameters : RecurrentParameters {
  OptionalTensor peephole, ln_c, ln_c_bias, w_hr;

  template <class Args>
  LstmParameters(Args& a, ScalarType dtype, const Tensor& w_hh_, const OptionalTensor& ln_weight_,
                 const OptionalTensor& peephole_, const OptionalTensor& ln_c_, const OptionalTensor& ln_c_bias_,
                 const OptionalTensor& w_hr_, const OptionalTensor& h_mask_, const OptionalTensor& lengths_,
                 double zoneout_c)
      : RecurrentParameters(a, dtype, w_hh_, ln_weight_, h_mask_, lengths_),
        peephole(expected(peephole_, ScalarType::Float, {a.directions, 3, a.hidden}, "peephole: expected [D, 3, H]")),
        ln_c(expected(ln_c_, ScalarType::Float, {a.directions, a.hidden}, "ln_c_weight: expected [D, H]")),
        ln_c_bias(expected(ln_c_bias_, ScalarType::Float, {a.directions, a.hidden}, "ln_c_bias: expected [D, H]")),
        w_hr(expected(w_hr_, dtype, {a.directions, a.size, a.hidden}, "w_hr: expected [D, P, H]")) {
    check(w_hr || a.size == a.hidden, "w_hh: expected [D, 4 H, H] without projection");
    check(!ln_c == !ln_c_bias, "ln_c_weight, ln_c_bias: expected both or neither");
    a.peephole = data_of<float>(peephole);
    a.ln_c = data_of<float>(ln_c);
    a.ln_c_bias = data_of<float>(ln_c_bias);
    a.zoneout_c = static_cast<float>(zoneout_c);
  }
};

struct ForwardOutputs {
  Tensor y, h_n, c_n;
  OptionalTensor gates, cells;
};

ForwardOutputs run_forward(const Tensor& gates_x, const Tensor& h0, const Tensor& c0_, const Tensor& w_hh,
                           const OptionalTensor& ln_weight, const OptionalTensor& peephole,
                           const OptionalTensor& ln_c_weight, const OptionalTensor& ln_c_bias,
                           const OptionalTensor& w_hr, const OptionalTensor& h_mask, const OptionalTensor& lengths,
                           const OptionalTensor& seed, double zoneout_h, double zoneout_c, double eps,
                           const OptionalTensor& packed, bool keep) {
  LstmForwardArgs a{};
  fill_shape(a, gates_x, 4, w_hh, 4);
  fill_zoneout(a, seed, zoneout_h, eps);
  const ScalarType dtype = gates_x.scalar_type();
  const LstmParameters p(a, dtype, w_hh, ln_weight, peephole, ln_c_weight, ln_c_bias, w_hr, h_mask, lengths, zoneout_c);
  const int64_t B = a.batch, D = a.directions, H = a.hidden;
  const Tensor c0 = expected(c0_, ScalarType::Float, {D, B, H}, "c0: expected float32 [D, B, H]");
  RecurrentForwardCall call(a, p, gates_x, h0, packed, keep ? 4 : 0);
  ForwardOutputs out{call.y, call.h_n, new_tensor(c0, {D, B, H}, ScalarType::Float), call.gates, OptionalTensor()};
  a.c0 = static_cast<const float*>(c0.const_data_ptr());
  a.c_n = data_of<float>(out.c_n);
  if (keep) {
    out.cells = new_tensor(gates_x, {a.time, B, D, H}, dtype);
    a.cells = data_of(*out.cells);
  }
  uint8_t* pack_hr = nullptr;
  if (w_hr) call.arena.ask(&pack_hr, packed_bytes(a, 1, a.size, H));
  if (w_hr) call.arena.ask(&a.m, D * B * a.wide * 4);
  call.arena.ask(&a.c, D * B * a.wide);
  if (ln_c_weight) {
    call.arena.ask(&a.s, D * B * a.wide);
    call.arena.ask(&a.o, D * B * a.wide);
  }
  call.arena.allocate();
  a.packed_hr = pack_hr;
  call.run(a, lstm_table(call.variant).forward, [&](int thread, int team) {
    if (w_hr)
      pack_outputs(recurrent_product_table(call.variant), a, data_of<>(p.w_hr), a.size, H, pack_hr,
                   range(D * panels_of(a.size), thread, team));
  });
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> lstm_forward(
    const Tensor& gates_x, const Tensor& h0, const Tensor& c0, const Tensor& w_hh, const OptionalTensor& ln_weight,
    const OptionalTensor& peephole, const OptionalTensor& ln_c_weight, const OptionalTensor& ln_c_bias,
    const OptionalTensor& w_hr, const OptionalTensor& h_mask, const OptionalTensor& lengths, const OptionalTensor& seed,
    double zoneout_h, double zoneout_c, double eps) {
  const ForwardOutputs out = run_forward(gates_x, h0, c0, w_hh, ln_weight, peephole, ln_c_weight, ln_c_bias, w_hr,
                                         h_mask, lengths, seed, zoneout_h, zoneout_c, eps, OptionalTensor(), true);
  return {out.y, out.h_n, out.c_n, *out.gates, *out.cells};
}

std::tuple<Tensor, Tensor, Tensor> lstm_inference(const Tensor& gates_x, const Tensor& h0, const Tensor& c0,
                                                  const Tensor& w_hh, const OptionalTensor& ln_weight,
                                                  const OptionalTensor& peephole, const OptionalTensor& ln_c_weight,
                                                  const OptionalTensor& ln_c_bias, const OptionalTensor& w_hr,
                                                  const OptionalTensor& h_mask, const OptionalTensor& lengths,
                                                  const OptionalTensor& seed, double zoneout_h, double zoneout_c,
                                                  double eps, const OptionalTensor& packed) {
  const ForwardOutputs out = run_forward(gates_x, h0, c0, w_hh, ln_weight, peephole, ln_c_weight, ln_c_bias, w_hr,
                                         h_mask, lengths, seed, zoneout_h, zoneout_c, eps, packed, false);
  return {out.y, out.h_n, out.c_n};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> lstm_backward(
    const OptionalTensor& dy, const OptionalTensor& dh_n, const OptionalTensor& dc_n_, const OptionalTensor& dgates,
    const OptionalTensor& dcells, const Tensor& gates, const Tensor& cells_, const Tensor& c0_, const Tensor& w_hh,
    const OptionalTensor& u, const OptionalTensor& ln_weight, const OptionalTensor& peephole,
    const OptionalTensor& ln_c_weight, const OptionalTensor& ln_c_bias, const OptionalTensor& w_hr,
    const OptionalTensor& h_mask, const OptionalTensor& lengths, const OptionalTensor& seed, double zoneout_h,
    double zoneout_c, double eps) {
  check(!dgates && !dcells, "dgates, dcells: a double backward is the reference's");
  LstmBackwardArgs a{};
  fill_shape(a, gates, 4, w_hh, 4);
  fill_zoneout(a, seed, zoneout_h, eps);
  const ScalarType dtype = gates.scalar_type();
  const LstmParameters p(a, dtype, w_hh, ln_weight, peephole, ln_c_weight, ln_c_bias, w_hr, h_mask, lengths, zoneout_c);
  const int64_t T = a.time, B = a.batch, D = a.directions, H = a.hidden, P = a.size;
  const Tensor cells = expected(cells_, dtype, {T, B, D, H}, "cells: expected [T, B, D, H]");
  const Tensor c0 = expected(c0_, ScalarType::Float, {D, B, H}, "c0: expected float32 [D, B, H]");
  const OptionalTensor dc_n = expected(dc_n_, ScalarType::Float, {D, B, H}, "dc_n: expected float32 [D, B, H]");
  RecurrentBackwardCall call(a, p, gates, dy, dh_n, u, ln_weight.has_value());

  const std::vector<int64_t> none{0};
  const Tensor dc0 = copy_or_zeros(c0, dc_n, {D, B, H});
  const auto sums = [&](const OptionalTensor& like) {
    return copy_or_zeros(c0, OptionalTensor(), like ? shape_of(*like) : none);
  };
  const Tensor dpeephole = sums(peephole), dln_c = sums(ln_c_weight), dln_b = sums(ln_c_bias);
  const Tensor dm_out = new_tensor(cells, w_hr ? std::vector<int64_t>{T, B, D, P} : none, dtype);
  const Tensor m = new_tensor(cells, w_hr ? std::vector<int64_t>{T, B, D, H} : none, dtype);
  a.cells = cells.const_data_ptr();
  a.c0 = static_cast<const float*>(c0.const_data_ptr());
  a.dc = data_of<float>(dc0);
  a.dpeephole = data_of<float>(dpeephole);
  a.dln_c = data_of<float>(dln_c);
  a.dln_c_bias = data_of<float>(dln_b);
  a.dm_out = w_hr ? data_of(dm_out) : nullptr;
  a.m = w_hr ? data_of(m) : nullptr;

  uint8_t* pack_hr = nullptr;
  if (w_hr) call.arena.ask(&pack_hr, D * panels_of(H) * packed_panel_bytes(a.format, a.wide_p));
  if (w_hr) call.arena.ask(&a.out, D * B * a.wide_p * 4);
  call.arena.ask(&a.dc_work, D * B * a.wide);
  if (ln_c_weight) {
    call.arena.ask(&a.dv, D * B * a.wide);
    call.arena.ask(&a.s, D * B * a.wide);
    call.arena.ask(&a.d_o, D * B * a.wide);
  }
  call.arena.allocate();
  a.packed_hr = pack_hr;
  call.run(a, lstm_table(call.variant).backward, [&](int thread, int team) {
    if (w_hr)
      pack_inputs(recurrent_product_table(call.variant), a, data_of<>(p.w_hr), 1, P, a.wide_p, H, pack_hr,
                  range(D * panels_of(H), thread, team));
  });
  return {call.da, call.du, call.dh0, dc0, call.dln_weight, dpeephole, dln_c, dln_b, dm_out, m};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastdl, CPU, m) {
  m.impl("lstm_forward", TORCH_BOX(&lstm_forward));
  m.impl("lstm_inference", TORCH_BOX(&lstm_inference));
  m.impl("lstm_backward", TORCH_BOX(&lstm_backward));
}

}  // namespace fastdl
