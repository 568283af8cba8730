// Detection of the CPU level: cpuid for what the CPU has, xgetbv for what the system saves at a task switch, and for
// AMX a system call that asks for the tile registers. No torch here, so that it loads and runs anywhere.
#include "cpu/cpu_level.h"

#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <string>

#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#define FASTDL_EXPORT __attribute__((visibility("default")))

namespace fastdl {
namespace {

struct Features {
  bool avx2 = false, fma = false, f16c = false, avx_vnni = false, avx512 = false, avx512_bf16 = false, amx = false;

  bool has(CpuVariant variant) const {
    const bool base = avx2 && fma && f16c;
    switch (variant) {
      case CpuVariant::scalar: return true;
      case CpuVariant::avx2: return base;
      case CpuVariant::avx2_vnni: return base && avx_vnni;
      case CpuVariant::avx512: return base && avx512;
      case CpuVariant::avx512_bf16:
      case CpuVariant::amx_twin: return base && avx512 && avx512_bf16;
      case CpuVariant::amx: return base && avx512 && avx512_bf16 && amx;
    }
    return false;
  }
};

#if defined(__x86_64__)
bool bit(uint64_t word, int index) { return (word >> index) & 1; }

Features detect() {
  Features found;
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!__get_cpuid(1, &a, &b, &c, &d) || !bit(c, 27)) return found;  // bit 27: xgetbv may be used
  const bool fma = bit(c, 12), f16c = bit(c, 29);
  uint32_t low = 0, high = 0;
  asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  const uint64_t saved = (uint64_t(high) << 32) | low;
  const bool ymm = (saved & 0x6) == 0x6;            // xmm and ymm state
  const bool zmm = ymm && (saved & 0xe0) == 0xe0;   // mask registers, upper halves, zmm16-31
  const bool tiles = (saved & 0x60000) == 0x60000;  // tile configuration and data

  unsigned a7 = 0, b7 = 0, c7 = 0, d7 = 0, a71 = 0, b71 = 0, c71 = 0, d71 = 0;
  if (!__get_cpuid_count(7, 0, &a7, &b7, &c7, &d7)) return found;
  if (a7 >= 1) __get_cpuid_count(7, 1, &a71, &b71, &c71, &d71);
  found.avx2 = ymm && bit(b7, 5);
  found.fma = ymm && fma;
  found.f16c = ymm && f16c;
  found.avx_vnni = ymm && bit(a71, 4);
  found.avx512 = zmm && bit(b7, 16) && bit(b7, 17) && bit(b7, 30) && bit(b7, 31) && bit(c7, 11);  // F DQ BW VL VNNI
  found.avx512_bf16 = zmm && bit(a71, 5);
  found.amx = tiles && bit(d7, 22) && bit(d7, 24) && bit(d7, 25);  // BF16 TILE INT8
  return found;
}

// Linux hands out the tile registers (8 KB more per thread) only to processes that ask. Once granted it stays so.
bool amx_granted() {
  static const bool granted = [] {
    constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  }();
  return granted;
}
#else
Features detect() { return {}; }
bool amx_granted() { return false; }
#endif

const Features& features() {
  static const Features found = detect();
  return found;
}

struct Cap {
  const char* name;
  CpuVariant highest;
};
constexpr Cap kCaps[] = {
    {"scalar", CpuVariant::scalar},       {"avx2-plain", CpuVariant::avx2},    {"avx2", CpuVariant::avx2_vnni},
    {"avx512-plain", CpuVariant::avx512}, {"avx512", CpuVariant::avx512_bf16}, {"amx", CpuVariant::amx},
    {"amx-twin", CpuVariant::amx_twin},
};

const Cap* find_cap(const char* name) {
  for (const Cap& cap : kCaps)
    if (std::strcmp(cap.name, name) == 0) return &cap;
  return nullptr;
}

bool compiled(CpuVariant variant) {
  switch (variant) {
#define FASTDL_CASE(name) \
  case CpuVariant::name: return true;
    FASTDL_VARIANTS(FASTDL_CASE)
#undef FASTDL_CASE
    default: return false;
  }
}

CpuVariant widest(CpuVariant cap) {
  // Without the bits that the twin needs, "amx-twin" means: whatever the CPU has.
  if (cap == CpuVariant::amx_twin && features().has(cap)) return cap;
  for (int v = static_cast<int>(CpuVariant::amx); v > 0; --v) {
    const auto variant = static_cast<CpuVariant>(v);
    if (variant > cap || !compiled(variant) || !features().has(variant)) continue;
    if (variant == CpuVariant::amx && !amx_granted()) continue;
    return variant;
  }
  return CpuVariant::scalar;
}

CpuVariant cap_from_environment() {
  const char* name = std::getenv("FASTDL_ISA");
  const Cap* cap = name ? find_cap(name) : nullptr;  // Python has refused an unknown name before loading this
  return cap ? cap->highest : CpuVariant::amx;
}

constexpr int kUnset = -1;
std::atomic<int> current{kUnset};

}  // namespace

CpuVariant cpu_variant() {
  int variant = current.load(std::memory_order_acquire);
  if (variant == kUnset) {
    const int first = static_cast<int>(widest(cap_from_environment()));
    // A cap set meanwhile by another thread wins.
    if (current.compare_exchange_strong(variant, first)) variant = first;
  }
  return static_cast<CpuVariant>(variant);
}

CpuVariant cpu_vectors(CpuVariant variant) {
  switch (variant) {
    case CpuVariant::avx2_vnni: return CpuVariant::avx2;
    case CpuVariant::amx:
    case CpuVariant::amx_twin: return CpuVariant::avx512_bf16;
    default: return variant;
  }
}

}  // namespace fastdl

extern "C" FASTDL_EXPORT const char* fastdl_cpu_level() {
  switch (fastdl::cpu_variant()) {
    case fastdl::CpuVariant::scalar: return "scalar";
    case fastdl::CpuVariant::avx2:
    case fastdl::CpuVariant::avx2_vnni: return "avx2";
    case fastdl::CpuVariant::avx512:
    case fastdl::CpuVariant::avx512_bf16: return "avx512";
    case fastdl::CpuVariant::amx: return "amx";
    case fastdl::CpuVariant::amx_twin: return "amx-twin";
  }
  return "scalar";
}

extern "C" FASTDL_EXPORT const char* fastdl_cpu_features() {
  static const std::string text = [] {
    const fastdl::Features& f = fastdl::features();
    std::string list;
    const auto add = [&](bool present, const char* name) {
      if (!present) return;
      if (!list.empty()) list += ',';
      list += name;
    };
    add(f.avx2, "avx2");
    add(f.fma, "fma");
    add(f.f16c, "f16c");
    add(f.avx_vnni, "avx_vnni");
    add(f.avx512, "avx512");
    add(f.avx512_bf16, "avx512_bf16");
    add(f.amx, "amx");
    return list;
  }();
  return text.c_str();
}

extern "C" FASTDL_EXPORT int fastdl_set_level_cap(const char* name) {
  const fastdl::Cap* cap = name ? fastdl::find_cap(name) : nullptr;
  if (!cap) return 1;
  fastdl::current.store(static_cast<int>(fastdl::widest(cap->highest)), std::memory_order_release);
  return 0;
}
