"""Drop-in modules, one file a room."""

from .batch_norm import BatchNorm1d, BatchNorm2d
from .group_norm import GroupNorm
from .norm import LayerNorm, RMSNorm
from .quant_matmul import QuantEmbedding, QuantLinear

__all__ = ["BatchNorm1d", "BatchNorm2d", "GroupNorm", "LayerNorm", "QuantEmbedding", "QuantLinear", "RMSNorm"]
