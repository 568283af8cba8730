// LSTM backward for one level: the steps of one thread, from the last to the first.
//
// A thread owns panels of 16 hidden units as in the forward pass: from dh of its units it computes the gradients of their
// gates, and when all are there (the threads meet) the product of these with w_hh for its own part of dh. The operand of
// the product is kept twice, so that one meeting a step is enough. Layer norm and projection meet more often.
//
// Test: pytest tests/test_lstm.py -k cpu
#include "common/simd_math.h"
#include "cpu/lstm_kernel.h"
#include "cpu/recurrent_steps.h"

namespace fastdl {
namespace FASTDL_LEVEL {
namespace {

// Adds to LANES of the float sums that one thread owns.
FASTDL_INLINE void add_to(float* base, int64_t at, vf v, int64_t n) {
  put<F32>(base, at, vadd(get<F32>(base, at, n), v), n);
}

template <class T>
struct Backward {
  using Element = typename T::Element;
  const LstmBackwardArgs& a;
  const int64_t d, H, P, B;
  const float *peephole, *ln, *ln_c, *ln_c_bias, *mask;
  float *dh, *dc, *dhat, *dv, *s;
  float *dpeephole, *dln, *dln_c, *dln_c_bias;
  uint8_t *operand[2], *out;
  Range mine, mine_p;

  Backward(const LstmBackwardArgs& a, int64_t d, const Member& member)
      : a(a),
        d(d),
        H(a.hidden),
        P(a.size),
        B(a.batch),
        peephole(a.peephole ? a.peephole + d * 3 * H : nullptr),
        ln(a.ln_weight ? a.ln_weight + d * 4 * H : nullptr),
        ln_c(a.ln_c ? a.ln_c + d * H : nullptr),
        ln_c_bias(a.ln_c ? a.ln_c_bias + d * H : nullptr),
        mask(a.h_mask ? a.h_mask + d * B * P : nullptr),
        dh(a.dh_work + d * B * a.wide_p),
        dc(a.dc_work + d * B * a.wide),
        dhat(ln ? a.dhat + d * B * 4 * a.wide : nullptr),
        dv(ln_c ? a.dv + d * B * a.wide : nullptr),
        s(ln_c ? a.s + d * B * a.wide : nullptr),
        dpeephole(peephole ? a.dpeephole + d * 3 * H : nullptr),
        dln(ln ? a.dln_weight + d * 4 * H : nullptr),
        dln_c(ln_c ? a.dln_c + d * H : nullptr),
        dln_c_bias(ln_c ? a.dln_c_bias + d * H : nullptr),
        out(a.packed_hr ? a.out + d * B * a.wide_p * Operand<T>::BYTES : nullptr),
        mine(member.share(panels_of(H))),
        mine_p(member.share(panels_of(P))) {
    for (int i = 0; i < 2; ++i) operand[i] = a.operand + (i * a.directions + d) * B * 4 * a.wide * Operand<T>::BYTES;
  }

  int64_t place(int64_t t, int64_t row) const { return (t * B + row) * a.directions + d; }

  void begin() const {
    widen(a.dh + d * B * P, B, P, a.wide_p, mine_p, dh);
    widen(a.dc + d * B * H, B, H, a.wide, mine, dc);
    for (int64_t panel = mine.begin; panel < mine.end; ++panel)  // places past the last unit meet weights of zero
      for (int64_t row = 0; row < 4 * B; ++row)
        each_part(panel, a.wide, [&](int64_t i, int64_t, int) {
          for (int k = 0; k < 2; ++k) Operand<T>::put(operand[k], row * a.wide + i, vset1(0.0f));
        });
  }
  void end() const {
    narrow(dh, B, P, a.wide_p, mine_p, a.dh + d * B * P);
    narrow(dc, B, H, a.wide, mine, a.dc + d * B * H);
  }

  // What one vector of units of one row needs from the forward pass; t of the step before in time's order of the direction.
  struct Saved {
    vf gate[4], before, s;
  };
  FASTDL_STEP Saved saved(int64_t t, int64_t row, int64_t i, int64_t n) const {
    Saved x;
    for (int g = 0; g < 4; ++g) x.gate[g] = get<T>(a.gates_in, place(t, row) * 4 * H + g * H + i, n);
    const int64_t last = d == 0 ? t - 1 : t + 1;
    x.before = last >= 0 && last < a.time ? get<T>(a.cells, place(last, row) * H + i, n)
                                          : get<F32>(a.c0, (d * B + row) * H + i, n);
    x.s = vfma(x.gate[1], x.before, vmul(x.gate[0], x.gate[2]));
    return x;
  }

