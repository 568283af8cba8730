// LSTM forward for one level: the steps of one thread.
//
// A thread owns some panels of 16 hidden units, all four gates of them: it computes their products with h, the gates and
// the new h, and meets the others once a step, when h is complete. h is kept twice, so that one meeting is enough. Layer
// norm needs sums over all units: the products (and the cell) are written, the threads meet, and each takes the sums over
// whole rows for itself, which costs less than another meeting. A projection is a second product.
//
// Test: pytest tests/test_lstm.py -k cpu
#include "cpu/lstm_kernel.h"

#include "common/simd_math.h"
#include "cpu/recurrent_steps.h"

namespace fastdl {
namespace FASTDL_LEVEL {
namespace {

FASTDL_INLINE vf sigmoid(vf x) {
  vf slope;
  return vsigmoid(x, &slope);
}

template <class T>
struct Forward {
  const LstmForwardArgs& a;
  const int64_t d, H, P, B;  // direction, units, size of h, sequences
  const float *peephole, *ln, *ln_c, *ln_c_bias, *mask;
  float *h, *c, *s, *o, *u;
  uint8_t *operand[2], *m;
  Range mine, mine_p;  // panels of units, of h

  Forward(const LstmForwardArgs& a, int64_t d, const Member& member)
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
        h(a.h + d * B * a.wide_p),
        c(a.c + d * B * a.wide),
        s(ln_c ? a.s + d * B * a.wide : nullptr),
        o(ln_c ? a.o + d * B * a.wide : nullptr),
        u(ln ? a.u + d * B * 4 * a.wide : nullptr),
        m(a.packed_hr ? a.m + d * B * a.wide * Operand<T>::BYTES : nullptr),
        mine(member.share(panels_of(H))),
        mine_p(member.share(panels_of(P))) {
    for (int i = 0; i < 2; ++i) operand[i] = a.operand + (i * a.directions + d) * B * a.wide_p * Operand<T>::BYTES;
  }

  int64_t place(int64_t t, int64_t row) const { return (t * B + row) * a.directions + d; }

  // h of LANES elements to the product of the next step.
  FASTDL_STEP void feed(uint8_t* next, int64_t row, int64_t i, int64_t n, vf v) const {
    if (mask) v = vmul(v, get<F32>(mask, row * P + i, n));
    Operand<T>::put(next, row * a.wide_p + i, v);
  }

  void begin() const {
    widen(a.c0 + d * B * H, B, H, a.wide, mine, c);
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

  void end() const {
    narrow(c, B, H, a.wide, mine, a.c_n + d * B * H);
    narrow(h, B, P, a.wide_p, mine_p, a.h_n + d * B * P);
  }

  // m -> h, y, and the operand of the next step.
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
    feed(next, row, i, n, v);
  }

  // The gates of LANES units; x: products with h. Without layer norm of the cell everything up to h.
  FASTDL_STEP void cell(int64_t t, int64_t row, int64_t i, int64_t n, const vf (&x)[4], uint8_t* next) const {
    const int64_t at = place(t, row);
    if (!running(a, row, t)) {
      if (a.gates_out) {
        for (int g = 0; g < 4; ++g) put<T>(a.gates_out, at * 4 * H + g * H + i, vset1(0.0f), n);
        put<T>(a.cells, at * H + i, vload(c + row * a.wide + i), n);
      }
      if (!ln_c) finish(t, row, i, n, vset1(0.0f), next);
      return;
    }
    vf gate[4];
    for (int g = 0; g < 4; ++g) gate[g] = vadd(x[g], get<T>(a.gates_x, at * 4 * H + g * H + i, n));
    const vf before = vload(c + row * a.wide + i);
    if (peephole) {
      gate[0] = vfma(get<F32>(peephole, i, n), before, gate[0]);
      gate[1] = vfma(get<F32>(peephole, H + i, n), before, gate[1]);
    }
    gate[0] = sigmoid(gate[0]);
    gate[1] = sigmoid(gate[1]);
    gate[2] = vtanh(gate[2]);
    const vf sum = vfma(gate[1], before, vmul(gate[0], gate[2]));
    if (peephole) gate[3] = vfma(get<F32>(peephole, 2 * H + i, n), sum, gate[3]);
    gate[3] = sigmoid(gate[3]);
    const vf now = zoned(a.drawn, a.seed_c, a.zoneout_c, at * H + i, before, sum);
    vstore(c + row * a.wide + i, now);
    if (a.gates_out) {
      for (int g = 0; g < 4; ++g) put<T>(a.gates_out, at * 4 * H + g * H + i, gate[g], n);
      put<T>(a.cells, at * H + i, now, n);
    }
    if (ln_c) {
      vstore(s + row * a.wide + i, sum);
      vstore(o + row * a.wide + i, gate[3]);
    } else {
      finish(t, row, i, n, vmul(gate[3], vtanh(sum)), next);
    }
  }

