// CPU twins of the PTX instructions in cuda/ptx.cuh. Fragment layouts are those of the PTX manual (ISA 8.x, "Matrix
// fragments for mma.m16n8k16" and its kin; "ldmatrix"): with g = lane / 4 and t = lane % 4,
//
//   16-bit A [16][16]  register i of 4 holds columns 2t + 8 (i / 2) and the next, of row g + 8 (i % 2)
//   16-bit B [16][8]   register i of 2 holds rows 2t + 8 i and the next, of column g
//   8-bit A [16][32]   register i of 4 holds columns 4t + 16 (i / 2) .. + 3, of row g + 8 (i % 2)
//   8-bit B [32][8]    register i of 2 holds rows 4t + 16 i .. + 3, of column g
//   C, D [16][8]       element i of 4 is row g + 8 (i / 2), column 2t + i % 2
#pragma once

#include <cstdint>
#include <cstring>

#include "emulator/cuda.h"

namespace fastdl::ptx {

using emulator::Where;

template <int Bytes>
inline void cp_async(void* shared, const void* global, bool valid = true) {
  static_assert(Bytes == 4 || Bytes == 8 || Bytes == 16);
  emulator::defer_copy(shared, global, Bytes, valid ? Bytes : 0);
}
inline void cp_async_commit() { emulator::commit_copies(); }
template <int GroupsLeft>
inline void cp_async_wait() {
  emulator::wait_copies(GroupsLeft);
}

struct LdMatrix {
  const void* row;
  uint32_t* registers;
};

// Matrix i of Count has its 8 row addresses in lanes 8i .. 8i+7; lane l receives row l / 4, columns 2 (l % 4) and the next
// (Transposed: rows 2 (l % 4) and the next, column l / 4).
template <int Count, bool Transposed>
inline void ldmatrix(uint32_t (&registers)[Count], const void* row, Where where = Where::current()) {
  LdMatrix mine{row, registers};
  const bool reads = emulator::lane() < 8u * Count;
  if (reads && (!emulator::in_shared(row, 16) || reinterpret_cast<uintptr_t>(row) % 16))
    emulator::fail("ldmatrix: a row address is not 16 bytes inside a shared array, aligned to 16", where);
  emulator::warp_collective(
      Transposed ? "ldmatrix.trans" : "ldmatrix", 0xffffffffu, &mine,
      [](void* const* lanes, uint32_t) {
        for (int i = 0; i < Count; ++i)
          for (int l = 0; l < 32; ++l) {
            uint16_t pair[2];
            for (int e = 0; e < 2; ++e) {
              const int r = Transposed ? 2 * (l % 4) + e : l / 4, c = Transposed ? l / 4 : 2 * (l % 4) + e;
              const auto* from = static_cast<const LdMatrix*>(lanes[8 * i + r]);
              std::memcpy(&pair[e], static_cast<const char*>(from->row) + 2 * c, 2);
            }
            std::memcpy(&static_cast<LdMatrix*>(lanes[l])->registers[i], pair, 4);
          }
      },
      where);
}

template <class D>
struct Mma {
  D* d;
  const uint32_t *a, *b;
};

// d += A B with K columns of A; `Value` reads element (index, half or byte) of a register.
template <class D, int K, D (*Value)(uint32_t, int), int PerRegister>
inline void mma_body(void* const* lanes, uint32_t) {
  D a[16][K], b[K][8];
  for (int l = 0; l < 32; ++l) {
    const auto* from = static_cast<const Mma<D>*>(lanes[l]);
    const int g = l / 4, t = l % 4;
    for (int i = 0; i < 4; ++i)
      for (int e = 0; e < PerRegister; ++e)
        a[g + 8 * (i % 2)][PerRegister * t + K / 2 * (i / 2) + e] = Value(from->a[i], e);
    for (int i = 0; i < 2; ++i)
      for (int e = 0; e < PerRegister; ++e) b[PerRegister * t + K / 2 * i + e][g] = Value(from->b[i], e);
  }
  for (int l = 0; l < 32; ++l)
    for (int i = 0; i < 4; ++i) {
      const int row = l / 4 + 8 * (i / 2), col = 2 * (l % 4) + i % 2;
      D sum = static_cast<Mma<D>*>(lanes[l])->d[i];
      for (int k = 0; k < K; ++k) sum += a[row][k] * b[k][col];
      static_cast<Mma<D>*>(lanes[l])->d[i] = sum;
    }
}

inline float half_at(uint32_t r, int e) { return half_to_float(static_cast<uint16_t>(r >> (16 * e))); }
inline float bf16_at(uint32_t r, int e) { return __bfloat162float({static_cast<uint16_t>(r >> (16 * e))}); }
inline int s8_at(uint32_t r, int e) { return static_cast<int8_t>(r >> (8 * e)); }

inline void mma_m16n8k16_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                             Where where = Where::current()) {
  Mma<float> mine{d, a, b};
  emulator::warp_collective("mma.m16n8k16.f16", 0xffffffffu, &mine, mma_body<float, 16, half_at, 2>, where);
}
inline void mma_m16n8k16_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                              Where where = Where::current()) {
  Mma<float> mine{d, a, b};
  emulator::warp_collective("mma.m16n8k16.bf16", 0xffffffffu, &mine, mma_body<float, 16, bf16_at, 2>, where);
}
inline void mma_m16n8k32_s8(int (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                            Where where = Where::current()) {
  Mma<int> mine{d, a, b};
  emulator::warp_collective("mma.m16n8k32.s8", 0xffffffffu, &mine, mma_body<int, 32, s8_at, 4>, where);
}

inline float exp2(float x) { return std::exp2(x); }
inline uint32_t pack_f16(float first, float second) {
  return __float2half_rn(first).bits | static_cast<uint32_t>(__float2half_rn(second).bits) << 16;
}
inline uint32_t pack_bf16(float first, float second) {
  return __float2bfloat16_rn(first).bits | static_cast<uint32_t>(__float2bfloat16_rn(second).bits) << 16;
}

inline void grid_barrier(unsigned*, Where where = Where::current()) { emulator::grid_barrier(where); }

}  // namespace fastdl::ptx
