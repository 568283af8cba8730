// The words of CUDA C++ that kernels use, for g++: keywords, built-in variables, vector and half types, warp functions,
// integer atomics. Included through cuda/platform.cuh. What is missing here is added when a kernel needs it.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "common/half.h"
#include "emulator/emulator.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))

#define threadIdx (::fastdl::emulator::indices().thread)
#define blockIdx (::fastdl::emulator::indices().block)
#define blockDim (::fastdl::emulator::indices().block_dim)
#define gridDim (::fastdl::emulator::indices().grid_dim)
constexpr int warpSize = 32;

// FASTDL_SHARED(float, partial, [32]): an array shared by the block.
#define FASTDL_SHARED(type, name, ...)                                                                      \
  static const char name##_declaration = 0;                                                                 \
  using name##_shared_type = type __VA_ARGS__;                                                              \
  auto& name = *static_cast<name##_shared_type*>(::fastdl::emulator::shared_array(                          \
      &name##_declaration, sizeof(name##_shared_type), alignof(name##_shared_type)))
// FASTDL_DYNAMIC_SHARED(float, tile): the bytes that the launch asked for, aligned to 128.
#define FASTDL_DYNAMIC_SHARED(type, name) auto* name = static_cast<type*>(::fastdl::emulator::dynamic_shared())

// ---- Launching ----------------------------------------------------------------------------------------------------
using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0 };
inline const char* cudaGetErrorString(cudaError_t) { return "no error"; }

// ---- Types --------------------------------------------------------------------------------------------------------
struct alignas(8) int2 {
  int x, y;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct __half {
  uint16_t bits;
};
struct __nv_bfloat16 {
  uint16_t bits;
};

inline float __half2float(__half h) { return fastdl::half_to_float(h.bits); }
inline __half __float2half_rn(float x) { return {fastdl::float_to_half(x)}; }
inline float __bfloat162float(__nv_bfloat16 h) {
  const uint32_t bits = static_cast<uint32_t>(h.bits) << 16;
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}
inline __nv_bfloat16 __float2bfloat16_rn(float x) {
  uint32_t u;
  std::memcpy(&u, &x, 4);
  if ((u & 0x7fffffffu) > 0x7f800000u) return {0x7fff};
  return {static_cast<uint16_t>((u + 0x7fffu + ((u >> 16) & 1u)) >> 16)};
}

// ---- Arithmetic ---------------------------------------------------------------------------------------------------
inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a < b ? b : a; }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline float __expf(float x) { return std::exp(x); }
inline float __fdividef(float x, float y) { return x / y; }
inline float __fmul_rn(float x, float y) { return x * y; }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>((static_cast<uint64_t>(a) * b) >> 32); }
inline int __dp4a(int a, int b, int c) {
  for (int i = 0; i < 32; i += 8) c += static_cast<int8_t>(a >> i) * static_cast<int8_t>(b >> i);
  return c;
}
inline float __uint_as_float(unsigned u) {
  float x;
  std::memcpy(&x, &u, 4);
  return x;
}
inline unsigned __float_as_uint(float x) {
  unsigned u;
  std::memcpy(&u, &x, 4);
  return u;
}
template <class T>
inline T __ldg(const T* p) {
  return *p;
}

// ---- Barriers and warp functions ----------------------------------------------------------------------------------
inline void __syncthreads(fastdl::emulator::Where where = fastdl::emulator::Where::current()) {
  fastdl::emulator::block_barrier(where);
}
inline void __syncwarp(unsigned mask = 0xffffffffu,
                       fastdl::emulator::Where where = fastdl::emulator::Where::current()) {
  fastdl::emulator::warp_collective("__syncwarp", mask, nullptr, nullptr, where);
}
inline void __threadfence() {}

