// What a .cu wrapper needs: the current stream, the device guard, checks, and where its ops are registered.
//
// The library must also load with the CPU build of torch, so nothing here may need a symbol of libtorch_cuda: the current
// stream is looked up at the first call. Under the emulator the same wrappers serve CPU tensors as fastdl_emulated::*.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <stdexcept>
#include <string>

#include "common/tensor.h"
#include "cuda/platform.cuh"

#if defined(FASTDL_EMULATED)
#define FASTDL_CUDA_LIBRARY(m) STABLE_TORCH_LIBRARY_IMPL(fastdl_emulated, CPU, m)
#else
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>
#define FASTDL_CUDA_LIBRARY(m) STABLE_TORCH_LIBRARY_IMPL(fastdl, CUDA, m)
#endif

namespace fastdl::cuda {

#if defined(FASTDL_EMULATED)

struct Device {
  explicit Device(const Tensor&) {}
  cudaStream_t stream() const { return nullptr; }
};

#else

// Makes the tensor's device the current one as long as it lives.
class Device {
 public:
  explicit Device(const Tensor& x) : index_(x.get_device_index()), guard_(index_) {}

  cudaStream_t stream() const {
    using Getter = int32_t (*)(int32_t, void**);
    static const Getter getter = [] {
      void* torch_cuda = dlopen("libtorch_cuda.so", RTLD_NOLOAD | RTLD_LAZY);
      return torch_cuda ? reinterpret_cast<Getter>(dlsym(torch_cuda, "aoti_torch_get_current_cuda_stream")) : nullptr;
    }();
    void* stream = nullptr;
    if (!getter || getter(index_, &stream) != 0)
      throw std::runtime_error("fastdl: a CUDA tensor, but this torch has no CUDA stream");
    return static_cast<cudaStream_t>(stream);
  }

 private:
  int32_t index_;
  torch::stable::accelerator::DeviceGuard guard_;
};

#endif

inline void check_launch(const char* op, cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(std::string("fastdl::") + op + ": " + cudaGetErrorString(error));
}

template <class T>
T* output(const Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

// The one switch from a tensor's dtype to a kernel's type: body(T{}), T = float, half_t or bf16_t.
template <class Body>
void for_float_type(const Tensor& x, const char* name, const Body& body) {
  switch (x.scalar_type()) {
    case ScalarType::Float: return body(float{});
    case ScalarType::Half: return body(half_t{});
    case ScalarType::BFloat16: return body(bf16_t{});
    default: throw std::runtime_error(std::string("fastdl: ") + name + ": expected float32, float16 or bfloat16");
  }
}

}  // namespace fastdl::cuda
