// Room selective_scan on the CPU: checks, threads, registration. Contract: fastdl/ops/selective_scan.py.
//
// Work is cut into ranges of channels of one sequence, by the shape alone. Sums over channels (dB, dC) are kept per range,
// sums over sequences (dA, dD, dbias) per sequence, and both are added in order.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstring>

#include "common/parallel.h"
#include "common/selective_scan_tensors.h"
#include "cpu/scratch.h"
#include "cpu/selective_scan_kernel.h"

namespace fastdl {
namespace {

constexpr int64_t ALONE =
    1024;  // channels, states and steps multiplied: fewer are done before a second thread wakes up

const SelectiveScanKernels& selective_scan_table() {
  switch (cpu_vectors()) {
#define FASTDL_CASE(variant) \
  case CpuVariant::variant: return variant::selective_scan_kernels;
    FASTDL_VECTORS(FASTDL_CASE)
#undef FASTDL_CASE
    default: return scalar::selective_scan_kernels;
  }
}

SelectiveScanTrack track(const Steps& x) { return {x.data(), x.batch, x.step}; }

// A, D and delta_bias as the kernel reads them, and a [state][stride] block of memory for each of `count` users.
struct Memory {
  int64_t stride, table;  // floats of a row of channels, of [state][stride]
  Scratch memory;
  float* next;

  Memory(const SelectiveScanTensors& t, int64_t floats)
      : stride(padded(t.dim * 4) / 4),
        table(stride * t.state),
        memory((table + 2 * stride + floats) * 4),
        next(reinterpret_cast<float*>(memory.data)) {}