  // dh + dy of LANES elements of h in a running row; leaves in dh what zoneout carries over, returns the gradient of the new h.
  FASTDL_STEP vf arriving(int64_t t, int64_t row, int64_t i, int64_t n) const {
    float* const p = dh + row * a.wide_p + i;
    const int64_t at = place(t, row) * P + i;
    vf v = vload(p);
    if (a.dy) v = vadd(v, get<T>(a.dy, at, n));
    if (a.zoneout_h == 0.0f) {
      vstore(p, vset1(0.0f));
      return v;
    }
    const vf z = zone(a.drawn, a.seed_h, a.zoneout_h, at);
    vstore(p, vmul(z, v));
    return vmul(vsub(vset1(1.0f), z), v);
  }

  // From the gradient of m to those of the gates of LANES units. ds_norm: what came through the norm of the cell.
  FASTDL_STEP void gates(int64_t t, int64_t row, int64_t i, int64_t n, const Saved& x, vf do_, vf ds_out,
                         uint8_t* next) const {
    const vf one = vset1(1.0f);
    const int64_t at = place(t, row);
    const vf d_o = vmul(do_, vmul(x.gate[3], vsub(one, x.gate[3])));
    const vf arriving = vload(dc + row * a.wide + i);
    vf ds = arriving, carried = vset1(0.0f);
    if (a.zoneout_c != 0.0f) {
      const vf z = zone(a.drawn, a.seed_c, a.zoneout_c, at * H + i);
      ds = vmul(vsub(one, z), arriving);
      carried = vmul(z, arriving);
    }
    ds = vadd(ds, ds_out);
    if (peephole) ds = vfma(d_o, get<F32>(peephole, 2 * H + i, n), ds);
    const vf di = vmul(vmul(ds, x.gate[2]), vmul(x.gate[0], vsub(one, x.gate[0])));
    const vf df = vmul(vmul(ds, x.before), vmul(x.gate[1], vsub(one, x.gate[1])));
    const vf dg = vmul(vmul(ds, x.gate[0]), vsub(one, vmul(x.gate[2], x.gate[2])));
    carried = vfma(ds, x.gate[1], carried);
    if (peephole) {
      carried = vfma(di, get<F32>(peephole, i, n), carried);
      carried = vfma(df, get<F32>(peephole, H + i, n), carried);
      add_to(dpeephole, i, vmul(di, x.before), n);
      add_to(dpeephole, H + i, vmul(df, x.before), n);
      add_to(dpeephole, 2 * H + i, vmul(d_o, x.s), n);
    }
    vstore(dc + row * a.wide + i, carried);
    const vf da[4] = {di, df, dg, d_o};
    for (int g = 0; g < 4; ++g) {
      put<T>(a.da, at * 4 * H + g * H + i, da[g], n);
      if (ln)
        vstore(dhat + (row * 4 + g) * a.wide + i, da[g]);  // the weight comes in below
      else
        Operand<T>::put(next, (row * 4 + g) * a.wide + i, da[g]);
    }
  }

  // A sequence that is over: no gradient but what passes through.
  FASTDL_STEP void silent(int64_t t, int64_t row, int64_t i, int64_t n, uint8_t* next) const {
    const vf zero = vset1(0.0f);
    for (int g = 0; g < 4; ++g) {
      const int64_t at = place(t, row) * 4 * H + g * H + i;
      put<T>(a.da, at, zero, n);
      if (ln) put<T>(a.du, at, zero, n);
      Operand<T>::put(next, (row * 4 + g) * a.wide + i, zero);
    }
    if (a.m) put<T>(a.m, place(t, row) * H + i, zero, n);
  }

