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

const RecurrentProduct& recurrent_product_table();

}  // namespace fastdl
