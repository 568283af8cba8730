"""Drop-in modules, one file a room."""

from .group_norm import GroupNorm
from .norm import LayerNorm, RMSNorm
from .quant_matmul import QuantEmbedding, QuantLinear

__all__ = ["GroupNorm", "LayerNorm", "QuantEmbedding", "QuantLinear", "RMSNorm"]
