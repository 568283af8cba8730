// fastdl::cuda_smoke(Tensor x, float scale, float shift) -> Tensor, CUDA key: checks, stream, registration.
//
// The library must also load with the CPU build of torch, so nothing here may need a symbol of libtorch_cuda:
// the current stream is looked up at the first call.
#include "cuda/smoke.cuh"

#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <stdexcept>
#include <string>

namespace {

using torch::stable::Tensor;

cudaStream_t current_stream(int32_t device) {
  using Getter = int32_t (*)(int32_t, void**);
  static const Getter getter = [] {
    void* torch_cuda = dlopen("libtorch_cuda.so", RTLD_NOLOAD | RTLD_LAZY);
    return torch_cuda ? reinterpret_cast<Getter>(dlsym(torch_cuda, "aoti_torch_get_current_cuda_stream")) : nullptr;
  }();
  void* stream = nullptr;
  if (!getter || getter(device, &stream) != 0)
    throw std::runtime_error("fastdl: a CUDA tensor, but this torch has no CUDA stream");
  return static_cast<cudaStream_t>(stream);
}

Tensor cuda_smoke(const Tensor& x, double scale, double shift) {
  if (x.scalar_type() != torch::headeronly::ScalarType::Float || !x.is_contiguous())
    throw std::runtime_error("fastdl::cuda_smoke: x must be contiguous float32");
  const int32_t device = x.get_device_index();
  torch::stable::accelerator::DeviceGuard guard(device);
  Tensor y = torch::stable::empty_like(x);
  const cudaError_t error =
      fastdl::cuda::smoke_launch(static_cast<const float*>(x.data_ptr()), static_cast<float*>(y.data_ptr()), x.numel(),
                                 static_cast<float>(scale), static_cast<float>(shift), current_stream(device));
  if (error != cudaSuccess) throw std::runtime_error(std::string("fastdl::cuda_smoke: ") + cudaGetErrorString(error));
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastdl, CUDA, m) { m.impl("cuda_smoke", TORCH_BOX(&cuda_smoke)); }
