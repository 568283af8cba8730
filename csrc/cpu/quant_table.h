// The kernels of the level in use, for the code that is compiled once.
#pragma once

#include "cpu/quant_matmul_kernel.h"

namespace fastdl {

const QuantMatmulKernels& quant_matmul_table();

}  // namespace fastdl
