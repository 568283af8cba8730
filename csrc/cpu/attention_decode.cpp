// Room attention_decode on the CPU: checks, threads, registration. Contract: fastdl/ops/attention_decode.py.
//
// First the new keys and values are written, then every part of every sequence's keys is an item for each key head, then the
// parts are merged.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <tuple>
#include <vector>

#include "common/attention_decode_tensors.h"
#include "cpu/attention_decode_kernel.h"
#include "cpu/items.h"

namespace fastdl {
namespace {

const DecodeKernels& decode_table() {
  switch (cpu_vectors()) {
#define FASTDL_CASE(variant) \
  case CpuVariant::variant: return variant::decode_kernels;
    FASTDL_VECTORS(FASTDL_CASE)
#undef FASTDL_CASE
    default: return scalar::decode_kernels;
  }
}

DecodeStrides strides(const HeadRows& t) { return {t.batch, t.head, t.row}; }

DecodeCache cache_of(const Tensor& t, int format) {
  const int64_t bytes = format == FORMAT_F32 ? 4 : format == FORMAT_Q8_0 ? 1 : 2;
  return {static_cast<uint8_t*>(t.mutable_data_ptr()), t.stride(0) * bytes, t.stride(1) * bytes, t.stride(2) * bytes};
}

std::tuple<Tensor, Tensor> attention_decode(const Tensor& q, const OptionalTensor& k_new, const OptionalTensor& v_new,
                                            const Tensor& k_cache, const Tensor& v_cache, const Tensor& lens,
                                            const OptionalTensor& table, const OptionalTensor& cos_sin,
                                            const OptionalTensor& slopes, bool interleaved, double scale,
                                            double softcap, int64_t left, int64_t right) {
  const DecodeTensors t(q, k_new, v_new, k_cache, v_cache, lens, table, cos_sin, slopes);
  DecodeCall a{};
  a.q = t.q.tensor.const_data_ptr(), a.q_at = strides(t.q);
  a.k_new = t.k_new.tensor.const_data_ptr(), a.k_at = strides(t.k_new);
  a.v_new = t.v_new.tensor.const_data_ptr(), a.v_at = strides(t.v_new);
  a.k = cache_of(k_cache, t.cache_format), a.v = cache_of(v_cache, t.cache_format);
  a.format = float_format(q, "q: expected float32, float16 or bfloat16");
  a.cache_format = t.cache_format;
  a.lens = t.lens, a.table = t.table;
  a.table_blocks = t.table_blocks, a.block = t.block, a.blocks = t.rows;
  a.cos_sin = t.cos_sin, a.positions = t.positions, a.rope_dim = t.rope_dim, a.interleaved = interleaved;
  a.slopes = t.slopes, a.slopes_of_batch = t.slopes_of_batch;
  a.batch = t.batch, a.heads = t.heads, a.kv_heads = t.kv_heads, a.n_q = t.n_q, a.n_new = t.n_new;
  a.head_dim = t.head_dim, a.d_v = t.d_v, a.left = left, a.right = right;
  a.scale = static_cast<float>(scale), a.softcap = static_cast<float>(softcap);
  a.out = t.out.mutable_data_ptr(), a.out_at = {stride_of(t.out, 0), stride_of(t.out, 1), stride_of(t.out, 2)};
  a.lse = static_cast<float*>(t.lse.mutable_data_ptr());
  const DecodeKernels& kernels = decode_table();

  struct Item {
    int64_t b, group, part, place;  // place: of its sums
  };
  std::vector<Item> items, whole;  // whole: a key head of a sequence; part: how many parts
  int64_t places = 0, work = 0;
  for (int64_t b = 0; b < t.batch; ++b) {
    const int64_t held = std::clamp<int64_t>(t.lens[b], 0, t.capacity());
    const int64_t total = std::min(t.capacity(), held + t.n_new), parts = (total + kernels.keys - 1) / kernels.keys;
    for (int64_t group = 0; group < t.kv_heads; ++group) {
      whole.push_back({b, group, parts, places});
      for (int64_t i = 0; i < parts; ++i) items.push_back({b, group, i, places++});
    }
    work += total * t.heads * t.n_q * (t.head_dim + t.d_v);
  }
  const int64_t each = kernels.part_floats(a);
  const Scratch memory(places * each * 4);
  float* const sums = reinterpret_cast<float*>(memory.data);
  const int64_t heads = static_cast<int64_t>(whole.size());
  if (t.n_new)
    for_items(heads, heads * t.n_new * (t.head_dim + t.d_v), 0, [&](int64_t i, void*) {
      const Item& item = whole[static_cast<size_t>(i)];
      kernels.append(a, item.b, item.group);
    });
  for_items(places, work, kernels.scratch_bytes(a), [&](int64_t i, void* scratch) {
    const Item& item = items[static_cast<size_t>(i)];
    kernels.part(a, item.b, item.group, item.part, sums + item.place * each, scratch);
  });
  for_items(heads, places * each, 0, [&](int64_t i, void*) {
    const Item& item = whole[static_cast<size_t>(i)];
    kernels.merge(a, item.b, item.group, sums + item.place * each, item.part);
  });
  return {t.out, t.lse};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastdl, CPU, m) { m.impl("attention_decode", TORCH_BOX(&attention_decode)); }

}  // namespace fastdl
