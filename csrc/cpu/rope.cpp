// Room rope on the CPU: checks, threads, registration. Contract: fastdl/ops/rope.py.
#include <torch/csrc/stable/library.h>

#include "common/parallel.h"
#include "common/rope_tensors.h"
#include "cpu/rope_kernel.h"
#include "cpu/scratch.h"

namespace fastdl {
namespace {

constexpr int64_t ALONE = 16 * 1024;    // elements; waking up a second thread costs more than so few take
constexpr int64_t BLOCK = 16 * 1024;    // elements of a block, about
constexpr int64_t SPREAD = 16 * 1024;   // bytes of spread angles, which stay in the first-level cache
constexpr int64_t MOST_POSITIONS = 64;  // of a block

const RopeKernels& rope_table() {
  switch (cpu_vectors()) {
#define FASTDL_CASE(variant) \
  case CpuVariant::variant: return variant::rope_kernels;
    FASTDL_VECTORS(FASTDL_CASE)
#undef FASTDL_CASE
    default: return scalar::rope_kernels;
  }
}

// One of q and k, cut into blocks by its shape.
struct Job {
  RopeArgs args;
  int64_t heads, rows, head_step, row_step, head_parts, row_parts, count;

  Job(const RopeArgs& a, const RopeTensor& t) : args(a), heads(t.heads.size), rows(t.n.size) {
    const int64_t bytes = std::max<int64_t>(1, 2 * a.rope_dim * 4);
    const int64_t most = std::max<int64_t>(1, std::min({rows, MOST_POSITIONS, SPREAD / bytes}));
    const int64_t pieces = std::max<int64_t>(1, BLOCK / a.head_dim);  // a block is about so many heads of one position
    if (a.y_row >= a.y_head) {                                        // heads lie beside each other: whole positions
      head_step = std::min(heads, pieces);
      row_step = std::max<int64_t>(1, std::min(most, pieces / head_step));
    } else {
      row_step = std::min(most, pieces);
      head_step = std::max<int64_t>(1, std::min(heads, pieces / row_step));
    }
    row_parts = (rows + row_step - 1) / row_step;
    head_parts = (heads + head_step - 1) / head_step;
    count = t.batch.size * row_parts * head_parts;
  }
  RopeBlock at(int64_t i) const {
    const int64_t head = i % head_parts * head_step, row = i / head_parts % row_parts * row_step;
    return {i / (head_parts * row_parts), head, std::min(heads, head + head_step), row, std::min(rows, row + row_step)};
  }
};

std::tuple<Tensor, Tensor> rope_turn(const Tensor& q, const OptionalTensor& k, const Tensor& cos_sin,
                                     const OptionalTensor& positions, int64_t start, bool interleaved, bool backward) {
  const int format = float_format(q, "q: expected float32, float16 or bfloat16");
  const RopeTensors t(q, k, cos_sin, positions, start);
  std::vector<Job> jobs;
  int64_t elements = 0, blocks = 0, row_step = 1;
  const auto add = [&](const RopeTensor& one) {
    if (one.empty()) return;
    elements += one.x.numel();
    one.for_each_outer([&](int64_t x_at, int64_t y_at) {
      const int64_t size = format == FORMAT_F32 ? 4 : 2;
      RopeArgs a{};
      a.x = static_cast<const char*>(one.x.const_data_ptr()) + x_at * size;
      a.y = static_cast<char*>(one.y.mutable_data_ptr()) + y_at * size;
      a.cos_sin = static_cast<const float*>(t.cos_sin.const_data_ptr());
      a.positions = t.position_data();
      a.x_batch = one.batch.x, a.x_head = one.heads.x, a.x_row = one.n.x;
      a.y_batch = one.batch.y, a.y_head = one.heads.y, a.y_row = one.n.y;
      a.start = start;
      a.batch_stride = t.batch_stride;
      a.max_len = t.max_len;
      a.rope_dim = t.rope_dim;
      a.head_dim = one.head_dim;
      a.format = format;
      a.interleaved = interleaved;
      a.back = backward;
      jobs.emplace_back(a, one);
      blocks += jobs.back().count;
      row_step = std::max(row_step, jobs.back().row_step);
    });
  };
  add(t.q);
  if (t.k) add(*t.k);
  const std::vector<int64_t> none{0};
  const Tensor second = t.k ? t.k->y : new_tensor(q, none, q.scalar_type());
  if (blocks == 0) return {t.q.y, second};
  const int threads = elements < ALONE ? 1 : static_cast<int>(std::min<int64_t>(thread_count(), blocks));
  const int64_t bytes = padded(row_step * 2 * t.rope_dim * 4);
  const Scratch scratch(threads * bytes);
  const RopeKernels& kernels = rope_table();
  parallel_region(threads, [&](int thread, int team) {
    const Range mine = range(blocks, thread, team);
    int64_t first = 0;
    for (const Job& job : jobs) {
      const int64_t begin = std::max(mine.begin, first), end = std::min(mine.end, first + job.count);
      for (int64_t i = begin; i < end; ++i)
        kernels.turn(job.args, job.at(i - first), reinterpret_cast<float*>(scratch.data + thread * bytes));
      first += job.count;
    }
  });
  return {t.q.y, second};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastdl, CPU, m) { m.impl("rope_turn", TORCH_BOX(&rope_turn)); }

}  // namespace fastdl
