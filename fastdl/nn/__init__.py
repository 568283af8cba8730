"""Drop-in modules, one file a room."""

from .activation import Activation, GatedMLP
from .additive_attention import AdditiveAttention, PointerAttention
from .batch_norm import BatchNorm1d, BatchNorm2d
from .group_norm import GroupNorm
from .gru import GRU, GRUCell
from .linear_scan import QRNN, S4D
from .lstm import LSTM, LSTMCell
from .norm import LayerNorm, RMSNorm
from .quant_matmul import QuantEmbedding, QuantLinear
from .rnn import RNN, RNNCell
from .selective_scan import Mamba

__all__ = [
    "GRU",
    "LSTM",
    "QRNN",
    "RNN",
    "S4D",
    "Activation",
    "AdditiveAttention",
    "BatchNorm1d",
    "BatchNorm2d",
    "GRUCell",
    "GatedMLP",
    "GroupNorm",
    "LSTMCell",
    "LayerNorm",
    "Mamba",
    "PointerAttention",
    "QuantEmbedding",
    "QuantLinear",
    "RMSNorm",
    "RNNCell",
]
