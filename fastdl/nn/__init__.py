"""Drop-in modules, one file a room."""

from ._transformer import TransformerDecoderLayer, TransformerEncoderLayer
from .activation import Activation, GatedMLP
from .additive_attention import AdditiveAttention, PointerAttention
from .attention import MultiheadAttention
from .batch_norm import BatchNorm1d, BatchNorm2d
from .group_norm import GroupNorm
from .gru import GRU, GRUCell
from .linear_scan import QRNN, S4D
from .lstm import LSTM, LSTMCell
from .norm import LayerNorm, RMSNorm
from .position import LearnedPositionalEncoding, PositionalEncoding
from .quant_matmul import QuantEmbedding, QuantLinear
from .rnn import RNN, RNNCell
from .rope import RotaryEmbedding
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
    "LearnedPositionalEncoding",
    "Mamba",
    "MultiheadAttention",
    "PointerAttention",
    "PositionalEncoding",
    "QuantEmbedding",
    "QuantLinear",
    "RMSNorm",
    "RNNCell",
    "RotaryEmbedding",
    "TransformerDecoderLayer",
    "TransformerEncoderLayer",
]
