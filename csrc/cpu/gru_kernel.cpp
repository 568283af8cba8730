// GRU forward for one level: the steps of one thread. Method: recurrent_forward.h.
//
// Test: pytest tests/test_gru.py -k cpu
#include "cpu/gru_kernel.h"

#include "common/simd_math.h"
#include "cpu/recurrent_forward.h"

namespace fastdl {
namespace FASTDL_LEVEL {
namespace {

template <class T>
struct Forward : ForwardSteps<T, 3> {
  using Base = ForwardSteps<T, 3>;
  using Base::d, Base::H;
  const GruForwardArgs& a;
  const float* bias_n;

  Forward(const GruForwardArgs& a, int64_t d, const Member& member)
      : Base(a, d, member), a(a), bias_n(a.bias_n ? a.bias_n + d * H : nullptr) {}

  void begin() const { this->begin_h(); }
  void end() const { this->end_h(); }

  void step(int64_t t, const uint8_t* now, uint8_t* next, const Member& member) const {
    this->gates(t, member, now, [&](int64_t row, int64_t i, int64_t n, const vf(&x)[3]) FASTDL_STEP {
      const int64_t at = this->place(t, row);
      if (!running(a, row, t)) {
        if (a.gates_out)
          for (int g = 0; g < 4; ++g) put<T>(a.gates_out, at * 4 * H + g * H + i, vset1(0.0f), n);
        return this->output(t, row, i, n, vset1(0.0f), next);
      }
      const vf r = vsigmoid(vadd(this->input(at, 0, i, n), x[0]));
      const vf z = vsigmoid(vadd(this->input(at, 1, i, n), x[1]));
      const vf u_n = bias_n ? vadd(x[2], get<F32>(bias_n, i, n)) : x[2];
      const vf new_gate = vtanh(vfma(r, u_n, this->input(at, 2, i, n)));
      if (a.gates_out) {
        const vf saved[4] = {r, z, new_gate, u_n};
        for (int g = 0; g < 4; ++g) put<T>(a.gates_out, at * 4 * H + g * H + i, saved[g], n);
      }
      const vf before = vload(this->h + row * a.wide_p + i);
      this->output(t, row, i, n, vfma(z, vsub(before, new_gate), new_gate), next);
    });
  }
};

void forward(const GruForwardArgs& a, int thread, int team) {
  dispatch(a.format, [&](auto type) { run_forward<Forward<decltype(type)>>(a, thread, team); });
}

}  // namespace

extern const GruKernels gru_kernels = {forward, gru_backward};

}  // namespace FASTDL_LEVEL
}  // namespace fastdl
