// LSTM forward for one level: the steps of one thread. Method: recurrent_forward.h. Layer norm of the cell is one more
// meeting of the threads, a projection a second product.
//
// Test: pytest tests/test_lstm.py -k cpu
#include "cpu/lstm_kernel.h"

#include "common/simd_math.h"
#include "cpu/recurrent_forward.h"

namespace fastdl {
namespace FASTDL_LEVEL {
namespace {

template <class T>
struct Forward : ForwardSteps<T, 4> {
  using Base = ForwardSteps<T, 4>;
  using Base::B, Base::d, Base::H, Base::mine, Base::mine_p, Base::P;
  const LstmForwardArgs& a;
  const float *peephole, *ln_c, *ln_c_bias;
  float *c, *s, *o;
  uint8_t* m;

  Forward(const LstmForwardArgs& a, int64_t d, const Member& member)
      : Base(a, d, member),
        a(a),
        peephole(a.peephole ? a.peephole + d * 3 * H : nullptr),
        ln_c(a.ln_c ? a.ln_c + d * H : nullptr),
        ln_c_bias(a.ln_c ? a.ln_c_bias + d * H : nullptr),
        c(a.c + d * B * a.wide),
        s(ln_c ? a.s + d * B * a.wide : nullptr),
        o(ln_c ? a.o + d * B * a.wide : nullptr),
        m(a.packed_hr ? a.m + d * B * a.wide * Operand<T>::BYTES : nullptr) {}

  void begin() const {
    widen(a.c0 + d * B * H, B, H, a.wide, mine, c);
    this->begin_h();
  }
  void end() const {
    narrow(c, B, H, a.wide, mine, a.c_n + d * B * H);
    this->end_h();
  }

  // The gates of LANES units; x: products with h. Without layer norm of the cell everything up to h.
  FASTDL_STEP void cell(int64_t t, int64_t row, int64_t i, int64_t n, const vf (&x)[4], uint8_t* next) const {
    const int64_t at = this->place(t, row);
    const vf before = vload(c + row * a.wide + i);
    if (!running(a, row, t)) {
      if (a.gates_out) {
        for (int g = 0; g < 4; ++g) put<T>(a.gates_out, at * 4 * H + g * H + i, vset1(0.0f), n);
        put<T>(a.cells, at * H + i, before, n);
      }
      if (!ln_c) finish(t, row, i, n, vset1(0.0f), next);
      return;
    }
    vf gate[4];
    for (int g = 0; g < 4; ++g) gate[g] = vadd(x[g], this->input(at, g, i, n));
    if (peephole) {
      gate[0] = vfma(get<F32>(peephole, i, n), before, gate[0]);
      gate[1] = vfma(get<F32>(peephole, H + i, n), before, gate[1]);
    }
    gate[0] = vsigmoid(gate[0]);
    gate[1] = vsigmoid(gate[1]);
    gate[2] = vtanh(gate[2]);
    const vf sum = vfma(gate[1], before, vmul(gate[0], gate[2]));
    if (peephole) gate[3] = vfma(get<F32>(peephole, 2 * H + i, n), sum, gate[3]);
    gate[3] = vsigmoid(gate[3]);
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
      this->output(t, row, i, n, value, next);
  }

  void step(int64_t t, const uint8_t* now, uint8_t* next, const Member& member) const {
    this->gates(t, member, now,
                [&](int64_t row, int64_t i, int64_t n, const vf(&x)[4]) FASTDL_STEP { cell(t, row, i, n, x, next); });
    if (ln_c) normalized_cell(t, member, next);
    if (m) project(t, member, next);
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
            const vf hat = standard(vload(line + i), k);
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
            this->output(t, row, i, n, vload(out + j * PANEL_COLS + lane), next);
          });
      });
    }
  }
};

void forward(const LstmForwardArgs& a, int thread, int team) {
  dispatch(a.format, [&](auto type) { run_forward<Forward<decltype(type)>>(a, thread, team); });
}

}  // namespace

extern const LstmKernels lstm_kernels = {forward, lstm_backward};

}  // namespace FASTDL_LEVEL
}  // namespace fastdl