  FASTDL_STEP void finish(int64_t t, int64_t row, int64_t i, int64_t n, vf value, uint8_t* next) const {
    if (m)
      Operand<T>::put(m, row * a.wide + i, value);
    else
      output(t, row, i, n, value, next);
  }

  void gates_of(int64_t panel, const uint8_t** panels) const {
    const int64_t count = panels_of(H), bytes = packed_panel_bytes(a.format, P);
    for (int g = 0; g < 4; ++g) panels[g] = a.packed + ((d * 4 + g) * count + panel) * bytes;
  }

  void step(int64_t t, int64_t turn, const Member& member) const {
    const uint8_t* const now = operand[turn & 1];
    uint8_t* const next = operand[(turn + 1) & 1];
    for (int64_t panel = mine.begin; panel < mine.end; ++panel) {
      const uint8_t* panels[4];
      gates_of(panel, panels);
      each_row<T>(a, t, now, a.wide_p, panels, 4, P, [&](int64_t row, const float* out) FASTDL_STEP {
        each_part(panel, H, [&](int64_t i, int64_t n, int lane) FASTDL_STEP {
          vf x[4];
          for (int g = 0; g < 4; ++g) x[g] = vload(out + g * PANEL_COLS + lane);
          if (!ln) return cell(t, row, i, n, x, next);
          for (int g = 0; g < 4; ++g) vstore(u + (row * 4 + g) * a.wide + i, x[g]);
        });
      });
    }
    if (ln) normalized_gates(t, member, next);
    if (ln_c) normalized_cell(t, member, next);
    if (m) project(t, member, next);
    member.meet();
  }

  void normalized_gates(int64_t t, const Member& member, uint8_t* next) const {
    member.meet();
    for (int64_t row = 0; row < B; ++row) {
      const bool here = running(a, row, t);
      const float* const line = u + row * 4 * a.wide;
      const Moments k = here ? moments<F32>(line, 4, H, a.wide, a.eps) : Moments{0.0f, 0.0f};
      for (int64_t panel = mine.begin; panel < mine.end; ++panel)
        each_part(panel, H, [&](int64_t i, int64_t n, int) FASTDL_STEP {
          vf x[4];
          for (int g = 0; g < 4; ++g) {
            const vf hat = vmul(vsub(vload(line + g * a.wide + i), vset1(k.mean)), vset1(k.rstd));
            x[g] = vmul(hat, get<F32>(ln, g * H + i, n));
          }
          cell(t, row, i, n, x, next);
        });
    }
  }

  void normalized_cell(int64_t t, const Member& member, uint8_t* next) const {
    member.meet();
    for (int64_t row = 0; row < B; ++row) {
      const bool here = running(a, row, t);
      const float* const line = s + row * a.wide;
      const Moments k = here ? moments<F32>(line, 1, H, a.wide, a.eps) : Moments{0.0f, 0.0f};
      for (int64_t panel = mine.begin; panel < mine.end; ++panel)
        each_part(panel, H, [&](int64_t i, int64_t n, int) FASTDL_STEP {
          vf value = vset1(0.0f);
          if (here) {
            const vf hat = vmul(vsub(vload(line + i), vset1(k.mean)), vset1(k.rstd));
            const vf v = vtanh(vfma(hat, get<F32>(ln_c, i, n), get<F32>(ln_c_bias, i, n)));
            value = vmul(vload(o + row * a.wide + i), v);
          }
          finish(t, row, i, n, value, next);
        });
    }
  }

  void project(int64_t t, const Member& member, uint8_t* next) const {
    member.meet();
    const int64_t count = panels_of(P), bytes = packed_panel_bytes(a.format, H);
    for (int64_t panel = mine_p.begin; panel < mine_p.end; panel += 4) {
      const int some = (int)(mine_p.end - panel < 4 ? mine_p.end - panel : 4);
      const uint8_t* panels[4];
      for (int i = 0; i < some; ++i) panels[i] = a.packed_hr + (d * count + panel + i) * bytes;
      each_row<T>(a, t, m, a.wide, panels, some, H, [&](int64_t row, const float* out) FASTDL_STEP {
        for (int j = 0; j < some; ++j)
          each_part(panel + j, P, [&](int64_t i, int64_t n, int lane) FASTDL_STEP {
            output(t, row, i, n, vload(out + j * PANEL_COLS + lane), next);
          });
      });
    }
  }
};

template <class T>
void forward_of(const LstmForwardArgs& a, int thread, int team) {
  const Member member(a, thread, team);
  for (int d = member.first; d < member.last; ++d) {
    const Forward<T> f(a, d, member);
    f.begin();
    member.meet();
    for (int64_t turn = 0; turn < a.time; ++turn) f.step(d == 0 ? turn : a.time - 1 - turn, turn, member);
    f.end();
  }
}

void forward(const LstmForwardArgs& a, int thread, int team) {
  dispatch(a.format, [&](auto type) { forward_of<decltype(type)>(a, thread, team); });
}

}  // namespace

extern const LstmKernels lstm_kernels = {forward, lstm_backward};

}  // namespace FASTDL_LEVEL
}  // namespace fastdl