namespace fastdl::emulator {

template <class T>
struct Shuffle {
  T value, result;
  unsigned source;  // lane to read
};

template <class T>
T shuffle(const char* name, unsigned mask, T value, unsigned source, Where where) {
  static_assert(sizeof(T) <= 8);
  Shuffle<T> mine{value, value, source};
  warp_collective(
      name, mask, &mine,
      [](void* const* lanes, uint32_t present) {
        for (unsigned i = 0; i < kWarp; ++i) {
          if (!lanes[i] || !(present >> i & 1)) continue;
          auto* to = static_cast<Shuffle<T>*>(lanes[i]);
          if (!(present >> to->source & 1))
            fail("a shuffle reads lane " + std::to_string(to->source) + ", not in its mask");
          to->result = static_cast<const Shuffle<T>*>(lanes[to->source])->value;
        }
      },
      where);
  return mine.result;
}

struct Vote {
  bool value;
  unsigned ballot;
};

inline unsigned vote(const char* name, unsigned mask, bool value, Where where) {
  Vote mine{value, 0};
  warp_collective(
      name, mask, &mine,
      [](void* const* lanes, uint32_t present) {
        unsigned ballot = 0;
        for (unsigned i = 0; i < kWarp; ++i)
          if (present >> i & 1) ballot |= static_cast<unsigned>(static_cast<Vote*>(lanes[i])->value) << i;
        for (unsigned i = 0; i < kWarp; ++i)
          if (present >> i & 1) static_cast<Vote*>(lanes[i])->ballot = ballot;
      },
      where);
  return mine.ballot;
}

// The lane that shfl with a segment width reads; its own where the source lies outside the segment.
inline unsigned inside_segment(unsigned mine, int64_t source, unsigned width) {
  const int64_t first = mine / width * width;
  return source < first || source >= first + width ? mine : static_cast<unsigned>(source);
}

}  // namespace fastdl::emulator

template <class T>
T __shfl_sync(unsigned mask, T v, int source, int width = 32,
              fastdl::emulator::Where where = fastdl::emulator::Where::current()) {
  const unsigned mine = fastdl::emulator::lane(), w = static_cast<unsigned>(width);
  return fastdl::emulator::shuffle("__shfl_sync", mask, v, mine / w * w + static_cast<unsigned>(source) % w, where);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T v, int bits, int width = 32,
                  fastdl::emulator::Where where = fastdl::emulator::Where::current()) {
  const unsigned mine = fastdl::emulator::lane(), source = mine ^ static_cast<unsigned>(bits);
  // Hardware lets a lane read lower segments here, but not higher ones.
  const bool above = source / static_cast<unsigned>(width) > mine / static_cast<unsigned>(width);
  return fastdl::emulator::shuffle("__shfl_xor_sync", mask, v, above ? mine : source, where);
}
template <class T>
T __shfl_down_sync(unsigned mask, T v, unsigned delta, int width = 32,
                   fastdl::emulator::Where where = fastdl::emulator::Where::current()) {
  const unsigned mine = fastdl::emulator::lane();
  const unsigned source = fastdl::emulator::inside_segment(mine, int64_t{mine} + delta, static_cast<unsigned>(width));
  return fastdl::emulator::shuffle("__shfl_down_sync", mask, v, source, where);
}
template <class T>
T __shfl_up_sync(unsigned mask, T v, unsigned delta, int width = 32,
                 fastdl::emulator::Where where = fastdl::emulator::Where::current()) {
  const unsigned mine = fastdl::emulator::lane();
  const unsigned source = fastdl::emulator::inside_segment(mine, int64_t{mine} - delta, static_cast<unsigned>(width));
  return fastdl::emulator::shuffle("__shfl_up_sync", mask, v, source, where);
}
inline unsigned __ballot_sync(unsigned mask, bool predicate,
                              fastdl::emulator::Where where = fastdl::emulator::Where::current()) {
  return fastdl::emulator::vote("__ballot_sync", mask, predicate, where);
}
inline bool __any_sync(unsigned mask, bool predicate,
                       fastdl::emulator::Where where = fastdl::emulator::Where::current()) {
  return fastdl::emulator::vote("__any_sync", mask, predicate, where) != 0;
}
inline bool __all_sync(unsigned mask, bool predicate,
                       fastdl::emulator::Where where = fastdl::emulator::Where::current()) {
  return fastdl::emulator::vote("__all_sync", mask, predicate, where) == mask;
}

// ---- Atomics (integers only: floating-point ones would make results depend on the order) --------------------------
template <class T>
T atomicAdd(T* p, T v) {
  static_assert(std::is_integral_v<T>);
  const T old = *p;
  *p = static_cast<T>(old + v);
  return old;
}
template <class T>
T atomicMax(T* p, T v) {
  static_assert(std::is_integral_v<T>);
  const T old = *p;
  *p = old < v ? v : old;
  return old;
}
template <class T>
T atomicMin(T* p, T v) {
  static_assert(std::is_integral_v<T>);
  const T old = *p;
  *p = v < old ? v : old;
  return old;
}
template <class T>
T atomicExch(T* p, T v) {
  const T old = *p;
  *p = v;
  return old;
}
template <class T>
T atomicCAS(T* p, T expected, T desired) {
  const T old = *p;
  if (old == expected) *p = desired;
  return old;
}
