// Products of small matrices in a kernel's 16-bit type T (half_t, bf16_t), sums in float32, and the packing of their
// operands. How fragments lie in registers: emulator/ptx.h.
#pragma once

#include "cuda/ptx.cuh"
#include "cuda/reduce.cuh"
#include "cuda/vector.cuh"

namespace fastdl::cuda {

// The first and the second of two bf16 in a register.
__device__ __forceinline__ float first_bf16(uint32_t pair) { return __uint_as_float(pair << 16); }
__device__ __forceinline__ float second_bf16(uint32_t pair) { return __uint_as_float(pair & 0xffff0000u); }

// d [16][8] += a [16][16] b [16][8] without tensor cores, for chips whose tensor cores have no bf16 (sm_75): a lane asks
// the others for the rows and columns of its four elements.
__device__ __forceinline__ void mma_bf16_by_shuffles(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  const int lane = static_cast<int>(threadIdx.x) % 32, row = lane / 4 * 4, column = lane % 4 * 8;
#pragma unroll
  for (int half = 0; half < 2; ++half)
#pragma unroll 1  // unrolled, kernels with many products take minutes to compile
    for (int k = 0; k < 4; ++k) {
      const uint32_t a0 = __shfl_sync(kAllLanes, a[2 * half], row + k);
      const uint32_t a1 = __shfl_sync(kAllLanes, a[2 * half + 1], row + k);
      const uint32_t b0 = __shfl_sync(kAllLanes, b[half], column + k);
      const uint32_t b1 = __shfl_sync(kAllLanes, b[half], column + 4 + k);
      d[0] += first_bf16(a0) * first_bf16(b0) + second_bf16(a0) * second_bf16(b0);
      d[1] += first_bf16(a0) * first_bf16(b1) + second_bf16(a0) * second_bf16(b1);
      d[2] += first_bf16(a1) * first_bf16(b0) + second_bf16(a1) * second_bf16(b0);
      d[3] += first_bf16(a1) * first_bf16(b1) + second_bf16(a1) * second_bf16(b1);
    }
}

// d [16][8] += a [16][16] b [16][8]
__device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], half_t) {
  ptx::mma_m16n8k16_f16(d, a, b);
}
__device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], bf16_t) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
  mma_bf16_by_shuffles(d, a, b);
#else
  ptx::mma_m16n8k16_bf16(d, a, b);
#endif
}

// Two numbers, rounded, in one register; the first in the lower half.
__device__ __forceinline__ uint32_t pack(float first, float second, half_t) { return ptx::pack_f16(first, second); }
__device__ __forceinline__ uint32_t pack(float first, float second, bf16_t) { return ptx::pack_bf16(first, second); }

}  // namespace fastdl::cuda
