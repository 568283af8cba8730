"""Drop-in modules, one file a room."""

from .quant_matmul import QuantEmbedding, QuantLinear

__all__ = ["QuantEmbedding", "QuantLinear"]
