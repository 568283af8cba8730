// LSTM backward for one level: the steps of one thread. Method: recurrent_backward.h. Layer norm of the cell is two more
// meetings of the threads, a projection one.
//
// Test: pytest tests/test_lstm.py -k cpu
#include "common/simd_math.h"
#include "cpu/lstm_kernel.h"
#include "cpu/recurrent_backward.h"

namespace fastdl {
namespace FASTDL_LEVEL {
namespace {

template <class T>
struct Backward : BackwardSteps<T, 4> {
  using Base = BackwardSteps<T, 4>;
  using Base::B, Base::d, Base::H, Base::mine, Base::mine_p, Base::P;
  const LstmBackwardArgs& a;
  const float *peephole, *ln_c, *ln_c_bias;
  float *dc, *dv, *s, *d_o;
  float *dpeephole, *dln_c, *dln_c_bias;
  uint8_t* out;

  Backward(const LstmBackwardArgs& a, int64_t d, const Member& member)
      : Base(a, d, member),
        a(a),
        peephole(a.peephole ? a.peephole + d * 3 * H : nullptr),
        ln_c(a.ln_c ? a.ln_c + d * H : nullptr),
        ln_c_bias(a.ln_c ? a.ln_c_bias + d * H : nullptr),
        dc(a.dc_work + d * B * a.wide),
        dv(ln_c ? a.dv + d * B * a.wide : nullptr),
        s(ln_c ? a.s + d * B * a.wide : nullptr),
        d_o(ln_c ? a.d_o + d * B * a.wide : nullptr),
        dpeephole(peephole ? a.dpeephole + d * 3 * H : nullptr),
        dln_c(ln_c ? a.dln_c + d * H : nullptr),
        dln_c_bias(ln_c ? a.dln_c_bias + d * H : nullptr),
        out(a.packed_hr ? a.out + d * B * a.wide_p * Operand<T>::BYTES : nullptr) {}

  void begin() const {
    widen(a.dc + d * B * H, B, H, a.wide, mine, dc);
    this->begin_h();
  }
  void end() const {
    narrow(dc, B, H, a.wide, mine, a.dc + d * B * H);
    this->end_h();
  }

  // What one vector of units of one row needs from the forward pass.
  struct Saved {
    vf gate[4], before, s;
  };
  FASTDL_STEP Saved saved(int64_t t, int64_t row, int64_t i, int64_t n) const {
    Saved x;
    const int64_t at = this->place(t, row), last = this->last(t);
    for (int g = 0; g < 4; ++g) x.gate[g] = get<T>(a.gates_in, at * 4 * H + g * H + i, n);
    x.before = last >= 0 && last < a.time ? get<T>(a.cells, this->place(last, row) * H + i, n)
                                          : get<F32>(a.c0, (d * B + row) * H + i, n);
    x.s = vfma(x.gate[1], x.before, vmul(x.gate[0], x.gate[2]));
    return x;
  }

  // From the gradients of o and of the cell (what came through its tanh and norm) to those of the gates of LANES units.
  FASTDL_STEP void gradients(int64_t t, int64_t row, int64_t i, int64_t n, const Saved& x, vf do_out, vf ds_out,
                             uint8_t* now) const {
    const vf one = vset1(1.0f), arriving = vload(dc + row * a.wide + i);
    const vf d_out = vmul(do_out, vmul(x.gate[3], vsub(one, x.gate[3])));
    vf ds = arriving, carried = vset1(0.0f);
    if (a.zoneout_c != 0.0f) {
      const vf z = zone(a.drawn, a.seed_c, a.zoneout_c, this->place(t, row) * H + i);
      ds = vmul(vsub(one, z), arriving);
      carried = vmul(z, arriving);
    }
    ds = vadd(ds, ds_out);
    if (peephole) ds = vfma(d_out, get<F32>(peephole, 2 * H + i, n), ds);
    const vf di = vmul(vmul(ds, x.gate[2]), vmul(x.gate[0], vsub(one, x.gate[0])));
    const vf df = vmul(vmul(ds, x.before), vmul(x.gate[1], vsub(one, x.gate[1])));
    const vf dg = vmul(vmul(ds, x.gate[0]), vsub(one, vmul(x.gate[2], x.gate[2])));
    carried = vfma(ds, x.gate[1], carried);
    if (peephole) {
      carried = vfma(di, get<F32>(peephole, i, n), carried);
      carried = vfma(df, get<F32>(peephole, H + i, n), carried);
      add_to(dpeephole, i, vmul(di, x.before), n);
      add_to(dpeephole, H + i, vmul(df, x.before), n);
      add_to(dpeephole, 2 * H + i, vmul(d_out, x.s), n);
    }
    vstore(dc + row * a.wide + i, carried);
    const vf da[4] = {di, df, dg, d_out};
    this->emit(t, row, i, n, da, da, now);
  }

  // From the gradient of m of LANES units; with layer norm of the cell only up to the normalized cell.
  FASTDL_STEP void from_m(int64_t t, int64_t row, int64_t i, int64_t n, vf dm, uint8_t* now) const {
    const Saved x = saved(t, row, i, n);
    if (ln_c) {
      vstore(dv + row * a.wide + i, dm);
      vstore(s + row * a.wide + i, x.s);
      return;
    }
    const vf v = vtanh(x.s);
    if (a.m) put<T>(a.m, this->place(t, row) * H + i, vmul(x.gate[3], v), n);
    const vf ds = vmul(vmul(dm, x.gate[3]), vsub(vset1(1.0f), vmul(v, v)));
    gradients(t, row, i, n, x, vmul(dm, v), ds, now);
  }

