// Room attention on the CPU: checks, threads, registration. Contract: fastdl/ops/attention.py.
//
// An item is a block of queries of the heads that share a key head. Where one item holds all queries of a sequence, its
// keys are cut into parts as well, by their number alone; the parts' sums are merged in order.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <vector>

#include "common/attention_tensors.h"
#include "cpu/attention_kernel.h"
#include "cpu/items.h"

namespace fastdl {
namespace {

constexpr int64_t PART = 1024;  // keys of a part

const AttentionKernels& attention_table() {
  switch (cpu_vectors()) {
#define FASTDL_CASE(variant) \
  case CpuVariant::variant: return variant::attention_kernels;
    FASTDL_VECTORS(FASTDL_CASE)
#undef FASTDL_CASE
    default: return scalar::attention_kernels;
  }
}

AttentionStrides strides(const HeadRows& t) { return {t.batch, t.head, t.row}; }
AttentionStrides strides(const Tensor& t) { return {stride_of(t, 0), stride_of(t, 1), stride_of(t, 2)}; }
AttentionTerm term(const ScoreTerm& t) { return {t.data, t.stride[0], t.stride[1], t.stride[2], t.stride[3]}; }

AttentionCall call_of(const AttentionTensors& t, const Tensor& q, double p, double scale, double softcap, int64_t left,
                      int64_t right) {
  AttentionCall a{};
  a.q = t.q.tensor.const_data_ptr(), a.k = t.k.tensor.const_data_ptr(), a.v = t.v.tensor.const_data_ptr();
  a.q_at = strides(t.q), a.k_at = strides(t.k), a.v_at = strides(t.v);
  a.bias = term(t.bias), a.mask = term(t.mask);
  a.lens = t.lens, a.lens_of_rows = t.lens_of_rows;
  a.slopes = t.slopes, a.slopes_of_batch = t.slopes_of_batch;
  a.heads = t.heads, a.kv_heads = t.kv_heads, a.n_q = t.n_q, a.n_k = t.n_k;
  a.head_dim = t.head_dim, a.d_v = t.d_v, a.left = left, a.right = right;
  a.scale = static_cast<float>(scale), a.softcap = static_cast<float>(softcap);
  a.p = static_cast<float>(p), a.keep_scale = keep_scale(p);
  a.dropout = t.seed != nullptr;
  a.seed = t.seed ? static_cast<uint64_t>(*t.seed) : 0;
  a.format = float_format(q, "q: expected float32, float16 or bfloat16");
  a.key_format = a.format;
  a.bias_format = t.bias_is_float ? FORMAT_F32 : a.format;
  return a;
}

// Every sequence that has queries, for every key head; ends of packed ones are cut to what is there.
std::vector<AttentionSequence> sequences_of(const AttentionTensors& t) {
  std::vector<AttentionSequence> found;
  if (t.heads == 0) return found;
  const int64_t count = t.packed() ? t.sequences : t.batch;
  for (int64_t i = 0; i < count; ++i) {
    AttentionSequence s{i, 0, 0, t.n_q, 0, t.n_k};
    if (t.packed()) {
      const auto cut = [](int64_t at, int64_t n) { return std::clamp<int64_t>(at, 0, n); };
      s.batch = 0;
      s.q0 = cut(t.cu_q[i], t.n_q), s.k0 = cut(t.cu_k[i], t.n_k);
      s.n_q = std::max<int64_t>(0, cut(t.cu_q[i + 1], t.n_q) - s.q0);
      s.n_k = std::max<int64_t>(0, cut(t.cu_k[i + 1], t.n_k) - s.k0);
    }
    if (s.n_q > 0)
      for (s.group = 0; s.group < t.kv_heads; ++s.group) found.push_back(s);
  }
  return found;
}

struct Item {
  const AttentionSequence* sequence;
  int64_t first, count, key0, key1;
  float* partial;
};

std::tuple<Tensor, Tensor> attention_forward(const Tensor& q, const Tensor& k, const Tensor& v,
                                             const OptionalTensor& bias, const OptionalTensor& mask,
                                             const OptionalTensor& lens, const OptionalTensor& cu_q,
                                             const OptionalTensor& cu_k, const OptionalTensor& slopes,
                                             const OptionalTensor& seed, double p, double scale, double softcap,
                                             int64_t left, int64_t right) {
  const AttentionTensors t(q, k, v, bias, mask, lens, cu_q, cu_k, slopes, seed);
  AttentionCall a = call_of(t, q, p, scale, softcap, left, right);
  const Tensor out = attention_like(q, t.d_v);
  const Tensor lse = new_tensor(q, {t.batch, t.heads, t.n_q}, ScalarType::Float);
  a.out = out.mutable_data_ptr(), a.out_at = strides(out);
  a.lse = static_cast<float*>(lse.mutable_data_ptr());
  const AttentionKernels& kernels = attention_table();
  const int64_t shared = t.heads / t.kv_heads;
  const std::vector<AttentionSequence> sequences = sequences_of(t);
  std::vector<Item> items;
  int64_t work = 0, parts = 0;
  for (const AttentionSequence& s : sequences) {
    const int64_t columns = shared * s.n_q;
    work += columns * s.n_k * (a.head_dim + a.d_v);
    if (columns <= kernels.columns && s.n_k > PART) {
      for (int64_t key = 0; key < s.n_k; key += PART)
        items.push_back({&s, 0, columns, key, std::min(s.n_k, key + PART), nullptr}), ++parts;
    } else {
      // The last queries see most keys, where some see fewer: they go first, so that no thread ends with the longest.
      for (int64_t first = (columns - 1) / kernels.columns * kernels.columns; first >= 0; first -= kernels.columns)
        items.push_back({&s, first, std::min(columns - first, kernels.columns), 0, s.n_k, nullptr});
    }
  }
  const int64_t part_floats = (a.d_v + 2) * kernels.columns;
  const Scratch memory(parts * part_floats * 4);
  float* partial = reinterpret_cast<float*>(memory.data);
  std::vector<const Item*> merged;
  for (Item& item : items)
    if (item.key0 > 0 || item.key1 < item.sequence->n_k) {
      if (item.key0 == 0) merged.push_back(&item);
      item.partial = partial;
      partial += part_floats;
    }
  const int64_t bytes = kernels.forward_bytes(a);
  for_items(static_cast<int64_t>(items.size()), work, bytes, [&](int64_t i, void* scratch) {
    const Item& item = items[static_cast<size_t>(i)];
    kernels.forward(a, *item.sequence, item.first, item.count, item.key0, item.key1, item.partial, scratch);
  });
  for_items(static_cast<int64_t>(merged.size()), 0, bytes, [&](int64_t i, void* scratch) {
    const Item& item = *merged[static_cast<size_t>(i)];
    kernels.merge(a, *item.sequence, item.first, item.count, item.partial, (item.sequence->n_k + PART - 1) / PART,
                  scratch);
  });
  return {out, lse};
}

const AttentionBackwardKernels& attention_backward_table() {
  switch (cpu_vectors()) {
#define FASTDL_CASE(variant) \
  case CpuVariant::variant: return variant::attention_backward_kernels;
    FASTDL_VECTORS(FASTDL_CASE)
#undef FASTDL_CASE
    default: return scalar::attention_backward_kernels;
  }
}

// Keys of a part of the backward pass: at most four parts, because each has its own sums for dq.
int64_t part_keys(int64_t n_k, int64_t block) { return std::max(PART, (n_k + 4 * block - 1) / (4 * block) * block); }

struct BackwardItem {
  const AttentionSequence* sequence;
  int64_t key0, key1, stride;  // stride: floats between the sums of two parts
  float* dq;
};

// dbias where several sequences, heads or parts add to one element: an item owns the elements of one (batch, head, block of
// queries, block of keys) of bias and goes through all that is broadcast, in order.
void bias_gradients(const AttentionCall& a, const AttentionBackwardKernels& kernels, const Tensor& bias, int64_t batch,
                    int64_t work) {
  struct Axis {
    int64_t n, step;  // elements of the scores, of an item
    bool own;
    int64_t items() const { return own ? (n + step - 1) / step : 1; }
  };
  const Axis axes[4] = {{batch, 1, bias.size(0) > 1},
                        {a.heads, 1, bias.size(1) > 1},
                        {a.n_q, kernels.columns, bias.size(2) > 1},
                        {a.n_k, kernels.keys, bias.size(3) > 1}};
  int64_t items = 1;
  for (const Axis& axis : axes) items *= axis.items();
  const int64_t shared = a.heads / a.kv_heads;
  for_items(items, work, kernels.bytes(a), [&](int64_t item, void* scratch) {
    Range part[4];
    for (int d = 3; d >= 0; --d) {
      const Axis& axis = axes[d];
      const int64_t index = item % axis.items();
      item /= axis.items();
      part[d] = axis.own ? Range{index * axis.step, std::min(axis.n, (index + 1) * axis.step)} : Range{0, axis.n};
    }
    for (int64_t b = part[0].begin; b < part[0].end; ++b)
      for (int64_t head = part[1].begin; head < part[1].end; ++head) {
        const AttentionSequence s{b, head / shared, 0, a.n_q, 0, a.n_k};
        for (int64_t row = part[2].begin; row < part[2].end; row += kernels.columns)
          for (int64_t key = part[3].begin; key < part[3].end; key += kernels.keys)
            kernels.bias_gradient(a, s, head % shared * a.n_q + row, std::min(kernels.columns, part[2].end - row), key,
                                  std::min(kernels.keys, part[3].end - key), scratch);
      }
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> attention_backward(
    const Tensor& grad, const OptionalTensor& grad_lse, const Tensor& q, const Tensor& k, const Tensor& v,
    const Tensor& out, const Tensor& lse, const OptionalTensor& bias, const OptionalTensor& mask,
    const OptionalTensor& lens, const OptionalTensor& cu_q, const OptionalTensor& cu_k, const OptionalTensor& slopes,
    const OptionalTensor& seed, double p, double scale, double softcap, int64_t left, int64_t right, bool need_bias) {
  const AttentionTensors t(q, k, v, bias, mask, lens, cu_q, cu_k, slopes, seed);
  const HeadRows grads = t.like_out(grad, q), results = t.like_out(out, q);
  AttentionCall a = call_of(t, q, p, scale, softcap, left, right);
  a.grad = grads.tensor.const_data_ptr(), a.grad_at = strides(grads);
  a.result = results.tensor.const_data_ptr(), a.result_at = strides(results);
  a.row_lse = t.statistic(lse, q);
  a.grad_lse = grad_lse ? t.statistic(*grad_lse, q) : nullptr;
  const Tensor dq = attention_like(q, t.head_dim), dk = attention_like(k, t.head_dim), dv = attention_like(v, t.d_v);
  a.dq = dq.mutable_data_ptr(), a.dq_at = strides(dq);
  a.dk = dk.mutable_data_ptr(), a.dk_at = strides(dk);
  a.dv = dv.mutable_data_ptr(), a.dv_at = strides(dv);
  check(!need_bias || bias.has_value(), "need_bias: expected a bias");
  const Tensor dbias = new_tensor(q, need_bias ? shape_of(*bias) : std::vector<int64_t>{0}, ScalarType::Float);
  const AttentionBackwardKernels& kernels = attention_backward_table();
  const std::vector<AttentionSequence> sequences = sequences_of(t);
  const int64_t shared = t.heads / t.kv_heads, block = a.head_dim * kernels.columns;

  // Keys that no query belongs to are not reached below.
  std::fill_n(static_cast<uint8_t*>(a.dk), dk.numel() * (a.format == FORMAT_F32 ? 4 : 2), uint8_t{0});
  std::fill_n(static_cast<uint8_t*>(a.dv), dv.numel() * (a.format == FORMAT_F32 ? 4 : 2), uint8_t{0});
  bool alone = true;  // an element of the bias belongs to one item of the loop below
  if (need_bias) {
    std::fill_n(static_cast<float*>(dbias.mutable_data_ptr()), dbias.numel(), 0.0f);
    a.dbias_at = {nullptr, stride_of(dbias, 0), stride_of(dbias, 1), stride_of(dbias, 2), stride_of(dbias, 3)};
    alone = (bias->size(0) == t.batch) && (bias->size(1) == t.heads || t.kv_heads == 1) && (bias->size(3) == t.n_k);
  }
  struct Block {
    const AttentionSequence* sequence;
    int64_t first, count;
    const float* dq;
    int64_t parts, stride;
  };
  std::vector<BackwardItem> items;
  std::vector<Block> blocks;
  int64_t work = 0, floats = 0;
  for (const AttentionSequence& s : sequences) {
    const int64_t columns = shared * s.n_q, count = (columns + kernels.columns - 1) / kernels.columns;
    const int64_t step = part_keys(s.n_k, kernels.keys), parts = (s.n_k + step - 1) / step;
    work += columns * s.n_k * (a.head_dim + a.d_v);
    for (int64_t key = 0; key < s.n_k; key += step)
      items.push_back({&s, key, std::min(s.n_k, key + step), count * block, nullptr});
    for (int64_t i = 0; i < count; ++i)
      blocks.push_back({&s, i * kernels.columns, std::min(columns - i * kernels.columns, kernels.columns), nullptr,
                        parts, count * block});
    floats += parts * count * block;
  }
  const Scratch memory((floats + t.rows()) * 4);
  float* at = reinterpret_cast<float*>(memory.data);
  a.delta = at, at += t.rows();
  for (size_t i = 0, j = 0; j < blocks.size();) {
    const AttentionSequence* const s = blocks[j].sequence;
    for (int64_t n = 0; j < blocks.size() && blocks[j].sequence == s; ++j, ++n) blocks[j].dq = at + n * block;
    for (; i < items.size() && items[i].sequence == s; ++i, at += items[i - 1].stride) items[i].dq = at;
  }
  const int64_t bytes = kernels.bytes(a), count = static_cast<int64_t>(blocks.size());
  for_items(count, work, bytes, [&](int64_t i, void* scratch) {
    const Block& b = blocks[static_cast<size_t>(i)];
    kernels.deltas(a, *b.sequence, b.first, b.count, scratch);
  });
  if (need_bias && alone) a.dbias = static_cast<float*>(dbias.mutable_data_ptr());
  for_items(static_cast<int64_t>(items.size()), work, bytes, [&](int64_t i, void* scratch) {
    const BackwardItem& item = items[static_cast<size_t>(i)];
    kernels.backward(a, *item.sequence, item.key0, item.key1, item.dq, scratch);
  });
  for_items(count, work, 0, [&](int64_t i, void*) {
    const Block& b = blocks[static_cast<size_t>(i)];
    kernels.write_dq(a, *b.sequence, b.first, b.count, b.dq, b.parts, b.stride);
  });
  if (need_bias && !alone) {
    a.dbias = static_cast<float*>(dbias.mutable_data_ptr());
    bias_gradients(a, kernels, *bias, t.batch, work);
  }
  return {dq, dk, dv, dbias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastdl, CPU, m) {
  m.impl("attention_forward", TORCH_BOX(&attention_forward));
  m.impl("attention_backward", TORCH_BOX(&attention_backward));
}

}  // namespace fastdl
