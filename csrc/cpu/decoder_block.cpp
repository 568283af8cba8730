// Room decoder_block on the CPU: a whole stack of decoder blocks in one call and one parallel region, so that a token
// costs one op call from Python and threads meet at barriers instead of waking up 200 times.
#include <torch/csrc/stable/library.h>

#include <cmath>
#include <initializer_list>
#include <vector>

#include "common/parallel.h"
#include "common/tensor.h"
#include "cpu/decoder_attention.h"
#include "cpu/decoder_block_kernel.h"
#include "cpu/quant_matmul_kernel.h"
#include "cpu/quant_table.h"

namespace fastdl {
namespace {

const DecoderBlockKernels& decoder_block_table() {
  switch (cpu_variant()) {
#define FASTDL_CASE(variant) \
  case CpuVariant::variant: return variant::decoder_block_kernels;
    FASTDL_VARIANTS(FASTDL_CASE)
#undef FASTDL_CASE
    default: return scalar::decoder_block_kernels;
  }
}

struct Matrix {
  const uint8_t* data;
  const float* bias;
  int format;
  int64_t rows, cols;
};

struct Layer {
  const float *attn_norm, *ffn_norm;
  Matrix q, k, v, o, gate, up, down;
};

const float* checked_vector(const Tensor& t, int64_t size, const char* message) {
  check(t.is_cpu() && t.scalar_type() == ScalarType::Float && t.is_contiguous() && t.numel() == size, message);
  return (const float*)t.const_data_ptr();
}

constexpr int64_t TENSORS = 12, FORMATS = 7;  // a layer, in the order of the schema

std::vector<Layer> checked_layers(const std::vector<Tensor>& w, const std::vector<int64_t>& formats,
                                  const DecoderShape& s) {
  const int64_t layers = (int64_t)w.size() / TENSORS;
  check((int64_t)w.size() == layers * TENSORS && (int64_t)formats.size() == layers * FORMATS,
        "weights, formats: expected 12 tensors and 7 formats a layer");
  std::vector<Layer> out((size_t)layers);
  for (int64_t i = 0; i < layers; ++i) {
    const Tensor* t = &w[(size_t)(i * TENSORS)];
    const int64_t* f = &formats[(size_t)(i * FORMATS)];
    const auto matrix = [&](int tensor, int format, int64_t rows, int64_t cols) {
      const int known = checked_format(f[format], cols);
      return Matrix{checked_panels(t[tensor], known, rows, cols), nullptr, known, rows, cols};
    };
    const auto bias = [&](int tensor, int64_t rows) -> const float* {
      return t[tensor].numel() ? checked_vector(t[tensor], rows, "weights: a bias has the wrong shape") : nullptr;
    };
    Layer& l = out[(size_t)i];
    l.attn_norm = checked_vector(t[0], s.width, "weights: attn_norm: expected float32 [width]");
    l.q = matrix(1, 0, s.q_rows(), s.width);
    l.k = matrix(2, 1, s.kv_rows(), s.width);
    l.v = matrix(3, 2, s.kv_rows(), s.width);
    l.o = matrix(4, 3, s.width, s.q_rows());
    l.ffn_norm = checked_vector(t[5], s.width, "weights: ffn_norm: expected float32 [width]");
    l.gate = matrix(6, 4, s.ff, s.width);
    l.up = matrix(7, 5, s.ff, s.width);
    l.down = matrix(8, 6, s.width, s.ff);
    l.q.bias = bias(9, s.q_rows());
    l.k.bias = bias(10, s.kv_rows());
    l.v.bias = bias(11, s.kv_rows());
  }
  return out;
}

// The buffers of one call. With a single token every thread normalizes and prepares the activations for itself (h then
// lies in its scratch): half a microsecond of arithmetic done twice costs less than a barrier.
struct Memory {
  Tensor keep;
  float *h, *qkv, *att, *ff, *sums;
  std::vector<uint8_t*> prepared, scratch;
};

Memory allocate(const DecoderShape& s, const QuantMatmulKernels& products, const CacheAttention& attention, int team) {
  const int64_t widest =
      s.width > s.ff ? (s.width > s.q_rows() ? s.width : s.q_rows()) : (s.ff > s.q_rows() ? s.ff : s.q_rows());
  int64_t block = 0;
  for (int p = PRECISION_FP32; p <= PRECISION_INT8; ++p) {
    const int64_t bytes = products.prepared_block_bytes(p);
    if ((p == s.activation || p == PRECISION_FP32) && bytes > block) block = bytes;
  }
  const int64_t prepared = padded((widest + 31) / 32 * s.n * block);
  int64_t scratch =
      products.scratch_bytes() > attention.scratch_bytes ? products.scratch_bytes() : attention.scratch_bytes;
  scratch = padded(scratch > s.width * 4 ? scratch : s.width * 4);
  const int64_t h = padded(s.n * s.width * 4), qkv = padded(s.n * s.qkv_rows() * 4);
  const int64_t att = padded(s.n * s.q_rows() * 4), ff = padded(s.n * s.ff * 4);
  const int64_t sums = attention.few ? padded(s.n_kv_heads * attention.parts * attention.part_floats * 4) : 0;
  const int copies = s.n == 1 ? team : 1;
  Memory m{allocate_bytes(h + qkv + att + ff + sums + copies * prepared + team * scratch),
           nullptr,
           nullptr,
           nullptr,
           nullptr,
           nullptr,
           {},
           {}};
  uint8_t* at = first_byte(m.keep);
  m.h = (float*)at, at += h;
  m.qkv = (float*)at, at += qkv;
  m.att = (float*)at, at += att;
  m.ff = (float*)at, at += ff;
  m.sums = (float*)at, at += sums;
  for (int i = 0; i < team; ++i) m.prepared.push_back(at + (copies > 1 ? i : 0) * prepared);
  at += copies * prepared;
  for (int i = 0; i < team; ++i) m.scratch.push_back(at + i * scratch);
  return m;
}

// One thread's part of the whole stack. Every step cuts its work by shape; a barrier stands wherever a step reads what
// another thread wrote.
class Worker {
 public:
  Worker(const DecoderShape& s, const Memory& m, const QuantMatmulKernels& products, const DecoderBlockKernels& steps,
         float* x, int thread, int team)
      : s_(s),
        m_(m),
        products_(products),
        steps_(steps),
        x_(x),
        prepared_(m.prepared[(size_t)thread]),
        scratch_(m.scratch[(size_t)thread]),
        thread_(thread),
        team_(team),
        alone_(s.n == 1) {}

