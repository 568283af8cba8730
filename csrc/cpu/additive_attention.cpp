// Room additive_attention on the CPU: checks, threads, registration. Contract: fastdl/ops/additive_attention.py.
//
// Keys are cut into chunks by their number alone (KeyChunks), and results of chunks are merged in order, whoever computes
// them: an item of the threads' work is a block of queries with all chunks, or, where there are few blocks, with one
// chunk. Backward: an item is a sequence with all chunks of its keys, or with one. No number depends on the items.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "common/additive_attention_tensors.h"
#include "common/parallel.h"
#include "cpu/additive_attention_kernel.h"
#include "cpu/scratch.h"

namespace fastdl {
namespace {

constexpr int64_t ALONE = 32 * 1024;  // elements of [batch, queries, keys, hidden] that no second thread is woken for
constexpr int64_t FEW = 8;            // items: so many feed the threads without cutting keys
constexpr int64_t LEAST_KEYS = 64;    // of a chunk
constexpr float NOTHING = -std::numeric_limits<float>::infinity();

struct Kernels {
  const AdditiveKernels* forward;
  const AdditiveBackwardKernels* backward;
};

Kernels additive_table() {
  switch (cpu_vectors()) {
#define FASTDL_CASE(variant) \
  case CpuVariant::variant: \
    return {&variant::additive_attention_kernels, &variant::additive_attention_backward_kernels};
    FASTDL_VECTORS(FASTDL_CASE)
#undef FASTDL_CASE
    default: return {&scalar::additive_attention_kernels, &scalar::additive_attention_backward_kernels};
  }
}

// Float arrays in one allocation, each at a cache line.
struct Floats {
  explicit Floats(int64_t count) : memory(padded(count * 4)), next(reinterpret_cast<float*>(memory.data)) {}
  float* take(int64_t count) {
    float* const found = next;
    next += padded(count * 4) / 4;
    return found;
  }
  static int64_t room(int64_t count) { return padded(count * 4) / 4; }
  Scratch memory;
  float* next;
};

AdditiveArgs arguments(const AdditiveTensors& t, const Tensor& q, float* weights, const AdditiveKernels& kernels) {
  AdditiveArgs a{};
  a.format = float_format(q, "q: expected float32, float16 or bfloat16");
  a.q = t.q.data();
  a.k = t.k.data();
  a.v = t.d_v > 0 ? t.v.data() : nullptr;
  a.q_batch = t.q.batch, a.q_row = t.q.row;
  a.k_batch = t.k.batch, a.k_row = t.k.row;
  a.v_batch = t.v.batch, a.v_row = t.v.row;
  a.mask = t.seen.mask;
  a.mask_batch = t.seen.mask_batch, a.mask_query = t.seen.mask_query, a.mask_key = t.seen.mask_key;
  a.lens = t.seen.lens;
  a.lens_batch = t.seen.lens_batch, a.lens_query = t.seen.lens_query;
  a.queries = t.queries, a.keys = t.keys, a.hidden = t.hidden, a.d_v = t.d_v;
  kernels.weights(t.w.const_data_ptr(), float_format(t.w, "w: expected float32, float16 or bfloat16"), t.hidden,
                  weights);
  a.weights = weights;
  return a;
}

int team_for(const AdditiveTensors& t) {
  return t.batch * (t.queries + 2) * t.keys * t.hidden < ALONE ? 1 : thread_count();
}

AdditiveState state_in(Floats& memory, int64_t queries, int64_t d_v) {
  AdditiveState s{};
  s.largest = memory.take(queries);
  s.sum = memory.take(queries);
  s.out = d_v > 0 ? memory.take(queries * additive_padded(d_v)) : nullptr;
  return s;
}

int64_t state_floats(int64_t queries, int64_t d_v) {
  return 2 * Floats::room(queries) + Floats::room(queries * additive_padded(d_v));
}

void clear(const AdditiveState& s, int64_t queries) {
  std::fill_n(s.largest, queries, NOTHING);
  std::fill_n(s.sum, queries, 0.0f);
}

// The states of all blocks of queries: done(n, i0, i1, state) for each.
template <class Done>
void for_blocks(const AdditiveTensors& t, const AdditiveArgs& a, const AdditiveKernels& kernels, float* scores,
                const Done& done) {
  const KeyChunks chunks(t.keys, LEAST_KEYS, ADDITIVE_TILE);
  const int64_t each = (t.queries + ADDITIVE_QUERIES - 1) / ADDITIVE_QUERIES, blocks = t.batch * each;
  const int64_t widest = std::min(ADDITIVE_QUERIES, t.queries);
  const bool cut = blocks < FEW && chunks.count > 1;
  const auto piece_of = [&](int64_t block, int64_t chunk) {
    const int64_t i0 = block % each * ADDITIVE_QUERIES, j0 = chunk * chunks.length;
    return AdditivePiece{block / each, i0, std::min(t.queries, i0 + ADDITIVE_QUERIES), j0,
                         std::min(t.keys, j0 + chunks.length)};
  };
  const auto rows_of_scores = [&](const AdditivePiece& p) {
    return scores ? scores + (p.n * t.queries + p.i0) * t.keys : nullptr;
  };
  const int64_t one = state_floats(widest, t.d_v), work = Floats::room(additive_work_floats(t.hidden, t.d_v));
  const int64_t queries = Floats::room(additive_query_floats(t.hidden, widest));
  const int64_t scratch = Floats::room(widest * additive_padded(std::min(chunks.length, t.keys)));
  const int team = team_for(t);
  if (!cut) {
    parallel_region(static_cast<int>(std::min<int64_t>(team, blocks)), [&](int thread, int threads) {
      Floats memory(2 * one + work + queries + scratch);
      const AdditiveState part = state_in(memory, widest, t.d_v), whole = state_in(memory, widest, t.d_v);
      float *const w = memory.take(work), *const q = memory.take(queries), *const s = memory.take(scratch);
      const Range mine = range(blocks, thread, threads);
      for (int64_t block = mine.begin; block < mine.end; ++block) {
        const AdditivePiece first = piece_of(block, 0);
        kernels.queries(a, first.n, first.i0, first.i1, q);
        clear(whole, widest);
        for (int64_t chunk = 0; chunk < chunks.count; ++chunk) {
          const AdditivePiece piece = piece_of(block, chunk);
          kernels.forward(a, piece, q, w, s, part, rows_of_scores(piece));
          kernels.merge(piece.i1 - piece.i0, t.d_v, part, whole);
        }
        done(first, whole);
      }
    });
    return;
  }
  const int64_t items = blocks * chunks.count;
  Floats states(items * one);
  float* const base = states.take(items * one);
  const auto state_at = [&](int64_t item) {
    AdditiveState s{base + item * one, base + item * one + Floats::room(widest), nullptr};
    if (t.d_v > 0) s.out = s.sum + Floats::room(widest);
    return s;
  };
  parallel_region(static_cast<int>(std::min<int64_t>(team, items)), [&](int thread, int threads) {
    Floats memory(work + queries + scratch);
    float *const w = memory.take(work), *const q = memory.take(queries), *const s = memory.take(scratch);
    const Range mine = range(items, thread, threads);
    int64_t ready = -1;
    for (int64_t item = mine.begin; item < mine.end; ++item) {
      const AdditivePiece piece = piece_of(item / chunks.count, item % chunks.count);
      if (ready != item / chunks.count) kernels.queries(a, piece.n, piece.i0, piece.i1, q);
      ready = item / chunks.count;
      kernels.forward(a, piece, q, w, s, state_at(item), rows_of_scores(piece));
    }
  });
  Floats memory(one);
  const AdditiveState whole = state_in(memory, widest, t.d_v);
  for (int64_t block = 0; block < blocks; ++block) {
    const AdditivePiece first = piece_of(block, 0);
    clear(whole, widest);
    for (int64_t chunk = 0; chunk < chunks.count; ++chunk)
      kernels.merge(first.i1 - first.i0, t.d_v, state_at(block * chunks.count + chunk), whole);
    done(first, whole);
  }
}

// statistics [2][batch][queries] of the rows of a block.
void write_statistics(const AdditiveTensors& t, const AdditivePiece& p, const AdditiveState& s, float* statistics) {
  for (int64_t i = p.i0; i < p.i1; ++i) {
    statistics[p.n * t.queries + i] = s.largest[i - p.i0];
    statistics[(t.batch + p.n) * t.queries + i] = s.sum[i - p.i0];
  }
}

AdditiveOutputs additive_attention_forward(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& w,
                                           const OptionalTensor& mask, const OptionalTensor& valid_lens) {
  const AdditiveTensors t(q, k, v, w, mask, valid_lens);
  Tensor out = new_tensor(q, {t.batch, t.queries, t.d_v}, q.scalar_type());
  Tensor statistics = float_tensor(q, {2, t.batch, t.queries});
  if (t.empty()) return {out, statistics};
  const AdditiveKernels& kernels = *additive_table().forward;
  Floats weights(additive_padded(t.hidden));
  const AdditiveArgs a = arguments(t, q, weights.next, kernels);
  auto* const out_data = static_cast<uint8_t*>(out.mutable_data_ptr());
  float* const statistics_data = static_cast<float*>(statistics.mutable_data_ptr());
  const int64_t row = t.d_v * (a.format == FORMAT_F32 ? 4 : 2);
  for_blocks(t, a, kernels, nullptr, [&](const AdditivePiece& p, const AdditiveState& s) {
    kernels.finish(p.i1 - p.i0, t.d_v, s, a.format, out_data + (p.n * t.queries + p.i0) * row);
    write_statistics(t, p, s, statistics_data);
  });
  return {out, statistics};
}

AdditiveOutputs additive_pointer_forward(const Tensor& q, const Tensor& k, const Tensor& w, const OptionalTensor& mask,
                                         const OptionalTensor& valid_lens) {
  const AdditiveTensors t(q, k, std::nullopt, w, mask, valid_lens);
  Tensor logp = float_tensor(q, {t.batch, t.queries, t.keys});
  Tensor statistics = float_tensor(q, {2, t.batch, t.queries});
  if (t.empty()) return {logp, statistics};
  const AdditiveKernels& kernels = *additive_table().forward;
  Floats weights(additive_padded(t.hidden));
  const AdditiveArgs a = arguments(t, q, weights.next, kernels);
  float* const scores = static_cast<float*>(logp.mutable_data_ptr());
  float* const statistics_data = static_cast<float*>(statistics.mutable_data_ptr());
  for_blocks(t, a, kernels, scores, [&](const AdditivePiece& p, const AdditiveState& s) {
    write_statistics(t, p, s, statistics_data);
    for (int64_t i = p.n * t.queries + p.i0; i < p.n * t.queries + p.i1; ++i) {
      const float sum = statistics_data[t.batch * t.queries + i], lse = statistics_data[i] + std::log(sum);
      if (sum == 0.0f) continue;
      for (int64_t j = 0; j < t.keys; ++j) scores[i * t.keys + j] -= lse;
    }
  });
  return {logp, statistics};
}

struct Gradients {
  Tensor dq, dk, dv, dw;
};

// grad: strides over the batch and over queries in `a`. v: absent for the pointer.
Gradients backward(const AdditiveTensors& t, const AdditiveArgs& a, const Tensor& q, const Tensor& k,
                   const OptionalTensor& v) {
  const bool none = t.empty() || t.keys == 0;
  Gradients g{new_gradient(q, none), new_gradient(k, none), v ? new_gradient(*v, none) : Tensor(),
              none ? torch::stable::new_zeros(q, {t.hidden}, ScalarType::Float) : float_tensor(q, {t.hidden})};
  if (none) return g;
  const Kernels table = additive_table();
  const AdditiveKernels& kernels = *table.forward;
  const KeyChunks chunks(t.keys, LEAST_KEYS, ADDITIVE_TILE);
  const int64_t hidden = additive_padded(t.hidden), d_v = additive_padded(t.d_v), per_query = t.queries * hidden;
  const bool cut = t.batch < FEW && chunks.count > 1;
  const int64_t items = cut ? t.batch * chunks.count : t.batch;
  const int64_t bytes = a.format == FORMAT_F32 ? 4 : 2;
  const int64_t work = Floats::room(additive_work_floats(t.hidden, t.d_v));
  const int64_t queries = Floats::room(additive_query_floats(t.hidden, std::min(ADDITIVE_QUERIES, t.queries)));
  const int64_t keys_here = std::min(chunks.length, t.keys), rows = ADDITIVE_QUERIES * additive_row_floats(t.d_v);
  const int64_t mine_floats =
      work + queries + Floats::room(rows) + keys_here * (hidden + d_v) + (cut ? 0 : 2 * per_query);
  auto* const dq = static_cast<uint8_t*>(g.dq.mutable_data_ptr());
  auto* const dk = static_cast<uint8_t*>(g.dk.mutable_data_ptr());
  auto* const dv = v ? static_cast<uint8_t*>(g.dv.mutable_data_ptr()) : nullptr;
  Floats shared(t.batch * chunks.count * hidden + (cut ? items * per_query : 0));
  float* const dws = shared.take(t.batch * chunks.count * hidden);  // [batch][chunks][padded hidden]
  float* const parts = cut ? shared.take(items * per_query) : nullptr;
  const auto store_dq = [&](int64_t n, const float* from) {
    kernels.store(from, t.queries, t.hidden, a.weights, a.format, dq + n * t.queries * t.hidden * bytes);
  };
  parallel_region(static_cast<int>(std::min<int64_t>(team_for(t), items)), [&](int thread, int threads) {
    Floats memory(mine_floats);
    float *const w = memory.take(work), *const q_floats = memory.take(queries);
    AdditiveBackward b{};
    b.rows = memory.take(rows);
    b.dk = memory.take(keys_here * hidden);
    b.dv = v ? memory.take(keys_here * d_v) : nullptr;
    float* const part = cut ? nullptr : memory.take(per_query);
    float* const whole = cut ? nullptr : memory.take(per_query);
    const Range mine = range(items, thread, threads);
    for (int64_t item = mine.begin; item < mine.end; ++item) {
      const int64_t n = cut ? item / chunks.count : item, first = cut ? item % chunks.count : 0;
      for (int64_t c = first; c < (cut ? first + 1 : chunks.count); ++c) {
        const int64_t j0 = c * chunks.length, j1 = std::min(t.keys, j0 + chunks.length), at = n * t.keys + j0;
        b.dq = cut ? parts + item * per_query : c == 0 ? whole : part;
        b.dw = dws + (n * chunks.count + c) * hidden;
        table.backward->backward(a, {n, 0, t.queries, j0, j1}, q_floats, w, b);
        kernels.store(b.dk, j1 - j0, t.hidden, a.weights, a.format, dk + at * t.hidden * bytes);
        if (v) kernels.store(b.dv, j1 - j0, t.d_v, nullptr, a.format, dv + at * t.d_v * bytes);
        if (b.dq == part && !cut) kernels.add(part, per_query, whole);
      }
      if (!cut) store_dq(n, whole);
    }
  });
  if (cut)
    for (int64_t n = 0; n < t.batch; ++n) {
      float* const whole = parts + n * chunks.count * per_query;
      for (int64_t c = 1; c < chunks.count; ++c) kernels.add(whole + c * per_query, per_query, whole);
      store_dq(n, whole);
    }
  for (int64_t part = 1; part < t.batch * chunks.count; ++part) kernels.add(dws + part * hidden, hidden, dws);
  kernels.store(dws, 1, t.hidden, nullptr, FORMAT_F32, g.dw.mutable_data_ptr());
  return g;
}

AdditiveGradients additive_attention_backward(const Tensor& grad, const Tensor& q, const Tensor& k, const Tensor& v,
                                              const Tensor& w, const OptionalTensor& mask,
                                              const OptionalTensor& valid_lens, const Tensor& out,
                                              const Tensor& statistics) {
  const AdditiveTensors t(q, k, v, w, mask, valid_lens);
  check_like(out, grad, "grad: expected shape, dtype and device of out");
  t.check_saved(q, &out, statistics);
  Floats weights(additive_padded(t.hidden));
  AdditiveArgs a = arguments(t, q, weights.next, *additive_table().forward);
  const BatchedRows rows(grad);
  const Tensor whole_out = as_contiguous(out), whole = as_contiguous(statistics);
  a.grad = rows.data();
  a.grad_batch = rows.batch;
  a.grad_row = rows.row;
  a.out = whole_out.const_data_ptr();
  a.largest = static_cast<const float*>(whole.const_data_ptr());
  a.sum = a.largest + t.batch * t.queries;
  const Gradients g = backward(t, a, q, k, v);
  return {g.dq, g.dk, g.dv, g.dw};
}

AdditivePointerGradients additive_pointer_backward(const Tensor& grad, const Tensor& q, const Tensor& k,
                                                   const Tensor& w, const OptionalTensor& mask,
                                                   const OptionalTensor& valid_lens, const Tensor& statistics) {
  const AdditiveTensors t(q, k, std::nullopt, w, mask, valid_lens);
  t.check_saved(q, nullptr, statistics);
  t.check_pointer_grad(q, grad);
  Floats weights(additive_padded(t.hidden));
  AdditiveArgs a = arguments(t, q, weights.next, *additive_table().forward);
  const BatchedRows rows(grad);
  const Tensor whole = as_contiguous(statistics);
  a.grad = rows.data();
  a.grad_batch = rows.batch;
  a.grad_row = rows.row;
  a.largest = static_cast<const float*>(whole.const_data_ptr());
  a.sum = a.largest + t.batch * t.queries;
  const Gradients g = backward(t, a, q, k, std::nullopt);
  return {g.dq, g.dk, g.dw};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastdl, CPU, m) {
  m.impl("additive_attention_forward", TORCH_BOX(&additive_attention_forward));
  m.impl("additive_attention_backward", TORCH_BOX(&additive_attention_backward));
  m.impl("additive_pointer_forward", TORCH_BOX(&additive_pointer_forward));
  m.impl("additive_pointer_backward", TORCH_BOX(&additive_pointer_backward));
}

}  // namespace fastdl
