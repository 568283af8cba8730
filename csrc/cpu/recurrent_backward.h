// The backward steps that lstm, gru and rnn share, for one thread and direction, from the last step to the first. For kernel
// sources. G: gates.
//
// A thread owns panels of 16 hidden units as in the forward pass: from dh of its units it computes the gradients of their
// gates, and when all are there (the threads meet) the product of these with w_hh for its own part of dh. The operand of
// the product is kept twice, so that one meeting a step is enough. Layer norm meets once more.
#pragma once

#include "cpu/recurrent_steps.h"

namespace fastdl {
namespace FASTDL_LEVEL {
namespace {

// Adds to LANES of the float sums that one thread owns.
FASTDL_INLINE void add_to(float* base, int64_t at, vf v, int64_t n) {
  put<F32>(base, at, vadd(get<F32>(base, at, n), v), n);
}

template <class T, int G>
struct BackwardSteps {
  const RecurrentBackwardArgs& a;
  const int64_t d, H, P, B;
  const float *ln, *mask;
  float *dh, *dhat, *dln;
  uint8_t* operand[2];
  Range mine, mine_p;

  BackwardSteps(const RecurrentBackwardArgs& a, int64_t d, const Member& member)
      : a(a),
        d(d),
        H(a.hidden),
        P(a.size),
        B(a.batch),
        ln(a.ln_weight ? a.ln_weight + d * G * H : nullptr),
        mask(a.h_mask ? a.h_mask + d * B * P : nullptr),
        dh(a.dh_work + d * B * a.wide_p),
        dhat(ln ? a.dhat + d * B * G * a.wide : nullptr),
        dln(ln ? a.dln_weight + d * G * H : nullptr),
        mine(member.share(panels_of(H))),
        mine_p(member.share(panels_of(P))) {
    for (int i = 0; i < 2; ++i) operand[i] = a.operand + (i * a.directions + d) * B * G * a.wide * Operand<T>::BYTES;
  }

  FASTDL_STEP int64_t place(int64_t t, int64_t row) const { return (t * B + row) * a.directions + d; }
  // The step before t in the order of the direction; outside 0 .. T - 1 for the first.
  FASTDL_STEP int64_t last(int64_t t) const { return d == 0 ? t - 1 : t + 1; }

  void begin_h() const {
    widen(a.dh + d * B * P, B, P, a.wide_p, mine_p, dh);
    for (int64_t panel = mine.begin; panel < mine.end; ++panel)  // places past the last unit meet weights of zero
      for (int64_t row = 0; row < G * B; ++row)
        each_part(panel, a.wide, [&](int64_t i, int64_t, int) {
          for (int k = 0; k < 2; ++k) Operand<T>::put(operand[k], row * a.wide + i, vset1(0.0f));
        });
  }
  void end_h() const { narrow(dh, B, P, a.wide_p, mine_p, a.dh + d * B * P); }

  // dh + dy of LANES elements of h in a running row; leaves in dh what zoneout carries over, returns the gradient of the
  // new h.
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

  // Gradients of LANES units: da of gates_x, du of the normalized products with h.
  FASTDL_STEP void emit(int64_t t, int64_t row, int64_t i, int64_t n, const vf (&da)[G], const vf (&du)[G],
                        uint8_t* now) const {
    const int64_t at = place(t, row) * G * H + i;
    for (int g = 0; g < G; ++g) {
      put<T>(a.da, at + g * H, da[g], n);
      if (ln) {
        vstore(dhat + (row * G + g) * a.wide + i, du[g]);
      } else {
        if (a.du) put<T>(a.du, at + g * H, du[g], n);
        Operand<T>::put(now, (row * G + g) * a.wide + i, du[g]);
      }
    }
  }

