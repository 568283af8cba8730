"""The table of ops: rooms, their public functions, and where each is computed.

A room has the same stem in every layer: ``fastdl/ops/<room>.py`` is its contract (maths, schema, gradient, what each
back end refuses), ``fastdl/reference/<room>.py`` its meaning in plain torch, ``csrc/cpu/<room>*.cpp`` its CPU kernels,
``fastdl/nn/<room>.py`` its modules, ``tests/test_<room>.py`` its test. `ROOMS` says which of them a room promises.
"""

from __future__ import annotations

from dataclasses import dataclass

from .activation import activation, geglu, swiglu
from .additive_attention import additive_attention
from .attention import attention
from .attention_decode import attention_decode
from .batch_norm import batch_norm
from .decoder_block import DecoderLayer, DecoderStack, decoder_blocks
from .group_norm import group_norm
from .gru import gru
from .linear_scan import linear_scan
from .lstm import lstm
from .norm import layer_norm, rms_norm
from .position import add_positions, alibi_slopes, sinusoidal_table
from .quant_matmul import auto_activation, quant_embedding, quant_matmul, quantize
from .rnn import rnn
from .rope import rope, rope_qk, rope_table
from .selective_scan import selective_scan


@dataclass(frozen=True)
class Room:
    """functions: public names; backends: those with kernels of their own, beside torch; modules: names in fastdl.nn."""

    functions: tuple[str, ...]
    backends: tuple[str, ...] = ()
    modules: tuple[str, ...] = ()


ROOMS: dict[str, Room] = {
    # room           functions, back ends, modules
    "quant_matmul": Room(
        ("quantize", "quant_matmul", "quant_embedding", "auto_activation"), ("cpu",), ("QuantLinear", "QuantEmbedding")
    ),
    "decoder_block": Room(("decoder_blocks", "DecoderStack", "DecoderLayer"), ("cpu",)),
    "norm": Room(("layer_norm", "rms_norm"), ("cpu", "cuda", "triton"), ("LayerNorm", "RMSNorm")),
    "group_norm": Room(("group_norm",), ("cpu", "cuda", "triton"), ("GroupNorm",)),
    "batch_norm": Room(("batch_norm",), ("cpu", "cuda", "triton"), ("BatchNorm1d", "BatchNorm2d")),
    "lstm": Room(("lstm",), ("cpu", "cuda", "triton"), ("LSTM", "LSTMCell")),
    "gru": Room(("gru",), ("cpu", "cuda", "triton"), ("GRU", "GRUCell")),
    "rnn": Room(("rnn",), ("cpu", "cuda", "triton"), ("RNN", "RNNCell")),
    "linear_scan": Room(("linear_scan",), ("cpu", "cuda", "triton"), ("QRNN", "S4D")),
    "selective_scan": Room(("selective_scan",), ("cpu", "cuda", "triton"), ("Mamba",)),
    "rope": Room(("rope", "rope_qk", "rope_table"), ("cpu", "cuda", "triton"), ("RotaryEmbedding",)),
    "position": Room(
        ("add_positions", "sinusoidal_table", "alibi_slopes"),
        ("cpu", "cuda", "triton"),
        ("PositionalEncoding", "LearnedPositionalEncoding"),
    ),
    "attention": Room(
        ("attention",),
        ("cpu", "cuda", "triton"),
        ("MultiheadAttention", "TransformerEncoderLayer", "TransformerDecoderLayer"),
    ),
    "attention_decode": Room(("attention_decode",), ("cpu", "cuda", "triton")),
    "additive_attention": Room(
        ("additive_attention",), ("cpu", "cuda", "triton"), ("AdditiveAttention", "PointerAttention")
    ),
    "activation": Room(("activation", "swiglu", "geglu"), ("cpu", "cuda", "triton"), ("Activation", "GatedMLP")),
}

__all__ = [
    "ROOMS",
    "DecoderLayer",
    "DecoderStack",
    "Room",
    "activation",
    "add_positions",
    "additive_attention",
    "alibi_slopes",
    "attention",
    "attention_decode",
    "auto_activation",
    "batch_norm",
    "decoder_blocks",
    "geglu",
    "group_norm",
    "gru",
    "layer_norm",
    "linear_scan",
    "lstm",
    "quant_embedding",
    "quant_matmul",
    "quantize",
    "rms_norm",
    "rnn",
    "rope",
    "rope_qk",
    "rope_table",
    "selective_scan",
    "sinusoidal_table",
    "swiglu",
]
