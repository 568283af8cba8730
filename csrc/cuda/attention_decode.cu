// fastdl::attention_decode, CUDA key: checks, allocation, launches. Contract: fastdl/ops/attention_decode.py.
#include "cuda/attention_decode.cuh"

#include "common/attention_decode_tensors.h"
#include "cuda/wrapper.h"

namespace fastdl::cuda {
namespace {

DecodeRows rows_of(const HeadRows& x) { return {x.tensor.const_data_ptr(), x.batch, x.head, x.row}; }

DecodeCache cache_of(const Tensor& t, int format) {
  const int64_t size = format == FORMAT_F32 ? 4 : format == FORMAT_Q8_0 ? 1 : 2;
  DecodeCache cache{};
  cache.data = static_cast<uint8_t*>(t.mutable_data_ptr());
  cache.row = stride_of(t, 0) * size;
  cache.head = stride_of(t, 1) * size;
  cache.position = stride_of(t, 2) * size;
  cache.bytes = static_cast<int>(t.size(3) * size);
  const int64_t all = reinterpret_cast<int64_t>(cache.data) | cache.row | cache.head | cache.position | cache.bytes;
  cache.piece = 16;
  while (all % cache.piece) cache.piece /= 2;
  return cache;
}

std::tuple<Tensor, Tensor> attention_decode(const Tensor& q, const OptionalTensor& k_new, const OptionalTensor& v_new,
                                            const Tensor& k_cache, const Tensor& v_cache, const Tensor& lens,
                                            const OptionalTensor& table, const OptionalTensor& cos_sin,
                                            const OptionalTensor& slopes, bool interleaved, double scale,
                                            double softcap, int64_t left, int64_t right) {
  const Device device(q);
  const DecodeTensors t(q, k_new, v_new, k_cache, v_cache, lens, table, cos_sin, slopes);
  constexpr int64_t kMost = 1 << 29;  // positions plus windows are ints
  for (const int64_t n : {t.n_q, t.n_new, t.capacity(), t.rows, t.block, t.positions, t.heads, t.heads * t.n_q})
    check(n < kMost, "q, k_cache: expected sizes below 2^29");
  check(t.head_dim <= 256 && t.d_v <= 256, "q, v_cache: expected a head_dim and a d_v of at most 256");
  const auto number = [](int64_t n) { return static_cast<int>(n); };
  // A window wider than all there is has no limit.
  const auto limit = [&](int64_t n) { return n < 0 || n > t.n_q + t.capacity() ? -1 : static_cast<int>(n); };
  Decode a{};
  a.q = rows_of(t.q), a.k_new = rows_of(t.k_new), a.v_new = rows_of(t.v_new);
  a.k = cache_of(k_cache, t.cache_format), a.v = cache_of(v_cache, t.cache_format);
  a.format = float_format(q, "q: expected float32, float16 or bfloat16"), a.cache_format = t.cache_format;
  a.lens = t.lens, a.table = t.table;
  a.table_blocks = number(t.table_blocks), a.block = number(t.block), a.blocks = number(t.rows);
  a.capacity = number(t.capacity());
  a.cos_sin = t.cos_sin, a.positions = number(t.positions), a.rope_dim = number(t.rope_dim);
  a.interleaved = interleaved;
  a.slopes = t.slopes, a.slopes_of_batch = t.slopes_of_batch;
  a.batch = number(t.batch), a.heads = number(t.heads), a.kv_heads = number(t.kv_heads);
  a.n_q = number(t.n_q), a.n_new = number(t.n_new), a.head_dim = number(t.head_dim), a.d_v = number(t.d_v);
  a.left = limit(left), a.right = limit(right);
  a.scale = static_cast<float>(scale), a.softcap = static_cast<float>(softcap);
  a.rows = a.heads / a.kv_heads * a.n_q, a.tiles = (a.rows + 15) / 16;
  a.part = decode_part(a.rows), a.parts = (a.capacity + a.part - 1) / a.part;
  const int64_t places = t.batch * a.kv_heads * a.parts * a.rows;
  const Tensor sums = new_tensor(q, {places * (t.d_v + 2)}, ScalarType::Float);
  a.outs = output<float>(sums), a.states = a.outs + places * t.d_v;
  a.out = t.out.mutable_data_ptr(), a.lse = output<float>(t.lse);
  a.out_batch = stride_of(t.out, 0), a.out_head = stride_of(t.out, 1), a.out_row = stride_of(t.out, 2);
  check_launch("attention_decode", attention_decode_launch(a, device.stream()));
  return {t.out, t.lse};
}

}  // namespace

FASTDL_CUDA_LIBRARY(m) { m.impl("attention_decode", TORCH_BOX(&attention_decode)); }

}  // namespace fastdl::cuda
