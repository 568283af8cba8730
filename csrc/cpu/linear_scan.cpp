// Room linear_scan on the CPU: checks, threads, registration. Contract: fastdl/ops/linear_scan.py.
//
// Work is cut into blocks of channels, one cache line of float32 wide. Where there are fewer than FEW blocks, time is cut
// into chunks as well: their affine maps first, then the states at their ends, then the chunks, each from its state. Both
// cuts are functions of the shape, and no number depends on how blocks are dealt to threads.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstring>

#include "common/linear_scan_tensors.h"
#include "common/parallel.h"
#include "cpu/linear_scan_kernel.h"
#include "cpu/scratch.h"

namespace fastdl {
namespace {

constexpr int64_t ALONE = 16 * 1024;  // elements; waking up a second thread costs more than so few take
constexpr int64_t FEW = 4;            // blocks of channels: so many feed the threads without cutting time
constexpr int64_t PIECES = 16;        // what few blocks are cut into
constexpr int64_t LEAST_STEPS = 256;  // of a chunk

const LinearScanKernels& linear_scan_table() {
  switch (cpu_vectors()) {
#define FASTDL_CASE(variant) \
  case CpuVariant::variant: return variant::linear_scan_kernels;
    FASTDL_VECTORS(FASTDL_CASE)
#undef FASTDL_CASE
    default: return scalar::linear_scan_kernels;
  }
}

// A sequence's channels as blocks, all sequences' blocks in a row.
struct Blocks {
  int64_t width, each, count, channels;  // channels of a block, blocks of a sequence, blocks in all

  explicit Blocks(const LinearScanTensors& t)
      : width(t.complex ? 8 : 16),
        each((t.channels + width - 1) / width),
        count(t.batch * each),
        channels(t.channels) {}

