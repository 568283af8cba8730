"""Drop-in modules, one file a room."""

from .activation import Activation, GatedMLP
from .norm import LayerNorm, RMSNorm
from .quant_matmul import QuantEmbedding, QuantLinear

__all__ = ["Activation", "GatedMLP", "LayerNorm", "QuantEmbedding", "QuantLinear", "RMSNorm"]
