"""Drop-in modules, one file a room."""

from .activation import Activation, GatedMLP
from .batch_norm import BatchNorm1d, BatchNorm2d
from .group_norm import GroupNorm
from .linear_scan import QRNN, S4D
from .norm import LayerNorm, RMSNorm
from .quant_matmul import QuantEmbedding, QuantLinear
from .selective_scan import Mamba

__all__ = [
    "QRNN",
    "S4D",
    "Activation",
    "BatchNorm1d",
    "BatchNorm2d",
    "GatedMLP",
    "GroupNorm",
    "LayerNorm",
    "Mamba",
    "QuantEmbedding",
    "QuantLinear",
    "RMSNorm",
]
