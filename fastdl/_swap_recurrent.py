"""What torch's recurrent layers become when they are swapped: instances of both fastdl's class and torch's, so that
``isinstance(layer, nn.LSTM)`` in a model's code goes on holding.

That has a price, the same as before the swap: torch.compile breaks its graph at every instance of nn.LSTM, nn.GRU and
nn.RNN (``torch._dynamo.config.allow_rnn = True`` lets it trace them, and swapped ones then fit into one graph). Layers
made as ``fastdl.nn.LSTM(...)`` compile without that.
"""

from __future__ import annotations

from torch import nn

from .nn import gru, lstm, rnn


class LSTM(lstm.LSTM, nn.LSTM):
    pass


class GRU(gru.GRU, nn.GRU):
    pass


class RNN(rnn.RNN, nn.RNN):
    pass


# torch's class -> ours, and the op that ours calls
SWAPS: dict[type, tuple[type, str]] = {
    nn.LSTM: (LSTM, "lstm"),
    nn.GRU: (GRU, "gru"),
    nn.RNN: (RNN, "rnn"),
    nn.LSTMCell: (lstm.LSTMCell, "lstm"),
    nn.GRUCell: (gru.GRUCell, "gru"),
    nn.RNNCell: (rnn.RNNCell, "rnn"),
}

FUSED = (lstm.LSTM, gru.GRU, rnn.RNN, lstm.LSTMCell, gru.GRUCell, rnn.RNNCell)
