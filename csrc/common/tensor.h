// What a wrapper needs from a torch tensor, on the stable ABI: checks for memory safety (Python has raised the readable
// errors before), float formats, sizes.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <stdexcept>
#include <string>

#include "common/formats.h"

namespace fastdl {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

inline void check(bool ok, const char* message) {
  if (!ok) throw std::runtime_error(std::string("fastdl: ") + message);
}

// float32, float16 and bfloat16 have the numbers of the weight formats F32, F16, BF16.
inline int float_format(const Tensor& x, const char* message) {
  switch (x.scalar_type()) {
    case ScalarType::Float: return FORMAT_F32;
    case ScalarType::Half: return FORMAT_F16;
    case ScalarType::BFloat16: return FORMAT_BF16;
    default: throw std::runtime_error(std::string("fastdl: ") + message);
  }
}

inline bool same_device(const Tensor& a, const Tensor& b) {
  return a.is_cpu() == b.is_cpu() && a.get_device_index() == b.get_device_index();
}

inline void check_like(const Tensor& x, const Tensor& other, const char* message) {
  const auto a = x.sizes(), b = other.sizes();
  check(other.scalar_type() == x.scalar_type() && same_device(x, other) &&
            std::equal(a.begin(), a.end(), b.begin(), b.end()),
        message);
}

inline const void* pointer(const OptionalTensor& t) { return t ? t->const_data_ptr() : nullptr; }

inline float keep_scale(double p) { return p >= 1 ? 0.0f : static_cast<float>(1.0 / (1.0 - p)); }

inline const int64_t* seed_pointer(const Tensor& x, const OptionalTensor& seed) {
  if (!seed) return nullptr;
  check(seed->scalar_type() == ScalarType::Long && seed->numel() == 1 && same_device(*seed, x),
        "seed: expected int64 [1] on the device of x");
  return static_cast<const int64_t*>(seed->const_data_ptr());
}

inline int checked_format(int64_t format, int64_t cols) {
  check(format >= 0 && format < 64 && format_known((int)format), "format: unknown number");
  check(cols > 0 && cols % format_block((int)format) == 0, "cols: not a multiple of the format's block");
  check(cols < (int64_t)1 << 48, "cols: too many");  // the bytes of a panel fit in 64 bits
  return (int)format;
}

// The bytes of a packed matrix, or an error if the tensor does not hold `rows` rows.
inline const uint8_t* checked_panels(const Tensor& packed, int format, int64_t rows, int64_t cols) {
  check(packed.scalar_type() == ScalarType::Byte && packed.is_contiguous() && packed.is_cpu(),
        "packed: expected a contiguous uint8 tensor on the CPU");
  // Divided, not multiplied: a product could overflow to the size that is there. A row takes more than one byte.
  const int64_t bytes = panel_bytes(format, cols), size = packed.numel();
  check(rows >= 0 && rows <= size && size % bytes == 0 && size / bytes == panel_count(rows),
        "packed: its size does not fit rows and cols");
  return (const uint8_t*)packed.const_data_ptr();
}

// Buffers inside one allocation start at multiples of 64 bytes: a cache line, and the widest vector.
inline int64_t padded(int64_t bytes) { return (bytes + 63) / 64 * 64; }

inline Tensor allocate_bytes(int64_t bytes) { return torch::stable::empty({bytes + 64}, ScalarType::Byte); }

inline uint8_t* first_byte(const Tensor& memory) {
  return (uint8_t*)(((uintptr_t)memory.mutable_data_ptr() + 63) & ~(uintptr_t)63);
}

inline int thread_count() { return (int)torch::stable::get_num_threads(); }

}  // namespace fastdl
