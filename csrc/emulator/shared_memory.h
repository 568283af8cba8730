// The shared memory of one block: an arena in which each declaration gets its array at the first thread that meets it.
// Arrays start out full of 0xFF bytes (NaN in every float format) and lie between red zones, which are compared at the
// end of the block and are off limits for the address sanitizer.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include <memory>
#include <string>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#define FASTDL_POISON(address, bytes) ASAN_POISON_MEMORY_REGION(address, bytes)
#define FASTDL_UNPOISON(address, bytes) ASAN_UNPOISON_MEMORY_REGION(address, bytes)
#else
#define FASTDL_POISON(address, bytes) ((void)0)
#define FASTDL_UNPOISON(address, bytes) ((void)0)
#endif

namespace fastdl::emulator {

class SharedMemory {
 public:
  static constexpr size_t kRedZone = 128;
  static constexpr size_t kCapacity = (48 + 227) * 1024 + 256 * kRedZone;
  static constexpr uint8_t kRed = 0xA5;

  struct Array {
    const void* declaration;
    size_t offset, bytes;
  };

  SharedMemory() : memory_(new (std::align_val_t(kRedZone)) uint8_t[kCapacity]) { reset(); }
  ~SharedMemory() {
    FASTDL_UNPOISON(memory_, kCapacity);
    ::operator delete[](memory_, std::align_val_t(kRedZone));
  }
  SharedMemory(const SharedMemory&) = delete;
  SharedMemory& operator=(const SharedMemory&) = delete;

  void reset() {
    FASTDL_UNPOISON(memory_, kCapacity);
    arrays_.clear();
    end_ = 0;
    red_zone();
  }

  // The array of a declaration, or null when there is no room for it.
  void* find_or_add(const void* declaration, size_t bytes) {
    for (const Array& array : arrays_)
      if (array.declaration == declaration) return memory_ + array.offset;
    if (end_ + bytes + 2 * kRedZone > kCapacity) return nullptr;
    const size_t offset = end_;
    arrays_.push_back({declaration, offset, bytes});
    std::memset(memory_ + offset, 0xFF, bytes);
    end_ += bytes;
    red_zone();
    return memory_ + offset;
  }

  size_t used(const void* except) const {
    size_t sum = 0;
    for (const Array& array : arrays_) sum += array.declaration == except ? 0 : array.bytes;
    return sum;
  }

  bool contains(const void* address, size_t bytes) const {
    const auto* begin = static_cast<const uint8_t*>(address);
    for (const Array& array : arrays_)
      if (begin >= memory_ + array.offset && begin + bytes <= memory_ + array.offset + array.bytes) return true;
    return false;
  }

  // What was written outside the arrays; empty when nothing.
  std::string damage() const {
    size_t from = 0;
    for (size_t i = 0; i <= arrays_.size(); ++i) {
      const size_t to = i < arrays_.size() ? arrays_[i].offset : end_;
      for (size_t at = from; at < to; ++at)
        if (peek(at) != kRed)
          return i == 0 ? "before the first shared array"
                        : "byte " + std::to_string(at - arrays_[i - 1].offset) + " of a shared array of " +
                              std::to_string(arrays_[i - 1].bytes) + " bytes";
      if (i < arrays_.size()) from = arrays_[i].offset + arrays_[i].bytes;
    }
    return {};
  }

 private:
  // From end_ to the next multiple of the zone's size, and one zone more: arrays are aligned to 128 bytes.
  void red_zone() {
    const size_t next = (end_ + kRedZone - 1) / kRedZone * kRedZone + kRedZone;
    std::memset(memory_ + end_, kRed, next - end_);
    FASTDL_POISON(memory_ + end_, next - end_);
    end_ = next;
  }

#if defined(__SANITIZE_ADDRESS__)
  __attribute__((no_sanitize("address")))
#endif
  uint8_t peek(size_t at) const {
    return memory_[at];
  }

  uint8_t* memory_;
  size_t end_ = 0;
  std::vector<Array> arrays_;
};

}  // namespace fastdl::emulator
