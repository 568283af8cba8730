// Room attention on the CPU: checks, threads, registration. Contract: fastdl/ops/attention.py.
//
// An item is a block of queries of the heads that share a key head. Where one item holds all queries of a sequence, its
// keys are cut into parts as well, by their number alone; the parts' sums are merged in order.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <atomic>
#include <vector>

#include "common/attention_tensors.h"
#include "common/parallel.h"
#include "cpu/attention_kernel.h"

namespace fastdl {
namespace {

constexpr int64_t PART = 1024;      // keys of a part
constexpr int64_t ALONE = 1 << 19;  // multiply-adds; waking up a second thread costs more than so few take

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
  a.bias_format = t.bias_is_float ? FORMAT_F32 : a.format;
  return a;
}

// Every sequence for every key head; ends of packed ones are cut to what is there.
std::vector<AttentionSequence> sequences_of(const AttentionTensors& t) {
  std::vector<AttentionSequence> found;
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

// body(item, scratch) for every item, in their order, on as many threads as there is work for.
template <class Body>
void for_items(int64_t items, int64_t work, int64_t scratch_bytes, const Body& body) {
  const int threads = work < ALONE ? 1 : static_cast<int>(std::min<int64_t>(thread_count(), items));
  const int64_t bytes = padded(scratch_bytes);
  const Tensor memory = allocate_bytes(std::max(1, threads) * bytes);
  uint8_t* const scratch = first_byte(memory);
  std::atomic<int64_t> next{0};
  parallel_region(threads, [&](int thread, int) {
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < items;) body(i, scratch + thread * bytes);
  });
}

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
  const Tensor memory = allocate_bytes(parts * part_floats * 4);
  float* partial = reinterpret_cast<float*>(first_byte(memory));
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

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastdl, CPU, m) { m.impl("attention_forward", TORCH_BOX(&attention_forward)); }

}  // namespace fastdl