  float* take(int64_t floats) {
    float* const p = next;
    next += padded(floats * 4) / 4;
    return p;
  }
  float* row(const OptionalTensor& from, int64_t count) {
    float* const to = take(stride);
    std::fill(to, to + stride, 0.0f);
    if (from) std::memcpy(to, from->const_data_ptr(), static_cast<size_t>(count) * 4);
    return to;
  }
};

void transpose(const float* from, int64_t rows, int64_t cols, int64_t stride, float* to) {  // to[c][r]
  for (int64_t c = 0; c < cols; ++c) {
    for (int64_t r = 0; r < rows; ++r) to[c * stride + r] = from[r * cols + c];
    std::fill(to + c * stride + rows, to + (c + 1) * stride, 0.0f);
  }
}

void transpose_back(const float* from, int64_t rows, int64_t cols, int64_t stride, float* to) {  // to[r][c]
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < cols; ++c) to[r * cols + c] = from[c * stride + r];
}

SelectiveScanArgs arguments(const SelectiveScanTensors& t, const Tensor& x, Memory& memory, bool softplus) {
  SelectiveScanArgs a{};
  a.x = track(t.x);
  a.delta = track(t.delta);
  if (t.gated) a.z = track(t.z);
  a.b = track(t.b);
  a.c = track(t.c);
  a.length = t.length;
  a.dim = t.dim;
  a.state = t.state;
  a.chunks = t.chunks;
  a.stride = memory.stride;
  a.format = float_format(x, "x: expected float32, float16 or bfloat16");
  a.softplus = softplus;
  float* const table = memory.take(memory.table);
  transpose(static_cast<const float*>(t.a.const_data_ptr()), t.dim, t.state, memory.stride, table);
  a.a = table;
  a.d = memory.row(t.d, t.dim);
  a.bias = memory.row(t.delta_bias, t.dim);
  return a;
}

// Ranges of a sequence's channels: 64 channels or more, at most 16 ranges.
struct Ranges {
  int64_t width, each;
  explicit Ranges(int64_t dim)
      : width(std::max<int64_t>(64, ((dim + 15) / 16 + 15) / 16 * 16)), each((dim + width - 1) / width) {}
};

// body(item, range, thread) for every range of every sequence; c0, c1 and n are set.
template <class Body>
void for_ranges(const SelectiveScanTensors& t, const Body& body) {
  const Ranges ranges(t.dim);
  const int64_t items = t.batch * ranges.each;
  const bool alone = t.batch * t.length * t.dim * t.state < ALONE;
  parallel_region(alone ? 1 : static_cast<int>(std::min<int64_t>(thread_count(), items)), [&](int thread, int team) {
    const Range mine = range(items, thread, team);
    for (int64_t i = mine.begin; i < mine.end; ++i) {
      SelectiveScanRange r{};
      r.n = i / ranges.each;
      r.c0 = i % ranges.each * ranges.width;
      r.c1 = std::min(t.dim, r.c0 + ranges.width);
      body(i, r, thread);
    }
  });
}

ThreeTensors selective_scan_forward(const Tensor& x, const Tensor& delta, const Tensor& a_, const Tensor& b,
                                    const Tensor& c, const OptionalTensor& d, const OptionalTensor& z,
                                    const OptionalTensor& delta_bias, const OptionalTensor& h0, bool softplus,
                                    bool keep) {
  const SelectiveScanTensors t(x, delta, a_, b, c, d, z, delta_bias, h0);
  const auto [y, last, states] = selective_scan_outputs(t, x, keep);
  float* const to = static_cast<float*>(last.mutable_data_ptr());
  const float* const from = static_cast<const float*>(pointer(t.h0));
  const int64_t each = t.dim * t.state, threads = thread_count(),
                scratch = padded(selective_scan_scratch(t.state) * 4) / 4;
  if (t.empty()) {
    if (from)
      std::copy(from, from + t.batch * each, to);
    else
      std::fill(to, to + t.batch * each, 0.0f);
    return {y, last, states};
  }
  const int64_t table = padded(t.dim * 4) / 4 * t.state;
  Memory memory(t, t.batch * table + threads * scratch);
  SelectiveScanArgs a = arguments(t, x, memory, softplus);
  a.y = y.mutable_data_ptr();
  a.states = keep ? static_cast<float*>(states.mutable_data_ptr()) : nullptr;
  float *const h = memory.take(t.batch * table), *const work = memory.take(threads * scratch);
  if (from)
    for (int64_t n = 0; n < t.batch; ++n) transpose(from + n * each, t.dim, t.state, memory.stride, h + n * table);
  else
    std::fill(h, h + t.batch * table, 0.0f);
  const SelectiveScanKernels& kernels = selective_scan_table();
  for_ranges(t, [&](int64_t, SelectiveScanRange& r, int thread) {
    r.h = h + r.n * table;
    r.scratch = work + thread * scratch;
    kernels.forward(a, r);
  });
  for (int64_t n = 0; n < t.batch; ++n) transpose_back(h + n * table, t.dim, t.state, memory.stride, to + n * each);
  return {y, last, states};
}

NineTensors selective_scan_backward(const Tensor& grad, const OptionalTensor& grad_last, const Tensor& x,
                                    const Tensor& delta, const Tensor& a_, const Tensor& b, const Tensor& c,
                                    const OptionalTensor& d, const OptionalTensor& z, const OptionalTensor& delta_bias,
                                    const OptionalTensor& h0, const Tensor& states, bool softplus) {
  const SelectiveScanTensors t(x, delta, a_, b, c, d, z, delta_bias, h0);
  const int64_t each = t.dim * t.state, stride = padded(t.dim * 4) / 4, table = stride * t.state;
  const OptionalTensor last = t.floats(x, grad_last, t.batch * each, "grad_last: expected float32 [batch, dim, state]");
  check(states.scalar_type() == ScalarType::Float && states.is_contiguous() &&
            states.numel() == t.batch * t.chunks * each,
        "states: expected those that the forward pass kept");
  const NineTensors out = selective_scan_gradients(t, x);
  const auto& [dx, ddelta, dz, db, dc, da, dd, dbias, dh0] = out;
  const auto floats = [](const Tensor& to) { return static_cast<float*>(to.mutable_data_ptr()); };
  const float* const from = static_cast<const float*>(pointer(last));
  if (t.empty()) {
    if (from) std::copy(from, from + t.batch * each, floats(dh0));
    return out;
  }
  const Steps steps = t.like(x, grad);
  const Ranges ranges(t.dim);
  const int64_t threads = thread_count(), scratch = padded(selective_scan_scratch(t.state) * 4) / 4;
  const int64_t rows = t.batch * t.length * t.state;  // of dB and of dC
  const int64_t sums = 2 * t.batch * table + 2 * t.batch * stride + 2 * ranges.each * rows + table + 64;
  Memory memory(t, sums + threads * scratch + 8 * 16);
  SelectiveScanArgs a = arguments(t, x, memory, softplus);
  a.grad = track(steps);
  a.states = static_cast<float*>(states.mutable_data_ptr());
  a.dx = dx.mutable_data_ptr();
  a.ddelta = ddelta.mutable_data_ptr();
  a.dz = dz.mutable_data_ptr();
  float *const dh = memory.take(t.batch * table), *const work = memory.take(threads * scratch);
  float* const parts = memory.take(t.batch * (table + 2 * stride));  // [batch]: dA, dD, dbias
  float *const part_b = memory.take(ranges.each * rows), *const part_c = memory.take(ranges.each * rows);
  std::fill(parts, parts + t.batch * (table + 2 * stride), 0.0f);
  if (from)
    for (int64_t n = 0; n < t.batch; ++n) transpose(from + n * each, t.dim, t.state, stride, dh + n * table);
  else
    std::fill(dh, dh + t.batch * table, 0.0f);
  const SelectiveScanKernels& kernels = selective_scan_table();
  for_ranges(t, [&](int64_t i, SelectiveScanRange& r, int thread) {
    const int64_t at = i % ranges.each * rows + r.n * t.length * t.state;
    r.h = dh + r.n * table;
    r.scratch = work + thread * scratch;
    r.db = part_b + at;
    r.dc = part_c + at;
    r.da = parts + r.n * (table + 2 * stride);
    r.dd = r.da + table;
    r.dbias = r.dd + stride;
    kernels.backward(a, r);
  });
  kernels.add_parts(part_b, ranges.each, rows, 0, rows, floats(db));
  kernels.add_parts(part_c, ranges.each, rows, 0, rows, floats(dc));
  float* const whole = memory.take(table);
  kernels.add_parts(parts, t.batch, table + 2 * stride, 0, table, whole);
  transpose_back(whole, t.dim, t.state, stride, floats(da));
  kernels.add_parts(parts + table, t.batch, table + 2 * stride, 0, t.dim, floats(dd));
  kernels.add_parts(parts + table + stride, t.batch, table + 2 * stride, 0, t.dim, floats(dbias));
  for (int64_t n = 0; n < t.batch; ++n) transpose_back(dh + n * table, t.dim, t.state, stride, floats(dh0) + n * each);
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastdl, CPU, m) {
  m.impl("selective_scan_forward", TORCH_BOX(&selective_scan_forward));
  m.impl("selective_scan_backward", TORCH_BOX(&selective_scan_backward));
}

}  // namespace fastdl
