// GRU backward for one level: the steps of one thread. Method: recurrent_backward.h.
//
// Test: pytest tests/test_gru.py -k cpu
#include "cpu/gru_kernel.h"
#include "cpu/recurrent_backward.h"

namespace fastdl {
namespace FASTDL_LEVEL {
namespace {

template <class T>
struct Backward : BackwardSteps<T, 3> {
  using Base = BackwardSteps<T, 3>;
  using Base::B, Base::d, Base::dh, Base::H;
  const GruBackwardArgs& a;
  float* dbias_n;

  Backward(const GruBackwardArgs& a, int64_t d, const Member& member)
      : Base(a, d, member), a(a), dbias_n(a.dbias_n + d * H) {}

  void begin() const { this->begin_h(); }
  void end() const { this->end_h(); }

  void gates(int64_t t, uint8_t* now, const Member&) const {
    const int64_t last = this->last(t);
    this->each_unit(t, now, [&](int64_t row, int64_t i, int64_t n) FASTDL_STEP {
      const int64_t at = this->place(t, row);
      // A sequence that is over gave y = 0; its h is still h0 (only backwards in time, where it has not begun).
      const bool has_last = last >= 0 && last < a.time && running(a, row, last);
      const vf h = has_last ? get<T>(a.y, this->place(last, row) * H + i, n) : get<F32>(a.h0, (d * B + row) * H + i, n);
      vf gate[4];
      for (int g = 0; g < 4; ++g) gate[g] = get<T>(a.gates_in, at * 4 * H + g * H + i, n);
      const vf one = vset1(1.0f), r = gate[0], z = gate[1], new_gate = gate[2];
      const vf dnew = this->arriving(t, row, i, n);
      const vf dn = vmul(vmul(dnew, vsub(one, z)), vsub(one, vmul(new_gate, new_gate)));
      const vf dz = vmul(vmul(dnew, vsub(h, new_gate)), vmul(z, vsub(one, z)));
      const vf dr = vmul(vmul(dn, gate[3]), vmul(r, vsub(one, r)));
      const vf du_n = vmul(dn, r);
      float* const carried = dh + row * a.wide_p + i;
      vstore(carried, vfma(dnew, z, vload(carried)));
      add_to(dbias_n, i, du_n, n);
      const vf da[3] = {dr, dz, dn}, du[3] = {dr, dz, du_n};
      this->emit(t, row, i, n, da, du, now);
    });
  }
};

}  // namespace

void gru_backward(const GruBackwardArgs& a, int thread, int team) {
  dispatch(a.format, [&](auto type) { run_backward<Backward<decltype(type)>>(a, thread, team); });
}

}  // namespace FASTDL_LEVEL
}  // namespace fastdl