  // A sequence that is over: no gradient but what passes through.
  FASTDL_STEP void silent(int64_t t, int64_t row, int64_t i, int64_t n, uint8_t* now) const {
    const vf zero = vset1(0.0f);
    const int64_t at = place(t, row) * G * H + i;
    for (int g = 0; g < G; ++g) {
      put<T>(a.da, at + g * H, zero, n);
      if (a.du) put<T>(a.du, at + g * H, zero, n);
      Operand<T>::put(now, (row * G + g) * a.wide + i, zero);
    }
  }

  // body(row, unit, n) for this thread's units of the sequences that run; the others are silent.
  template <class Body>
  FASTDL_STEP void each_unit(int64_t t, uint8_t* now, const Body& body) const {
    for (int64_t panel = mine.begin; panel < mine.end; ++panel)
      for (int64_t row = 0; row < B; ++row)
        each_part(panel, H, [&](int64_t i, int64_t n, int) FASTDL_STEP {
          if (running(a, row, t))
            body(row, i, n);
          else
            silent(t, row, i, n, now);
        });
  }

  // dhat holds the gradient of LN(u) * weight: to the gradient of u.
  void through_norm(int64_t t, const Member& member, uint8_t* now) const {
    using Element = typename T::Element;
    for (int64_t row = 0; row < B; ++row) {
      if (!running(a, row, t)) continue;
      const Element* const u = (const Element*)a.u + place(t, row) * G * H;
      const Moments k = moments<T>(u, 1, G * H, 0, a.eps);
      for (int64_t panel = mine.begin; panel < mine.end; ++panel)
        each_part(panel, H, [&](int64_t i, int64_t n, int) FASTDL_STEP {
          for (int g = 0; g < G; ++g) {
            float* const p = dhat + (row * G + g) * a.wide + i;
            const vf v = vload(p);
            add_to(dln, g * H + i, vmul(v, standard(get<T>(u, g * H + i, n), k)), n);
            vstore(p, vmul(v, get<F32>(ln, g * H + i, n)));
          }
        });
    }
    member.meet();
    for (int64_t row = 0; row < B; ++row) {
      if (!running(a, row, t)) continue;
      const Element* const u = (const Element*)a.u + place(t, row) * G * H;
      const Moments k = moments<T>(u, 1, G * H, 0, a.eps);
      const GradientMeans means = gradient_means<T>(dhat + row * G * a.wide, u, G, H, a.wide, H, k);
      for (int64_t panel = mine.begin; panel < mine.end; ++panel)
        each_part(panel, H, [&](int64_t i, int64_t n, int) FASTDL_STEP {
          for (int g = 0; g < G; ++g) {
            const vf hat = standard(get<T>(u, g * H + i, n), k);
            const vf du = norm_gradient(vload(dhat + (row * G + g) * a.wide + i), hat, means, k.rstd);
            put<T>(a.du, place(t, row) * G * H + g * H + i, du, n);
            Operand<T>::put(now, (row * G + g) * a.wide + i, du);
          }
        });
    }
  }

  // dh += (du w_hh) * h_mask, for this thread's part of h.
  FASTDL_STEP void product(int64_t t, const uint8_t* now) const {
    const int64_t k = G * a.wide, count = panels_of(P), bytes = packed_panel_bytes(a.format, k);
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

// All steps of a room's class of the above, with begin(), gates(t, now, member), end().
template <class Steps, class Args>
void run_backward(const Args& a, int thread, int team) {
  const Member member(a, thread, team);
  for (int d = member.first; d < member.last; ++d) {
    const Steps s(a, d, member);
    s.begin();
    member.meet();
    for (int64_t turn = 0; turn < a.time; ++turn) {
      const int64_t t = d == 0 ? a.time - 1 - turn : turn;
      uint8_t* const now = s.operand[turn & 1];
      s.gates(t, now, member);
      if (s.ln) s.through_norm(t, member, now);
      member.meet();
      s.product(t, now);
    }
    s.end();
  }
}

}  // namespace
}  // namespace FASTDL_LEVEL
}  // namespace fastdl
