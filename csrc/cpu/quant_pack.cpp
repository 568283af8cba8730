// Weights between GGUF's rows and the kernels' panels, and between floats and GGUF's rows: compiled once, plain C++.
// The layouts are described in common/formats.h. No kernel here is hot: packing runs once, at load.
#include <torch/csrc/stable/library.h>

#include <cstring>
#include <memory>

#include "common/parallel.h"
#include "common/tensor.h"
#include "cpu/gguf_rows.h"

namespace fastdl {
namespace {

// ---------------------------------------------------------------- one row <-> its place in a panel

void q6_pack_row(uint8_t* panel, const uint8_t* row, int64_t cols, int r) {
  uint8_t code[256];
  for (int64_t s = 0; s < cols / 256; ++s, panel += 3392, row += 210) {
    memcpy(panel + 2 * r, row + 208, 2);
    for (int i = 0; i < 16; ++i) panel[64 + 16 * i + r] = row[192 + i];
    q6_codes(row, code);
    for (int k = 0; k < 256; ++k) {
      uint8_t* block = panel + 320 + k / 32 * 384;
      const int j = k % 32 / 4, at = 4 * r + k % 4;
      block[64 * (j % 4) + at] |= (uint8_t)((code[k] & 15) << (j < 4 ? 0 : 4));
      block[256 + 64 * (j / 4) + at] |= (uint8_t)((code[k] >> 4) << (2 * (j % 4)));
    }
  }
}

void q6_unpack_row(const uint8_t* panel, uint8_t* row, int64_t cols, int r) {
  uint8_t code[256];
  for (int64_t s = 0; s < cols / 256; ++s, panel += 3392, row += 210) {
    memcpy(row + 208, panel + 2 * r, 2);
    for (int i = 0; i < 16; ++i) row[192 + i] = panel[64 + 16 * i + r];
    for (int k = 0; k < 256; ++k) {
      const uint8_t* block = panel + 320 + k / 32 * 384;
      const int j = k % 32 / 4, at = 4 * r + k % 4;
      code[k] = (uint8_t)((block[64 * (j % 4) + at] >> (j < 4 ? 0 : 4) & 15) |
                          (block[256 + 64 * (j / 4) + at] >> (2 * (j % 4)) & 3) << 4);
    }
    q6_bits(code, row);
  }
}

// panel: zeroed bytes of one panel
void pack_row(int format, uint8_t* panel, const uint8_t* row, int64_t cols, int r) {
  switch (format) {
    case FORMAT_Q4_1:
      for (int64_t b = 0; b < cols / 32; ++b, panel += 320, row += 20) {
        memcpy(panel + 2 * r, row, 2);
        memcpy(panel + 32 + 2 * r, row + 2, 2);
        for (int v = 0; v < 4; ++v) memcpy(panel + 64 + 64 * v + 4 * r, row + 4 + 4 * v, 4);
      }
      return;
    case FORMAT_Q8_0: {
      uint8_t* codes = panel + q8_header_bytes(cols);
      for (int64_t b = 0; b < cols / 32; ++b, codes += 512, row += 34) {
        memcpy(panel + 32 * b + 2 * r, row, 2);
        for (int j = 0; j < 8; ++j) {
          const uint32_t four = load<uint32_t>(row + 2 + 4 * j) ^ 0x80808080u;
          memcpy(codes + 64 * j + 4 * r, &four, 4);
        }
      }
      return;
    }
    case FORMAT_Q6_K: return q6_pack_row(panel, row, cols, r);
    case FORMAT_F32:
      for (int64_t k = 0; k < cols; ++k) memcpy(panel + 64 * k + 4 * r, row + 4 * k, 4);
      return;
    default:
      for (int64_t k = 0; k < cols; ++k) memcpy(panel + 64 * (k / 2) + 4 * r + 2 * (k % 2), row + 2 * k, 2);
  }
}

void unpack_row(int format, const uint8_t* panel, uint8_t* row, int64_t cols, int r) {
  switch (format) {
    case FORMAT_Q4_1:
      for (int64_t b = 0; b < cols / 32; ++b, panel += 320, row += 20) {
        memcpy(row, panel + 2 * r, 2);
        memcpy(row + 2, panel + 32 + 2 * r, 2);
        for (int v = 0; v < 4; ++v) memcpy(row + 4 + 4 * v, panel + 64 + 64 * v + 4 * r, 4);
      }
      return;
    case FORMAT_Q8_0: {
      const uint8_t* codes = panel + q8_header_bytes(cols);
      for (int64_t b = 0; b < cols / 32; ++b, codes += 512, row += 34) {
        memcpy(row, panel + 32 * b + 2 * r, 2);
        for (int j = 0; j < 8; ++j) {
          const uint32_t four = load<uint32_t>(codes + 64 * j + 4 * r) ^ 0x80808080u;
          memcpy(row + 2 + 4 * j, &four, 4);
        }
      }
      return;
    }
    case FORMAT_Q6_K: return q6_unpack_row(panel, row, cols, r);
    case FORMAT_F32:
      for (int64_t k = 0; k < cols; ++k) memcpy(row + 4 * k, panel + 64 * k + 4 * r, 4);
      return;
    default:
      for (int64_t k = 0; k < cols; ++k) memcpy(row + 2 * k, panel + 64 * (k / 2) + 4 * r + 2 * (k % 2), 2);
  }
}

// ---------------------------------------------------------------- ops

Tensor quant_pack(const Tensor& gguf_, int64_t format_, int64_t cols) {
  const int format = checked_format(format_, cols);
  const Tensor gguf = torch::stable::contiguous(gguf_);
  check(gguf.is_cpu() && gguf.scalar_type() == ScalarType::Byte && gguf.dim() == 2 &&
            gguf.size(1) == row_bytes(format, cols),
        "gguf: expected uint8 [rows, bytes of a row] on the CPU");
  const int64_t rows = gguf.size(0), row = row_bytes(format, cols), bytes = panel_bytes(format, cols);
  const int64_t panels = panel_count(rows);
  Tensor packed = torch::stable::new_empty(gguf, {panels * bytes});
  const uint8_t* from = (const uint8_t*)gguf.const_data_ptr();
  uint8_t* to = (uint8_t*)packed.mutable_data_ptr();
  parallel_region(panels > 1 ? thread_count() : 1, [&](int thread, int team) {
    const Range part = range(panels, thread, team);
    for (int64_t p = part.begin; p < part.end; ++p) {
      memset(to + p * bytes, 0, (size_t)bytes);
      for (int64_t r = 0; r < 16 && p * 16 + r < rows; ++r)
        pack_row(format, to + p * bytes, from + (p * 16 + r) * row, cols, (int)r);
    }
  });
  return packed;
}

Tensor quant_unpack(const Tensor& packed, int64_t format_, int64_t rows, int64_t cols) {
  const int format = checked_format(format_, cols);
  const uint8_t* from = checked_panels(packed, format, rows, cols);
  const int64_t row = row_bytes(format, cols), bytes = panel_bytes(format, cols);
  Tensor gguf = torch::stable::new_empty(packed, {rows, row});
  uint8_t* to = (uint8_t*)gguf.mutable_data_ptr();
  parallel_region(rows > 16 ? thread_count() : 1, [&](int thread, int team) {
    const Range part = range(rows, thread, team);
    for (int64_t r = part.begin; r < part.end; ++r)
      unpack_row(format, from + r / 16 * bytes, to + r * row, cols, (int)(r % 16));
  });
  return gguf;
}

void store_row(const float* x, int64_t cols, ScalarType dtype, uint8_t* out) {
  if (dtype == ScalarType::Float) {
    memcpy(out, x, (size_t)cols * 4);
    return;
  }
  for (int64_t k = 0; k < cols; ++k) {
    const uint16_t bits = dtype == ScalarType::Half ? float_to_half(x[k]) : bf16_bits(x[k]);
    memcpy(out + 2 * k, &bits, 2);
  }
}

Tensor quant_rows(const Tensor& packed, const std::optional<Tensor>& ids, int64_t format_, int64_t rows, int64_t cols,
                  ScalarType dtype) {
  const int format = checked_format(format_, cols);
  const uint8_t* from = checked_panels(packed, format, rows, cols);
  check(dtype == ScalarType::Float || dtype == ScalarType::Half || dtype == ScalarType::BFloat16,
        "dtype: expected float32, float16 or bfloat16");
  const int64_t* id = nullptr;
  std::optional<Tensor> kept;
  if (ids) {
    check(ids->is_cpu() && ids->scalar_type() == ScalarType::Long && ids->dim() == 1,
          "ids: expected a 1-D int64 CPU tensor");
    kept = torch::stable::contiguous(*ids);
    id = (const int64_t*)kept->const_data_ptr();
  }
  const int64_t count = ids ? ids->numel() : rows;
  for (int64_t i = 0; id && i < count; ++i) check(id[i] >= 0 && id[i] < rows, "ids: out of range");
  Tensor out = torch::stable::new_empty(packed, {count, cols}, dtype);
  uint8_t* to = (uint8_t*)out.mutable_data_ptr();
  const int64_t row = row_bytes(format, cols), bytes = panel_bytes(format, cols);
  const int64_t out_row = cols * (dtype == ScalarType::Float ? 4 : 2);
  const int team = count > 16 ? thread_count() : 1;
  const std::unique_ptr<uint8_t[]> raw_rows(new uint8_t[(size_t)(team * row)]);
  const std::unique_ptr<float[]> float_rows(new float[(size_t)(team * cols)]);
  parallel_region(team, [&](int thread, int threads) {
    uint8_t* raw = raw_rows.get() + thread * row;
    float* values = float_rows.get() + thread * cols;
    const Range part = range(count, thread, threads);
    for (int64_t i = part.begin; i < part.end; ++i) {
      const int64_t r = id ? id[i] : i;
      unpack_row(format, from + r / 16 * bytes, raw, cols, (int)(r % 16));
      dequantize_row(format, raw, cols, values);
      store_row(values, cols, dtype, to + i * out_row);
    }
  });
  return out;
}

Tensor quant_quantize(const Tensor& w_, int64_t format_) {
  check(w_.is_cpu() && w_.dim() == 2 && w_.scalar_type() == ScalarType::Float,
        "w: expected a float32 matrix on the CPU");
  const Tensor w = torch::stable::contiguous(w_);
  const int64_t rows = w.size(0), cols = w.size(1);
  const int format = checked_format(format_, cols);
  check(format != FORMAT_Q6_K, "format: q6_k can be read, not written");
  const int64_t row = row_bytes(format, cols);
  Tensor gguf = torch::stable::new_empty(w, {rows, row}, ScalarType::Byte);
  const float* from = (const float*)w.const_data_ptr();
  uint8_t* to = (uint8_t*)gguf.mutable_data_ptr();
  parallel_region(rows > 16 ? thread_count() : 1, [&](int thread, int team) {
    const Range part = range(rows, thread, team);
    for (int64_t r = part.begin; r < part.end; ++r) quantize_row(format, from + r * cols, cols, to + r * row);
  });
  return gguf;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastdl, CPU, m) {
  m.impl("quant_pack", TORCH_BOX(&quant_pack));
  m.impl("quant_unpack", TORCH_BOX(&quant_unpack));
  m.impl("quant_rows", TORCH_BOX(&quant_rows));
  m.impl("quant_quantize", TORCH_BOX(&quant_quantize));
}

}  // namespace fastdl
