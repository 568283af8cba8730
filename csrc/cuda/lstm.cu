// fastdl::lstm_forward, lstm_inference, lstm_backward, CUDA key: checks, allocation, launches. Contract: fastdl/ops/lstm.py.
#include <tuple>

#include "cuda/lstm_backward.cuh"
#include "cuda/recurrent_loop.h"

namespace fastdl::cuda {
namespace {

// Weights and options of both passes.
struct LstmArguments {
  RecurrentSizes n;
  Tensor w_hh;
  RecurrentOptions options;
  OptionalTensor peephole, ln_c_weight, ln_c_bias, w_hr;

  LstmArguments(const Tensor& rows, const Tensor& w_hh_, const OptionalTensor& peephole_,
                const OptionalTensor& ln_c_weight_, const OptionalTensor& ln_c_bias_, const OptionalTensor& w_hr_,
                const OptionalTensor& h_mask, const OptionalTensor& lengths, const OptionalTensor& seed)
      : n(rows, w_hh_, 4),
        w_hh(expected("w_hh", w_hh_, rows, {n.directions, 4 * n.hidden, n.size}, rows.scalar_type())),
        options(n, rows, h_mask, lengths, seed) {
    const Shape cell{n.directions, n.hidden};
    peephole = expected("peephole", peephole_, rows, {n.directions, 3, n.hidden}, ScalarType::Float);
    ln_c_weight = expected("ln_c_weight", ln_c_weight_, rows, cell, ScalarType::Float);
    ln_c_bias = expected("ln_c_bias", ln_c_bias_, rows, cell, ScalarType::Float);
    w_hr = expected("w_hr", w_hr_, rows, {n.directions, n.size, n.hidden}, rows.scalar_type());
    check(!ln_c_weight || ln_c_bias, "ln_c_bias: expected with ln_c_weight");
    check(w_hr || n.size == n.hidden, "w_hh: expected [D, 4 * H, H] without a projection");
  }
};

struct LstmOutputs {
  Tensor y, h_n, c_n;
  OptionalTensor gates, cells;  // none in inference
};

LstmOutputs run_forward(const Tensor& gates_x_, const Tensor& h0_, const Tensor& c0_, const OptionalTensor& ln_weight_,
                        const LstmArguments& t, double zoneout_h, double zoneout_c, double eps, bool keep) {
  const RecurrentSizes& n = t.n;
  const ScalarType dtype = gates_x_.scalar_type();
  const Tensor gates_x = expected("gates_x", gates_x_, gates_x_, n.rows(4 * n.hidden), dtype);
  const Tensor h0 = expected("h0", h0_, gates_x, n.state(n.size), ScalarType::Float);
  const Tensor c0 = expected("c0", c0_, gates_x, n.state(n.hidden), ScalarType::Float);
  const OptionalTensor ln_weight =
      expected("ln_weight", ln_weight_, gates_x, {n.directions, 4 * n.hidden}, ScalarType::Float);
  LstmOutputs out{new_tensor(gates_x, n.rows(n.size), dtype), new_floats(gates_x, n.state(n.size)),
                  new_floats(gates_x, n.state(n.hidden)), std::nullopt, std::nullopt};
  if (keep) {
    out.gates = new_tensor(gates_x, n.rows(4 * n.hidden), dtype);
    out.cells = new_tensor(gates_x, n.rows(n.hidden), dtype);
  }
  const Device device(gates_x);
  const cudaStream_t stream = device.stream();
  for_float_type(gates_x, "gates_x", [&](auto type) {
    using T = decltype(type);
    LstmForward<T> a{};
    a.q = sequence_of(n, t.options, zoneout_h, zoneout_c, eps);
    a.gates_x = input<T>(gates_x);
    a.h0 = input<float>(h0);
    a.c0 = input<float>(c0);
    a.ln_weight = input<float>(ln_weight);
    a.peephole = input<float>(t.peephole);
    a.ln_c_weight = input<float>(t.ln_c_weight);
    a.ln_c_bias = input<float>(t.ln_c_bias);
    a.y = output<T>(out.y);
    a.h_n = output<float>(out.h_n);
    a.c_n = output<float>(out.c_n);
    a.gates = output<T>(out.gates);
    a.cells = output<T>(out.cells);
    const bool plain = !ln_weight && !t.ln_c_weight && !t.w_hr;
    if (plain && run_persistent("lstm_forward", a, t.w_hh, false, stream, lstm_forward_persistent_launch<T>)) return;
    std::optional<StepProduct> projection;
    LstmProjection<T> p{};
    const Tensor m = new_tensor(gates_x, n.state(t.w_hr ? n.hidden : 0), dtype);
    if (t.w_hr) {
      projection.emplace(m, *t.w_hr, true);
      p = {output<T>(m), input<float>(projection->out)};
    }
    run_forward_loop("lstm_forward", a, t.w_hh, stream, [&](const LoopForward<T>& l, int64_t k) {
      check_launch("lstm_forward", lstm_forward_step_launch(a, l, p, k, stream));
      if (!projection) return;
      projection->run();
      check_launch("lstm_forward", lstm_forward_project_launch(a, l, p, k, stream));
    });
  });
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> lstm_forward(
    const Tensor& gates_x, const Tensor& h0, const Tensor& c0, const Tensor& w_hh, const OptionalTensor& ln_weight,
    const OptionalTensor& peephole, const OptionalTensor& ln_c_weight, const OptionalTensor& ln_c_bias,
    const OptionalTensor& w_hr, const OptionalTensor& h_mask, const OptionalTensor& lengths, const OptionalTensor& seed,
    double zoneout_h, double zoneout_c, double eps) {
  const Device device(gates_x);
  const LstmArguments t(gates_x, w_hh, peephole, ln_c_weight, ln_c_bias, w_hr, h_mask, lengths, seed);
  const LstmOutputs out = run_forward(gates_x, h0, c0, ln_weight, t, zoneout_h, zoneout_c, eps, true);
  return {out.y, out.h_n, out.c_n, *out.gates, *out.cells};
}

std::tuple<Tensor, Tensor, Tensor> lstm_inference(const Tensor& gates_x, const Tensor& h0, const Tensor& c0,
                                                  const Tensor& w_hh, const OptionalTensor& ln_weight,
                                                  const OptionalTensor& peephole, const OptionalTensor& ln_c_weight,
                                                  const OptionalTensor& ln_c_bias, const OptionalTensor& w_hr,
                                                  const OptionalTensor& h_mask, const OptionalTensor& lengths,
                                                  const OptionalTensor& seed, double zoneout_h, double zoneout_c,
                                                  double eps, const OptionalTensor&) {
  const Device device(gates_x);
  const LstmArguments t(gates_x, w_hh, peephole, ln_c_weight, ln_c_bias, w_hr, h_mask, lengths, seed);
  const LstmOutputs out = run_forward(gates_x, h0, c0, ln_weight, t, zoneout_h, zoneout_c, eps, false);
  return {out.y, out.h_n, out.c_n};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> lstm_backward(
    const OptionalTensor& dy_, const OptionalTensor& dh_n_, const OptionalTensor& dc_n_, const OptionalTensor& dgates,
    const OptionalTensor& dcells, const Tensor& gates_, const Tensor& cells_, const Tensor& c0_, const Tensor& w_hh_,
    const OptionalTensor& u, const OptionalTensor& ln_weight, const OptionalTensor& peephole,
    const OptionalTensor& ln_c_weight, const OptionalTensor& ln_c_bias, const OptionalTensor& w_hr,
    const OptionalTensor& h_mask, const OptionalTensor& lengths, const OptionalTensor& seed, double zoneout_h,
    double zoneout_c, double eps) {
  check(!dgates && !dcells, "dgates, dcells: gradients of what a double backward asks for are the torch back end's");
  const Device device(gates_);
  const cudaStream_t stream = device.stream();
  const LstmArguments t(gates_, w_hh_, peephole, ln_c_weight, ln_c_bias, w_hr, h_mask, lengths, seed);
  const RecurrentSizes& n = t.n;
  const ScalarType dtype = gates_.scalar_type();
  const Shape none{0};
  const Tensor gates = expected("gates", gates_, gates_, n.rows(4 * n.hidden), dtype);
  const Tensor cells = expected("cells", cells_, gates, n.rows(n.hidden), dtype);
  const Tensor c0 = expected("c0", c0_, gates, n.state(n.hidden), ScalarType::Float);
  const OptionalTensor dy = expected("dy", dy_, gates, n.rows(n.size), dtype);
  const OptionalTensor dh_n = expected("dh_n", dh_n_, gates, n.state(n.size), ScalarType::Float);
  const OptionalTensor dc_n = expected("dc_n", dc_n_, gates, n.state(n.hidden), ScalarType::Float);
  const ProductNorm norm(n, t.w_hh, 4, u, ln_weight);

  const Tensor da = new_tensor(gates, n.rows(4 * n.hidden), dtype);
  const Tensor du = new_tensor(gates, norm.weight ? n.rows(4 * n.hidden) : none, dtype);
  const Tensor dh0 = new_floats(gates, n.state(n.size)), dc0 = new_floats(gates, n.state(n.hidden));
  const Tensor dpeephole = new_floats(gates, t.peephole ? Shape{n.directions, 3, n.hidden} : none);
  const Shape cell = t.ln_c_weight ? Shape{n.directions, n.hidden} : none;
  const Tensor dln_c_weight = new_floats(gates, cell), dln_c_bias = new_floats(gates, cell);
  const Tensor dm_out = new_tensor(gates, t.w_hr ? n.rows(n.size) : none, dtype);
  const Tensor m = new_tensor(gates, t.w_hr ? n.rows(n.hidden) : none, dtype);
  OptionalTensor peephole_sums, ln_c_sums;
  if (t.peephole) peephole_sums = new_zero_floats(gates, {n.batch, n.directions, 3, n.hidden});
  if (t.ln_c_weight) ln_c_sums = new_zero_floats(gates, {2, n.batch, n.directions, n.hidden});

  for_float_type(gates, "gates", [&](auto type) {
    using T = decltype(type);
    LstmBackward<T> a{};
    a.q = sequence_of(n, t.options, zoneout_h, zoneout_c, eps);
    a.dy = input<T>(dy);
    a.dh_n = input<float>(dh_n);
    a.dc_n = input<float>(dc_n);
    a.gates = input<T>(gates);
    a.cells = input<T>(cells);
    a.c0 = input<float>(c0);
    a.peephole = input<float>(t.peephole);
    a.ln_c_weight = input<float>(t.ln_c_weight);
    a.ln_c_bias = input<float>(t.ln_c_bias);
    a.da = output<T>(da);
    a.dh0 = output<float>(dh0);
    a.dc0 = output<float>(dc0);
    a.peephole_sums = output<float>(peephole_sums);
    a.ln_c_sums = output<float>(ln_c_sums);
    const bool plain = !norm.weight && !t.ln_c_weight && !t.w_hr;
    if (!plain || !run_persistent("lstm_backward", a, t.w_hh, true, stream, lstm_backward_persistent_launch<T>)) {
      std::optional<StepProduct> projection;
      LstmProjectionBackward<T> p{};
      const Tensor out = new_tensor(gates, n.state(t.w_hr ? n.size : 0), dtype);
      if (t.w_hr) {
        projection.emplace(out, *t.w_hr, false);
        p = {output<T>(out), input<float>(projection->out), output<T>(dm_out), output<T>(m)};
      }
      T* const du_out = norm.weight ? output<T>(du) : nullptr;
      run_backward_loop("lstm_backward", a, t.w_hh, norm, du_out, stream, [&](const LoopBackward<T>& l, int64_t k) {
        if (projection) {
          check_launch("lstm_backward", lstm_backward_project_launch(a, l, p, k, stream));
          projection->run();
        }
        check_launch("lstm_backward", lstm_backward_step_launch(a, l, p, k, stream));
      });
    }
  });
  if (t.peephole)
    check_launch("lstm_backward", recurrent_sum_launch(input<float>(peephole_sums), output<float>(dpeephole), nullptr,
                                                       n.batch, n.directions * 3 * n.hidden, stream));
  if (t.ln_c_weight)
    check_launch("lstm_backward",
                 recurrent_sum_launch(input<float>(ln_c_sums), output<float>(dln_c_weight), output<float>(dln_c_bias),
                                      n.batch, n.directions * n.hidden, stream));
  return {da, du, dh0, dc0, norm.dweight, dpeephole, dln_c_weight, dln_c_bias, dm_out, m};
}

}  // namespace

FASTDL_CUDA_LIBRARY(m) {
  m.impl("lstm_forward", TORCH_BOX(&lstm_forward));
  m.impl("lstm_inference", TORCH_BOX(&lstm_inference));
  m.impl("lstm_backward", TORCH_BOX(&lstm_backward));
}

}  // namespace fastdl::cuda