  // From the gradient of m of LANES units; with layer norm of the cell only up to the gradient of the normalized cell.
  FASTDL_STEP void from_m(int64_t t, int64_t row, int64_t i, int64_t n, vf dm, uint8_t* next) const {
    const Saved x = saved(t, row, i, n);
    if (ln_c) {
      vstore(dv + row * a.wide + i, dm);
      vstore(s + row * a.wide + i, x.s);
      return;
    }
    const vf v = vtanh(x.s);
    if (a.m) put<T>(a.m, place(t, row) * H + i, vmul(x.gate[3], v), n);
    const vf ds = vmul(vmul(dm, x.gate[3]), vsub(vset1(1.0f), vmul(v, v)));
    gates(t, row, i, n, x, vmul(dm, v), ds, next);
  }

  void through_projection(int64_t t, const Member& member, uint8_t* next) const {
    for (int64_t panel = mine_p.begin; panel < mine_p.end; ++panel)
      for (int64_t row = 0; row < B; ++row)
        each_part(panel, a.wide_p, [&](int64_t i, int64_t, int) FASTDL_STEP {
          const int64_t n = P - i;
          const vf v = running(a, row, t) && n > 0 ? arriving(t, row, i, n) : vset1(0.0f);
          if (n > 0) put<T>(a.dm_out, place(t, row) * P + i, v, n);
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
            if (running(a, row, t))
              from_m(t, row, i, n, vload(dm + j * PANEL_COLS + lane), next);
            else
              silent(t, row, i, n, next);
          });
      });
    }
  }

  // dv holds the gradient of m, s the cell: through m = o * tanh(LN(s) * weight + bias).
  void through_cell_norm(int64_t t, const Member& member, uint8_t* next) const {
    member.meet();
    each_mine(t, [&](int64_t row, int64_t i, int64_t n, const Moments& k) FASTDL_STEP {
      const Saved x = saved(t, row, i, n);
      const vf hat = vmul(vsub(x.s, vset1(k.mean)), vset1(k.rstd));
      const vf w = get<F32>(ln_c, i, n), v = vtanh(vfma(hat, w, get<F32>(ln_c_bias, i, n)));
      const vf dm = vload(dv + row * a.wide + i);
      const vf dn = vmul(vmul(dm, x.gate[3]), vsub(vset1(1.0f), vmul(v, v)));
      if (a.m) put<T>(a.m, place(t, row) * H + i, vmul(x.gate[3], v), n);
      add_to(dln_c, i, vmul(dn, hat), n);
      add_to(dln_c_bias, i, dn, n);
      vstore(dv + row * a.wide + i, vmul(dn, w));
      vstore(a.dout + (d * B + row) * a.wide + i, vmul(dm, v));
    });
    member.meet();
    for (int64_t row = 0; row < B; ++row) {
      if (!running(a, row, t)) continue;
      const float* const line = s + row * a.wide;
      const Moments k = moments<F32>(line, 1, H, a.wide, a.eps);
      const GradientMeans means = gradient_means<F32>(dv + row * a.wide, line, 1, H, a.wide, a.wide, k);
      for (int64_t panel = mine.begin; panel < mine.end; ++panel)
        each_part(panel, H, [&](int64_t i, int64_t n, int) FASTDL_STEP {
          const Saved x = saved(t, row, i, n);
          const vf hat = vmul(vsub(x.s, vset1(k.mean)), vset1(k.rstd));
          const vf ds = norm_gradient(vload(dv + row * a.wide + i), hat, means, k.rstd);
          gates(t, row, i, n, x, vload(a.dout + (d * B + row) * a.wide + i), ds, next);
        });
    }
  }

  // body(row, unit, n, moments of the row's cell) for this thread's units of the sequences that run.
  template <class Body>
  FASTDL_STEP void each_mine(int64_t t, const Body& body) const {
    for (int64_t row = 0; row < B; ++row) {
      if (!running(a, row, t)) continue;
      const Moments k = moments<F32>(s + row * a.wide, 1, H, a.wide, a.eps);
      for (int64_t panel = mine.begin; panel < mine.end; ++panel)
        each_part(panel, H, [&](int64_t i, int64_t n, int) FASTDL_STEP { body(row, i, n, k); });
    }
  }