  // body(n, c0, c1) for runs of blocks of one sequence, of blocks begin <= i < end.
  template <class Body>
  void runs(Range range, const Body& body) const {
    for (int64_t i = range.begin; i < range.end;) {
      const int64_t n = i / each, last = std::min(range.end, (n + 1) * each);
      body(n, (i - n * each) * width, std::min(channels, (last - n * each) * width));
      i = last;
    }
  }
};

int64_t chunk_count(int64_t blocks, int64_t length) {
  if (blocks >= FEW) return 1;
  return std::clamp<int64_t>(length / LEAST_STEPS, 1, PIECES / blocks);
}

// state [batch][channels]: that before the first step, and then that after the last one.
void scan(const LinearScanTensors& t, const LinearScanArgs& a, float* state) {
  const LinearScanKernels& kernels = linear_scan_table();
  const Blocks blocks(t);
  const int64_t floats = t.complex ? 2 : 1, row = t.channels * floats, chunks = chunk_count(blocks.count, t.length);
  const int team = t.batch * t.length * row < ALONE ? 1 : thread_count();
  if (chunks == 1) {
    parallel_region(static_cast<int>(std::min<int64_t>(team, blocks.count)), [&](int thread, int threads) {
      blocks.runs(range(blocks.count, thread, threads), [&](int64_t n, int64_t c0, int64_t c1) {
        kernels.run(a, {n, c0, c1, 0, t.length}, state + n * row);
      });
    });
    return;
  }
  const int64_t all = t.batch * row, stride = padded(all * 4) / 4;
  const Scratch memory(3 * chunks * stride * 4);
  float* const products = reinterpret_cast<float*>(memory.data);  // [chunks][stride]: those of a chunk
  float* const ends = products + chunks * stride;
  float* const states = ends + chunks * stride;  // before each chunk
  std::memcpy(states, state, static_cast<size_t>(all) * 4);
  // Chunk k in the order of the walk; backward walks from the last step to the first.
  const auto piece = [&](int64_t k, int64_t n, int64_t c0, int64_t c1) {
    const int64_t i = a.backward ? chunks - 1 - k : k;
    return LinearScanPiece{n, c0, c1, t.length * i / chunks, t.length * (i + 1) / chunks};
  };
  const auto each_chunk = [&](int64_t count, const auto& body) {
    parallel_region(team, [&](int thread, int threads) {
      const Range mine = range(count * blocks.count, thread, threads);
      for (int64_t i = mine.begin; i < mine.end; ++i)
        blocks.runs({i % blocks.count, i % blocks.count + 1},
                    [&](int64_t n, int64_t c0, int64_t c1) { body(i / blocks.count, n, c0, c1); });
    });
  };
  each_chunk(chunks - 1, [&](int64_t k, int64_t n, int64_t c0, int64_t c1) {
    const int64_t at = k * stride + n * row;
    kernels.summarize(a, piece(k, n, c0, c1), products + at, ends + at);
  });
  for (int64_t k = 0; k + 1 < chunks; ++k)
    kernels.carry(a, 0, t.batch * t.channels, products + k * stride, ends + k * stride, states + k * stride,
                  states + (k + 1) * stride);
  each_chunk(chunks, [&](int64_t k, int64_t n, int64_t c0, int64_t c1) {
    kernels.run(a, piece(k, n, c0, c1), states + k * stride + n * row);
  });
  std::memcpy(state, states + (chunks - 1) * stride, static_cast<size_t>(all) * 4);
}

LinearScanTrack track(const Steps& x) { return {x.data(), x.batch, x.step}; }

// Contiguous [batch, length, channels], walked as the recurrence goes.
LinearScanOut out(const Tensor& x, bool reverse) {
  if (x.numel() == 0) return {nullptr, 0, 0};
  const Steps steps = steps_of(x, reverse);
  return {steps.mutable_data(), steps.batch, steps.step};
}

LinearScanArgs arguments(const LinearScanTensors& t, const Tensor& like) {
  LinearScanArgs a{};
  a.channels = t.channels;
  a.complex = t.complex;
  a.format = t.complex ? FORMAT_F32 : float_format(like, "b: expected float32, float16, bfloat16 or complex64");
  a.h0 = static_cast<const float*>(pointer(t.h0));
  return a;
}

Tensor linear_scan_forward(const Tensor& a_, const Tensor& b_, const OptionalTensor& h0, bool reverse) {
  const LinearScanForward t(a_, b_, h0, reverse);
  LinearScanArgs a = arguments(t, b_);
  if (t.empty()) return t.h;
  a.a = track(t.a);
  a.b = track(t.b);
  a.out = out(t.h, reverse);
  const int64_t bytes = t.batch * t.channels * (t.complex ? 8 : 4);
  const Scratch state(bytes);
  if (a.h0)
    std::memcpy(state.data, a.h0, static_cast<size_t>(bytes));
  else
    std::memset(state.data, 0, static_cast<size_t>(bytes));
  scan(t, a, reinterpret_cast<float*>(state.data));
  return t.h;
}

ThreeTensors linear_scan_backward(const Tensor& grad, const Tensor& a_, const Tensor& h, const OptionalTensor& h0,
                                  bool reverse, bool need_a) {
  const LinearScanBackward t(grad, a_, h, h0, reverse, need_a);
  LinearScanArgs a = arguments(t, h);
  if (t.empty()) return {t.da, t.db, t.dh0};
  a.backward = true;
  a.a = track(t.a);
  a.b = track(t.grad);
  a.h = track(t.h);
  a.out = out(t.db, reverse);
  a.da = out(t.da, reverse);
  float* const state = static_cast<float*>(t.dh0.mutable_data_ptr());
  std::memset(state, 0, static_cast<size_t>(t.batch * t.channels) * (t.complex ? 8 : 4));
  scan(t, a, state);
  return {t.da, t.db, t.dh0};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastdl, CPU, m) {
  m.impl("linear_scan_forward", TORCH_BOX(&linear_scan_forward));
  m.impl("linear_scan_backward", TORCH_BOX(&linear_scan_backward));
}

}  // namespace fastdl
