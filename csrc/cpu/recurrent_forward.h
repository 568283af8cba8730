// The forward steps that lstm, gru and rnn share, for one thread and direction: products of h with w_hh, layer norm of them,
// and what happens with a new h. For kernel sources. G: gates.
//
// A thread owns some panels of 16 hidden units, all gates of them: it computes their products with h, the gates and the new
// h, and meets the others once a step, when h is complete. h is kept twice, so that one meeting is enough. Layer norm
// needs sums over all units: the products are written, the threads meet, and each takes the sums over whole rows for
// itself, which costs less than another meeting.
#pragma once

#include "cpu/recurrent_steps.h"

namespace fastdl {
namespace FASTDL_LEVEL {
namespace {

template <class T, int G>
struct ForwardSteps {
  const RecurrentForwardArgs& a;
  const int64_t d, H, P, B;  // direction, units, size of h, sequences
  const float *ln, *mask;
  float *h, *u;
  uint8_t* operand[2];
  Range mine, mine_p;  // panels of units, of h

  ForwardSteps(const RecurrentForwardArgs& a, int64_t d, const Member& member)
      : a(a),
        d(d),
        H(a.hidden),
        P(a.size),
        B(a.batch),
        ln(a.ln_weight ? a.ln_weight + d * G * H : nullptr),
        mask(a.h_mask ? a.h_mask + d * B * P : nullptr),
        h(a.h + d * B * a.wide_p),
        u(ln ? a.u + d * B * G * a.wide : nullptr),
        mine(member.share(panels_of(H))),
        mine_p(member.share(panels_of(P))) {
    for (int i = 0; i < 2; ++i) operand[i] = a.operand + (i * a.directions + d) * B * a.wide_p * Operand<T>::BYTES;
  }

  // Of a row in [T, B, D].
  FASTDL_STEP int64_t place(int64_t t, int64_t row) const { return (t * B + row) * a.directions + d; }

  void begin_h() const {
    widen(a.h0 + d * B * P, B, P, a.wide_p, mine_p, h);
    for (int64_t panel = mine_p.begin; panel < mine_p.end; ++panel)
      for (int64_t row = 0; row < B; ++row)
        each_part(panel, a.wide_p, [&](int64_t i, int64_t, int) {
          vf v = vload(h + row * a.wide_p + i);
          if (mask && i < P) v = vmul(v, get<F32>(mask, row * P + i, P - i));
          Operand<T>::put(operand[0], row * a.wide_p + i, v);
          Operand<T>::put(operand[1], row * a.wide_p + i, vset1(0.0f));
        });
  }
  void end_h() const { narrow(h, B, P, a.wide_p, mine_p, a.h_n + d * B * P); }

  // emit(row, unit, n, x): x[G] are the products of h with w_hh, normalized, for LANES of this thread's units.
  template <class Emit>
  FASTDL_STEP void gates(int64_t t, const Member& member, const uint8_t* now, const Emit& emit) const {
    constexpr int UNITS = G == 1 ? 4 : 1;  // panels of units that one product takes
    const int64_t count = panels_of(H), bytes = packed_panel_bytes(a.format, P);
    for (int64_t panel = mine.begin; panel < mine.end; panel += UNITS) {
      const int some = (int)(mine.end - panel < UNITS ? mine.end - panel : UNITS);
      const uint8_t* panels[4];
      for (int j = 0; j < some; ++j)
        for (int g = 0; g < G; ++g) panels[j * G + g] = a.packed + ((d * G + g) * count + panel + j) * bytes;
      each_row<T>(a, t, now, a.wide_p, panels, some * G, P, [&](int64_t row, const float* out) FASTDL_STEP {
        for (int j = 0; j < some; ++j)
          each_part(panel + j, H, [&](int64_t i, int64_t n, int lane) FASTDL_STEP {
            vf x[G];
            for (int g = 0; g < G; ++g) x[g] = vload(out + (j * G + g) * PANEL_COLS + lane);
            if (!ln) return emit(row, i, n, x);
            for (int g = 0; g < G; ++g) vstore(u + (row * G + g) * a.wide + i, x[g]);
          });
      });
    }
    if (!ln) return;
    member.meet();
    for (int64_t row = 0; row < B; ++row) {
      const float* const line = u + row * G * a.wide;
      const Moments k = running(a, row, t) ? moments<F32>(line, G, H, a.wide, a.eps) : Moments{0.0f, 0.0f};
      for (int64_t panel = mine.begin; panel < mine.end; ++panel)
        each_part(panel, H, [&](int64_t i, int64_t n, int) FASTDL_STEP {
          vf x[G];
          for (int g = 0; g < G; ++g)
            x[g] = vmul(standard(vload(line + g * a.wide + i), k), get<F32>(ln, g * H + i, n));
          emit(row, i, n, x);
        });
    }
  }

  // A new h of LANES elements: zoneout, y, and what the next step multiplies. Not read where the sequence is over.
  FASTDL_STEP void output(int64_t t, int64_t row, int64_t i, int64_t n, vf now, uint8_t* next) const {
    float* const to = h + row * a.wide_p + i;
    const int64_t at = place(t, row) * P + i;
    vf v = vload(to);
    if (running(a, row, t)) {
      v = zoned(a.drawn, a.seed_h, a.zoneout_h, at, v, now);
      vstore(to, v);
      put<T>(a.y, at, v, n);
    } else {
      put<T>(a.y, at, vset1(0.0f), n);
    }
    if (mask) v = vmul(v, get<F32>(mask, row * P + i, n));
    Operand<T>::put(next, row * a.wide_p + i, v);
  }

  // gates_x of LANES units
  FASTDL_STEP vf input(int64_t at, int g, int64_t i, int64_t n) const {
    return get<T>(a.gates_x, at * G * H + g * H + i, n);
  }
};

// All steps of a room's class of the above, with begin(), step(t, now, next, member), end().
template <class Steps, class Args>
void run_forward(const Args& a, int thread, int team) {
  const Member member(a, thread, team);
  for (int d = member.first; d < member.last; ++d) {
    const Steps s(a, d, member);
    s.begin();
    member.meet();
    for (int64_t turn = 0; turn < a.time; ++turn) {
      s.step(d == 0 ? turn : a.time - 1 - turn, s.operand[turn & 1], s.operand[(turn + 1) & 1], member);
      member.meet();
    }
    s.end();
  }
}

}  // namespace
}  // namespace FASTDL_LEVEL
}  // namespace fastdl
