"""Drop-in modules, one file a room."""

from .norm import LayerNorm, RMSNorm
from .quant_matmul import QuantEmbedding, QuantLinear

__all__ = ["LayerNorm", "QuantEmbedding", "QuantLinear", "RMSNorm"]
