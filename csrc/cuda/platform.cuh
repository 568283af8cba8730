// What a kernel file includes first: CUDA, or the emulator that plays it on the CPU (FASTDL_EMULATED), behind the same
// names. Kernels use the words below instead of <<<>>>, __shared__ and inline PTX, and then need no #if of their own.
//
//   FASTDL_SHARED(float, partial, [32]);      float partial[32], shared by the block
//   FASTDL_DYNAMIC_SHARED(float, tile);       float* tile: the bytes that the launch asked for, aligned to 128
//   launch(kernel, grid, block, dynamic_shared, stream, arguments...) -> cudaError_t
//   launch_cooperative(...)                   the same, all blocks alive at once: ptx::grid_barrier works
#pragma once

#include <cstdint>
#include <utility>

namespace fastdl::cuda {

// What a launcher asks about a device before it plans a cooperative launch.
struct DeviceLimits {
  int processors;        // that run blocks at the same time
  int64_t shared_bytes;  // of a block at most
  int major;             // of its compute capability
  bool cooperative;      // has cooperative launches
};

}  // namespace fastdl::cuda

#if defined(FASTDL_EMULATED)

#include "emulator/cuda.h"

namespace fastdl::cuda {

template <class... P, class... A>
cudaError_t launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t dynamic_shared, cudaStream_t, A&&... arguments) {
  emulator::launch(kernel, {grid, block, dynamic_shared, false}, std::forward<A>(arguments)...);
  return cudaSuccess;
}

template <class... P, class... A>
cudaError_t launch_cooperative(void (*kernel)(P...), dim3 grid, dim3 block, size_t dynamic_shared, cudaStream_t,
                               A&&... arguments) {
  emulator::launch(kernel, {grid, block, dynamic_shared, true}, std::forward<A>(arguments)...);
  return cudaSuccess;
}

// Small, so that tests reach the second turn of a loop over rows.
inline int multiprocessor_count() { return 2; }

// Some blocks that share work, and few threads.
inline DeviceLimits device_limits() { return {6, 227 * 1024, 9, true}; }

}  // namespace fastdl::cuda

#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#define FASTDL_SHARED(type, name, ...) __shared__ type name __VA_ARGS__
#define FASTDL_DYNAMIC_SHARED(type, name)                               \
  extern __shared__ __align__(128) unsigned char fastdl_dynamic_shared[]; \
  type* name = reinterpret_cast<type*>(fastdl_dynamic_shared)

namespace fastdl::cuda {

template <class... P>
cudaError_t allow_shared(void (*kernel)(P...), size_t dynamic_shared) {
  if (dynamic_shared <= 48 * 1024) return cudaSuccess;
  return cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                              static_cast<int>(dynamic_shared));
}

// cudaLaunchKernelEx, not <<<>>>: a plain function call, which formatters and g++ can read.
template <class... P, class... A>
cudaError_t launch_with(bool cooperative, void (*kernel)(P...), dim3 grid, dim3 block, size_t dynamic_shared,
                        cudaStream_t stream, A&&... arguments) {
  if (const cudaError_t error = allow_shared(kernel, dynamic_shared); error != cudaSuccess) return error;
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeCooperative;
  attribute.val.cooperative = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = dynamic_shared;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = cooperative ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, static_cast<P>(std::forward<A>(arguments))...);
}

template <class... P, class... A>
cudaError_t launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t dynamic_shared, cudaStream_t stream,
                   A&&... arguments) {
  return launch_with(false, kernel, grid, block, dynamic_shared, stream, std::forward<A>(arguments)...);
}

template <class... P, class... A>
cudaError_t launch_cooperative(void (*kernel)(P...), dim3 grid, dim3 block, size_t dynamic_shared, cudaStream_t stream,
                               A&&... arguments) {
  return launch_with(true, kernel, grid, block, dynamic_shared, stream, std::forward<A>(arguments)...);
}

// Of the current device; asked for once per device.
inline int multiprocessor_count() {
  static int counts[64] = {};
  int device = 0;
  cudaGetDevice(&device);
  int& count = counts[device & 63];
  if (!count) cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  return count;
}

// Of the current device. Attributes are kept by the driver: asking is cheap.
inline DeviceLimits device_limits() {
  int device = 0, shared = 0, major = 0, cooperative = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  cudaDeviceGetAttribute(&cooperative, cudaDevAttrCooperativeLaunch, device);
  return {multiprocessor_count(), shared, major, cooperative != 0};
}

}  // namespace fastdl::cuda

#endif

namespace fastdl::cuda {

using half_t = __half;
using bf16_t = __nv_bfloat16;

}  // namespace fastdl::cuda