  void layer(const Layer& l, const CacheAttention& attention, const RopeArgs& rope) {
    normalized(l.attn_norm, {&l.q, &l.k, &l.v});
    project({&l.q, &l.k, &l.v}, m_.qkv, s_.qkv_rows());
    barrier();
    const Range turned = range(s_.n * (s_.n_heads + 2 * s_.n_kv_heads), thread_, team_);
    steps_.rope_and_cache(rope, turned.begin, turned.end);
    barrier();
    if (attention.few)
      attention_of_few(attention);
    else
      attention_of_many(attention);
    barrier();
    prepare(m_.att, s_.q_rows(), {&l.o});
    run(product(l.o, x_, s_.width, ADD));
    barrier();
    normalized(l.ffn_norm, {&l.gate, &l.up});
    MatmulArgs gate = product(l.gate, m_.ff, s_.ff, SWIGLU);
    gate.w2 = l.up.data, gate.format2 = l.up.format;
    run(gate);
    barrier();
    prepare(m_.ff, s_.ff, {&l.down});
    run(product(l.down, x_, s_.width, ADD));
    barrier();
  }

  void output_norm(const float* weight) {
    const Range t = range(s_.n, thread_, team_);
    steps_.rms_norm(x_, weight, s_.eps, s_.width, t.begin, t.end, x_);
  }

