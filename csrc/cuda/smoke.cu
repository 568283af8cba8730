// fastdl::cuda_smoke(Tensor x, float scale, float shift) -> Tensor, CUDA key: checks, stream, registration.
#include "cuda/smoke.cuh"

#include "cuda/wrapper.h"

namespace fastdl::cuda {
namespace {

Tensor cuda_smoke(const Tensor& x, double scale, double shift) {
  check(x.scalar_type() == ScalarType::Float && x.is_contiguous(), "cuda_smoke: x must be contiguous float32");
  const Device device(x);
  Tensor y = torch::stable::empty_like(x);
  check_launch("cuda_smoke",
               smoke_launch(static_cast<const float*>(x.const_data_ptr()), static_cast<float*>(y.mutable_data_ptr()),
                            x.numel(), static_cast<float>(scale), static_cast<float>(shift), device.stream()));
  return y;
}

}  // namespace

FASTDL_CUDA_LIBRARY(m) { m.impl("cuda_smoke", TORCH_BOX(&cuda_smoke)); }

}  // namespace fastdl::cuda
