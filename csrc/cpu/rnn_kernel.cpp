// Elman RNN for one level: the steps of one thread. Method: recurrent_forward.h, recurrent_backward.h.
//
// Test: pytest tests/test_rnn.py -k cpu
#include "cpu/rnn_kernel.h"

#include "common/simd_math.h"
#include "cpu/recurrent_backward.h"
#include "cpu/recurrent_forward.h"

namespace fastdl {
namespace FASTDL_LEVEL {
namespace {

template <class T>
struct Forward : ForwardSteps<T, 1> {
  using Base = ForwardSteps<T, 1>;
  const RnnForwardArgs& a;

  Forward(const RnnForwardArgs& a, int64_t d, const Member& member) : Base(a, d, member), a(a) {}

  void begin() const { this->begin_h(); }
  void end() const { this->end_h(); }

  void step(int64_t t, const uint8_t* now, uint8_t* next, const Member& member) const {
    this->gates(t, member, now, [&](int64_t row, int64_t i, int64_t n, const vf(&x)[1]) FASTDL_STEP {
      const int64_t at = this->place(t, row);
      vf value = vset1(0.0f);
      if (running(a, row, t)) {
        value = vadd(this->input(at, 0, i, n), x[0]);
        value = a.relu ? vmax(vset1(0.0f), value) : vtanh(value);  // in this order NaN stays NaN
      }
      if (a.gates_out) put<T>(a.gates_out, at * this->H + i, value, n);
      this->output(t, row, i, n, value, next);
    });
  }
};

template <class T>
struct Backward : BackwardSteps<T, 1> {
  using Base = BackwardSteps<T, 1>;
  const RnnBackwardArgs& a;

  Backward(const RnnBackwardArgs& a, int64_t d, const Member& member) : Base(a, d, member), a(a) {}

  void begin() const { this->begin_h(); }
  void end() const { this->end_h(); }

  void gates(int64_t t, uint8_t* now, const Member&) const {
    this->each_unit(t, now, [&](int64_t row, int64_t i, int64_t n) FASTDL_STEP {
      const vf value = get<T>(a.gates_in, this->place(t, row) * this->H + i, n), zero = vset1(0.0f);
      const vf dnew = this->arriving(t, row, i, n);
      const vf slope = vsub(vset1(1.0f), vmul(value, value));
      const vf da[1] = {a.relu ? vselect_le(value, zero, zero, dnew) : vmul(dnew, slope)};
      this->emit(t, row, i, n, da, da, now);
    });
  }
};

void forward(const RnnForwardArgs& a, int thread, int team) {
  dispatch(a.format, [&](auto type) { run_forward<Forward<decltype(type)>>(a, thread, team); });
}
void backward(const RnnBackwardArgs& a, int thread, int team) {
  dispatch(a.format, [&](auto type) { run_backward<Backward<decltype(type)>>(a, thread, team); });
}

}  // namespace

extern const RnnKernels rnn_kernels = {forward, backward};

}  // namespace FASTDL_LEVEL
}  // namespace fastdl
