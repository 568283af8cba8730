// Room lstm on the CPU: checks, memory, threads, registration. Contract: fastdl/ops/lstm.py.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "cpu/lstm_kernel.h"
#include "cpu/recurrent.h"

namespace fastdl {
namespace {

const LstmKernels& lstm_table() {
  switch (cpu_variant()) {
#define FASTDL_CASE(variant) \
  case CpuVariant::variant: return variant::lstm_kernels;
    FASTDL_VARIANTS(FASTDL_CASE)
#undef FASTDL_CASE
    default: return scalar::lstm_kernels;
  }
}

// The parameters and masks of a call, contiguous; they hold the memory that the arguments point to.
struct Parameters {
  Tensor w_hh;
  OptionalTensor ln_weight, peephole, ln_c, ln_c_bias, w_hr, h_mask, lengths;

  template <class Args>
  Parameters(Args& a, ScalarType dtype, const Tensor& w_hh_, const OptionalTensor& ln_weight_,
             const OptionalTensor& peephole_, const OptionalTensor& ln_c_, const OptionalTensor& ln_c_bias_,
             const OptionalTensor& w_hr_, const OptionalTensor& h_mask_, const OptionalTensor& lengths_)
      : w_hh(expected(w_hh_, dtype, {a.directions, 4 * a.hidden, a.size}, "w_hh: expected [D, 4 H, P]")),
        ln_weight(
            expected(ln_weight_, ScalarType::Float, {a.directions, 4 * a.hidden}, "ln_weight: expected [D, 4 H]")),
        peephole(expected(peephole_, ScalarType::Float, {a.directions, 3, a.hidden}, "peephole: expected [D, 3, H]")),
        ln_c(expected(ln_c_, ScalarType::Float, {a.directions, a.hidden}, "ln_c_weight: expected [D, H]")),
        ln_c_bias(expected(ln_c_bias_, ScalarType::Float, {a.directions, a.hidden}, "ln_c_bias: expected [D, H]")),
        w_hr(expected(w_hr_, dtype, {a.directions, a.size, a.hidden}, "w_hr: expected [D, P, H]")),
        h_mask(expected(h_mask_, ScalarType::Float, {a.directions, a.batch, a.size}, "h_mask: expected [D, B, P]")),
        lengths(expected(lengths_, ScalarType::Long, {a.batch}, "lengths: expected int64 [B]")) {
    check(w_hr || a.size == a.hidden, "w_hh: expected [D, 4 H, H] without projection");
    check(!ln_c == !ln_c_bias, "ln_c_weight, ln_c_bias: expected both or neither");
    a.ln_weight = data_of<float>(ln_weight);
    a.peephole = data_of<float>(peephole);
    a.ln_c = data_of<float>(ln_c);
    a.ln_c_bias = data_of<float>(ln_c_bias);
    a.h_mask = data_of<float>(h_mask);
    a.lengths = data_of<int64_t>(lengths);
  }
};

struct ForwardOutputs {
  Tensor y, h_n, c_n;
  OptionalTensor gates, cells;
};

ForwardOutputs run_forward(const Tensor& gates_x_, const Tensor& h0_, const Tensor& c0_, const Tensor& w_hh,
                           const OptionalTensor& ln_weight, const OptionalTensor& peephole,
                           const OptionalTensor& ln_c_weight, const OptionalTensor& ln_c_bias,
                           const OptionalTensor& w_hr, const OptionalTensor& h_mask, const OptionalTensor& lengths,
                           const OptionalTensor& seed, double zoneout_h, double zoneout_c, double eps,
                           const OptionalTensor& packed, bool keep) {
  LstmForwardArgs a{};
  fill_shape(a, gates_x_, 4, w_hh, 4);
  const ScalarType dtype = gates_x_.scalar_type();
  const Parameters p(a, dtype, w_hh, ln_weight, peephole, ln_c_weight, ln_c_bias, w_hr, h_mask, lengths);
  fill_zoneout(a, seed, zoneout_h, eps);
  a.zoneout_c = static_cast<float>(zoneout_c);
  const int64_t T = a.time, B = a.batch, D = a.directions, H = a.hidden, P = a.size;
  const Tensor gates_x = as_contiguous(gates_x_);
  const Tensor h0 = expected(h0_, ScalarType::Float, {D, B, P}, "h0: expected float32 [D, B, P]");
  const Tensor c0 = expected(c0_, ScalarType::Float, {D, B, H}, "c0: expected float32 [D, B, H]");
  ForwardOutputs out{new_tensor(gates_x, {T, B, D, P}, dtype), new_tensor(h0, {D, B, P}, ScalarType::Float),
                     new_tensor(c0, {D, B, H}, ScalarType::Float), OptionalTensor(), OptionalTensor()};
  a.gates_x = gates_x.const_data_ptr();
  a.h0 = static_cast<const float*>(h0.const_data_ptr());
  a.c0 = static_cast<const float*>(c0.const_data_ptr());
  a.y = data_of(out.y);
  a.h_n = data_of<float>(out.h_n);
  a.c_n = data_of<float>(out.c_n);
  if (keep) {
    out.gates = new_tensor(gates_x, {T, B, D, 4 * H}, dtype);
    out.cells = new_tensor(gates_x, {T, B, D, H}, dtype);
    a.gates_out = data_of(*out.gates);
    a.cells = data_of(*out.cells);
  }

  const int64_t hh_bytes = packed_bytes(a, 4, H, P), hr_bytes = w_hr ? packed_bytes(a, 1, P, H) : 0;
  check(!packed || (packed->is_cpu() && packed->scalar_type() == ScalarType::Byte && packed->is_contiguous() &&
                    packed->numel() == hh_bytes),
        "packed: expected what recurrent_pack gave for w_hh");
  Arena arena;
  uint8_t *pack_hh = nullptr, *pack_hr = nullptr;
  if (!packed) arena.ask(&pack_hh, hh_bytes);
  if (w_hr) arena.ask(&pack_hr, hr_bytes);
  arena.ask(&a.barriers, 2);
  arena.ask(&a.h, D * B * a.wide_p);
  arena.ask(&a.c, D * B * a.wide);
  arena.ask(&a.operand, 2 * D * B * a.wide_p * 4);
  if (ln_weight) arena.ask(&a.u, D * B * 4 * a.wide);
  if (ln_c_weight) {
    arena.ask(&a.s, D * B * a.wide);
    arena.ask(&a.o, D * B * a.wide);
  }
  if (w_hr) arena.ask(&a.m, D * B * a.wide * 4);
  arena.allocate();
  a.packed = packed ? static_cast<const uint8_t*>(packed->const_data_ptr()) : pack_hh;
  a.packed_hr = pack_hr;
  std::fill(a.barriers, a.barriers + 2, Barrier());

  const RecurrentProduct& product = recurrent_product_table();
  const LstmKernels& kernels = lstm_table();
  Barrier packing;
  parallel_region(recurrent_team(a), [&](int thread, int team) {
    if (!packed)
      pack_outputs(product, a, p.w_hh.const_data_ptr(), H, P, pack_hh, range(D * 4 * panels_of(H), thread, team));
    if (w_hr) pack_outputs(product, a, data_of<>(p.w_hr), P, H, pack_hr, range(D * panels_of(P), thread, team));
    if (!packed || w_hr) packing.wait(team);
    kernels.forward(a, thread, team);
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

// A float32 tensor of this shape: a copy of `from`, or zeros.
Tensor copy_or_zeros(const Tensor& like, const OptionalTensor& from, const std::vector<int64_t>& shape) {
  const Tensor out = new_tensor(like, shape, ScalarType::Float);
  float* const to = data_of<float>(out);
  if (from) {
    const float* const source = data_of<float>(from);
    std::copy(source, source + out.numel(), to);
  } else {
    std::fill(to, to + out.numel(), 0.0f);
  }
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> lstm_backward(
    const OptionalTensor& dy_, const OptionalTensor& dh_n_, const OptionalTensor& dc_n_, const OptionalTensor& dgates,
    const OptionalTensor& dcells, const Tensor& gates_, const Tensor& cells_, const Tensor& c0_, const Tensor& w_hh,
    const OptionalTensor& u_, const OptionalTensor& ln_weight, const OptionalTensor& peephole,
    const OptionalTensor& ln_c_weight, const OptionalTensor& ln_c_bias, const OptionalTensor& w_hr,
    const OptionalTensor& h_mask, const OptionalTensor& lengths, const OptionalTensor& seed, double zoneout_h,
    double zoneout_c, double eps) {
  check(!dgates && !dcells, "dgates, dcells: a double backward is the reference's");
  LstmBackwardArgs a{};
  fill_shape(a, gates_, 4, w_hh, 4);
  const ScalarType dtype = gates_.scalar_type();
  const Parameters p(a, dtype, w_hh, ln_weight, peephole, ln_c_weight, ln_c_bias, w_hr, h_mask, lengths);
  fill_zoneout(a, seed, zoneout_h, eps);
  a.zoneout_c = static_cast<float>(zoneout_c);
  const int64_t T = a.time, B = a.batch, D = a.directions, H = a.hidden, P = a.size;
  const Tensor gates = as_contiguous(gates_);
  const Tensor cells = expected(cells_, dtype, {T, B, D, H}, "cells: expected [T, B, D, H]");
  const Tensor c0 = expected(c0_, ScalarType::Float, {D, B, H}, "c0: expected float32 [D, B, H]");
  const OptionalTensor dy = expected(dy_, dtype, {T, B, D, P}, "dy: expected [T, B, D, P]");
  const OptionalTensor dh_n = expected(dh_n_, ScalarType::Float, {D, B, P}, "dh_n: expected float32 [D, B, P]");
  const OptionalTensor dc_n = expected(dc_n_, ScalarType::Float, {D, B, H}, "dc_n: expected float32 [D, B, H]");
  const OptionalTensor u = expected(u_, dtype, {T, B, D, 4 * H}, "u: expected [T, B, D, 4 H]");
  check(!u == !ln_weight, "u, ln_weight: expected both or neither");

  const std::vector<int64_t> none{0};
  const Tensor da = new_tensor(gates, shape_of(gates), dtype);
  const Tensor du = new_tensor(gates, ln_weight ? shape_of(gates) : none, dtype);
  const Tensor dh0 = copy_or_zeros(gates, dh_n, {D, B, P}), dc0 = copy_or_zeros(gates, dc_n, {D, B, H});
  const auto sums = [&](const OptionalTensor& like) {
    return copy_or_zeros(gates, OptionalTensor(), like ? shape_of(*like) : none);
  };
  const Tensor dln = sums(ln_weight), dpeephole = sums(peephole), dln_c = sums(ln_c_weight), dln_b = sums(ln_c_bias);
  const Tensor dm_out = new_tensor(gates, w_hr ? std::vector<int64_t>{T, B, D, P} : none, dtype);
  const Tensor m = new_tensor(gates, w_hr ? std::vector<int64_t>{T, B, D, H} : none, dtype);

  a.gates_in = gates.const_data_ptr();
  a.cells = cells.const_data_ptr();
  a.c0 = static_cast<const float*>(c0.const_data_ptr());
  a.dy = data_of<>(dy);
  a.u = data_of<>(u);
  a.da = data_of(da);
  a.du = data_of(du);
  a.dh = data_of<float>(dh0);
  a.dc = data_of<float>(dc0);
  a.dln_weight = data_of<float>(dln);
  a.dpeephole = data_of<float>(dpeephole);
  a.dln_c = data_of<float>(dln_c);
  a.dln_c_bias = data_of<float>(dln_b);
  a.dm_out = w_hr ? data_of(dm_out) : nullptr;
  a.m = w_hr ? data_of(m) : nullptr;

  Arena arena;
  uint8_t *pack_hh = nullptr, *pack_hr = nullptr;
  arena.ask(&pack_hh, D * panels_of(P) * packed_panel_bytes(a.format, 4 * a.wide));
  if (w_hr) arena.ask(&pack_hr, D * panels_of(H) * packed_panel_bytes(a.format, a.wide_p));
  arena.ask(&a.barriers, 2);
  arena.ask(&a.dh_work, D * B * a.wide_p);
  arena.ask(&a.dc_work, D * B * a.wide);
  arena.ask(&a.operand, 2 * D * B * 4 * a.wide * 4);
  if (ln_weight) arena.ask(&a.dhat, D * B * 4 * a.wide);
  if (ln_c_weight) {
    arena.ask(&a.dv, D * B * a.wide);
    arena.ask(&a.s, D * B * a.wide);
    arena.ask(&a.dout, D * B * a.wide);
  }
  if (w_hr) arena.ask(&a.out, D * B * a.wide_p * 4);
  arena.allocate();
  a.packed = pack_hh;
  a.packed_hr = pack_hr;
  std::fill(a.barriers, a.barriers + 2, Barrier());

  const RecurrentProduct& product = recurrent_product_table();
  const LstmKernels& kernels = lstm_table();
  Barrier packing;
  parallel_region(recurrent_team(a), [&](int thread, int team) {
    pack_inputs(product, a, p.w_hh.const_data_ptr(), 4, H, a.wide, P, pack_hh, range(D * panels_of(P), thread, team));
    if (w_hr)
      pack_inputs(product, a, data_of<>(p.w_hr), 1, P, a.wide_p, H, pack_hr, range(D * panels_of(H), thread, team));
    packing.wait(team);
    kernels.backward(a, thread, team);
  });
  return {da, du, dh0, dc0, dln, dpeephole, dln_c, dln_b, dm_out, m};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastdl, CPU, m) {
  m.impl("lstm_forward", TORCH_BOX(&lstm_forward));
  m.impl("lstm_inference", TORCH_BOX(&lstm_inference));
  m.impl("lstm_backward", TORCH_BOX(&lstm_backward));
}

}  // namespace fastdl
