// Working memory of a CPU wrapper.
#pragma once

#include <stdint.h>

#include <new>

namespace fastdl {

// Aligned to a cache line; small ones live on the stack, because allocating costs as much as a short row.
struct Scratch {
  explicit Scratch(int64_t bytes)
      : data(bytes <= static_cast<int64_t>(sizeof local)
                 ? local
                 : static_cast<uint8_t*>(::operator new(static_cast<size_t>(bytes), std::align_val_t(64)))) {}
  ~Scratch() {
    if (data != local) ::operator delete(data, std::align_val_t(64));
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  alignas(64) uint8_t local[16 * 1024];
  uint8_t* data;
};

}  // namespace fastdl
