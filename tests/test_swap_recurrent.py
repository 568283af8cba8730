"""fastdl.accelerate and restore with torch's recurrent layers and cells."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, rnn

import fastdl
from fastdl.nn import _recurrent_inference as inference

LAYERS = ("LSTM", "GRU", "RNN")
CELLS = ("LSTMCell", "GRUCell", "RNNCell")


class Model(nn.Module):
    """Every recurrent layer and cell in a chain."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.lstm = nn.LSTM(6, 4, 2, dropout=0.0, bidirectional=True)
        self.gru = nn.GRU(8, 5, bias=False)
        self.rnn = nn.RNN(5, 6, nonlinearity="relu")
        self.lstm_cell, self.gru_cell, self.rnn_cell = (
            nn.LSTMCell(6, 3),
            nn.GRUCell(3, 4),
            nn.RNNCell(4, 2, True, "relu"),
        )

    def forward(self, x):
        y, _ = self.lstm(x)
        y, _ = self.gru(y)
        y, last = self.rnn(y)
        h, c = self.lstm_cell(last[0])
        return y, self.rnn_cell(self.gru_cell(h)), c


def state(model):
    """Everything that a swap must leave as it was."""
    return [
        (name, type(module), dict(vars(module)), [id(p) for p in module.parameters(recurse=False)])
        for name, module in model.named_modules()
    ]


def test_swap_and_restore():
    model, x = Model(), torch.randn(5, 3, 6)
    before, expected = state(model), model(x)
    report = fastdl.accelerate(model, backend="torch")
    assert len(report.swapped) == 6 and not report.left and not report.others
    for kind in (*LAYERS, *CELLS):
        layer = next(m for m in model.modules() if isinstance(m, getattr(nn, kind)))
        assert isinstance(layer, getattr(fastdl.nn, kind)) and layer.backend == "torch"
        assert repr(layer).startswith(kind + "(")
    for training in (True, False):
        for gradients in (True, False):
            with torch.set_grad_enabled(gradients):
                for a, b in zip(model.train(training)(x), expected, strict=True):
                    torch.testing.assert_close(a, b)
    assert id(model.lstm) in inference._kept
    fastdl.restore(model.train())
    assert state(model) == before and all(torch.equal(a, b) for a, b in zip(model(x), expected, strict=True))
    assert id(model.lstm) not in inference._kept


def test_automatic_choice(native):
    model = Model()
    assert len(fastdl.accelerate(model).swapped) == 6 and model.lstm.backend is None
    assert [y.name for y in fastdl.accelerate(nn.ModuleList([nn.LSTM(2, 3).double()])).swapped] == []


def test_training_follows_the_unswapped_run():
    """An optimizer made before the swap trains the same parameters: 20 steps, the same losses."""

    def losses(swapped):
        model, x = Model(), torch.randn(5, 3, 6, generator=torch.Generator().manual_seed(1))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        if swapped:
            assert len(fastdl.accelerate(model, backend="torch").swapped) == 6
        found = []
        for _ in range(20):
            loss = sum((y - 0.5).square().mean() for y in model(x))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            found.append(loss.item())
        return found

    plain, fused = losses(False), losses(True)
    assert plain[-1] < 0.9 * plain[0]
    torch.testing.assert_close(torch.tensor(fused), torch.tensor(plain), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", LAYERS)
def test_packed_sequences_copies_and_pickles(kind):
    layer = getattr(nn, kind)(3, 5, 2, dropout=0.0, bidirectional=True)
    packed = rnn.pack_sequence([torch.randn(2, 3), torch.randn(4, 3)], enforce_sorted=False)
    expected = layer(packed)[0].data
    fastdl.accelerate(layer, backend="torch")
    torch.testing.assert_close(layer(packed)[0].data, expected)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        torch.testing.assert_close(other.eval()(packed)[0].data, expected)
        other.double().float()
        fastdl.restore(other)
        assert type(other) is getattr(nn, kind)
        torch.testing.assert_close(other(packed)[0].data, expected)
    torch._dynamo.reset()
    x = torch.randn(4, 2, 3)
    torch.testing.assert_close(torch.compile(layer, backend="aot_eager")(x)[0], layer(x)[0])


def test_reasons_to_leave_a_layer():
    class Mine(nn.LSTM):
        pass

    model = nn.ModuleList([Mine(2, 3), nn.GRU(2, 3, device="meta"), fastdl.nn.LSTM(2, 3), fastdl.nn.GRUCell(2, 3)])
    reasons = {layer.name: layer.reason for layer in fastdl.accelerate(model, backend="torch").left}
    assert "subclass that may compute something else" in reasons["0"] and "meta device" in reasons["1"]
    assert reasons["2"] == reasons["3"] == "is a fused layer"


def test_parametrized_after_the_swap():
    """The class that torch makes for a parametrized layer goes back with it."""
    layer, x = nn.LSTM(3, 5), torch.randn(4, 2, 3)
    fastdl.accelerate(layer, backend="torch")
    parametrizations.weight_norm(layer, "weight_hh_l0")
    expected = layer(x)[0]
    fastdl.restore(layer)
    assert isinstance(layer, nn.LSTM) and not isinstance(layer, fastdl.nn.LSTM)
    torch.testing.assert_close(layer(x)[0], expected)


def test_transformers_are_not_recurrent():
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 4, 32, batch_first=True), 1)
    report = fastdl.accelerate(model, only="layers.0.norm1", backend="torch")
    assert [y.kind for y in report.layers] == [
        "TransformerEncoderLayer",
        "MultiheadAttention",
        "LayerNorm",
        "LayerNorm",
    ]
    assert [y.name for y in report.swapped] == ["layers.0.norm1"]
