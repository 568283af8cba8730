// What the CPU wrappers of lstm, gru and rnn share: checks for memory safety, packing, working memory, the size of a team.
#pragma once

#include <algorithm>
#include <initializer_list>
#include <vector>

#include "common/rows.h"
#include "cpu/recurrent_kernel.h"

namespace fastdl {

// A contiguous tensor of this dtype and shape on the CPU, or an error.
inline Tensor expected(const Tensor& t, ScalarType dtype, std::initializer_list<int64_t> shape, const char* message) {
  const auto sizes = t.sizes();
  check(t.is_cpu() && t.scalar_type() == dtype && std::equal(sizes.begin(), sizes.end(), shape.begin(), shape.end()),
        message);
  return as_contiguous(t);
}
inline OptionalTensor expected(const OptionalTensor& t, ScalarType dtype, std::initializer_list<int64_t> shape,
                               const char* message) {
  if (!t) return t;
  return expected(*t, dtype, shape, message);
}

template <class T = void>
const T* data_of(const OptionalTensor& t) {
  return t ? static_cast<const T*>(t->const_data_ptr()) : nullptr;
}
template <class T = void>
T* data_of(const Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

// Working memory in one piece; every part starts at a cache line.
class Arena {
 public:
  template <class T>
  void ask(T** place, int64_t count) {
    parts_.push_back({reinterpret_cast<void**>(place), bytes_});
    bytes_ += padded(count * static_cast<int64_t>(sizeof(T)));
  }
  void allocate() {
    memory_ = allocate_bytes(bytes_);
    for (const auto& part : parts_) *part.place = first_byte(*memory_) + part.offset;
  }

 private:
  struct Part {
    void** place;
    int64_t offset;
  };
  std::vector<Part> parts_;
  int64_t bytes_ = 0;
  OptionalTensor memory_;
};

// Threads for the steps: each direction at most one a panel, and one alone where a step is over before a second thread
// has seen that it began.
inline int recurrent_team(const RecurrentArgs& a) {
  const int64_t work = a.batch * a.gates * a.hidden * a.size;  // multiply-adds of a step and direction
  const int64_t each = work < 16 * 1024 ? 1 : panels_of(std::max(a.hidden, a.size));
  return static_cast<int>(std::min<int64_t>(thread_count(), each * a.directions));
}

// What a room's forward and backward calls know alike.
inline void fill_shape(RecurrentArgs& a, const Tensor& gates, int64_t gates_saved, const Tensor& w_hh, int64_t count) {
  check(gates.dim() == 4 && w_hh.dim() == 3 && gates.size(3) % gates_saved == 0, "gates: expected [T, B, D, G * H]");
  a.time = gates.size(0);
  a.batch = gates.size(1);
  a.directions = gates.size(2);
  a.hidden = gates.size(3) / gates_saved;
  a.size = w_hh.size(2);
  a.gates = count;
  a.wide = panels_of(a.hidden) * PANEL_COLS;
  a.wide_p = panels_of(a.size) * PANEL_COLS;
  a.format = float_format(gates, "gates: expected float32, float16 or bfloat16");
  check(a.directions == 1 || a.directions == 2, "gates: expected one or two directions");
  check(a.hidden > 0 && a.size > 0, "gates: expected at least one hidden unit");
}

inline void fill_zoneout(RecurrentArgs& a, const OptionalTensor& seed, double zoneout_h, double eps) {
  check(!seed || (seed->is_cpu() && seed->scalar_type() == ScalarType::Long && seed->numel() == 2),
        "seed: expected int64 [2]");
  a.drawn = seed.has_value();
  if (seed) {
    const OptionalTensor seeds = as_contiguous(*seed);
    a.seed_h = static_cast<uint64_t>(data_of<int64_t>(seeds)[0]);
    a.seed_c = static_cast<uint64_t>(data_of<int64_t>(seeds)[1]);
  }
  a.zoneout_h = static_cast<float>(zoneout_h);
  a.eps = static_cast<float>(eps);
}

// Bytes of a packed matrix [D][gates * rows, cols].
inline int64_t packed_bytes(const RecurrentArgs& a, int64_t gates, int64_t rows, int64_t cols) {
  return a.directions * gates * panels_of(rows) * packed_panel_bytes(a.format, cols);
}

// w [D, gates * rows, cols] to panels of `rows`, a share of them: what h is multiplied with.
inline void pack_outputs(const RecurrentProduct& kernels, const RecurrentArgs& a, const void* w, int64_t rows,
                         int64_t cols, uint8_t* to, Range share) {
  const int64_t count = panels_of(rows), bytes = packed_panel_bytes(a.format, cols);
  const int64_t element = a.format == FORMAT_F32 ? 4 : 2;
  for (int64_t i = share.begin; i < share.end; ++i) {
    const int64_t gate = i / count, first = i % count * PANEL_COLS;  // gate: of all directions
    kernels.pack_rows(a.format, static_cast<const uint8_t*>(w) + (gate * rows + first) * cols * element, cols,
                      std::min(PANEL_COLS, rows - first), cols, to + i * bytes);
  }
}

// w [D, gates * rows, cols] to panels of `cols`, a share of them: what the gradient is multiplied with. The inputs of a gate
// fill `wide` places.
inline void pack_inputs(const RecurrentProduct& kernels, const RecurrentArgs& a, const void* w, int64_t gates,
                        int64_t rows, int64_t wide, int64_t cols, uint8_t* to, Range share) {
  const int64_t count = panels_of(cols), bytes = packed_panel_bytes(a.format, gates * wide);
  const int64_t element = a.format == FORMAT_F32 ? 4 : 2;
  for (int64_t i = share.begin; i < share.end; ++i) {
    const int64_t d = i / count, first = i % count * PANEL_COLS;
    uint8_t* const panel = to + i * bytes;
    std::fill(panel, panel + bytes, uint8_t{0});
    for (int64_t g = 0; g < gates; ++g)
      kernels.pack_cols(a.format, static_cast<const uint8_t*>(w) + (((d * gates + g) * rows) * cols + first) * element,
                        cols, std::min(PANEL_COLS, cols - first), rows, g * wide, panel);
  }
}

// Kernels that work together are looked up for one variant: another thread may set a cap meanwhile.
const RecurrentProduct& recurrent_product_table(CpuVariant variant);
struct RecurrentInputKernels;
const RecurrentInputKernels& recurrent_input_table(CpuVariant variant);

// A float32 tensor of this shape: a copy of `from`, or zeros.
inline Tensor copy_or_zeros(const Tensor& like, const OptionalTensor& from, const std::vector<int64_t>& shape) {
  const Tensor out = new_tensor(like, shape, ScalarType::Float);
  float* const to = data_of<float>(out);
  if (from)
    std::copy(data_of<float>(from), data_of<float>(from) + out.numel(), to);
  else
    std::fill(to, to + out.numel(), 0.0f);
  return out;
}

// What every call has, contiguous; holds the memory that the arguments point to.
struct RecurrentParameters {
  Tensor w_hh;
  OptionalTensor ln_weight, h_mask, lengths;

  RecurrentParameters(RecurrentArgs& a, ScalarType dtype, const Tensor& w_hh_, const OptionalTensor& ln_weight_,
                      const OptionalTensor& h_mask_, const OptionalTensor& lengths_)
      : w_hh(expected(w_hh_, dtype, {a.directions, a.gates * a.hidden, a.size}, "w_hh: expected [D, G * H, P]")),
        ln_weight(expected(ln_weight_, ScalarType::Float, {a.directions, a.gates * a.hidden},
                           "ln_weight: expected float32 [D, G * H]")),
        h_mask(expected(h_mask_, ScalarType::Float, {a.directions, a.batch, a.size},
                        "h_mask: expected float32 [D, B, P]")),
        lengths(expected(lengths_, ScalarType::Long, {a.batch}, "lengths: expected int64 [B]")) {
    a.ln_weight = data_of<float>(ln_weight);
    a.h_mask = data_of<float>(h_mask);
    a.lengths = data_of<int64_t>(lengths);
  }
};

// Inputs, outputs and working memory of a forward call that all rooms have. saved: gates kept for a backward pass, 0 in
// inference.
struct RecurrentForwardCall {
  Tensor gates_x, h0, y, h_n;
  OptionalTensor gates;
  const RecurrentParameters& parameters;
  uint8_t* pack_hh = nullptr;
  Arena arena;
  const CpuVariant variant = cpu_variant();

  RecurrentForwardCall(RecurrentForwardArgs& a, const RecurrentParameters& p, const Tensor& gates_x_, const Tensor& h0_,
                       const OptionalTensor& packed, int64_t saved)
      : gates_x(as_contiguous(gates_x_)),
        h0(expected(h0_, ScalarType::Float, {a.directions, a.batch, a.size}, "h0: expected float32 [D, B, P]")),
        y(new_tensor(gates_x, {a.time, a.batch, a.directions, a.size}, gates_x.scalar_type())),
        h_n(new_tensor(h0, {a.directions, a.batch, a.size}, ScalarType::Float)),
        parameters(p) {
    a.gates_x = gates_x.const_data_ptr();
    a.h0 = static_cast<const float*>(h0.const_data_ptr());
    a.y = data_of(y);
    a.h_n = data_of<float>(h_n);
    if (saved) {
      gates = new_tensor(gates_x, {a.time, a.batch, a.directions, saved * a.hidden}, gates_x.scalar_type());
      a.gates_out = data_of(*gates);
    }
    const int64_t bytes = packed_bytes(a, a.gates, a.hidden, a.size);
    check(!packed || (packed->is_cpu() && packed->scalar_type() == ScalarType::Byte && packed->is_contiguous() &&
                      packed->numel() == bytes),
          "packed: expected what recurrent_pack gave for w_hh");
    if (packed)
      a.packed = static_cast<const uint8_t*>(packed->const_data_ptr());
    else
      arena.ask(&pack_hh, bytes);
    arena.ask(&a.barriers, 2);
    arena.ask(&a.h, a.directions * a.batch * a.wide_p);
    arena.ask(&a.operand, 2 * a.directions * a.batch * a.wide_p * 4);
    if (a.ln_weight) arena.ask(&a.u, a.directions * a.batch * a.gates * a.wide);
  }

  // kernel(args, thread, team) on a team, w_hh packed first. more(thread, team): what else is to be packed.
  template <class Args, class Kernel, class More>
  void run(Args& a, const Kernel& kernel, const More& more) {
    if (pack_hh) a.packed = pack_hh;
    std::fill(a.barriers, a.barriers + 2, Barrier());
    const RecurrentProduct& product = recurrent_product_table(variant);
    a.product = &product;
    Barrier packing;
    parallel_region(recurrent_team(a), [&](int thread, int team) {
      if (pack_hh)
        pack_outputs(product, a, parameters.w_hh.const_data_ptr(), a.hidden, a.size, pack_hh,
                     range(a.directions * a.gates * panels_of(a.hidden), thread, team));
      more(thread, team);
      packing.wait(team);
      kernel(a, thread, team);
    });
  }
};

// The same for a backward call. saved: gates that the forward pass kept; has_du: du is more than da.
struct RecurrentBackwardCall {
  Tensor gates, da, du, dh0, dln_weight;
  OptionalTensor dy, u;
  const RecurrentParameters& parameters;
  uint8_t* pack_hh = nullptr;
  Arena arena;
  const CpuVariant variant = cpu_variant();

  RecurrentBackwardCall(RecurrentBackwardArgs& a, const RecurrentParameters& p, const Tensor& gates_,
                        const OptionalTensor& dy_, const OptionalTensor& dh_n_, const OptionalTensor& u_, bool has_du)
      : gates(as_contiguous(gates_)), parameters(p) {
    const int64_t T = a.time, B = a.batch, D = a.directions, rows = a.gates * a.hidden;
    const ScalarType dtype = gates.scalar_type();
    const std::vector<int64_t> whole{T, B, D, rows}, none{0};
    dy = expected(dy_, dtype, {T, B, D, a.size}, "dy: expected [T, B, D, P]");
    u = expected(u_, dtype, {T, B, D, rows}, "u: expected [T, B, D, G * H]");
    const OptionalTensor dh_n = expected(dh_n_, ScalarType::Float, {D, B, a.size}, "dh_n: expected float32 [D, B, P]");
    check(!u == !p.ln_weight, "u, ln_weight: expected both or neither");
    da = new_tensor(gates, whole, dtype);
    du = new_tensor(gates, has_du ? whole : none, dtype);
    dh0 = copy_or_zeros(gates, dh_n, {D, B, a.size});
    dln_weight = copy_or_zeros(gates, OptionalTensor(), p.ln_weight ? std::vector<int64_t>{D, rows} : none);
    a.gates_in = gates.const_data_ptr();
    a.dy = data_of<>(dy);
    a.u = data_of<>(u);
    a.da = data_of(da);
    a.du = has_du ? data_of(du) : nullptr;
    a.dh = data_of<float>(dh0);
    a.dln_weight = data_of<float>(dln_weight);
    arena.ask(&pack_hh, D * panels_of(a.size) * packed_panel_bytes(a.format, a.gates * a.wide));
    arena.ask(&a.barriers, 2);
    arena.ask(&a.dh_work, D * B * a.wide_p);
    arena.ask(&a.operand, 2 * D * B * a.gates * a.wide * 4);
    if (a.ln_weight) arena.ask(&a.dhat, D * B * a.gates * a.wide);
  }

  template <class Args, class Kernel, class More>
  void run(Args& a, const Kernel& kernel, const More& more) {
    a.packed = pack_hh;
    std::fill(a.barriers, a.barriers + 2, Barrier());
    const RecurrentProduct& product = recurrent_product_table(variant);
    a.product = &product;
    Barrier packing;
    parallel_region(recurrent_team(a), [&](int thread, int team) {
      pack_inputs(product, a, parameters.w_hh.const_data_ptr(), a.gates, a.hidden, a.wide, a.size, pack_hh,
                  range(a.directions * panels_of(a.size), thread, team));
      more(thread, team);
      packing.wait(team);
      kernel(a, thread, team);
    });
  }
};

}  // namespace fastdl