 private:
  // A few queries: every part of the keys of a key head is an item; the parts are merged once all are done.
  void attention_of_few(const CacheAttention& c) {
    const int64_t items = s_.n_kv_heads * c.parts;
    const auto sums = [&](int64_t group) { return m_.sums + group * c.parts * c.part_floats; };
    for (int64_t i = thread_; i < items; i += team_) {
      const int64_t group = i / c.parts, part = i % c.parts;
      c.decode->part(c.few_call, 0, group, part, sums(group) + part * c.part_floats, scratch_);
      if (c.parts == 1) c.decode->merge(c.few_call, 0, group, sums(group), 1);
    }
    if (c.parts == 1) return;
    barrier();
    for (int64_t group = thread_; group < s_.n_kv_heads; group += team_)
      c.decode->merge(c.few_call, 0, group, sums(group), c.parts);
  }

  // Many: blocks of queries. The last see most keys and go first, so that dealing them out in turn is fair.
  void attention_of_many(const CacheAttention& c) {
    const int64_t columns = s_.n_heads / s_.n_kv_heads * s_.n, block = c.many->columns;
    const int64_t blocks = (columns + block - 1) / block;
    for (int64_t i = thread_; i < blocks * s_.n_kv_heads; i += team_) {
      const int64_t first = (blocks - 1 - i / s_.n_kv_heads) * block;
      const AttentionSequence all{0, i % s_.n_kv_heads, 0, s_.n, 0, s_.pos + s_.n};
      c.many->forward(c.many_call, all, first, columns - first < block ? columns - first : block, 0, s_.pos + s_.n,
                      nullptr, scratch_);
    }
  }

  using Group = std::initializer_list<const Matrix*>;  // matrices that share their input

  void barrier() const {
#pragma omp barrier
  }

  void normalized(const float* weight, Group users) {
    const Range t = alone_ ? Range{0, 1} : range(s_.n, thread_, team_);
    float* h = alone_ ? (float*)scratch_ : m_.h;
    steps_.rms_norm(x_, weight, s_.eps, s_.width, t.begin, t.end, h);
    prepare(h, s_.width, users);
  }

  // INT8 needs integer weights in the whole group; f16, bf16 and f32 matrices make it FP32.
  void prepare(const float* x, int64_t cols, Group users) {
    precision_ = s_.activation;
    for (const Matrix* w : users)
      if (precision_ == PRECISION_INT8 && !format_has_int8(w->format)) precision_ = PRECISION_FP32;
    const Range t = alone_ ? Range{0, 1} : range(s_.n, thread_, team_);
    products_.prepare(x, FORMAT_F32, cols, cols, precision_, s_.n, t.begin, t.end, prepared_);
    if (!alone_) barrier();
  }

  MatmulArgs product(const Matrix& w, float* out, int64_t ld_out, int epilogue) const {
    MatmulArgs a{};
    a.w = w.data, a.acts = prepared_, a.bias = w.bias, a.out = out;
    a.rows = w.rows, a.cols = w.cols, a.tokens = s_.n, a.ld_out = ld_out;
    a.format = w.format, a.precision = precision_, a.out_format = FORMAT_F32, a.epilogue = epilogue;
    return a;
  }

  void run(const MatmulArgs& a) const {
    const Range p = range(panel_count(a.rows), thread_, team_);
    products_.matmul(a, p.begin, p.end, scratch_);
  }

  // Several matrices, their outputs side by side: all their panels are one range of work.
  void project(Group matrices, float* out, int64_t ld_out) const {
    int64_t total = 0, first = 0;
    for (const Matrix* w : matrices) total += panel_count(w->rows);
    const Range part = range(total, thread_, team_);
    for (const Matrix* w : matrices) {
      const int64_t panels = panel_count(w->rows);
      const int64_t begin = part.begin > first ? part.begin - first : 0;
      const int64_t end = part.end - first < panels ? part.end - first : panels;
      if (begin < end) products_.matmul(product(*w, out, ld_out, STORE), begin, end, scratch_);
      first += panels;
      out += w->rows;
    }
  }