  // dhat holds the gradient of LN(u) * weight: to the gradient of u.
  void through_norm(int64_t t, const Member& member, uint8_t* next) const {
    for (int64_t row = 0; row < B; ++row) {
      if (!running(a, row, t)) continue;
      const Element* const u = (const Element*)a.u + place(t, row) * 4 * H;
      const Moments k = moments<T>(u, 1, 4 * H, 0, a.eps);
      for (int64_t panel = mine.begin; panel < mine.end; ++panel)
        each_part(panel, H, [&](int64_t i, int64_t n, int) FASTDL_STEP {
          for (int g = 0; g < 4; ++g) {
            float* const p = dhat + (row * 4 + g) * a.wide + i;
            const vf da = vload(p), hat = vmul(vsub(get<T>(u, g * H + i, n), vset1(k.mean)), vset1(k.rstd));
            add_to(dln, g * H + i, vmul(da, hat), n);
            vstore(p, vmul(da, get<F32>(ln, g * H + i, n)));
          }
        });
    }
    member.meet();
    for (int64_t row = 0; row < B; ++row) {
      if (!running(a, row, t)) continue;
      const Element* const u = (const Element*)a.u + place(t, row) * 4 * H;
      const Moments k = moments<T>(u, 1, 4 * H, 0, a.eps);
      const GradientMeans means = gradient_means<T>(dhat + row * 4 * a.wide, u, 4, H, a.wide, H, k);
      for (int64_t panel = mine.begin; panel < mine.end; ++panel)
        each_part(panel, H, [&](int64_t i, int64_t n, int) FASTDL_STEP {
          for (int g = 0; g < 4; ++g) {
            const vf hat = vmul(vsub(get<T>(u, g * H + i, n), vset1(k.mean)), vset1(k.rstd));
            const vf du = norm_gradient(vload(dhat + (row * 4 + g) * a.wide + i), hat, means, k.rstd);
            put<T>(a.du, place(t, row) * 4 * H + g * H + i, du, n);
            Operand<T>::put(next, (row * 4 + g) * a.wide + i, du);
          }
        });
    }
  }

  void step(int64_t t, int64_t turn, const Member& member) const {
    uint8_t* const now = operand[turn & 1];
    if (out) {
      through_projection(t, member, now);
    } else {
      for (int64_t panel = mine.begin; panel < mine.end; ++panel)
        for (int64_t row = 0; row < B; ++row)
          each_part(panel, H, [&](int64_t i, int64_t n, int) FASTDL_STEP {
            if (running(a, row, t))
              from_m(t, row, i, n, arriving(t, row, i, n), now);
            else
              silent(t, row, i, n, now);
          });
    }
    if (ln_c) through_cell_norm(t, member, now);
    if (ln) through_norm(t, member, now);
    member.meet();
    const int64_t k = 4 * a.wide, count = panels_of(P), bytes = packed_panel_bytes(a.format, k);
    for (int64_t panel = mine_p.begin; panel < mine_p.end; panel += 4) {
      const int some = (int)(mine_p.end - panel < 4 ? mine_p.end - panel : 4);
      const uint8_t* panels[4];
      for (int j = 0; j < some; ++j) panels[j] = a.packed + (d * count + panel + j) * bytes;
      each_row<T>(a, t, now, k, panels, some, k, [&](int64_t row, const float* through) FASTDL_STEP {
        if (!running(a, row, t)) return;
        for (int j = 0; j < some; ++j)
          each_part(panel + j, P, [&](int64_t i, int64_t n, int lane) FASTDL_STEP {
            float* const p = dh + row * a.wide_p + i;
            vf v = vload(through + j * PANEL_COLS + lane);
            if (mask) v = vmul(v, get<F32>(mask, row * P + i, n));
            vstore(p, vadd(vload(p), v));
          });
      });
    }
  }
};

template <class T>
void backward_of(const LstmBackwardArgs& a, int thread, int team) {
  const Member member(a, thread, team);
  for (int d = member.first; d < member.last; ++d) {
    const Backward<T> b(a, d, member);
    b.begin();
    member.meet();
    for (int64_t turn = 0; turn < a.time; ++turn) b.step(d == 0 ? a.time - 1 - turn : turn, turn, member);
    b.end();
  }
}

}  // namespace

void lstm_backward(const LstmBackwardArgs& a, int thread, int team) {
  dispatch(a.format, [&](auto type) { backward_of<decltype(type)>(a, thread, team); });
}

}  // namespace FASTDL_LEVEL
}  // namespace fastdl