  void gates(int64_t t, uint8_t* now, const Member& member) const {
    if (out)
      through_projection(t, member, now);
    else
      this->each_unit(t, now, [&](int64_t row, int64_t i, int64_t n) FASTDL_STEP {
        from_m(t, row, i, n, this->arriving(t, row, i, n), now);
      });
    if (ln_c) through_cell_norm(t, member, now);
  }

  void through_projection(int64_t t, const Member& member, uint8_t* now) const {
    for (int64_t panel = mine_p.begin; panel < mine_p.end; ++panel)
      for (int64_t row = 0; row < B; ++row)
        each_part(panel, a.wide_p, [&](int64_t i, int64_t, int) FASTDL_STEP {
          const int64_t n = P - i;
          const vf v = running(a, row, t) && n > 0 ? this->arriving(t, row, i, n) : vset1(0.0f);
          if (n > 0) put<T>(a.dm_out, this->place(t, row) * P + i, v, n);
          Operand<T>::put(out, row * a.wide_p + i, v);
        });
    member.meet();
    const int64_t count = panels_of(H), bytes = packed_panel_bytes(a.format, a.wide_p);
    for (int64_t panel = mine.begin; panel < mine.end; panel += 4) {
      const int some = (int)(mine.end - panel < 4 ? mine.end - panel : 4);
      const uint8_t* panels[4];
      for (int j = 0; j < some; ++j) panels[j] = a.packed_hr + (d * count + panel + j) * bytes;
      each_row<T>(a, t, out, a.wide_p, panels, some, a.wide_p, [&](int64_t row, const float* dm) FASTDL_STEP {
        for (int j = 0; j < some; ++j)
          each_part(panel + j, H, [&](int64_t i, int64_t n, int lane) FASTDL_STEP {
            if (running(a, row, t)) return from_m(t, row, i, n, vload(dm + j * PANEL_COLS + lane), now);
            this->silent(t, row, i, n, now);
            put<T>(a.m, this->place(t, row) * H + i, vset1(0.0f), n);
          });
      });
    }
  }

  // body(row, unit, n, moments of the row's cell) for this thread's units of the sequences that run.
  template <class Body>
  FASTDL_STEP void each_cell(int64_t t, const Body& body) const {
    for (int64_t row = 0; row < B; ++row) {
      if (!running(a, row, t)) continue;
      const Moments k = moments<F32>(s + row * a.wide, 1, H, a.wide, a.eps);
      for (int64_t panel = mine.begin; panel < mine.end; ++panel)
        each_part(panel, H, [&](int64_t i, int64_t n, int) FASTDL_STEP { body(row, i, n, k); });
    }
  }

  // dv holds the gradient of m, s the cell: through m = o * tanh(LN(s) * weight + bias).
  void through_cell_norm(int64_t t, const Member& member, uint8_t* now) const {
    member.meet();
    each_cell(t, [&](int64_t row, int64_t i, int64_t n, const Moments& k) FASTDL_STEP {
      const vf o = get<T>(a.gates_in, this->place(t, row) * 4 * H + 3 * H + i, n);
      const vf hat = standard(vload(s + row * a.wide + i), k), w = get<F32>(ln_c, i, n);
      const vf v = vtanh(vfma(hat, w, get<F32>(ln_c_bias, i, n))), dm = vload(dv + row * a.wide + i);
      const vf dn = vmul(vmul(dm, o), vsub(vset1(1.0f), vmul(v, v)));
      if (a.m) put<T>(a.m, this->place(t, row) * H + i, vmul(o, v), n);
      add_to(dln_c, i, vmul(dn, hat), n);
      add_to(dln_c_bias, i, dn, n);
      vstore(dv + row * a.wide + i, vmul(dn, w));
      vstore(d_o + row * a.wide + i, vmul(dm, v));
    });
    member.meet();
    for (int64_t row = 0; row < B; ++row) {
      if (!running(a, row, t)) continue;
      const float* const line = s + row * a.wide;
      const Moments k = moments<F32>(line, 1, H, a.wide, a.eps);
      const GradientMeans means = gradient_means<F32>(dv + row * a.wide, line, 1, H, a.wide, a.wide, k);
      for (int64_t panel = mine.begin; panel < mine.end; ++panel)
        each_part(panel, H, [&](int64_t i, int64_t n, int) FASTDL_STEP {
          const vf hat = standard(vload(line + i), k);
          const vf ds = norm_gradient(vload(dv + row * a.wide + i), hat, means, k.rstd);
          gradients(t, row, i, n, saved(t, row, i, n), vload(d_o + row * a.wide + i), ds, now);
        });
    }
  }
};

}  // namespace

void lstm_backward(const LstmBackwardArgs& a, int thread, int team) {
  dispatch(a.format, [&](auto type) { run_backward<Backward<decltype(type)>>(a, thread, team); });
}

}  // namespace FASTDL_LEVEL
}  // namespace fastdl
