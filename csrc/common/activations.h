// The activations' numbers in the schemas (KINDS of fastdl/reference/activation.py).
#pragma once

namespace fastdl {

enum ActivationKind { RELU, LEAKY_RELU, GELU, GELU_TANH, SWISH, TANH, SIGMOID, IDENTITY, ACTIVATION_KINDS };

}  // namespace fastdl