  const DecoderShape& s_;
  const Memory& m_;
  const QuantMatmulKernels& products_;
  const DecoderBlockKernels& steps_;
  float* const x_;
  uint8_t* const prepared_;
  uint8_t* const scratch_;
  const int thread_, team_;
  const bool alone_;
  int precision_ = PRECISION_FP32;  // of what prepared_ holds
};

Tensor decoder_blocks(const Tensor& x_, const std::vector<Tensor>& weights, const std::vector<int64_t>& formats,
                      const Tensor& k_cache, const Tensor& v_cache, const Tensor& rope,
                      const std::optional<Tensor>& output_norm, int64_t pos, int64_t n_heads, int64_t n_kv_heads,
                      int64_t head_dim, int64_t ff_dim, double eps, int64_t activation) {
  check(x_.is_cpu() && x_.dim() == 2 && x_.scalar_type() == ScalarType::Float,
        "x: expected a float32 matrix on the CPU");
  check(n_heads > 0 && n_kv_heads > 0 && n_heads % n_kv_heads == 0, "n_heads: expected a multiple of n_kv_heads");
  check(n_heads < (int64_t)1 << 32, "n_heads: too many");
  check(head_dim > 0 && head_dim % 16 == 0 && head_dim <= 512, "head_dim: expected a multiple of 16, at most 512");
  check(activation >= PRECISION_FP32 && activation <= PRECISION_INT8, "activation: unknown number");
  const int64_t n = x_.size(0), layers = (int64_t)weights.size() / TENSORS;
  for (const Tensor* cache : {&k_cache, &v_cache})
    check(cache->is_cpu() && cache->scalar_type() == ScalarType::Half && cache->is_contiguous() && cache->dim() == 4 &&
              cache->size(0) == layers && cache->size(1) == n_kv_heads && cache->size(3) == head_dim,
          "cache: expected float16 [layers, n_kv_heads, max_len, head_dim]");
  const int64_t max_len = k_cache.size(2);
  check(v_cache.size(2) == max_len && pos >= 0 && pos <= max_len - n, "pos: the new tokens do not fit in the cache");
  check(rope.is_cpu() && rope.scalar_type() == ScalarType::Float && rope.is_contiguous() && rope.dim() == 2 &&
            rope.size(0) >= pos + n && rope.size(1) <= head_dim && rope.size(1) % 2 == 0,
        "rope: expected float32 [at least pos + n, rope_dim <= head_dim]");
  const DecoderShape s{n,       x_.size(1),   n_heads, n_kv_heads, head_dim,       ff_dim,
                       max_len, rope.size(1), pos,     (float)eps, (int)activation};
  check(ff_dim > 0, "ff_dim: expected a positive number");
  const std::vector<Layer> stack = checked_layers(weights, formats, s);
  const float* norm =
      output_norm ? checked_vector(*output_norm, s.width, "output_norm: expected float32 [width]") : nullptr;

  Tensor x = torch::stable::clone(torch::stable::contiguous(x_));
  if (n == 0) return x;
  const QuantMatmulKernels& products = quant_matmul_table();
  const DecoderBlockKernels& steps = decoder_block_table();
  const int team = thread_count();
  CacheAttention attention(s);
  const Memory m = allocate(s, products, attention, team);
  attention.tensors(m.qkv, m.att);
  RopeArgs turn{m.qkv,
                (const float*)rope.const_data_ptr(),
                nullptr,
                nullptr,
                n,
                pos,
                s.qkv_rows(),
                max_len,
                n_heads,
                n_kv_heads,
                head_dim,
                s.rope_dim};
  float* data = (float*)x.mutable_data_ptr();
  uint16_t* keys = (uint16_t*)k_cache.mutable_data_ptr();
  uint16_t* values = (uint16_t*)v_cache.mutable_data_ptr();
  const int64_t layer_elements = n_kv_heads * max_len * head_dim;

  parallel_region(team, [&](int thread, int threads) {
    Worker worker(s, m, products, steps, data, thread, threads);
    CacheAttention a = attention;
    a.few_call.lens = &a.length;
    RopeArgs r = turn;
    for (int64_t i = 0; i < layers; ++i) {
      r.k_cache = keys + i * layer_elements;
      r.v_cache = values + i * layer_elements;
      a.cache(r.k_cache, r.v_cache);
      worker.layer(stack[(size_t)i], a, r);
    }
    if (norm) worker.output_norm(norm);
  });
  return x;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastdl, CPU, m) { m.impl("decoder_blocks", TORCH_BOX(&decoder_blocks)); }

}  // namespace fastdl
